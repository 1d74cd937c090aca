"""The errors a user meets. Each message is one line: what came, what was expected, which option to change."""

from __future__ import annotations


class ThalwegError(Exception):
    """Base of every error Thalweg raises on purpose. The CLI prints it as one line and exits with code 2."""


class ConfigError(ThalwegError, ValueError):
    """An option, or a value in config.json, that cannot be honoured."""


class CheckpointError(ThalwegError, ValueError):
    """A model folder, weight file or tokenizer that is missing, damaged, hostile or does not fit its config."""


class InvalidRequest(ThalwegError, ValueError):
    """A request that is refused before it runs: wrong parameters, too many tokens, token ids out of range."""


class UnsupportedError(ThalwegError, NotImplementedError):
    """Something that Thalweg does not support; the message says what it does support."""


class RequestTimeout(ThalwegError):
    """A request that took longer than the server allows, or whose client does not read its answer."""


class QueueTimeout(ThalwegError):
    """A request that waited too long for a free slot."""


class ProfileConflict(ThalwegError):
    """A profile that cannot start since another is under way, or cannot stop since none is."""


class EngineDeadError(ThalwegError, RuntimeError):
    """The engine process or one of its ranks died; no request can be served any more."""


class RankLostError(EngineDeadError):
    """A rank that another one waited for in vain; which one it was, and why, that one does not know."""


class KernelError(ThalwegError, RuntimeError):
    """A kernel that could not be loaded or launched, or that the device gave up; it names the kernel and the code."""


class SessionNotFound(ThalwegError, LookupError):
    """A session that does not exist, or does not belong to the caller."""


class SessionConflict(ThalwegError):
    """A session's name that is in use, or a session that changed while a request continued it."""
