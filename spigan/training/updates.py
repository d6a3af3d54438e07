"""The updates of Algorithm 1: gradients of losses and penalties, optimiser steps, averages and ADA's p."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spigan.config import TrainConfig
from spigan.training.augment import ADA
from spigan.training.losses import fake_loss, generator_loss, path_lengths, r1_penalty, real_loss
from spigan.training.points import Points, interleave
from spigan.training.processes import Processes
from spigan.training.state import TrainState, images_of_a_time
from spigan.training.step_graphs import StepGraphs

ADA_INTERVAL = 4  # discriminator iterations between changes of ADA's p (Karras et al. 2020a, section 3.1)


class Updates:
    """Updates the networks of a training state with minibatches of n images at each of k times (see `Points`).

    Gradients are those of the joint minibatch of all processes, accumulated over `batch_gpu` images at a time.

    Args:
        config: how to train.
        state: the state to train, which is changed in place.
        processes: the processes that share each minibatch.

    Attributes:
        points: makes the generated points of the path.
        check_every_step: whether to check for divergence before each optimiser step. On a GPU the check would have to
            wait for the device, so divergence is only found at the end of a tick.
        graphs: runs parts of the updates as CUDA graphs.
    """

    def __init__(self, config: TrainConfig, state: TrainState, processes: Processes) -> None:
        self.config, self.state, self.processes = config, state, processes
        self.check_every_step = processes.device.type == "cpu"
        self.points = Points(config, state.model, processes)
        self.graphs = StepGraphs(config, state)
        self._at_a_time = images_of_a_time(config, processes)

    # ---- Updates ----

    def step_discriminator(self, real: Tensor, h: Tensor, times: list[float], noise: Tensor | None = None) -> Tensor:
        """Update the discriminator.

        Args:
            real: [k, n, C, H, W] points i(t_k) on the paths.
            h: [k or b, n, D] latents, as `Points.latents` returns them.
            times: the times t_k.
            noise: [b, n, C, H, W] noise of the generated points on the analytic path.

        Returns:
            Mean sign of the logits of the real images.
        """
        state = self.state
        state.discriminator.requires_grad_(True)
        state.optimizer_d.zero_grad(set_to_none=True)
        t = self._graph_times(times)
        signs = []
        for real_part, h_part, noise_part in self._parts(real, h, noise):
            assert real_part is not None and h_part is not None
            share = real_part.shape[1] / real.shape[1]
            loss, real_logit, fake_logit, sign = self.graphs.run(
                self._discriminator_part, state.discriminator, (real_part, h_part, t, *given(noise_part)), share
            )
            signs.append(sign)
            state.record(loss_d=loss, real_logit=real_logit, fake_logit=fake_logit)
        self._step(state.optimizer_d, "d")
        return torch.stack(signs).sum()

    def _discriminator_part(self, real: Tensor, h: Tensor, t: Tensor, *noise_and_share: Any) -> tuple[Tensor, ...]:
        *noise, share = noise_and_share
        with torch.no_grad():
            generated = self.points(h, t, *noise)
        fake = self._logits(generated, t)
        loss_fake = fake_loss(fake)
        (loss_fake * share).backward()
        logits = self._logits(interleave(real), t)
        loss_real = real_loss(logits)
        (loss_real * share).backward()
        fake, logits = fake.detach(), logits.detach()
        return (loss_fake + loss_real).detach(), logits.mean(), fake.mean(), logits.sign().mean() * share

    def step_r1(self, real: Tensor, times: list[float]) -> None:
        """Update the discriminator by the lazy R1 penalty, weighted by the number of updates it stands for.

        Args:
            real: [k, n, C, H, W] points i(t_k) on the paths.
            times: the times t_k.
        """
        state = self.state
        state.discriminator.requires_grad_(True)
        state.optimizer_d.zero_grad(set_to_none=True)
        weight = 0.5 * self.config.r1_gamma * self.config.r1_interval
        for (part,) in self._parts(real):
            assert part is not None
            images = interleave(part).detach().requires_grad_(True)
            penalty = r1_penalty(self._logits(images, times), images)
            (penalty * (weight * part.shape[1] / real.shape[1])).backward()
            state.record(r1=penalty)
        self._step(state.optimizer_d, "r1")

    def step_generator(self, z: Tensor, times: list[float], noise: Tensor | None = None) -> None:
        """Update the mapping network and the generator.

        Args:
            z: [b, n, ...] inputs of the mapping network.
            times: the times t_k.
            noise: [b, n, C, H, W] noise of the generated points on the analytic path.
        """
        state = self.state
        state.discriminator.requires_grad_(False)
        state.optimizer_g.zero_grad(set_to_none=True)
        t = self._graph_times(times)
        for part, noise_part in self._parts(z, noise):
            assert part is not None
            h = self.points.latents(part, times)  # not in a graph: the steps of the solver depend on the times
            (loss,) = self.graphs.run(
                self._generator_part, state.model.generator, (h, t, *given(noise_part)), part.shape[1] / z.shape[1]
            )
            state.record(loss_g=loss)
        self._step(state.optimizer_g, "g")

    def _generator_part(self, h: Tensor, t: Tensor, *noise_and_share: Any) -> tuple[Tensor, ...]:
        *noise, share = noise_and_share
        loss = generator_loss(self._logits(self.points(h, t, *noise), t))
        (loss * share).backward()
        return (loss.detach(),)

    def step_path_length(self, z: Tensor, times: list[float]) -> None:
        """Update mapping network and generator by the lazy path-length penalty.

        The penalty is the squared distance of the path lengths from their running mean (Karras et al. 2020b, section
        3.2), computed on n / pl_batch_shrink images. The lengths are those of the generator's images, also on the
        analytic path.

        Args:
            z: [b, n, ...] inputs of the mapping network.
            times: the times t_k.
        """
        state = self.state
        state.optimizer_g.zero_grad(set_to_none=True)
        z = z[:, : max(1, z.shape[1] // self.config.pl_batch_shrink)]
        weight = self.config.pl_weight * self.config.pl_interval
        for (part,) in self._parts(z):
            assert part is not None
            latents = self.points.latents(part, times)
            h = interleave(latents)
            h = h[:, None].expand(-1, state.model.generator.num_ws, -1)  # a latent for each layer, as in StyleGAN2
            lengths = path_lengths(self.points.images(h, len(latents)), h, self.processes.rows(len(latents)))
            with torch.no_grad():
                state.pl_mean.lerp_(self.processes.mean(lengths.mean()), self.config.pl_decay)
            penalty = (lengths - state.pl_mean).square().mean()
            (penalty * (weight * part.shape[1] / z.shape[1])).backward()
            state.record(path_length=lengths.mean(), path_length_penalty=penalty)
        self._step(state.optimizer_g, "pl")

    def adapt_augmentation(self, signs: list[Tensor], images: int) -> None:
        """Every `ADA_INTERVAL` calls, move ADA's p by the mean sign of D(real) over the images since the last move.

        Args:
            signs: what each call of `step_discriminator` in this iteration returned.
            images: number of images of the joint minibatch.
        """
        state, sign = self.state, torch.stack(signs).mean()
        state.record(real_sign=sign)
        if not isinstance(state.augment, ADA):
            return
        state.ada_signs.append(self.processes.mean(sign))
        if len(state.ada_signs) == ADA_INTERVAL:
            mean = torch.stack(state.ada_signs).mean().clamp(-1.0, 1.0)  # rounding may take it slightly above 1
            state.augment.adapt(mean.item(), ADA_INTERVAL * images)
            state.ada_signs.clear()

    @torch.no_grad()
    def average_weights(self, images: int) -> None:
        """Move the averaged weights towards the current ones, so that old weights have a half-life of `ema_kimg`.

        Args:
            images: number of images since the last call.
        """
        half_life = self.config.ema_kimg * 1000
        if self.config.ema_rampup is not None:
            half_life = min(half_life, self.state.images_seen * self.config.ema_rampup)
        weight = 1.0 - 0.5 ** (images / max(half_life, 1e-8))
        model, ema = self.state.model, self.state.ema
        torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], weight)
        torch._foreach_copy_([*ema.buffers()], [*model.buffers()])

    # ---- Parts of the updates ----

    def _parts(self, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
        """Split a minibatch [b, n, ...] into parts of `batch_gpu` images, whose gradients are accumulated."""
        n = next(tensor.shape[1] for tensor in tensors if tensor is not None)
        for start in range(0, n, self._at_a_time):
            stop = start + self._at_a_time
            yield tuple(None if tensor is None else tensor[:, start:stop] for tensor in tensors)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _graph_times(self, times: list[float]) -> Any:
        """Return the times as the parts of a step take them: on the device for graphs, which are replayed with others.

        Otherwise they stay exact, as the points of real images use them.
        """
        return on_device(times, self.processes.device) if self.graphs.enabled else times

    def _logits(self, images: Tensor, times: list[float] | Tensor) -> Tensor:
        """Augment n images at k times, [n k, C, H, W], real or generated, and return D's logits [n k]."""
        images = self.state.augment(images, self.processes.rows(len(times)))
        t = on_device(times, images.device).repeat(len(images) // len(times))
        with self._autocast():
            logits: Tensor = self.state.discriminator(images, t)
        return logits

    def _step(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        """Take a step with the gradients of the joint minibatch. Raise `Diverged` instead if training has diverged."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.processes.average_gradients(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.state.record(**{f"grad_norm_{name}": nn.utils.get_total_norm(gradients)})
        if self.check_every_step:
            self.state.statistics.check()
        optimizer.step()
        self.graphs.note(name)


def on_device(times: list[float] | Tensor, device: torch.device) -> Tensor:
    """Return float32 [k] times on a device, without waiting for it: the copy from pinned memory is queued."""
    if isinstance(times, Tensor):
        return times
    return torch.tensor(times, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def given(noise: Tensor | None) -> tuple[Tensor, ...]:
    """Return the noise of generated points as arguments of a part: none on the learned path."""
    return () if noise is None else (noise,)
