"""The operations: each has a reference in plain PyTorch and faster backends; `spigan info` shows which one runs."""

from spigan.ops.backends import BACKENDS, BackendUnavailable, register_backend, use_backend
from spigan.ops.fir_bias_act import fir_bias_act
from spigan.ops.modulated_conv2d import modulated_conv2d
from spigan.ops.path_interpolate import path_interpolate
from spigan.ops.philox_normal import philox_normal
from spigan.ops.rk4_mlp import rk4_mlp

__all__ = [
    "BACKENDS",
    "BackendUnavailable",
    "fir_bias_act",
    "modulated_conv2d",
    "path_interpolate",
    "philox_normal",
    "register_backend",
    "rk4_mlp",
    "use_backend",
]
