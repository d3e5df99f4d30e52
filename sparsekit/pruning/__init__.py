"""The verb prune."""
