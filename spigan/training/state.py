"""The training state: everything that training depends on, and that a checkpoint therefore holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spigan.config import TrainConfig
from spigan.models import SPIGAN, Discriminator
from spigan.training import checkpoint
from spigan.training.augment import Augment, make_augment
from spigan.training.processes import Processes
from spigan.training.statistics import Statistics


class RandomState:
    """The state of torch's global random generators: the CPU's, and that of a CUDA device.

    Args:
        device: device of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def tensors(self) -> dict[str, Tensor]:
        """Return the current states, by device type."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def load(self, states: dict[str, Tensor]) -> None:
        """Restore the states. If there is none for the CUDA device (the run moved there), its generator is unchanged.

        Raises:
            RuntimeError: if a tensor is not the state of a generator.
        """
        torch.set_rng_state(states["cpu"])
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


@dataclass(repr=False, eq=False)
class TrainState:
    """The state of a training run.

    The fields are listed only here. A checkpoint holds each field under its name, in a form that depends on its type
    (see `dump`): modules, optimisers, tensors, lists and statistics as tensors, and numbers as counters.

    Attributes:
        model: the mapping network and the generator that are being trained.
        ema: the average of their weights.
        discriminator: the discriminator.
        augment: augmentation of the images that the discriminator sees, including ADA's p.
        optimizer_g, optimizer_d: Adam optimisers of `model` and `discriminator`.
        pl_mean: running mean of path lengths.
        statistics: what has been recorded since the last tick.
        rng: torch's global generators.
        ada_signs: mean signs of D(real) since ADA's p last moved.
        iteration: iterations so far, of both kinds.
        images_seen: images shown to the discriminator so far. Each counts once, whatever K is.
        images_drawn: images taken from the loader so far, by both kinds of iterations.
        noise_offset: Philox numbers of noise used so far.
        elapsed: seconds of training.
    """

    model: SPIGAN
    ema: SPIGAN
    discriminator: Discriminator
    augment: Augment
    optimizer_g: torch.optim.Adam
    optimizer_d: torch.optim.Adam
    pl_mean: Tensor
    statistics: Statistics
    rng: RandomState
    ada_signs: list[Tensor] = field(default_factory=list)
    iteration: int = 0
    images_seen: int = 0
    images_drawn: int = 0
    noise_offset: int = 0
    elapsed: float = 0.0

    @property
    def device(self) -> torch.device:
        """Device of the run."""
        return self.rng.device

    def items(self) -> Iterator[tuple[str, Any]]:
        """Iterate over the names and values of the fields."""
        return ((each.name, getattr(self, each.name)) for each in dataclasses.fields(self))

    def modules(self) -> dict[str, nn.Module]:
        """Return the fields that are modules."""
        return {name: value for name, value in self.items() if isinstance(value, nn.Module)}

    def counters(self) -> dict[str, int]:
        """Return the fields that are counts."""
        return {name: value for name, value in self.items() if isinstance(value, int)}

    def record(self, **values: Tensor) -> None:
        """Record scalars of this iteration."""
        self.statistics.record(self.iteration, **values)

    def dump(self, *, joint: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the content of a checkpoint: tensors and counters. Only the random state is copied.

        Args:
            joint: average the statistics over all processes. Every process must then call this.
        """
        tensors: dict[str, Tensor] = {}
        counters: dict[str, Any] = {}
        for name, value in self.items():
            match value:
                case nn.Module():
                    tensors |= checkpoint.module_tensors(name, value)
                case torch.optim.Optimizer():
                    tensors |= checkpoint.optimizer_tensors(name, value)
                case Tensor():
                    tensors[name] = value
                case Statistics():
                    tensors |= {f"{name}.{key}": series for key, series in value.tensors(joint=joint).items()}
                case RandomState():
                    tensors |= {f"{name}.{key}": state for key, state in value.tensors().items()}
                case list():
                    if value:
                        tensors[name] = torch.stack(value)
                case int() | float():
                    counters[name] = value
        return tensors, counters

    def load(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Restore the state that `dump` returned.

        Raises:
            KeyError: if a counter is missing.
            ValueError, RuntimeError: if a value does not fit its field.
        """
        for name, value in self.items():
            below = {key.removeprefix(f"{name}."): key for key in tensors if key.startswith(f"{name}.")}
            match value:
                case nn.Module():
                    checkpoint.load_module(name, value, tensors)
                case torch.optim.Optimizer():
                    checkpoint.load_optimizer(name, value, tensors)
                case Tensor():
                    checkpoint.check_tensors({name: value}, tensors)
                    value.copy_(tensors[name])
                case Statistics():
                    found = {key: checkpoint.series(tensors, full) for key, full in below.items()}
                    value.load({key: [x.to(self.device) for x in series] for key, series in found.items()})
                case RandomState():
                    checkpoint.check_tensors({f"{name}.cpu": value.tensors()["cpu"]}, tensors)
                    value.load({key: tensors[full] for key, full in below.items()})
                case list():
                    series = checkpoint.series(tensors, name)
                    setattr(self, name, [x.to(self.device) for x in series])
                case int():
                    setattr(self, name, checkpoint.counter(counters, name))
                case float():
                    setattr(self, name, checkpoint.seconds(counters, name))

    def check_agreement(self, processes: Processes, texts: dict[str, str]) -> None:
        """Check that all processes have the same descriptions of the run and the same state.

        Args:
            processes: the processes. Each of them must call this.
            texts: descriptions of the run, such as its configuration, by name.

        Raises:
            ValueError: if they differ. The message names what differs.
        """
        if processes.count == 1:
            return
        # In two steps: statistics can only be averaged if their lengths agree.
        processes.check_agreement({**texts, "statistics": str(self.statistics.lengths()), **self.counters()})
        processes.check_agreement(self.dump()[0])

    def __repr__(self) -> str:
        shown = []
        for name, value in self.items():
            match value:
                case nn.Module():
                    shown.append(f"{name}={sum(p.numel() for p in value.parameters()):,} parameters")
                case int() | float():
                    shown.append(f"{name}={value:,}")
        return f"TrainState({', '.join(shown)})"


def read_checkpoint(path: Path, config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint, and check that it holds a model of this configuration.

    Done before such a model is built: an untrusted configuration may ask for more memory than the machine has.

    Raises:
        ValueError: the checkpoint is damaged, or holds another model.
    """
    tensors, counters = checkpoint.load_checkpoint(path)
    with torch.device("meta"):  # shapes alone
        expected = checkpoint.module_tensors("ema", SPIGAN(config.model))
    try:
        checkpoint.check_tensors(expected, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors, counters


def new_state(config: TrainConfig, processes: Processes) -> TrainState:
    """Return the state in which a run begins. Seeds torch's global generators."""
    device = processes.device
    torch.manual_seed(config.seed)
    model = SPIGAN(config.model).to(device).train()
    discriminator = Discriminator(
        config.model.resolution,
        config.model.img_channels,
        channel_base=config.model.channel_base,
        channel_max=config.model.channel_max,
        time_conditioning=config.tells_time,
        mbstd_group=_mbstd_group(config, processes),
    )
    discriminator = discriminator.to(device).train()
    # Convolutions are faster in this layout, most of all in bfloat16 on a CPU.
    for module in (model, discriminator):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    pl_interval = config.pl_interval if config.pl_weight else None
    r1_interval = config.r1_interval if config.r1_gamma else None
    return TrainState(
        model=model,
        ema=copy.deepcopy(model).eval().requires_grad_(False),
        discriminator=discriminator,
        augment=make_augment(config.augment, target=config.ada_target, kimg=config.ada_kimg).to(device),
        optimizer_g=adam(model.parameters(), config.lr_g, config.beta2, pl_interval),
        optimizer_d=adam(discriminator.parameters(), config.lr_d, config.beta2, r1_interval),
        pl_mean=torch.zeros((), device=device),
        statistics=Statistics(config, processes),
        rng=RandomState(device),
    )


def adam(parameters: Iterator[nn.Parameter], lr: float, beta2: float, interval: int | None) -> torch.optim.Adam:
    """Return Adam with betas (0, beta2).

    The betas and the learning rate are corrected for a lazy penalty that takes an extra step every `interval` steps
    (Karras et al. 2020b, appendix B, "lazy regularization"). `interval` is None if there is no penalty.
    """
    ratio = 1.0 if interval is None else interval / (interval + 1)
    return torch.optim.Adam(parameters, lr=lr * ratio, betas=(0.0, beta2**ratio), eps=1e-8, fused=True)


def images_at_a_time(config: TrainConfig, processes: Processes) -> int:
    """Return the number of images that a process computes at a time.

    Raises:
        ValueError: if the minibatch cannot be divided evenly.
    """
    share, rest = divmod(config.batch, processes.count * (config.batch_gpu or 1))
    if rest:
        raise ValueError(
            f"batch must be a multiple of the number of processes times batch_gpu, {processes.count} x "
            f"{config.batch_gpu or 1}, got {config.batch}"
        )
    at_a_time = config.batch_gpu or share
    if config.times == "split" and at_a_time % config.intervals:
        raise ValueError(
            f'times="split" needs a number of images at a time (batch_gpu, or else batch / processes) that intervals '
            f"divides, got {at_a_time} and {config.intervals}"
        )
    return at_a_time


def images_of_a_time(config: TrainConfig, processes: Processes) -> int:
    """Return the number of images of the same time t_k that a process computes at a time."""
    at_a_time = images_at_a_time(config, processes)
    return at_a_time // config.intervals if config.times == "split" else at_a_time


def _mbstd_group(config: TrainConfig, processes: Processes) -> int:
    """Return the largest group size up to `mbstd_group` that divides the number of images of a time.

    This way, all images of a group have the same time, even if `interleave` stacks several times.
    """
    at_a_time = images_of_a_time(config, processes)
    groups = range(min(config.mbstd_group, at_a_time), 0, -1)
    return next(group for group in groups if at_a_time % group == 0)
