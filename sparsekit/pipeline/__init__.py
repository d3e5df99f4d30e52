"""The verbs: each takes a configuration and gives back a report."""
