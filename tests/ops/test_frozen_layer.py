"""spigan.ops.frozen_layer: `modulated_conv2d` on kernels, in every form of the weights, against its reference."""

from __future__ import annotations

import itertools

import pytest
import torch

from spigan.ops import BACKENDS, BackendUnavailable, frozen_layer, layer_weights, modulated_conv2d, philox_normal
from spigan.ops.backends import why_unavailable
from spigan.ops.layer_end import LayerEnd, finish_layer
from spigan.ops.upfirdn2d import fir_filter

KERNELS = [b for b in BACKENDS[1:] if why_unavailable("modulated_conv2d", b, torch.device("cpu")) is None]
RUNNING = ["reference", *KERNELS]
# Sums are powers of two, so that normalising in float32 does not round.
FILTERS = {
    "default": None,
    "1d": [1.0, 3.0, 3.0, 1.0],
    "1d asymmetric": [1.0, 4.0, 2.0, 1.0],
    "2d asymmetric": [[1.0, 5.0, 2.0], [4.0, 0.0, 1.0], [-3.0, 6.0, 0.0]],
    "long": [1.0, 0.0, 5.0, 2.0, 7.0, 1.0],
    "one": [1.0],
}


def single_layer(n, channels_in, channels_out, size, kernel, up, dtype, noise_rows=1, seed=0):
    """x (channels-last), weight, style, noise and bias of a layer, x in `dtype`, the others in float32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x = draw(n, channels_in, size, size).to(dtype, memory_format=torch.channels_last)
    weight, style = draw(channels_out, channels_in, kernel, kernel), draw(n, channels_in) * 0.5 + 1
    noise = draw(noise_rows, 1, up * size, up * size) if noise_rows else None
    return {"x": x, "weight": weight, "style": style, "noise": noise, "bias": draw(channels_out)}


def double(arguments):
    return {name: value.double() if torch.is_tensor(value) else value for name, value in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("n", "channels_in", "channels_out", "size", "kernel", "up"),
    [
        *itertools.product([1, 3], [5, 64], [3, 70], [4, 9], [1, 3], [1, 2]),
        (2, 16, 12, 7, 5, 1),
        (2, 16, 12, 7, 5, 2),
        (1, 64, 64, 23, 3, 1),  # Winograd, an odd size
        (9, 64, 96, 8, 3, 1),  # and several chunks of images
        (40, 64, 64, 8, 3, 1),
        (20, 8, 8, 8, 3, 2),
    ],
)
@pytest.mark.parametrize("demodulate", [True, False])
def test_kernel_values(
    n,
    channels_in,
    channels_out,
    size,
    kernel,
    up,
    demodulate,
    dtype,
    backend,
    assert_accurate,
    poisoned_memory,
    convolutions,
):
    arguments = single_layer(n, channels_in, channels_out, size, kernel, up, dtype, noise_rows=n)
    options = {"demodulate": demodulate, "up": up, "activation": "lrelu", "gain": 1.3}
    exact = modulated_conv2d(**double(arguments), **options, backend="reference")
    # The library's channels-last convolution, which the kernel uses, rounds otherwise than its other one.
    both = [modulated_conv2d(**arguments | {"x": x}, **options, backend="reference") for x in memory_formats(arguments)]
    plain = max(both, key=lambda y: (y.double() - exact).abs().max())
    actual = modulated_conv2d(**arguments, **options, backend=backend)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    # Winograd's sums of differences round about twice as much as a direct convolution of few channels.
    assert_accurate(actual, plain, exact, slack=4.0)


def memory_formats(arguments):
    return arguments["x"], arguments["x"].contiguous(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("noise_rows", [0, 1, 2])
@pytest.mark.parametrize(
    "end",
    [{}, {"activation": "lrelu"}, {"clamp": 0.7}, {"activation": "lrelu", "gain": 1.4, "clamp": 0.9}, {"bias": None}],
)
def test_kernel_does_what_follows_the_convolution(end, noise_rows, up, backend, convolutions):
    for channels, size in ((6, 5), (64, 12)):  # the smaller has too few channels for Winograd
        arguments = single_layer(2, channels, channels, size, 3, up, torch.float32, noise_rows) | end
        exact = modulated_conv2d(**double(arguments), up=up, backend="reference")
        actual = modulated_conv2d(**arguments, up=up, backend=backend)
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("filter", FILTERS.values(), ids=FILTERS.keys())
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("padding", [None, 0, 2])
def test_kernel_takes_any_filter_and_padding(padding, kernel, filter, backend, convolutions):
    arguments = single_layer(2, 6, 4, 6, kernel, 2, torch.float32, noise_rows=0)
    options = {"up": 2, "padding": padding, "resample_filter": None if filter is None else torch.tensor(filter)}
    exact = modulated_conv2d(**double(arguments), **double(options), backend="reference")
    actual = modulated_conv2d(**arguments, **options, backend=backend)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("up", [1, 2])
def test_kernel_takes_any_layout_and_empty_batches(up, backend, convolutions):
    arguments = single_layer(3, 64, 66, 9, 3, up, torch.float32, noise_rows=3)
    expected = modulated_conv2d(**arguments, up=up, backend=backend)
    views = {
        "x": torch.full((9, 2, 64, 9, 3), torch.nan).permute(4, 2, 0, 3, 1)[..., 0].copy_(arguments["x"]),
        "weight": arguments["weight"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "style": arguments["style"].t().contiguous().t(),
        "noise": arguments["noise"].transpose(2, 3).contiguous().transpose(2, 3),
        "bias": torch.stack([arguments["bias"]] * 2, 1)[:, 0],
    }
    torch.testing.assert_close(modulated_conv2d(**views, up=up, backend=backend), expected, rtol=0, atol=1e-5)
    empty = arguments | {"x": arguments["x"][:0], "style": arguments["style"][:0], "noise": None}
    assert modulated_conv2d(**empty, up=up, backend=backend).shape == (0, 66, 9 * up, 9 * up)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("up", [1, 2])
def test_kernel_with_gradients(up, backend):
    arguments = single_layer(2, 64, 8, 8, 3, up, torch.float32)
    names = ["x", "weight", "style", "noise", "bias"]

    def gradients(backend):
        inputs = {name: arguments[name].clone().requires_grad_() for name in names}
        y = modulated_conv2d(**inputs, up=up, activation="lrelu", backend=backend)
        first = torch.autograd.grad(y.square().sum(), inputs.values(), create_graph=True)
        second = torch.autograd.grad(first[2].square().sum(), [inputs["weight"], inputs["style"]])
        return *first, *second

    for actual, expected in zip(gradients(backend), gradients("reference"), strict=True):
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("channels", [6, 64])
def test_noise_is_drawn_from_the_stream_of_its_seed(channels, up, backend, convolutions):
    arguments = single_layer(3, channels, channels, 9, 3, up, torch.float32, noise_rows=0)
    options = {"up": up, "activation": "lrelu", "backend": backend, "noise_strength": torch.tensor(0.7)}
    for seed in (3, torch.tensor(2**40)):
        drawn = modulated_conv2d(**arguments | {"noise_seed": seed}, **options)
        noise = philox_normal((3, 1, 9 * up, 9 * up), seed=int(seed))
        torch.testing.assert_close(
            drawn, modulated_conv2d(**arguments | {"noise": noise}, **options), atol=3e-5, rtol=0
        )


def test_automatic_choice(noted_kernels):
    arguments = single_layer(2, 8, 8, 8, 3, 1, torch.float32)
    with noted_kernels:
        modulated_conv2d(**arguments)
        assert noted_kernels.calls == [("modulated_conv2d", "cpp")]
        noted_kernels.calls.clear()
        modulated_conv2d(**arguments | {"style": arguments["style"].requires_grad_()})
        assert noted_kernels.calls == 2 * [("fir_bias_act", "cpp")]  # before and after the library's convolution
    for options, cause in (
        ({"up": 2, "resample_filter": torch.ones(9)}, "filters of at most 8 taps, got 9"),
        ({"up": 2, "resample_filter": torch.ones(4, requires_grad=True)}, "no derivative with respect to the filter"),
        ({"gain": -1.0}, "derivatives only for a positive gain, got -1.0"),
    ):
        given_ones = {**arguments, "noise": None, **options}
        torch.testing.assert_close(
            modulated_conv2d(**given_ones), modulated_conv2d(**given_ones, backend="reference"), rtol=0, atol=1e-5
        )
        with pytest.raises(BackendUnavailable, match=cause):
            modulated_conv2d(**given_ones, backend="cpp")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("up", [1, 2])
def test_kernel_operator_is_well_behaved(up, backend):
    a = single_layer(2, 6, 4, 5, 3, up, torch.float32)
    noise = (a["noise"], torch.tensor(0.7), None)
    for noise_arguments in (noise, (None, torch.tensor(0.7), torch.tensor([5]))):
        tensors = (a["x"], a["weight"], a["style"], *noise_arguments, a["bias"])
        arguments = (*tensors, fir_filter(), True, up, 1, "lrelu", 1.4, 0.5, backend)
        torch.library.opcheck(torch.ops.spigan.modulated_conv2d.default, arguments)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernel_stays_whole_under_compile_and_export(backend):
    arguments = single_layer(3, 6, 4, 6, 3, 2, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, x, weight, style, noise, bias):
            return 2 * modulated_conv2d(x, weight, style, noise=noise, bias=bias, up=2, backend=backend)

    expected = Layer()(**arguments)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), expected)
    exported = torch.export.export(Layer(), (), kwargs=arguments).module()
    torch.testing.assert_close(exported(**arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("up", [1, 2])
def test_noise_of_a_seed_where_images_are_convolved_in_parts(up: int, dtype: torch.dtype, convolutions: None) -> None:
    x, weight, style = (torch.randn(shape, dtype=dtype) for shape in ((5, 3, 6, 7), (4, 3, 3, 3), (5, 3)))
    cpp, reference = (modulated_conv2d(x, weight, style, up=up, noise_seed=5, backend=b) for b in ("cpp", "reference"))
    torch.testing.assert_close(cpp, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("up", [1, 2])
def test_chunks_of_several_images(up, monkeypatch):
    """Two of five images at a time, by matrix products: each has its own style, noise and factors."""
    monkeypatch.setattr(layer_weights, "WINOGRAD_MIN_TILES", 1)
    monkeypatch.setattr(layer_weights, "WINOGRAD_MIN_CHANNELS", 1)
    monkeypatch.setattr(frozen_layer, "WINOGRAD_CHUNK", 2 * 16 * 6)  # 8x8 pixels are 16 tiles, of 6 channels
    monkeypatch.setattr(frozen_layer, "PRODUCTS_CHUNK", 2 * 64 * 9 * 6)
    arguments = single_layer(5, 6, 6, 8, 3, up, torch.float32, noise_rows=5)
    exact = modulated_conv2d(**double(arguments), up=up, backend="reference")
    actual = modulated_conv2d(**arguments, up=up, backend="cpp")
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-5)


# ---- How a GPU convolves, with the pass that ends the layer on the CPU ----


@pytest.fixture
def library_calls(monkeypatch):
    """Arguments (x, weight) of the library's convolutions, of layers that the backend "cuda" runs."""
    calls = []

    def note(function):
        def convolve(x, weight, **options):
            calls.append((x, weight))
            return function(x, weight, **options)

        return convolve

    def finish(backend, *args, **options):
        assert backend == "cuda"
        finish_layer("cpp", *args, **options)

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(torch.nn.functional, name, note(getattr(torch.nn.functional, name)))
    monkeypatch.setattr(frozen_layer, "finish_layer", finish)
    return calls


