"""Lists the keys of an LMDB in a process of its own: `python lmdb_scan.py FOLDER`.

liblmdb trusts the file that it maps: a damaged one ends the process that reads it. Here that is this process. Every key
is looked up and the end of every value read, so that where this ends well the same reads end well in the caller too.
"""

import os
import struct
import sys

import lmdb

RECORD = struct.Struct("<HQ")  # before each key on standard output: bytes of the key, bytes of its value


def main(folder: str) -> None:
    """Writes a RECORD and the key for every entry, in order; ends with a message where the file cannot be right."""
    try:
        opened = lmdb.open(folder, readonly=True, lock=False, readahead=False, create=False)
    except lmdb.MemoryError:  # of addresses, not of memory
        sys.exit("its header claims a size that cannot be mapped")
    with opened as environment:
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        found = os.path.getsize(os.path.join(folder, "data.mdb"))
        if found < needed:
            sys.exit(f"data.mdb has {found} bytes of {needed}")
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
    main(sys.argv[1])
