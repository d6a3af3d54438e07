"""The synthesis network without gradients: its values, what it keeps between calls, its memory."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from spigan import _C
from spigan.models import Generator
from spigan.ops import BACKENDS, use_backend
from spigan.ops.backends import why_unavailable

KERNELS = [b for b in BACKENDS[1:] if why_unavailable("modulated_conv2d", b, torch.device("cpu")) is None]
DIM = 12


def make(resolution: int = 16, img_channels: int = 3, **changes: Any) -> Generator:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"dim_h": DIM, "channel_base": 160, "channel_max": 11}
    generator = Generator(resolution, img_channels, **settings | changes)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
            elif name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return generator.eval()


def images(generator: Generator, h: Tensor, backend: str, noise: str = "const", dtype: Any = None) -> Tensor:
    torch.manual_seed(7)
    with torch.no_grad(), use_backend(backend), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return generator(h, noise)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise", ["const", "random", "none"])
@pytest.mark.parametrize(
    ("resolution", "img_channels", "options"),
    [
        (8, 1, {}),
        (32, 3, {"conv_clamp": 1.0}),
        # Wide enough for Winograd.
        pytest.param(32, 3, {"channel_base": 4096, "channel_max": 80}, marks=pytest.mark.slow),
        pytest.param(64, 3, {"channel_base": 512, "channel_max": 24}, marks=pytest.mark.slow),
    ],
)
def test_whole_network(
    resolution: int,
    img_channels: int,
    options: dict[str, Any],
    noise: str,
    dtype: torch.dtype | None,
    backend: str,
    assert_accurate: Callable[..., None],
    poisoned_memory: None,
    convolutions: None,
) -> None:
    generator = make(resolution, img_channels, **options)
    for shape in ((3, DIM), (2, generator.num_ws, DIM)):
        h = torch.randn(shape)
        exact = images(copy.deepcopy(generator).double(), h.double(), "reference", noise)
        plain = images(generator, h, "reference", noise, dtype)
        actual = images(generator, h, backend, noise, dtype)
        assert actual.is_contiguous() and actual.dtype == torch.float32
        assert_accurate(actual, plain, exact, slack=40.0)  # of float32's eps: the sum of the layers' rounding errors


@pytest.mark.parametrize("backend", KERNELS)
def test_it_runs_kernels_without_gradients_only(backend: str, noted_kernels: Any) -> None:
    generator, h = make(), torch.randn(2, DIM)
    with noted_kernels, use_backend(backend):
        with torch.no_grad():
            generator(h)
        assert "modulated_conv2d" not in {
            name for name, _ in noted_kernels.calls
        }  # the layers are not called one by one
        generator(h).sum().backward()
        assert ("bias_act_backward", backend) in noted_kernels.calls
    assert all(p.grad is not None for name, p in generator.named_parameters())


@pytest.mark.parametrize("backend", KERNELS)
def test_changed_parameters_are_noticed(backend: str) -> None:
    generator, h = make().requires_grad_(False), torch.randn(2, DIM)

    def check() -> Tensor:
        actual = images(generator, h, backend)
        torch.testing.assert_close(actual, images(generator, h, "reference"), rtol=1e-4, atol=1e-4)
        return actual

    before = check()
    assert generator.prepared.weights
    assert torch.equal(check(), before)

    def train() -> None:
        generator.requires_grad_(True)
        generator(h).square().sum().backward()
        optimizer.step()
        generator.requires_grad_(False)

    def train_in_training_mode() -> None:
        generator.train()
        train()
        check()
        generator.eval()

    optimizer = torch.optim.Adam(generator.parameters(), lr=0.1, fused=True)  # versions do not count its steps
    changes: list[Callable[[], Any]] = [
        train,
        train_in_training_mode,
        train,
        lambda: generator.load_state_dict(make(dim_h=DIM).state_dict()),
        lambda: generator.load_state_dict({k: v + 0.1 for k, v in generator.state_dict().items()}, assign=True),
        lambda: generator.b8.conv0.weight.detach().add_(0.5),
        lambda: generator.b16.torgb.bias.detach().add_(0.5),
        lambda: generator.b4.conv1.noise_const.normal_(),
        lambda: setattr(generator.b8.conv1, "weight", torch.nn.Parameter(torch.randn_like(generator.b8.conv1.weight))),
    ]
    for change in changes:
        change()
        after = check()
        assert (after - before).abs().max() > 1e-3
        before = after


@pytest.mark.parametrize("backend", KERNELS)
def test_what_it_keeps_is_no_part_of_the_model(backend: str) -> None:
    generator, h = make().requires_grad_(False), torch.randn(2, DIM)
    names = set(generator.state_dict())
    expected = images(generator, h, backend)
    assert generator.prepared.weights
    assert set(generator.state_dict()) == names
    for other in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert not other.prepared.weights
        assert torch.equal(images(other, h, backend), expected)
    with torch.inference_mode():
        other = make()  # its tensors do not count their changes, so nothing can be kept
        torch.testing.assert_close(images(other, h, backend), expected)
        other.b4.conv1.weight.mul_(-1.0)
        assert (images(other, h, backend) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("backend", KERNELS)
def test_each_dtype_keeps_its_own_weights(backend: str) -> None:
    generator, h = make().requires_grad_(False), torch.randn(2, DIM)
    for dtype in (None, torch.float16, torch.bfloat16, None, torch.float16):
        fresh = images(copy.deepcopy(generator), h, backend, dtype=dtype)
        assert torch.equal(images(generator, h, backend, dtype=dtype), fresh)


@pytest.mark.parametrize("backend", KERNELS)
def test_styles_beyond_the_range_of_float16(backend: str) -> None:
    """Demodulation takes their size out again, so float16 must not overflow before it."""
    generator, h = make(), torch.randn(2, DIM)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "conv" in name and name.endswith("affine.bias"):
                parameter.mul_(1e6)
    expected = images(generator, h, "reference")
    error = (images(generator, h, backend, dtype=torch.float16) - expected).abs().max()
    assert error <= 0.02 * expected.abs().max()


@pytest.mark.parametrize("backend", KERNELS)
def test_hooks_see_their_layers(backend: str) -> None:
    generator, h = make(), torch.randn(2, DIM)
    seen = []
    handle = generator.b8.conv1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    images(generator, h, backend)
    assert seen == [(2, 11, 8, 8)]
    handle.remove()
    images(generator, h, backend)
    assert len(seen) == 1
    with generator.b8.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)):
        images(generator, h, backend)
    assert seen[1:] == [(2, 11, 8, 8)]


@pytest.mark.parametrize("backend", KERNELS)
def test_images_do_not_depend_on_their_neighbours(backend: str, convolutions: None) -> None:
    generator, h = make(32, channel_base=4096, channel_max=64), torch.randn(5, DIM)
    together = images(generator, h, backend)
    for index in range(5):
        torch.testing.assert_close(images(generator, h[index : index + 1], backend)[0], together[index])


MEMORY = """
import ctypes, gc, sys
from pathlib import Path
import torch
from spigan.models import Generator
from spigan.ops import use_backend

def kibibytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

backend, half, batch = sys.argv[1], sys.argv[2] == "bfloat16", int(sys.argv[3])
generator = Generator(128, dim_h=16, channel_base=8192, channel_max=128).eval().requires_grad_(False)
h = torch.randn(batch, 16)
with torch.no_grad(), use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
    library, mmap_threshold = ctypes.CDLL(None), -3  # of glibc's mallopt
    library.mallopt(mmap_threshold, 1 << 18)  # what is freed goes back to the system and does not count
    generator(h)
    gc.collect()
    library.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kibibytes("VmRSS:")
    generator(h)
print(1024 * (kibibytes("VmHWM:") - before) / (2 * batch * 64 * 128 * 128 * (2 if half else 4)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process's memory is read from /proc")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_one_layer(dtype: str, backend: str) -> None:
    if dtype == "bfloat16" and "avx512bf16" not in _C.build_info()["cpu_isas"]:
        pytest.skip("this CPU has no bfloat16 products, so the library copies whole images to float32 (2.8 times)")
    # A process of its own: the allocator of this one has seen too much.
    command = [sys.executable, "-c", MEMORY, backend, dtype, "16" if dtype == "float32" else "32"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.5 < float(result.stdout) <= 1.1, "of the input and output of the largest layer"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_another_dtype(dtype: torch.dtype, backend: str, convolutions: None) -> None:
    generator = make().to(dtype)  # the filters too
    h = torch.randn(2, DIM).to(torch.float32 if dtype == torch.float64 else dtype)
    expected = images(copy.deepcopy(generator).double(), h.double(), "reference")
    error = (images(generator, h, backend) - expected).abs().max()
    assert error <= (1e-4 if dtype == torch.float64 else 0.1) * expected.abs().max()


@pytest.mark.parametrize("backend", KERNELS)
def test_more_channels_than_the_last_pass_takes(backend: str) -> None:
    generator, h = make(img_channels=5), torch.randn(2, DIM)
    torch.testing.assert_close(images(generator, h, backend), images(generator, h, "reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_buffers_have_gradients(backend: str) -> None:
    generator, h = make().requires_grad_(False), torch.randn(2, DIM)
    noise = generator.b16.conv1.noise_const.requires_grad_(True)
    with use_backend(backend):
        generator(h).square().sum().backward()
    assert noise.grad is not None and noise.grad.abs().max() > 0


def test_transformed_parameters_are_for_the_reference() -> None:
    generators, h = [make().requires_grad_(False) for _ in range(2)], torch.randn(2, DIM)
    generators[1].b8.conv1.weight.neg_()
    generators[0](h)
    parameters, buffers = torch.func.stack_module_state(generators)  # type: ignore[arg-type]

    def run(*state: Any) -> Tensor:
        return torch.func.functional_call(generators[0], state, (h,))

    actual = torch.func.vmap(run)({k: v.detach() for k, v in parameters.items()}, buffers)
    torch.testing.assert_close(actual, torch.stack([g(h) for g in generators]), rtol=1e-4, atol=1e-4)

    with torch.autograd.forward_ad.dual_level():
        weight = generators[0].b8.conv1.weight
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        assert torch.autograd.forward_ad.unpack_dual(run({"b8.conv1.weight": dual})).tangent is not None


def test_fake_tensors() -> None:
    with FakeTensorMode():
        assert make().requires_grad_(False)(torch.randn(2, DIM)).shape == (2, 3, 16, 16)


@pytest.mark.slow
def test_changed_parameters_are_not_compiled_again() -> None:
    generator, h = make().requires_grad_(False), torch.randn(2, DIM)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(generator, fullgraph=True, backend=counter)
    for _ in range(3):
        generator.b8.conv1.weight.neg_()
        torch.testing.assert_close(compiled(h), generator(h), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "forward", [pytest.param(torch.compile(backend="eager"), marks=pytest.mark.slow), lambda generator: generator]
)
def test_steps_of_fused_optimizers_are_noticed(forward: Any) -> None:
    """They change parameters and leave no trace in the versions."""
    generator, h = make().requires_grad_(False), torch.randn(2, DIM)
    before = generator(h)
    generator.requires_grad_(True)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.1, fused=True)
    trained = forward(generator)
    with use_backend("reference"):
        trained(h).square().sum().backward()
    optimizer.step()
    generator.requires_grad_(False)
    after = generator(h)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, images(generator, h, "reference"), rtol=1e-3, atol=1e-3)
