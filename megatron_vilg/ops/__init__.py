"""Tensors in, tensors out: who may see whom, attention, sampling."""
