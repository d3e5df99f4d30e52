"""Checkpoints side by side: rows, table, page, figures."""
