"""Meshes, plans, initial weights: everything that knows of several ranks."""
