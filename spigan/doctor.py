"""Check this installation: every operation on every backend that runs here against its reference, then five speeds.

`spigan doctor` prints the result; `.ci/gpu` runs the same cases under compute-sanitizer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spigan import ops
from spigan.ops import backends
from spigan.ops.timing import seconds_per_call
from spigan.ops.upfirdn2d import fir_filter

# ---- Correctness ----


@dataclass(frozen=True)
class Case:
    """A call of an operation.

    Attributes:
        op: name of the operation.
        what: what this case adds to the others of its operation.
        dtype: dtype of the floating-point tensors and of the result.
        call: call(**tensors, backend=...) returns the result.
        tensors: arguments on the CPU.
        gradients: whether to compare the gradients of the floating-point tensors instead of the result.
        slack: allowed rounding errors besides twice those of plain PyTorch, in units of eps max|exact|.
    """

    op: str
    what: str
    dtype: torch.dtype
    call: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    gradients: bool = False
    slack: float = 4.0

    @property
    def name(self) -> str:
        """Unique name, for example "rk4_mlp, two times, float32"."""
        return f"{self.op}, {self.what}, {str(self.dtype)[6:]}"

    def results(self, device: torch.device, backend: str, dtype: torch.dtype) -> list[Tensor]:
        """Return, on the CPU and in float64, what is compared."""
        tensors = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.tensors.items()
        }
        options = {"dtype": dtype} if self.op in ("philox_normal", "path_interpolate") else {}
        leaves = [t.requires_grad_() for t in tensors.values() if self.gradients and t.is_floating_point()]
        result = self.call(**tensors, **options, backend=backend)
        found = [result] if not leaves else torch.autograd.grad(result, leaves, torch.full_like(result, 0.125))
        return [tensor.detach().cpu().double() for tensor in found]


@dataclass(frozen=True)
class Finding:
    """What became of a case on a backend.

    Attributes:
        error: largest error, and `allowed`, the largest that passes.
        failure: why the call raised, or None.
    """

    case: str
    backend: str
    error: float = 0.0
    allowed: float = 0.0
    failure: str | None = None
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passed", self.failure is None and self.error <= self.allowed)  # NaN fails


def _normals(seed: Tensor, offset: int = 0, **options: Any) -> Tensor:
    return ops.philox_normal((len(seed), 3, 37), seed=seed, offset=offset, **options)


def _path(x0: Tensor, noise: Tensor | None = None, flips: Tensor | None = None, **options: Any) -> Tensor:
    seed = 7 if noise is None else None
    x_T, i = ops.path_interpolate(x0, [0.4, 1.0], seed=seed, noise=noise, flips=flips, **options)
    return torch.cat((x_T[None], i))


def _ode(
    h0: Tensor, weight: Tensor, bias: Tensor, time_weight: Tensor, times: Sequence[float], **options: Any
) -> Tensor:
    return ops.rk4_mlp(h0, weight, bias, time_weight, times, steps=2, **options)


def _end(x: Tensor, **options: Any) -> Tensor:
    return ops.fir_bias_act(x, activation="lrelu", gain=2**0.5, clamp=2.0, **options)


def _convolution(x: Tensor, weight: Tensor, style: Tensor, **options: Any) -> Tensor:
    return ops.modulated_conv2d(x, weight, style, activation="lrelu", gain=2**0.5, **options)


def cases() -> list[Case]:
    """Return the 30 cases. They are small, odd in size, and in float32 and bfloat16."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def mlp(n: int, dim: int, layers: int) -> dict[str, Tensor]:
        vectors = {"bias": randn(layers, dim), "time_weight": randn(layers, dim)}
        return {"h0": randn(n, dim), "weight": randn(layers, dim, dim) / dim**0.5, **vectors}

    def layer(n: int, i: int, o: int, kernel: int) -> dict[str, Tensor]:
        return {"x": randn(n, i, 9, 9), "weight": randn(o, i, kernel, kernel), "style": 1 + 0.5 * randn(n, i)}

    seeds = torch.tensor([3, 2**40 + 1, 2**62])
    bytes_ = torch.randint(0, 256, (5, 3, 7, 5), dtype=torch.uint8, generator=draw)
    x, noise, channels = randn(2, 37, 9, 11), randn(2, 1, 9, 11), {"factor": randn(2, 37), "bias": randn(37)}
    two, lone = partial(_ode, times=[0.3, 1.0]), partial(_ode, times=[1.0])
    up = partial(_end, up=2, padding=(2, 1), fir_gain=4.0)
    found: list[tuple[str, str, Callable[..., Tensor], dict[str, Any]]] = [
        ("philox_normal", "aligned", _normals, {"seed": seeds}),
        ("philox_normal", "odd offset", partial(_normals, offset=2**33 + 3), {"seed": seeds}),
        ("path_interpolate", "bytes, flipped", _path, {"x0": bytes_, "flips": torch.arange(5) % 2 == 0}),
        ("path_interpolate", "given noise", _path, {"x0": randn(4, 3, 8, 8), "noise": randn(4, 3, 8, 8)}),
        ("rk4_mlp", "two times", two, mlp(3, 48, 2)),
        ("rk4_mlp", "many rows", lone, mlp(130, 64, 3)),
        ("rk4_mlp", "wide", lone, mlp(7, 512, 3)),
        ("fir_bias_act", "pointwise", _end, {"x": x, "noise": noise, "noise_strength": torch.tensor(0.3), **channels}),
        ("fir_bias_act", "up", up, {"x": x, "filter": fir_filter(), **channels}),
        ("modulated_conv2d", "up 1", _convolution, layer(3, 37, 24, 3)),
        ("modulated_conv2d", "up 2", partial(_convolution, up=2), layer(2, 64, 48, 3)),
        ("modulated_conv2d", "ToRGB", partial(_convolution, demodulate=False), layer(2, 16, 3, 1)),
        ("rk4_mlp", "gradients", two, mlp(5, 48, 2)),
        ("fir_bias_act", "gradients", _end, {"x": x, **channels}),
        ("modulated_conv2d", "gradients", _convolution, layer(2, 16, 24, 3)),
    ]
    return [
        Case(op, what, dtype, call, tensors, what == "gradients", _slack(op, dtype))
        for dtype in (torch.float32, torch.bfloat16)
        for op, what, call, tensors in found
    ]


