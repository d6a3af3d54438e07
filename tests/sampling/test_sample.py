"""`spigan.sample`: an image depends on its seed and the weights alone; its arguments, results and errors."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

import spigan
from spigan import SPIGAN
from spigan.ops import BackendUnavailable, backends, philox_normal, use_backend
from spigan.sampling.sample import MAX_SAMPLERS, count_evaluations, kept_sampler

# Another batch size may take another path through the CPU's convolutions and so round differently.
ROUNDING = {"rtol": 0.0, "atol": 2e-6}


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


def test_not_on_the_mode_of_the_model(images: Tensor, make: Any) -> None:
    training = make().train()
    assert torch.equal(pt(9, model=training), images)
    assert training.training


def test_largest_seed(model: SPIGAN) -> None:
    assert pt(1, model=model, seed=2**63 - 1).isfinite().all()
    with pytest.raises(ValueError, match=re.escape(f"seeds must be in [0, 2**63), got {2**63}")):
        pt(2, model=model, seed=2**63 - 1)


# ---- Arguments ----


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


def test_mlp_mapping(make: Any) -> None:
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


# ---- Results ----


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


def test_grey_pictures(make: Any) -> None:
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


# ---- Errors ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"output_type": "jpg"}, ValueError, 'output_type must be "pt", "np" or "pil", got \'jpg\''),
        ({"n": -1}, ValueError, "n must not be negative, got -1"),
        ({"n": 2, "seed": [1, 2, 3]}, ValueError, "n is 2, but 3 seeds were given: leave out n"),
        ({"n": 2, "z": torch.zeros(3, 3, 8, 8)}, ValueError, "n is 2, but z holds noise for 3 images: leave out n"),
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
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' was requested, but torch"),
    ],
)
def test_refused(model: SPIGAN, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        spigan.sample(**({"n": 2} if options.keys().isdisjoint({"n", "seed", "z"}) else {}), model=model, **options)


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


# ---- Samplers are kept ----


OPTIONS: dict[str, Any] = {"batch_size": None, "dtype": None, "backend": None, "t": 1.0, "output": "float"}


def test_samplers_are_kept_with_the_model(make: Any) -> None:
    model = make()
    pt(3, model=model)
    kept = kept_sampler(model, **OPTIONS)
    pt(3, model=model, seed=5)
    assert list(model.kept_samplers.values()) == [kept]
    pt(3, model=model, dtype=torch.bfloat16)
    with use_backend("reference"):
        pt(3, model=model)
    assert len(model.kept_samplers) == 3 and kept_sampler(model, **OPTIONS) is kept
    gone = weakref.ref(model)
    del model, kept
    gc.collect()
    assert gone() is None


def test_samplers_used_long_ago_are_dropped(make: Any) -> None:
    model = make()
    first, second = (kept_sampler(model, **OPTIONS | {"batch_size": n}) for n in (1, 2))
    for n in range(3, MAX_SAMPLERS + 2):
        kept_sampler(model, **OPTIONS | {"batch_size": n})
        assert kept_sampler(model, **OPTIONS | {"batch_size": 1}) is first
    assert len(model.kept_samplers) == MAX_SAMPLERS
    assert kept_sampler(model, **OPTIONS | {"batch_size": 2}) is not second


def test_a_copy_starts_without_samplers(make: Any) -> None:
    model = make()
    before = pt(3, model=model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not copied.kept_samplers
        torch.nn.init.zeros_(copied.generator.b8.torgb.weight)
        assert not torch.equal(pt(3, model=copied), before)
    assert torch.equal(pt(3, model=model), before)


def test_samplers_of_several_threads(make: Any) -> None:
    """The samplers that are kept change hands while other threads look for theirs."""
    model, errors = make(), []

    def work(step: int) -> None:
        try:
            for i in range(1500):
                kept_sampler(model, **OPTIONS | {"batch_size": 1 + i * step % 23})
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