def cuda_layer(arguments, up, keep=True, **options):
    x, weight, style = (arguments[name] for name in ("x", "weight", "style"))
    n, _, height, width = x.shape
    size, filter = (up * height, up * width), fir_filter()
    form = layer_weights.weight_form("cuda", weight.shape, size, x.dtype, n, up, 1, filter)
    prepared = layer_weights.prepare_weight(weight, form, x.dtype, "cuda")
    end = LayerEnd(noise=arguments["noise"], bias=arguments["bias"], rgb_weight=torch.ones(n, 1, weight.shape[0]))
    return frozen_layer.frozen_modulated_conv2d(
        "cuda", x.permute(0, 2, 3, 1), prepared, end, style=style, up=up, padding=1, filter=filter, keep=keep, **options
    )


@pytest.mark.parametrize(("up", "keep"), [(1, False), (2, True), (2, False)])
def test_a_gpu_convolves_a_batch_in_parts_only_beyond_a_gibibyte(up, keep, library_calls):
    arguments = single_layer(5, 6, 8, 4, 3, up, torch.float32, noise_rows=5)
    expected = modulated_conv2d(**arguments, up=up, demodulate=False, backend="reference")
    for limit, parts in ((1 << 30, [5]), (2 * 8 * (4 * up) ** 2 * 4, [2, 2, 1]), (1, [1] * 5)):
        library_calls.clear()
        out, rgb = cuda_layer(arguments, up, keep, part_bytes=limit)
        assert [len(x) for x, _ in library_calls] == parts
        torch.testing.assert_close(rgb[..., 0], expected.sum(1), rtol=0, atol=1e-4)
        assert (out is not None) == keep
        if keep:
            torch.testing.assert_close(out.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)


def test_images_that_a_gpu_convolves_at_a_time():
    gibibyte = frozen_layer.GPU_PART_BYTES
    assert gibibyte == 2**30
    for n, image_bytes, expected in (
        (100, gibibyte // 100, 100),
        (100, gibibyte // 100 + 1, 50),  # parts of equal size
        (7, gibibyte // 3, 3),
        (3, 2 * gibibyte, 1),
    ):
        for backend in ("cuda", "triton"):
            assert frozen_layer.images_at_a_time(backend, n, image_bytes) == expected
    assert frozen_layer.images_at_a_time("cpp", 100, gibibyte // 100) == 25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("up", [1, 2])
def test_a_gpu_library_need_not_copy_the_weights(up, dtype, library_calls):
    arguments = single_layer(2, 6, 8, 4, 3, up, dtype)
    cuda_layer(arguments, up)
    ((x, weight),) = library_calls
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert weight.shape == ((6, 8, 3, 3) if up == 2 else (8, 6, 3, 3)) and weight.dtype == dtype
    assert weight.is_contiguous(memory_format=torch.channels_last)
