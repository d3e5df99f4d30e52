"""Mathematics on a weight."""
