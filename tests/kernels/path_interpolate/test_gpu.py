"""path_interpolate on every backend of a CUDA device: values and gradients."""

from __future__ import annotations

import pytest
import torch
from gpu import CUDA, DTYPES, images, over_backends
from torch import Tensor

from spigan.ops import path_interpolate, philox_normal

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@over_backends("path_interpolate")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, *DTYPES])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (16, 3, 32, 32), (5, 3, 33, 31), (2, 0, 3, 4)])
def test_path(backend, shape, x0_dtype, dtype, assert_accurate, poisoned_memory):
    x0, flips = images(*shape, dtype=x0_dtype), torch.arange(shape[0]) % 2 == 0
    for times, options in (
        ([0.3], {"seed": 2**40 + 1}),
        ([0.25, 0.5, 1.0], {"seed": 5, "offset": 2**32 + 3}),
        ([k / 8 for k in range(1, 9)], {"seed": 5, "offset": 2**62 + 2}),
        ([0.1, 1.0], {"noise": torch.randn(shape)}),
        ([0.1, 1.0], {"noise": torch.randn(shape).to(torch.bfloat16)}),
    ):
        for mask in (None, flips):
            on_gpu = {
                name: x.to(CUDA) if isinstance(x, Tensor) else x for name, x in (options | {"flips": mask}).items()
            }
            actual = path_interpolate(x0.to(CUDA), times, **on_gpu, dtype=dtype, backend=backend)
            options_cpu = options | {"flips": mask, "backend": "reference"}
            plain = path_interpolate(x0, times, **options_cpu, dtype=dtype)
            exact_x0 = x0.double() / 127.5 - 1 if x0_dtype == torch.uint8 else x0.double()
            exact = path_interpolate(exact_x0, times, **options_cpu, dtype=torch.float64)
            for a, p, e in zip(actual, plain, exact, strict=True):
                assert a.is_cuda
                assert_accurate(a.cpu(), p, e, absolute=1e-5)  # the noise of two backends may differ by so much


@over_backends("path_interpolate")
@pytest.mark.parametrize("flips", [None, [True, False, True]])
def test_gradients_of_the_path(backend, flips):
    found = []
    for device, name in ((CUDA, backend), ("cpu", "reference")):
        torch.manual_seed(1)
        x0, noise = (x.to(device).requires_grad_() for x in (torch.rand(3, 2, 4, 5), torch.randn(3, 2, 4, 5)))
        mask = None if flips is None else torch.tensor(flips, device=device)
        x_T, i = path_interpolate(x0, [0.3, 1.0], noise=noise, flips=mask, backend=name)
        first = torch.autograd.grad(x_T.square().sum() + i.pow(3).sum(), (x0, noise), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x0, noise))
        found.append([g.detach().cpu() for g in (*first, *second)])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@over_backends("path_interpolate")
def test_more_pixels_than_32_bits_count(backend):
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("it needs too much memory")
    shape = (2, 3, 19_000, 19_000)  # 2.17e9
    x0 = torch.randint(0, 256, (1, 1, 1, 19_000), dtype=torch.uint8, device=CUDA).expand(shape).contiguous()
    flips = torch.tensor([False, True], device=CUDA)
    x_T, i = path_interpolate(x0, [1.0], seed=3, flips=flips, dtype=torch.bfloat16, backend=backend)
    mirrored = x0[1, 2, -1].cpu().flip(0).float() / 127.5 - 1
    torch.testing.assert_close(i[0, 1, 2, -1].cpu().float(), mirrored, rtol=2**-8, atol=1e-6)
    row = philox_normal((19_000,), seed=3, offset=x0.numel() - 19_000)
    torch.testing.assert_close(x_T[1, 2, -1].cpu().float(), row, rtol=2**-7, atol=0.02)  # x_T is 0.0066 of the image
