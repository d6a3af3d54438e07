"""A program that lists the keys of an LMDB: `python lmdb_scan.py FOLDER`.

liblmdb trusts the file that it maps, and a damaged file crashes the process that reads it. This program takes that
risk: it looks up every key and reads the end of every value. If it succeeds, the calling process can read the file too.
"""

import os
import struct
import sys

RECORD = struct.Struct("<HQ")  # comes before each key on standard output: lengths of the key and its value, in bytes


def main(folder: str) -> None:
    """Write a RECORD and the key for every entry, in order. Exit with a message if the file is inconsistent."""
    import lmdb

    try:
        opened = lmdb.open(folder, readonly=True, lock=False, readahead=False, create=False)
    except lmdb.MemoryError:  # the address space is exhausted, not the memory
        sys.exit("its header claims a size that cannot be mapped")
    with opened as environment:
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        found = os.path.getsize(os.path.join(folder, "data.mdb"))
        if found < needed:
            sys.exit(f"expected {needed} bytes in data.mdb, got {found}")
        previous = None
        with environment.begin(buffers=True) as transaction:
            for view, _ in transaction.cursor():
                key = bytes(view)
                if previous is not None and key <= previous:  # pages that lead back to one another would never end
                    sys.exit(f"key {key!r} follows {previous!r}")
                value = transaction.get(key)
                if value is None:
                    sys.exit(f"key {key!r} is listed but not found")
                bytes(value[-1:])
                sys.stdout.buffer.write(RECORD.pack(len(key), len(value)) + key)
                previous = key


if __name__ == "__main__":
    # Python puts this file's folder on the path, so `import lmdb` would find the lmdb.py in it.
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]
    main(sys.argv[1])
