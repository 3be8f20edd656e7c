"""Training checkpoints, manifests, canonical files."""
