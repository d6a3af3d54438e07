"""Export a model as one file that runs without spigan: ONNX, for onnxruntime and others, or pt2, for PyTorch."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from spigan._version import __version__
from spigan.files import atomic_path
from spigan.images import to_unit_interval
from spigan.models import SPIGAN
from spigan.models.load import Model, load_model
from spigan.ops import use_backend

FORMATS = ("onnx", "pt2")

METADATA = "spigan.json"
"""Name of the description in an exported file: a key in the metadata of an ONNX model, or an extra file in a pt2
archive."""

_OPSET = 18  # the version that torch's exporter writes; any other needs a conversion, which might fail
# In bytes. An ONNX file is a protobuf message of less than 2 GiB; this leaves 16 MiB for the graph.
ONNX_MAX_WEIGHTS = 2**31 - 2**24


class _ImagesOfNoise(nn.Module):
    """The exported function: z [N, *z_shape] -> images [N, C, H, W] in [0, 1]."""

    def __init__(self, model: SPIGAN, t: float) -> None:
        super().__init__()
        self.model, self.t = model, t

    def forward(self, z: Tensor) -> Tensor:
        return to_unit_interval(self.model(z, self.t, "const"))


def export_model(
    model: Model, path: str | Path, *, format: str | None = None, t: float = 1.0, batch_size: int | None = None
) -> Path:
    """Write a program of plain operators that makes the images of `spigan.sample(z=z, t=t)`.

    The input is z, float32 [N, *config.z_shape], standard normal. The output is images, float32 [N, C, H, W] in [0, 1].
    The program computes in float32 with the stored per-pixel noise, so the same z always gives the same image. The file
    also holds a JSON object named `METADATA`, with spigan's version, the model's config, z_shape, t and the range.

    Args:
        model: as in `spigan.sampling.load_model`. It is not changed.
        path: the file to write. It is written completely or not at all.
        format: "onnx" (opset 18; input "z", output "images") or "pt2" (read by `torch.export.load`). By default, the
            suffix of `path` decides.
        t: time in [0, 1]. 1 gives the clean image.
        batch_size: the only N that the program accepts. Default: any N from 1.

    Returns:
        The path.

    Raises:
        ValueError: if an argument is out of range, the solver is dopri5, or the weights are too large for an ONNX file
            (2 GiB).
        ImportError: if the format is "onnx" and the extra `export` is not installed.
    """
    path, t = Path(path), float(t)  # float refuses a list of times, which the model itself would accept
    format = format_of(path) if format is None else format
    if format not in FORMATS:
        raise ValueError(f'format must be "onnx" or "pt2", got {format!r}')
    if path.is_dir():
        raise ValueError(f"{path} is a folder; an exported model needs a file name")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if format == "onnx":
        _check_onnx_packages()
    # Copy the model, because a program shares its weights with the traced model.
    network = copy.deepcopy(load_model(model, "cpu")).float().eval().requires_grad_(False)
    write = _write_onnx if format == "onnx" else _write_pt2
    # If the caller has autocast on, its casts would become part of the program.
    with torch.autocast("cpu", enabled=False):
        program = _trace(network, t, batch_size)
        with atomic_path(path) as scratch:
            write(program, scratch, _metadata(network, t))
    return path


def format_of(path: Path) -> str:
    """Return the format for the suffix of a path.

    Raises:
        ValueError: if the suffix is unknown.
    """
    format = path.suffix.lower().removeprefix(".")
    if format not in FORMATS:
        raise ValueError(f"{path}: cannot tell the format from the suffix; use .onnx or .pt2, or give the format")
    return format


def _check_onnx_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'writing ONNX files needs onnx and onnxscript: pip install "spigan[export]" ({error})'
        ) from error


def _trace(network: SPIGAN, t: float, batch_size: int | None) -> ExportedProgram:
    """Return the program as one graph of PyTorch's own operators, on the CPU."""
    if network.config.adaptive:
        raise ValueError(
            'a model with the solver "dopri5" cannot be exported, because its steps depend on the values; set '
            'ode_solver to "rk4" in the model\'s config.json: the weights fit all solvers'
        )
    # torch.export would treat a size of 1 as a constant.
    z = torch.zeros(batch_size or 2, *network.config.z_shape)
    sizes = None if batch_size else {"z": {0: torch.export.Dim("batch", min=1)}}
    with use_backend("reference"), _quietly():
        # Without decompositions, this only inlines the blocks in which the networks turn autocast off.
        program = torch.export.export(_ImagesOfNoise(network, t), (z,), dynamic_shapes=sizes).run_decompositions({})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine, which would be stored
    return program


def _metadata(network: SPIGAN, t: float) -> str:
    config = network.config
    return json.dumps(
        {"spigan": __version__, "config": config.model_dump(), "z_shape": config.z_shape, "t": t, "range": [0, 1]}
    )


def _write_pt2(program: ExportedProgram, path: Path, metadata: str) -> None:
    with path.open("wb") as file, _quietly():
        torch.export.save(program, file, extra_files={METADATA: metadata})


def _write_onnx(program: ExportedProgram, path: Path, metadata: str) -> None:
    stored = [*program.state_dict.values(), *program.constants.values()]
    weights = sum(value.nbytes for value in stored if isinstance(value, torch.Tensor))
    if weights > ONNX_MAX_WEIGHTS:
        # ONNX could store the weights in a second file, but neither file would be complete without the other.
        raise ValueError(
            f"an ONNX file holds at most {ONNX_MAX_WEIGHTS} bytes of weights, but this model has {weights}: "
            "export it as pt2"
        )
    with _quietly():
        translated = torch.onnx.export(
            program,
            (),
            input_names=["z"],
            output_names=["images"],
            opset_version=_OPSET,
            dynamic_shapes={"z": {0: "batch"}},
            verbose=False,
        )
    assert translated is not None
    proto = translated.model_proto
    proto.metadata_props.add(key=METADATA, value=metadata)
    path.write_bytes(proto.SerializeToString())


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the warnings of torch's exporters about torchvision and themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
