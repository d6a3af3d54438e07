"""Differentiable augmentation of what the discriminator sees, the same for real and generated images.

``DiffAugment``: Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 4.
``ADA``: Karras et al. 2020, "Training generative adversarial networks with limited data" (the ADA paper), the pixel
blitting, geometric and colour transformations of its appendix B, with p steered as its section 3.1 describes.

Images are float [N, C, H, W] in about [-1, 1], with C = 1 or 3 and H = W >= 8. Both modules are linear or affine in the
image, so that their second derivatives (R1 differentiates through them twice) exist on every device. Random numbers
come from torch's global generator of the image's device, in float32, and as many of them whatever ``p`` or ``policy``;
where ``rows`` says that the images are part of a minibatch that several processes share, for all of it.
Half-precision images are computed in float32, also under autocast, and returned in their own dtype.

Geometric transformations are [N, 3, 3] homogeneous matrices acting on (x right, y down, 1), in pixels from the centre.
"""

import functools
import math
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spigan.training.processes import ALL_ROWS

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
# Its delay at low frequencies, in taps. Not the middle, 5.5: the filter is only nearly symmetric.
SYM6_DELAY = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)


def _check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"images must be floating point in about [-1, 1], got {x.dtype}; convert them first")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be [N, C, H, W] with C = 1 or 3, got {list(x.shape)}")
    if x.shape[2] != x.shape[3] or x.shape[2] < 8:
        raise ValueError(f"images must be square and at least 8x8, got {x.shape[2]}x{x.shape[3]}")


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# DiffAugment


