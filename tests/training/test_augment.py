"""Augmentation against independent computations: numpy, scipy, torch.flip and torch.rot90, and the papers' formulas."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from spigan.training.augment import ADA, DiffAugment, ada, diffaug, make_augment

SHAPES = [(5, 1, 8, 8), (4, 3, 8, 8), (3, 1, 16, 16), (2, 3, 32, 32), (2, 3, 64, 64), (2, 1, 12, 12)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(*shape, dtype=torch.float64):
    return torch.rand(shape, dtype=dtype) * 2 - 1


def repeat(value, n, dtype=torch.float64):
    return torch.full((n,), value, dtype=dtype)


def smooth(size):
    """A float64 picture [size, size] without detail that resampling could lose, and without symmetry."""
    noise = np.random.default_rng(0).standard_normal((size, size))
    return scipy.ndimage.gaussian_filter(noise, size / 10, mode="mirror") * size / 10


# ----------------------------------------------------------------------------------------------------- both modules


@pytest.mark.parametrize("module", [ADA(0.7), DiffAugment()], ids=["ada", "diffaug"])
class TestBoth:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_keeps_the_shape_and_changes_every_image(self, module, shape):
        x = images(*shape, dtype=torch.float32)
        module = ADA(1.0) if isinstance(module, ADA) else module
        y = module(x)
        assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
        assert (y != x).flatten(1).any(1).all()

    def test_same_seed_same_images(self, module):
        x = images(6, 3, 16, 16)
        torch.manual_seed(5)
        first = module(x)
        second = module(x)
        torch.manual_seed(5)
        assert torch.equal(first, module(x))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_first_and_second_derivatives(self, module, channels):
        x = images(2, channels, 8, 8).requires_grad_()

        def fixed(x):
            torch.manual_seed(1)
            return module(x)

        assert gradcheck(fixed, x, fast_mode=True)
        assert gradgradcheck(fixed, x, fast_mode=True)

    def test_r1_reaches_the_weights(self, module):
        """The penalty |d D(augment(x)) / dx|^2 can be differentiated in D's weights."""
        x, weight = images(4, 3, 8, 8).requires_grad_(), images(3, 8, 8).requires_grad_()
        score = (module(x) * weight).tanh().sum()
        (grad,) = torch.autograd.grad(score, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), weight)
        assert second.isfinite().all() and second.abs().max() > 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_computed_in_float32(self, module, dtype):
        x = images(4, 3, 16, 16).to(dtype)
        torch.manual_seed(2)
        y = module(x)
        torch.manual_seed(2)
        assert y.dtype == dtype and torch.equal(y, module(x.float()).to(dtype))

    def test_autocast_changes_nothing(self, module):
        x = images(4, 3, 16, 16, dtype=torch.float32)
        torch.manual_seed(2)
        expected = module(x)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), expected)

    @pytest.mark.parametrize("layout", ["channels_last", "expanded", "strided"])
    def test_non_contiguous_input(self, module, layout):
        x = {
            "channels_last": lambda: images(4, 3, 16, 16).contiguous(memory_format=torch.channels_last),
            "expanded": lambda: images(1, 1, 16, 16).expand(4, 3, 16, 16),
            "strided": lambda: images(4, 3, 32, 32)[:, :, ::2, 1::2].mT,
        }[layout]()
        torch.manual_seed(3)
        y = module(x)
        torch.manual_seed(3)
        torch.testing.assert_close(y, module(x.contiguous()))

    def test_input_is_left_alone(self, module):
        x = images(4, 3, 16, 16)
        before = x.clone()
        module(x)
        assert torch.equal(x, before)

    def test_empty_batch(self, module):
        assert module(torch.zeros(0, 3, 16, 16)).shape == (0, 3, 16, 16)

    def test_works_in_training_after_inference_mode(self, module):
        """A matrix made and kept while sampling must not be an inference tensor."""
        ada.resampling_matrices.cache_clear()
        with torch.inference_mode():
            module(images(2, 3, 8, 8))
        x = images(2, 3, 8, 8).requires_grad_()
        module(x).square().sum().backward()
        assert x.grad is not None

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), TypeError, "uint8"),
            (torch.zeros(3, 16, 16), ValueError, r"\[3, 16, 16\]"),
            (torch.zeros(2, 4, 16, 16), ValueError, "C = 1 or 3"),
            (torch.zeros(2, 3, 16, 32), ValueError, "16x32"),
            (torch.zeros(2, 3, 4, 4), ValueError, "4x4"),
        ],
    )
    def test_refuses_what_is_no_image(self, module, x, error, message):
        with pytest.raises(error, match=message):
            module(x)


