"""Generated points of the straight path: their law, their gradient, and how the K times share a minibatch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import assert_gradients_close, digits, keep_gradients, spy, train, weights, without_noise

from spigan.models.discriminator import minibatch_std
from spigan.ops import path_interpolate
from spigan.sde import VPSDE
from spigan.training import algorithm1
from spigan.training.points import interleave
from spigan.training.trainer import Trainer

ANALYTIC = {"path": "analytic"}
ARMS = [
    {},
    {"path_latent": "t"},
    {"path_noise": "z"},
    {"updates": "joint"},
    {"updates": "joint", "path_latent": "t"},
    {"times": "split"},
    {"times": "split", "path_latent": "t"},
    {"model": {"mapping": "mlp"}},
    {"model": {"mapping": "mlp"}, "times": "split", "path_noise": "z"},
]


def shown(fields: dict[str, Any]) -> str:
    return "-".join(str(value) for value in fields.values()) or "default"


def clean(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


# ---- The gradient ----


@pytest.mark.parametrize("latent", ["1", "t"])
@pytest.mark.parametrize("t", [0.01, 0.3, 0.8, 1.0])
def test_gradient_carries_the_factor(new_trainer, monkeypatch, latent, t):
    """d i(t) / d x_0 = t + (1 - t) a, exactly: at t = 1 a point is its image, near t = 0 it says little about it."""
    points = new_trainer(**ANALYTIC, path_latent=latent).algorithm.updates.points
    x_0 = torch.randn(4, 1, 8, 8, requires_grad=True)
    monkeypatch.setattr(points.model.generator, "forward", lambda h, noise=None: x_0)
    e = torch.randn(1, 4, 1, 8, 8)
    point = points(torch.zeros(1, 4, 16), [t], e)
    a, s = VPSDE().marginal(1.0)
    torch.testing.assert_close(point, t * x_0 + (1 - t) * (a * x_0 + s * e[0]))
    upstream = torch.randn_like(point)
    (gradient,) = torch.autograd.grad((point * upstream).sum(), x_0)
    torch.testing.assert_close(gradient, (t + (1 - t) * a) * upstream, rtol=1e-6, atol=0)


# ---- The law ----


@pytest.mark.parametrize("fields", ARMS, ids=shown)
def test_points_of_real_images_are_the_real_points(new_trainer, monkeypatch, fields):
    """If G returned x_0, and e' were e, D would see the very points i(t_k) that it sees as real."""
    trainer = new_trainer(**ANALYTIC | {"batch": 8, "intervals": 2} | fields)
    points, times = trainer.algorithm.updates.points, [0.3, 1.0]
    images = digits(trainer)
    e = torch.randn(8, 1, 8, 8)
    real = points.own_times(path_interpolate(images, times, noise=e)[1])
    z = points.blocks(torch.randn(8, *trainer.config.model.z_shape), 2)
    h = points.latents(z, times)
    monkeypatch.setattr(
        points.model.generator,
        "forward",
        lambda h, noise=None: interleave(points.blocks(clean(images), 2).expand(len(h) // n, *[-1] * 4)),
    )
    n = 4 if points.split else 8
    generated = points(h, times, points.blocks(e, 2))
    torch.testing.assert_close(generated, interleave(real), rtol=0, atol=1e-6)
    replayed = points(h, torch.tensor(times), points.blocks(e, 2))  # as in a CUDA graph
    torch.testing.assert_close(replayed, generated, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fields", ARMS, ids=shown)
def test_noise_of_generated_points(new_trainer, monkeypatch, fields):
    """It is standard normal and drawn anew in each iteration; independent of z and of the real noise unless it is z."""
    trainer = new_trainer(**ANALYTIC | {"batch": 256, "r1_gamma": 0, "seed": 5} | fields)
    updates = trainer.algorithm.updates
    d = spy(monkeypatch, updates, "step_discriminator", lambda real, h, times, noise: noise)
    g = spy(monkeypatch, updates, "step_generator", lambda z, times, noise: (z, noise))
    real = spy(monkeypatch, algorithm1, "path_interpolate", lambda x, times, **kw: (kw["seed"], kw["offset"]))
    train(trainer, 2)
    z, noise = g[0]
    assert noise.std().item() == pytest.approx(1.0, abs=0.02) and abs(noise.mean().item()) < 0.02
    assert not torch.equal(d[0], noise)
    numbers = 256 * 64
    if fields.get("path_noise") == "z":
        assert torch.equal(noise, z)
    else:
        # The stream of the real noise, at places of its own.
        assert real == [(2**32 + 5, 0), (2**32 + 5, 2 * numbers)]
        assert trainer.state.noise_offset == 4 * numbers
        correlation = torch.corrcoef(torch.stack([z.flatten(), noise.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("times", ["shared", "split"])
def test_real_images_put_the_discriminator_at_chance(new_trainer, monkeypatch, times):
    """However long D trains against a generator that returns real images, it cannot tell the points of any t apart."""
    trainer = new_trainer(**ANALYTIC, times=times, batch=32, updates="joint", r1_gamma=0, lr_d=1e-3)
    random = torch.Generator().manual_seed(1)
    images = digits(trainer, 1700)

    def take(n: int) -> Tensor:
        return images[torch.randint(len(images), (n,), generator=random)]

    monkeypatch.setattr(trainer.model.generator, "forward", lambda h, noise=None: clean(take(len(h))))
    for _ in range(150):
        trainer.train_iteration(take(32))
        trainer.state.iteration = 0  # D's iterations only
    loss = trainer.state.statistics.tensors(joint=False)["loss_d"][-50:].mean()
    assert loss.item() == pytest.approx(2 * math.log(2), abs=0.05)
    points, d = trainer.algorithm.updates.points, trainer.discriminator
    e = torch.randn(1, 512, 1, 8, 8)
    with torch.no_grad():
        for t in (0.05, 0.3, 0.6, 1.0):
            real = d(path_interpolate(take(512), [t], noise=torch.randn_like(e[0]))[1][0], t)
            fake = d(points(torch.zeros(1, 512, 16), [t], e), t)
            deviation = (real.var() / 512 + fake.var() / 512).sqrt()
            assert abs(real.mean() - fake.mean()) < 4 * deviation


# ---- Training ----


@pytest.mark.parametrize("fields", ARMS, ids=shown)
def test_every_arm_trains(new_trainer, fields):
    trainer = new_trainer(**ANALYTIC | {"r1_interval": 1, "pl_weight": 1.0, "pl_interval": 1, "batch": 8} | fields)
    before = weights(trainer.model), weights(trainer.discriminator)
    train(trainer, 4)
    for module, old in zip((trainer.model, trainer.discriminator), before, strict=True):
        # With h(1) alone, every weight still takes part.
        assert not [name for name, x in module.named_parameters() if torch.equal(x, old[name])]
    values = trainer.state.statistics.tensors(joint=False)
    assert {"loss_d", "loss_g", "r1", "path_length"} <= values.keys()
    assert all(series.isfinite().all() for series in values.values())


@pytest.mark.parametrize("fields", [{}, {"path_latent": "t"}, {"model": {"mapping": "mlp"}}], ids=shown)
def test_generator_gradient(new_trainer, monkeypatch, fields):
    """That of -log D(t G(h) + (1 - t) (a G(h) + s e')), for h = h(1) or h(t)."""
    trainer = without_noise(new_trainer(**ANALYTIC | fields))
    z, e = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    model, (a, s) = trainer.model, VPSDE().marginal(1.0)
    x = model.generator(model.mapping(z, 0.3 if fields.get("path_latent") == "t" else 1.0))
    logits = trainer.discriminator(0.3 * x + 0.7 * (a * x + s * e), torch.full((4,), 0.3))
    torch.nn.functional.softplus(-logits).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    gradients = keep_gradients(monkeypatch, trainer)
    trainer.algorithm.updates.step_generator(z[None], [0.3], e[None])
    assert_gradients_close(gradients[0], expected)


# ---- Split times ----


@pytest.mark.parametrize("path", ["learned", "analytic"])
@pytest.mark.parametrize("intervals", [2, 4])
def test_split_gives_each_time_its_share_in_one_step(new_trainer, monkeypatch, path, intervals):
    trainer = new_trainer(path=path, times="split", intervals=intervals, batch=16, mbstd_group=4, r1_interval=1)
    d = spy(monkeypatch, trainer.state.optimizer_d, "step", lambda: "d")
    g = spy(monkeypatch, trainer.state.optimizer_g, "step", lambda: "g")
    seen = spy(monkeypatch, trainer.discriminator, "forward", lambda images, t: t.tolist())
    made = spy(monkeypatch, trainer.model.generator, "forward", lambda h, noise=None: len(h))
    train(trainer, 2)
    assert (len(d), len(g)) == (2, 1)  # D and its R1, then G
    assert made == [16, 16]  # as many images as for K = 1
    assert len(seen) == 4  # generated, real, R1; generated
    for times in seen:
        assert len(times) == 16 and times.count(1.0) == 16 // intervals
        assert sorted(map(times.count, set(times))) == [16 // intervals] * intervals
    assert trainer.state.images_seen == 16


def test_groups_of_split_times_hold_one_time(new_trainer):
    trainer = new_trainer(times="split", intervals=2, batch=12, mbstd_group=4)
    assert trainer.discriminator.mbstd_group == 3  # the largest that divides the 6 images of a time
    x = torch.randn(2, 6, 2, 4, 4)
    alone = interleave(torch.stack([minibatch_std(part, 3) for part in x]))
    assert torch.equal(minibatch_std(interleave(x), 3), alone)


@pytest.mark.parametrize("path", ["learned", "analytic"])
def test_split_gradients_accumulate(new_trainer, monkeypatch, path):
    found = {}
    for batch_gpu in (None, 4):
        trainer = without_noise(
            new_trainer(path=path, times="split", batch=8, batch_gpu=batch_gpu, mbstd_group=1, r1_gamma=50.0)
        )
        gradients = keep_gradients(monkeypatch, trainer)
        train(trainer, 2)
        found[batch_gpu] = gradients
    assert len(found[4]) == len(found[None]) == 3
    for pieces, whole in zip(found[4], found[None], strict=True):
        assert_gradients_close(pieces, whole)


def test_split_images_follow_their_times(new_trainer):
    """Block k of the minibatch lies at t_k: images, noise and latents alike."""
    trainer: Trainer = new_trainer(times="split", intervals=2, batch=4)
    points, times = trainer.algorithm.updates.points, [0.4, 1.0]
    images, e = digits(trainer), torch.randn(4, 1, 8, 8)
    i = points.own_times(path_interpolate(images, times, noise=e)[1])
    for (k, t), n in itertools.product(enumerate(times), range(2)):
        own = slice(2 * k + n, 2 * k + n + 1)
        expected = path_interpolate(images[own], [t], noise=e[own])[1][0, 0]
        torch.testing.assert_close(i[k, n], expected, rtol=0, atol=1e-6)
    z = torch.randn(4, 1, 8, 8)
    h = points.latents(points.blocks(z, 2), times)
    for k, t in enumerate(times):
        torch.testing.assert_close(h[k], trainer.model.mapping(z[2 * k : 2 * k + 2], t))
