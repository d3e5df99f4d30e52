"""What a checkpoint says of itself."""