# ------------------------------------------------------------------------------------------------------ DiffAugment


@settings(max_examples=30, deadline=None)
@given(st.integers(-8, 8), st.integers(-8, 8))
def test_translate_fills_with_zeros(dx, dy):
    x = images(1, 3, 8, 8)
    padded = torch.nn.functional.pad(x, (8, 8, 8, 8))
    expected = padded[:, :, 8 - dy : 16 - dy, 8 - dx : 16 - dx]
    assert torch.equal(diffaug.translate(x, torch.tensor([dx]), torch.tensor([dy])), expected)


@pytest.mark.parametrize(("cx", "cy"), [(0, 0), (8, 3), (16, 16), (5, 12)])
def test_cutout_is_a_square_of_half_the_size(cx, cy):
    expected = torch.ones(1, 1, 16, 16)
    expected[:, :, max(cy - 4, 0) : cy + 4, max(cx - 4, 0) : cx + 4] = 0
    assert torch.equal(diffaug.cutout(torch.ones(1, 1, 16, 16), torch.tensor([cx]), torch.tensor([cy])), expected)


def test_diffaugment_color_is_affine_around_the_means():
    x = images(4000, 3, 8, 8)
    y = DiffAugment(["color"])(x)
    brightness = y.mean((1, 2, 3)) - x.mean((1, 2, 3))
    chroma = [(v - v.mean(1, keepdim=True)).square().sum((1, 2, 3)).sqrt() for v in (x, y)]
    luma = [(v.mean(1) - v.mean((1, 2, 3))[:, None, None]).square().sum((1, 2)).sqrt() for v in (x, y)]
    contrast = luma[1] / luma[0]
    saturation = chroma[1] / chroma[0] / contrast
    for value, low, high in [(brightness, -0.5, 0.5), (contrast, 0.5, 1.5), (saturation, 0.0, 2.0)]:
        assert low - 1e-9 <= value.min() < low + 0.01 and high - 0.01 < value.max() <= high + 1e-9
        assert abs(value.mean() - (low + high) / 2) < 0.05


def test_diffaugment_translation_reaches_an_eighth_of_the_size():
    y = DiffAugment(["translation"])(torch.ones(500, 1, 32, 32))
    rows, columns = (y[:, 0].amax(axis).sum(1) for axis in (2, 1))
    assert rows.min() == columns.min() == 28 and rows.max() == columns.max() == 32


def test_diffaugment_draws_the_same_whatever_the_policy():
    x = images(3, 3, 16, 16)
    states = []
    for policy in ([], ["color"], DiffAugment.POLICIES):
        torch.manual_seed(0)
        DiffAugment(policy)(x)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize("policy", ["color", ["colour"]])
def test_diffaugment_refuses_unknown_policies(policy):
    with pytest.raises(ValueError, match="policy"):
        DiffAugment(policy)


# ------------------------------------------------------------------------------------------------ ADA: the resampling


def test_sym6_is_the_orthogonal_wavelet_with_six_vanishing_moments():
    taps, k = np.array(ada.SYM6), np.arange(12)
    assert taps.sum() == pytest.approx(math.sqrt(2), abs=1e-12)
    for shift in range(6):
        assert taps[2 * shift :] @ taps[: 12 - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-11)
    for moment in range(6):
        assert (-1.0) ** k * (k / 11) ** moment @ taps == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("size", [8, 12, 32])
