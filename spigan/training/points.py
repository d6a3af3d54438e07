"""The generated points of the straight path, which the discriminator compares with the real ones."""

from __future__ import annotations

import torch
from torch import Tensor

from spigan.config import TrainConfig
from spigan.models import SPIGAN
from spigan.ops import path_interpolate
from spigan.sde import VPSDE
from spigan.training.processes import Processes


class Points:
    """Makes generated points i(t_k), as `config.path` and `config.times` say.

    On the learned path, a point is an image of the generator, G(h(t_k)). On the analytic path, G makes a clean image,
    and the point lies between it and noise e' as a real point lies between x_0 and e (see docs/training.md).

    A minibatch has n images at each of k times. With times="shared" these are the same n = N images at all times; with
    times="split" they are others at each time, n = N / k. Tensors of images therefore have a leading axis of b = 1 or
    b = k *blocks* of n images, the first of which serves all times if it is the only one.

    Args:
        config: how to train.
        model: mapping network and generator.
        processes: the processes that share each minibatch.

    Attributes:
        analytic: whether the path is analytic.
        split: whether each image is used at one time only.
    """

    def __init__(self, config: TrainConfig, model: SPIGAN, processes: Processes) -> None:
        self.model, self.processes = model, processes
        self.analytic = config.path == "analytic"
        self.split = config.times == "split" and config.intervals > 1
        self._one_latent = self.analytic and config.path_latent == "1"
        self._bf16 = config.precision == "bf16"
        self._sde = VPSDE(config.beta_min, config.beta_max)

    def blocks(self, x: Tensor, k: int) -> Tensor:
        """Return a minibatch [N, ...] as blocks [b, n, ...]."""
        return x.unflatten(0, (k, -1)) if self.split else x[None]

    def own_times(self, i: Tensor) -> Tensor:
        """Return the points [k, n, ...] of each time, out of the points [k, N, ...] of all images at all times."""
        if not self.split:
            return i
        return torch.stack([self.blocks(points, len(i))[j] for j, points in enumerate(i)])

    def latents(self, z: Tensor, times: list[float]) -> Tensor:
        """Return the latents that feed the generator: h(t_k) [k, n, D], or h(1) [b, n, D] if it serves all times.

        Args:
            z: [b, n, ...] inputs of the mapping network.
            times: the times t_k.
        """
        mapping, h = self.model.mapping, None
        if self._one_latent:
            h = mapping(z.flatten(0, 1), [1.0])[0].unflatten(0, z.shape[:2])
        elif len(z) == 1:
            h = mapping(z[0], times)
        else:
            h = torch.stack([mapping(block, t) for block, t in zip(z, times, strict=True)])
        assert isinstance(h, Tensor)
        return h

    def images(self, h: Tensor, blocks: int) -> Tensor:
        """Return the generator's images [n b, C, H, W] of interleaved latents [n b, D] or [n b, num_ws, D]."""
        rows, generator = self.processes.rows(blocks), self.model.generator
        noise = None  # drawn by the generator
        if rows.count > 1:
            noise = [rows.own(x) for x in generator.draw_noise(rows.joint(len(h)), self.processes.device)]
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self._bf16):
            images: Tensor = generator(h, noise)
        return images

    def __call__(self, h: Tensor, times: list[float] | Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the generated points [n k, C, H, W], interleaved.

        Args:
            h: the latents that `latents` returned.
            times: the times t_k, as floats or, in a CUDA graph, as a tensor [k].
            noise: [b, n, C, H, W] e' of the analytic path, or None on the learned path.
        """
        images = self.images(interleave(h), len(h))
        if noise is None:
            return images
        clean = images.unflatten(0, (-1, len(h))).transpose(0, 1)  # [b, n, C, H, W]
        if isinstance(times, Tensor):  # a graph is replayed with other times, so they cannot be the operation's floats
            t, (mean_coef, std) = times[:, None, None, None, None], self._sde.marginal(1.0)
            return interleave(t * clean + (1.0 - t) * (mean_coef * clean + std * noise))
        if len(clean) == 1:
            return interleave(path_interpolate(clean[0], times, noise=noise[0], sde=self._sde)[1])
        # One time for each block.
        noises = noise.expand(len(clean), *noise.shape[1:])
        parts = [
            path_interpolate(x, [t], noise=e, sde=self._sde)[1] for x, t, e in zip(clean, times, noises, strict=True)
        ]
        return interleave(torch.cat(parts))


def interleave(x: Tensor) -> Tensor:
    """Reshape [k, n, ...] to [n k, ...], with the k times of each image side by side.

    In this order, each (strided) group of the minibatch standard deviation holds images of one time.
    """
    return x.transpose(0, 1).flatten(0, 1)
