"""The trainer, which starts or resumes a run and trains until the run ends."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spigan._version import __version__
from spigan.config import TrainConfig
from spigan.data import loader as image_loader
from spigan.data.dataset import data_record, open_for_model
from spigan.files import read_json, write_text
from spigan.models import SPIGAN, Discriminator
from spigan.models.load import resolve_device
from spigan.ops import backends
from spigan.runs import CONFIG_FILE, DATA_FILE, STATS_FILE, locate, read_config
from spigan.training.algorithm1 import Algorithm1
from spigan.training.augment import ADA
from spigan.training.checkpoint import newest_checkpoint, remove_scratch
from spigan.training.measure import RunMetrics
from spigan.training.pace import Pace
from spigan.training.precision import resolve_precision
from spigan.training.processes import Processes
from spigan.training.run_folder import check_writable, next_run_dir, unused, writing
from spigan.training.signals import StopSignals
from spigan.training.snapshots import Snapshots
from spigan.training.state import images_at_a_time, new_state, read_checkpoint
from spigan.training.statistics import Clock, StatsLog


class Trainer:
    """Trains a SPIGAN and writes a run folder.

    The folder holds config.json, data.json, stats.jsonl, TensorBoard events, reals.png, samples-NNNNNN.png (NNNNNN:
    kimg), checkpoints/ and model/, the averaged weights for `SPIGAN.from_pretrained`. If `config.metric_features` is
    set, it also holds metrics.jsonl and best/, the averaged weights with the lowest Frechet distance. If training
    diverges, it also holds failed/. The constructor seeds torch's global random generators, which training uses.

    If torchrun or accelerate launch started several processes, each of them trains on its share of every minibatch; see
    `spigan.training.processes`. Every process calls the same methods. Only the main process prints and writes files.

    Args:
        config: what to train and how.
        run_dir: folder of the run, new or empty. Default: the next free runs/NNNNN.
        progress: whether to show a progress bar.

    Raises:
        FileExistsError: if the folder is in use.
        OSError: if the folder cannot be written.
        ValueError: if the configuration, the images and the processes do not fit together.

    Attributes:
        config: the configuration, with the precision that was chosen if it was "auto".
        processes: the processes that train together.
        state: everything that training depends on, a `spigan.training.state.TrainState`.
        model: the model (mapping network and generator) that is being trained.
        ema: the average of its weights, from which samples are drawn.
        discriminator: the discriminator.
        iteration: iterations so far, of both kinds.
        images_seen: images shown to the discriminator so far. Each counts once, whatever K is.
        interrupted: whether a signal stopped `fit`.
        metrics: measures the averaged model. None unless `config.metric_features` is set.
    """

    def __init__(self, config: TrainConfig, run_dir: str | Path | None = None, *, progress: bool = True) -> None:
        self.run_dir = next_run_dir() if run_dir is None else Path(run_dir)
        if not unused(self.run_dir):
            raise FileExistsError(
                f"{self.run_dir} exists and is not empty: choose another folder, or resume its run with "
                f"`spigan train --resume {self.run_dir}`"
            )
        check_writable(self.run_dir)
        self._build(config, progress)
        self._check_agreement()
        if self.processes.main:
            with writing(self.run_dir, f"the run's configuration in {self.run_dir}"):
                self.run_dir.mkdir(parents=True, exist_ok=True)
                write_text(self.run_dir / DATA_FILE, json.dumps(self._data_record(), indent=2) + "\n")
                # Last: this file makes the folder a run.
                write_text(self.run_dir / CONFIG_FILE, self.config.model_dump_json(indent=2) + "\n")

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        *,
        total_kimg: float | None = None,
        total_seconds: float | None = None,
        data: str | Path | None = None,
        progress: bool = True,
    ) -> Trainer:
        """Resume a run exactly from its newest checkpoint. On a CPU the result is bit for bit that of an unbroken run.

        A run that was killed before its first checkpoint starts from the beginning.

        Args:
            run_dir: folder of the run.
            total_kimg: new length of the run. Default: the configured length.
            total_seconds: new limit of the training time. Default: the configured limit.
            data: where the run's images are now, if they have moved. They must be the same images.
            progress: whether to show a progress bar.

        Raises:
            FileNotFoundError: if there is no run in the folder, or its checkpoints or its images are gone.
            OSError: if the folder cannot be written.
            ValueError: if the checkpoint is damaged or belongs to another run, or if the images have changed since the
                run began.
        """
        run_dir = Path(run_dir)
        config = read_config(run_dir)
        given = {"total_kimg": total_kimg, "total_seconds": total_seconds}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if data is not None:
            changes["data"] = config.data.model_dump() | {"source": str(data)}
        if changes:
            config = TrainConfig.model_validate(config.model_dump() | changes)
        check_writable(run_dir)
        newest = newest_checkpoint(run_dir)
        if newest is None and (run_dir / STATS_FILE).exists():  # made after the first checkpoint
            raise FileNotFoundError(
                f"{run_dir} holds no checkpoint to resume from: start the run again in a new folder"
            )
        saved = None if newest is None else (newest, *read_checkpoint(newest, config))
        record = read_json(run_dir / DATA_FILE)
        trainer = cls.__new__(cls)
        trainer.run_dir = run_dir
        try:
            trainer._build(config, progress, record)
        except FileNotFoundError as error:
            if not str(error).startswith("source "):  # a feature network is missing, for example
                raise
            raise FileNotFoundError(
                f"data.source in {run_dir / CONFIG_FILE}: {error}. If the images have moved, add --data PATH "
                "(Trainer.resume: data=PATH)"
            ) from error
        if trainer.processes.main:
            remove_scratch(run_dir)
        if saved is not None:
            trainer.snapshots.load(*saved)
        trainer._check_agreement()
        if data is not None and trainer.processes.main:
            record |= {name: value for name, value in trainer._data_record().items() if name in ("source", "path")}
            write_text(run_dir / DATA_FILE, json.dumps(record, indent=2) + "\n")
        if changes and trainer.processes.main:
            write_text(run_dir / CONFIG_FILE, trainer.config.model_dump_json(indent=2) + "\n")
        return trainer

    def _build(self, config: TrainConfig, progress: bool, record: dict[str, Any] | None = None) -> None:
        self.processes = Processes(resolve_device(config.device))
        self.device = self.processes.device
        self.config = config = resolve_precision(config, self.device)
        self.progress = progress and self.processes.main
        self.interrupted = False
        if config.total_seconds is not None and self.processes.count > 1:
            raise ValueError(
                f"total_seconds={config.total_seconds:g} cannot end a run of {self.processes.count} processes, whose "
                "clocks differ: use total_kimg"
            )
        images_at_a_time(config, self.processes)  # raises before anything takes long
        self.dataset = open_for_model(
            locate(config.data, record or {}),
            config.model.resolution,
            config.model.img_channels,
            progress=self.progress,
            record=record,
        )
        for op in backends.operations():
            backends.choose(op, None, self.device)  # before anything is written: raises if a backend cannot run
        self.metrics: RunMetrics | None = None
        if config.metric_features is not None:
            self.metrics = RunMetrics(config, self.dataset, self.processes, self.progress)
        self.state = new_state(config, self.processes)
        self.algorithm = Algorithm1(config, self.state, self.processes)
        self.snapshots = Snapshots(self.run_dir, config, self.state, self.processes)

    def _data_record(self) -> dict[str, Any]:
        return {**data_record(self.dataset, self.config.data), "xflip": self.config.xflip}

    @property
    def model(self) -> SPIGAN:
        """The model (mapping network and generator) that is being trained."""
        return self.state.model

    @property
    def ema(self) -> SPIGAN:
        """The model with averaged weights."""
        return self.state.ema

    @property
    def discriminator(self) -> Discriminator:
        """The discriminator."""
        return self.state.discriminator

    @property
    def iteration(self) -> int:
        """Iterations so far, of both kinds."""
        return self.state.iteration

    @property
    def images_seen(self) -> int:
        """Images shown to the discriminator so far."""
        return self.state.images_seen

    def train_iteration(self, images: Tensor) -> None:
        """Run one iteration of Algorithm 1.

        Even iterations update the discriminator, odd ones the mapping network and the generator.

        Args:
            images: uint8 [N, C, H, W] clean images; with several processes, this process's rows of the minibatch.

        Raises:
            FloatingPointError: if training has diverged. The message states where, and what to change.
        """
        with self.snapshots.diagnosing():
            self.algorithm.iteration(images)

    def fit(self) -> SPIGAN:
        """Train until `total_kimg` thousand images have been seen. Ctrl-C and SIGTERM end it after saving a checkpoint.

        With `total_seconds`, training ends at the first generator iteration after that time, if that comes first.

        Returns:
            The averaged model, in eval mode.

        Raises:
            FloatingPointError: if training has diverged. The message states where, and what to change.
            OSError: if a file cannot be written, for example because the disk is full. The message states what is safe.
        """
        state, total = self.state, math.ceil(self.config.total_kimg * 1000)
        batches = image_loader(
            self.dataset,
            batch_size=self.config.batch,
            seed=self.config.seed,
            start=state.images_drawn,
            part=slice(self.processes.rank, None, self.processes.count),
        )
        if state.iteration == 0:
            self.snapshots.write_reals(self.dataset)
            self.snapshot()
        stats_log: AbstractContextManager[StatsLog | None] = nullcontext()
        if self.processes.main:
            stats_log = StatsLog(self.run_dir, state.iteration)
        bar = tqdm(total=total, initial=state.images_seen, unit="img", disable=not self.progress, dynamic_ncols=True)
        # `train_iteration` and `snapshot` diagnose their own; a row of statistics or a backup may find divergence too.
        with stats_log as log, bar, StopSignals() as stop, self.snapshots.diagnosing():
            self._measure(log, stop)  # if a signal ended it in an earlier session
            clock, pace = Clock(state.elapsed, state.images_seen, self._clock()), Pace(self.device)
            # The last images seen still get their generator iteration.
            while (
                (state.images_seen < total and not self._time_is_up()) or state.iteration % 2
            ) and not self.processes.any(stop.is_set()):
                state.elapsed = clock.seconds()
                with stop.iteration(self.snapshots.backup):
                    images = next(batches)
                    state.images_drawn += self.config.batch
                    self.train_iteration(images)
                    pace.step()
                bar.update(state.images_seen - bar.n)
                if (tick := self._tick()) is None:
                    continue
                state.elapsed = clock.seconds()
                row = self._row(clock.tick(state.images_seen))
                if log is not None:
                    log.write(row)
                bar.set_postfix(D=f"{row['loss_d']:.3f}", G=f"{row['loss_g']:.3f}")
                with clock.paused():
                    # Measure before saving: an existing checkpoint then has its metrics, and a resumed run does not
                    # repeat them.
                    best = self._measure(log, stop)
                if (best or tick % self.config.snapshot_ticks == 0) and state.images_seen < total:
                    self.snapshot(stop)
            state.elapsed = clock.seconds()
            if self._time_is_up() and self.metrics is not None and not stop.is_set():
                self.metrics.update(self.snapshots, log, stop)  # seldom the end of a tick, but runs are compared by it
            self._finish(stop)
        return self.ema

    def _clock(self) -> Callable[[], float]:
        by_cpu = self.config.total_seconds is not None and self.device.type == "cpu"
        return time.process_time if by_cpu else time.perf_counter

    def _time_is_up(self) -> bool:
        return self.config.total_seconds is not None and self.state.elapsed >= self.config.total_seconds

    def _finish(self, stop: StopSignals) -> None:
        """Save the end of a session."""
        self.interrupted = self.processes.any(stop.is_set())
        self.snapshot(stop)
        if self.interrupted and self.processes.main:
            tqdm.write(f"Stopped and saved at {self.images_seen / 1000:.1f} kimg. Resume with:")
            tqdm.write(f"  spigan train --resume {self.run_dir}")
        # Until the files are written: a launcher ends all processes once the first has ended.
        self.processes.wait()

    def _tick(self) -> int | None:
        """Return the number of the tick that the last iteration completed, or None if it did not complete one.

        A tick ends with a generator iteration, so that both losses have been recorded.
        """
        images, seen = self.config.tick_kimg * 1000, self.images_seen
        tick, before = (int(count // images) for count in (seen, seen - self.config.batch))
        return tick if self.iteration and self.iteration % 2 == 0 and tick != before else None

    def _row(self, images_per_sec: float) -> dict[str, Any]:
        """Return a row of statistics, with means since the last row."""
        state = self.state
        state.statistics.check_weights(state.modules(), state.iteration)
        return {
            "iteration": state.iteration,
            "kimg": state.images_seen / 1000,
            "seconds": round(state.elapsed, 3),
            "images_per_sec": round(images_per_sec, 3),
            **({"augment_p": float(state.augment.p)} if isinstance(state.augment, ADA) else {}),
            **state.statistics.take_means(),
        }

    def _measure(self, log: StatsLog | None, stop: StopSignals) -> bool:
        """Measure the averaged model if metrics are due. Return whether it is the best model so far."""
        tick = self._tick()
        if self.metrics is None or tick is None or tick % self.config.metric_ticks:
            return False
        return self.metrics.update(self.snapshots, log, stop)

    def snapshot(self, stop: StopSignals | None = None) -> None:
        """Save the exported model, a grid of samples and a checkpoint. Every process must call this.

        Args:
            stop: signals. After a signal, the checkpoint is saved first, and the grid is left out.

        Raises:
            FloatingPointError: if training has diverged. Good checkpoints are not replaced.
            OSError: if a file cannot be written, for example because the disk is full. The message states what is safe.
        """
        with self.snapshots.diagnosing():
            self.state.statistics.check_weights(self.state.modules(), self.iteration)
        self._check_agreement()
        self.snapshots.take(stop)

    def sample_grid(self) -> Tensor:
        """Return an enlarged uint8 [C, H, W] grid of the averaged model's images for seeds 0, 1, ..."""
        return self.snapshots.sample_grid()

    def _check_agreement(self) -> None:
        """Raise ValueError unless all processes train the same run and are in the same state."""
        texts = {
            "configuration": self.config.model_dump_json(),
            "run folder": str(self.run_dir),
            "images": self.dataset.fingerprint,
            "versions of spigan and torch": f"{__version__} {torch.__version__}",
        }
        self.state.check_agreement(self.processes, texts)
