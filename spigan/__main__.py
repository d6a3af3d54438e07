"""`python -m spigan`, for launchers that start several processes: torchrun --nproc-per-node 2 -m spigan train ..."""

from spigan.cli.program import main

if __name__ == "__main__":
    main()
