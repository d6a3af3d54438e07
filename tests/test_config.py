"""Configurations and presets: what they accept, what they say when they do not, and what they build."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode

from spigan import SPIGAN, DataConfig, ModelConfig, TrainConfig, preset
from spigan.config import describe_problems
from spigan.presets import preset_fields, preset_names

DIGITS = {"source": "digits"}


def message(**fields: Any) -> str:
    """What TrainConfig says against these fields."""
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate({"data": DIGITS} | fields)
    return describe_problems(caught.value)


def named(name: str) -> TrainConfig:
    """A preset, with images where it has none of its own."""
    return preset(name, **({} if "data" in preset_fields(name) else {"data": DataConfig(source="images")}))


def test_defaults_of_the_paper() -> None:
    config = TrainConfig(data=DataConfig(source="digits"))
    assert config.model == ModelConfig()
    assert (config.beta_min, config.beta_max) == (0.1, 20.0)
    assert (config.intervals, config.fixed_t, config.updates) == (2, False, "sequential")
    assert (config.model.ode_solver, config.model.ode_steps, config.model.dim_h) == ("rk4", 4, 512)


@pytest.mark.parametrize("name", preset_names())
def test_json_round_trip(name: str) -> None:
    config = named(name)
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert TrainConfig.model_validate(json.loads(config.model_dump_json(indent=2))) == config


def test_json_round_trip_of_every_field_changed() -> None:
    model = ModelConfig(
        resolution=64,
        img_channels=1,
        dim_h=7,
        ode_solver="dopri5",
        ode_layers=2,
        ode_steps=9,
        ode_activation="tanh",
        ode_tolerance=1e-7,
        embed_channels=5,
        mlp_layers=3,
        mapping_lr_multiplier=0.1,
        channel_base=100,
        channel_max=3,
        conv_clamp=256.0,
        mapping="mlp",
        path="analytic",
        time_init=0.5,
    )
    # The only pair that excludes each other: an MLP has no h(t).
    assert [name for name, value in model if value == getattr(ModelConfig(), name)] == ["path_latent"]
    assert ModelConfig.model_validate_json(model.model_dump_json()) == model


@pytest.mark.parametrize("config", [ModelConfig(), preset("digits"), DataConfig(source="digits")])
def test_frozen(config: Any) -> None:
    name = next(iter(type(config).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, name, getattr(config, name))
    assert {config: 1}[config.model_copy()] == 1  # so it can be a key


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"colour": 1}, "colour: there is no such field, got 1"),
        ({"model": {"colour": 1}}, "model.colour: there is no such field, got 1"),
        ({"data": DIGITS | {"colour": 1}}, "data.colour: there is no such field, got 1"),
        ({"batch": 0}, "batch: Input should be greater than or equal to 1, got 0"),
        ({"batch": 2.5}, "batch: Input should be a valid integer, got a number with a fractional part, got 2.5"),
        ({"intervals": 0}, "intervals: Input should be greater than or equal to 1, got 0"),
        ({"total_kimg": 0}, "total_kimg: Input should be greater than 0, got 0"),
        ({"beta2": 1}, "beta2: Input should be less than 1, got 1"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0, got -1"),
        ({"seed": 2**31}, f"seed: Input should be less than {2**31}, got {2**31}"),
        ({"precision": "fp8"}, "precision: Input should be 'fp32', 'bf16' or 'auto', got 'fp8'"),
        ({"model": {"ode_solver": "heun"}}, "model.ode_solver: Input should be 'rk4', 'euler' or 'dopri5', got 'heun'"),
        ({"model": {"img_channels": 4}}, "model.img_channels: Input should be 1 or 3, got 4"),
        ({"model": {"ode_layers": 9}}, "model.ode_layers: Input should be less than or equal to 8, got 9"),
        ({"data": {}}, "data.source: Field required, got {}"),
        ({"beta_min": 3, "beta_max": 2}, "beta_min must be at most beta_max, got 3.0 and 2.0"),
        ({"batch": 0, "lr_g": 0}, "batch: Input should be greater than or equal to 1, got 0; lr_g: Input"),
        ({"model": {"resolution": 48}}, "model.resolution: Input should be 8, 16, 32, 64, 128, 256, 512 or 1024"),
    ],
)
def test_refused_fields_are_named(fields: dict[str, Any], expected: str) -> None:
    assert message(**fields).startswith(expected)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"model": {"resoluton": 64}},
            "model.resoluton: there is no such field, got 64; did you mean model.resolution?",
        ),
        (
            {"data": DIGITS | {"splitt": "test"}},
            "data.splitt: there is no such field, got 'test'; did you mean data.split?",
        ),
        ({"ode_steps": 4}, "ode_steps: there is no such field, got 4; did you mean model.ode_steps?"),
        ({"total_king": 4}, "total_king: there is no such field, got 4; did you mean total_kimg?"),
        ({"augment": "dada"}, "augment: Input should be 'none', 'diffaug' or 'ada', got 'dada'; did you mean ada?"),
        ({"augment": "5" * 1000}, "augment: Input should be 'none', 'diffaug' or 'ada', got '5555"),
    ],
)
def test_the_nearest_name_is_suggested(fields: dict[str, Any], expected: str) -> None:
    assert message(**fields).startswith(expected)
    assert message(**fields).endswith("?") == expected.endswith("?")


def test_fields_of_other_configurations_are_suggested() -> None:
    class Paint(BaseModel, extra="forbid"):
        colour: str = "red"

    for config, hint in ((ModelConfig, "did you mean resolution?"), (Paint, "got 8")):
        with pytest.raises(ValidationError) as caught:
            config.model_validate({"resoluton": 8} | ({"color": 8} if config is Paint else {}))
        assert describe_problems(caught.value).endswith(hint)
    assert describe_problems(caught.value, Paint).endswith("color: there is no such field, got 8; did you mean colour?")


def test_at_most_five_problems_are_described() -> None:
    text = message(**{f"field{i}": i for i in range(8)})
    assert text.count("there is no such field") == 5 and text.endswith("; and 3 more")


def test_nan_is_no_number() -> None:
    """Comparisons with NaN are false, so a bound must not be written as a comparison that fails."""
    for name in ("lr_g", "total_kimg", "beta2", "r1_gamma", "ema_kimg"):
        assert name in message(**{name: float("nan")})


def test_mlp_mapping_has_one_time() -> None:
    expected = 'mapping="mlp" has no time and needs intervals=1 (K = 1) or path="analytic", got intervals=2'
    assert message(model={"mapping": "mlp"}) == expected
    config = TrainConfig.model_validate({"data": DIGITS, "model": {"mapping": "mlp"}, "intervals": 1})
    assert config.model.z_shape == (512,)
    config = TrainConfig.model_validate({"data": DIGITS, "model": {"mapping": "mlp"}, "path": "analytic"})
    assert config.model.z_shape == (3, 32, 32) and config.intervals == 2
    text = message(model={"mapping": "mlp"}, path="analytic", path_latent="t")
    assert text.endswith('mapping="mlp" has no time and needs path_latent="1", got "t"')


# ---- The path ----


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "analytic", "path_latent": "t"},
        {"model": {"path": "analytic", "path_latent": "t"}},
        {"model": ModelConfig(path="analytic", path_latent="t")},
        {"model": ModelConfig(dim_h=512), "path": "analytic", "path_latent": "t"},
    ],
)
def test_run_and_model_share_the_path(fields: dict[str, Any]) -> None:
    config = TrainConfig.model_validate({"data": DIGITS} | fields)
    assert (config.path, config.path_latent) == (config.model.path, config.model.path_latent) == ("analytic", "t")
    assert TrainConfig.model_validate(config.model_dump()) == config
    assert preset("digits", path="analytic").model == preset("digits").model.model_copy(update={"path": "analytic"})


def test_configurations_without_a_path_are_learned() -> None:
    """Those of models and runs made before there was a choice."""
    fields = preset("digits").model_dump()
    new = ("path", "path_latent", "path_noise", "times", "time_min", "time_power", "discriminator_time", "time_init")
    for name in new:
        fields.pop(name, None)
        fields["model"].pop(name, None)
    assert TrainConfig.model_validate(fields) == preset("digits")
    assert ModelConfig.model_validate(fields["model"]).path == "learned"


def test_path_latent_may_be_a_number() -> None:
    assert TrainConfig.model_validate({"data": DIGITS, "path_latent": 1}).path_latent == "1"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"path": "analytik"}, "path: Input should be 'learned' or 'analytic', got 'analytik'; did you mean analytic?"),
        (
            {"path": "analytic", "model": {"path": "learned"}},
            'path "analytic" differs from model.path "learned": set both, or leave one out',
        ),
        ({"path_noise": "z"}, 'path_noise="z" needs path="analytic", got path="learned"'),
        ({"fixed_t": True, "time_power": 2}, "fixed_t draws no times: leave out time_min and time_power"),
        (
            {"times": "split", "intervals": 3, "batch": 32},
            'times="split" needs a batch that intervals divides, got batch=32 and intervals=3',
        ),
        (
            {"times": "split", "intervals": 4, "batch": 32, "batch_gpu": 2},
            'times="split" needs a batch_gpu that intervals divides, got batch_gpu=2 and intervals=4',
        ),
    ],
)
def test_refused_paths(fields: dict[str, Any], expected: str) -> None:
    assert message(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"intervals": 1}, True),
        ({"model": {"mapping": "mlp"}, "intervals": 1}, False),
        ({"model": {"mapping": "mlp"}, "path": "analytic"}, True),
        ({"model": {"mapping": "mlp"}, "intervals": 1, "discriminator_time": "on"}, True),
        ({"discriminator_time": "off"}, False),
    ],
)
def test_when_the_discriminator_is_told_the_time(fields: dict[str, Any], expected: bool) -> None:
    assert TrainConfig.model_validate({"data": DIGITS} | fields).tells_time == expected


def test_batch_gpu_divides_batch() -> None:
    assert message(batch=32, batch_gpu=5) == "batch must be a multiple of batch_gpu, got 32 and 5"
    assert message(batch=32, batch_gpu=64) == "batch must be a multiple of batch_gpu, got 32 and 64"
    for batch_gpu in (None, 1, 8, 32):
        config = TrainConfig.model_validate({"data": DIGITS, "batch": 32, "batch_gpu": batch_gpu})
        assert config.batch_gpu == batch_gpu


def test_the_noise_rate_may_be_constant() -> None:
    config = TrainConfig.model_validate({"data": DIGITS, "beta_min": 2, "beta_max": 2})
    assert (config.beta_min, config.beta_max) == (2.0, 2.0)


def test_data_resolution_is_the_models() -> None:
    text = message(data=DIGITS | {"resolution": 16})
    assert re.match(r"data\.resolution .*16 .*model\.resolution 32", text), text
    for resolution in (None, 32):
        data = DIGITS | {"resolution": resolution}
        assert TrainConfig.model_validate({"data": data}).data.resolution == resolution


def test_z_shape() -> None:
    assert ModelConfig(resolution=64, img_channels=1).z_shape == (1, 64, 64)
    assert ModelConfig(mapping="mlp", dim_h=9).z_shape == (9,)


def test_preset_names() -> None:
    assert preset_names() == ("digits", "cifar10", "cifar10-small", "celebahq256", "church256")


@pytest.mark.parametrize("name", preset_names())
def test_presets_build(name: str) -> None:
    config = named(name)
    resolution = {"digits": 16, "cifar10": 32, "cifar10-small": 32}.get(name, 256)
    channels = 1 if name == "digits" else 3
    assert config.model.z_shape == (channels, resolution, resolution)
    with FakeTensorMode():  # shapes alone, no memory
        model = SPIGAN(config.model).eval()
        images = model(torch.empty(2, *config.model.z_shape), t=[0.5, 1.0])
    assert images.shape == (2, 2, channels, resolution, resolution)


def test_presets_follow_stylegan2_ada() -> None:
    cifar = preset("cifar10")
    assert (cifar.r1_gamma, cifar.pl_weight, cifar.ema_kimg, cifar.augment) == (0.01, 0.0, 500, "ada")
    assert (cifar.model.dim_h, cifar.model.channel_base // 32 >= 512, cifar.model.channel_max) == (512, True, 512)
    for name in ("celebahq256", "church256"):
        config = named(name)
        assert (config.r1_gamma, config.pl_weight, config.model.dim_h) == (1.0, 2.0, 512)
    assert preset("digits").data.source == "digits" and preset("cifar10").data.source == "cifar10"


@pytest.mark.parametrize("name", ["celebahq256", "church256"])
def test_preset_that_needs_images(name: str) -> None:
    with pytest.raises(ValueError, match=f"the preset '{name}' needs images: pass data="):
        preset(name)
    assert preset(name, data=DataConfig(source="photos.zip")).data.source == "photos.zip"
    assert preset(name, data={"source": "photos.zip"}).data == DataConfig(source="photos.zip")


def test_changes_of_a_preset() -> None:
    config = preset("digits", batch=8, model=ModelConfig(resolution=8, img_channels=1), augment="diffaug")
    assert (config.batch, config.augment, config.model.resolution) == (8, "diffaug", 8)
    assert config.data == preset("digits").data
    with pytest.raises(ValidationError, match="colour"):
        preset("digits", colour=1)
    with pytest.raises(ValidationError, match="batch"):
        preset("digits", batch=0)


def test_changing_a_presets_fields_does_not_change_the_preset() -> None:
    before = preset("digits")
    fields = preset_fields("digits")
    fields["model"]["dim_h"] = 1
    fields["batch"] = 1
    assert preset("digits") == before


@pytest.mark.parametrize("name", preset_names())
def test_preset_fields_are_plain_json(name: str) -> None:
    assert json.loads(json.dumps(preset_fields(name))) == preset_fields(name)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="there is no preset 'mnist'; available: digits, cifar10, "):
        preset("mnist")
