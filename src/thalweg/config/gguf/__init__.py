"""GGUF, llama.cpp's file of weights, hyperparameters and tokenizer: the container, read with suspicion. No torch."""
