"""Run the command line, also with `python -m sparsekit`."""

import sys


def main() -> None:
    """Run the command line, or say that there is none for this system."""
    if sys.platform == "win32":
        print("error: sparsekit does not run on Windows; use Linux, macOS or WSL", file=sys.stderr)
        raise SystemExit(2)
    from sparsekit.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
