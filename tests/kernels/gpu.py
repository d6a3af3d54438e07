"""What the tests on a CUDA device share."""

from __future__ import annotations

import pytest
import torch

from spigan.ops import BACKENDS
from spigan.ops.backends import why_unavailable

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]
OPERATIONS = ("philox_normal", "path_interpolate", "rk4_mlp", "fir_bias_act", "modulated_conv2d")


def over_backends(op: str) -> pytest.MarkDecorator:
    """Run the test on each backend that can run `op` on a CUDA device."""
    return pytest.mark.parametrize("backend", [b for b in BACKENDS if why_unavailable(op, b, CUDA) is None])
