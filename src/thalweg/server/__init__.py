"""The HTTP server: an OpenAI-compatible API over an engine in a process of its own."""
