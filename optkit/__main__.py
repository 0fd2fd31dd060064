"""``python -m optkit`` is the command line."""

from optkit.cli import main

if __name__ == "__main__":
    main()
