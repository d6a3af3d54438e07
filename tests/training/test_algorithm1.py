"""Algorithm 1 step by step: who is updated when, at which times, with which noise and images."""

from __future__ import annotations

import copy
import importlib
import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from training_helpers import (
    digits,
    spy,
    train,
    unchanged,
    weights,
    without_noise,
)

from spigan.ops import path_interpolate
from spigan.ops.backends import use_backend
from spigan.training import algorithm1, updates
from spigan.training.algorithm1 import draw_times

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


# ---- Lazy regularisation ----


def times_of_penalties(monkeypatch, trainer, method: str, iterations: int) -> list[tuple[int, list[float]]]:
    """(iteration, times) of every call of a penalty."""
    calls = []
    original = getattr(trainer.algorithm.updates, method)

    def record(tensor, times):
        calls.append((trainer.iteration, times))
        original(tensor, times)

    monkeypatch.setattr(trainer.algorithm.updates, method, record)
    train(trainer, iterations)
    return calls


@pytest.mark.parametrize("intervals", [1, 2, 3, 4])
@pytest.mark.parametrize("updates", ["sequential", "joint"])
def test_lazy_r1_meets_every_time(new_trainer, monkeypatch, updates, intervals):
    """Counted in steps, R1 of K = 2 would fall on t_1 every time, and no clean image would be regularised."""
    trainer = new_trainer(r1_interval=4, updates=updates, intervals=intervals, fixed_t=True)
    calls = times_of_penalties(monkeypatch, trainer, "step_r1", 16)
    path = [(k + 1) / intervals for k in range(intervals)]
    expected = [path] if updates == "joint" else [[t] for t in path]
    assert calls == [(iteration, times) for iteration in (0, 8) for times in expected]


def test_lazy_path_length_meets_every_time(new_trainer, monkeypatch):
    trainer = new_trainer(pl_weight=1.0, pl_interval=3, intervals=2, fixed_t=True)
    calls = times_of_penalties(monkeypatch, trainer, "step_path_length", 12)
    assert calls == [(1, [0.5]), (1, [1.0]), (7, [0.5]), (7, [1.0])]
    assert trainer.state.pl_mean.item() > 0


def test_no_regularisation_of_weight_zero(new_trainer, monkeypatch):
    trainer = new_trainer(r1_gamma=0, r1_interval=1, pl_weight=0, pl_interval=1)
    calls = [spy(monkeypatch, updates, name, lambda *_: 1) for name in ("r1_penalty", "path_lengths")]
    train(trainer, 4)
    assert calls == [[], []]


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
    recorded = trainer.state.statistics.tensors(joint=False)
    assert {"loss_d", "loss_g", "r1", "path_length_penalty"} <= recorded.keys()
    assert all(values.isfinite().all() for values in recorded.values())
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
    assert all(values.isfinite().all() for values in trainer.state.statistics.tensors(joint=False).values())


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


# ---- Against a plain rewrite ----


def test_iterations_against_a_plain_rewrite(new_trainer):
    """Four iterations with K = 3 end in the weights of Algorithm 1 written in plain PyTorch, one line per line."""
    trainer = new_trainer(intervals=3, fixed_t=True, r1_gamma=0, lr_g=1e-4, lr_d=1e-4, ema_kimg=0)
    without_noise(trainer)
    model, d = copy.deepcopy(trainer.model), copy.deepcopy(trainer.discriminator)
    optimizer_g = torch.optim.Adam(model.parameters(), 1e-4, (0.0, trainer.config.beta2), 1e-8)
    optimizer_d = torch.optim.Adam(d.parameters(), 1e-4, (0.0, trainer.config.beta2), 1e-8)
    sigmoid, offset = torch.nn.functional.logsigmoid, 0
    with use_backend("reference"):
        for number in range(4):
            images = digits(trainer, start=4 * number)
            x_0 = images / 127.5 - 1
            u, _ = path_interpolate(images, [1.0], seed=2**32, offset=offset, sde=trainer.algorithm.sde)
            offset += images.numel()
            for j in (1, 2, 3):
                t = torch.full((4,), j / 3)
                fake = model(u, j / 3)
                if number % 2 == 0:
                    i_t = (1 - j / 3) * u + j / 3 * x_0
                    loss = -sigmoid(d(i_t, t)).mean() - sigmoid(-d(fake.detach(), t)).mean()
                    optimizer = optimizer_d
                else:
                    loss, optimizer = -sigmoid(d(fake, t)).mean(), optimizer_g
                optimizer_g.zero_grad()
                optimizer_d.zero_grad()
                loss.backward()
                optimizer.step()
            trainer.train_iteration(images)
    for ours, plain in ((trainer.model, model), (trainer.discriminator, d), (trainer.ema, model)):
        for (name, weight), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
            # Where a gradient is nothing but rounding, Adam's step may have either sign.
            differing = ((weight - expected).abs() > 2e-5).float().mean().item()
            assert differing < 0.02, f"{name}: {differing:.1%} of the weights differ"
    assert (trainer.state.iteration, trainer.state.images_seen) == (4, 8)
