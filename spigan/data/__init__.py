"""Images for training and evaluation: `open_dataset` reads a source, `loader` yields its shuffled batches."""

from spigan.data.dataset import DataConfig, ImageDataset, loader, open_dataset

__all__ = ["DataConfig", "ImageDataset", "loader", "open_dataset"]
