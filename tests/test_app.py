"""The page of `spigan app`: what its controls do, and the page itself in a browser."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import spigan
from spigan import SPIGAN, ModelConfig
from spigan import app as app_module
from spigan.app import MAX_COUNT, Page, build, is_loopback, launch, read_seed
from spigan.cli import app as command_line
from spigan.images import display_scale, make_grid, to_uint8
from spigan.sampling.interpolation import interpolate_h, interpolate_time, interpolate_z

BUNDLED, CIFAR = "digits (bundled)", "cifar10-small (bundled)"
TINY = {"resolution": 8, "img_channels": 3, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny <b>"
    SPIGAN(ModelConfig.model_validate(TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page(saved: Path) -> Page:
    return Page([saved], device="cpu")


def pixels(figure: str) -> np.ndarray:
    """uint8 [H, W] or [H, W, C] of the picture in a figure, which is also its download."""
    shown, download = re.findall(r'"data:image/png;base64,([^"]+)"', figure)
    assert shown == download
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))))


def as_shown(images: torch.Tensor) -> np.ndarray:
    """uint8 [1, 16, 16] or [C, H, W] as `pixels` gives it."""
    return images.permute(1, 2, 0).squeeze(2).numpy()


def test_models_to_choose_from(page: Page, saved: Path) -> None:
    assert list(page.models) == [str(saved), BUNDLED, CIFAR]
    assert "32 x 32, RGB" in page.about(CIFAR)
    assert list(Page(["cifar10-small"], device="cpu").models) == [CIFAR, BUNDLED]
    assert "8 x 8, RGB" in page.about(str(saved)) and "on cpu" in page.about(str(saved))
    assert "16 x 16, grey" in page.about(BUNDLED) and "322,128 parameters" in page.about(BUNDLED)


def test_batch_is_what_sample_draws(page: Page, saved: Path) -> None:
    figure, note = page.batch(BUNDLED, " 7 ", 3)
    expected = to_uint8(spigan.sample(3, seed=7, device="cpu") * 2 - 1)
    np.testing.assert_array_equal(pixels(figure), as_shown(make_grid(expected, columns=2, scale=4)))
    assert 'download="digits-seeds-7-9.png"' in figure
    assert re.search(r"3 images, seeds 7 to 9: [\d.e+]+ ms \([\d.e+]+ ms each\) · NFE = 1 · \w+ on cpu", note)
    figure, note = page.batch(str(saved), "7", 1)
    assert 'download="tiny-b--seed-7.png"' in figure and "seed 7: " in note
    assert pixels(figure).shape == (8, 8, 3)  # one image is downloaded as it is
    assert "image-rendering: pixelated; width: 384px" in figure  # 48 screen pixels to a pixel
    assert "<b>" not in figure


def test_time_is_the_interpolation_of_time(page: Page) -> None:
    figure, note = page.time(BUNDLED, "3", [0.25])
    np.testing.assert_array_equal(pixels(figure), as_shown(interpolate_time([3], [0.25], device="cpu")[0, 0]))
    assert "seed 3, t = 0.25: " in note and "NFE = 1" in note
    assert 'download="digits-seed-3-t-0.25.png"' in figure
    figure, _ = page.time(BUNDLED, "3")
    strip = interpolate_time([3], 9, device="cpu")[0]
    np.testing.assert_array_equal(pixels(figure), as_shown(make_grid(strip, columns=9, scale=4)))


@pytest.mark.parametrize(("kind", "interpolate"), [("z", interpolate_z), ("h", interpolate_h)])
def test_between_two_seeds(page: Page, kind: str, interpolate: Any) -> None:
    figure, note = page.between(BUNDLED, kind, "3", "4", [0.3])
    np.testing.assert_array_equal(pixels(figure), as_shown(interpolate([3, 4], [0.3], device="cpu")[0, 0]))
    assert f"{kind} of seeds 3 and 4, a = 0.30: " in note
    figure, _ = page.between(BUNDLED, kind, "3", "4")
    np.testing.assert_array_equal(
        pixels(figure), as_shown(make_grid(interpolate([3, 4], 9, device="cpu")[0], columns=9, scale=4))
    )


@pytest.mark.parametrize("text", ["-1", "text", "1.5", "", "²", str(2**63), str(2**64), "9" * 5000, "1_0"])
def test_what_is_no_seed(text: str) -> None:
    with pytest.raises(ValueError, match=r"A seed must be a whole number from 0 to 9223372036854775807, got .{1,43}\."):
        read_seed(text)


def test_seeds() -> None:
    assert [read_seed(text) for text in ("0", " 12 ", "007", str(2**63 - 1))] == [0, 12, 7, 2**63 - 1]


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("batch", (BUNDLED, "0", 0), f"images must be a whole number from 1 to {MAX_COUNT}, got 0"),
        ("batch", (BUNDLED, "0", MAX_COUNT + 1), f"a whole number from 1 to {MAX_COUNT}, got {MAX_COUNT + 1}"),
        ("batch", (BUNDLED, "0", 2.5), f"a whole number from 1 to {MAX_COUNT}, got 2.5"),
        ("batch", (BUNDLED, "0", None), f"a whole number from 1 to {MAX_COUNT}, got nothing"),
        ("batch", (BUNDLED, str(2**63 - 2), 3), "The last seed, 9223372036854775808, exceeds"),
        ("batch", ("nothing", "0", 1), "There is no model nothing; available: "),
        ("time", (BUNDLED, "0", [1.5]), "t must be a number from 0 to 1, got 1.5"),
        ("between", (BUNDLED, "z", "0", "1", [None]), "a must be a number from 0 to 1, got nothing"),
        ("between", (BUNDLED, "z", "5", "05"), "Both seeds are 5"),
        ("between", (BUNDLED, "w", "5", "6"), "kind must be z or h, got w"),
    ],
)
def test_refused(page: Page, method: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(page, method)(*arguments)


def test_a_model_of_the_analytic_path(tmp_path: Path) -> None:
    SPIGAN(ModelConfig.model_validate(TINY | {"mapping": "mlp", "path": "analytic"})).save_pretrained(tmp_path / "fade")
    page, name = Page([tmp_path / "fade"], device="cpu"), str(tmp_path / "fade")
    strip = interpolate_time([5], 9, model=tmp_path / "fade", device="cpu")[0]
    grid = make_grid(strip, columns=9, scale=display_scale(8))
    np.testing.assert_array_equal(pixels(page.time(name, "5")[0]), as_shown(grid))


def test_a_model_without_time(tmp_path: Path) -> None:
    SPIGAN(ModelConfig.model_validate(TINY | {"mapping": "mlp"})).save_pretrained(tmp_path / "mlp")
    page, name = Page([tmp_path / "mlp"], device="cpu"), str(tmp_path / "mlp")
    with pytest.raises(ValueError, match="has no time"):
        page.time(name, "0")
    assert pixels(page.between(name, "z", "0", "1", [0.5])[0]).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("example.org", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


# ---- The command ----


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command would serve."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(app_module, "launch", lambda page, **options: calls.append({"page": page, **options}))
    return calls


def test_command_binds_to_loopback(launched: list[dict[str, Any]], saved: Path) -> None:
    result = CliRunner().invoke(command_line, ["app", "--model", str(saved), "--model", str(saved), "--device", "cpu"])
    assert result.exit_code == 0 and result.stderr == ""
    (call,) = launched
    assert list(call.pop("page").models) == [str(saved), BUNDLED, CIFAR]
    assert call == {"host": "127.0.0.1", "port": None, "browser": False}


def test_command_warns_of_other_hosts(launched: list[dict[str, Any]]) -> None:
    result = CliRunner().invoke(command_line, ["app", "--host", "0.0.0.0", "--port", "9000", "--open"])
    assert "warning: anyone who can reach this machine at 0.0.0.0 can use the page; it has no password" in result.stderr
    assert (launched[0]["host"], launched[0]["port"], launched[0]["browser"]) == ("0.0.0.0", 9000, True)


def test_command_refuses(launched: list[dict[str, Any]]) -> None:
    result = CliRunner().invoke(command_line, ["app", "--model", "missing"])
    assert (
        result.exit_code == 1 and "error: model 'missing' is neither an existing folder nor a hub id" in result.stderr
    )
    result = CliRunner().invoke(command_line, ["app", "--device", "tpu"])
    assert result.exit_code == 1 and "device must be auto, cpu, cuda" in result.stderr
    assert not launched


def test_without_gradio(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ImportError, match=re.escape('pip install "spigan[app]"')):
        build(page)


# ---- The page ----


@pytest.fixture(scope="module")
def address(page: Page) -> Iterator[str]:
    """Address of a page that is served."""
    pytest.importorskip("gradio")
    blocks, url = launch(page, block=False)
    yield url
    blocks.close()


@pytest.mark.slow
def test_served_on_loopback_alone(address: str) -> None:
    assert urlsplit(address).hostname == "127.0.0.1"
    # Linux gives the whole of 127/8 to this machine: what listens on every address would answer here too.
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", urlsplit(address).port)) == 0
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", urlsplit(address).port)) != 0


@pytest.mark.slow
def test_where_nobody_can_listen(page: Page, address: str) -> None:
    port = urlsplit(address).port
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
        launch(page, port=port, block=False)
    with pytest.raises(OSError, match=r"cannot listen on 192\.0\.2\.1: "):  # an address of documentation, nobody's
        launch(page, host="192.0.2.1", block=False)
    with pytest.raises(OSError, match=r"cannot listen on a\.\.b: "):
        launch(page, host="a..b", block=False)


@pytest.mark.slow
def test_served_through_a_proxy_and_on_ipv6(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy is for other machines: gradio asks this one."""
    pytest.importorskip("gradio")
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.org")
    hosts = ["127.0.0.1"]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:  # machines without IPv6
        probe.bind(("::1", 0))
        hosts.append("::1")
    for host in hosts:
        blocks, url = launch(page, host=host, block=False)
        blocks.close()
        assert urlsplit(url).hostname == host


