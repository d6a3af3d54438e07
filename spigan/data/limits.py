"""Limits for reading untrusted files, and for what is kept in memory.

Other modules look up the values here on every use (`limits.MAX_PIXELS`), so that a test can change a value in one
place.
"""

# ---- Untrusted files ----

MAX_PIXELS = 1 << 26
"""Pixels of one stored image (8192 x 8192). An image that claims more is treated as a decompression bomb."""

MAX_COLUMN_BYTES = 4 << 30
"""Bytes that images from one parquet file may take in memory. If they take more, the file's footer lied about its
size: files above `ENCODED_CACHE_BYTES` are not kept in memory."""

MAX_CIFAR_ARCHIVE_BYTES = 1 << 28
"""Bytes to which cifar-10-python.tar.gz may unpack. The true archive has 186 MB."""

MAX_CIFAR_BATCH_BYTES = 1 << 25
"""Bytes of one batch of CIFAR-10. The true batches have 31 MB."""

MAX_PICKLE_INSTRUCTIONS = 1_000_000
"""Instructions of the pickle that holds a batch of CIFAR-10. The true batches have about 50,000."""

# ---- What is kept in memory ----

CACHE_BYTES = 2 << 30
"""`cache="auto"` keeps decoded images in memory up to this size."""

ENCODED_CACHE_BYTES = 2 << 30
"""The encoded images of parquet files are kept in memory up to this size. Larger files are read in place."""

ROW_GROUP_BYTES = 4 << 20
"""Parquet files are read in place only if their row groups take at most this many bytes on average."""
