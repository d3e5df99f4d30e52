"""Origin and history of a checkpoint, and its model card."""
