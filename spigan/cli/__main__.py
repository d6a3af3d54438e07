"""`python -m spigan.cli`."""

from spigan.cli import main

main()
