"""A package, so that files here may have the names of those in the folders beside it."""
