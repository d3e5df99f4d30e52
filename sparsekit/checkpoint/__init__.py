"""Checkpoints on disk: reading, writing, and where they come from."""
