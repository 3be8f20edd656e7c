"""ERNIE-ViLG (arXiv 2112.15283) in PyTorch: one transformer for text-to-image and image-to-text."""

__version__ = "0.1.0"
