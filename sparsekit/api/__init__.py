"""Verbs as functions whose keywords are the options of the commands."""