def _slack(op: str, dtype: torch.dtype) -> float:
    eps = torch.finfo(dtype).eps
    if op in ("philox_normal", "path_interpolate"):
        return 4.0 + 1e-5 / eps  # sines and logarithms of two machines
    # Room for the library's algorithms, which it chooses by shape, such as Winograd's.
    return 50.0 if op == "modulated_conv2d" and dtype == torch.float32 else 4.0


def check(case: Case, backend: str, device: torch.device) -> Finding:
    """Run a case. The error may be twice that of plain PyTorch on the device, plus `Case.slack` roundings."""
    try:
        exact = case.results(torch.device("cpu"), "reference", torch.float64)
        plain = case.results(device, "reference", case.dtype)
        actual = case.results(device, backend, case.dtype)
    except Exception as error:  # every case is reported
        return Finding(case.name, backend, failure=f"{type(error).__name__}: {error}")
    worst, bound = 0.0, 0.0
    for a, p, e in zip(actual, plain, exact, strict=True):
        if a.shape != e.shape:
            return Finding(case.name, backend, failure=f"expected shape {list(e.shape)}, got {list(a.shape)}")
        distance = (a - e).abs().max().item()
        allowed = 2 * (p - e).abs().max().item() + case.slack * torch.finfo(case.dtype).eps * e.abs().max().item()
        if not distance - allowed <= worst - bound or bound == 0.0:  # the worst of several; NaN is the worst
            worst, bound = distance, allowed
    return Finding(case.name, backend, worst, bound)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolve float32 without rounding to TF32 inside the `with` block."""
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


def examine(device: torch.device, names: Sequence[str] | None = None) -> Iterator[Finding]:
    """Check every case on every backend that can run its operation on `device`.

    Args:
        device: CPU or GPU.
        names: backends to check. A backend that cannot run is then a failure, with its cause.
    """
    with exact_convolutions():
        for case in cases():
            for backend in names or [name for name in backends.KERNELS if _runs(case.op, name, device)]:
                cause = backends.why_unavailable(case.op, backend, device)
                yield check(case, backend, device) if cause is None else Finding(case.name, backend, failure=cause)


def _runs(op: str, backend: str, device: torch.device) -> bool:
    return backends.why_unavailable(op, backend, device) is None


# ---- Speed ----


@dataclass(frozen=True)
class Speed:
    """A time.

    Attributes:
        name: what was timed.
        seconds: time with the backend that "auto" chooses.
        reference: time of the reference, in seconds.
        copy_share: speed as a share of a copy's, for what moves memory.
    """

    name: str
    seconds: float
    reference: float
    copy_share: float | None = None


def median_seconds(function: Callable[[], object], device: torch.device, repeats: int = 7, calls: int = 20) -> float:
    """Return the time of a call. On a GPU, a queue of calls is timed by events, so that launches do not count."""
    for _ in range(3):
        function()
    queued = calls if device.type == "cuda" else 1
    return statistics.median(seconds_per_call(function, queued, device) for _ in range(repeats))


def speeds(device: torch.device) -> Iterator[Speed]:
    """Time five calls: noise, path, mapping network, the dearest layer, and whole images."""
    gpu = device.type == "cuda"

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def timed(name: str, call: Callable[[], object], moved: int = 0) -> Speed:
        with torch.no_grad():
            seconds = median_seconds(call, device)
            with ops.use_backend("reference"):
                reference = median_seconds(call, device, repeats=3, calls=5)
        return Speed(name, seconds, reference, moved / seconds / copy_rate(device) if moved else None)

    count = 2**26 if gpu else 2**18
    yield timed("philox_normal", lambda: ops.philox_normal((count,), seed=1, device=device), 4 * count)
    x0 = torch.zeros(28000 if gpu else 64, 3, 32, 32, dtype=torch.uint8, device=device)
    path = lambda: ops.path_interpolate(x0, [0.4, 1.0], seed=0)  # noqa: E731
    yield timed("path_interpolate, bytes to float32", path, 13 * x0.numel())
    mlp = draw(100, 512), draw(3, 512, 512) / 512**0.5, draw(3, 512), draw(3, 512)
    yield timed("rk4_mlp, batch 100, float32", lambda: ops.rk4_mlp(*mlp, [1.0], steps=4))
    n, channels = (100, 512) if gpu else (2, 128)
    x = draw(n, channels, 32, 32).to(torch.bfloat16, memory_format=torch.channels_last)
    weight, style = draw(channels, channels, 3, 3), draw(n, channels)
    name = f"modulated_conv2d, {channels} channels of 32x32, bfloat16"
    yield timed(name, lambda: ops.modulated_conv2d(x, weight, style, activation="lrelu"))
    yield _images(device, "cifar10" if gpu else "cifar10-small", 100 if gpu else 4)


def copy_rate(device: torch.device) -> float:
    """Measure how many bytes/s a large copy reads and writes."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 25), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device)


def _images(device: torch.device, preset: str, n: int) -> Speed:
    from spigan.config import ModelConfig
    from spigan.models import SPIGAN
    from spigan.presets import preset_fields
    from spigan.sampling import Sampler

    torch.manual_seed(0)
    model = SPIGAN(ModelConfig.model_validate(preset_fields(preset)["model"])).eval().requires_grad_(False).to(device)
    seconds = []
    for backend in (None, "reference"):
        sampler = Sampler(model, batch_size=n, dtype=torch.bfloat16, backend=backend, output="uint8")
        seconds.append(median_seconds(lambda sampler=sampler: sampler(range(n)), device, repeats=3))  # type: ignore[misc]
    return Speed(f"{n} images, {preset}, bfloat16", *seconds)
