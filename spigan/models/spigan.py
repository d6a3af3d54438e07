"""The whole generative model: mapping network and generator, loaded and saved as config.json + model.safetensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spigan.config import ModelConfig, describe_problems
from spigan.files import read_json, remove_stale, scratch_folder, shorten
from spigan.models.generator import Generator
from spigan.models.mapping import MLPMapping, ODEMapping, Times
from spigan.ops.library import stage

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

# What git takes: huggingface_hub makes a path of it in its cache, which must not lead out of there.
_REVISION = r"(?!.*(\.\.|//|/\.))[^\x00-\x20\x7f~^:?*\[\\/.][^\x00-\x20\x7f~^:?*\[\\]*"


class SPIGAN(nn.Module, ModelHubMixin, library_name="spigan"):
    """Noise z = i(0) -> h(t) -> image i(t), in one evaluation of the generator.

    Args:
        config: the architecture.

    Attributes:
        mapping: `ODEMapping` or `MLPMapping`; mapping(z, t) -> h.
        generator: `Generator`; generator(h) -> image.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping: ODEMapping | MLPMapping
        if config.mapping == "mlp":
            self.mapping = MLPMapping(
                dim_h=config.dim_h, layers=config.mlp_layers, lr_multiplier=config.mapping_lr_multiplier
            )
        else:
            self.mapping = ODEMapping(
                resolution=config.resolution,
                img_channels=config.img_channels,
                dim_h=config.dim_h,
                layers=config.ode_layers,
                steps=config.ode_steps,
                solver=config.ode_solver,
                activation=config.ode_activation,
                embed_channels=config.embed_channels,
                lr_multiplier=config.mapping_lr_multiplier,
                tolerance=config.ode_tolerance,
            )
        self.generator = Generator(
            config.resolution,
            config.img_channels,
            dim_h=config.dim_h,
            channel_base=config.channel_base,
            channel_max=config.channel_max,
            conv_clamp=config.conv_clamp,
        )

    def forward(self, z: Tensor, t: Times = 1.0, noise: str | None = None) -> Tensor:
        """Images at one time or several.

        Args:
            z: [N, *config.z_shape] standard normal.
            t: time in [0, 1] (1 is the clean image), or a list of K times.
            noise: the generator's per-pixel noise; default: "random" in training mode, "const" in eval mode.

        Returns:
            [N, C, H, W] for one time, [K, N, C, H, W] for a list; about [-1, 1].
        """
        if z.ndim != len(self.config.z_shape) + 1 or tuple(z.shape[1:]) != self.config.z_shape:
            raise ValueError(f"z must have shape [N, {', '.join(map(str, self.config.z_shape))}], got {list(z.shape)}")
        with stage("mapping"):
            h = self.mapping(z, t)
        with stage("synthesis"):
            if h.ndim == 2:
                return self.generator(h, noise)
            return self.generator(h.flatten(0, 1), noise).unflatten(0, h.shape[:2])

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and a model card; each file is replaced whole or not at all.

        Args:
            save_directory: folder, made if it does not exist; a model card that is there already is kept.
            **kwargs: push_to_hub=True uploads the model as well, to `repo_id` (default: the folder's name), with the
                arguments of `push_to_hub`.
        """
        folder = Path(save_directory)
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None) or folder.name
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder, ".saving-")
        with scratch_folder(folder, ".saving-") as scratch:
            super().save_pretrained(scratch)
            # safetensors makes its file private; all shall have the permissions that any new file gets.
            (scratch / WEIGHTS_NAME).chmod((scratch / CONFIG_NAME).stat().st_mode)
            for file in scratch.iterdir():
                if file.name != "README.md" or not (folder / file.name).exists():
                    os.replace(file, folder / file.name)
        # Last: where the upload fails, the folder is complete.
        return self.push_to_hub(repo_id, **kwargs) if push else None

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        run: str | Path | None = None,
        metrics: str | Path | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        commit_message: str = "Push model using spigan.",
        create_pr: bool = False,
    ) -> str:
        """Upload config.json, model.safetensors, a grid of samples and a model card to the Hugging Face hub.

        A card that was edited there is replaced; the repository's history keeps it.

        Args:
            repo_id: "user/name", or "name" in the user's own namespace; made if it does not exist.
            run: the training run, whose configuration, data, time and metrics the card tells.
            metrics: JSON of `spigan evaluate --out`; default: those that the run measured of these weights, if any.
            license: as the hub writes it, such as "cc-by-4.0"; default: the card says that none was stated.
            private: of a new repository; default: as the namespace's settings say.
            token: default: that of `hf auth login` or HF_TOKEN.
            branch: default: the repository's main branch; made if it does not exist.
            commit_message: of the one commit.
            create_pr: propose the commit instead of making it.

        Returns:
            Address of the commit, or of the pull request.

        Raises:
            FileNotFoundError, ValueError: run or metrics are missing, damaged, or those of another model; nothing has
                been uploaded then.
            OSError: the hub cannot be reached or refuses.
        """
        from spigan.models import hub

        return hub.push_to_hub(
            self, repo_id, run=run, metrics=metrics, license=license, private=private, token=token, branch=branch,
            commit_message=commit_message, create_pr=create_pr,
        )  # fmt: skip

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of a saved model: what is known without its training run."""
        from spigan.models import hub

        return hub.card(self)

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (save_directory / CONFIG_NAME).write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> SPIGAN:
        """Load a model in eval mode from a folder or the Hugging Face hub. No pickle is ever read.

        Args:
            pretrained_model_name_or_path: folder that holds config.json and model.safetensors; or a hub id "user/name",
                "user/name@revision".
            device: where to put the model; default the CPU.
            revision: branch, tag or commit on the hub; default its main branch. Both files are of one commit.
            cache_dir: where downloads are kept; default: as HF_HUB_CACHE and HF_HOME say.
            token: default: that of `hf auth login` or HF_TOKEN.
            force_download: download again what is kept already.
            local_files_only: ask no server, as HF_HUB_OFFLINE=1 does. Where the hub cannot be reached what is kept is
                taken anyway.

        Raises:
            FileNotFoundError: a local folder or the repository lacks a file, or the cache while offline.
            ValueError: the configuration or the weights are damaged or do not fit together.
            OSError: the hub has no such repository or revision, or refuses.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            name, _, given = str(pretrained_model_name_or_path).partition("@")
            if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
                raise FileNotFoundError(f"model {name!r} is neither an existing folder nor a hub id such as user/name")
            if given and revision is not None and given != revision:
                raise ValueError(f"{pretrained_model_name_or_path} names a revision, and revision is {revision!r}")
            if not re.fullmatch(_REVISION, given or revision or "main"):
                raise ValueError(f"{given or revision!r} cannot be the name of a branch, tag or commit")
            from spigan.models import hub

            # A snapshot and not file by file, between which the branch may move on.
            with hub.connection():
                folder = Path(
                    snapshot_download(
                        name,
                        revision=given or revision or None,
                        cache_dir=cache_dir,
                        token=token,
                        force_download=force_download,
                        local_files_only=local_files_only,
                        allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
                    )
                )
        paths = {name: folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)}
        if missing := [name for name, path in paths.items() if not path.is_file()]:
            raise FileNotFoundError(
                f"{pretrained_model_name_or_path} is no saved spigan model: it lacks {' and '.join(missing)}"
            )
        config = _read_config(paths[CONFIG_NAME])
        with torch.device("meta"):  # shapes alone: a configuration that lies may ask for more memory than there is
            expected = cls(config).state_dict()
        _check_header(expected, paths[WEIGHTS_NAME])
        model = cls(config)
        load_weights(model, paths[WEIGHTS_NAME])
        return model.to(device or "cpu").eval()


def _read_config(path: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(read_json(path))
    except ValueError as error:
        cause = describe_problems(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{path} is not the configuration of a spigan model: {cause}") from error


def load_weights(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Copy the tensors of a safetensors file into `module`, after checking from its header that all of them fit.

    Args:
        module: receives the weights in its own dtype.
        path: safetensors file.
        prefix: names in the file start with it; others are ignored.

    Raises:
        ValueError: damaged file, missing or unexpected names, wrong shapes, or weights that are no finite floats.
    """
    expected = module.state_dict()
    names = _check_header(expected, path, prefix)
    try:
        with safe_open(path, framework="pt") as file:
            module.load_state_dict({name: file.get_tensor(stored) for name, stored in names.items()})
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {shorten(error)}") from error
    if bad := [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path} holds weights that are not finite: {', '.join(bad[:5])}")


def _check_header(expected: Mapping[str, Tensor], path: Path, prefix: str = "") -> dict[str, str]:
    """Compare names and shapes with a safetensors file's, whose tensors are not read; returns its names for them."""
    try:
        with safe_open(path, framework="pt") as file:
            names = {name.removeprefix(prefix): name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            problems = [f"missing {name}" for name in expected if name not in names]
            problems += [f"unexpected {shorten(name)}" for name in names if name not in expected]
            for name, tensor in expected.items():
                if name not in names:
                    continue
                stored = file.get_slice(names[name])
                if (shape := stored.get_shape()) != list(tensor.shape):
                    problems.append(f"{name} has shape {shape}, expected {list(tensor.shape)}")
                elif (dtype := stored.get_dtype()) not in ("F64", "F32", "F16", "BF16"):
                    problems.append(f"{name} has dtype {dtype}, expected floats of 16, 32 or 64 bits")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {shorten(error)}") from error
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the model's configuration: {'; '.join(problems[:5])}{more}")
    return names
