"""The page of `spigan app`: explore a model in the browser, with batches, noise to image, and interpolation.

The page works offline: it uses the system's fonts, embeds its images, and does not send data anywhere.
"""

from __future__ import annotations

import base64
import html
import io
import ipaddress
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spigan.images import display_scale, make_grid, to_pil
from spigan.models import SPIGAN
from spigan.models.load import BUNDLED_MODELS, load_model, resolve_device
from spigan.ops import BackendUnavailable, backends
from spigan.sampling import Sampler, count_evaluations, interpolation

if TYPE_CHECKING:
    from gradio import Blocks

MAX_COUNT = 64  # images per batch
STEPS = 9  # images per strip

_CSS = """
.gradio-container { width: 100% !important; max-width: 1000px !important; margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
.spigan-figure { margin: 0; text-align: center; }
.spigan-figure img { display: block; margin: 0 auto 0.5rem; max-width: 100%; border-radius: 4px; }
.spigan-figure a { font-size: var(--text-sm); }
.spigan-output { gap: 0.25rem !important; }
.spigan-output:has(.spigan-error) img { opacity: 0.3; } /* the picture of the last valid input */
.spigan-note, .spigan-error, .spigan-about { font-size: var(--text-sm); }
.spigan-note, .spigan-error { text-align: center; }
.spigan-note, .spigan-about { color: var(--body-text-color-subdued); }
.spigan-error { color: var(--error-text-color); background: var(--error-background-fill);
  border: 1px solid var(--error-border-color); border-radius: 6px; padding: 0.5rem 0.75rem; }
"""


