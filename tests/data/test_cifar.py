"""The original CIFAR-10 archive: read, but never unpickled."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import everything, open_source, write_folder

from spigan.data.sources import cifar


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 20 images instead of 10,000."""
    monkeypatch.setattr(cifar, "BATCH_IMAGES", 20)


def cifar_pixels(batch: int, count: int = 10_000) -> np.ndarray:
    """uint8 [count, 3072], different in every batch and image."""
    pixels = np.tile(np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8), (count // 4, 1))
    pixels[:, 0] = batch
    pixels[:, 1:3] = np.arange(count, dtype=">u2").view(np.uint8).reshape(-1, 2)
    return pixels


def cifar_pickle(pixels: np.ndarray, *, fortran: bool = False, extra: bytes = b"") -> bytes:
    """A batch as Python 2's cPickle wrote it (protocol 2, strings as BINSTRING), instruction by instruction."""
    data = pixels.tobytes("F" if fortran else "C")
    return (
        b"\x80\x02}(U\x0bbatch_labelU\x15training batch 1 of 5U\x06labels](" + b"K\x07" * 10_000 + b"eU\x04data"
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M\x10'M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + (b"\x88" if fortran else b"\x89")
        + (b"T" + struct.pack("<i", len(data)) + data + b"tb" + extra + b"u.")
    )


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.usefixtures("small_batches")
def test_cifar_archive(tmp_path: Path) -> None:
    order = [4, 1, 5, 2, 3]  # members come in any order; their names tell
    members = {f"data_batch_{batch}": cifar_pickle(cifar_pixels(batch, 20), fortran=batch == 2) for batch in order}
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {"readme.html": b"", **members})
    dataset = open_source(path)
    assert (dataset.name, len(dataset), dataset.channels, dataset.resolution) == ("cifar-10-python", 100, 3, 32)
    expected = np.concatenate([cifar_pixels(batch, 20) for batch in range(1, 6)])
    np.testing.assert_array_equal(everything(dataset).reshape(100, 3072).numpy(), expected)
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz lacks test_batch"):
        open_source(path, split="test")
    with pytest.raises(ValueError, match="has no split 'val'"):
        open_source(path, split="val")


def test_cifar_folder_of_true_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "cifar-10-batches-py", {"test_batch": cifar_pickle(cifar_pixels(0))})
    dataset = open_source(folder, split="test")
    np.testing.assert_array_equal(everything(dataset).reshape(10_000, 3072).numpy(), cifar_pixels(0))
    with pytest.raises(ValueError, match="lacks data_batch_1, data_batch_2"):
        open_source(folder)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("kind", ["alone", "with images", "instance", "protocol 4"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "executed"
    command = f"touch {marker}".encode()
    call = b"cos\nsystem\n(U" + bytes([len(command)]) + command + b"tR"
    payload = {
        "alone": b"\x80\x02" + call + b".",
        "with images": cifar_pickle(cifar_pixels(0, 20), extra=call + b"0"),
        "instance": b"(S'" + command + b"'\nios\nsystem\n.",
        "protocol 4": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",
    }[kind]
    folder = write_folder(tmp_path / "cifar-10-batches-py", {"test_batch": payload})
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {"test_batch": payload})
    for source, name in ((folder, "cifar-10-batches-py/test_batch"), (path, r"cifar-10-python\.tar\.gz!test_batch")):
        with pytest.raises(ValueError, match=rf"{name} is not a batch of the CIFAR-10 .*it would import"):
            open_source(source, split="test")
    assert not marker.exists()
    if kind != "with images":  # the test's own teeth: unpickling does execute it
        pickle.loads(payload)
        assert marker.exists()


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    "payload", [b"", b"garbage", cifar_pickle(cifar_pixels(0, 20))[:-5_000], cifar_pickle(cifar_pixels(0, 20)[:19])]
)
def test_damaged_cifar_batch(tmp_path: Path, payload: bytes) -> None:
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {"test_batch": payload})
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz!test_batch is not a batch"):
        open_source(path, split="test")


@pytest.mark.usefixtures("small_batches")
def test_cifar_archive_cut_short(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {"test_batch": cifar_pickle(cifar_pixels(0, 20))})
    path.write_bytes(path.read_bytes()[:-10_000])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz cannot be read as a tar archive"):
        open_source(path, split="test")
