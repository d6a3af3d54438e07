"""Models as files: config.json and model.safetensors, in a folder or on the Hugging Face hub. No pickles are read."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spigan.config import ModelConfig, describe_problems
from spigan.files import is_hub_id, read_json, remove_stale, scratch_folder, shorten

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"

# The revisions that git accepts. huggingface_hub uses them as paths in its cache, and they must not lead out of it.
_REVISION = r"(?!.*(\.\.|//|/\.))[^\x00-\x20\x7f~^:?*\[\\/.][^\x00-\x20\x7f~^:?*\[\\]*"

AnyModel = TypeVar("AnyModel", bound="PretrainedModel")


class PretrainedModel(nn.Module, ModelHubMixin, library_name="spigan"):
    """A model that is saved as config.json and model.safetensors. `spigan.SPIGAN` is the only subclass.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write config.json, model.safetensors and a model card. Each file is written completely or not at all.

        Args:
            save_directory: folder to write to. Created if it does not exist. An existing model card is kept.
            **kwargs: push_to_hub=True also uploads the model, to `repo_id` (default: the name of the folder). Other
                arguments are passed to `push_to_hub`.

        Returns:
            Address of the commit if the model was uploaded, else None.
        """
        folder = Path(save_directory)
        push, repo_id = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None) or folder.name
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale(folder, ".saving-")
        with scratch_folder(folder, ".saving-") as scratch:
            super().save_pretrained(scratch)
            # safetensors makes its file private. Give it the same permissions as the other new files.
            (scratch / WEIGHTS_NAME).chmod((scratch / CONFIG_NAME).stat().st_mode)
            for file in scratch.iterdir():
                if file.name != CARD_NAME or not (folder / file.name).exists():
                    os.replace(file, folder / file.name)
        # The upload comes last: if it fails, the folder is complete.
        return self.push_to_hub(repo_id, **kwargs) if push else None

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})
        (save_directory / CONFIG_NAME).write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[AnyModel],
        pretrained_model_name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> AnyModel:
        """Load a model in eval mode from a folder or the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: folder with config.json and model.safetensors, or a hub id: "user/name" or
                "user/name@revision".
            device: device of the model. Default: the CPU.
            revision: branch, tag or commit on the hub. Default: the main branch. Both files come from one commit.
            cache_dir: where to keep downloads. Default: the folder set by HF_HUB_CACHE or HF_HOME.
            token: access token. Default: the token from `hf auth login` or HF_TOKEN.
            force_download: whether to download the files even if they are in the cache.
            local_files_only: whether to use only the cache, as HF_HUB_OFFLINE=1 does. The cache is also used when the
                hub cannot be reached.

        Raises:
            FileNotFoundError: if the folder or the repository lacks a file, or if the cache lacks it while offline.
            ValueError: if the configuration or the weights are damaged or do not fit together.
            OSError: if the hub has no such repository or revision, or refuses access.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _download(
                str(pretrained_model_name_or_path),
                revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        paths = {name: folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)}
        if missing := [name for name, path in paths.items() if not path.is_file()]:
            raise FileNotFoundError(
                f"{pretrained_model_name_or_path} is not a saved spigan model: it lacks {' and '.join(missing)}"
            )
        config = _read_config(paths[CONFIG_NAME])
        with torch.device("meta"):  # shapes only: an untrusted configuration may ask for more memory than is available
            expected = cls(config).state_dict()
        _check_header(expected, paths[WEIGHTS_NAME])
        model = cls(config)
        load_weights(model, paths[WEIGHTS_NAME])
        return model.to(device or "cpu").eval()


def _download(model: str, revision: str | None, **options: Any) -> Path:
    """Download the two files of a model on the hub, and return the folder that holds them."""
    name, _, given = model.partition("@")
    if not is_hub_id(name):
        raise FileNotFoundError(f"model {name!r} is neither an existing folder nor a hub id such as user/name")
    if given and revision is not None and given != revision:
        raise ValueError(f"{model} names the revision {given!r}, but revision={revision!r} was given: leave out one")
    if not re.fullmatch(_REVISION, given or revision or "main"):
        raise ValueError(f"{given or revision!r} cannot be the name of a branch, tag or commit")
    # Download a snapshot: if the files were downloaded one by one, the branch might change in between.
    with hub_connection():
        return Path(
            snapshot_download(
                name, revision=given or revision or None, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **options
            )
        )


@contextmanager
def hub_connection() -> Iterator[None]:
    """Turn connection errors inside the block into OSError, because those of the HTTP libraries are not OSErrors."""
    try:
        yield
    except Exception as error:
        # Compare names, because huggingface_hub uses httpx or httpx2, which are not dependencies of this package.
        if isinstance(error, OSError) or not type(error).__module__.startswith("httpx"):
            raise
        raise OSError(f"the hub cannot be reached: {error or type(error).__name__}") from error


def _read_config(path: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(read_json(path))
    except ValueError as error:
        cause = describe_problems(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{path} is not the configuration of a spigan model: {cause}") from error


def load_weights(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Copy the tensors of a safetensors file into `module`, after checking in the file's header that all of them fit.

    Args:
        module: the module that receives the weights, converted to its dtype.
        path: the safetensors file.
        prefix: only names that start with this prefix are read. The prefix is removed.

    Raises:
        ValueError: if the file is damaged, names are missing or unexpected, or a tensor has the wrong shape, does not
            have a floating-point dtype, or is not finite.
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
    """Compare the names and shapes in a safetensors file with `expected`, without reading its tensors.

    Returns:
        The name in the file for each expected name.
    """
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
                    problems.append(f"{name} has dtype {dtype}, expected a 16-, 32- or 64-bit float")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {shorten(error)}") from error
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the model's configuration: {'; '.join(problems[:5])}{more}")
    return names


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of a model's tensors, which identifies its weights."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