class Page:
    """The functions behind the controls of the page.

    Args:
        models: run folders, saved models or hub ids to offer in addition to the bundled models.
        device: device to compute on (default: cuda if available, else the CPU).

    Attributes:
        models: the models, by the names that the page shows: first the given models, then the bundled ones.

    Raises:
        FileNotFoundError, ValueError: if a model cannot be loaded.
        BackendUnavailable: if a backend requested by name cannot run.
    """

    def __init__(self, models: Sequence[str | Path] = (), device: str | None = None) -> None:
        self.device = resolve_device(device)
        self.models = {
            f"{model} (bundled)" if model in BUNDLED_MODELS else str(model): load_model(model, self.device)
            for model in (*models, *BUNDLED_MODELS)
        }
        self._lock = threading.Lock()  # a sampler serves one thread at a time, and timing needs an idle device
        self._nfe = {}
        for name, model in self.models.items():
            with count_evaluations(model) as evaluations:
                Sampler(model, output="uint8")([0], to="cpu")  # warm up, so that the first picture is not slower
            self._nfe[name] = evaluations[0]
        chosen = {entry["chosen"] for entry in backends.describe(self.device).values()}
        self._backend = ", ".join(sorted(map(str, chosen)))

    def about(self, name: str) -> str:
        """Return one line of HTML about a model."""
        model = self.models[name]
        config = model.config
        parameters = sum(parameter.numel() for parameter in model.parameters())
        kind = "grey" if config.img_channels == 1 else "RGB"
        size = f"{config.resolution} x {config.resolution}, {kind}"
        return f'<div class="spigan-about">{size} · {parameters:,} parameters · {self._backend} on {self.device}</div>'

    def batch(self, name: str, seed: str, count: int) -> tuple[str, str]:
        """Draw a grid of images with `count` consecutive seeds.

        Args:
            name: one of `models`.
            seed: the first seed, as typed.
            count: number of images, 1 to `MAX_COUNT`.

        Returns:
            HTML of the picture with a download link, and HTML of a line with the time and device.

        Raises:
            ValueError: if the seed is invalid or the count is out of range.
        """
        first = read_seed(seed)
        if count not in range(1, MAX_COUNT + 1):
            shown = "nothing" if count is None else count
            raise ValueError(f"The number of images must be a whole number from 1 to {MAX_COUNT}, got {shown}.")
        seeds = range(first, first + int(count))
        if seeds[-1] >= 2**63:
            raise ValueError(f"The last seed, {seeds[-1]}, exceeds {2**63 - 1}: choose a smaller first seed.")

        def draw(model: SPIGAN) -> Tensor:
            sampler = Sampler(model, output="uint8", cuda_graph=False)  # a graph does not pay for one call
            return sampler(seeds, to="cpu")[None]

        return self._draw(
            name,
            draw,
            f"seeds-{first}-{seeds[-1]}" if len(seeds) > 1 else f"seed-{first}",
            f"{len(seeds)} images, seeds {first} to {seeds[-1]}" if len(seeds) > 1 else f"seed {first}",
            columns=max(1, round(len(seeds) ** 0.5)),
        )

    def time(self, name: str, seed: str, steps: interpolation.Steps = STEPS) -> tuple[str, str]:
        """Draw the images of one z, from h(0) (noise) to h(1) (the image) (Fig. 9).

        Args:
            name, seed: as in `batch`.
            steps: number of times, or a list of times; see `spigan.sampling.interpolation`.

        Raises:
            ValueError: if the seed is invalid, the model has no time, or a time is out of range.
        """
        number = read_seed(seed)
        return self._draw(
            name,
            lambda model: interpolation.interpolate_time([number], steps, model=model),
            f"seed-{number}-{_caption('t', steps)}",
            f"seed {number}, {_caption('t', steps)}",
        )

    def between(
        self, name: str, kind: str, first: str, second: str, steps: interpolation.Steps = STEPS
    ) -> tuple[str, str]:
        """Draw images between the images of two seeds, by interpolating z (Fig. 10) or h(1) (Fig. 11).

        Args:
            name: as in `batch`.
            kind: "z" or "h".
            first, second: the seeds, as typed.
            steps: number of images, or a list of weights of the second seed in [0, 1].

        Raises:
            ValueError: if the seeds are invalid or equal, or a weight is out of range.
        """
        if kind not in ("z", "h"):
            raise ValueError(f"kind must be z or h, got {kind}.")
        seeds = [read_seed(first), read_seed(second)]
        if seeds[0] == seeds[1]:
            raise ValueError(f"Both seeds are {seeds[0]}: choose two different seeds.")
        mix = interpolation.interpolate_z if kind == "z" else interpolation.interpolate_h
        return self._draw(
            name,
            lambda model: mix(seeds, steps, model=model),
            f"{kind}-{seeds[0]}-{seeds[1]}-{_caption('a', steps)}",
            f"{kind} of seeds {seeds[0]} and {seeds[1]}, {_caption('a', steps)}",
        )

    def _draw(
        self, name: str, draw: Callable[..., Tensor], title: str, caption: str, columns: int | None = None
    ) -> tuple[str, str]:
        """Return HTML of the picture, and HTML of the line below it.

        `draw` takes a model and returns its images, uint8 [1, S, C, H, W] on the CPU.
        """
        if name not in self.models:
            raise ValueError(f"There is no model {name}; available: {', '.join(self.models)}.")
        with self._lock:
            began = time.perf_counter()
            images = draw(self.models[name])[0]
            elapsed = 1e3 * (time.perf_counter() - began)
        count = len(images)
        each = f" ({elapsed / count:.2g} ms each)" if count > 1 else ""
        note = f"{caption}: {elapsed:.3g} ms{each} · NFE = {self._nfe[name]} · {self._backend} on {self.device}"
        stem = re.sub(r"[^\w.-]+", "-", f"{Path(name).name.removesuffix(' (bundled)')}-{title}")
        # A strip fills the width of the page. Other pictures fill the column next to the controls.
        width, columns = (912, count) if columns is None and count > 1 else (384, columns or 1)
        picture = figure(images, columns, f"{stem}.png", caption, width)
        return picture, f'<div class="spigan-note">{html.escape(note)}</div>'


