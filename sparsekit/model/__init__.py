"""Models in memory: architecture, block stream, full models."""
