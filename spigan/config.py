"""Configurations of a model and of a training run, stored as config.json next to the weights."""

from __future__ import annotations

import re
import reprlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from spigan.choices import did_you_mean
from spigan.data import DataConfig
from spigan.files import shorten

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Resolution = Literal[8, 16, 32, 64, 128, 256, 512, 1024]
Positive = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=1, le=2**14)]
PathKind = Literal["learned", "analytic"]
PathLatent = Literal["1", "t"]
# On the command line and in TOML, path_latent=1 is a number.
_PathLatent = Annotated[PathLatent, BeforeValidator(lambda value: "1" if value == 1 else value)]
_PATH: Any = Field(
    "learned",
    description="learned: G makes i(t) from h(t) (the paper); analytic: G makes clean images, and noise is added to "
    "them as to real ones; ours",
)
_PATH_LATENT: Any = Field(
    "1", description='latent that feeds G with path="analytic": 1: h(1) for every t; t: h(t); ours'
)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 200


def describe_problems(error: ValidationError, config: type[BaseModel] | None = None) -> str:
    """Describe in one line which fields are invalid, and why.

    Args:
        error: the error raised by a configuration.
        config: class of the configuration, whose fields are suggested for unknown ones. Default: `TrainConfig`,
            `ModelConfig` or `DataConfig`, whichever raised the error.

    Returns:
        At most five problems, each with the field, the problem and the given value.
    """
    known = {cls.__name__: cls for cls in (TrainConfig, ModelConfig, DataConfig)}
    names = field_names(config or known.get(error.title))
    problems = error.errors()
    parts = [_describe(problem, names) for problem in problems[:5]]
    return "; ".join(parts) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def field_names(config: type[BaseModel] | None) -> list[str]:
    """Return the names of the fields of a configuration, with nested fields as "model.resolution". Empty for None."""
    names = []
    for name, field in config.model_fields.items() if config else ():
        names.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{name}.{inner}" for inner in field_names(field.annotation)]
    return names


def _describe(problem: ErrorDetails, names: list[str]) -> str:
    """Describe a problem, and suggest the name that the user probably meant."""
    name, value = ".".join(map(shorten, problem["loc"])), problem["input"]
    if not name:
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(value, dict):
        return f"{name}: {problem['msg'].removeprefix('Value error, ')}"  # about several fields, which it names
    if problem["type"] == "extra_forbidden":
        leaf = name.rpartition(".")[2]
        elsewhere = [f"; did you mean {field}?" for field in names if field.rpartition(".")[2] == leaf]
        hint = elsewhere[0] if elsewhere else did_you_mean(name, names)
        return f"{name}: there is no such field, got {_short.repr(value)}{hint}"
    choices = re.findall("'(.*?)'", problem["ctx"]["expected"]) if problem["type"] == "literal_error" else []
    return f"{name}: {problem['msg']}, got {_short.repr(value)}{did_you_mean(value, choices)}"


class ModelConfig(BaseModel):
    """Architecture of a `spigan.SPIGAN`: mapping network and generator.

    Fields marked "ours" are choices of this project, because the paper leaves them open (its appendix is not
    available).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    resolution: Resolution = Field(32, description="height and width of the images in pixels")
    img_channels: Literal[1, 3] = Field(3, description="1 (grey) or 3 (RGB)")
    path: PathKind = _PATH
    path_latent: _PathLatent = _PATH_LATENT
    mapping: Literal["ode", "mlp"] = Field(
        "ode", description="ode: SPI-GAN's neural ODE; mlp: StyleGAN2's MLP, without time"
    )
    dim_h: Width = Field(512, description="length of the latent vector h")
    ode_solver: Literal["rk4", "euler", "dopri5"] = Field(
        "rk4", description="ODE solver; dopri5 needs the extra `ode`; ours"
    )
    ode_layers: Annotated[int, Field(ge=1, le=8)] = Field(3, description="number of layers of r; ours")
    ode_steps: Annotated[int, Field(ge=1, le=1000)] = Field(4, description="number of solver steps over [0, 1]; ours")
    ode_activation: Literal["silu", "lrelu", "tanh", "softplus"] = Field(
        "silu", description="activation between the layers of r; ours"
    )
    ode_tolerance: Annotated[float, Field(ge=1e-12, le=1)] = Field(
        1e-5, description="relative and absolute tolerance of dopri5"
    )
    time_init: Annotated[float, Field(ge=0, le=1e3)] = Field(
        1.0, description="initial standard deviation of the weights of t in r (0: r starts without time); ours"
    )
    embed_channels: Width = Field(64, description="channels of the first convolution of o; ours")
    mlp_layers: Annotated[int, Field(ge=1, le=64)] = Field(8, description='number of layers of mapping="mlp"')
    mapping_lr_multiplier: Annotated[float, Field(ge=1e-6, le=1e3)] = Field(
        0.01, description="learning rate multiplier of o, r and the MLP; 0.01 is StyleGAN2's"
    )
    channel_base: Annotated[int, Field(ge=1, le=2**24)] = Field(
        32768, description="channels at resolution r: min(channel_base / r, channel_max)"
    )
    channel_max: Width = Field(512, description="largest number of channels")
    conv_clamp: Annotated[float, Field(gt=0)] | None = Field(
        None, description="clamp layer outputs to this magnitude; None: no clamp"
    )

    @property
    def z_shape(self) -> tuple[int, ...]:
        """Shape of one z: the shape [C, H, W] of an image, or [dim_h] with mapping="mlp" on the learned path."""
        if self.mapping == "mlp" and self.path == "learned":
            return (self.dim_h,)
        return (self.img_channels, self.resolution, self.resolution)

    @property
    def adaptive(self) -> bool:
        """Whether the mapping's ODE solver chooses its steps by the values, so that they differ between calls."""
        return self.mapping == "ode" and self.ode_solver == "dopri5"

    @property
    def timeless(self) -> bool:
        """Whether the model only makes clean images (t = 1)."""
        return self.mapping == "mlp" and self.path == "learned"

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.mapping == "mlp" and self.path == "analytic" and self.path_latent == "t":
            raise ValueError('mapping="mlp" has no time and needs path_latent="1", got "t"')
        return self


