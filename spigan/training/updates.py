"""The updates of Algorithm 1: gradients of losses and penalties, optimiser steps, averages and ADA's p."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spigan.config import TrainConfig
from spigan.training.augment import ADA
from spigan.training.losses import fake_loss, generator_loss, path_lengths, r1_penalty, real_loss
from spigan.training.processes import Processes
from spigan.training.state import TrainState, images_at_a_time
from spigan.training.step_graphs import StepGraphs

ADA_INTERVAL = 4  # discriminator iterations between changes of ADA's p (Karras et al. 2020a, section 3.1)


class Updates:
    """Updates the networks of a training state with minibatches of N images at k times each.

    Gradients are those of the joint minibatch of all processes, accumulated over `batch_gpu` images at a time.

    Args:
        config: how to train.
        state: the state to train, which is changed in place.
        processes: the processes that share each minibatch.

    Attributes:
        check_every_step: whether to check for divergence before each optimiser step. On a GPU the check would have to
            wait for the device, so divergence is only found at the end of a tick.
        graphs: runs parts of the updates as CUDA graphs.
    """

    def __init__(self, config: TrainConfig, state: TrainState, processes: Processes) -> None:
        self.config, self.state, self.processes = config, state, processes
        self.check_every_step = processes.device.type == "cpu"
        self.graphs = StepGraphs(config, state)
        self._at_a_time = images_at_a_time(config, processes)

    # ---- Updates ----

    def solve(self, z: Tensor, times: list[float]) -> Tensor:
        """Return the latents h(t_k) [k, N, D] that the mapping network makes from z."""
        h: Tensor = self.state.model.mapping(z, times)
        return h

    def step_discriminator(self, real: Tensor, h: Tensor, times: list[float]) -> Tensor:
        """Update the discriminator.

        Args:
            real: [k, N, C, H, W] points i(t_k) on the paths.
            h: [k, N, D] latents h(t_k).
            times: the times t_k.

        Returns:
            Mean sign of the logits of the real images.
        """
        state = self.state
        state.discriminator.requires_grad_(True)
        state.optimizer_d.zero_grad(set_to_none=True)
        t = on_device(times, self.processes.device)
        signs = []
        for real_part, h_part in self._parts(real, h, dim=1):
            share = real_part.shape[1] / real.shape[1]
            loss, real_logit, fake_logit, sign = self.graphs.run(
                self._discriminator_part, state.discriminator, (real_part, h_part, t), share
            )
            signs.append(sign)
            state.record(loss_d=loss, real_logit=real_logit, fake_logit=fake_logit)
        self._step(state.optimizer_d, "d")
        return torch.stack(signs).sum()

    def _discriminator_part(self, real: Tensor, h: Tensor, t: Tensor, share: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            generated = self._generate(interleave(h), t)
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
            real: [k, N, C, H, W] points i(t_k) on the paths.
            times: the times t_k.
        """
        state = self.state
        state.discriminator.requires_grad_(True)
        state.optimizer_d.zero_grad(set_to_none=True)
        weight = 0.5 * self.config.r1_gamma * self.config.r1_interval
        for (part,) in self._parts(real, dim=1):
            images = interleave(part).detach().requires_grad_(True)
            penalty = r1_penalty(self._logits(images, times), images)
            (penalty * (weight * part.shape[1] / real.shape[1])).backward()
            state.record(r1=penalty)
        self._step(state.optimizer_d, "r1")

    def step_generator(self, z: Tensor, times: list[float]) -> None:
        """Update the mapping network and the generator.

        Args:
            z: [N, ...] inputs of the mapping network.
            times: the times t_k.
        """
        state = self.state
        state.discriminator.requires_grad_(False)
        state.optimizer_g.zero_grad(set_to_none=True)
        t = on_device(times, self.processes.device)
        for (part,) in self._parts(z, dim=0):
            h = self.solve(part, times)  # not in a graph: the steps of the solver depend on the times
            (loss,) = self.graphs.run(self._generator_part, state.model.generator, (h, t), len(part) / len(z))
            state.record(loss_g=loss)
        self._step(state.optimizer_g, "g")

    def _generator_part(self, h: Tensor, t: Tensor, share: float) -> tuple[Tensor, ...]:
        loss = generator_loss(self._logits(self._generate(interleave(h), t), t))
        (loss * share).backward()
        return (loss.detach(),)

    def step_path_length(self, z: Tensor, times: list[float]) -> None:
        """Update mapping network and generator by the lazy path-length penalty.

        The penalty is the squared distance of the path lengths from their running mean (Karras et al. 2020b, section
        3.2), computed on N / pl_batch_shrink images.

        Args:
            z: [N, ...] inputs of the mapping network.
            times: the times t_k.
        """
        state = self.state
        state.optimizer_g.zero_grad(set_to_none=True)
        z = z[: max(1, len(z) // self.config.pl_batch_shrink)]
        weight = self.config.pl_weight * self.config.pl_interval
        for (part,) in self._parts(z, dim=0):
            h = interleave(self.solve(part, times))
            h = h[:, None].expand(-1, state.model.generator.num_ws, -1)  # a latent for each layer, as in StyleGAN2
            lengths = path_lengths(self._generate(h, times), h, self.processes.rows(len(times)))
            with torch.no_grad():
                state.pl_mean.lerp_(self.processes.mean(lengths.mean()), self.config.pl_decay)
            penalty = (lengths - state.pl_mean).square().mean()
            (penalty * (weight * len(part) / len(z))).backward()
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

    def _parts(self, *tensors: Tensor, dim: int) -> Iterator[tuple[Tensor, ...]]:
        """Split a minibatch into parts of `batch_gpu` images, whose gradients are accumulated."""
        return zip(*(tensor.split(self._at_a_time, dim=dim) for tensor in tensors), strict=True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _generate(self, h: Tensor, times: list[float] | Tensor) -> Tensor:
        """Return the images [n k, C, H, W] of latents [n k, D] or [n k, num_ws, D]."""
        rows, generator = self.processes.rows(len(times)), self.state.model.generator
        noise = None  # drawn by the generator
        if rows.count > 1:
            noise = [rows.own(x) for x in generator.draw_noise(rows.joint(len(h)), self.processes.device)]
        with self._autocast():
            images: Tensor = generator(h, noise)
        return images

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


def interleave(x: Tensor) -> Tensor:
    """Reshape [k, N, ...] to [N k, ...], with the k times of each image side by side.

    In this order, each (strided) group of the minibatch standard deviation holds images of one time.
    """
    return x.transpose(0, 1).flatten(0, 1)