def test_resampling_matrices_filter_the_mirrored_row(size):
    row = np.random.default_rng(1).standard_normal(size)
    up, down = ada.resampling_matrices(size, torch.device("cpu"), torch.float64)
    wide = np.zeros(2 * (5 * size))
    wide[::2] = np.pad(row, 2 * size, mode="reflect")  # pixel 0 is at sample 4 size
    wide = math.sqrt(2) * np.convolve(wide, ada.SYM6)[4 * size :]
    np.testing.assert_allclose(up.numpy() @ row, wide[: 4 * size - 3], atol=1e-12)
    np.testing.assert_allclose(down.numpy() @ wide[: 2 * size + 10], row, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_warp_by_the_identity_gives_the_image_back(shape):
    x = images(*shape)
    torch.testing.assert_close(ada.warp(x, torch.eye(3, dtype=x.dtype).repeat(shape[0], 1, 1)), x)


@settings(max_examples=20, deadline=None)
@given(st.integers(-40, 40), st.integers(-40, 40))
def test_whole_pixel_translation_is_exact_with_endless_reflection(tx, ty):
    x = images(1, 3, 8, 8)
    plane = np.pad(x[0].numpy(), ((0, 0), (48, 48), (48, 48)), mode="reflect")
    expected = torch.from_numpy(plane[:, 48 + ty : 56 + ty, 48 + tx : 56 + tx])[None]
    y = ada.warp(x, ada.translate2d(repeat(tx, 1), repeat(ty, 1)))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "matrix",
    [
        ada.rotate2d(repeat(0.2, 1)),
        ada.rotate2d(repeat(-2.5, 1)),
        ada.scale2d(repeat(1.2, 1), repeat(0.8, 1)),
        ada.scale2d(repeat(-1.0, 1), repeat(1.0, 1)),
        ada.translate2d(repeat(3.3, 1), repeat(-9.6, 1)),
        ada.rotate2d(repeat(0.7, 1)) @ ada.translate2d(repeat(1.5, 1), repeat(-4.0, 1)),
    ],
    ids=["turn", "far_turn", "stretch", "mirror", "slide", "turn_slide"],
)
def test_warp_agrees_with_scipy_on_a_smooth_picture(matrix):
    picture = smooth(64)
    swap = matrix[0].numpy()[[1, 0, 2]][:, [1, 0, 2]]  # scipy counts (row, column) from the corner
    centre = np.full(2, 31.5)
    expected = scipy.ndimage.affine_transform(
        picture, swap[:2, :2], offset=centre + swap[:2, 2] - swap[:2, :2] @ centre, order=3, mode="mirror"
    )
    y = ada.warp(torch.from_numpy(picture)[None, None], matrix)[0, 0].numpy()
    assert np.abs(y - expected).max() < 0.03 * np.abs(picture).max()


def test_warp_does_not_alias():
    """A stripe at 0.4 cycles a pixel, made half as large, would alias to a visible stripe if it were only sampled."""
    x = torch.cos(2 * math.pi * 0.4 * torch.arange(64, dtype=torch.float64)).expand(1, 1, 64, 64)
    y = ada.warp(x, ada.scale2d(repeat(2.0, 1), repeat(1.0, 1)))
    assert y.std() < 0.1 * x[..., ::2].std()


