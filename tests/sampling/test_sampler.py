"""Sampling: an image depends on its seed and the weights alone; what goes in, what comes out, what is refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import re
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

import spigan
from spigan import SPIGAN, ModelConfig, sampling
from spigan.models.load import load_model, resolve_device
from spigan.models.pretrained import weights_sha256
from spigan.ops import BackendUnavailable, backends, philox_normal, use_backend
from spigan.sampling import Sampler
from spigan.sampling.sampler import count_evaluations, default_batch_size, resolve_seeds

# Another batch size may take another path through the CPU's convolutions and so round differently.
ROUNDING = {"rtol": 0.0, "atol": 2e-6}


def make(**changes: Any) -> SPIGAN:
    """A tiny model whose images vary within [-1, 1] and whose stored noise matters."""
    torch.manual_seed(0)
    config = {
        "resolution": 8,
        "img_channels": 3,
        "dim_h": 16,
        "embed_channels": 4,
        "channel_base": 64,
        "channel_max": 8,
    }
    model = SPIGAN(ModelConfig.model_validate(config | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.1)
            if name.endswith("torgb.weight"):
                parameter.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def model() -> SPIGAN:
    return make()


@pytest.fixture(scope="module")
def images(model: SPIGAN) -> Tensor:
    """Images of seeds 0 to 8, one batch."""
    return spigan.sample(9, model=model)  # type: ignore[return-value]


def pt(*args: Any, **options: Any) -> Tensor:
    result = spigan.sample(*args, **options)
    assert isinstance(result, Tensor)
    return result


# ---- An image depends on its own seed and the weights alone ----


def test_the_same_call_gives_the_same_bits(model: SPIGAN, images: Tensor) -> None:
    assert torch.equal(pt(9, model=model), images)
    torch.manual_seed(7)  # torch's own generator plays no part
    assert torch.equal(pt(9, model=model), images)


def test_images_differ(images: Tensor) -> None:
    for i in range(8):
        assert (images[i] - images[i + 1]).abs().max() > 0.01


@pytest.mark.parametrize("n", [1, 2, 5])
def test_not_on_the_number_of_images(model: SPIGAN, images: Tensor, n: int) -> None:
    torch.testing.assert_close(pt(n, model=model), images[:n], **ROUNDING)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_not_on_the_batch_size(model: SPIGAN, images: Tensor, batch_size: int) -> None:
    torch.testing.assert_close(pt(9, model=model, batch_size=batch_size), images, **ROUNDING)


@pytest.mark.parametrize("seeds", [[3], [8, 0, 4], [2, 2, 2], (1, 7), np.array([5, 6])])
def test_not_on_order_and_neighbours(model: SPIGAN, images: Tensor, seeds: Any) -> None:
    torch.testing.assert_close(pt(model=model, seed=seeds), images[list(seeds)], **ROUNDING)


@pytest.mark.parametrize("seed", [3, np.int64(3)])
def test_an_integer_seed_counts_up(model: SPIGAN, images: Tensor, seed: Any) -> None:
    torch.testing.assert_close(pt(5, model=model, seed=seed), images[3:8], **ROUNDING)


def test_not_on_the_mode_of_the_model(images: Tensor) -> None:
    training = make().train()
    assert torch.equal(pt(9, model=training), images)
    assert training.training


def test_largest_seed(model: SPIGAN) -> None:
    assert pt(1, model=model, seed=2**63 - 1).isfinite().all()
    with pytest.raises(ValueError, match=re.escape(f"seeds must be in [0, 2**63), got {2**63}")):
        pt(2, model=model, seed=2**63 - 1)


# ---- What goes in ----


def test_noise_is_philox(model: SPIGAN, images: Tensor) -> None:
    z = torch.stack([philox_normal((3, 8, 8), seed=seed) for seed in range(9)])
    torch.testing.assert_close(pt(model=model, z=z), images, **ROUNDING)
    torch.testing.assert_close(pt(9, model=model, z=z, batch_size=2), images, **ROUNDING)
    # The arithmetic of the whole function, once more.
    with torch.no_grad():
        expected = (model(z, noise="const") + 1) / 2
    torch.testing.assert_close(images, expected.clamp(0, 1), **ROUNDING)


def test_sixteen_images_by_default(model: SPIGAN) -> None:
    assert pt(model=model).shape == (16, 3, 8, 8)


@pytest.mark.parametrize("t", [1.0, [0.0, 1.0]])  # of a sampler, which latents do not depend on
@pytest.mark.parametrize("batch_size", [2, 100])
def test_images_of_latents(model: SPIGAN, images: Tensor, t: Any, batch_size: int) -> None:
    z = torch.stack([philox_normal((3, 8, 8), seed=seed) for seed in range(9)])
    with torch.no_grad():
        h = model.mapping(z)
    sampler = Sampler(model, batch_size=batch_size, t=t)
    torch.testing.assert_close(sampler.of_latents(h), images, **ROUNDING)
    layers = h[:, None].expand(-1, model.generator.num_ws, -1)
    torch.testing.assert_close(sampler.of_latents(layers), images, **ROUNDING)
    assert sampler.of_latents(h[:0]).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match=r"h must have shape \[N, 16\] or .*, got \[., 8\]"):
        sampler.of_latents(h[:, :8])


def test_mlp_mapping() -> None:
    model = make(mapping="mlp")
    z = torch.stack([philox_normal((16,), seed=seed) for seed in (4, 5)])
    torch.testing.assert_close(pt(2, model=model, seed=4), pt(model=model, z=z), **ROUNDING)


def test_several_times(model: SPIGAN, images: Tensor) -> None:
    path = pt(9, model=model, t=[0.0, 0.5, 1.0], batch_size=4)
    assert path.shape == (3, 9, 3, 8, 8)
    torch.testing.assert_close(path[2], images, **ROUNDING)
    for row, t in enumerate((0.0, 0.5)):
        torch.testing.assert_close(path[row], pt(9, model=model, t=t), **ROUNDING)
    assert (path[0] - path[2]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close(model: SPIGAN, images: Tensor, dtype: torch.dtype) -> None:
    low = pt(9, model=model, dtype=dtype)
    assert low.dtype == torch.float32
    assert 1e-6 < (low - images).abs().max() < 0.03
    assert torch.equal(pt(9, model=model, dtype=torch.float32), images)


def test_backend_by_name(model: SPIGAN, images: Tensor) -> None:
    torch.testing.assert_close(pt(9, model=model, backend="reference"), images, rtol=0, atol=1e-4)
    with pytest.raises(BackendUnavailable, match=r"'cuda' .*cannot run on cpu"):
        pt(9, model=model, device="cpu", backend="cuda")
    assert backends.requested()[0] == "auto"  # the choice ended with the call
    assert torch.equal(pt(9, model=model), images)


def test_kernels_run_without_being_asked_for(model: SPIGAN, images: Tensor, noted_kernels: Any) -> None:
    with noted_kernels:
        assert torch.equal(pt(9, model=model, batch_size=9), images)
    assert {("philox_normal", "cpp"), ("fir_bias_act", "cpp"), ("rk4_mlp", "cpp")} <= set(noted_kernels.calls)
    noted_kernels.calls.clear()
    with noted_kernels:
        torch.testing.assert_close(pt(9, model=model, backend="reference"), images, rtol=0, atol=1e-4)
    assert noted_kernels.calls == []


def test_settings_do_not_leak_to_the_caller_between_batches(model: SPIGAN) -> None:
    for _ in Sampler(model, batch_size=1, dtype=torch.bfloat16, backend="reference").stream([0, 1]):
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert backends.requested()[0] == "auto"


def test_stream_yields_batches(model: SPIGAN, images: Tensor) -> None:
    batches = list(Sampler(model, batch_size=4).stream(range(9)))
    assert [batch.shape[0] for batch in batches] == [4, 4, 1]
    torch.testing.assert_close(torch.cat(batches), images, **ROUNDING)


@pytest.mark.parametrize(("resolution", "size"), [(8, 128), (128, 128), (256, 64), (512, 16), (1024, 4)])
def test_default_batch_size(resolution: int, size: int) -> None:
    assert default_batch_size(resolution) == size


# ---- What comes out ----


def test_output_types(model: SPIGAN, images: Tensor) -> None:
    assert images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    assert ((images > 0) & (images < 1)).float().mean() > 0.8  # not clamped away

    array = spigan.sample(9, model=model, output_type="np")
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    assert np.array_equal(array, images.permute(0, 2, 3, 1).numpy())

    pictures: Any = spigan.sample(9, model=model, output_type="pil")
    assert isinstance(pictures, list) and all(isinstance(p, Image) and p.mode == "RGB" for p in pictures)
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    assert np.abs(pixels - array * 255).max() <= 0.5001


def test_output_types_of_several_times(model: SPIGAN) -> None:
    t = [0.5, 1.0]
    array: Any = spigan.sample(3, model=model, t=t, output_type="np")
    assert array.shape == (2, 3, 8, 8, 3)
    rows: Any = spigan.sample(3, model=model, t=t, output_type="pil")
    assert [len(row) for row in rows] == [3, 3]
    assert np.abs(np.asarray(rows[0][2]) - array[0, 2] * 255).max() <= 0.5001


def test_grey_pictures() -> None:
    pictures: Any = spigan.sample(2, model=make(img_channels=1), output_type="pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 2


def test_no_images(model: SPIGAN) -> None:
    assert pt(0, model=model).shape == (0, 3, 8, 8)
    assert pt(model=model, seed=[]).shape == (0, 3, 8, 8)
    assert pt(model=model, z=torch.empty(0, 3, 8, 8)).shape == (0, 3, 8, 8)
    assert pt(0, model=model, t=[0.5, 1.0]).shape == (2, 0, 3, 8, 8)
    array: Any = spigan.sample(0, model=model, output_type="np")
    assert array.shape == (0, 8, 8, 3)
    assert spigan.sample(0, model=model, output_type="pil") == []
    assert spigan.sample(0, model=model, t=[0.5, 1.0], output_type="pil") == [[], []]


def test_the_result_can_be_trained_on(model: SPIGAN) -> None:
    """Not an inference tensor, which autograd refuses."""
    result = pt(2, model=model).requires_grad_(True)
    result.square().sum().backward()
    assert result.grad is not None


# ---- What is refused ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output_type": "jpg"}, ValueError, 'output_type must be "pt", "np" or "pil", got \'jpg\''),
        ({"n": -1}, ValueError, "n must not be negative, got -1"),
        ({"n": 2, "seed": [1, 2, 3]}, ValueError, "n is 2, but 3 seeds were given: leave out n"),
        ({"n": 2, "z": torch.zeros(3, 3, 8, 8)}, ValueError, "n is 2, but z holds 3: leave out n"),
        ({"z": torch.zeros(3, 1, 8, 8)}, ValueError, "z must have shape [N, 3, 8, 8], got [3, 1, 8, 8]"),
        ({"z": np.zeros((3, 3, 8, 8))}, TypeError, "z must be a torch.Tensor, got ndarray"),
        ({"seed": -1}, ValueError, "seeds must be in [0, 2**63), got -1"),
        ({"seed": [1, -5]}, ValueError, "seeds must be in [0, 2**63), got -5"),
        ({"seed": [1.5]}, TypeError, "'float' object cannot be interpreted as an integer"),
        ({"seed": "12"}, TypeError, "'str' object cannot be interpreted as an integer"),
        ({"t": 1.5}, ValueError, "t must be a time in [0, 1]"),
        ({"t": []}, ValueError, "a non-empty list of such times"),
        ({"batch_size": 0}, ValueError, "batch_size must be positive, got 0"),
        ({"batch_size": -2}, ValueError, "batch_size must be positive, got -2"),
        ({"dtype": torch.float64}, ValueError, "dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"dtype": torch.int32}, ValueError, "dtype must be float32, bfloat16 or float16, got torch.int32"),
        ({"backend": "tpu"}, ValueError, "names the backend 'tpu'; expected one of auto, reference"),
        ({"device": "nonsense"}, ValueError, "device must be auto, cpu, cuda, cuda:1, ..., got 'nonsense'"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' was asked for, but torch"),
    ],
)
def test_refused(model: SPIGAN, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        spigan.sample(**({"n": 2} if options.keys().isdisjoint({"n", "seed", "z"}) else {}), model=model, **options)


def test_resolve_seeds() -> None:
    assert resolve_seeds(3, 5) == [5, 6, 7]
    assert resolve_seeds(None, 0) == list(range(16))
    assert resolve_seeds(None, [4, 4]) == resolve_seeds(2, (4, 4)) == [4, 4]
    assert resolve_seeds(None, torch.tensor([4, 1])) == [4, 1]  # type: ignore[arg-type]


# ---- One evaluation of the generator per image ----


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (9, 4), (16, 128)])
def test_nfe_is_one(model: SPIGAN, n: int, batch_size: int) -> None:
    with count_evaluations(model) as count:
        pt(n, model=model, batch_size=batch_size)
    assert count[0] / n == 1


def test_evaluations_are_counted(model: SPIGAN) -> None:
    z = torch.zeros(3, 3, 8, 8)
    with count_evaluations(model) as count:
        assert count == [0]
        model(z)
        assert count == [3]
        model(z)
        assert count == [6]  # two calls for three images: NFE = 2
        model(z, t=[0.5, 1.0])
        assert count == [12]
    model(z)
    assert count == [12]


def test_counting_ends_after_an_error(model: SPIGAN) -> None:
    def fail() -> None:
        with count_evaluations(model):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not model.generator._forward_hooks


# ---- Which model ----


def test_model_by_folder(model: SPIGAN, images: Tensor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run" / "model")
    for path in (tmp_path / "run" / "model", str(tmp_path / "run" / "model"), tmp_path / "run", str(tmp_path / "run")):
        assert torch.equal(pt(9, model=path, device="cpu"), images)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no saved spigan model"):
        spigan.sample(1, model=tmp_path)


def test_hub_id_reaches_from_pretrained(model: SPIGAN, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def from_pretrained(name: str, device: torch.device) -> SPIGAN:
        asked.append((name, device))
        return model

    monkeypatch.setattr(SPIGAN, "from_pretrained", from_pretrained)
    assert load_model("user/name", "cpu") is model
    assert asked == [("user/name", torch.device("cpu"))]


def test_a_model_is_used_where_it_is() -> None:
    model = make()
    assert load_model(model) is model
    assert load_model(model, "cpu") is model
    elsewhere = load_model(model, "meta")
    assert elsewhere is not model
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert elsewhere.config == model.config and not elsewhere.training
    assert load_model(elsewhere) is elsewhere


def test_resolve_device() -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device().type == resolve_device("auto").type == here
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


def test_bundled_model() -> None:
    """`spigan.sample()` works right after install, without network: digits, which look like the data they come from."""
    config = load_model(device="cpu").config
    assert config.z_shape == (1, 16, 16)
    images = pt(64, device="cpu")
    assert images.shape == (64, 1, 16, 16)
    assert torch.equal(pt(64, device="cpu"), images)
    # Bright strokes on black, no two alike.
    assert images.amax(dim=(1, 2, 3)).min() > 0.7
    assert images[:, :, :, 0].mean() < 0.1
    assert 0.1 < images.mean() < 0.5
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(64)
    assert distances.min() > 0.5


def test_bundled_models_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    assert load_model(None, "cpu") is load_model("digits", "cpu")  # loaded once
    images = pt(8, model="cifar10-small", device="cpu")
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    assert torch.equal(pt(8, model="cifar10-small", device="cpu"), images)
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(8)
    assert distances.min() > 5  # every seed another image; white noise over the whole range is 22.6 apart
    # Photographs are smooth, in colour, and neither dark nor bright throughout.
    assert (images[..., 1:] - images[..., :-1]).abs().mean() < 0.1
    assert (images[:, 0] - images[:, 2]).abs().mean() > 0.01
    assert 0.3 < images.mean() < 0.7 and images.std() > 0.15


def test_card_of_a_bundled_model_is_of_its_weights() -> None:
    """Who replaces the weights has to measure them again."""
    folder = Path(sampling.__file__).parent / "assets" / "cifar10-small"
    assert (folder / "model.safetensors").stat().st_size < 10e6
    model = load_model("cifar10-small", "cpu")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert weights_sha256(model) in text
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in text


def test_a_folder_with_a_bundled_name(model: SPIGAN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is the bundled model whatever the working directory holds; ./name and a Path are the folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_model("./digits", "cpu")
    model.save_pretrained("digits")
    assert load_model("digits", "cpu").config.resolution == 16
    for folder in ("./digits", Path("digits"), str(tmp_path / "digits")):
        assert load_model(folder, "cpu").config == model.config
    with pytest.raises(FileNotFoundError, match=r"'digit' is neither .* nor a bundled model \(digits, cifar10-small\)"):
        load_model("digit", "cpu")


# ---- Sampler ----


def test_sampler(model: SPIGAN, images: Tensor) -> None:
    sampler = Sampler(model, batch_size=4)
    for seeds in (range(9), list(range(9)), torch.arange(9), np.arange(9)):
        torch.testing.assert_close(sampler(seeds), images, **ROUNDING)  # type: ignore[arg-type]
    torch.testing.assert_close(sampler([7, 2]), images[[7, 2]], **ROUNDING)
    assert sampler([]).shape == (0, 3, 8, 8) and list(sampler.stream([])) == []
    z = torch.stack([philox_normal((3, 8, 8), seed=seed) for seed in range(9)])
    torch.testing.assert_close(sampler.of_noise(z), images, **ROUNDING)


def test_sampler_gives_bytes(model: SPIGAN, images: Tensor) -> None:
    pixels = Sampler(model, output="uint8")(range(9), to="cpu")
    assert pixels.dtype == torch.uint8
    assert (pixels - 255 * images).abs().max() < 0.501


def test_sampler_of_several_times(model: SPIGAN) -> None:
    t = [1.0, 0.25]
    path = Sampler(model, batch_size=2, t=t)(range(5))
    torch.testing.assert_close(path, pt(5, model=model, t=t), **ROUNDING)
    assert [part.shape[:2] for part in Sampler(model, batch_size=2, t=t).stream(range(5))] == [(2, 2), (2, 2), (2, 1)]


def test_results_outlive_the_next_call(model: SPIGAN, images: Tensor) -> None:
    sampler = Sampler(model, batch_size=9)
    first = sampler(range(9))
    sampler(range(100, 109))
    torch.testing.assert_close(first, images, **ROUNDING)


@pytest.mark.parametrize("frozen", [True, False])
def test_changed_weights_show_in_the_next_call(frozen: bool) -> None:
    model = make().requires_grad_(not frozen)
    sampler = Sampler(model)
    before = sampler(range(3))
    assert torch.equal(pt(3, model=model), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = sampler(range(3))
    assert not torch.equal(after, before)
    assert torch.equal(pt(3, model=model), after)
    expected = (model(torch.stack([philox_normal((3, 8, 8), seed=s) for s in range(3)]), noise="const") + 1) / 2
    torch.testing.assert_close(after, expected.detach().clamp(0, 1), **ROUNDING)


def test_refresh_after_changes_that_leave_no_trace() -> None:
    model = make().requires_grad_(False)
    sampler = Sampler(model)
    before = sampler(range(3))
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    sampler.refresh()
    after = sampler(range(3))
    expected = (model(torch.stack([philox_normal((3, 8, 8), seed=s) for s in range(3)]), noise="const") + 1) / 2
    torch.testing.assert_close(after, expected.clamp(0, 1), **ROUNDING)
    assert not torch.equal(after, before)


def test_default_batch_counts_the_times(model: SPIGAN) -> None:
    assert Sampler(model).batch_size == 128
    assert Sampler(model, t=[0.0, 0.5, 1.0]).batch_size == 42


def test_samplers_are_kept_with_the_model() -> None:
    model = make()
    pt(3, model=model)
    (kept,) = model.__dict__["_samplers"].values()
    pt(3, model=model, seed=5)
    assert list(model.__dict__["_samplers"].values()) == [kept]
    pt(3, model=model, dtype=torch.bfloat16)
    with use_backend("reference"):
        pt(3, model=model)
    assert len(model.__dict__["_samplers"]) == 3
    for n in range(1, 12):
        pt(n, model=model)
    assert len(model.__dict__["_samplers"]) == 8
    copied = copy.deepcopy(model)
    assert not copied.__dict__["_samplers"]
    pt(2, model=copied)
    gone = weakref.ref(model)
    del model, kept
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "png"}, 'output must be "float" or "uint8", got \'png\''),
        ({"dtype": torch.float64}, "dtype must be float32, bfloat16 or float16"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"t": 2.0}, "t must be a time in [0, 1]"),
        ({"backend": "tpu"}, "backend= names the backend 'tpu'"),
    ],
)
def test_sampler_refuses(model: SPIGAN, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampler(model, **options)


class _NoGraph:
    """Stands in for a CUDA graph: it evaluates at once, and counts."""

    captured = 0

    def __init__(self, evaluate: Any, batch_size: int, device: Any, state: Any, generator: Any) -> None:
        type(self).captured += 1
        self.state, self.evaluate, self.batch_size, self.replays = state, evaluate, batch_size, 0

    def replay(self, seeds: Tensor) -> Tensor:
        assert seeds.shape == (self.batch_size,)
        self.replays += 1
        return self.evaluate(seeds)


def test_when_a_graph_is_captured(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_Graph", _NoGraph)
    _NoGraph.captured = 0
    model = make()
    sampler = Sampler(model, batch_size=4)
    sampler._use_graph = True  # as on a GPU
    sampler(range(4))
    assert _NoGraph.captured == 0  # the parameters may be trained
    model.requires_grad_(False)
    torch.testing.assert_close(sampler(range(9)), images, **ROUNDING)
    assert _NoGraph.captured == 1 and sampler._graph.replays == 2  # the ninth image alone is no full batch
    sampler(range(4, 8))
    assert _NoGraph.captured == 1 and sampler._graph.replays == 3  # other seeds, the same graph
    with count_evaluations(model) as count:
        sampler(range(4))
    assert count == [4] and sampler._graph.replays == 3
    model.generator.b8.torgb.bias.add_(0.1)
    brighter = sampler(range(4))
    assert _NoGraph.captured == 2
    assert (brighter - images[:4]).mean() > 0.03
    sampler.of_noise(torch.randn(4, 3, 8, 8))
    assert sampler._graph.replays == 1
    without = Sampler(model, batch_size=4, cuda_graph=False)
    without(range(4))
    assert not without._use_graph and _NoGraph.captured == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_on_a_gpu(dtype: torch.dtype, images: Tensor) -> None:
    model = make().requires_grad_(False).cuda()
    sampler = Sampler(model, batch_size=4, dtype=dtype)
    atol = 1e-2 if dtype == torch.bfloat16 else 2e-3  # cuDNN rounds float32 to TF32 by default
    for _ in range(2):
        result = sampler(range(9), to="cpu")
        assert result.is_pinned() and sampler._graph is not None
        torch.testing.assert_close(result, images, rtol=0, atol=atol)
    assert sampler(range(9)).is_cuda
    eager = Sampler(model, batch_size=4, dtype=dtype, cuda_graph=False)(range(9), to="cpu")
    torch.testing.assert_close(eager, result, rtol=0, atol=1e-5)
    model.generator.b8.torgb.bias.add_(0.1)
    assert (sampler(range(4), to="cpu") - images[:4]).mean() > 0.03


def test_samplers_of_several_threads() -> None:
    """The samplers that are kept change hands while other threads look for theirs."""
    model, errors = make(), []

    def work(step: int) -> None:
        try:
            for i in range(1500):
                sampling._kept_sampler(
                    model, batch_size=1 + i * step % 23, dtype=None, backend=None, t=1.0, output="float"
                )
        except KeyError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(step,)) for step in range(1, 7)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_noise_is_no_seeds(model: SPIGAN) -> None:
    with pytest.raises(TypeError, match=re.escape("z must be a tensor of floats, got torch.int64")):
        Sampler(model).of_noise(torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match=re.escape("z must be a tensor of floats, got torch.int64")):
        spigan.sample(model=model, z=torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match=r"seeds must be integers, one for each image, got 5: range\(5\)"):
        Sampler(model)(5)  # type: ignore[arg-type]


def test_an_adaptive_solver_has_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_Graph", _NoGraph)
    for solver, used in (("rk4", True), ("euler", True), ("dopri5", False)):
        sampler = Sampler(make(ode_solver=solver).requires_grad_(False))
        assert not sampler._use_graph
        monkeypatch.setattr(sampling, "load_model", lambda model, device: _elsewhere(model))
        assert Sampler(sampler.model)._use_graph == used
        monkeypatch.undo()
        monkeypatch.setattr(sampling, "_Graph", _NoGraph)


def _elsewhere(model: SPIGAN) -> Any:
    """A model that says it is on a GPU."""
    parameter = SimpleNamespace(device=torch.device("cuda", 0))
    return SimpleNamespace(config=model.config, parameters=lambda: iter([parameter]))


def test_a_graph_is_captured_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph without a stream takes that of the first device that ever captured."""
    seen: dict[str, Any] = {}
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def context(*args: Any, **options: Any) -> Any:
        seen.update(options)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    monkeypatch.setattr(torch.cuda, "device", context)
    monkeypatch.setattr(torch.cuda, "stream", context)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", context)
    generator: Any = SimpleNamespace(_prepared=None)
    sampling._Graph(lambda seeds: seeds, 2, torch.device("cpu"), (), generator)
    assert seen == {"stream": stream, "capture_error_mode": "thread_local"}


def test_batches_of_a_stream_outlive_the_next_replay(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    class OneBuffer(_NoGraph):
        def replay(self, seeds: Tensor) -> Tensor:
            result = super().replay(seeds)
            self.buffer = result.clone() if self.replays == 1 else self.buffer.copy_(result)
            return self.buffer

    monkeypatch.setattr(sampling, "_Graph", OneBuffer)
    sampler = Sampler(make().requires_grad_(False), batch_size=3)
    sampler._use_graph = True  # as on a GPU
    batches = list(sampler.stream(range(9)))
    torch.testing.assert_close(torch.cat(batches), images, **ROUNDING)
    assert not any(batch.is_inference() for batch in batches)
