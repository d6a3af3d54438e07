"""Updates: gradients, accumulation over parts of a minibatch, and averages."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from training_helpers import (
    assert_gradients_close,
    case,
    keep_gradients,
    spy,
    train,
    unchanged,
    weights,
    without_noise,
)

from spigan.models.discriminator import minibatch_std
from spigan.training.losses import fake_loss, generator_loss, path_lengths, r1_penalty, real_loss
from spigan.training.points import interleave

# ---- Gradients ----


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
    trainer.algorithm.updates.step_discriminator(i, trainer.model.mapping(x_T, [0.3]), [0.3])
    assert_gradients_close(gradients[0], expected)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_generator_gradient(new_trainer, monkeypatch):
    trainer = without_noise(new_trainer())
    x_T, _ = case(trainer, 4, [0.3])
    generator_loss(trainer.discriminator(trainer.model(x_T, 0.3), torch.full((4,), 0.3))).backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.state.optimizer_d.zero_grad()
    gradients = keep_gradients(monkeypatch, trainer)
    trainer.algorithm.updates.step_generator(x_T[None], [0.3])
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
    trainer.algorithm.updates.step_r1(i, [0.3])
    assert len(gradients) == 1
    assert_gradients_close(gradients[0], expected)


def test_r1_does_not_rely_on_another_step(new_trainer, monkeypatch):
    """A generator step leaves D without gradients; R1 turns them on itself."""
    trainer = without_noise(new_trainer(r1_gamma=1.0))
    x_T, i = case(trainer, 4, [0.3])
    trainer.algorithm.updates.step_generator(x_T[None], [0.3])
    gradients = keep_gradients(monkeypatch, trainer)
    trainer.algorithm.updates.step_r1(i, [0.3])
    assert len(gradients) == 1 and any(gradient.abs().max() > 0 for gradient in gradients[0].values())


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
    trainer.algorithm.updates.step_path_length(x_T[None], [0.3])
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
    trainer.algorithm.updates.step_discriminator(i, h, times)
    trainer.algorithm.updates.step_r1(i, times)
    trainer.algorithm.updates.step_generator(x_T[None], times)
    joint, gradients[:] = gradients[:], []
    for k, t in enumerate(times):
        trainer.algorithm.updates.step_discriminator(i[[k]], h[[k]], [t])
        trainer.algorithm.updates.step_r1(i[[k]], [t])
        trainer.algorithm.updates.step_generator(x_T[None], [t])
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
        trainer.algorithm.updates.step_discriminator(i, trainer.model.mapping(x_T, times).detach(), times)
        trainer.algorithm.updates.step_r1(i, times)
        trainer.algorithm.updates.step_generator(x_T[None], times)
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
    trainer.algorithm.updates.step_r1(torch.randn(3, 2, 1, 8, 8), [0.2, 0.5, 1.0])
    assert seen == [pytest.approx([0.2, 0.5, 1.0, 0.2, 0.5, 1.0])]
    assert torch.equal(minibatch_std(flat, 4), interleave(torch.stack([minibatch_std(part, 4) for part in x])))


# ---- Adaptive augmentation ----


def test_ada_moves_by_the_mean_of_all_signs(new_trainer):
    """Over the times of an iteration and over the iterations since the last move, not by the last sign alone."""
    trainer = new_trainer(augment="ada", ada_target=0.0, ada_kimg=1.0)
    trainer.state.augment.p.fill_(0.5)
    for signs in ([-1.0, -0.5], [-0.5, 0.5], [0.0, -1.0], [0.5, 1.0]):
        assert trainer.state.augment.p.item() == 0.5
        trainer.algorithm.updates.adapt_augmentation([torch.tensor(sign) for sign in signs], 5)
    assert trainer.state.augment.p.item() == pytest.approx(0.5 - 4 * 5 / 1000)


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
            trainer.algorithm.updates.average_weights(batch)
        for parameter in trainer.ema.parameters():
            torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5), rtol=0, atol=1e-5)


def test_ema_of_half_life_zero_is_the_model(new_trainer):
    trainer = new_trainer(ema_kimg=0)
    train(trainer, 2)
    assert unchanged(trainer.ema, weights(trainer.model)) == set(weights(trainer.model))


def test_buffers_are_copied(new_trainer):
    trainer = new_trainer(ema_kimg=500)
    for buffer in trainer.model.buffers():
        buffer.add_(1)
    trainer.algorithm.updates.average_weights(4)
    assert all(map(torch.equal, trainer.ema.buffers(), trainer.model.buffers()))


def test_ema_update_counts_the_images_of_an_iteration(new_trainer, monkeypatch):
    trainer = new_trainer()
    images = spy(monkeypatch, trainer.algorithm.updates, "average_weights", lambda images: images)
    train(trainer, 4)
    assert images == [4, 4]
    assert not trainer.ema.training and not any(p.requires_grad for p in trainer.ema.parameters())