def read_seed(text: str) -> int:
    """Parse a seed.

    Raises:
        ValueError: if it is not a whole number in [0, 2^63).
    """
    text = str(text).strip()
    if re.fullmatch(r"[0-9]{1,19}", text) and int(text) < 2**63:
        return int(text)
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    raise ValueError(f"A seed must be a whole number from 0 to {2**63 - 1}, got {shown or 'nothing'}.")


def figure(images: Tensor, columns: int, file_name: str, alt: str, width: int) -> str:
    """Return HTML that shows images, with a link to download them. Small images are enlarged with crisp pixels.

    Args:
        images: uint8 [N, C, H, W].
        columns: number of images per row.
        file_name: file name of the download. One image is downloaded unchanged, and several as the grid that
            `spigan sample` writes.
        alt: alternative text.
        width: maximum width in screen pixels.
    """
    scale = display_scale(images.shape[-1]) if len(images) > 1 else 1
    grid = make_grid(images, columns=columns, scale=scale)
    stream = io.BytesIO()
    to_pil(grid[None])[0].save(stream, format="PNG")
    data = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    pixels = grid.shape[-1] // scale
    # Enlarge each pixel to a whole number of screen pixels. Shrink smoothly.
    style = (
        f"image-rendering: pixelated; width: {width // pixels * pixels}px" if pixels <= width else f"width: {width}px"
    )
    return (
        f'<figure class="spigan-figure"><img src="{data}" alt="{html.escape(alt)}" style="{style}">'
        f'<figcaption><a href="{data}" download="{html.escape(file_name)}">Download PNG</a></figcaption></figure>'
    )


def build(page: Page) -> Blocks:
    """Build the page.

    Raises:
        ImportError: if gradio is not installed.
    """
    gr = _require_gradio()
    first = next(iter(page.models))

    def shown(draw: Callable[..., tuple[str, str]]) -> Callable[..., Any]:
        """Wrap `draw` for the page: invalid input keeps the picture, and shows the error in the line below it."""

        def answer(*values: Any) -> tuple[Any, str]:
            try:
                return draw(*values)
            except (ValueError, TypeError, BackendUnavailable) as error:
                return gr.skip(), f'<div class="spigan-error" role="alert">{html.escape(str(error))}</div>'

        return answer

    def seed_box(label: str, value: str) -> Any:
        # Text, because numbers in JavaScript are exact only up to 2^53.
        return gr.Textbox(value, label=label, max_lines=1, min_width=100)

    with gr.Blocks(title="SPI-GAN", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# SPI-GAN\nNoise becomes an image in one evaluation of the generator: t = 0 is noise, t = 1 the image."
        )
        model = gr.Dropdown(list(page.models), value=first, label="Model", interactive=True)
        about = gr.HTML(page.about(first))
        quick: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
        # While the user types, the box of a slider may hold an invalid number. `Page` reports it in the right place.
        quick["preprocess"] = False

        def output() -> list[Any]:
            with gr.Column(elem_classes="spigan-output"):
                return [gr.HTML(), gr.HTML()]

        def new_seed() -> str:
            return str(secrets.randbelow(1_000_000))

        with gr.Tab("Batch"), gr.Row():
            with gr.Column(scale=1, min_width=240):
                seed = seed_box("First seed", "0")
                count = gr.Slider(1, MAX_COUNT, 16, step=1, label="Images")
                other = gr.Button("Other seeds", size="md")
            with gr.Column(scale=2, min_width=320):
                batch = output()
        changed = [blocks.load, model.change, seed.change]
        gr.on([*changed, count.change], shown(page.batch), [model, seed, count], batch, **quick)
        other.click(new_seed, None, seed, **quick)

        with gr.Tab("Noise to image"):
            with gr.Row():
                with gr.Column(scale=1, min_width=240):
                    seed = seed_box("Seed", "0")
                    t = gr.Slider(0, 1, 1, step=0.01, label="t", info="0: noise, 1: the image")
                    other = gr.Button("Other seed", size="md")
                with gr.Column(scale=2, min_width=320):
                    image = output()
            strip = output()
        at = shown(lambda name, seed, t: page.time(name, seed, [t]))
        changed = [blocks.load, model.change, seed.change]
        gr.on([*changed, t.change], at, [model, seed, t], image, **quick)
        gr.on(changed, shown(page.time), [model, seed], strip, **quick)
        other.click(new_seed, None, seed, **quick)

        with gr.Tab("Interpolate"):
            with gr.Row():
                with gr.Column(scale=1, min_width=240):
                    with gr.Row():
                        ends = [seed_box("From seed", "0"), seed_box("To seed", "1")]
                    kind = gr.Radio([("z, the noise", "z"), ("h(1), the latent", "h")], value="z", label="Interpolate")
                    a = gr.Slider(0, 1, 0.5, step=0.01, label="a", info="0: first seed, 1: second seed")
                    other = gr.Button("Other seeds", size="md")
                with gr.Column(scale=2, min_width=320):
                    image = output()
            strip = output()
        at = shown(lambda name, kind, first, second, a: page.between(name, kind, first, second, [a]))
        changed = [blocks.load, model.change, kind.change, *(end.change for end in ends)]
        gr.on([*changed, a.change], at, [model, kind, *ends, a], image, **quick)
        gr.on(changed, shown(page.between), [model, kind, *ends], strip, **quick)
        other.click(lambda: [new_seed(), new_seed()], None, ends, **quick)

        model.change(page.about, model, about, **quick)
    return blocks