def test_warp_is_precise_in_float32():
    x, matrix = images(2, 3, 32, 32), ada.rotate2d(torch.tensor([0.3, 2.0], dtype=torch.float64))
    torch.testing.assert_close(ada.warp(x.float(), matrix.float()).double(), ada.warp(x, matrix), atol=2e-5, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_blit_is_flip_then_rot90(flip, turns):
    x = images(2, 3, 8, 8)
    expected = torch.rot90(x.flip(3) if flip else x, turns, (2, 3))
    assert torch.equal(ada.blit(x, torch.tensor([flip] * 2), torch.tensor([turns] * 2)), expected)


def test_blit_treats_every_image_by_itself():
    x = images(3, 1, 8, 8)
    y = ada.blit(x, torch.tensor([True, False, False]), torch.tensor([0, 0, 3]))
    assert torch.equal(y, torch.stack([x[0].flip(2), x[1], x[2].rot90(3, (1, 2))]))


# ------------------------------------------------------------------------------------------------- ADA: its parameters


def draws(rows, n):
    return torch.rand(rows, n, dtype=torch.float64)


def test_geometry_is_composed_in_the_papers_order():
    """The matrix is the inverse of the paper's product, whose parameters are the inverses of those drawn."""
    n, size = 7, 16
    uniform, normal = draws(6, n), torch.randn(4, n, dtype=torch.float64)
    _, _, matrix = ada.geometric_parameters(1.0, size, torch.zeros(8, n), uniform, normal)

    def rotate(angle):
        return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])

    def translate(tx, ty):
        return np.array([[1, 0, tx], [0, 1, ty], [0, 0, 1]])

    for u, z, found in zip(uniform.T.numpy(), normal.T.numpy(), matrix.numpy(), strict=True):
        zoom, stretch = 2 ** (-0.2 * z[0]), 2 ** (-0.2 * z[1])
        forward = translate(*-np.round((u[2:4] * 0.25 - 0.125) * size))
        forward = np.diag([zoom, zoom, 1]) @ forward
        forward = rotate(math.pi - 2 * math.pi * u[4]) @ forward
        forward = np.diag([stretch, 1 / stretch, 1]) @ forward
        forward = rotate(math.pi - 2 * math.pi * u[5]) @ forward
        forward = translate(*-(0.125 * size * z[2:])) @ forward
        np.testing.assert_allclose(found, np.linalg.inv(forward), atol=1e-9)


def test_each_geometric_transformation_happens_with_probability_p():
    n, p = 20000, 0.3
    for row in range(8):
        gate = torch.ones(8, n)
        gate[row] = torch.rand(n)  # only this one may happen
        flip, turns, matrix = ada.geometric_parameters(p, 64, gate, draws(6, n), torch.randn(4, n).double())
        moved = (matrix - torch.eye(3, dtype=matrix.dtype)).abs().amax((1, 2)) > 0
        expected = {0: p / 2, 1: p * 3 / 4, 2: p * (1 - 1 / 16**2), 6: 1 - math.sqrt(1 - p), 7: 1 - math.sqrt(1 - p)}
        happened = flip | (turns > 0) | moved
        assert happened.double().mean() == pytest.approx(expected.get(row, p), abs=0.015), row
        assert bool(flip.any()) == (row == 0) and bool((turns > 0).any()) == (row == 1)


def test_each_colour_transformation_happens_with_probability_p():
    n, p = 20000, 0.3
    for row in range(5):
        gate = torch.ones(5, n)
        gate[row] = torch.rand(n)
        parameters = ada.color_parameters(p, gate, draws(2, n), torch.randn(3, n).double())
        for index, (value, still) in enumerate(zip(parameters, [0, 1, 1, 0, 1], strict=True)):
            expected = 0 if index != row else p / 2 if row == 2 else p
            assert (value != still).double().mean() == pytest.approx(expected, abs=0.015)


def test_parameters_have_the_papers_spread():
    n = 20000
    on = torch.zeros(8, n)
    flip, turns, matrix = ada.geometric_parameters(1.0, 64, on, draws(6, n), torch.randn(4, n).double())
    zoom = torch.linalg.det(matrix).log2() / 2  # stretching keeps areas
    assert zoom.std() == pytest.approx(0.2, rel=0.03) and zoom.mean() == pytest.approx(0, abs=0.01)
    assert torch.bincount(turns).double().div(n).tolist() == pytest.approx([0.25] * 4, abs=0.015)
    assert flip.double().mean() == pytest.approx(0.5, abs=0.015)
    brightness, contrast, sign, hue, sat = ada.color_parameters(1.0, on[:5], draws(2, n), torch.randn(3, n).double())
    spread = [brightness.std(), contrast.log2().std(), sign.std(), hue.std(), sat.log2().std()]
    assert [float(s) for s in spread] == pytest.approx([0.2, 0.5, 1, math.pi / math.sqrt(3), 1], rel=0.03)


