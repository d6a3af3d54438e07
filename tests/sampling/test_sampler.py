"""`Sampler`: batches, latents, what it keeps and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spigan
from spigan import SPIGAN, Sampler
from spigan.ops import backends, philox_normal

# Another batch size may take another path through the CPU's convolutions and so round differently.
ROUNDING = {"rtol": 0.0, "atol": 2e-6}


def pt(*args: Any, **options: Any) -> Tensor:
    result = spigan.sample(*args, **options)
    assert isinstance(result, Tensor)
    return result


def test_sampler(model: SPIGAN, images: Tensor) -> None:
    sampler = Sampler(model, batch_size=4)
    for seeds in (range(9), list(range(9)), torch.arange(9), np.arange(9)):
        torch.testing.assert_close(sampler(seeds), images, **ROUNDING)  # type: ignore[arg-type]
    torch.testing.assert_close(sampler([7, 2]), images[[7, 2]], **ROUNDING)
    assert sampler([]).shape == (0, 3, 8, 8) and list(sampler.stream([])) == []
    z = torch.stack([philox_normal((3, 8, 8), seed=seed) for seed in range(9)])
    torch.testing.assert_close(sampler.of_noise(z), images, **ROUNDING)


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


def test_sampler_gives_bytes(model: SPIGAN, images: Tensor) -> None:
    pixels = Sampler(model, output="uint8")(range(9), to="cpu")
    assert pixels.dtype == torch.uint8
    assert (pixels - 255 * images).abs().max() < 0.501


def test_sampler_of_several_times(model: SPIGAN) -> None:
    t = [1.0, 0.25]
    path = Sampler(model, batch_size=2, t=t)(range(5))
    torch.testing.assert_close(path, pt(5, model=model, t=t), **ROUNDING)
    assert [part.shape[:2] for part in Sampler(model, batch_size=2, t=t).stream(range(5))] == [(2, 2), (2, 2), (2, 1)]


def test_stream_yields_batches(model: SPIGAN, images: Tensor) -> None:
    batches = list(Sampler(model, batch_size=4).stream(range(9)))
    assert [batch.shape[0] for batch in batches] == [4, 4, 1]
    torch.testing.assert_close(torch.cat(batches), images, **ROUNDING)


def test_settings_do_not_leak_to_the_caller_between_batches(model: SPIGAN) -> None:
    for _ in Sampler(model, batch_size=1, dtype=torch.bfloat16, backend="reference").stream([0, 1]):
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert backends.requested()[0] == "auto"


def test_results_outlive_the_next_call(model: SPIGAN, images: Tensor) -> None:
    sampler = Sampler(model, batch_size=9)
    first = sampler(range(9))
    sampler(range(100, 109))
    torch.testing.assert_close(first, images, **ROUNDING)


@pytest.mark.parametrize("frozen", [True, False])
def test_changed_weights_show_in_the_next_call(frozen: bool, make: Any) -> None:
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


def test_refresh_after_changes_that_leave_no_trace(make: Any) -> None:
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


def test_the_batch_size_of_a_sampler_is_fixed(model: SPIGAN) -> None:
    sampler = Sampler(model, batch_size=3)
    with pytest.raises(AttributeError):
        sampler.batch_size = 4  # type: ignore[misc]
    assert sampler.batch_size == 3


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


def test_noise_is_no_seeds(model: SPIGAN) -> None:
    with pytest.raises(TypeError, match=re.escape("z must be a tensor of floats, got torch.int64")):
        Sampler(model).of_noise(torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match=re.escape("z must be a tensor of floats, got torch.int64")):
        spigan.sample(model=model, z=torch.tensor([1, 2, 3]))
    with pytest.raises(TypeError, match=r"seeds must be integers, one for each image, got 5: use range\(5\)"):
        Sampler(model)(5)  # type: ignore[arg-type]
