"""A model while it computes."""
