"""Run the command line with `python -m sparsekit`."""

from sparsekit.cli.app import main

main()
