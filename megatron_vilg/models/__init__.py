"""Plain PyTorch modules: the transformer, the image tokenizers."""
