"""SPI-GAN's rivals in the paper's Table 2: networks of the published shapes, with random weights, and their samplers.

A network's time does not depend on what it has learned, so nothing is trained or downloaded. The U-Nets of DDPM and of
Score SDE at 256 pixels, and their schedulers, come from diffusers (`pip install "spigan[bench]"`), with the
configurations under which the authors' weights are published there. The networks of Score SDE (VP) and DD-GAN are
written out below, because diffusers' blocks lack DD-GAN's latent vector and would add eight attention layers to the
deep network. FIR filters use this project's kernels, so that our choice of library slows down no rival: diffusers' own
filters take over 100 times as long (84 ms against 0.5 ms to upsample x of [10, 256, 16, 16] by 2; float32, one core of
an AVX-512 server CPU, PyTorch 2.13, diffusers 0.42, November 2026).

Papers: DDPM (Ho et al. 2020), DDIM (Song et al. 2021a), Score SDE (Song et al. 2021b), DD-GAN (Xiao et al. 2022).
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spigan import VPSDE
from spigan.models.discriminator import sinusoidal_embedding
from spigan.ops import fir_bias_act
from spigan.ops.upfirdn2d import fir_filter

Network = Callable[..., Tensor]
# chain(network, x_T, generator) -> the state after each network evaluation.
Chain = Callable[[Network, Tensor, torch.Generator], Iterator[Tensor]]


@dataclass(frozen=True)
class Peer:
    """A rival: its network and its sampler.

    Args:
        name: its name in Table 2.
        resolution: resolution of the images.
        nfe: number of network evaluations for a batch of images.
        build: builds the network, which is called with (x [N, 3, H, W], t [N], ...).
        chain: the sampler, which yields one state for each of the `nfe` evaluations.
        published_parameters: number of parameters in the literature, if stated there.
        paper_seconds: time of 100 images in the SPI-GAN paper's Table 2, if it has such a row.
    """

    name: str
    resolution: int
    nfe: int
    build: Callable[[], nn.Module]
    chain: Chain
    published_parameters: float | None
    paper_seconds: float | None = None

    def network(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the network in eval mode, with random weights that are the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.build()
        network = network.eval().requires_grad_(False)
        return network.to(device=device, dtype=dtype, memory_format=torch.channels_last)

    @cache  # noqa: B019 - peers are a handful of constants
    def _on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build().eval().requires_grad_(False)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._on_meta().parameters())

    @cache  # noqa: B019
    def flop(self) -> int:
        """Return the FLOP of one evaluation of one image: products, convolutions, attention; 2 per multiply-add."""
        x = torch.empty(1, 3, self.resolution, self.resolution, device="meta")
        with FlopCounterMode(display=False) as counter:
            next(self.chain(self._on_meta(), x, torch.Generator()))
        return counter.get_total_flops()

    @torch.no_grad()
    def sample(self, network: nn.Module, n: int, *, evaluations: int | None = None, seed: int = 0) -> Tensor:
        """Sample `n` images from noise.

        Args:
            network: from `network()`, compiled or not. It is evaluated on its own device and in its own dtype; the
                states between evaluations are float32.
            n: number of images, which form one batch.
            evaluations: stop after this many of the `nfe` evaluations. All evaluations of a chain take the same time.
            seed: seed of all the noise.

        Returns:
            [n, 3, H, W] float32. These are images only if the chain ran to its end.
        """
        if evaluations is not None and not 1 <= evaluations <= self.nfe:
            raise ValueError(f"{self.name} has {self.nfe} evaluations, got evaluations={evaluations}")
        weight = next(network.parameters())
        generator = torch.Generator(weight.device).manual_seed(seed)

        def evaluate(x: Tensor, *args: Tensor) -> Tensor:
            return network(x.to(weight.dtype, memory_format=torch.channels_last), *args).float()

        x = torch.randn(n, 3, self.resolution, self.resolution, device=weight.device, generator=generator)
        states = itertools.islice(self.chain(evaluate, x, generator), evaluations)
        return collections.deque(states, maxlen=1).pop()


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError('this rival is built with diffusers: pip install "spigan[bench]"') from error
    return diffusers


class UNet(nn.Module):
    """diffusers' UNet2DModel, called like a function."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.unet = _diffusers().UNet2DModel(**config)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, return_dict=False)[0]


