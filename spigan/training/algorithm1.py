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
        update: the updates of the networks.
    """

    def __init__(self, config: TrainConfig, state: TrainState, processes: Processes) -> None:
        self.config, self.state, self.processes = config, state, processes
        self.update = Updates(config, state, processes)
        self.sde = VPSDE(config.beta_min, config.beta_max)

    def iteration(self, images: Tensor) -> None:
        """Run lines 3 to 14 of Algorithm 1 once: even iterations update D, odd ones the mapping network and G.

        Args:
            images: uint8 [N, C, H, W] clean images, this process's rows of the minibatch.
        """
        config, state, update = self.config, self.state, self.update
        x_0, flips = self._minibatch(images)  # line 3
        t = draw_times(config.intervals, config.fixed_t)  # line 5: t_1 < ... < t_K = 1
        x_T, i = self._path(x_0, flips, t)  # lines 4 and 9: x_T [N, C, H, W], i(t_k) [K, N, C, H, W]
        z = self._start(x_T)
        if state.iteration % 2 == 0:  # line 8
            with torch.no_grad():
                h = update.solve(z, t)  # line 6: h(t_k) [K, N, D]; one incremental solve serves all K updates
            signs = []
            for k in self._turns():
                signs.append(update.discriminator(i[k], h[k], t[k]))  # lines 7 and 10
                if self._due(config.r1_gamma, config.r1_interval):
                    update.r1(i[k], t[k])
            update.adapt_augmentation(signs, self._count(images))
            state.images_seen += self._count(images)
        else:
            for k in self._turns():
                update.generator(z, t[k])  # lines 6, 7 and 12: solved anew, since the last update changed the network
                if self._due(config.pl_weight, config.pl_interval):
                    update.path_length(z, t[k])
            update.average_weights(self._count(images))
        state.iteration += 1  # line 14

    def _minibatch(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the images on the device, and which of them to mirror: bool [N], or None to mirror none."""
        images = images.to(self.processes.device, non_blocking=True)
        if not self.config.xflip:
            return images, None
        return images, self.processes.rows().rand(len(images), device=images.device) < 0.5

    def _path(self, x_0: Tensor, flips: Tensor | None, t: list[float]) -> tuple[Tensor, Tensor]:
        """Return x_T, and i(t_k) on the straight path from x_T to the mirrored x_0."""
        seed, offset = NOISE_STREAM + self.config.seed, self.state.noise_offset
        noise = self.processes.rows().philox_normal(x_0.shape, seed=seed, offset=offset, device=x_0.device)
        self.state.noise_offset += self.processes.rows().joint(x_0.numel())
        return path_interpolate(x_0, t, seed=seed, offset=offset, noise=noise, flips=flips, sde=self.sde)

    def _start(self, x_T: Tensor) -> Tensor:
        """Return the input of the mapping network: x_T, or a vector [N, D] for StyleGAN2's mapping."""
        if self.config.model.mapping == "ode":
            return x_T
        return self.processes.rows().randn(len(x_T), self.config.model.dim_h, device=x_T.device)

    def _turns(self) -> list[slice]:
        """Return the times of each update: one t_k after another, or all of them jointly."""
        k = self.config.intervals
        return [slice(0, k)] if self.config.updates == "joint" else [slice(j, j + 1) for j in range(k)]

    def _due(self, weight: float, interval: int) -> bool:
        """Return whether a lazy penalty is due in this iteration.

        The interval counts iterations, not updates. If it counted updates and K divided it, the penalty would always
        fall on the same t_k, and with K = 2 would never regularise a clean image.
        """
        return weight > 0 and self.state.iteration // 2 % interval == 0

    def _count(self, images: Tensor) -> int:
        """Return the number of images in the joint minibatch."""
        return self.processes.rows().joint(len(images))


def draw_times(k: int, fixed: bool = False) -> list[float]:
    """Return t_1 < ... < t_K = 1: k - 1 of them drawn from U(0, 1), or 1 / K, 2 / K, ..., 1 if `fixed`."""
    if fixed:
        return [(j + 1) / k for j in range(k)]
    while True:
        times = sorted({*torch.rand(k - 1, dtype=torch.float64).tolist(), 1.0})
        if len(times) == k and times[0] > 0.0:
            return times
