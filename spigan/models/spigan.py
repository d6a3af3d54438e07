"""The generative model: mapping network and generator."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor

from spigan.config import ModelConfig
from spigan.models.generator import Generator
from spigan.models.hub import card, push_to_hub
from spigan.models.mapping import MLPMapping, ODEMapping, Times, check_unit_times
from spigan.models.pretrained import PretrainedModel
from spigan.ops.library import stage


class SPIGAN(PretrainedModel):
    """Generates images: noise z = i(0) -> h(t) -> image i(t), in one evaluation of the generator.

    Args:
        config: the architecture.

    Attributes:
        mapping: an `ODEMapping` or `MLPMapping`; mapping(z, t) -> h.
        generator: a `Generator`; generator(h) -> image.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mapping: ODEMapping | MLPMapping
        if config.mapping == "mlp":
            self.mapping = MLPMapping(
                dim_h=config.dim_h,
                layers=config.mlp_layers,
                lr_multiplier=config.mapping_lr_multiplier,
                dim_z=math.prod(config.z_shape),
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
                time_init=config.time_init,
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
        """Make images at one or several times.

        With path="analytic", the image at time t is t G(h) + (1 - t) z, where h is h(1) or h(t), as `path_latent` says.
        At t = 0 it is z, and with path_latent="1" the generator runs once, however many times there are.

        Args:
            z: [N, *config.z_shape], standard normal.
            t: time in [0, 1] (1 is the clean image), or a list of K times.
            noise: per-pixel noise of the generator. Default: "random" in training mode, "const" in eval mode.

        Returns:
            [N, C, H, W] for one time, or [K, N, C, H, W] for a list of times, in about [-1, 1].

        Raises:
            ValueError: if z has the wrong shape, a time is out of range, or the noise mode is unknown.
        """
        if z.ndim != len(self.config.z_shape) + 1 or tuple(z.shape[1:]) != self.config.z_shape:
            raise ValueError(f"z must have shape [N, {', '.join(map(str, self.config.z_shape))}], got {list(z.shape)}")
        if self.config.path == "analytic" and t != 1.0:
            return self._noisy(z, t, noise)
        with stage("mapping"):
            h = self.mapping(z, t)
        with stage("synthesis"):
            if h.ndim == 2:
                return self.generator(h, noise)
            return self.generator(h.flatten(0, 1), noise).unflatten(0, h.shape[:2])

    def _noisy(self, z: Tensor, t: Times, noise: str | None) -> Tensor:
        """Make images on the analytic path; see `forward`."""
        times = [float(t)] if isinstance(t, (int, float)) else [float(time) for time in t]
        check_unit_times(times)
        with stage("mapping"):
            h = self.mapping(z, times if self.config.path_latent == "t" else [1.0])  # [K or 1, N, D]
        with stage("synthesis"):
            clean = self.generator(h.flatten(0, 1), noise).unflatten(0, h.shape[:2])
            z = z.to(clean.dtype)
            images = torch.stack(
                [time * x + (1.0 - time) * z for time, x in zip(times, clean.expand(len(times), *z.shape), strict=True)]
            )
        return images[0] if isinstance(t, (int, float)) else images

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

        If the model card was edited on the hub, the upload replaces it. The old card remains in the repository's
        history.

        Args:
            repo_id: "user/name", or "name" in your own namespace. Created if it does not exist.
            run: folder of the training run. The card then describes its configuration, data, time and metrics.
            metrics: JSON file written by `spigan evaluate --out`. Default: the metrics that the run measured for these
                weights, if any.
            license: a licence, as the hub names it, such as "cc-by-4.0". Default: the card states that none was given.
            private: whether a new repository is private. Default: the setting of the namespace.
            token: access token. Default: the token from `hf auth login` or HF_TOKEN.
            branch: branch to push to. Created if it does not exist. Default: the main branch.
            commit_message: message of the commit.
            create_pr: whether to open a pull request instead of committing.

        Returns:
            Address of the commit or pull request.

        Raises:
            FileNotFoundError, ValueError: if the run or the metrics are missing, damaged, or belong to another model.
                In this case nothing has been uploaded.
            OSError: if the hub cannot be reached or refuses access.
        """
        return push_to_hub(
            self, repo_id, run=run, metrics=metrics, license=license, private=private, token=token, branch=branch,
            commit_message=commit_message, create_pr=create_pr,
        )  # fmt: skip

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card (README.md) of a saved model, without details of its training run."""
        return card(self)
