"""Training: Algorithm 1 of the paper (section 3.5). Iterations alternate between discriminator and generator; each
draws a batch of clean images, noises them, and goes through the times t_1 < ... < t_K = 1 of the straight path."""

from __future__ import annotations

import copy
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spigan._version import __version__
from spigan.config import TrainConfig
from spigan.data import loader as image_loader
from spigan.data import open_dataset
from spigan.files import read_json, write_text
from spigan.images import display_scale, make_grid, save_png, to_uint8
from spigan.models import SPIGAN, Discriminator
from spigan.models.load import resolve_device
from spigan.ops import backends, path_interpolate, philox_normal
from spigan.runs import read_best, read_config, read_metrics
from spigan.sde import VPSDE
from spigan.training import checkpoint
from spigan.training.augment import ADA, make_augment
from spigan.training.faults import StopSignals, check_writable, divergence, last_checkpoint, writing
from spigan.training.losses import fake_loss, generator_loss, path_lengths, r1_penalty, real_loss
from spigan.training.measure import RunMetrics, keep_best
from spigan.training.processes import Processes
from spigan.training.run_folder import StatsLog, next_run_dir, unused

# Training noise is drawn from Philox streams above 2^32, so that no sample of a (small) seed repeats it.
_NOISE_STREAM = 2**32
_SLOW = 1.0  # seconds; with iterations as long as this, a copy of the state is kept in case a signal comes within one
_ADA_INTERVAL = 4  # discriminator iterations between changes of ADA's p (Karras et al. 2020a, section 3.1)


def adam(parameters: Iterator[nn.Parameter], lr: float, beta2: float, interval: int | None) -> torch.optim.Adam:
    """Adam with betas (0, beta2); betas and learning rate corrected for a penalty that takes a step of its own every
    `interval` steps (Karras et al. 2020b, appendix B, "lazy regularization")."""
    ratio = 1.0 if interval is None else interval / (interval + 1)
    return torch.optim.Adam(parameters, lr=lr * ratio, betas=(0.0, beta2**ratio), eps=1e-8, fused=True)


