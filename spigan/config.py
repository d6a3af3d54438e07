"""Configurations of a model and of a training run, and the presets. Stored as config.json beside the weights."""

from __future__ import annotations

import reprlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spigan.data import DataConfig
from spigan.files import shorten

Resolution = Literal[8, 16, 32, 64, 128, 256, 512, 1024]
Positive = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=2**14)]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200


def describe_problems(error: ValidationError) -> str:
    """What is wrong with which fields, in one line; of many problems the first five."""
    problems = error.errors()
    parts = [
        f"{'.'.join(map(shorten, problem['loc']))}: {problem['msg']}, got {_short.repr(problem['input'])}"
        if problem["loc"]
        else problem["msg"].removeprefix("Value error, ")
        for problem in problems[:5]
    ]
    return "; ".join(parts) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


class ModelConfig(BaseModel):
    """Architecture of a `spigan.SPIGAN`: mapping network and generator.

    What the paper leaves open (its appendix is not available) is this project's choice and marked "ours".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    resolution: Resolution = Field(32, description="height and width of the images")
    img_channels: Literal[1, 3] = Field(3, description="1 grey, 3 RGB")
    mapping: Literal["ode", "mlp"] = Field("ode", description="ode: SPI-GAN's neural ODE; mlp: StyleGAN2's, no time")
    dim_h: Width = Field(512, description="length of the latent vector h")
    ode_solver: Literal["rk4", "euler", "dopri5"] = Field("rk4", description="dopri5 needs the extra `ode`; ours")
    ode_layers: Annotated[int, Field(ge=1, le=8)] = Field(3, description="layers of r; ours")
    ode_steps: Annotated[int, Field(ge=1, le=1000)] = Field(4, description="solver steps over [0, 1]; ours")
    ode_activation: Literal["silu", "lrelu", "tanh", "softplus"] = Field("silu", description="between r's layers; ours")
    ode_tolerance: Annotated[float, Field(ge=1e-12, le=1)] = Field(
        1e-5, description="relative and absolute, dopri5 only"
    )
    embed_channels: Width = Field(64, description="width of the first convolution of o; ours")
    mlp_layers: Annotated[int, Field(ge=1, le=64)] = Field(8, description='layers of mapping="mlp"')
    mapping_lr_multiplier: Annotated[float, Field(ge=1e-6, le=1e3)] = Field(
        0.01, description="of o, r, MLP: StyleGAN2's 0.01"
    )
    channel_base: Annotated[int, Field(ge=1, le=2**24)] = Field(
        32768, description="width at resolution r is min(channel_base / r, channel_max)"
    )
    channel_max: Width = Field(512, description="largest width")
    conv_clamp: Annotated[float, Field(gt=0)] | None = Field(None, description="bound of layer outputs; None: no bound")

    @property
    def z_shape(self) -> tuple[int, ...]:
        """Shape of one z: the image's, [C, H, W]; [dim_h] for mapping="mlp"."""
        if self.mapping == "mlp":
            return (self.dim_h,)
        return (self.img_channels, self.resolution, self.resolution)


class TrainConfig(BaseModel):
    """A training run: Algorithm 1 of the paper with StyleGAN2's loss and regularisation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: ModelConfig = Field(ModelConfig(), description="the networks that sample")
    data: DataConfig = Field(description="the images")

    # The straight path
    intervals: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="K, number of times t_1 < ... < t_K = 1 per iteration"
    )
    fixed_t: bool = Field(False, description="t_k = k / K instead of t_1..t_(K-1) ~ U(0, 1)")
    updates: Literal["sequential", "joint"] = Field(
        "sequential", description="sequential: an optimiser step per t_k (Algorithm 1); joint: one step for all t_k"
    )
    beta_min: Annotated[float, Field(gt=0)] = Field(0.1, description="VP-SDE noise rate at t = 0")
    beta_max: Annotated[float, Field(gt=0)] = Field(20.0, description="VP-SDE noise rate at t = 1")

    # Optimisation
    total_kimg: Annotated[float, Field(gt=0)] = Field(25000, description="thousands of images shown to D until the end")
    batch: Annotated[int, Field(ge=1, le=2**20)] = Field(64, description="images in a minibatch")
    batch_gpu: Positive | None = Field(None, description="images at a time; gradients accumulate over the minibatch")
    lr_g: Annotated[float, Field(gt=0)] = Field(2.5e-3, description="Adam's learning rate, mapping and generator")
    lr_d: Annotated[float, Field(gt=0)] = Field(2.5e-3, description="Adam's learning rate, discriminator")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.99, description="Adam's beta2; beta1 is 0")
    r1_gamma: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of the R1 penalty on real i(t)")
    r1_interval: Positive = Field(16, description="D iterations between R1 penalties (lazy regularisation)")
    pl_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of path-length regularisation")
    pl_interval: Positive = Field(4, description="G iterations between path-length penalties")
    pl_batch_shrink: Positive = Field(2, description="path length is measured on batch / this many images")
    pl_decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.01, description="of the running mean path length")
    ema_kimg: Annotated[float, Field(ge=0)] = Field(500, description="half-life of the weights' average, in kimg")
    ema_rampup: Annotated[float, Field(ge=0)] | None = Field(
        0.05, description="half-life is at most this share of the images seen; None: never shortened"
    )
    mbstd_group: Positive = Field(4, description="group of D's minibatch standard deviation")
    grad_norm_limit: Annotated[float, Field(gt=0)] | None = Field(
        1e6, description="norm of a step's gradient that ends the run as diverged; None: only one that is not finite"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: convolutions in bfloat16 (autocast)")

    # Augmentation of what D sees
    augment: Literal["none", "diffaug", "ada"] = Field("none", description="the same for real and generated images")
    ada_target: Annotated[float, Field(ge=-1, le=1)] = Field(0.6, description="target of E[sign(D(real))]")
    ada_kimg: Annotated[float, Field(gt=0)] = Field(500, description="kimg in which ADA's p can go from 0 to 1")
    xflip: bool = Field(False, description="flip real images left-right at random")

    # Running
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="of initial weights, noise and data order")
    device: str = Field("auto", description="auto: cuda where there is one, else cpu")
    tick_kimg: Annotated[float, Field(ge=1e-3)] = Field(4, description="kimg between lines of statistics")
    snapshot_ticks: Positive = Field(50, description="ticks between checkpoints, grids and exported models")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept; the best model's is, too")

    # Metrics during training
    metric_features: str | None = Field(
        None, description="feature network, as for `spigan evaluate --features`; None: no metrics during training"
    )
    metric_samples: Annotated[int, Field(ge=1, le=10**7)] = Field(10_000, description="images drawn for the metrics")
    metric_ticks: Positive = Field(50, description="ticks between lines of metrics")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.model.mapping == "mlp" and self.intervals != 1:
            raise ValueError(f'mapping="mlp" has no time and needs intervals=1 (K = 1), got {self.intervals}')
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min must be at most beta_max, got {self.beta_min} and {self.beta_max}")
        if self.batch_gpu is not None and self.batch % self.batch_gpu:
            raise ValueError(f"batch must be a multiple of batch_gpu, got {self.batch} and {self.batch_gpu}")
        if self.data.resolution not in (None, self.model.resolution):
            raise ValueError(
                f"data.resolution {self.data.resolution} is not model.resolution {self.model.resolution}: leave it out"
            )
        return self
