"""The photometric step, one crop in place and batches at once, against definitions in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from swavkit import CropGroup, MultiCropTransform, PhotometricDistortion
from swavkit.multicrop import color_ops, photometric, separable
from tests import image_oracles
from tests.image_oracles import other_defaults, random_crops, seeded
from tests.modes import CountingBackend, RoundedProducts

RARE = 1e-3  # with a dozen laws to a test, one in a hundred would be one in ten
PIXEL = 2e-6  # float32 arithmetic on pixels in [0, 1]
NOTHING = (0, 1, 2, 1, 1, 1, 0, 0, 0, 0, 1, 0)  # a row of parameters that changes nothing
JITTER, HUE = [-0.5, -0.2, 0.0, 0.1, 0.5], 3
FACTORS = [0.0, 0.2, 1.0, 1.3, 1.8]
ORACLES = (
    image_oracles.brightness,
    image_oracles.contrast,
    image_oracles.saturation,
    image_oracles.hue,
)
ONLY_BLUR = {"jitter_probability": 0, "greyscale_probability": 0, "blur_probability": 1}


def in_place(crops: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    results = crops.clone()
    for crop, row in zip(results, parameters.tolist(), strict=True):
        color_ops.distort_(crop, row)
    return results


def at_once(crops: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    return color_ops.distort(crops, parameters.to(crops), colors=True, blur=10)


def by_rows(crops: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    results = crops.clone()
    known = parameters.cpu().numpy()
    color_ops.distort_rows_(results, parameters.to(crops), known, colors=True, blur=10)
    return results


each_form = pytest.mark.parametrize("form", [in_place, at_once, by_rows])
each_batched_form = pytest.mark.parametrize("form", [at_once, by_rows])


def parameters(number: int, **columns: float) -> torch.Tensor:
    """Rows that do nothing but what is named by column."""
    rows = torch.tensor([NOTHING] * number, dtype=torch.float64)
    for column, value in columns.items():
        rows[:, int(column[1:])] = torch.as_tensor(value, dtype=torch.float64)
    return rows


@each_form
@pytest.mark.parametrize(
    ("step", "channels"), [(step, n) for step in range(HUE) for n in (1, 3, 5)] + [(HUE, 3)]
)
def test_colour_steps_equal_their_definitions(form, step, channels):
    values = JITTER if step == HUE else FACTORS
    rows = parameters(5, _9=values) if step == HUE else parameters(5, _0=step, _3=values)
    crops = random_crops(5, channels)
    for crop, value, result in zip(crops.numpy(), values, form(crops, rows), strict=True):
        np.testing.assert_allclose(result, ORACLES[step](crop, value), atol=1e-12)


@each_form
def test_the_greyscale_is_the_grey_of_each_pixel(form):
    crops = random_crops(2)
    for crop, result in zip(crops.numpy(), form(crops, parameters(2, _10=0)), strict=True):
        np.testing.assert_allclose(result, np.stack([image_oracles.grey(crop)] * 3), atol=1e-12)


@each_form
@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_blur_equals_the_convolution_with_mirrored_borders(form, size):
    sigmas = [0.1, 0.7, 2.0]
    crops = random_crops(3, channels=2, size=max(size, 3))[:, :, :size, :].contiguous()
    results = form(crops, parameters(3, _11=sigmas)).numpy()
    for crop, sigma, result in zip(crops.numpy(), sigmas, results, strict=True):
        np.testing.assert_allclose(result, image_oracles.blur(crop, sigma, 10), atol=1e-6)
        if size > 10:
            ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy is not installed")
            filtered = ndimage.gaussian_filter(crop, sigma, axes=(1, 2), radius=10, mode="mirror")
            np.testing.assert_allclose(result, filtered, atol=1e-6)


@each_form
def test_a_blur_of_0_leaves_the_crop_exactly_as_it_is(form):
    crops = random_crops(2, size=30)
    assert torch.equal(form(crops, parameters(2)), crops)


def test_a_drawn_blur_is_not_cut_short():
    settings = PhotometricDistortion(**ONLY_BLUR, blur_sigma=(1.9, 2.0))
    crops = random_crops(3, size=30)
    drawn = photometric.draw(settings, uniform_numbers(3), 3)
    results = settings(crops, generator=seeded())
    for crop, sigma, result in zip(crops.numpy(), drawn[:, 11], results, strict=True):
        np.testing.assert_allclose(result, image_oracles.blur(crop, float(sigma), 29), atol=PIXEL)


def test_blur_is_that_of_pil_away_from_the_border():
    pixels = (random_crops(1, size=60)[0].numpy() * 255).round().astype(np.uint8)
    filtered = Image.fromarray(np.moveaxis(pixels, 0, -1)).filter(ImageFilter.GaussianBlur(1.5))
    ours = in_place(torch.tensor(pixels[None] / 255), parameters(1, _11=1.5))[0]
    inner = slice(12, -12)
    theirs = np.moveaxis(np.array(filtered) / 255, -1, 0)[:, inner, inner]
    # PIL repeats box blurs in 8 bits, an approximation of its own.
    np.testing.assert_allclose(ours[:, inner, inner].numpy(), theirs, atol=0.03)


def uniform_numbers(number: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(number, photometric.NUMBERS, generator=seeded(seed), dtype=torch.float64)


def test_each_crop_gets_its_own_steps_in_its_own_order(device):
    crops = random_crops(60)
    rows = photometric.draw(PhotometricDistortion(), uniform_numbers(60, 4), 3)
    expected = [
        image_oracles.distorted(crop, row)
        for crop, row in zip(crops.numpy(), rows.tolist(), strict=True)
    ]
    forms = (in_place, at_once) if device.type == "cpu" else (at_once,)
    for form in forms:
        results = form(crops.to(device), rows.to(device)).cpu()
        np.testing.assert_allclose(results, np.stack(expected), atol=1e-6)


@each_batched_form
def test_the_forms_agree_in_float32(form):
    crops = random_crops(60, size=30, dtype=torch.float32)
    rows = photometric.draw(PhotometricDistortion(), uniform_numbers(60, 4), 3)
    torch.testing.assert_close(in_place(crops, rows), form(crops, rows), atol=1e-5, rtol=0)


def test_draws_follow_their_distributions():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    settings = PhotometricDistortion(0.3, 0.4, 0.5, 0.1)
    rows = photometric.draw(settings, uniform_numbers(20000, 7), 3).numpy()
    kinds, factors, before, shift, grey, sigma = (
        rows[:, :3], rows[:, 3:6], rows[:, 6:9], rows[:, 9], rows[:, 10], rows[:, 11]
    )  # fmt: skip
    jittered = shift != 0
    assert (factors[~jittered] == 1).all()

    def follows(values, low, high):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > RARE

    for kind, strength in enumerate((0.3, 0.4, 0.5)):
        follows(factors[jittered][kinds[jittered] == kind], 1 - strength, 1 + strength)
    follows(shift[jittered], -0.1, 0.1)
    follows(sigma[sigma > 0], 0.1, 2.0)
    for drawn, probability in ((jittered, 0.8), (grey == 0, 0.2), (sigma > 0, 0.5)):
        assert stats.binomtest(int(drawn.sum()), 20000, probability).pvalue > RARE
    of_kind = [np.where(kinds == kind, factors, 0).sum(1) for kind in range(3)]
    drawn = np.stack([*of_kind, shift, grey, sigma, before.sum(1), kinds[:, 0]])
    correlations = np.corrcoef(drawn[:, jittered & (sigma > 0)])
    assert np.abs(correlations - np.eye(len(drawn))).max() < 0.05
    assert abs(np.corrcoef(jittered, sigma > 0)[0, 1]) < 0.03
    order = np.concatenate([kinds, before.sum(1, keepdims=True)], axis=1)
    assert (before[:, :-1] >= before[:, 1:]).all()
    counts = np.unique(order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > RARE


def test_the_published_recipe_is_the_default():
    settings = PhotometricDistortion()
    # As the authors' program has them, in the order of ColorJitter.
    strengths = settings.brightness, settings.contrast, settings.saturation, settings.hue
    assert strengths == (0.8, 0.8, 0.8, 0.2)
    assert (settings.jitter_probability, settings.greyscale_probability) == (0.8, 0.2)
    assert (settings.blur_probability, settings.blur_sigma) == (0.5, (0.1, 2.0))


def test_probabilities_of_0_leave_the_crops_alone_and_the_input_is_never_written():
    crops = random_crops(8, dtype=torch.float32)
    before = crops.clone()
    off = PhotometricDistortion(jitter_probability=0, greyscale_probability=0, blur_probability=0)
    assert torch.equal(off(crops), before)
    assert not torch.equal(PhotometricDistortion()(crops), before)
    assert torch.equal(crops, before)


def test_distortion_of_one_crop_is_that_of_a_batch_of_one_and_keeps_the_dtype():
    crop = random_crops(1, dtype=torch.float32)
    single = PhotometricDistortion()(crop[0], generator=seeded(3))
    assert torch.equal(single, PhotometricDistortion()(crop, generator=seeded(3))[0])
    half = PhotometricDistortion()(crop.half(), generator=seeded(3))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half[0].float(), single, atol=2e-3, rtol=0)


def test_memory_format_and_gradient_do_not_matter():
    crops = random_crops(6, dtype=torch.float32)
    expected = PhotometricDistortion()(crops, generator=seeded(3))
    last = crops.contiguous(memory_format=torch.channels_last)
    assert torch.equal(PhotometricDistortion()(last, generator=seeded(3)), expected)
    differentiated = PhotometricDistortion()(crops.requires_grad_(), generator=seeded(3))
    torch.testing.assert_close(differentiated.detach(), expected, atol=1e-5, rtol=0)
    differentiated.sum().backward()
    assert crops.grad.isfinite().all()


def test_distortion_of_no_crops():
    assert PhotometricDistortion()(torch.empty(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_autocast_does_not_coarsen_the_pixels(requires_grad):
    crops = random_crops(8, dtype=torch.float32).requires_grad_(requires_grad)
    expected = PhotometricDistortion()(crops, generator=seeded(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(PhotometricDistortion()(crops, generator=seeded(1)), expected)


@each_batched_form
@pytest.mark.parametrize("size", [8, 30])
def test_tf32_does_not_coarsen_the_steps(size, form, monkeypatch):
    monkeypatch.setattr(separable, "_may_be_rounded", lambda factor: factor.dtype == torch.float32)
    crops = random_crops(3, size=size)
    for rows in (
        parameters(3, _11=[0.1, 0.7, 2.0]),
        parameters(3, _0=[0, 1, 2], _3=1.5),
        parameters(3, _9=0.1, _10=[0, 1, 1], _11=1.0),
    ):
        with RoundedProducts() as products:
            results = form(crops.float(), rows)
        assert products.count
        torch.testing.assert_close(results.double(), form(crops, rows), atol=PIXEL, rtol=0)


def test_products_are_split_if_tf32_may_round_them(monkeypatch):
    precisions = {"highest": False, "high": True, "medium": True}
    before = torch.get_float32_matmul_precision()
    try:
        for precision, rounded in precisions.items():
            torch.set_float32_matmul_precision(precision)
            factor = torch.empty(1, device="meta")
            assert separable._may_be_rounded(factor) is rounded
            assert not separable._may_be_rounded(factor.double())
            assert not separable._may_be_rounded(torch.empty(1))
    finally:
        torch.set_float32_matmul_precision(before)
    # A compiled graph outlives the setting.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert separable._may_be_rounded(factor)


def test_it_compiles_for_any_batch_size():
    settings = PhotometricDistortion()
    compiled = torch.compile(
        lambda crops: settings(crops), backend=CountingBackend(), fullgraph=True
    )
    for number in (3, 5, 7):
        crops = random_crops(number, dtype=torch.float32)
        torch.manual_seed(number)
        results = compiled(crops)
        torch.manual_seed(number)
        torch.testing.assert_close(results, settings(crops), atol=1e-5, rtol=0)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_default_device_and_dtype_of_the_session_do_not_matter(requires_grad):
    crops = random_crops(6, dtype=torch.float32).requires_grad_(requires_grad)
    expected = PhotometricDistortion()(crops, generator=seeded())
    with other_defaults():
        results = PhotometricDistortion()(crops, generator=seeded())
        assert PhotometricDistortion()(crops).device == crops.device
    assert torch.equal(results, expected)


# Images without colours


def test_a_blur_alone_takes_any_number_of_channels():
    crops = random_crops(2, channels=5)
    assert PhotometricDistortion(**ONLY_BLUR)(crops, generator=seeded()).shape == crops.shape


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_colour_steps_refuse_other_channels_and_say_what_to_do(channels):
    message = rf"3 channels .* got {channels}: .*photometric=None.*other_channels=\"skip\""
    with pytest.raises(ValueError, match=message):
        PhotometricDistortion()(torch.rand(2, channels, 8, 8))
    transform = MultiCropTransform((CropGroup(8, 1, (0.1, 1.0)),), mean=0.5, std=0.5)
    with pytest.raises(ValueError, match=r"crops\[0\] must have " + message):
        transform(torch.rand(2, channels, 8, 8))


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_needs_colours_can_be_skipped(channels, requires_grad):
    settings = PhotometricDistortion(other_channels="skip")
    crops = random_crops(60, channels)
    rows = photometric.draw(settings, uniform_numbers(60), channels)
    assert (rows[:, 9] == 0).all()
    assert (rows[:, 10] == 1).all()
    assert (rows[:, 3:6][rows[:, :3] == color_ops.SATURATION] == 1).all()
    assert (rows[:, 3:6] != 1).any()
    results = settings(crops.requires_grad_(requires_grad), generator=seeded()).detach()
    for crop, row, result in zip(crops.detach().numpy(), rows.tolist(), results, strict=True):
        np.testing.assert_allclose(result, image_oracles.distorted(crop, row), atol=1e-6)


def test_skipping_changes_nothing_for_images_with_colours():
    crops = random_crops(20)
    skipping = PhotometricDistortion(other_channels="skip")
    assert torch.equal(
        skipping(crops, generator=seeded()), PhotometricDistortion()(crops, generator=seeded())
    )


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"brightness": 1.1}, ValueError, r"brightness must be in \[0, 1\], got 1.1"),
        ({"contrast": -0.1}, ValueError, r"contrast must be in \[0, 1\], got -0.1"),
        ({"saturation": None}, TypeError, r"saturation must be a number, got NoneType"),
        ({"brightness": np.zeros(3)}, TypeError, r"brightness must be a number, got ndarray"),
        ({"hue": 0.6}, ValueError, r"hue must be in \[0, 0.5\], got 0.6"),
        ({"jitter_probability": 2}, ValueError, r"jitter_probability must be in \[0, 1\], got 2"),
        ({"greyscale_probability": -1}, ValueError, r"greyscale_probability must be in"),
        (
            {"blur_probability": math.nan},
            ValueError,
            r"blur_probability must be a finite number, got nan",
        ),
        ({"blur_sigma": (0.0, 2.0)}, ValueError, r"blur_sigma .* 0 < low <= high, got"),
        ({"blur_sigma": (2.0, 0.1)}, ValueError, r"blur_sigma .* got \(2.0, 0.1\)"),
        ({"other_channels": "warn"}, ValueError, r"other_channels must be 'error' or 'skip'"),
    ],
)
def test_bad_settings(settings, error, message):
    with pytest.raises(error, match=message):
        PhotometricDistortion(**settings)


@pytest.mark.parametrize(
    ("crops", "error", "message"),
    [
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            TypeError,
            r"crops must have a floating-point",
        ),
        ([0.5], TypeError, r"crops must be a torch.Tensor, got list"),
        (torch.rand(8, 8), ValueError, r"\(C, H, W\) or \(B, C, H, W\), got \(8, 8\)"),
    ],
)
def test_bad_crops(crops, error, message):
    with pytest.raises(error, match=message):
        PhotometricDistortion()(crops)
