"""The verb eval."""
