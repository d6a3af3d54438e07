"""Limits for reading untrusted files, and sizes of what is cached, written or sent to another process.

Other modules look up the values here on every use (`limits.MAX_PIXELS`), so that a test can change a value in one
place.
"""

# ---- Untrusted files ----

MAX_PIXELS = 1 << 26
"""Pixels of one stored image (8192 x 8192). An image that claims more is treated as a decompression bomb."""

CACHE_BYTES = 2 << 30
"""`cache="auto"` keeps decoded images in memory up to this size. Encoded images from parquet files have the same
limit."""

MAX_COLUMN_BYTES = 2 * CACHE_BYTES
"""Bytes that images from one parquet file may take in memory. If they take more, the file's footer lied about its
size."""

ROW_GROUP_BYTES = 4 << 20
"""Parquet files above `CACHE_BYTES` are read in place if their row groups take at most this many bytes on average."""

# ---- Conversion and checking ----

CHUNK = 32
"""Images per message from a worker process."""

GROUP_BYTES = 1 << 19
"""Size of a row group in a converted file; the image that reaches it ends the group. Reading one image at random reads
its whole group."""
