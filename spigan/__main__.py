"""`python -m spigan`, as launchers of several processes call it: torchrun --nproc-per-node 2 -m spigan train ..."""

from spigan.cli import main

if __name__ == "__main__":
    main()
