"""`python -m duovsr` is `duovsr`."""

from duovsr.cli import main

if __name__ == "__main__":
    main()