# ------------------------------------------------------------------------------------------------------- ADA: colour


def recolor(x, brightness=0.0, contrast=1.0, luma_sign=1.0, hue=0.0, sat=1.0):
    return ada.recolor(x, *(repeat(v, x.shape[0]) for v in (brightness, contrast, luma_sign, hue, sat)))


@settings(max_examples=30, deadline=None)
@given(
    st.floats(-1, 1), st.floats(0.2, 3), st.sampled_from([-1.0, 1.0]), st.floats(-math.pi, math.pi), st.floats(0.1, 4)
)
def test_colour_is_the_papers_product_of_matrices(brightness, contrast, luma_sign, hue, sat):
    axis = np.ones(3) / math.sqrt(3)
    along, cross = np.outer(axis, axis), np.cross(axis, np.eye(3)).T

    def linear(m):
        return np.block([[m, np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]])

    product = np.eye(4)
    product[:3, 3] = brightness
    product = linear(contrast * np.eye(3)) @ product
    product = linear(np.eye(3) - (1 - luma_sign) * along) @ product
    product = linear(math.cos(hue) * np.eye(3) + math.sin(hue) * cross + (1 - math.cos(hue)) * along) @ product
    product = linear(along + sat * (np.eye(3) - along)) @ product
    x = images(1, 3, 8, 8)
    expected = np.einsum("oc,nchw->nohw", product[:3, :3], x.numpy()) + product[:3, 3][:, None, None]
    y = recolor(x, brightness, contrast, luma_sign, hue, sat)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-12)


def test_each_colour_transformation_alone():
    x = images(2, 3, 8, 8)
    luma = x.mean(1, keepdim=True)
    torch.testing.assert_close(recolor(x, brightness=0.3), x + 0.3)
    torch.testing.assert_close(recolor(x, contrast=1.7), x * 1.7)
    torch.testing.assert_close(recolor(x, luma_sign=-1.0), x - 2 * luma)
    torch.testing.assert_close(recolor(x, sat=0.4), luma + 0.4 * (x - luma))
    torch.testing.assert_close(recolor(x, hue=2 * math.pi / 3), x.roll(1, 1))  # red becomes green, green blue
    turned = recolor(x, hue=1.1)
    torch.testing.assert_close(turned.mean(1, keepdim=True), luma)
    torch.testing.assert_close((turned - luma).norm(dim=1), (x - luma).norm(dim=1))


def test_grey_images_change_as_grey_colour_images_do():
    grey = images(2, 1, 8, 8)
    change = (0.2, 1.4, -1.0, 0.8, 1.9)
    torch.testing.assert_close(
        recolor(grey, *change).expand(-1, 3, -1, -1), recolor(grey.expand(-1, 3, -1, -1), *change)
    )


# -------------------------------------------------------------------------------------------------------- ADA: whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p_zero_is_the_identity_to_the_bit(dtype):
    x = images(4, 3, 16, 16).to(dtype)
    assert ADA()(x) is x


@pytest.mark.parametrize("p", [0.05, 0.15])
def test_share_of_untouched_images(p):
    x = images(3000, 1, 8, 8, dtype=torch.float32)
    untouched = (ADA(p)(x) - x).abs().amax((1, 2, 3)) < 1e-4
    # Of those applied, half the flips (of x, of luma), a quarter of the quarter turns and a quarter of the shifts of an
    # 8x8 image (both components round to 0) change nothing; hue and saturation never change a grey image.
    once = (1 - p) ** 5  # zoom, stretch, slide, brightness, contrast
    expected = once * (1 - p / 2) ** 2 * (1 - p * 3 / 4) ** 2 * (1 - p)  # last: neither of the two rotations
    assert untouched.float().mean() == pytest.approx(expected, abs=0.03)


