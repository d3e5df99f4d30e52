"""The forms of a linear weight: patterns, grids, factors and packing."""
