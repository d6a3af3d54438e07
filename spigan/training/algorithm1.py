"""Algorithm 1 of the paper (section 3.5): how to train SPI-GAN."""

from __future__ import annotations

import torch
from torch import Tensor

from spigan.config import TrainConfig
from spigan.ops import path_interpolate
from spigan.sde import VPSDE
from spigan.training.processes import Processes
from spigan.training.state import TrainState
from spigan.training.updates import Updates

# Training noise comes from Philox streams above 2^32, so that sampling with a (small) seed never repeats it.
NOISE_STREAM = 2**32


class Algorithm1:
    """Runs iterations of Algorithm 1 on a training state.

    Args:
        config: how to train.
        state: the state to train, which is changed in place.
        processes: the processes that share each minibatch.

    Attributes:
        updates: the updates of the networks.
    """

    def __init__(self, config: TrainConfig, state: TrainState, processes: Processes) -> None:
        self.config, self.state, self.processes = config, state, processes
        self.updates = Updates(config, state, processes)
        self.sde = VPSDE(config.beta_min, config.beta_max)

    def iteration(self, images: Tensor) -> None:
        """Run lines 3 to 14 of Algorithm 1 once: even iterations update D, odd ones the mapping network and G.

        Args:
            images: uint8 [N, C, H, W] clean images, this process's rows of the minibatch.
        """
        config, state, updates = self.config, self.state, self.updates
        n = self.processes.rows().joint(len(images))  # images of the joint minibatch
        x_0, flips = self._minibatch(images)  # line 3
        t = self._times()  # line 5: t_1 < ... < t_K = 1
        x_T, i = self._path(x_0, flips, t)  # lines 4 and 9: x_T [b, n, C, H, W], i(t_k) [K, n, C, H, W]
        z = self._start(x_T)
        noise = self._noise(z)  # None on the paper's path
        if state.iteration % 2 == 0:  # line 8
            with torch.no_grad():
                h = updates.points.latents(z, t)  # line 6: one incremental solve serves all K updates
            signs = []
            for times in self._turns():
                own = h if len(h) == 1 else h[times]
                signs.append(updates.step_discriminator(i[times], own, t[times], noise))  # lines 7 and 10
                if self._due(config.r1_gamma, config.r1_interval):
                    updates.step_r1(i[times], t[times])  # not in the paper
            updates.adapt_augmentation(signs, n)  # not in the paper
            state.images_seen += n  # not in the paper: it sets the length of the run
        else:
            for times in self._turns():
                # Lines 6, 7 and 12: solved anew, since the last update changed the network.
                updates.step_generator(z, t[times], noise)
                if self._due(config.pl_weight, config.pl_interval):
                    updates.step_path_length(z, t[times])  # not in the paper
            updates.average_weights(n)  # not in the paper
        state.iteration += 1  # line 14

    def _minibatch(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the images on the device, and which of them to mirror: bool [N], or None to mirror none."""
        images = images.to(self.processes.device, non_blocking=True)
        if not self.config.xflip:
            return images, None
        return images, self.processes.rows().rand(len(images), device=images.device) < 0.5

    def _times(self) -> list[float]:
        config = self.config
        return draw_times(config.intervals, config.fixed_t, start=config.time_min, power=config.time_power)

    def _path(self, x_0: Tensor, flips: Tensor | None, t: list[float]) -> tuple[Tensor, Tensor]:
        """Return x_T [b, n, C, H, W], and i(t_k) [K, n, C, H, W] on the straight path from x_T to the mirrored x_0."""
        seed, offset = NOISE_STREAM + self.config.seed, self._take_noise(x_0)
        rows = self.processes.rows()
        noise = None  # drawn by path_interpolate
        if rows.count > 1:
            noise = rows.philox_normal(x_0.shape, seed=seed, offset=offset, device=x_0.device)
        x_T, i = path_interpolate(x_0, t, seed=seed, offset=offset, noise=noise, flips=flips, sde=self.sde)
        points = self.updates.points
        return points.blocks(x_T, len(t)), points.own_times(i)

    def _start(self, x_T: Tensor) -> Tensor:
        """Return the input of the mapping network: x_T, or for StyleGAN2's mapping, normals [b, n, *z_shape]."""
        model, (b, n) = self.config.model, x_T.shape[:2]
        if model.mapping == "ode":
            return x_T
        return self.processes.rows().randn(b * n, *model.z_shape, device=x_T.device).unflatten(0, (b, n))

    def _noise(self, z: Tensor) -> Tensor | None:
        """Return the noise e' [b, n, C, H, W] of the generated points on the analytic path."""
        if not self.updates.points.analytic:
            return None
        if self.config.path_noise == "z":
            return z
        flat, seed = z.flatten(0, 1), NOISE_STREAM + self.config.seed
        noise = self.processes.rows().philox_normal(
            flat.shape, seed=seed, offset=self._take_noise(flat), device=z.device
        )
        return noise.unflatten(0, z.shape[:2])

    def _take_noise(self, images: Tensor) -> int:
        """Return the offset of the next noise for `images` [N, C, H, W] in its stream, and move on."""
        offset = self.state.noise_offset
        self.state.noise_offset += self.processes.rows().joint(images.numel())
        return offset

    def _turns(self) -> list[slice]:
        """Return the times of each update: one t_k after another, or all of them jointly."""
        k = self.config.intervals
        joint = self.config.updates == "joint" or self.config.times == "split"
        return [slice(0, k)] if joint else [slice(j, j + 1) for j in range(k)]

    def _due(self, weight: float, interval: int) -> bool:
        """Return whether a lazy penalty is due in this iteration.

        The interval counts iterations, not updates. If it counted updates and K divided it, the penalty would always
        fall on the same t_k, and with K = 2 would never regularise a clean image.
        """
        return weight > 0 and self.state.iteration // 2 % interval == 0


def draw_times(k: int, fixed: bool = False, *, start: float = 0.0, power: float = 1.0) -> list[float]:
    """Return t_1 < ... < t_K = 1: k - 1 of them drawn from (0, 1), or 1 / K, 2 / K, ..., 1 if `fixed`.

    Args:
        k: number of times.
        fixed: whether to draw none.
        start: the drawn times are larger.
        power: their density is proportional to (t - start)^(power - 1), which is uniform for 1.
    """
    if fixed:
        return [(j + 1) / k for j in range(k)]
    while True:
        drawn = torch.rand(k - 1, dtype=torch.float64).tolist()
        times = sorted({*(start + (1.0 - start) * u ** (1.0 / power) for u in drawn), 1.0})
        if len(times) == k and times[0] > 0.0:
            return times