def ddpm_unet(resolution: int, channels: tuple[int, ...]) -> nn.Module:
    """Build the U-Net of Ho et al. 2020, appendix B: 2 residual blocks per resolution, attention at 16 pixels.

    The configuration is that of google/ddpm-cifar10-32 and google/ddpm-celebahq-256.
    """
    attention = [resolution >> level == 16 for level in range(len(channels))]
    return UNet(
        sample_size=resolution,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        downsample_padding=0,
        attention_head_dim=None,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def score_sde_ve_unet() -> nn.Module:
    """Build NCSN++ for CelebA-HQ 256 (Song et al. 2021b, appendix H), configured as google/ncsnpp-celebahq-256."""
    network = UNet(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 256, 256, 256),
        layers_per_block=2,
        down_block_types=(*["SkipDownBlock2D"] * 4, "AttnSkipDownBlock2D", *["SkipDownBlock2D"] * 2),
        up_block_types=(*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", *["SkipUpBlock2D"] * 4),
        time_embedding_type="fourier",
        mid_block_scale_factor=math.sqrt(2.0),
        attention_head_dim=None,
        norm_num_groups=None,
        norm_eps=1e-6,
    )
    for block in list(network.modules()):
        if isinstance(block, _diffusers().models.resnet.ResnetBlock2D):
            if block.up:
                block.upsample = Resample(up=True, fir=True)
            elif block.down:
                block.downsample = Resample(up=False, fir=True)
    return network


def ddpm_chain(
    network: Network, x: Tensor, generator: torch.Generator, *, scheduler: str, steps: int
) -> Iterator[Tensor]:
    """Sample as DDPM or DDIM do: diffusers' `scheduler`, with the noise schedule of Ho et al. 2020, section 4."""
    schedule = getattr(_diffusers(), scheduler)(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    schedule.set_timesteps(steps)
    for t in schedule.timesteps:
        noise = network(x, t.expand(x.shape[0]).to(x.device))
        x = schedule.step(noise, t, x, generator=generator, return_dict=False)[0]
        yield x


def score_sde_ve_chain(network: Network, x: Tensor, generator: torch.Generator, *, steps: int) -> Iterator[Tensor]:
    """Sample with predictor and corrector (Song et al. 2021b, algorithm 2, appendix H.3): two evaluations per step."""
    schedule = _diffusers().ScoreSdeVeScheduler(num_train_timesteps=steps, sigma_max=348.0)
    schedule.set_timesteps(steps)
    schedule.set_sigmas(steps)
    x = x * schedule.init_noise_sigma
    for t, sigma in zip(schedule.timesteps, schedule.sigmas, strict=True):
        sigmas = sigma.expand(x.shape[0]).to(x.device)
        x = schedule.step_correct(network(x, sigmas), x, generator=generator, return_dict=False)[0]
        yield x
        x = schedule.step_pred(network(x, sigmas), t, x, generator=generator, return_dict=False)[0]
        yield x


def score_sde_vp_chain(network: Network, x: Tensor, generator: torch.Generator, *, steps: int) -> Iterator[Tensor]:
    """Solve the reverse SDE with Euler-Maruyama, from t = 1 to 0.001 (Song et al. 2021b, section 4.1 and appendix C).

    There is no corrector, as in the authors' configuration for this network, so the number of steps is Table 2's NFE.
    """
    sde = VPSDE()
    times = torch.linspace(1.0, 1e-3, steps + 1, dtype=torch.float64).tolist()
    for t, t_next in itertools.pairwise(times):
        beta, std = sde.beta_min + t * (sde.beta_max - sde.beta_min), sde.marginal(t)[1]
        step = beta * (t - t_next)
        noise = network(x, torch.full(x.shape[:1], t, device=x.device))  # score = -noise / std
        x = (1.0 + 0.5 * step) * x - (step / std) * noise
        if t_next != times[-1]:
            x = x + math.sqrt(step) * _randn_like(x, generator)
        yield x


def ddgan_posterior(k: int, steps: int) -> tuple[float, float, float]:
    """Return the coefficients of q(x_{k-1} | x_k, x_0) = N(c_0 x_0 + c_k x_k, s^2).

    This is DDPM's posterior (Ho et al. 2020, eq. 6 and 7), with few, long steps. Step k spans the times (k - 1)/steps
    to k/steps of the VP-SDE, whose noise DD-GAN discretises.

    Returns:
        (c_0, c_k, s).
    """
    alpha_bar, previous = (VPSDE().marginal(j / steps)[0] ** 2 for j in (k, k - 1))
    alpha = alpha_bar / previous
    c_0 = math.sqrt(previous) * (1.0 - alpha) / (1.0 - alpha_bar)
    c_k = math.sqrt(alpha) * (1.0 - previous) / (1.0 - alpha_bar)
    return c_0, c_k, math.sqrt((1.0 - alpha) * (1.0 - previous) / (1.0 - alpha_bar))


def ddgan_chain(network: Network, x: Tensor, generator: torch.Generator, *, steps: int) -> Iterator[Tensor]:
    """Sample as in Xiao et al. 2022, section 3.2: the network, with a new latent vector, gives x_0; then the posterior
    gives x_{k-1}."""
    for k in range(steps, 0, -1):
        c_0, c_k, std = ddgan_posterior(k, steps)
        latent = torch.randn(x.shape[0], DDGAN_LATENT, device=x.device, generator=generator)
        x0 = network(x, torch.full(x.shape[:1], k / steps, device=x.device), latent).tanh()
        x = c_0 * x0 + c_k * x
        if k > 1:
            x = x + std * _randn_like(x, generator)
        yield x


def _randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, device=x.device, generator=generator)


DDGAN_LATENT = 100  # dimension of the latent vector: Xiao et al. 2022, appendix C


class Norm(nn.GroupNorm):
    """Group normalisation, or DD-GAN's adaptive version of it, where a latent vector sets scale and shift."""

    def __init__(self, channels: int, latent: int = 0) -> None:
        super().__init__(min(channels // 4, 32), channels, eps=1e-6, affine=latent == 0)
        self.style = nn.Linear(latent, 2 * channels) if latent else None
        if self.style is not None:
            nn.init.constant_(self.style.bias[:channels], 1.0)

    def forward(self, x: Tensor, latent: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        if self.style is None:
            return x
        scale, shift = self.style(latent)[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(shift, scale, x)


class Resample(nn.Module):
    """Resample by 2 or 1/2, with the FIR filter [1, 3, 3, 1], or with the nearest pixel and the mean of four."""

    def __init__(self, up: bool, fir: bool) -> None:
        super().__init__()
        self.up = up
        self.register_buffer("filter", fir_filter() if fir else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.filter is None:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        if self.up:
            return fir_bias_act(x, filter=self.filter, up=2, padding=(2, 1), fir_gain=4.0)
        return fir_bias_act(x, filter=self.filter, down=2, padding=(1, 1))


class Attention(nn.Module):
    """Self-attention over the pixels with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, dim=3)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return (x + self.out(attended)) * math.sqrt(0.5)


class Block(nn.Module):
    """BigGAN's residual block as in Song et al. 2021b, appendix H.1: it resamples, and divides the sum by sqrt(2)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        latent: int = 0,
        *,
        resample: Resample | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = Norm(channels_in, latent)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(embedding, channels_out)
        self.norm2 = Norm(channels_out, latent)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        kept = channels_in == channels_out and resample is None
        self.shortcut = nn.Identity() if kept else nn.Conv2d(channels_in, channels_out, 1)
        self.attention = Attention(channels_out) if attention else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, latent: Tensor | None) -> Tensor:
        h = F.silu(self.norm1(x, latent))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h) + self.time(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h, latent)))
        return self.attention((self.shortcut(x) + h) * math.sqrt(0.5))


class NCSNpp(nn.Module):
    """DDPM++ (Song et al. 2021b, appendix H), or DD-GAN's generator (Xiao et al. 2022, appendix C).

    Args:
        resolution: resolution of the images.
        channels: number of channels at each resolution, from the image's resolution downwards.
        blocks: number of residual blocks per resolution on the way down; there is one more on the way up.
        attention: resolution with attention, after each block on the way down and after the last one on the way up.
        mapping: None for DDPM++. Otherwise the number of hidden layers of the mapping network of DD-GAN's generator,
            through which the latent vector sets the scales of all normalisations. This generator is NCSN++, which also
            has FIR filters and a residual pyramid of the input.
        latent_width: width of these hidden layers.
    """

    def __init__(
        self,
        resolution: int,
        channels: tuple[int, ...],
        blocks: int,
        *,
        attention: int = 16,
        mapping: int | None = None,
        latent_width: int = 256,
    ) -> None:
        super().__init__()
        fir, latent = mapping is not None, latent_width if mapping is not None else 0
        width = channels[0]
        embedding = 4 * width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())
        self.mapping = None
        if mapping is not None:
            widths = [DDGAN_LATENT, *[latent_width] * (mapping + 1)]
            layers = [(nn.Linear(i, o), nn.SiLU()) for i, o in itertools.pairwise(widths)]
            self.mapping = nn.Sequential(*itertools.chain.from_iterable(layers))
        block = partial(Block, embedding=embedding, latent=latent)

        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.pyramid, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        current, skips, pyramid = width, [width], 3
        last = len(channels) - 1
        for level, c in enumerate(channels):
            for _ in range(blocks):
                self.down.append(block(current, c, attention=resolution >> level == attention))
                skips.append(c)
                current = c
            if level < last:
                self.down.append(block(c, c, resample=Resample(up=False, fir=fir)))
                skips.append(c)
                if mapping is not None:
                    self.pyramid.append(nn.Conv2d(pyramid, c, 3, stride=2))
                    pyramid = c
        self.middle = nn.ModuleList([block(current, current, attention=True), block(current, current)])
        for level, c in reversed(list(enumerate(channels))):
            for i in range(blocks + 1):
                at_end = i == blocks and resolution >> level == attention
                self.up.append(block(current + skips.pop(), c, attention=at_end))
                current = c
            if level > 0:
                self.up.append(block(c, c, resample=Resample(up=True, fir=fir)))
        self.norm = Norm(width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        self.register_buffer("filter", fir_filter() if fir else None, persistent=False)

    def forward(self, x: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        """
        Args:
            x: [N, 3, H, W].
            t: [N], times in [0, 1].
            latent: [N, 100], standard normal; only for DD-GAN.

        Returns:
            [N, 3, H, W].
        """
        time = self.time(sinusoidal_embedding(t, self.first.out_channels).to(x.dtype))
        if self.mapping is not None:
            latent = latent.to(x.dtype)
            latent = self.mapping(latent * (latent.square().mean(1, keepdim=True) + 1e-8).rsqrt())
        pyramid, x = x, self.first(x)
        pyramids = iter(self.pyramid)
        skips = [x]
        for block in self.down:
            x = block(x, time, latent)
            if block.resample is not None and self.mapping is not None:
                pyramid = next(pyramids)(fir_bias_act(pyramid, filter=self.filter, padding=(2, 2)))
                x = pyramid = (pyramid + x) * math.sqrt(0.5)
            skips.append(x)
        for block in self.middle:
            x = block(x, time, latent)
        for block in self.up:
            x = block(x if block.resample is not None else torch.cat([x, skips.pop()], dim=1), time, latent)
        return self.last(F.silu(self.norm(x)))


# The rivals by preset. NFE and seconds are from the SPI-GAN paper's Table 2. Numbers of parameters are from Ho et al.
# 2020, appendix B, and Phung et al. 2023, "Wavelet diffusion models", comparison with DD-GAN.
PEERS = {
    "cifar10": (
        Peer(
            name="DDPM",
            resolution=32,
            nfe=1000,
            build=partial(ddpm_unet, 32, (128, 256, 256, 256)),
            chain=partial(ddpm_chain, scheduler="DDPMScheduler", steps=1000),
            published_parameters=35.7e6,
            paper_seconds=80.5,
        ),
        Peer(
            name="DDIM, T=50",
            resolution=32,
            nfe=50,
            build=partial(ddpm_unet, 32, (128, 256, 256, 256)),
            chain=partial(ddpm_chain, scheduler="DDIMScheduler", steps=50),
            published_parameters=35.7e6,
            paper_seconds=4.01,
        ),
        # DDPM++ cont. (deep, VP): the row of Song et al. 2021b, table 3, with the same IS and FID as Table 2. DDPM++ is
        # NCSN++ without FIR filters and pyramid, and "deep" doubles its 4 blocks (appendix H.2). The rest is from the
        # authors' configuration "vp/cifar10_ddpmpp_deep_continuous".
        Peer(
            name="Score SDE (VP)",
            resolution=32,
            nfe=2000,
            build=partial(NCSNpp, 32, (128, 256, 256, 256), 8),
            chain=partial(score_sde_vp_chain, steps=2000),
            published_parameters=None,  # the authors do not state it
            paper_seconds=421.5,
        ),
        # For both data sets, widths, blocks, mapping layers and steps are from the authors' training commands.
        Peer(
            name="DD-GAN",
            resolution=32,
            nfe=4,
            build=partial(NCSNpp, 32, (128, 256, 256, 256), 2, mapping=4),
            chain=partial(ddgan_chain, steps=4),
            published_parameters=48.43e6,
            paper_seconds=0.21,
        ),
    ),
    # The paper has no times for these: its Table 3 shows only FID.
    "celebahq256": (
        Peer(
            name="DDPM",
            resolution=256,
            nfe=1000,
            build=partial(ddpm_unet, 256, (128, 128, 256, 256, 512, 512)),
            chain=partial(ddpm_chain, scheduler="DDPMScheduler", steps=1000),
            published_parameters=114e6,
        ),
        Peer(
            name="Score SDE (VE)",
            resolution=256,
            nfe=4000,
            build=score_sde_ve_unet,
            chain=partial(score_sde_ve_chain, steps=2000),
            published_parameters=65e6,  # Richter, https://github.com/sp-uhh/sgmse/issues/11, of this configuration
        ),
        Peer(
            name="DD-GAN",
            resolution=256,
            nfe=2,
            build=partial(NCSNpp, 256, (64, 64, 128, 128, 256, 256), 2, mapping=3),
            chain=partial(ddgan_chain, steps=2),
            published_parameters=39.73e6,
        ),
    ),
}