def translate(x: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Move image i by ``dx[i]`` pixels to the right and ``dy[i]`` down ([N], integers), filling with zeros."""
    size = x.shape[-1]
    pixels = torch.arange(size, device=x.device)
    column, row = pixels - dx[:, None], pixels - dy[:, None]  # [N, W], [N, H]: where each pixel comes from
    outside = ((row < 0) | (row >= size))[:, :, None] | ((column < 0) | (column >= size))[:, None, :]
    index = row.clamp(0, size - 1)[:, :, None] * size + column.clamp(0, size - 1)[:, None, :]  # [N, H, W]
    moved = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
    return moved.masked_fill(outside[:, None], 0.0)


def cutout(x: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """Zero the square of half the image's size around the pixel corner (``cx[i]``, ``cy[i]``) ([N], 0 to the size)."""
    size = x.shape[-1]
    pixels = torch.arange(size, device=x.device)
    column, row = ((pixels >= c[:, None] - size // 4) & (pixels < c[:, None] + size // 4) for c in (cx, cy))
    return x.masked_fill((row[:, :, None] & column[:, None, :])[:, None], 0.0)


class DiffAugment(nn.Module):
    """Every image gets every transformation of ``policy``, in this order, each with its own random strength:

    ``"color"``        brightness +-0.5, saturation 0 to 2 (nothing happens to grey images), contrast 0.5 to 1.5;
    ``"translation"``  by up to 1/8 of the size in whole pixels, filled with zeros;
    ``"cutout"``       zeros a square of half the size whose centre is anywhere, so that it may reach over the border.
    """

    POLICIES = ("color", "translation", "cutout")
    rows = ALL_ROWS

    def __init__(self, policy: Collection[str] = POLICIES) -> None:
        super().__init__()
        if isinstance(policy, str) or not set(policy) <= set(self.POLICIES):
            raise ValueError(f"policy must be a collection of names out of {self.POLICIES}, got {policy!r}")
        self.policy = frozenset(policy)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]; returns the same shape and dtype. Raises ValueError or TypeError for anything else."""
        _check(x)
        n, size = x.shape[0], x.shape[-1]
        random = self.rows.own(torch.rand(7, self.rows.joint(n), device=x.device, dtype=torch.float32), dim=1)
        y = x.to(_compute_dtype(x))
        if "color" in self.policy:
            brightness, saturation, contrast = random[:3].to(y.dtype).view(3, n, 1, 1, 1)
            y = y + (brightness - 0.5)
            y = torch.lerp(y.mean(1, keepdim=True), y, 2.0 * saturation)
            y = torch.lerp(y.mean((1, 2, 3), keepdim=True), y, contrast + 0.5)
        if "translation" in self.policy:
            reach = size // 8
            dx, dy = (random[3:5] * (2 * reach + 1)).long() - reach
            y = translate(y, dx, dy)
        if "cutout" in self.policy:
            cx, cy = (random[5:] * (size + 1)).long()
            y = cutout(y, cx, cy)
        return y.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# ADA: pixel blitting and geometric transformations


def blit(x: Tensor, flip: Tensor, quarter_turns: Tensor) -> Tensor:
    """Mirror image i left to right where ``flip[i]``, then turn it as ``torch.rot90`` does, ``quarter_turns[i]`` times.

    x: [N, C, H, H]; flip: bool [N]; quarter_turns: integers [N] in 0..3. Pixels are copied, never interpolated.
    """
    flip, odd, half = (c.view(-1, 1, 1, 1) for c in (flip, quarter_turns % 2 == 1, quarter_turns >= 2))
    x = torch.where(flip, x.flip(3), x)
    x = torch.where(half, x.flip(2, 3), x)
    return torch.where(odd, x.rot90(1, (2, 3)), x)


def scale2d(sx: Tensor, sy: Tensor) -> Tensor:
    """[N], [N] -> [N, 3, 3]: x times ``sx``, y times ``sy``."""
    zero, one = torch.zeros_like(sx), torch.ones_like(sx)
    return torch.stack([sx, zero, zero, zero, sy, zero, zero, zero, one], dim=-1).view(-1, 3, 3)


def rotate2d(angle: Tensor) -> Tensor:
    """[N] (radians, clockwise on screen, since y points down) -> [N, 3, 3]."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).view(-1, 3, 3)


def translate2d(tx: Tensor, ty: Tensor) -> Tensor:
    """[N], [N] (pixels) -> [N, 3, 3]."""
    zero, one = torch.zeros_like(tx), torch.ones_like(tx)
    return torch.stack([one, zero, tx, zero, one, ty, zero, zero, one], dim=-1).view(-1, 3, 3)


class _GridSample(torch.autograd.Function):
    """Bilinear ``grid_sample`` (align_corners=True), differentiable any number of times in the image, not in the grid.

    Torch's own has no second derivative. Sampling is linear in the image, so its gradient is its adjoint, and the
    gradient of the adjoint is sampling again.

    On CUDA the adjoint adds with atomics: gradients are not reproducible to the bit, and
    ``torch.use_deterministic_algorithms(True)`` makes it raise.
    """

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
    """The adjoint of ``_GridSample``: scatters ``y`` [N, C, H', W'] into an image of shape ``image_shape``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, grid: Tensor, image_shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        image = y.new_zeros(()).expand(image_shape)  # gives the shape; its values matter to the grid's gradient alone
        grad: Tensor = torch.ops.aten.grid_sampler_2d_backward(y, image, grid, 0, 0, True, (True, False))[0]
        return grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _GridSample.apply(grads[0], grid), None, None


@functools.cache
@torch.inference_mode(False)  # a matrix first made while sampling must serve training later
def _resampling(size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sym6 filters as matrices: one period of the mirrored row at twice its resolution, and back down.

    Mirroring a row about its end pixels, again and again, makes it periodic. ``up`` [4 size - 3, size] gives one such
    period of 4 (size - 1) samples and the first of the next; sample m lies at pixel (m - SYM6_DELAY) / 2. ``down``
    [size, 2 size + 10] takes samples 0 to 2 size + 9 of any row back to pixels. The wavelet is orthogonal, so samples
    that were not moved give back the pixels themselves.

    Dense products, though the matrices are banded, because convolutions over single channels are slow: upsampling
    [32, 3, 32, 32] takes 1.1 ms against 12 ms by conv_transpose2d, [4, 3, 256, 256] 74 ms against 144 ms (two cores of
    an AMD EPYC, float32, torch 2.13). The work grows with the cube of the size.
    """
    period, taps = 4 * (size - 1), torch.tensor(SYM6, dtype=torch.float64, device="cpu")
    up = torch.zeros(period + 1 + 2 * len(SYM6), size, dtype=torch.float64, device="cpu")
    for i in range(-len(SYM6) // 2, period // 2 + 1):
        pixel = size - 1 - abs(i % (period // 2) - (size - 1))
        row = 2 * i + len(SYM6)  # so many rows of margin on either side
        up[row : row + len(SYM6), pixel] += math.sqrt(2) * taps
    down = torch.zeros(size, 2 * size + len(SYM6) - 2, dtype=torch.float64, device="cpu")
    for i in range(size):
        down[i, 2 * i : 2 * i + len(SYM6)] = taps / math.sqrt(2)
    return up[len(SYM6) : -len(SYM6)].to(dtype).to(device), down.to(dtype).to(device)


def _separable(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix: [M, S], x: [N, C, S, S] -> [N, C, M, M], along both axes. From the right: matmul folds that batch."""
    return (x.mT @ matrix.mT).mT @ matrix.mT


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Resample image i so that its value at q comes from ``matrix[i]`` q; the image goes on by reflection, without end.

    x: [N, C, H, H] float32 or float64; matrix: [N, 3, 3] of the same dtype (output to input, see the module's
    coordinates). ADA paper, appendix B: upsample by sym6, sample bilinearly, downsample by sym6; translations by whole
    pixels are exact. The paper pads by reflection as far as the batch's transformations reach, which makes a GPU wait
    for the host; wrapping the coordinates into one period of the reflected image has no limit and a fixed cost.
    """
    size = x.shape[-1]
    up, down = _resampling(size, x.device, x.dtype)
    period = up.shape[0] - 1
    centre = size - 1 + SYM6_DELAY  # in samples, of which there are two a pixel
    offset = torch.arange(down.shape[1], device=x.device, dtype=x.dtype) - centre  # of the output's samples
    # No matrix product here: TF32, where the user allows it, would misplace samples.
    column = matrix[:, None, None, :2, 0] * offset[None, None, :, None]
    row = matrix[:, None, None, :2, 1] * offset[None, :, None, None]
    sample = column + row + (2 * matrix[:, None, None, :2, 2] + centre)  # [N, H', W', 2], as (x, y)
    grid = sample.remainder(period) * (2 / period) - 1
    return _separable(down, _GridSample.apply(_separable(up, x), grid))


def geometric_parameters(
    p: float, size: int, gate: Tensor, uniform: Tensor, normal: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters of the ADA paper's appendix B: flip and quarter_turns for ``blit``, the matrix [N, 3, 3] for ``warp``.

    p: probability of each transformation; size: H, in pixels.
    gate: [8, N] and uniform: [6, N], in [0, 1); normal: [4, N].
    """
    flips, turns, shifts, zooms, stretches, slides = gate[:6] < p
    # Turning before or after stretching: each with the probability that makes it p for one of them at least.
    turns_before, turns_after = gate[6:] < 1.0 - math.sqrt(1.0 - p)
    flip = flips & (uniform[0] < 0.5)
    quarter_turns = torch.where(turns, (4 * uniform[1]).long(), 0)

    shift = torch.where(shifts, ((uniform[2:4] - 0.5) * (size / 4)).round(), 0.0)
    zoom = torch.where(zooms, torch.exp2(0.2 * normal[0]), 1.0)
    before = torch.where(turns_before, (2 * uniform[4] - 1) * math.pi, 0.0)
    stretch = torch.where(stretches, torch.exp2(0.2 * normal[1]), 1.0)
    after = torch.where(turns_after, (2 * uniform[5] - 1) * math.pi, 0.0)
    slide = torch.where(slides, normal[2:] * (size / 8), 0.0)
    # The paper shifts, zooms, turns, stretches, turns and slides the image, in this order. From output to input it is
    # the product of the inverses, the first leftmost; each parameter is distributed like its inverse: none is inverted.
    matrix = translate2d(*shift) @ scale2d(zoom, zoom) @ rotate2d(before)
    return flip, quarter_turns, matrix @ scale2d(stretch, 1 / stretch) @ rotate2d(after) @ translate2d(*slide)


# ---------------------------------------------------------------------------------------------------------------------
# ADA: colour


def recolor(x: Tensor, brightness: Tensor, contrast: Tensor, luma_sign: Tensor, hue: Tensor, sat: Tensor) -> Tensor:
    """The five colour transformations of the ADA paper's appendix B, in its order, as one affine map of the channels.

    x: [N, C, H, W]; the others [N]: ``brightness`` is added, ``contrast`` multiplies, ``luma_sign`` (+-1) multiplies
    the luma, ``hue`` (radians) turns colours about the luma axis (1, 1, 1), ``sat`` multiplies the chroma.

    Seen from the luma axis the product of the paper's 4x4 matrices is short: luma is scaled by contrast x luma_sign,
    chroma by contrast x sat and turned, which makes a circulant matrix; brightness passes through the luma alone. Grey
    images are all luma.
    """
    luma, chroma = contrast * luma_sign, contrast * sat
    if x.shape[1] == 1:
        matrix = luma.view(-1, 1, 1)
    else:
        a, b, c = ((luma + 2 * chroma * torch.cos(hue + third * 2 * math.pi / 3)) / 3 for third in (0, 1, -1))
        matrix = torch.stack([a, b, c, c, a, b, b, c, a], dim=-1).view(-1, 3, 3)
    return torch.baddbmm((luma * brightness).view(-1, 1, 1), matrix, x.flatten(2)).view(x.shape)


def color_parameters(
    p: float, gate: Tensor, uniform: Tensor, normal: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Parameters of the ADA paper's appendix B, in the order in which ``recolor`` takes them, each [N].

    p: probability of each transformation; gate: [5, N] and uniform: [2, N] in [0, 1); normal: [3, N].
    """
    brightens, contrasts, inverts, hues, saturates = gate < p
    return (
        torch.where(brightens, 0.2 * normal[0], 0.0),
        torch.where(contrasts, torch.exp2(0.5 * normal[1]), 1.0),
        1.0 - 2.0 * (inverts & (uniform[0] < 0.5)).to(normal.dtype),
        torch.where(hues, (2 * uniform[1] - 1) * math.pi, 0.0),
        torch.where(saturates, torch.exp2(normal[2]), 1.0),
    )


# ---------------------------------------------------------------------------------------------------------------------


class ADA(nn.Module):
    """Adaptive discriminator augmentation: blit, geometric and colour transformations, each with probability ``p``.

    p: initial probability, in [0, 1]. Buffer ``p`` (float32 scalar, part of the state_dict) stays on the CPU.
    target: the mean sign of D(real) that ``adapt`` steers to (r_t of the ADA paper's section 3.1).
    kimg: thousands of images in which p may go from 0 to 1.
    """

    p: Tensor
    rows = ALL_ROWS

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

    def _apply(self, fn: Any, recurse: bool = True) -> "ADA":
        """Leaves ``p`` where and as it is: each call reads it on the host, which would else wait for the GPU."""
        return self

    def extra_repr(self) -> str:
        return f"p={float(self.p):.4f}, target={self.target}, kimg={self.kimg}"

    @torch.no_grad()
    def adapt(self, signs_mean: float, images: int) -> None:
        """Move p by images / (1000 kimg), up where D(real) is positive too often, else down, within [0, 1].

        signs_mean: mean of sign(D(real)) over the last ``images`` real images, in [-1, 1]; ValueError otherwise.
        """
        if not -1.0 <= signs_mean <= 1.0:  # also when it is not a number
            raise ValueError(f"signs_mean must be in [-1, 1], got {signs_mean}")
        direction = (signs_mean > self.target) - (signs_mean < self.target)
        self.p.add_(direction * images / (1000.0 * self.kimg)).clamp_(0.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]; returns the same shape and dtype, x itself while p = 0. Raises ValueError or TypeError."""
        _check(x)
        n, size = x.shape[0], x.shape[-1]
        joint = self.rows.joint(n)
        gate = torch.rand(13, joint, device=x.device, dtype=torch.float32)
        uniform = torch.rand(8, joint, device=x.device, dtype=torch.float32)
        normal = torch.randn(7, joint, device=x.device, dtype=torch.float32)
        gate, uniform, normal = (self.rows.own(random, dim=1) for random in (gate, uniform, normal))
        p = float(self.p)
        if p == 0.0 or n == 0:
            return x
        with torch.autocast(x.device.type, enabled=False):
            y = x.to(_compute_dtype(x))
            uniform, normal = uniform.to(y.dtype), normal.to(y.dtype)
            flip, quarter_turns, matrix = geometric_parameters(p, size, gate[:8], uniform[:6], normal[:4])
            y = warp(blit(y, flip, quarter_turns), matrix)
            y = recolor(y, *color_parameters(p, gate[8:], uniform[6:], normal[4:]))
            return y.to(x.dtype)


def make_augment(
    name: Literal["none", "diffaug", "ada"], *, target: float = 0.6, kimg: float = 500.0
) -> nn.Identity | DiffAugment | ADA:
    """The augmentation called ``name``; ``target`` and ``kimg`` are ADA's. ValueError for an unknown name."""
    if name == "none":
        return nn.Identity()
    if name == "diffaug":
        return DiffAugment()
    if name == "ada":
        return ADA(target=target, kimg=kimg)
    raise ValueError(f"augmentation must be 'none', 'diffaug' or 'ada', got {name!r}")
