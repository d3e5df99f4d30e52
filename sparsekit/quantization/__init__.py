"""The verb quantize."""
