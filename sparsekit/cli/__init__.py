"""The command line: the only place with typer, rich, printing and exit codes."""
