"""Coverage-guided fuzzing of the readers that are written in Python.

    pip install atheris
    python tests/fuzz/atheris_readers.py KIND [CORPUS] [-max_total_time=60] [other options of libFuzzer]

KIND is one of `TARGETS`; inputs start from its examples, and those that lead to new code are kept in CORPUS where one
is given. It ends with a trace and a file crash-... where a reader does what it never must.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["spigan", "tarfile", "zipfile", "tomllib", "pickletools", "json"]):
    from fuzz_targets import COUNTS, TARGETS, scratch, try_file


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nKIND: {', '.join(TARGETS)}")
    kind = sys.argv.pop(1)
    seeds = scratch() / "seeds"
    seeds.mkdir()
    for index, content in enumerate(TARGETS[kind].examples()):
        (seeds / str(index)).write_bytes(content)
    sys.stdin.close()

    def read(content: bytes) -> None:
        try_file(kind, content, timers=False)
        if sum(COUNTS.values()) % 1000 == 0:
            print(f"{kind}: {COUNTS[kind, 'refused']} refused, {COUNTS[kind, 'accepted']} read", flush=True)

    corpus = sys.argv[1:2] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else []
    options = [argument for argument in sys.argv[1:] if argument not in corpus]
    atheris.Setup([sys.argv[0], *corpus, str(seeds), *options], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