@pytest.mark.slow
def test_nothing_is_reported(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio reports the start of a page and asks for newer versions, unless told not to."""
    gradio = pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    calls = []
    for name in ("version_check", "initiated_analytics", "launched_analytics"):
        monkeypatch.setattr(gradio.analytics, name, lambda *a, name=name: calls.append(name))
    blocks, _ = launch(page, block=False)
    blocks.close()
    assert calls == [] and blocks.share is False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        # Containers run as root, where Chromium's sandbox refuses to start; the page is our own.
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Tab:
    """A tab of the page in the browser."""

    def __init__(self, browser: Any, address: str, name: str, width: int = 1100) -> None:
        self.view = browser.new_page(viewport={"width": width, "height": 900})
        self.requests: list[str] = []
        self.problems: list[str] = []
        self.view.on("request", lambda request: self.requests.append(request.url))
        self.view.on("pageerror", lambda error: self.problems.append(str(error)))
        self.view.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        self.view.goto(address)
        self.view.get_by_role("tab", name=name, exact=True).click()
        self.panel = self.view.get_by_role("tabpanel").filter(visible=True)
        self.images = self.panel.locator("figure img")
        self.notes = self.panel.locator(".spigan-note")
        self.alert = self.panel.get_by_role("alert")
        self.notes.first.wait_for()

    def changed(self, action: Any, image: int = 0) -> str:
        """The source of an image after `action`, which must change it."""
        before = self.images.nth(image).get_attribute("src")
        action()
        self.view.wait_for_function(
            "([element, before]) => element.isConnected ? element.src != before : true",
            arg=[self.images.nth(image).element_handle(), before],
            timeout=10_000,
        )
        after = self.images.nth(image).get_attribute("src")
        assert after != before
        return str(after)


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def test_slider_goes_from_noise_to_image(browser: Any, address: str) -> None:
    tab = Tab(browser, address, "Noise to image")
    tab.view.get_by_label("Model").click()
    tab.changed(lambda: tab.view.get_by_role("option", name=BUNDLED).click())
    slider = tab.panel.get_by_role("slider", name=re.compile(r"\bt\b")).first
    slider.focus()
    seen = [decoded(tab.changed(lambda: slider.press("Home")))]
    assert "t = 0.00" in tab.notes.first.inner_text()
    seen.append(decoded(tab.changed(lambda: slider.press("End"))))
    for image, time in zip(seen, (0.0, 1.0), strict=True):
        np.testing.assert_array_equal(image, as_shown(interpolate_time([0], [time], device="cpu")[0, 0]))
    tab.changed(lambda: slider.press("ArrowLeft"))
    assert re.search(r"t = 0.99: [\d.]+ ms · NFE = 1 · \w+ on cpu", tab.notes.first.inner_text())
    assert tab.problems == []


@pytest.mark.parametrize("text", ["-1", "text", str(2**64)])
def test_invalid_seed_shows_a_message(browser: Any, address: str, text: str) -> None:
    tab = Tab(browser, address, "Batch")
    before = tab.images.first.get_attribute("src")
    box = tab.panel.get_by_label("First seed")
    box.fill(text)
    tab.alert.wait_for()
    assert tab.alert.inner_text() == f"A seed must be a whole number from 0 to 9223372036854775807, got {text}."
    assert "Traceback" not in tab.view.content()
    assert tab.images.first.get_attribute("src") == before  # the picture stays
    tab.changed(lambda: box.fill("5"))
    assert tab.alert.count() == 0 and "seeds 5 to 20" in tab.notes.first.inner_text()


def test_what_is_typed_beside_a_slider(browser: Any, address: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Out of range or empty while somebody types: a message, and then the picture of what the box is put right to."""
    tab = Tab(browser, address, "Batch")
    box = tab.panel.locator("input[type=number]").first
    for text, shown in (("", "nothing"), ("100", "100")):
        box.fill(text)
        tab.alert.filter(has_text=f"a whole number from 1 to {MAX_COUNT}, got {shown}.").wait_for()
    box.press("Tab")
    tab.notes.filter(has_text=f"{MAX_COUNT} images, seeds 0 to {MAX_COUNT - 1}").wait_for()
    assert tab.view.locator(".toast-body").count() == 0 and tab.problems == []
    assert "Traceback" not in "".join(capfd.readouterr())


def test_download_is_the_picture(browser: Any, address: str) -> None:
    tab = Tab(browser, address, "Batch")
    with tab.view.expect_download() as waiting:
        tab.panel.get_by_role("link", name="Download PNG").click()
    assert waiting.value.suggested_filename == "tiny-b--seeds-0-15.png"
    with Image.open(waiting.value.path()) as image:
        assert image.format == "PNG" and image.size == (280, 280)  # 4 x 9 - 1 pixels, enlarged 8 times


@pytest.mark.parametrize("name", ["Batch", "Noise to image", "Interpolate"])
def test_other_seeds(browser: Any, address: str, name: str) -> None:
    tab = Tab(browser, address, name)
    tab.changed(lambda: tab.panel.get_by_role("button", name="Other seed").click())
    assert tab.alert.count() == 0
    shown = tab.panel.get_by_role("textbox", name=re.compile("seed", re.IGNORECASE)).first.input_value()
    assert f" {shown} " in tab.notes.first.inner_text().replace(",", " ")


def test_interpolation(browser: Any, address: str) -> None:
    tab = Tab(browser, address, "Interpolate")
    tab.changed(lambda: tab.panel.get_by_label("h(1), the latent").check(), image=1)
    assert "h of seeds 0 and 1, a = 0 to 1" in tab.notes.nth(1).inner_text()
    tab.changed(lambda: tab.panel.get_by_label("To seed").fill("9"))
    assert tab.alert.count() == 0
    assert tab.problems == []


@pytest.mark.parametrize("width", [390, 1100])
def test_no_request_leaves_this_machine_and_nothing_overflows(browser: Any, address: str, width: int) -> None:
    tab = Tab(browser, address, "Batch", width)
    assert len(tab.requests) > 10
    assert {urlsplit(url).hostname for url in tab.requests if not url.startswith("data:")} == {"127.0.0.1"}
    widths = set()
    for name in ("Batch", "Noise to image", "Interpolate"):
        tab.view.get_by_role("tab", name=name, exact=True).click()
        tab.view.get_by_role("tabpanel").filter(visible=True).locator("figure img").first.wait_for()
        assert tab.view.evaluate("document.documentElement.scrollWidth") <= width
        widths.add(tab.view.locator("main").bounding_box()["width"])
    assert len(widths) == 1  # the page does not jump
    assert tab.problems == []
