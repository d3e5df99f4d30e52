"""Recipes: stages, variants, each step done once."""
