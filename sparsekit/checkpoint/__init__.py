"""Checkpoints on disk, the stream of their blocks, and token rows."""
