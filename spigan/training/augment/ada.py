"""Adaptive discriminator augmentation.

Karras et al. 2020, "Training generative adversarial networks with limited data" (the ADA paper): the pixel blitting,
geometric and colour transformations of its appendix B, with p controlled as in its section 3.1.

A geometric transformation is a [N, 3, 3] homogeneous matrix that acts on (x right, y down, 1), in pixels from the
centre of the image.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from spigan.training.augment.common import check_images, compute_dtype
from spigan.training.processes import SINGLE, Rows

# The lowpass filter of the least asymmetric wavelet with 6 vanishing moments: Daubechies, "Ten lectures on wavelets"
# (1992), table 6.3, divided by sqrt(2); the digits are PyWavelets' `pywt.Wavelet("sym6").rec_lo`.
SYM6 = (
    -0.007800708325034148,
    0.0017677118642428036,
    0.04472490177066578,
    -0.021060292512300564,
    -0.07263752278646252,
    0.3379294217276218,
    0.787641141030194,
    0.4910559419267466,
    -0.048311742585633,
    -0.11799011114819057,
    0.0034907120842174702,
    0.015404109327027373,
)
# Delay at low frequencies, in taps. It is not 5.5, the middle, because the filter is only nearly symmetric.
SYM6_DELAY = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)


# ---- Pixel blitting and geometric transformations ----


def blit(x: Tensor, flip: Tensor, quarter_turns: Tensor) -> Tensor:
    """Mirror image i left to right if `flip[i]`, then rotate it by `quarter_turns[i]` times 90 degrees (`torch.rot90`).

    Pixels are copied, never interpolated.

    Args:
        x: [N, C, H, H].
        flip: bool [N].
        quarter_turns: integers [N] in 0..3.
    """
    flip, odd, half = (c.view(-1, 1, 1, 1) for c in (flip, quarter_turns % 2 == 1, quarter_turns >= 2))
    x = torch.where(flip, x.flip(3), x)
    x = torch.where(half, x.flip(2, 3), x)
    return torch.where(odd, x.rot90(1, (2, 3)), x)


def scale2d(sx: Tensor, sy: Tensor) -> Tensor:
    """Return the matrices [N, 3, 3] that multiply x by `sx` and y by `sy`, both [N]."""
    zero, one = torch.zeros_like(sx), torch.ones_like(sx)
    return torch.stack([sx, zero, zero, zero, sy, zero, zero, zero, one], dim=-1).view(-1, 3, 3)


def rotate2d(angle: Tensor) -> Tensor:
    """Return the matrices [N, 3, 3] that rotate by `angle` [N] in radians, clockwise on screen since y points down."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).view(-1, 3, 3)


def translate2d(tx: Tensor, ty: Tensor) -> Tensor:
    """Return the matrices [N, 3, 3] that translate by `tx` and `ty` pixels, both [N]."""
    zero, one = torch.zeros_like(tx), torch.ones_like(tx)
    return torch.stack([one, zero, tx, zero, one, ty, zero, zero, one], dim=-1).view(-1, 3, 3)


class _GridSample(torch.autograd.Function):
    """Bilinear sampling; see `bilinear_sample`. Its gradient is its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.image_shape = x.shape
        sampled: Tensor = torch.ops.aten.grid_sampler_2d(x, grid, 0, 0, True)
        return sampled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _GridSampleAdjoint.apply(grads[0], grid, ctx.image_shape), None


class _GridSampleAdjoint(torch.autograd.Function):
    """Adjoint of `_GridSample`: scatter `y` [N, C, H', W'] into an image of shape `image_shape`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, grid: Tensor, image_shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        image = y.new_zeros(()).expand(image_shape)  # only its shape matters here
        grad: Tensor = torch.ops.aten.grid_sampler_2d_backward(y, image, grid, 0, 0, True, (True, False))[0]
        return grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _GridSample.apply(grads[0], grid), None, None