class TrainConfig(BaseModel):
    """A training run: Algorithm 1 of the paper with StyleGAN2's loss and regularisation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: ModelConfig = Field(ModelConfig(), description="mapping network and generator")
    data: DataConfig = Field(description="training images")

    # The straight path
    path: PathKind = _PATH
    path_latent: _PathLatent = _PATH_LATENT
    path_noise: Literal["independent", "z"] = Field(
        "independent", description='noise of generated points with path="analytic": drawn anew, or z itself; ours'
    )
    intervals: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="K, the number of times t_1 < ... < t_K = 1 per iteration"
    )
    fixed_t: bool = Field(False, description="use t_k = k / K instead of t_1, ..., t_(K-1) ~ U(0, 1)")
    updates: Literal["sequential", "joint"] = Field(
        "sequential", description="sequential: one optimiser step per t_k (Algorithm 1); joint: one step for all t_k"
    )
    times: Literal["shared", "split"] = Field(
        "shared",
        description="shared: every image is used at all K times; split: at one of them, 1 / K of the minibatch at "
        "each, with one optimiser step; ours",
    )
    time_min: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="t_1, ..., t_(K-1) are above it; ours")
    time_power: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0,
        description="density of t_1, ..., t_(K-1): proportional to (t - time_min)^(time_power - 1), so more are near 1 "
        "if time_power is above 1; ours",
    )
    discriminator_time: Literal["auto", "on", "off"] = Field(
        "auto", description='whether D is told t; auto: unless mapping="mlp" and K = 1 (StyleGAN2); ours'
    )
    beta_min: Annotated[float, Field(gt=0)] = Field(0.1, description="noise rate of the VP-SDE at t = 0")
    beta_max: Annotated[float, Field(gt=0)] = Field(20.0, description="noise rate of the VP-SDE at t = 1")

    # Optimisation
    total_kimg: Annotated[float, Field(gt=0)] = Field(
        25000, description="length of training, in thousands of real images shown to D"
    )
    total_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="end training after this many seconds, if that comes before total_kimg; on a CPU, seconds of CPU "
        "time of the training process, so that a busy machine trains as long as an idle one; None: no limit",
    )
    batch: Annotated[int, Field(ge=1, le=2**20)] = Field(64, description="images per minibatch")
    batch_gpu: Positive | None = Field(
        None,
        description="images per forward and backward pass; gradients accumulate over the minibatch; None: all at once",
    )
    lr_g: Annotated[float, Field(gt=0)] = Field(
        2.5e-3, description="Adam's learning rate for the mapping network and the generator"
    )
    lr_d: Annotated[float, Field(gt=0)] = Field(2.5e-3, description="Adam's learning rate for the discriminator")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(0.99, description="Adam's beta2; beta1 is 0")
    r1_gamma: Annotated[float, Field(ge=0)] = Field(0.01, description="weight of the R1 penalty on real i(t)")
    r1_interval: Positive = Field(16, description="D iterations between R1 penalties (lazy regularisation)")
    pl_weight: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of path-length regularisation")
    pl_interval: Positive = Field(4, description="G iterations between path-length penalties")
    pl_batch_shrink: Positive = Field(2, description="path lengths are measured on batch / pl_batch_shrink images")
    pl_decay: Annotated[float, Field(gt=0, lt=1)] = Field(0.01, description="decay of the running mean path length")
    ema_kimg: Annotated[float, Field(ge=0)] = Field(500, description="half-life of the averaged weights, in kimg")
    ema_rampup: Annotated[float, Field(ge=0)] | None = Field(
        0.05, description="limits the half-life to this fraction of the images seen; None: no limit"
    )
    mbstd_group: Positive = Field(4, description="group size of D's minibatch standard deviation")
    grad_norm_limit: Annotated[float, Field(gt=0)] | None = Field(
        1e6, description="a larger gradient norm stops the run as diverged; None: only a norm that is not finite does"
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32",
        description="bf16: convolutions in bfloat16 (autocast); auto: bf16 on a GPU that computes in it, else fp32 "
        "(the run's config.json has the choice)",
    )

    # Augmentation of the images that D sees
    augment: Literal["none", "diffaug", "ada"] = Field("none", description="augmentation of real and generated images")
    ada_target: Annotated[float, Field(ge=-1, le=1)] = Field(0.6, description="ADA's target of E[sign(D(real))]")
    ada_kimg: Annotated[float, Field(gt=0)] = Field(500, description="kimg over which ADA's p can rise from 0 to 1")
    xflip: bool = Field(False, description="randomly mirror real images")

    # Running
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="seed of the initial weights, the noise and the data order"
    )
    device: str = Field("auto", description="auto (cuda if available, else cpu), cpu, cuda, cuda:1, ...")
    cuda_graph: bool = Field(
        True, description="on a GPU, replay the steps as CUDA graphs; false needs less memory and is slower"
    )
    tick_kimg: Annotated[float, Field(ge=1e-3)] = Field(
        4, description="kimg per tick; every tick writes a line of statistics"
    )
    snapshot_ticks: Positive = Field(50, description="ticks between checkpoints, sample grids and exported models")
    keep_checkpoints: Positive = Field(
        2, description="number of newest checkpoints to keep, in addition to the best model's"
    )

    # Metrics during training
    metric_features: str | None = Field(
        None, description="feature network, as for `spigan evaluate --features`; None: no evaluation during training"
    )
    metric_samples: Annotated[int, Field(ge=1, le=10**7)] = Field(
        10_000, description="number of images to sample for each evaluation"
    )
    metric_ticks: Positive = Field(50, description="ticks between evaluations")

    @property
    def tells_time(self) -> bool:
        """Whether the discriminator is told t."""
        if self.discriminator_time == "auto":  # StyleGAN2's own mapping comes with StyleGAN2's own discriminator
            return self.model.mapping == "ode" or self.intervals > 1
        return self.discriminator_time == "on"

    @model_validator(mode="before")
    @classmethod
    def _share(cls, fields: Any) -> Any:
        """Give the path to the model if only the run names it, and the other way round."""
        model = fields.get("model", {}) if isinstance(fields, dict) else None
        own = model.model_dump(exclude_unset=True) if isinstance(model, ModelConfig) else model
        if not isinstance(own, dict):
            return fields  # the types will be refused
        changed = {}
        for name, kind in (("path", PathKind), ("path_latent", PathLatent)):
            if name in fields and name not in own and fields[name] in get_args(kind):
                changed[name] = fields[name]
        shared = {name: own[name] for name in ("path", "path_latent") if name in own and name not in fields}
        return {**fields, **shared, **({"model": {**own, **changed}} if changed else {})}

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        for name in ("path", "path_latent"):
            if (ours := getattr(self, name)) != (models := getattr(self.model, name)):
                raise ValueError(f'{name} "{ours}" differs from model.{name} "{models}": set both, or leave one out')
        if self.model.timeless and self.intervals != 1:
            raise ValueError(
                'mapping="mlp" has no time and needs intervals=1 (K = 1) or path="analytic", got '
                f"intervals={self.intervals}"
            )
        if self.path == "learned" and self.path_noise != "independent":
            raise ValueError(f'path_noise="{self.path_noise}" needs path="analytic", got path="learned"')
        if self.fixed_t and (self.time_min, self.time_power) != (0.0, 1.0):
            raise ValueError("fixed_t draws no times: leave out time_min and time_power")
        at_a_time, name = (self.batch, "batch") if self.batch_gpu is None else (self.batch_gpu, "batch_gpu")
        if self.times == "split" and at_a_time % self.intervals:
            raise ValueError(
                f'times="split" needs a {name} that intervals divides, got {name}={at_a_time} and '
                f"intervals={self.intervals}"
            )
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min must be at most beta_max, got {self.beta_min} and {self.beta_max}")
        if self.batch_gpu is not None and self.batch % self.batch_gpu:
            raise ValueError(f"batch must be a multiple of batch_gpu, got {self.batch} and {self.batch_gpu}")
        if self.data.resolution not in (None, self.model.resolution):
            stored, needed = self.data.resolution, self.model.resolution
            raise ValueError(f"data.resolution {stored} differs from model.resolution {needed}: leave it out")
        return self
