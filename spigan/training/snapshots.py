"""Snapshots of a run: checkpoints, the exported model, pictures, and the state after a divergence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spigan.config import TrainConfig
from spigan.data import ImageDataset
from spigan.files import write_text
from spigan.images import display_scale, grid_side, make_grid, save_png
from spigan.models import SPIGAN
from spigan.models.grid import sample_grid
from spigan.runs import read_best
from spigan.training import checkpoint
from spigan.training.processes import Processes
from spigan.training.run_folder import writing
from spigan.training.signals import StopSignals
from spigan.training.state import TrainState
from spigan.training.statistics import Diverged


def read_checkpoint(path: Path, config: TrainConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint, and check that its model fits the configuration.

    The check comes before the model is built, because an untrusted configuration may ask for more memory than the
    machine has.

    Raises:
        ValueError: if the checkpoint is damaged, or its model does not fit the configuration.
    """
    tensors, counters = checkpoint.load_checkpoint(path)
    with torch.device("meta"):  # shapes only
        expected = checkpoint.module_tensors("ema", SPIGAN(config.model))
    try:
        checkpoint.check_tensors(expected, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors, counters


class Snapshots:
    """Saves and loads the state of a run. Only the main process writes.

    Args:
        run_dir: the run's folder.
        config: configuration of the run.
        state: the state to save and load.
        processes: the processes that train together.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, state: TrainState, processes: Processes) -> None:
        self.run_dir, self.config, self.state, self.processes = run_dir, config, state, processes
        self._saved: int | None = None  # iteration of the last checkpoint

    def load(self, path: Path, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Load the content of a checkpoint into the state.

        Raises:
            ValueError: if something is missing from the checkpoint, or a value does not fit.
        """
        try:
            self.state.load(tensors, counters)
        except KeyError as error:
            raise ValueError(f"{path} lacks {error}: it is not a checkpoint of this run") from error
        except (ValueError, RuntimeError) as error:  # RuntimeError: not the state of a random generator
            raise ValueError(f"{path}: {error}") from error
        self._saved = self.state.iteration

    def take(self, stop: StopSignals | None = None) -> None:
        """Write the exported model, a grid of samples and the checkpoint, and delete old checkpoints.

        The checkpoint, from which a run resumes, is written last, when everything else is complete. After a signal it
        is written first, and the grid, which may take a while, is left out. Every process must call this.

        Raises:
            OSError: if a file cannot be written, for example because the disk is full. The message states what is safe.
        """
        dumped = self.state.dump()
        if not self.processes.main:
            return
        if stop is not None and stop.is_set():
            self.write(*dumped)
        with writing(self.run_dir, f"the snapshot of iteration {self.state.iteration} in {self.run_dir}"):
            self.state.ema.save_pretrained(self.run_dir / "model")
            grid = self.sample_grid() if stop is None else stop.attempt(self.sample_grid)
            if grid is not None:
                save_png(grid, self.run_dir / f"samples-{self.state.images_seen // 1000:06d}.png")
        self.write(*dumped)
        self._rotate()

    def write(self, tensors: dict[str, Tensor], counters: dict[str, Any]) -> None:
        """Write a checkpoint in the main process, unless the last one written is from the same iteration.

        Raises:
            OSError: if the file cannot be written, for example because the disk is full. The message states what is
                safe.
        """
        iteration = counters["iteration"]
        if self.processes.main and self._saved != iteration:
            with writing(self.run_dir, f"the checkpoint of iteration {iteration} in {self.run_dir}"):
                checkpoint.save_checkpoint(checkpoint.checkpoint_path(self.run_dir, iteration), tensors, counters)
            self._saved = iteration

    def backup(self) -> Callable[[], None] | None:
        """Copy the state, and return a function that saves the copy. Return None if the state is saved already.

        Also return None if several processes train, because a copy would cost them a message in every iteration.
        """
        if self._saved == self.state.iteration or self.processes.count > 1:
            return None
        self.state.statistics.check()
        tensors, counters = self.state.dump()
        return partial(self.write, {name: tensor.detach().clone() for name, tensor in tensors.items()}, counters)

    @contextlib.contextmanager
    def diagnosing(self) -> Iterator[None]:
        """If the block finds that training has diverged, save the state for diagnosis.

        The state is saved in failed/, apart from the checkpoints, together with the gradients.

        Raises:
            FloatingPointError: if training has diverged. The message states where, and what to change.
        """
        try:
            yield
        except Diverged as error:
            if not self.processes.main:  # gradients are joint, so the main process gets here too
                raise FloatingPointError(str(error)) from None
            failed, good = self.run_dir / "failed", checkpoint.newest_checkpoint(self.run_dir)
            try:
                self._write_failed(failed, str(error))
                saved = f"The current state, with gradients, is in {failed}"
            except OSError as problem:  # do not hide the divergence, which matters more
                saved = f"The current state could not be saved ({problem})"
            raise FloatingPointError(
                f"{error}, in {self.run_dir / 'config.json'}, and resume from the last good checkpoint, {good}, with "
                f"`spigan train --resume {self.run_dir}`; unchanged, it would diverge again. {saved}"
            ) from None

    def sample_grid(self) -> Tensor:
        """Return an enlarged uint8 [C, H, W] grid of the averaged model's images for seeds 0, 1, ..."""
        return sample_grid(self.state.ema, batch_size=self.config.batch_gpu or self.config.batch)

    def write_reals(self, dataset: ImageDataset) -> None:
        """Write reals.png, a grid of images from across the dataset, in the main process."""
        if not self.processes.main:
            return
        side = grid_side(self.config.model.resolution)
        step = max(1, len(dataset) // (side * side))
        images = torch.stack([dataset[i] for i in range(0, len(dataset), step)][: side * side])
        grid = make_grid(images, columns=side, scale=display_scale(self.config.model.resolution))
        with writing(self.run_dir, f"pictures in {self.run_dir}"):
            save_png(grid, self.run_dir / "reals.png")

    def _rotate(self) -> None:
        """Delete all checkpoints except the newest ones and the best model's."""
        best = read_best(self.run_dir)
        kept = best and checkpoint.checkpoint_path(self.run_dir, int(best["iteration"]))
        with writing(self.run_dir, f"checkpoints in {self.run_dir}"):
            for old in checkpoint.checkpoints(self.run_dir)[: -self.config.keep_checkpoints]:
                if old != kept:
                    old.unlink()

    def _write_failed(self, folder: Path, text: str) -> None:
        tensors, counters = self.state.dump(joint=False)
        for name, module in self.state.modules().items():
            gradients = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
            tensors |= {f"grad.{name}.{key}": gradient for key, gradient in gradients.items()}
        checkpoint.save_checkpoint(folder / f"state-{self.state.iteration:08d}.safetensors", tensors, counters)
        write_text(folder / "error.txt", f"{text}\n")
