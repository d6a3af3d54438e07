"""Images for training and evaluation: `open_dataset` reads a source, `loader` yields its shuffled batches.

How a stored image becomes pixels, for example a row of a parquet file:

1. `open_dataset` (dataset.py) asks `find_source` (sources/find.py) for the `Source` that `DataConfig.source` names.
2. `dataset[i]` calls `ImageReader.read` (decode.py), which calls `source.open(i)`. For parquet, that is
   `RowGroupSource.open` or `RowSource.open` (sources/parquet.py), which reads the bytes of the row.
3. `open_image` (decode.py) reads the header of the image, within limits.
4. `ImageReader` checks the header, decodes the pixels, and makes a square with the right size and channels.

To train on images that are stored in some other way, write a `Source` and register it: see `spigan.data.Source`.
"""

from spigan.data.batches import loader
from spigan.data.config import DataConfig
from spigan.data.dataset import ImageDataset, open_dataset
from spigan.data.sources.base import Source, UnsuitableImage
from spigan.data.sources.find import register_source

__all__ = ["DataConfig", "ImageDataset", "Source", "UnsuitableImage", "loader", "open_dataset", "register_source"]
