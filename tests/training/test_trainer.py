"""Algorithm 1 step by step: who is updated when, with which gradients, times, noise and averages."""

from __future__ import annotations

import importlib
import itertools
import math
import re
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import Tensor, nn

from spigan.models.discriminator import minibatch_std
from spigan.models.load import resolve_device
from spigan.ops import path_interpolate
from spigan.ops.backends import use_backend
from spigan.runs import read_stats
from spigan.training import algorithm1, updates
from spigan.training.algorithm1 import draw_times
from spigan.training.checkpoint import checkpoints, load_checkpoint
from spigan.training.losses import fake_loss, generator_loss, path_lengths, r1_penalty, real_loss
from spigan.training.state import adam
from spigan.training.trainer import Trainer
from spigan.training.updates import interleave


def digits(trainer: Trainer, n: int | None = None, start: int = 0) -> Tensor:
    return trainer.dataset.__getitems__(range(start, start + (n or trainer.config.batch)))


def train(trainer: Trainer, iterations: int) -> None:
    for number in range(iterations):
        trainer.train_iteration(digits(trainer, start=number * trainer.config.batch))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.named_parameters() if torch.equal(tensor, before[name])}


def spy(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """Let `target.name` append note(*args, **kwargs) to the returned list at each call, before it does its work."""
    calls: list[Any] = []
    original = getattr(target, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(note(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, wrapper)
    return calls


def keep_gradients(monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> list[dict[str, Tensor]]:
    """Replace optimiser steps by notes of the gradients: weights stay as they are."""
    gradients: list[dict[str, Tensor]] = []
    for optimizer, module in (
        (trainer.state.optimizer_d, trainer.discriminator),
        (trainer.state.optimizer_g, trainer.model),
    ):

        def note(module: nn.Module = module) -> None:
            gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

        monkeypatch.setattr(optimizer, "step", note)
    return gradients


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert max(g.abs().max() for g in expected.values()) > 1e-3, "nothing to compare"
    for name, gradient in expected.items():
        close = torch.allclose(actual[name], gradient, rtol=1e-4, atol=1e-6)
        assert close, f"{name} differs by {(actual[name] - gradient).abs().max():.2e}"


# ---- Who is updated ----


@pytest.mark.parametrize("updates", ["sequential", "joint"])
def test_iterations_alternate(new_trainer, updates):
    trainer = new_trainer(updates=updates)
    for iteration in range(4):
        model, ema, discriminator = weights(trainer.model), weights(trainer.ema), weights(trainer.discriminator)
        train(trainer, 1)
        if iteration % 2 == 0:
            assert unchanged(trainer.model, model) == set(model)
            assert unchanged(trainer.ema, ema) == set(ema)
            assert unchanged(trainer.discriminator, discriminator) == set()
        else:
            assert unchanged(trainer.discriminator, discriminator) == set(discriminator)
            assert unchanged(trainer.model, model) == set()
            assert unchanged(trainer.ema, ema) == set()


@pytest.mark.parametrize(("updates", "steps"), [("sequential", 3), ("joint", 1)])
def test_optimiser_steps_per_iteration(new_trainer, monkeypatch, updates, steps):
    trainer = new_trainer(updates=updates, intervals=3, r1_gamma=0)
    d = spy(monkeypatch, trainer.state.optimizer_d, "step", lambda: "d")
    g = spy(monkeypatch, trainer.state.optimizer_g, "step", lambda: "g")
    train(trainer, 1)
    assert (len(d), len(g)) == (steps, 0)
    train(trainer, 1)
    assert (len(d), len(g)) == (steps, steps)


# ---- Times ----


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_fixed_times(k):
    assert draw_times(k, fixed=True) == pytest.approx([j / k for j in range(1, k + 1)], abs=1e-15)
    assert draw_times(k, fixed=True)[-1] == 1.0


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_random_times(k):
    drawn = np.array([draw_times(k) for _ in range(2000)])
    assert drawn.shape == (2000, k)
    assert (drawn[:, -1] == 1.0).all() and (drawn > 0).all() and (np.diff(drawn, axis=1) > 0).all()
    if k > 1:
        # The k - 1 inner times are sorted uniform numbers: in random order uniform, the smallest Beta(1, k - 1), ...
        shuffled = np.random.default_rng(0).permuted(drawn[:, :-1], axis=1)[:, 0]
        assert scipy.stats.kstest(shuffled, "uniform").pvalue > 0.01
        assert scipy.stats.kstest(drawn[:, 0], "beta", (1, k - 1)).pvalue > 0.01
        assert scipy.stats.kstest(drawn[:, -2], "beta", (k - 1, 1)).pvalue > 0.01


def test_times_of_an_iteration_are_those_of_path_mapping_and_discriminator(new_trainer, monkeypatch):
    trainer = new_trainer(intervals=3, r1_gamma=0)
    path = spy(monkeypatch, algorithm1, "path_interpolate", lambda x, times, **_: list(times))
    mapping = spy(monkeypatch, trainer.model.mapping, "forward", lambda z, t: list(t))
    seen = spy(monkeypatch, trainer.discriminator, "forward", lambda images, t: t.unique().tolist())
    train(trainer, 2)
    first, second = path
    assert len(set(first + second)) == 5  # drawn anew; both end in 1
    assert mapping == [first, *([t] for t in second)]
    # Generated and real images of a D step, then generated ones of a G step.
    expected = [[t] for t in first for _ in range(2)] + [[t] for t in second]
    assert seen == [pytest.approx(times) for times in expected]


# ---- The mapping is solved once for a D iteration, anew for each G update ----


@pytest.mark.parametrize(
    ("updates", "evaluations"),
    [
        # RK4 with 4 steps over [0, 1] evaluates r 16 times. D: once to 1. G: to 1/2 and again to 1, 8 + 16.
        ("sequential", [16, 24]),
        ("joint", [16, 16]),
    ],
)
def test_evaluations_of_the_vector_field(new_trainer, monkeypatch, updates, evaluations):
    trainer = new_trainer(intervals=2, fixed_t=True, updates=updates, model={"ode_steps": 4})
    rk4_mlp = importlib.import_module("spigan.ops.rk4_mlp")
    calls = spy(monkeypatch, rk4_mlp, "mlp_vector_field", lambda *_: torch.is_grad_enabled())
    with use_backend("reference"):
        train(trainer, 1)
        assert calls == [False] * evaluations[0]
        calls.clear()
        train(trainer, 1)
        assert calls == [True] * evaluations[1]


def test_each_generator_update_sees_the_weights_of_the_last(new_trainer, monkeypatch):
    trainer = new_trainer(intervals=3)
    used = spy(monkeypatch, trainer.model.mapping, "forward", lambda *_: trainer.model.mapping.weight.detach().clone())
    train(trainer, 2)
    in_d, *in_g = used
    assert len(in_g) == 3
    assert torch.equal(in_d, in_g[0])
    assert not torch.equal(in_g[0], in_g[1]) and not torch.equal(in_g[1], in_g[2])


# ---- Gradients ----


def case(trainer: Trainer, n: int, times: list[float]) -> tuple[Tensor, Tensor]:
    """x_T [N, C, H, W] and i [K, N, C, H, W] of digits."""
    return path_interpolate(digits(trainer, n), times, seed=1)


def without_noise(trainer: Trainer) -> Trainer:
    trainer.model.eval()  # the generator's noise is then a constant; nothing else depends on the mode
    return trainer


def test_discriminator_gradient(new_trainer, monkeypatch):
    """The gradient of a D step is that of -log D(i(t)) - log(1 - D(G(h(t)))), and only D's."""
    trainer = without_noise(new_trainer(r1_gamma=0))
    x_T, i = case(trainer, 4, [0.3])
    t = torch.full((4,), 0.3)
    fake = trainer.model(x_T, 0.3)
    d = trainer.discriminator
    loss = real_loss(d(i[0], t)) + fake_loss(d(fake.detach(), t))
    loss.backward()
    expected = {name: p.grad.clone() for name, p in d.named_parameters() if p.grad is not None}
    gradients = keep_gradients(monkeypatch, trainer)
    trainer.algorithm.update.discriminator(i, trainer.model.mapping(x_T, [0.3]), [0.3])
    assert_gradients_close(gradients[0], expected)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_generator_gradient(new_trainer, monkeypatch):
    trainer = without_noise(new_trainer())
    x_T, _ = case(trainer, 4, [0.3])
    generator_loss(trainer.discriminator(trainer.model(x_T, 0.3), torch.full((4,), 0.3))).backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.state.optimizer_d.zero_grad()
    gradients = keep_gradients(monkeypatch, trainer)
    trainer.algorithm.update.generator(x_T, [0.3])
    assert_gradients_close(gradients[0], expected)
    assert all(p.grad is None for p in trainer.discriminator.parameters())


def test_r1_gradient(new_trainer, monkeypatch):
    """gamma / 2 times the penalty on real i(t), times the number of steps it stands for; in a step of its own."""
    trainer = without_noise(new_trainer(r1_gamma=3.0, r1_interval=5))
    _, i = case(trainer, 4, [0.3])
    real = i[0].clone().requires_grad_()
    (5 * 3.0 / 2 * r1_penalty(trainer.discriminator(real, torch.full((4,), 0.3)), real)).backward()
    expected = {name: p.grad.clone() for name, p in trainer.discriminator.named_parameters() if p.grad is not None}
    gradients = keep_gradients(monkeypatch, trainer)
    trainer.algorithm.update.r1(i, [0.3])
    assert len(gradients) == 1
    assert_gradients_close(gradients[0], expected)


def test_path_length_gradient(new_trainer, monkeypatch):
    """Weight times interval times (length - mean length)^2 of half the images, in a step of its own."""
    trainer = without_noise(new_trainer(pl_weight=2.0, pl_interval=3, pl_batch_shrink=2, pl_decay=0.25))
    x_T, _ = case(trainer, 4, [0.3])
    trainer.state.pl_mean.fill_(1.0)
    h = trainer.model.mapping(x_T[:2], 0.3)[:, None].expand(-1, trainer.model.generator.num_ws, -1)
    torch.manual_seed(3)
    lengths = path_lengths(trainer.model.generator(h), h)
    mean = 0.75 * 1.0 + 0.25 * lengths.mean().item()
    (2.0 * 3 * (lengths - mean).square().mean()).backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    gradients = keep_gradients(monkeypatch, trainer)
    torch.manual_seed(3)
    trainer.algorithm.update.path_length(x_T, [0.3])
    assert len(gradients) == 1
    assert trainer.state.pl_mean.item() == pytest.approx(mean, rel=1e-5)
    assert_gradients_close(gradients[0], expected)


@pytest.mark.parametrize(
    ("batch", "mbstd_group"),
    # In the last two the group does not divide the batch: it must be reduced as for a single time, not mix times.
    [(4, 1), (4, 2), (8, 4), (4, 3), (2, 4)],
)
def test_joint_gradient_is_the_mean_of_sequential_ones(new_trainer, monkeypatch, batch, mbstd_group):
    trainer = without_noise(new_trainer(batch=batch, mbstd_group=mbstd_group, intervals=3, r1_gamma=0.5, r1_interval=1))
    times = [0.2, 0.7, 1.0]
    x_T, i = case(trainer, batch, times)
    h = trainer.model.mapping(x_T, times).detach()
    gradients = keep_gradients(monkeypatch, trainer)
    trainer.algorithm.update.discriminator(i, h, times)
    trainer.algorithm.update.r1(i, times)
    trainer.algorithm.update.generator(x_T, times)
    joint, gradients[:] = gradients[:], []
    for k, t in enumerate(times):
        trainer.algorithm.update.discriminator(i[[k]], h[[k]], [t])
        trainer.algorithm.update.r1(i[[k]], [t])
        trainer.algorithm.update.generator(x_T, [t])
    assert len(joint) == 3 and len(gradients) == 9  # D, R1, G, for each time
    for kind in range(3):
        each = gradients[kind::3]
        mean = {name: sum(g[name] for g in each) / 3 for name in joint[kind]}
        assert_gradients_close(joint[kind], mean)


@pytest.mark.parametrize("times", [[0.4], [0.4, 1.0]])
def test_gradients_accumulate(new_trainer, monkeypatch, times):
    """batch_gpu images at a time give the gradients of the whole minibatch, R1's too."""
    found = {}
    for batch_gpu in (None, 2):
        trainer = without_noise(new_trainer(batch=6, batch_gpu=batch_gpu, mbstd_group=1, r1_gamma=1.0))
        sizes = spy(monkeypatch, trainer.discriminator, "forward", lambda images, t: len(images))
        x_T, i = case(trainer, 6, times)
        gradients = keep_gradients(monkeypatch, trainer)
        trainer.algorithm.update.discriminator(i, trainer.model.mapping(x_T, times).detach(), times)
        trainer.algorithm.update.r1(i, times)
        trainer.algorithm.update.generator(x_T, times)
        assert set(sizes) == {(batch_gpu or 6) * len(times)}
        found[batch_gpu] = gradients
    for pieces, whole in zip(found[2], found[None], strict=True):
        assert_gradients_close(pieces, whole)
    assert len(found[2]) == 3  # D, R1, G


def test_interleaved_groups_hold_one_time(new_trainer, monkeypatch):
    """The statistic of the minibatch must not tell D which times lie side by side in it."""
    x = torch.randn(3, 8, 2, 4, 4)  # [k, N, C, H, W]
    flat = interleave(x)
    for n, k in itertools.product(range(8), range(3)):
        assert torch.equal(flat[n * 3 + k], x[k, n])
    trainer = new_trainer(batch=2, intervals=3)
    seen = spy(monkeypatch, trainer.discriminator, "forward", lambda images, t: t.tolist())
    trainer.algorithm.update.r1(torch.randn(3, 2, 1, 8, 8), [0.2, 0.5, 1.0])
    assert seen == [pytest.approx([0.2, 0.5, 1.0, 0.2, 0.5, 1.0])]
    assert torch.equal(minibatch_std(flat, 4), interleave(torch.stack([minibatch_std(part, 4) for part in x])))


# ---- Lazy regularisation ----


def times_of_penalties(monkeypatch, trainer, method: str, iterations: int) -> list[tuple[int, list[float]]]:
    """(iteration, times) of every call of a penalty."""
    calls = []
    original = getattr(trainer.algorithm.update, method)

    def record(tensor, times):
        calls.append((trainer.iteration, times))
        original(tensor, times)

    monkeypatch.setattr(trainer.algorithm.update, method, record)
    train(trainer, iterations)
    return calls


@pytest.mark.parametrize("intervals", [1, 2, 3, 4])
@pytest.mark.parametrize("updates", ["sequential", "joint"])
def test_lazy_r1_meets_every_time(new_trainer, monkeypatch, updates, intervals):
    """Counted in steps, R1 of K = 2 would fall on t_1 every time, and no clean image would be regularised."""
    trainer = new_trainer(r1_interval=4, updates=updates, intervals=intervals, fixed_t=True)
    calls = times_of_penalties(monkeypatch, trainer, "r1", 16)
    path = [(k + 1) / intervals for k in range(intervals)]
    expected = [path] if updates == "joint" else [[t] for t in path]
    assert calls == [(iteration, times) for iteration in (0, 8) for times in expected]


def test_lazy_path_length_meets_every_time(new_trainer, monkeypatch):
    trainer = new_trainer(pl_weight=1.0, pl_interval=3, intervals=2, fixed_t=True)
    calls = times_of_penalties(monkeypatch, trainer, "path_length", 12)
    assert calls == [(1, [0.5]), (1, [1.0]), (7, [0.5]), (7, [1.0])]
    assert trainer.state.pl_mean.item() > 0


def test_no_regularisation_of_weight_zero(new_trainer, monkeypatch):
    trainer = new_trainer(r1_gamma=0, r1_interval=1, pl_weight=0, pl_interval=1)
    calls = [spy(monkeypatch, updates, name, lambda *_: 1) for name in ("r1_penalty", "path_lengths")]
    train(trainer, 4)
    assert calls == [[], []]


def test_adam_is_corrected_for_lazy_regularisation(new_trainer):
    """A penalty with a step of its own makes interval + 1 steps of interval: lr and log(beta2) shrink in that ratio."""
    fields = {"lr_g": 1e-3, "lr_d": 2e-3, "beta2": 0.9, "r1_interval": 16, "pl_interval": 4}
    cases = [
        ({"r1_gamma": 0, "pl_weight": 0}, 1.0, 1.0),
        ({"r1_gamma": 1, "pl_weight": 0}, 1.0, 16 / 17),
        ({"r1_gamma": 0, "pl_weight": 1}, 4 / 5, 1.0),
    ]
    for changes, ratio_g, ratio_d in cases:
        trainer = new_trainer(**fields | changes)
        for optimizer, lr, ratio in (
            (trainer.state.optimizer_g, 1e-3, ratio_g),
            (trainer.state.optimizer_d, 2e-3, ratio_d),
        ):
            (group,) = optimizer.param_groups
            assert group["lr"] == pytest.approx(lr * ratio)
            assert group["betas"] == (0.0, pytest.approx(0.9**ratio))
            assert group["eps"] == 1e-8 and group["weight_decay"] == 0


def test_adam_step():
    """The first step of Adam with beta1 = 0 moves every weight by lr against its gradient's sign."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = adam(iter([weight]), 0.1, 0.99, None)
    weight.grad = torch.tensor([5.0, -0.01, 2.0])
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.tensor([0.9, -1.9, 2.9]), rtol=0, atol=1e-5)


# ---- Averaged weights ----


def fill(module: nn.Module, value: float) -> None:
    for parameter in module.parameters():
        parameter.data.fill_(value)


@pytest.mark.parametrize(
    ("ema_kimg", "ema_rampup", "seen"),
    [
        (0.04, None, 0),  # 40 images
        (0.04, None, 10**6),
        (500, 0.05, 800),  # rampup: 5 % of 800
        (0.04, 0.05, 10**6),  # rampup done
    ],
)
def test_ema_half_life(new_trainer, ema_kimg, ema_rampup, seen):
    """After a half-life of 40 images, however they come in batches, the old weights count one half."""
    for batches in ([8] * 5, [40], [10, 30]):
        trainer = new_trainer(ema_kimg=ema_kimg, ema_rampup=ema_rampup)
        trainer.state.images_seen = seen
        fill(trainer.ema, 0.0)
        fill(trainer.model, 1.0)
        for batch in batches:
            trainer.algorithm.update.average_weights(batch)
        for parameter in trainer.ema.parameters():
            torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5), rtol=0, atol=1e-5)


def test_ema_of_half_life_zero_is_the_model(new_trainer):
    trainer = new_trainer(ema_kimg=0)
    train(trainer, 2)
    assert unchanged(trainer.ema, weights(trainer.model)) == set(weights(trainer.model))


def test_ema_update_counts_the_images_of_an_iteration(new_trainer, monkeypatch):
    trainer = new_trainer()
    images = spy(monkeypatch, trainer.algorithm.update, "average_weights", lambda images: images)
    train(trainer, 4)
    assert images == [4, 4]
    assert not trainer.ema.training and not any(p.requires_grad for p in trainer.ema.parameters())


# ---- Variants ----


def test_mlp_mapping_is_stylegan2(new_trainer, monkeypatch):
    """K = 1 and no time anywhere: D is StyleGAN2's, real images are clean, z is a vector."""
    trainer = new_trainer(model={"mapping": "mlp"}, intervals=1)
    assert not [name for name, _ in trainer.discriminator.named_parameters() if "time" in name]
    assert [name for name, _ in new_trainer().discriminator.named_parameters() if "time" in name]
    z = spy(monkeypatch, trainer.model.mapping, "forward", lambda z, t: (z.clone(), list(t)))
    seen = spy(monkeypatch, trainer.discriminator, "forward", lambda images, t: images.detach())
    train(trainer, 2)
    assert [(z.shape, times) for z, times in z] == [((4, 16), [1.0])] * 2
    assert not torch.equal(z[0][0], z[1][0])
    clean = digits(trainer).float() / 127.5 - 1
    torch.testing.assert_close(seen[1], clean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(new_trainer, precision, dtype):
    trainer = new_trainer(precision=precision, r1_interval=2, pl_weight=1.0)
    dtypes = set()
    layers = [trainer.discriminator.blocks[0].conv1, trainer.model.generator.b8.conv1]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: dtypes.add(args[0].dtype))
    train(trainer, 6)
    assert dtypes == {dtype}
    recorded = trainer.state.statistics.series()
    assert {"loss_d", "loss_g", "r1", "path_length_penalty"} <= recorded.keys()
    assert all(math.isfinite(value) for values in recorded.values() for value in values)
    assert {p.dtype for p in itertools.chain(trainer.model.parameters(), trainer.ema.parameters())} == {torch.float32}


@pytest.mark.parametrize(("target", "signs"), [(-1.0, 1), (1.0, -1)])
def test_ada_moves_p(new_trainer, target, signs):
    """Every 4 D iterations by 4 batches of 1000 kimg images, whatever K; up where D is surer than the target."""
    trainer = new_trainer(augment="ada", ada_target=target, ada_kimg=0.4)
    trainer.state.augment.p.fill_(0.5)
    train(trainer, 7)
    assert trainer.state.augment.p.item() == pytest.approx(0.5 + signs * 0.04) and not trainer.state.ada_signs
    train(trainer, 8)
    assert trainer.state.augment.p.item() == pytest.approx(0.5 + signs * 0.08)


@pytest.mark.parametrize("name", ["diffaug", "ada"])
def test_discriminator_sees_augmented_images(new_trainer, monkeypatch, name):
    """One and the same augmentation for real and generated images, in both kinds of iteration and in R1."""
    trainer = new_trainer(augment=name, r1_interval=1, intervals=1)
    if name == "ada":
        trainer.state.augment.p.fill_(1.0)
    given = spy(monkeypatch, trainer.state.augment, "forward", lambda images, rows: images.detach().clone())
    seen = spy(monkeypatch, trainer.discriminator, "forward", lambda images, t: images.detach().clone())
    train(trainer, 2)
    assert len(given) == len(seen) == 4  # D: generated, real, R1; G: generated
    assert all((before != after).flatten(1).any(1).all() for before, after in zip(given, seen, strict=True))
    clean = digits(trainer).float() / 127.5 - 1
    for real in given[1:3]:
        torch.testing.assert_close(real, clean, rtol=0, atol=1e-6)
    assert all(math.isfinite(value) for values in trainer.state.statistics.series().values() for value in values)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("xflip", [False, True])
def test_xflip(new_trainer, monkeypatch, xflip):
    trainer = new_trainer(xflip=xflip)
    taken = []

    def take(images, times, **kwargs):
        taken.append(path_interpolate(images, [1.0], **kwargs)[1][0])  # i(1), the clean images
        raise _Stop

    monkeypatch.setattr(algorithm1, "path_interpolate", take)
    images = torch.randint(0, 256, (1000, 1, 8, 8), dtype=torch.uint8)
    with pytest.raises(_Stop):
        trainer.train_iteration(images)
    same, mirrored = (
        torch.isclose(taken[0], x.float() / 127.5 - 1, rtol=0, atol=1e-6).flatten(1).all(1)
        for x in (images, images.flip(3))
    )
    assert (same ^ mirrored).all()
    assert mirrored.sum().item() == 0 if not xflip else 430 < mirrored.sum().item() < 570  # 500 +- 4.4 sigma


def test_kernels_run_without_being_asked_for(new_trainer, noted_kernels):
    trainer = new_trainer()
    with noted_kernels:
        train(trainer, 2)  # one iteration of the discriminator, one of the generator
    expected = {("path_interpolate", "cpp"), ("rk4_mlp", "cpp"), ("rk4_mlp_backward", "")}
    assert expected | {("fir_bias_act", "cpp"), ("bias_act_backward", "cpp")} <= set(noted_kernels.calls)
    assert noted_kernels.calls.count(("path_interpolate", "cpp")) == 2
    noted_kernels.calls.clear()
    with noted_kernels, use_backend("reference"):
        train(trainer, 2)
    assert noted_kernels.calls == []


# ---- Noise and counters ----


def test_no_noise_is_used_twice(new_trainer, monkeypatch):
    trainer = new_trainer(seed=7)
    calls = spy(
        monkeypatch, algorithm1, "path_interpolate", lambda x, times, **kw: (kw["seed"], kw["offset"], x.numel())
    )
    train(trainer, 4)
    assert [seed for seed, _, _ in calls] == [2**32 + 7] * 4  # a stream that no sample's seed reaches
    assert [offset for _, offset, _ in calls] == [0, 256, 512, 768] and {n for _, _, n in calls} == {4 * 64}
    assert trainer.state.noise_offset == 1024


def test_images_are_counted_once_whatever_k(new_trainer):
    trainer = new_trainer(intervals=3)
    counts = []
    for _ in range(4):
        train(trainer, 1)
        counts.append((trainer.iteration, trainer.images_seen))
    assert counts == [(1, 4), (2, 4), (3, 8), (4, 8)]


@pytest.mark.parametrize(("total_kimg", "seen"), [(0.008, 8), (0.009, 12), (0.0001, 4)])
def test_fit_ends_after_total_kimg_with_a_generator_iteration(new_trainer, total_kimg, seen):
    trainer = new_trainer(total_kimg=total_kimg)
    ema = trainer.fit()
    assert ema is trainer.ema and not trainer.interrupted
    assert trainer.images_seen == seen and trainer.state.images_drawn == 2 * seen and trainer.iteration == seen // 2


def test_every_iteration_draws_new_images(new_trainer, monkeypatch):
    """D and G iterations take turns in one shuffled stream: no image comes again before the epoch ends."""
    trainer = new_trainer(total_kimg=0.08)
    taken = spy(monkeypatch, trainer, "train_iteration", lambda images: images)
    monkeypatch.setattr(trainer, "train_iteration", _counting(trainer, taken))
    trainer.fit()
    images = torch.cat(taken).flatten(1)
    assert len(images) == 160
    assert len(images.unique(dim=0)) == len(images)


def _counting(trainer: Trainer, taken: list[Tensor]) -> Callable[[Tensor], None]:
    """In place of training: count only."""

    def iteration(images: Tensor) -> None:
        taken.append(images)
        trainer.state.images_seen += len(images) * (trainer.iteration % 2 == 0)
        trainer.state.record(loss_d=torch.zeros(()), loss_g=torch.zeros(()))
        trainer.state.iteration += 1

    return iteration


def test_same_seed_same_run_other_seed_other_run(new_trainer):
    first, same, other = (new_trainer(seed=seed) for seed in (0, 0, 1))
    for trainer in (first, same, other):
        torch.manual_seed(trainer.config.seed)
        train(trainer, 2)
    assert unchanged(first.model, weights(same.model)) == set(weights(first.model))
    assert "generator.b8.conv1.weight" not in unchanged(first.model, weights(other.model))


def test_errors_of_construction(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"1 channel\(s\), the model makes 3"):
        Trainer(tiny_config(model={"img_channels": 3}), tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA device"):
            resolve_device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


# ---- Divergence ----


def poison(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, name: str, iteration: int) -> None:
    """From an iteration on the loss is not a number."""
    original = getattr(updates, name)

    def loss(*args: Tensor) -> Tensor:
        value = original(*args)
        return value * math.nan if trainer.iteration >= iteration else value

    monkeypatch.setattr(updates, name, loss)


@pytest.mark.parametrize(
    ("loss", "named", "changes", "iteration", "good", "network"),
    [
        ("fake_loss", "loss_d", {}, 6, 4, "discriminator"),
        ("real_loss", "loss_d", {"augment": "ada"}, 6, 4, "discriminator"),
        ("generator_loss", "loss_g", {}, 7, 4, "model"),
        ("r1_penalty", "r1", {"r1_interval": 4}, 8, 8, "discriminator"),
        ("path_lengths", "path_length", {"pl_weight": 1.0}, 9, 8, "model"),
    ],
)
def test_a_loss_that_is_not_a_number_ends_the_run(
    new_trainer, monkeypatch, loss, named, changes, iteration, good, network
):
    """On the CPU before the step that it would have spoilt the weights by."""
    trainer = new_trainer(snapshot_ticks=1, **changes)
    poison(monkeypatch, trainer, loss, iteration=6)
    with pytest.raises(
        FloatingPointError, match=rf"\b{named} \(nan\) is not finite at iteration {iteration} "
    ) as caught:
        trainer.fit()
    newest = checkpoints(trainer.run_dir)[-1]
    assert int(re.findall(r"\d+", newest.name)[0]) == good
    for text in (
        str(newest),
        f"spigan train --resume {trainer.run_dir}",
        "Advice: lower ",
        str(trainer.run_dir / "failed"),
    ):
        assert text in str(caught.value)
    # What is kept for a diagnosis has the weights of before the step, and the gradients that it did not take.
    failed, counters = load_checkpoint(trainer.run_dir / "failed" / f"state-{iteration:08d}.safetensors")
    assert counters["iteration"] == iteration
    assert all(tensor.isfinite().all() for name, tensor in failed.items() if name.startswith(("model.", "discrim")))
    assert any(tensor.isnan().any() for name, tensor in failed.items() if name.startswith(f"grad.{network}."))
    assert named in (trainer.run_dir / "failed" / "error.txt").read_text()
    tensors, _ = load_checkpoint(newest)
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    assert all(math.isfinite(value) for row in read_stats(trainer.run_dir) for value in row.values())
    assert Trainer.resume(trainer.run_dir, progress=False).iteration == good


def test_exploding_gradients_end_the_run(tiny_config, tmp_path):
    """Of a learning rate of 100, long before a number overflows."""
    trainer = Trainer(tiny_config(lr_g=100.0, precision="bf16"), tmp_path / "run", progress=False)
    with pytest.raises(FloatingPointError, match=r"grad_norm_\w+ \(\S+\) is above grad_norm_limit = 1e\+06") as caught:
        trainer.fit()
    assert "set precision to fp32" in str(caught.value)
    assert all(p.isfinite().all() for module in trainer.state.modules().values() for p in module.parameters())
    assert [path.name for path in checkpoints(trainer.run_dir)] == ["checkpoint-00000000.safetensors"]
    # As the message says: another learning rate in config.json, and it goes on from the last good checkpoint.
    config = tiny_config(lr_g=1e-3).model_dump_json()
    (trainer.run_dir / "config.json").write_text(config)
    again = Trainer.resume(trainer.run_dir, progress=False)
    again.fit()
    assert again.iteration == 12


def test_where_a_step_may_not_be_waited_for_a_tick_finds_it(new_trainer, monkeypatch):
    """As on a GPU: the iteration is that of the step all the same."""
    trainer = new_trainer(snapshot_ticks=1)
    poison(monkeypatch, trainer, "fake_loss", iteration=6)
    trainer.algorithm.update.check_every_step = False
    with pytest.raises(FloatingPointError, match=r"loss_d \(nan\) is not finite at iteration 6 \(0.012 kimg\)"):
        trainer.fit()
    assert trainer.iteration == 8 and read_stats(trainer.run_dir)[-1]["iteration"] == 4
    assert [path.name for path in checkpoints(trainer.run_dir)][-1] == "checkpoint-00000004.safetensors"


def test_norms_are_of_the_gradients(new_trainer, monkeypatch):
    trainer = new_trainer(pl_weight=1.0)
    gradients = keep_gradients(monkeypatch, trainer)
    train(trainer, 2)
    series = trainer.state.statistics.series()
    recorded = [value for name in ("d", "r1", "g", "pl") for value in series[f"grad_norm_{name}"]]
    expected = [math.sqrt(sum(g.double().square().sum().item() for g in step.values())) for step in gradients]
    assert len(expected) == 8
    assert sorted(recorded) == pytest.approx(sorted(expected), rel=1e-5)


@pytest.mark.parametrize("end", ["total", "signal"])
def test_divergence_between_ticks_is_not_passed_over(new_trainer, monkeypatch, end):
    """Neither the end of a run nor Ctrl-C hides it, although no tick has found it yet."""
    trainer = new_trainer(tick_kimg=1, total_kimg=0.012)
    poison(monkeypatch, trainer, "generator_loss", iteration=3)
    if end == "signal":
        original = trainer.train_iteration

        def iteration(images: Tensor) -> None:
            original(images)
            if trainer.iteration == 4:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(trainer, "train_iteration", iteration)
    with pytest.raises(FloatingPointError, match="loss_g"):
        trainer.fit()
    assert [path.name for path in checkpoints(trainer.run_dir)] == ["checkpoint-00000000.safetensors"]


def test_weights_that_are_not_finite_are_never_saved(new_trainer, monkeypatch):
    """The losses of the last iteration cannot tell what its step did to the weights."""
    trainer = new_trainer(tick_kimg=1, total_kimg=0.008)
    original = trainer.train_iteration

    def iteration(images: Tensor) -> None:
        original(images)
        if trainer.iteration == 4:
            trainer.discriminator.fromrgb.weight.data[0] = math.inf

    monkeypatch.setattr(trainer, "train_iteration", iteration)
    with pytest.raises(FloatingPointError, match="weights of discriminator"):
        trainer.fit()
    assert len(checkpoints(trainer.run_dir)) == 1


# ---- Progress, and that it learns ----


def test_progress_bar(tiny_config, tmp_path, capsys):
    trainer = Trainer(tiny_config(), tmp_path / "run", progress=True)
    trainer.fit()
    last = capsys.readouterr().err.split("\r")[-1]
    rows = read_stats(trainer.run_dir)
    assert "24/24" in last and "100%" in last
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", last), "elapsed < remaining"
    assert re.search(r"[\d.]+ ?img/s|s/img", last)
    assert f"D={rows[-1]['loss_d']:.3f}" in last and f"G={rows[-1]['loss_g']:.3f}" in last


def test_no_progress_bar(new_trainer, capsys):
    new_trainer(total_kimg=0.004).fit()
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == ""


def test_learns_the_mean_of_the_data(tiny_config, tmp_path):
    """Images of one bright grey each: the generator's go from dark to as bright within 100 updates."""
    folder = tmp_path / "data"
    folder.mkdir()
    for value in range(32):
        Image.fromarray(np.full((8, 8), 180 + value, dtype=np.uint8)).save(folder / f"{value:02d}.png")
    config = tiny_config(
        data={"source": str(folder)}, batch=8, intervals=1, total_kimg=0.48, tick_kimg=0.12, lr_g=5e-3, lr_d=5e-3,
        r1_gamma=0.1, r1_interval=4, ema_kimg=0.04, ema_rampup=None,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path / "run", progress=False)
    z = torch.randn(32, 1, 8, 8)

    @torch.no_grad()
    def error() -> float:
        return abs(trainer.ema(z).mean().item() - (195.5 / 127.5 - 1))

    before = error()
    trainer.fit()
    after = error()
    assert before > 0.3, "nothing to learn"
    assert after < 0.4 * before
    rows = read_stats(trainer.run_dir)
    assert len(rows) == 4 and all(math.isfinite(value) for row in rows for value in row.values())
