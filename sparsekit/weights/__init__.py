"""What one linear weight can be."""