def test_p_does_not_shift_the_random_stream():
    x, states = images(3, 3, 8, 8), []
    for p in (0.0, 0.4, 1.0):
        torch.manual_seed(0)
        ADA(p)(x)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_images_are_augmented_independently_of_each_other():
    x = images(4, 3, 16, 16)
    other = x.clone()
    other[1:] = 0
    torch.manual_seed(0)
    y = ADA(1.0)(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ADA(1.0)(other)[0], y[0])


def test_full_derivatives_of_the_sampler():
    x, grid = images(2, 2, 4, 4).requires_grad_(), images(2, 3, 5, 2) * 1.2
    assert gradcheck(lambda x: ada.bilinear_sample(x, grid), x)
    assert gradgradcheck(lambda x: ada.bilinear_sample(x, grid), x)
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=True)
    torch.testing.assert_close(ada.bilinear_sample(x, grid), expected)


def test_adapt_moves_p_towards_the_target_and_clamps():
    ada = ADA(target=0.6, kimg=500)
    ada.adapt(0.9, 5000)
    assert float(ada.p) == pytest.approx(0.01)
    ada.adapt(0.6, 5000)
    assert float(ada.p) == pytest.approx(0.01)
    ada.adapt(0.5, 2500)
    assert float(ada.p) == pytest.approx(0.005)
    ada.adapt(-1.0, 5000)
    assert float(ada.p) == 0.0
    for _ in range(101):
        ada.adapt(1.0, 5000)
    assert float(ada.p) == 1.0


@pytest.mark.parametrize("signs_mean", [1.5, -2.0, math.nan])
def test_adapt_refuses_what_is_no_mean_of_signs(signs_mean):
    with pytest.raises(ValueError, match="signs_mean"):
        ADA().adapt(signs_mean, 64)


def test_state_round_trip():
    ada = ADA()
    ada.adapt(1.0, 123456)
    resumed = ADA()
    resumed.load_state_dict(ada.state_dict())
    assert torch.equal(resumed.p, ada.p) and float(ada.p) > 0.2
    x = images(4, 3, 8, 8)
    torch.manual_seed(4)
    y = ada(x)
    torch.manual_seed(4)
    assert torch.equal(resumed(x), y)


def test_p_stays_a_float32_on_the_cpu():
    for module in (ADA(0.3).to("meta"), ADA(0.3).to(torch.bfloat16), torch.nn.Sequential(ADA(0.3)).half()[0]):
        assert module.p.dtype == torch.float32 and module.p.device.type == "cpu"
        assert float(module.p) == pytest.approx(0.3)


@pytest.mark.parametrize("options", [{"p": -0.1}, {"p": 1.1}, {"p": math.nan}, {"target": 2.0}, {"kimg": 0.0}])
def test_ada_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ADA(**options)


def test_make_augment():
    x = images(2, 3, 8, 8)
    assert make_augment("none")(x) is x
    assert isinstance(make_augment("diffaug"), DiffAugment)
    ada = make_augment("ada", target=0.5, kimg=100)
    assert isinstance(ada, ADA) and ada.target == 0.5 and ada.kimg == 100
    with pytest.raises(ValueError, match="'none', 'diffaug' or 'ada', got 'bgc'"):
        make_augment("bgc")


@pytest.mark.gpu
@pytest.mark.parametrize("module", [ADA(0.7), DiffAugment()], ids=["ada", "diffaug"])
def test_derivatives_on_a_gpu(module):
    x = images(2, 3, 8, 8).cuda().requires_grad_()

    def fixed(x):
        torch.manual_seed(1)
        return module.cuda()(x)

    assert fixed(x).device.type == "cuda"
    assert gradcheck(fixed, x, fast_mode=True, nondet_tol=1e-10)
    assert gradgradcheck(fixed, x, fast_mode=True, nondet_tol=1e-10)


@pytest.mark.gpu
def test_warp_on_a_gpu_is_that_of_the_cpu():
    x, matrix = images(4, 3, 32, 32), ada.rotate2d(images(4))
    torch.testing.assert_close(ada.warp(x.cuda(), matrix.cuda()).cpu(), ada.warp(x, matrix))