class Trainer:
    """Trains a SPIGAN and keeps a run folder.

    The folder holds config.json, data.json, stats.jsonl, TensorBoard events, reals.png, samples-NNNNNN.png (NNNNNN:
    kimg), checkpoints/ and model/, the averaged weights for `SPIGAN.from_pretrained`; with `config.metric_features`
    also metrics.jsonl and best/, the averaged weights with the lowest Frechet distance; after a divergence failed/.
    Construction seeds torch's global generator, which training draws from.

    Started by torchrun or accelerate launch, each process trains on its share of every minibatch: see
    `spigan.training.processes`. Every process calls the same methods; the main one alone prints and writes files.

    Args:
        config: what to train and how.
        run_dir: folder of the run, new or empty; default the next free runs/NNNNN.
        progress: show a progress bar.

    Attributes:
        processes: those that train together.
        model: generator side being trained.
        ema: average of its weights, which samples.
        discriminator: the discriminator.
        images_seen: images shown to the discriminator so far (each counts once, whatever K).
        interrupted: whether `fit` was stopped by a signal.
    """

    def __init__(self, config: TrainConfig, run_dir: str | Path | None = None, *, progress: bool = True) -> None:
        self.run_dir = next_run_dir() if run_dir is None else Path(run_dir)
        if not unused(self.run_dir):
            raise FileExistsError(
                f"{self.run_dir} exists and is not empty: choose another folder, or go on with it by "
                f"`spigan train --resume {self.run_dir}`"
            )
        check_writable(self.run_dir)
        self._build(config, progress)
        self._check_agreement()
        if self.processes.main:
            with writing(self.run_dir, f"the run's configuration in {self.run_dir}"):
                self.run_dir.mkdir(parents=True, exist_ok=True)
                write_text(self.run_dir / "data.json", json.dumps(self._data_record(), indent=2) + "\n")
                # Last: now it is a run.
                write_text(self.run_dir / "config.json", config.model_dump_json(indent=2) + "\n")

    @classmethod
    def resume(cls, run_dir: str | Path, *, total_kimg: float | None = None, progress: bool = True) -> Trainer:
        """Go on with a run from its newest checkpoint, exactly: on the CPU to the bit as if it had never stopped.

        A run that was killed before its first checkpoint begins again.

        Args:
            run_dir: folder of the run.
            total_kimg: new length of the run; default the configured one.
            progress: show a progress bar.

        Raises:
            FileNotFoundError: no run, or no checkpoint in it any more.
            OSError: the folder cannot be written.
            ValueError: a damaged or foreign checkpoint, or images that are not those the run began with.
        """
        run_dir = Path(run_dir)
        config = read_config(run_dir)
        if total_kimg is not None:
            config = TrainConfig.model_validate(config.model_dump() | {"total_kimg": total_kimg})
        check_writable(run_dir)
        newest = last_checkpoint(run_dir)
        if newest is None and (run_dir / "stats.jsonl").exists():  # which a run makes after its first checkpoint
            raise FileNotFoundError(
                f"{run_dir} holds no checkpoint to resume from: start the run again in a new folder"
            )
        saved = None if newest is None else (newest, *_read(newest, config))
        record = read_json(run_dir / "data.json")
        trainer = cls.__new__(cls)
        trainer.run_dir = run_dir
        trainer._build(config, progress)
        if trainer.processes.main:
            checkpoint.remove_scratch(run_dir)
        if record.get("fingerprint") != trainer.dataset.fingerprint:
            raise ValueError(
                f"the images of {config.data.source!r} are not those that {run_dir} was trained on (data.json there): "
                "an exact resume is not possible; restore them, or start a new run"
            )
        if saved is not None:
            trainer._load(*saved)
        trainer._check_agreement()
        if total_kimg is not None and trainer.processes.main:
            write_text(run_dir / "config.json", config.model_dump_json(indent=2) + "\n")
        return trainer

    def _build(self, config: TrainConfig, progress: bool) -> None:
        self.processes = Processes(resolve_device(config.device))
        self.config, self.progress, self.device = config, progress and self.processes.main, self.processes.device
        progress = self.progress
        share, rest = divmod(config.batch, self.processes.count * (config.batch_gpu or 1))
        if rest:
            raise ValueError(
                f"batch must be a multiple of the number of processes times batch_gpu, {self.processes.count} x "
                f"{config.batch_gpu or 1}, got {config.batch}"
            )
        self._at_a_time = config.batch_gpu or share
        self.dataset = open_dataset(
            config.data.model_copy(update={"resolution": config.model.resolution}), progress=progress
        )
        if self.dataset.channels != config.model.img_channels:
            raise ValueError(
                f"{config.data.source!r} has images of {self.dataset.channels} channel(s), the model makes "
                f"{config.model.img_channels}: set data.channels to convert them, or model.img_channels"
            )
        # A group that divides the images at a time: of one time then, also where `_interleave` stacks several.
        groups = range(min(config.mbstd_group, self._at_a_time), 0, -1)
        mbstd_group = next(group for group in groups if self._at_a_time % group == 0)
        for op in backends.operations():
            backends.choose(op, None, self.device)  # a backend that cannot run is told before anything is written
        self._metrics = (
            None if config.metric_features is None else RunMetrics(config, self.dataset, self.processes, progress)
        )
        torch.manual_seed(config.seed)
        self.model = SPIGAN(config.model).to(self.device).train()
        self.discriminator = (
            Discriminator(
                config.model.resolution,
                config.model.img_channels,
                channel_base=config.model.channel_base,
                channel_max=config.model.channel_max,
                # StyleGAN2's own mapping comes with StyleGAN2's own discriminator.
                time_conditioning=config.model.mapping == "ode",
                mbstd_group=mbstd_group,
            )
            .to(self.device)
            .train()
        )
        # Convolutions are faster in this layout, most of all in bfloat16 on a CPU (docs/training.md).
        for module in (self.model, self.discriminator):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.augment = make_augment(config.augment, target=config.ada_target, kimg=config.ada_kimg).to(self.device)
        self.optimizer_g = adam(
            self.model.parameters(), config.lr_g, config.beta2, config.pl_interval if config.pl_weight else None
        )
        self.optimizer_d = adam(
            self.discriminator.parameters(), config.lr_d, config.beta2, config.r1_interval if config.r1_gamma else None
        )
        self.sde = VPSDE(config.beta_min, config.beta_max)
        self.iteration = self.images_seen = self.images_drawn = self.noise_offset = 0
        self.pl_mean = torch.zeros((), device=self.device)
        self.interrupted = False
        self._statistics: dict[str, list[Tensor]] = {}
        self._unchecked: list[tuple[int, str, Tensor]] = []  # (iteration, name, value) not yet known to be finite
        self._saved: int | None = None  # iteration of the last checkpoint
        self._slowest = 0.0  # seconds of an iteration
        self._ada_signs: list[Tensor] = []
        self._elapsed = 0.0  # seconds of training in earlier sessions

    def _data_record(self) -> dict[str, Any]:
        flips = {"xflip": self.config.xflip, "fingerprint": self.dataset.fingerprint}
        return {**self.dataset.description, **flips}

    # ---- Algorithm 1 ----

    def train_iteration(self, images: Tensor) -> None:
        """One iteration of Algorithm 1: even ones update the discriminator, odd ones mapping network and generator.

        Args:
            images: uint8 [N, C, H, W] clean images, of several processes this one's rows of the minibatch.
        """
        images = images.to(self.device, non_blocking=True)
        rows = self.processes.rows()
        joint = rows.joint(len(images))
        flips = rows.own(torch.rand(joint, device=self.device) < 0.5) if self.config.xflip else None
        times = self._draw_times()
        seed, offset, noise = _NOISE_STREAM + self.config.seed, self.noise_offset, None
        if rows.processes > 1:  # the rows lie apart in the stream
            shape = (joint, *images.shape[1:])
            noise = rows.own(philox_normal(shape, seed=seed, offset=offset, device=self.device))
        x_T, i = path_interpolate(images, times, seed=seed, offset=offset, noise=noise, flips=flips, sde=self.sde)
        self.noise_offset += rows.joint(images.numel())
        # z is the noisy end of the same images' path; StyleGAN2's mapping has a z of its own shape.
        z = (
            x_T
            if self.config.model.mapping == "ode"
            else rows.own(torch.randn(joint, self.config.model.dim_h, device=self.device))
        )
        groups = [list(range(len(times)))] if self.config.updates == "joint" else [[k] for k in range(len(times))]
        # Lazy penalties are counted in iterations, not in steps: a count of steps would meet the same t_k every time
        # wherever K divides the interval, and with K = 2 no clean image would ever be regularised.
        round_ = self.iteration // 2
        if self.iteration % 2 == 0:
            with torch.no_grad():
                h = self.model.mapping(z, times)  # [K, N, D]; one incremental solve serves all K updates
            signs = []
            for group in groups:
                group_times = [times[k] for k in group]
                signs.append(self._discriminator_step(i[group], h[group], group_times))
                if self.config.r1_gamma and round_ % self.config.r1_interval == 0:
                    self._r1_step(i[group], group_times)
            self._adapt_augmentation(torch.stack(signs).mean(), joint)
            self.images_seen += joint
        else:
            for group in groups:
                group_times = [times[k] for k in group]
                # Solved anew for every update: the weights of the mapping network have changed since the last one.
                self._generator_step(z, group_times)
                if self.config.pl_weight and round_ % self.config.pl_interval == 0:
                    self._path_length_step(z, group_times)
            self._update_ema(joint)
        self.iteration += 1

    def _draw_times(self) -> list[float]:
        """t_1 < ... < t_K = 1: k / K, or K - 1 of them drawn from U(0, 1)."""
        k = self.config.intervals
        if self.config.fixed_t:
            return [(j + 1) / k for j in range(k)]
        while True:
            times = sorted({*torch.rand(k - 1, dtype=torch.float64).tolist(), 1.0})
            if len(times) == k and times[0] > 0.0:
                return times

    def _chunks(self, *tensors: Tensor, dim: int) -> Iterator[tuple[Tensor, ...]]:
        """Split a minibatch into pieces of `batch_gpu` images, whose gradients accumulate."""
        return zip(*(tensor.split(self._at_a_time, dim=dim) for tensor in tensors), strict=True)

    def _step(self, optimizer: torch.optim.Adam, name: str) -> None:
        """A step of an optimiser by the gradients of the joint minibatch, unless they or what led to them show that
        training has diverged."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.processes.average_gradients(parameters)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._record(**{f"grad_norm_{name}": nn.utils.get_total_norm(gradients)})
        if self.device.type == "cpu":  # a GPU would have to be waited for: there `_means` checks, once a tick
            self._check()
        optimizer.step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _generate(self, h: Tensor, times: list[float]) -> Tensor:
        """[n k, D] latents, or [n k, num_ws, D] -> [n k, C, H, W] images."""
        rows = self.processes.rows(len(times))
        noise = None
        if rows.processes > 1:
            noise = [rows.own(x) for x in self.model.generator.draw_noise(rows.joint(len(h)), self.device)]
        with self._autocast():
            return self.model.generator(h, noise)

    def _logits(self, images: Tensor, times: list[float]) -> Tensor:
        """[n k, C, H, W] images, real or generated, at k times each -> [n k] logits of their augmented versions."""
        if not isinstance(self.augment, nn.Identity):
            self.augment.rows = self.processes.rows(len(times))
        images = self.augment(images)
        with self._autocast():
            return self.discriminator(images, self._times_of(times, len(images) // len(times)))

    def _discriminator_step(self, real: Tensor, h: Tensor, times: list[float]) -> Tensor:
        """Update the discriminator on real [k, N, C, H, W] = i(t) and latents h [k, N, D] of k times.

        Returns:
            Mean sign of the real images' logits.
        """
        self.discriminator.requires_grad_(True)
        self.optimizer_d.zero_grad(set_to_none=True)
        signs = []
        for real_part, h_part in self._chunks(real, h, dim=1):
            share = real_part.shape[1] / real.shape[1]
            images = _interleave(real_part)
            with torch.no_grad():
                generated = self._generate(_interleave(h_part), times)
            fake = self._logits(generated, times)
            loss_fake = fake_loss(fake)
            (loss_fake * share).backward()
            logits = self._logits(images, times)
            loss_real = real_loss(logits)
            (loss_real * share).backward()
            signs.append(logits.detach().sign().mean() * share)
            self._record(loss_d=loss_fake + loss_real, real_logit=logits.mean(), fake_logit=fake.mean())
        self._step(self.optimizer_d, "d")
        return torch.stack(signs).sum()

    def _adapt_augmentation(self, sign: Tensor, images: int) -> None:
        """Every few iterations, move ADA's p by the mean sign of D(real) over the images seen since."""
        self._record(real_sign=sign)
        if not isinstance(self.augment, ADA):
            return
        self._ada_signs.append(self.processes.mean(sign))
        if len(self._ada_signs) == _ADA_INTERVAL:
            mean = torch.stack(self._ada_signs).mean().clamp(-1.0, 1.0)  # rounding may exceed 1 by a bit
            self.augment.adapt(mean.item(), _ADA_INTERVAL * images)
            self._ada_signs.clear()

    def _r1_step(self, real: Tensor, times: list[float]) -> None:
        """Lazy R1: the penalty alone, weighted by the number of steps it stands for."""
        self.optimizer_d.zero_grad(set_to_none=True)
        weight = 0.5 * self.config.r1_gamma * self.config.r1_interval
        for (part,) in self._chunks(real, dim=1):
            images = _interleave(part).detach().requires_grad_(True)
            penalty = r1_penalty(self._logits(images, times), images)
            (penalty * (weight * part.shape[1] / real.shape[1])).backward()
            self._record(r1=penalty)
        self._step(self.optimizer_d, "r1")

    def _generator_step(self, z: Tensor, times: list[float]) -> None:
        """Update mapping network and generator at the given times."""
        self.discriminator.requires_grad_(False)
        self.optimizer_g.zero_grad(set_to_none=True)
        for (part,) in self._chunks(z, dim=0):
            generated = self._generate(_interleave(self.model.mapping(part, times)), times)
            loss = generator_loss(self._logits(generated, times))
            (loss * (len(part) / len(z))).backward()
            self._record(loss_g=loss)
        self._step(self.optimizer_g, "g")

    def _path_length_step(self, z: Tensor, times: list[float]) -> None:
        """Lazy path-length regularisation: penalise the distance of path lengths from their running mean."""
        self.optimizer_g.zero_grad(set_to_none=True)
        z = z[: max(1, len(z) // self.config.pl_batch_shrink)]
        weight = self.config.pl_weight * self.config.pl_interval
        for (part,) in self._chunks(z, dim=0):
            h = _interleave(self.model.mapping(part, times))
            h = h[:, None].expand(-1, self.model.generator.num_ws, -1)  # a latent for each layer, as in StyleGAN2
            lengths = path_lengths(self._generate(h, times), h, self.processes.rows(len(times)))
            with torch.no_grad():
                self.pl_mean.lerp_(self.processes.mean(lengths.mean()), self.config.pl_decay)
            penalty = (lengths - self.pl_mean).square().mean()
            (penalty * (weight * len(part) / len(z))).backward()
            self._record(path_length=lengths.mean(), path_length_penalty=penalty)
        self._step(self.optimizer_g, "pl")

    def _times_of(self, times: list[float], n: int) -> Tensor:
        """[n k] times of n images at k times each, in the order of `_interleave`."""
        return torch.tensor(times, device=self.device).repeat(n)

    @torch.no_grad()
    def _update_ema(self, images: int) -> None:
        """Move the averaged weights so that old ones have a half-life of `ema_kimg`."""
        half_life = self.config.ema_kimg * 1000
        if self.config.ema_rampup is not None:
            half_life = min(half_life, self.images_seen * self.config.ema_rampup)
        weight = 1.0 - 0.5 ** (images / max(half_life, 1e-8))
        for average, current in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(current, weight)
        for kept, newest in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            kept.copy_(newest)

    # ---- Running ----

    def fit(self) -> SPIGAN:
        """Train until `total_kimg` images have been seen, or Ctrl-C or SIGTERM, which save a checkpoint first.

        Returns:
            The averaged model, in eval mode.

        Raises:
            FloatingPointError: training has diverged; says where, and what to change.
            OSError: the disk is full, or the like; says what is safe.
        """
        total = math.ceil(self.config.total_kimg * 1000)
        batches = image_loader(
            self.dataset,
            batch_size=self.config.batch,
            seed=self.config.seed,
            start=self.images_drawn,
            part=slice(self.processes.rank, None, self.processes.count),
        )
        if self.iteration == 0:
            if self.processes.main:
                with writing(self.run_dir, f"pictures in {self.run_dir}"):
                    self._save_reals()
            self._snapshot()
        log = None
        if self.processes.main:
            with writing(self.run_dir, f"statistics in {self.run_dir}"):
                log = StatsLog(self.run_dir, self.iteration)
        bar = tqdm(total=total, initial=self.images_seen, unit="img", disable=not self.progress, dynamic_ncols=True)
        with bar, StopSignals() as stop:
            self._measure(log, stop)  # what a stop has left undone
            began = time.perf_counter() - self._elapsed
            tick_began, tick_seen = time.perf_counter(), self.images_seen
            # The last generator iteration belongs to the last images seen.
            while (self.images_seen < total or self.iteration % 2) and not self.processes.any(stop.is_set()):
                iteration_began, before = time.perf_counter(), self.images_seen
                self._elapsed = iteration_began - began
                with stop.backed(self._copy_if_slow()):
                    images = next(batches)
                    self.images_drawn += self.config.batch
                    self.train_iteration(images)
                bar.update(self.images_seen - before)
                now = time.perf_counter()
                self._slowest = max(self._slowest, now - iteration_began)
                if (tick := self._tick()) is None:
                    continue
                self._elapsed = now - began
                row = self._tick_row((self.images_seen - tick_seen) / (now - tick_began))
                if log is not None:
                    with writing(self.run_dir, f"statistics in {self.run_dir}"):
                        log.write(row)
                bar.set_postfix(D=f"{row['loss_d']:.3f}", G=f"{row['loss_g']:.3f}")
                tick_began, tick_seen = now, self.images_seen
                # Before the checkpoint, so that one that exists has its metrics: a resumed run measures none again.
                best = self._measure(log, stop)
                began += time.perf_counter() - now  # "seconds" are of training
                tick_began = time.perf_counter()
                if (best or tick % self.config.snapshot_ticks == 0) and self.images_seen < total:
                    self._snapshot(stop)
            self._elapsed = time.perf_counter() - began
            self.interrupted = self.processes.any(stop.is_set())
            self._snapshot(stop)
            if log is not None:
                log.close()
            if self.interrupted and self.processes.main:
                tqdm.write(f"Stopped and saved at {self.images_seen / 1000:.1f} kimg. Go on with:")
                tqdm.write(f"  spigan train --resume {self.run_dir}")
            # Until the files are there: a launcher ends all when the first has ended.
            self.processes.wait()
        return self.ema

    def _tick(self) -> int | None:
        """Number of the tick that the last iteration has ended, None where it has not.

        A tick ends with a generator iteration, so that both losses have been measured.
        """
        images = self.config.tick_kimg * 1000
        tick, before = (int(seen // images) for seen in (self.images_seen, self.images_seen - self.config.batch))
        return tick if self.iteration and self.iteration % 2 == 0 and tick != before else None

    def _copy_if_slow(self) -> Callable[[], None] | None:
        """A function that saves the state as it is now; None where it is saved, or iterations are soon over, or several
        processes train: a copy would cost them a message every iteration."""
        if self._slowest < _SLOW or self._saved == self.iteration or self.processes.count > 1:
            return None
        self._check()
        tensors, counters = self._state()
        return partial(self._save, {name: tensor.detach().clone() for name, tensor in tensors.items()}, counters)

    def _measure(self, log: StatsLog | None, stop: StopSignals) -> bool:
        """Metrics of the averaged model where they are due and not in the log; keeps it where it is the best so far.

        Returns:
            Whether it is the best, so that its checkpoint has to be kept too.
        """
        tick = self._tick()
        if self._metrics is None or tick is None or tick % self.config.metric_ticks:
            return False
        known = self.processes.main and any(
            row["iteration"] == self.iteration for row in read_metrics(self.run_dir)[-1:]
        )
        if self.processes.any(known):
            return False
        state = self._state()  # does not change meanwhile, but for the random one, of which this is a copy
        measure = partial(self._metrics.measure, self.ema)
        with stop.backed(partial(self._save, *state)):
            # Of several processes none may leave the others alone.
            values = measure() if self.processes.count > 1 else stop.attempt(measure)
        if values is None:  # abandoned anywhere, perhaps while the random state was being put back
            with writing(self.run_dir, f"the checkpoint of iteration {self.iteration} in {self.run_dir}"):
                self._save(*state)
            return False
        return self.processes.any(log is not None and self._keep_metrics(values, log))

    def _keep_metrics(self, values: dict[str, float], log: StatsLog) -> bool:
        """Log metrics of now; keep the averaged model where it is the best so far, which is returned."""
        assert self._metrics is not None
        row = {
            "iteration": self.iteration,
            "kimg": self.images_seen / 1000,
            "seconds": round(self._elapsed, 3),
            **values,
        }
        with writing(self.run_dir, f"metrics in {self.run_dir}"):
            # The row last: where it is missing, a resumed run does all of this again.
            better = keep_best(self.run_dir, self.ema, row, self._metrics.distance)
            log.write_metrics(row)
        if self.progress:
            distance = f"{self._metrics.distance} {values[self._metrics.distance]:.4g}"
            tqdm.write(f"{self.images_seen / 1000:.1f} kimg: {distance}{', the best so far' if better else ''}")
        best = read_best(self.run_dir)  # of this iteration also where an attempt that was killed has kept it
        return best is not None and best["iteration"] == self.iteration

    def _record(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._statistics.setdefault(name, []).append(value.detach().double())
            self._unchecked.append((self.iteration, name, self._statistics[name][-1]))

    def _tick_row(self, images_per_sec: float) -> dict[str, float]:
        """Means since the last tick; starts the next."""
        means = self._means()
        self._statistics.clear()
        return {
            "iteration": self.iteration,
            "kimg": self.images_seen / 1000,
            "seconds": round(self._elapsed, 3),
            "images_per_sec": round(images_per_sec, 3),
            **({"augment_p": float(self.augment.p)} if isinstance(self.augment, ADA) else {}),
            **means,
        }

    def _means(self) -> dict[str, float]:
        """Means since the last tick.

        Raises:
            FloatingPointError: training has diverged.
        """
        self._check()
        for name, module in self._modules().items():
            if not all(parameter.isfinite().all() for parameter in module.parameters()):
                self._diverged(f"weights of {name}", None, self.iteration)
        return {
            name: self.processes.mean(torch.stack(values).mean()).item() for name, values in self._statistics.items()
        }

    def _check(self) -> None:
        """Raises FloatingPointError where something recorded is not finite or a gradient's norm beyond the limit."""
        values = torch.stack([value for *_, value in self._unchecked]).tolist() if self._unchecked else []
        for (iteration, name, _), value in zip(self._unchecked, values, strict=True):
            limit = self.config.grad_norm_limit if name.startswith("grad_norm_") else None
            if not math.isfinite(value):
                self._diverged(name, value, iteration)
            if limit is not None and value > limit:
                self._diverged(name, value, iteration, limit)
        self._unchecked.clear()

    def _diverged(self, what: str, value: float | None, iteration: int, limit: float | None = None) -> NoReturn:
        """Save the state with the gradients to failed/, apart from the checkpoints, and raise FloatingPointError."""
        kimg = (iteration + 1) // 2 * self.config.batch / 1000
        text = divergence(what, value, iteration, kimg, limit, self.config.precision == "bf16")
        failed, good = self.run_dir / "failed", last_checkpoint(self.run_dir)
        if not self.processes.main:  # gradients are joint, so the main process comes here too
            raise FloatingPointError(text)
        try:
            tensors, counters = self._state(joint=False)
            for name, module in self._modules().items():
                gradients = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
                tensors.update({f"grad.{name}.{key}": gradient for key, gradient in gradients.items()})
            checkpoint.save_checkpoint(failed / f"state-{self.iteration:08d}.safetensors", tensors, counters)
            write_text(failed / "error.txt", f"{text}\n")
            saved = f"the state of now, with gradients, is in {failed}"
        except OSError as error:  # the divergence is what matters
            saved = f"the state of now could not be saved ({error})"
        raise FloatingPointError(
            f"{text}, in {self.run_dir / 'config.json'}, and go on from the last good checkpoint, {good}, by "
            f"`spigan train --resume {self.run_dir}`; unchanged, it would diverge again. {saved[0].upper()}{saved[1:]}"
        )

    def _snapshot(self, stop: StopSignals | None = None) -> None:
        """Exported model, grid of samples, checkpoint; the last, which makes a resumed run go on from here, when all
        else is complete. After a signal the checkpoint is first, and there is no grid, which may take long.

        Raises:
            FloatingPointError: training has diverged; good checkpoints are not replaced.
            OSError: the disk is full, or the like.
        """
        self._means()
        self._check_agreement()
        state = self._state()
        if not self.processes.main:
            return
        with writing(self.run_dir, f"the checkpoint of iteration {self.iteration} in {self.run_dir}"):
            if stop is not None and stop.is_set():
                self._save(*state)
            self.ema.save_pretrained(self.run_dir / "model")
            grid = self.sample_grid() if stop is None else stop.attempt(self.sample_grid)
            if grid is not None:
                save_png(grid, self.run_dir / f"samples-{self.images_seen // 1000:06d}.png")
            self._save(*state)
            best = read_best(self.run_dir)
            kept = best and checkpoint.checkpoint_path(self.run_dir, int(best["iteration"]))
            for old in checkpoint.checkpoints(self.run_dir)[: -self.config.keep_checkpoints]:
                if old != kept:
                    old.unlink()

    def _save(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Write a checkpoint in the main process, unless there is one of that iteration."""
        if self.processes.main and self._saved != counters["iteration"]:
            checkpoint.save_checkpoint(
                checkpoint.checkpoint_path(self.run_dir, counters["iteration"]), tensors, counters
            )
            self._saved = counters["iteration"]

    @torch.no_grad()
    def sample_grid(self) -> Tensor:
        """uint8 [C, H, W] grid of the averaged model's images of seeds 0, 1, ..., enlarged to be seen."""
        resolution = self.config.model.resolution
        side = 8 if resolution <= 64 else 4
        seeds = torch.arange(side * side, device=self.device)
        z = philox_normal((len(seeds), *self.config.model.z_shape), seed=seeds)
        images = torch.cat([to_uint8(self.ema(part)) for part in z.split(self.config.batch_gpu or self.config.batch)])
        return make_grid(images, columns=side, scale=display_scale(resolution)).cpu()

    def _save_reals(self) -> None:
        side = 8 if self.config.model.resolution <= 64 else 4
        step = max(1, len(self.dataset) // (side * side))
        images = torch.stack([self.dataset[i] for i in range(0, len(self.dataset), step)][: side * side])
        scale = display_scale(self.config.model.resolution)
        save_png(make_grid(images, columns=side, scale=scale), self.run_dir / "reals.png")

    # ---- State ----

    _COUNTERS = ("iteration", "images_seen", "images_drawn", "noise_offset")

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "ema": self.ema, "discriminator": self.discriminator, "augment": self.augment}

    def _state(self, joint: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that training depends on: tensors, and counters.

        Args:
            joint: with the statistics of all processes, each of which must call this then; otherwise this one's alone.
        """
        tensors = {"pl_mean": self.pl_mean, "rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, module in self._modules().items():
            tensors.update(checkpoint.module_tensors(name, module))
        tensors.update(checkpoint.optimizer_tensors("optimizer_g", self.optimizer_g))
        tensors.update(checkpoint.optimizer_tensors("optimizer_d", self.optimizer_d))
        own = {name: torch.stack(values) for name, values in self._statistics.items()}
        statistics = {name: self.processes.mean(values) for name, values in own.items()} if joint else own
        tensors.update({f"statistics.{name}": values for name, values in statistics.items()})
        if self._ada_signs:
            tensors["ada_signs"] = torch.stack(self._ada_signs)
        counters: dict[str, Any] = {name: getattr(self, name) for name in self._COUNTERS}
        return tensors, {**counters, "elapsed": self._elapsed}

    def _check_agreement(self) -> None:
        """See that all processes do the same run and are in the same state; ValueError otherwise."""
        if self.processes.count == 1:
            return
        texts = {
            "configuration": self.config.model_dump_json(),
            "run folder": str(self.run_dir),
            "images": self.dataset.fingerprint,
            "versions of spigan and torch": f"{__version__} {torch.__version__}",
            "statistics": str({name: len(values) for name, values in self._statistics.items()}),
        }
        facts = {name: zlib.crc32(text.encode()) for name, text in texts.items()}
        self.processes.check_agreement(facts | {name: getattr(self, name) for name in self._COUNTERS})
        self.processes.check_agreement(self._state()[0])

    def _load(self, path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        try:
            for name, module in self._modules().items():
                checkpoint.load_module(name, module, tensors)
            checkpoint.load_optimizer("optimizer_g", self.optimizer_g, tensors)
            checkpoint.load_optimizer("optimizer_d", self.optimizer_d, tensors)
            for name in self._COUNTERS:
                setattr(self, name, checkpoint.counter(state, name))
            self._elapsed = checkpoint.seconds(state, "elapsed")
            self._saved = self.iteration
            checkpoint.check_tensors({"pl_mean": self.pl_mean, "rng.cpu": torch.get_rng_state()}, tensors)
            self.pl_mean.copy_(tensors["pl_mean"])
            self._ada_signs = [sign.to(self.device) for sign in checkpoint.series(tensors, "ada_signs")]
            for key in tensors:
                if key.startswith("statistics.") and (values := checkpoint.series(tensors, key)):
                    self._statistics[key.removeprefix("statistics.")] = [value.to(self.device) for value in values]
            torch.set_rng_state(tensors["rng.cpu"])
            if self.device.type == "cuda" and "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}: it is not a checkpoint of this run") from error
        except (ValueError, RuntimeError) as error:  # RuntimeError: what no random state is
            raise ValueError(f"{path}: {error}") from error


def _read(path: Path, config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds, if a model of this configuration is in it.

    Before such a model is built: a configuration that lies may ask for more memory than there is.
    """
    tensors, state = checkpoint.load_checkpoint(path)
    with torch.device("meta"):  # shapes alone
        expected = checkpoint.module_tensors("ema", SPIGAN(config.model))
    try:
        checkpoint.check_tensors(expected, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors, state


def _interleave(x: Tensor) -> Tensor:
    """[k, N, ...] -> [N k, ...], the k times of an image side by side.

    In this order the groups of the minibatch standard deviation, which are strided, hold images of one time.
    """
    return x.transpose(0, 1).flatten(0, 1)
