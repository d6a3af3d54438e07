"""Check the rivals' networks against the literature, and their samplers against networks that know the answer.

pytest benchmarks/test_peers.py
"""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spigan import VPSDE

from . import peers
from .peers import PEERS, Peer

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason='without diffusers: pip install "spigan[bench]"'
)
WITH_DIFFUSERS = {"DDPM", "DDIM, T=50", "Score SDE (VE)"}
ALL = [(preset, peer) for preset, of_preset in PEERS.items() for peer in of_preset]


def parameters(cases: list[tuple[str, Peer]]) -> list[object]:
    return [
        pytest.param(peer, id=f"{preset}-{peer.name}", marks=needs_diffusers if peer.name in WITH_DIFFUSERS else ())
        for preset, peer in cases
    ]


@pytest.mark.parametrize("peer", parameters([case for case in ALL if case[1].published_parameters]))
def test_parameters_are_the_published_ones(peer: Peer) -> None:
    assert peer.parameters == pytest.approx(peer.published_parameters, rel=0.01)


def test_ddgan_costs_what_is_published() -> None:
    # Phung et al. 2023: 7.05 and 70.82 billion multiply-adds.
    for preset, expected in (("cifar10", 7.05e9), ("celebahq256", 70.82e9)):
        ddgan = next(peer for peer in PEERS[preset] if peer.name == "DD-GAN")
        assert ddgan.flop() / 2 == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("peer", parameters([case for case in ALL if case[0] == "cifar10"]))
def test_first_steps(peer: Peer) -> None:
    network = peer.network()
    images = peer.sample(network, 2, evaluations=2)
    assert images.shape == (2, 3, peer.resolution, peer.resolution)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert torch.equal(images, peer.sample(peer.network(), 2, evaluations=2))
    assert not torch.equal(images, peer.sample(network, 2, evaluations=2, seed=1))
    rounded = peer.sample(network.to(torch.bfloat16), 2, evaluations=2)
    torch.testing.assert_close(rounded, images, atol=0.05 * images.abs().max().item(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("peer", parameters([case for case in ALL if case[0] != "cifar10"]))
def test_first_step_of_256_pixels(peer: Peer) -> None:
    images = peer.sample(peer.network(), 1, evaluations=1)
    assert images.shape == (1, 3, 256, 256)
    assert images.isfinite().all()


def perfect(peer: Peer, x0: Tensor) -> peers.Network:
    """Return a network that predicts as if it had perfectly learned the single image `x0`."""

    def vp(x: Tensor, mean: Tensor) -> Tensor:
        return (x - mean.view(-1, 1, 1, 1) * x0) / (1.0 - mean.square()).sqrt().view(-1, 1, 1, 1)

    def network(x: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        if peer.name == "DD-GAN":
            return x0.atanh().expand_as(x)
        if peer.name == "Score SDE (VE)":
            return (x0 - x) / t.view(-1, 1, 1, 1).square()  # t is the standard deviation of the noise
        if peer.name == "Score SDE (VP)":
            return vp(x, torch.tensor([VPSDE().marginal(time)[0] for time in t.tolist()]))
        return vp(x, (1.0 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[t].sqrt())

    return network


@pytest.mark.parametrize("peer", parameters(ALL))
@torch.no_grad()
def test_sampler_arrives_at_the_image_that_a_perfect_network_knows(peer: Peer) -> None:
    x0 = torch.linspace(-0.9, 0.9, 3 * 4 * 4).view(1, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(2, 3, 4, 4, generator=generator)
    # If a chain leaves noise at its last time, the standard deviation of that noise is 0.01.
    states = list(peer.chain(perfect(peer, x0), x_T, generator))
    assert len(states) == peer.nfe
    torch.testing.assert_close(states[-1], x0.expand(2, -1, -1, -1), atol=0.05, rtol=0)
    assert (states[0] - x0).abs().max() > 0.1


@pytest.mark.parametrize("steps", [2, 4])
def test_posterior_is_bayes_rule(steps: int) -> None:
    for k in range(1, steps + 1):
        before, after = (VPSDE().marginal(j / steps)[0] ** 2 for j in (k - 1, k))
        alpha = after / before
        c_0, c_k, std = peers.ddgan_posterior(k, steps)
        if k == 1:
            assert (c_0, c_k, std) == (pytest.approx(1.0), 0.0, 0.0)
            continue
        # The product of the prior N(sqrt(before) x_0, 1 - before) and the likelihood N(sqrt(alpha) x_{k-1}, 1 - alpha).
        precision = 1.0 / (1.0 - before) + alpha / (1.0 - alpha)
        assert std == pytest.approx(precision**-0.5)
        assert c_0 == pytest.approx(math.sqrt(before) / (1.0 - before) / precision)
        assert c_k == pytest.approx(math.sqrt(alpha) / (1.0 - alpha) / precision)


@needs_diffusers
@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("fir", [False, True])
@torch.no_grad()
def test_block_is_that_of_diffusers(fir: bool, resample: str | None) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    kind = None if resample is None else peers.Resample(up=resample == "up", fir=fir)
    ours = peers.Block(64, 128, 32, resample=kind).eval()
    theirs = ResnetBlock2D(
        in_channels=64, out_channels=128, temb_channels=32, groups=16, groups_out=32, eps=1e-6,
        output_scale_factor=math.sqrt(2.0), use_in_shortcut=True, kernel="fir" if fir else "sde_vp",
        up=resample == "up", down=resample == "down",
    ).eval()  # fmt: skip
    renamed = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
    for name, module in ours.named_children():
        if any(True for _ in module.parameters()):
            getattr(theirs, renamed.get(name, name)).load_state_dict(module.state_dict())
    x, time = torch.randn(2, 64, 8, 8), torch.randn(2, 32)
    torch.testing.assert_close(ours(x, F.silu(time), None), theirs(x, time), atol=1e-4, rtol=1e-4)


@needs_diffusers
@torch.no_grad()
def test_attention_is_that_of_diffusers() -> None:
    from diffusers.models.attention_processor import Attention

    ours = peers.Attention(64).eval()
    theirs = Attention(
        64, heads=1, dim_head=64, norm_num_groups=16, eps=1e-6, bias=True, residual_connection=True,
        rescale_output_factor=math.sqrt(2.0), _from_deprecated_attn_block=True,
    ).eval()  # fmt: skip
    theirs.group_norm.load_state_dict(ours.norm.state_dict())
    for i, linear in enumerate((theirs.to_q, theirs.to_k, theirs.to_v)):
        linear.weight.copy_(ours.qkv.weight[64 * i : 64 * (i + 1), :, 0, 0])
        linear.bias.copy_(ours.qkv.bias[64 * i : 64 * (i + 1)])
    theirs.to_out[0].weight.copy_(ours.out.weight[:, :, 0, 0])
    theirs.to_out[0].bias.copy_(ours.out.bias)
    x = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "spigan\[bench\]"'):
        PEERS["cifar10"][0].network()


def test_evaluations_are_within_the_chain() -> None:
    peer = next(peer for peer in PEERS["cifar10"] if peer.name == "DD-GAN")
    for evaluations in (0, 5):
        with pytest.raises(ValueError, match="has 4 evaluations"):
            peer.sample(torch.nn.Linear(1, 1), 1, evaluations=evaluations)
