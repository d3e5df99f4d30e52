"""Time and memory of sparsekit itself."""
