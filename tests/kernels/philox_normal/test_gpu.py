"""philox_normal on every backend of a CUDA device: values and gradients."""

from __future__ import annotations

import pytest
import torch
from gpu import CUDA, HALF, over_backends

from spigan.ops import philox_normal

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@over_backends("philox_normal")
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 0), (7, 13), (100_001,), (1000, 33)])
@pytest.mark.parametrize("offset", [0, 3, 2**32 + 1, 2**63 - 200_000])
def test_normals_are_those_of_the_cpu(backend, shape, offset, poisoned_memory):
    expected = philox_normal(shape, seed=12, offset=offset, backend="reference")
    single = philox_normal(shape, seed=12, offset=offset, device=CUDA, backend=backend)
    assert single.is_cuda and single.shape == shape
    torch.testing.assert_close(single.cpu(), expected, rtol=0, atol=1e-5)
    for dtype in HALF if backend == "triton" else [*HALF, torch.float64]:
        cast = philox_normal(shape, seed=12, offset=offset, device=CUDA, dtype=dtype, backend=backend)
        assert torch.equal(cast, single.to(dtype))


@over_backends("philox_normal")
def test_normals_of_several_seeds(backend):
    seeds = torch.tensor([0, 7, 2**63 - 1, 7])
    expected = philox_normal((4, 3, 11), seed=seeds, offset=6, backend="reference")
    actual = philox_normal((4, 3, 11), seed=seeds.to(CUDA), offset=6, backend=backend)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-5)
    strided = torch.stack((seeds, seeds), 1).to(CUDA)[:, 0]
    assert torch.equal(philox_normal((4, 3, 11), seed=strided, offset=6, backend=backend), actual)
    assert torch.equal(actual[1], actual[3])


@over_backends("philox_normal")
def test_more_numbers_than_32_bits_count(backend):
    count = 2**31 + 9
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("it needs too much memory")
    for drawn in (
        philox_normal((count,), seed=3, device=CUDA, dtype=torch.bfloat16, backend=backend),
        philox_normal((2, count // 2), seed=torch.tensor([5, 3], device=CUDA), dtype=torch.bfloat16, backend=backend)[
            1
        ],
    ):
        tail = philox_normal((40,), seed=3, offset=drawn.numel() - 40, dtype=torch.bfloat16)
        torch.testing.assert_close(drawn[-40:].cpu(), tail, rtol=2**-7, atol=1e-5)
