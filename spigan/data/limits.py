"""Limits on what is read from untrusted files, and sizes of what is kept, written or sent to another process.

Other modules look them up here at every use (`limits.MAX_PIXELS`), so that a test can change one in a single place.
"""

# ---- Untrusted files ----

MAX_PIXELS = 1 << 26
"""Pixels of one stored image (8192 x 8192). An image that claims more is taken for a decompression bomb."""

CACHE_BYTES = 2 << 30
"""`cache="auto"` keeps decoded images up to this size in memory; so are parquet files kept, encoded."""

MAX_COLUMN_BYTES = 2 * CACHE_BYTES
"""Bytes of images from one parquet file in memory. If there are more, the file's footer lied about its size."""

ROW_GROUP_BYTES = 4 << 20
"""Parquet files above `CACHE_BYTES` are read in place if their row groups take at most this many bytes on average."""

# ---- Conversion and checking ----

CHUNK = 32
"""Images per message from a worker process."""

GROUP_BYTES = 1 << 19
"""A converted file's row group ends with the image that fills it. Reading one image at random reads its whole group."""
