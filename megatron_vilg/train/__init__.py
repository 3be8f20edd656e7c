"""Engines, losses, loops, metrics."""
