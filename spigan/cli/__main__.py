"""`python -m spigan.cli`."""

from spigan.cli.program import main

if __name__ == "__main__":
    main()
