"""Token rows."""