def launch(page: Page, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = False,
           block: bool = True) -> tuple[Blocks, str]:  # fmt: skip
    """Serve the page.

    Args:
        page: the functions of the page.
        host: address to listen on.
        port: port to listen on (default: the first free one from 7860).
        browser: whether to open the page in the browser.
        block: whether to wait until Ctrl-C.

    Returns:
        The page, whose method `close` stops it, and its address.

    Raises:
        ImportError: if gradio is not installed.
        OSError: if the port is in use, or the address does not belong to this machine.
    """
    gr = _require_gradio()
    try:  # with a wrong address, gradio would try a hundred ports for minutes
        family, kind, _, _, where = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except (OSError, UnicodeError) as error:  # UnicodeError: an impossible host name
        at = f"{host}, port {port}" if port else host
        raise OSError(f"cannot listen on {at}: {getattr(error, 'strerror', None) or error}") from error
    # Gradio requests the state of the page that it started, and a proxy from HTTP_PROXY could not reach the page.
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", "::1", host]
    os.environ["no_proxy"] = ",".join(filter(None, direct))
    blocks = build(page)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = blocks.launch(
        server_name=f"[{host}]" if ":" in host else host,
        server_port=port,
        share=False,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        theme=gr.themes.Default(primary_hue="slate", neutral_hue="slate", **fonts),
        css=_CSS,
    )
    print(f"Serving on {address} (Ctrl-C to stop)", flush=True)
    if block:
        blocks.block_thread()
    return blocks, address


def is_loopback(host: str) -> bool:
    """Return whether the address can only be reached from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _caption(symbol: str, steps: interpolation.Steps) -> str:
    """Return the part of a caption about times or weights: "t = 0 to 1" or "a = 0.30".

    Raises:
        ValueError: if a time or weight is not a number in [0, 1].
    """
    if isinstance(steps, int):
        return f"{symbol} = 0 to 1"
    for value in steps:
        if not (isinstance(value, (int, float)) and 0 <= value <= 1):
            raise ValueError(f"{symbol} must be a number from 0 to 1, got {'nothing' if value is None else value}.")
    return f"{symbol} = {', '.join(f'{value:.2f}' for value in steps)}"


def _require_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f'the page needs gradio: pip install "spigan[app]" ({error})') from error
    return gradio