def bilinear_sample(x: Tensor, grid: Tensor) -> Tensor:
    """Sample like torch's `grid_sample(x, grid, align_corners=True)`, with derivatives of any order in x.

    Torch's `grid_sample` has no second derivative. Sampling is linear in the image, so its gradient is its adjoint, and
    the gradient of the adjoint is sampling again. `grid` gets no gradient.

    On CUDA the adjoint adds with atomics. Gradients are therefore not bitwise reproducible, and
    `torch.use_deterministic_algorithms(True)` makes it raise an error.
    """
    sampled: Tensor = _GridSample.apply(x, grid)
    return sampled


@functools.cache
@torch.inference_mode(False)  # a matrix created in inference mode must also work in training later
def resampling_matrices(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sym6 filters as matrices (up, down), which take a mirrored row to twice its resolution and back.

    Mirroring a row about its end pixels, again and again, makes it periodic. `up` [4 size - 3, size] computes one
    period of 4 (size - 1) samples, and the first sample of the next period. Sample m lies at pixel
    (m - SYM6_DELAY) / 2. `down` [size, 2 size + 10] maps samples 0 to 2 size + 9 of any row back to pixels. The wavelet
    is orthogonal, so samples that were not moved give back the original pixels.

    The matrices are banded, but dense products are faster than convolutions over single channels: upsampling
    [32, 3, 32, 32] takes 1.1 ms instead of 12 ms with conv_transpose2d, and [4, 3, 256, 256] takes 74 ms instead of
    144 ms (two cores of an AMD EPYC, float32, torch 2.13). The work grows with the cube of the size.
    """
    period, taps = 4 * (size - 1), torch.tensor(SYM6, dtype=torch.float64, device="cpu")
    up = torch.zeros(period + 1 + 2 * len(SYM6), size, dtype=torch.float64, device="cpu")
    for i in range(-len(SYM6) // 2, period // 2 + 1):
        pixel = size - 1 - abs(i % (period // 2) - (size - 1))
        row = 2 * i + len(SYM6)  # len(SYM6) rows of margin on either side
        up[row : row + len(SYM6), pixel] += math.sqrt(2) * taps
    down = torch.zeros(size, 2 * size + len(SYM6) - 2, dtype=torch.float64, device="cpu")
    for i in range(size):
        down[i, 2 * i : 2 * i + len(SYM6)] = taps / math.sqrt(2)
    return up[len(SYM6) : -len(SYM6)].to(dtype).to(device), down.to(dtype).to(device)


def _separable(matrix: Tensor, x: Tensor) -> Tensor:
    """Apply matrix [M, S] to x [N, C, S, S] along both axes, giving [N, C, M, M].

    x is always the left factor, because matmul folds the batch only then.
    """
    return (x.mT @ matrix.mT).mT @ matrix.mT


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Resample image i so that its value at q comes from `matrix[i]` q, with repeated reflection at the borders.

    As in the ADA paper's appendix B: upsample with sym6, sample bilinearly, and downsample with sym6. Translations by
    whole pixels are exact. The paper pads by reflection as far as the transformations of the batch reach, which makes a
    GPU wait for the host. Wrapping the coordinates into one period of the reflected image works for any distance, at a
    fixed cost.

    Args:
        x: [N, C, H, H], float32 or float64.
        matrix: [N, 3, 3] of the same dtype, from output to input coordinates (see the top of this module).
    """
    size = x.shape[-1]
    up, down = resampling_matrices(size, x.device, x.dtype)
    period = up.shape[0] - 1
    centre = size - 1 + SYM6_DELAY  # in samples, two to a pixel
    offset = torch.arange(down.shape[1], device=x.device, dtype=x.dtype) - centre  # of the output samples
    # Not a matrix product, which would misplace samples if the user allows TF32.
    column = matrix[:, None, None, :2, 0] * offset[None, None, :, None]
    row = matrix[:, None, None, :2, 1] * offset[None, :, None, None]
    sample = column + row + (2 * matrix[:, None, None, :2, 2] + centre)  # [N, H', W', 2], as (x, y)
    grid = sample.remainder(period) * (2 / period) - 1
    return _separable(down, bilinear_sample(_separable(up, x), grid))


def geometric_parameters(
    p: float | Tensor, size: int, gate: Tensor, uniform: Tensor, normal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random parameters (ADA paper, appendix B): flip and quarter_turns for `blit`, matrix [N, 3, 3] for `warp`.

    Args:
        p: probability of each transformation, as a number or a float64 scalar.
        size: H, in pixels.
        gate: [8, N], uniform in [0, 1).
        uniform: [6, N], uniform in [0, 1).
        normal: [4, N], standard normal.
    """
    flips, turns, shifts, zooms, stretches, slides = gate[:6] < p
    # Rotations before and after stretching. The probability of each is chosen so that at least one happens with p.
    turns_before, turns_after = gate[6:] < 1.0 - ((1.0 - p).sqrt() if isinstance(p, Tensor) else math.sqrt(1.0 - p))
    flip = flips & (uniform[0] < 0.5)
    quarter_turns = torch.where(turns, (4 * uniform[1]).long(), 0)

    shift = torch.where(shifts, ((uniform[2:4] - 0.5) * (size / 4)).round(), 0.0)
    zoom = torch.where(zooms, torch.exp2(0.2 * normal[0]), 1.0)
    before = torch.where(turns_before, (2 * uniform[4] - 1) * math.pi, 0.0)
    stretch = torch.where(stretches, torch.exp2(0.2 * normal[1]), 1.0)
    after = torch.where(turns_after, (2 * uniform[5] - 1) * math.pi, 0.0)
    slide = torch.where(slides, normal[2:] * (size / 8), 0.0)
    # The paper shifts, zooms, rotates, stretches, rotates and slides the image, in this order. From output to input,
    # that is the product of the inverses, with the first leftmost. Each parameter has the same distribution as its
    # inverse, so it does not need to be inverted.
    matrix = translate2d(*shift) @ scale2d(zoom, zoom) @ rotate2d(before)
    return flip, quarter_turns, matrix @ scale2d(stretch, 1 / stretch) @ rotate2d(after) @ translate2d(*slide)


# ---- Colour ----


def recolor(x: Tensor, brightness: Tensor, contrast: Tensor, luma_sign: Tensor, hue: Tensor, sat: Tensor) -> Tensor:
    """Apply the five colour transformations of the ADA paper's appendix B, in the paper's order, as one affine map.

    Relative to the luma axis (1, 1, 1), the product of the paper's 4x4 matrices is simple: luma is scaled by
    contrast x luma_sign; chroma is scaled by contrast x sat and rotated. This makes a circulant matrix. Brightness
    affects only the luma. Grey images are all luma.

    Args:
        x: [N, C, H, W].
        brightness: [N], added to the image.
        contrast: [N], factor of the image.
        luma_sign: [N], factor of the luma, +-1.
        hue: [N], rotation of colours about the luma axis, in radians.
        sat: [N], factor of the chroma.
    """
    luma, chroma = contrast * luma_sign, contrast * sat
    if x.shape[1] == 1:
        matrix = luma.view(-1, 1, 1)
    else:
        a, b, c = ((luma + 2 * chroma * torch.cos(hue + third * 2 * math.pi / 3)) / 3 for third in (0, 1, -1))
        matrix = torch.stack([a, b, c, c, a, b, b, c, a], dim=-1).view(-1, 3, 3)
    return torch.baddbmm((luma * brightness).view(-1, 1, 1), matrix, x.flatten(2)).view(x.shape)


def color_parameters(
    p: float | Tensor, gate: Tensor, uniform: Tensor, normal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return random parameters (ADA paper, appendix B), each [N], in the order in which `recolor` takes them.

    Args:
        p: probability of each transformation, as a number or a float64 scalar.
        gate: [5, N], uniform in [0, 1).
        uniform: [2, N], uniform in [0, 1).
        normal: [3, N], standard normal.
    """
    brightens, contrasts, inverts, hues, saturates = gate < p
    return (
        torch.where(brightens, 0.2 * normal[0], 0.0),
        torch.where(contrasts, torch.exp2(0.5 * normal[1]), 1.0),
        1.0 - 2.0 * (inverts & (uniform[0] < 0.5)).to(normal.dtype),
        torch.where(hues, (2 * uniform[1] - 1) * math.pi, 0.0),
        torch.where(saturates, torch.exp2(normal[2]), 1.0),
    )


# ---- The augmentation ----


class ADA(nn.Module):
    """Adaptive discriminator augmentation: blit, geometric and colour transformations, each with probability `p`.

    Args:
        p: initial probability, in [0, 1]. The buffer `p`, a float32 scalar in the state dict, stays on the CPU.
        target: mean sign of D(real) that `adapt` aims for (r_t in the ADA paper's section 3.1).
        kimg: thousands of images over which p can rise from 0 to 1.

    Raises:
        ValueError: if an argument is out of range.
    """

    p: Tensor

    def __init__(self, p: float = 0.0, *, target: float = 0.6, kimg: float = 500.0) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be a probability in [0, 1], got {p}")
        if not -1.0 <= target <= 1.0:
            raise ValueError(f"target must be a mean of signs in [-1, 1], got {target}")
        if not kimg > 0.0:
            raise ValueError(f"kimg must be positive, got {kimg}")
        self.target, self.kimg = target, kimg
        self.register_buffer("p", torch.tensor(p, dtype=torch.float32, device="cpu"))
        self._held_p: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> ADA:
        """Keep `p` on the CPU in float32: every call reads it on the host, which would otherwise wait for the GPU."""
        return self

    def extra_repr(self) -> str:
        return f"p={float(self.p):.4f}, target={self.target}, kimg={self.kimg}"

    def hold_p(self, device: torch.device) -> bool:
        """Copy p to a tensor on a GPU, which `forward` reads from now on. Return whether p is above 0.

        A CUDA graph that contains `forward` then augments with the p of the last call. It must be another graph while
        p = 0. The copy does not wait for the GPU.
        """
        if self._held_p is None:
            self._held_p = torch.zeros((), dtype=torch.float64, device=device)
        self._held_p.fill_(float(self.p))
        return bool(self.p > 0)

    @torch.no_grad()
    def adapt(self, signs_mean: float, images: int) -> None:
        """Move p by images / (1000 kimg), up if D(real) is positive too often, else down. p stays within [0, 1].

        Args:
            signs_mean: mean of sign(D(real)) over the last `images` real images, in [-1, 1].
            images: number of real images since the last call.

        Raises:
            ValueError: if `signs_mean` is out of range.
        """
        if not -1.0 <= signs_mean <= 1.0:  # true also of NaN
            raise ValueError(f"signs_mean must be in [-1, 1], got {signs_mean}")
        direction = (signs_mean > self.target) - (signs_mean < self.target)
        self.p.add_(direction * images / (1000.0 * self.kimg)).clamp_(0.0, 1.0)

    def forward(self, x: Tensor, rows: Rows = SINGLE) -> Tensor:
        """Return augmented images of the same shape and dtype; x itself while p = 0.

        Args:
            x: [N, C, H, W].
            rows: which rows of the joint minibatch x holds.

        Raises:
            TypeError, ValueError: if x is not a batch of images as described in `spigan.training.augment`.
        """
        check_images(x)
        n, size = x.shape[0], x.shape[-1]
        gate = rows.rand(13, n, dim=1, device=x.device, dtype=torch.float32)
        uniform = rows.rand(8, n, dim=1, device=x.device, dtype=torch.float32)
        normal = rows.randn(7, n, dim=1, device=x.device, dtype=torch.float32)
        p = float(self.p)
        if p == 0.0 or n == 0:
            return x
        with torch.autocast(x.device.type, enabled=False):
            y = x.to(compute_dtype(x))
            uniform, normal = uniform.to(y.dtype), normal.to(y.dtype)
            gates = p if self._held_p is None else self._held_p
            flip, quarter_turns, matrix = geometric_parameters(gates, size, gate[:8], uniform[:6], normal[:4])
            y = warp(blit(y, flip, quarter_turns), matrix)
            y = recolor(y, *color_parameters(gates, gate[8:], uniform[6:], normal[4:]))
            return y.to(x.dtype)
