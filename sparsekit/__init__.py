"""Prune Hugging Face language-model checkpoints on disk, and know what it cost."""

__version__ = "0.1.0"
