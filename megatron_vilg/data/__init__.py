"""Pairs, tokenizers, token caches, batches."""
