"""Numerical methods for one weight."""
