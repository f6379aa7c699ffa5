"""Multi-crop: boxes, resizing and the photometric step against definitions written out in NumPy."""

from __future__ import annotations

import colorsys
import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from PIL import Image, ImageFilter

from swavkit import (
    CropGroup,
    MultiCropTransform,
    PhotometricDistortion,
    multi_crop_forward,
    multicrop,
    photometric,
)

PIXEL = 2e-6  # float32 arithmetic on pixels in [0, 1]
PLAIN = (
    CropGroup(12, 2, (0.3, 1.0), photometric=None),
    CropGroup(6, 3, (0.05, 0.3), photometric=None),
)
DISTORTED = (CropGroup(12, 2, (0.3, 1.0)), CropGroup(6, 3, (0.05, 0.3)))
# Boxes that leave nothing to chance, so that only the photometric step is drawn.
COLOURED = tuple(
    CropGroup(size, 3, (1.0, 1.0), (1.0, 1.0), 0.0, PhotometricDistortion(jitter_probability=1))
    for size in (12, 6)
)
each_kind_of_draw = pytest.mark.parametrize(
    "groups", [PLAIN, DISTORTED, COLOURED], ids=["boxes", "both", "colours"]
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_crops(number: int, channels: int = 3, size: int = 9, dtype=torch.float64):
    """Crops with flat and with saturated places, where hue and blending have their corner cases."""
    crops = torch.rand(number, channels, size, size, generator=seeded(5), dtype=torch.float64)
    crops[:, :, 0, 0] = 0.4
    crops[:, :, 0, 1] = 0.0
    crops[:, :, 0, 2] = 1.0
    crops[:, 0, 1, 0] = crops[:, -1, 1, 0]
    return crops.to(dtype)


# The definitions, in float64


def resize_weights(length: int, size: int) -> np.ndarray:
    """Row i: a triangle around the centre of output pixel i, widened where pixels are merged."""
    step = length / size
    reach = max(step, 1.0)
    weights = np.zeros((size, length))
    for i, j in itertools.product(range(size), range(length)):
        weights[i, j] = max(0.0, 1 - abs(j + 0.5 - (i + 0.5) * step) / reach)
    return weights / weights.sum(1, keepdims=True)


def resized_box(image: np.ndarray, box: list[int], size: int) -> np.ndarray:
    top, left, height, width, mirrored = box
    crop = image[:, top : top + height, left : left + width]
    crop = resize_weights(height, size) @ crop @ resize_weights(width, size).T
    return crop[:, :, ::-1] if mirrored else crop


def grey(crop: np.ndarray) -> np.ndarray:
    return 0.2989 * crop[0] + 0.587 * crop[1] + 0.114 * crop[2]


def brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(factor * crop, 0, 1)


def contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(factor * crop + (1 - factor) * grey(crop).mean(), 0, 1)


def saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(factor * crop + (1 - factor) * grey(crop), 0, 1)


def hue(crop: np.ndarray, shift: float) -> np.ndarray:
    result = np.empty_like(crop)
    for row, column in np.ndindex(crop.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*crop[:, row, column])
        result[:, row, column] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
    return result


def blur(crop: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(crop, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    for axis in (1, 2):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return padded


COLOUR_ORACLES = (brightness, contrast, saturation, hue)


def plain_loop_box(generator: np.random.Generator, height: int, width: int, group: CropGroup):
    """Random resized crop as its authors describe it: one try after the other."""
    for _ in range(10):
        area = height * width * generator.uniform(*group.scale)
        ratio = math.exp(generator.uniform(*np.log(group.ratio)))
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return box_height, box_width
    raise AssertionError("this image is chosen such that ten tries suffice")


# Boxes


def boxes_of(number: int, height: int, width: int, **settings) -> np.ndarray:
    group = CropGroup(8, 1, **{"scale": (0.05, 0.7), **settings})
    return np.array(multicrop._draw_boxes(group, number, (height, width), seeded(1)))


def test_area_aspect_place_and_mirror_follow_their_distributions():
    # Below an area of 3/4 no box of the default shapes misses a square image: nothing is redrawn.
    top, left, height, width, mirrored = boxes_of(4000, 5000, 5000, flip=0.3).T
    uniform = scipy.stats.uniform
    area = height * width / 5000**2
    log_ratio = np.log(width / height)
    assert scipy.stats.kstest(area, uniform(0.05, 0.65).cdf).pvalue > 0.01
    limits = math.log(3 / 4), math.log(4 / 3)
    assert (
        scipy.stats.kstest(log_ratio, uniform(limits[0], limits[1] - limits[0]).cdf).pvalue > 0.01
    )
    assert scipy.stats.kstest(top / (5001 - height), uniform().cdf).pvalue > 0.01
    assert scipy.stats.kstest(left / (5001 - width), uniform().cdf).pvalue > 0.01
    assert scipy.stats.binomtest(int(mirrored.sum()), 4000, 0.3).pvalue > 0.01
    for one, other in itertools.combinations((area, log_ratio, top / (5001 - height), mirrored), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06


def test_boxes_that_miss_are_redrawn_as_in_the_plain_loop():
    group = CropGroup(8, 1, (0.3, 1.0), (0.5, 2.0))
    drawn = np.array(multicrop._draw_boxes(group, 3000, (2000, 2600), seeded(2)))[:, 2:4]
    loop = np.random.default_rng(3)
    expected = np.array([plain_loop_box(loop, 2000, 2600, group) for _ in range(3000)])
    assert scipy.stats.ks_2samp(drawn.prod(1), expected.prod(1)).pvalue > 0.01
    assert (
        scipy.stats.ks_2samp(drawn[:, 0] / drawn[:, 1], expected[:, 0] / expected[:, 1]).pvalue
        > 0.01
    )


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (400, 4, [197, 0, 5, 4]),  # too narrow: the whole width, the largest permitted height
        (4, 400, [0, 197, 4, 5]),
        (100, 1, [49, 0, 1, 1]),
        (1, 1, [0, 0, 1, 1]),
    ],
)
def test_where_no_try_fits_the_largest_central_box_is_taken(height, width, expected):
    boxes = boxes_of(20, height, width, scale=(0.9, 1.0))
    assert (boxes[:, :4] == expected).all()


@pytest.mark.parametrize("height", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("width", [1, 2, 5, 300])
def test_boxes_lie_inside_images_of_any_shape(height, width):
    top, left, box_height, box_width, _ = boxes_of(200, height, width, scale=(0.01, 1.0)).T
    assert (box_height >= 1).all()
    assert (box_width >= 1).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


def test_every_place_of_a_box_is_reached():
    top, left, height, width, _ = boxes_of(600, 4, 4, scale=(0.56, 0.57), ratio=(1.0, 1.0)).T
    assert (height == 3).all()
    assert (width == 3).all()
    assert {*zip(top.tolist(), left.tolist(), strict=True)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(("flip", "expected"), [(0.0, 0), (1.0, 50)])
def test_flip_of_probability_0_and_1(flip, expected):
    assert boxes_of(50, 10, 10, flip=flip)[:, 4].sum() == expected


def test_crops_are_the_antialiased_boxes_of_their_own_images(device):
    batch = torch.rand(5, 2, 23, 31, generator=seeded(), dtype=torch.float64)
    boxes = [
        [0, 0, 23, 31, 0],
        [3, 4, 17, 9, 1],
        [22, 30, 1, 1, 0],
        [5, 0, 2, 31, 1],
        [1, 1, 8, 8, 0],
    ]
    for size in (1, 8, 40):
        crops = multicrop._cut(batch.to(device), boxes, size).cpu().numpy()
        for image, box, crop in zip(batch.numpy(), boxes, crops, strict=True):
            np.testing.assert_allclose(crop, resized_box(image, box, size), atol=PIXEL)


# The photometric step


@pytest.mark.parametrize("index", range(4))
def test_colour_steps_equal_their_definitions(index, device):
    parameters = [-0.5, -0.16, 0.0, 0.1, 0.5] if index == 3 else [0.0, 0.36, 1.0, 1.3, 1.64]
    crops = random_crops(len(parameters))
    column = torch.tensor(parameters, dtype=torch.float64).view(-1, 1, 1, 1)
    results = photometric._COLOUR_STEPS[index](crops.to(device), column.to(device)).cpu().numpy()
    for crop, parameter, result in zip(crops.numpy(), parameters, results, strict=True):
        np.testing.assert_allclose(result, COLOUR_ORACLES[index](crop, parameter), atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 40])
def test_blur_equals_the_convolution_with_mirrored_borders(size, device):
    sigmas = [0.1, 0.7, 2.0]
    crops = random_crops(3, channels=2, size=max(size, 3))[:, :, :size, :]
    column = torch.tensor(sigmas, dtype=torch.float64).view(-1, 1, 1, 1)
    results = photometric._blur(crops.to(device), column.to(device), radius=10).cpu().numpy()
    for crop, sigma, result in zip(crops.numpy(), sigmas, results, strict=True):
        np.testing.assert_allclose(result, blur(crop, sigma, 10), atol=1e-12)
        if size > 10:
            filtered = scipy.ndimage.gaussian_filter(
                crop, sigma, axes=(1, 2), radius=10, mode="mirror"
            )
            np.testing.assert_allclose(result, filtered, atol=1e-12)


def test_a_drawn_blur_is_not_cut_short():
    settings = PhotometricDistortion(
        jitter_probability=0, greyscale_probability=0, blur_probability=1, blur_sigma=(1.9, 2.0)
    )
    crops = random_crops(3, size=30)
    draw = photometric._draw_photometric(settings, 3, seeded())
    for crop, sigma, result in zip(
        crops.numpy(), draw.sigma, settings(crops, generator=seeded()), strict=True
    ):
        np.testing.assert_allclose(result, blur(crop, float(sigma), 29), atol=PIXEL)


def test_blur_is_that_of_pil_away_from_the_border():
    pixels = (random_crops(1, size=60)[0].numpy() * 255).round().astype(np.uint8)
    filtered = Image.fromarray(np.moveaxis(pixels, 0, -1)).filter(ImageFilter.GaussianBlur(1.5))
    sigma = torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64)
    ours = photometric._blur(torch.tensor(pixels[None] / 255), sigma, 10)[0]
    inner = slice(12, -12)
    theirs = np.moveaxis(np.array(filtered) / 255, -1, 0)[:, inner, inner]
    # PIL repeats box blurs in 8 bits, an approximation of its own.
    np.testing.assert_allclose(ours[:, inner, inner].numpy(), theirs, atol=0.03)


def test_each_crop_gets_its_own_steps_in_its_own_order(device):
    settings = PhotometricDistortion()
    crops = random_crops(60)
    draw = photometric._draw_photometric(settings, 60, seeded(4))
    results = photometric._apply_photometric(crops.to(device), draw).cpu().numpy()
    for i, crop in enumerate(crops.numpy()):
        if draw.jittered[i]:
            for step in draw.order[i]:
                crop = COLOUR_ORACLES[step](crop, float(draw.strengths[i, step]))
        if draw.grey[i]:
            crop = np.stack([grey(crop)] * 3)
        if draw.blurred[i]:
            crop = blur(crop, float(draw.sigma[i]), draw.radius)
        np.testing.assert_allclose(results[i], crop, atol=1e-9)


def test_photometric_draws_follow_their_distributions():
    draw = photometric._draw_photometric(PhotometricDistortion(0.3, 0.4, 0.5, 0.1), 5000, seeded(7))
    for column, low, high in zip(
        draw.strengths.T.numpy(), (0.7, 0.6, 0.5, -0.1), (1.3, 1.4, 1.5, 0.1), strict=True
    ):
        assert scipy.stats.kstest(column, scipy.stats.uniform(low, high - low).cdf).pvalue > 0.01
    assert scipy.stats.kstest(draw.sigma, scipy.stats.uniform(0.1, 1.9).cdf).pvalue > 0.01
    for drawn, probability in ((draw.jittered, 0.8), (draw.grey, 0.2), (draw.blurred, 0.5)):
        assert scipy.stats.binomtest(int(drawn.sum()), 5000, probability).pvalue > 0.01
    counts = np.unique(draw.order.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_the_published_recipe_is_the_default():
    settings = PhotometricDistortion()
    assert (settings.brightness, settings.contrast, settings.saturation) == (0.64, 0.64, 0.64)
    assert settings.hue == 0.16
    assert (settings.jitter_probability, settings.greyscale_probability) == (0.8, 0.2)
    assert (settings.blur_probability, settings.blur_sigma) == (0.5, (0.1, 2.0))
    groups = MultiCropTransform().crops
    assert [(g.size, g.count, g.scale, g.ratio, g.flip, g.photometric) for g in groups] == [
        (224, 2, (0.14, 1.0), (3 / 4, 4 / 3), 0.5, settings),
        (96, 6, (0.05, 0.14), (3 / 4, 4 / 3), 0.5, settings),
    ]


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


def test_distortion_of_no_crops():
    assert PhotometricDistortion()(torch.empty(0, 3, 8, 8)).shape == (0, 3, 8, 8)


def test_autocast_does_not_coarsen_the_pixels():
    crops = random_crops(8, dtype=torch.float32)
    expected = PhotometricDistortion()(crops, generator=seeded(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(PhotometricDistortion()(crops, generator=seeded(1)), expected)


def test_a_blur_alone_takes_any_number_of_channels():
    settings = PhotometricDistortion(
        jitter_probability=0, greyscale_probability=0, blur_probability=1
    )
    crops = random_crops(2, channels=5)
    assert settings(crops, generator=seeded()).shape == crops.shape


# The transform


def test_image_gives_its_boxes_resized_and_normalised():
    image = torch.rand(3, 20, 30, generator=seeded(), dtype=torch.float64)
    crops = MultiCropTransform(PLAIN)(image, generator=seeded(8))
    replay = seeded(8)
    boxes = [
        (group, box)
        for group in PLAIN
        for box in multicrop._draw_boxes(group, group.count, (20, 30), replay)
    ]
    mean = np.array([0.485, 0.456, 0.406])[:, None, None]
    std = np.array([0.229, 0.224, 0.225])[:, None, None]
    for crop, (group, box) in zip(crops, boxes, strict=True):
        expected = (resized_box(image.numpy(), box, group.size) - mean) / std
        np.testing.assert_allclose(crop, expected, atol=PIXEL)


def test_default_crops():
    crops = MultiCropTransform()(torch.rand(3, 40, 60))
    assert [tuple(crop.shape) for crop in crops] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 6


@pytest.mark.parametrize("groups", [PLAIN, DISTORTED], ids=["plain", "distorted"])
def test_kinds_of_images_agree(groups, device):
    pixels = torch.randint(0, 256, (3, 33, 21), generator=seeded(), dtype=torch.uint8)
    transform = MultiCropTransform(groups)
    expected = transform(pixels, generator=seeded(1))
    assert all(crop.dtype == torch.float32 for crop in expected)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    others = [
        transform(picture, generator=seeded(1)),
        transform(pixels.float() / 255, generator=seeded(1)),
        [crop[0].cpu() for crop in transform(pixels[None].to(device), generator=seeded(1))],
        transform(pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1), generator=seeded(1)),
    ]
    for crops in others:
        for one, other in zip(crops, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-4), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)],
)
def test_floating_images_keep_their_dtype(dtype, tolerance, device):
    image = (torch.randint(0, 2, (2, 3, 20, 20), generator=seeded()) / 2).to(device)
    transform = MultiCropTransform(DISTORTED)
    expected = transform(image, generator=seeded(1))
    for one, other in zip(transform(image.to(dtype), generator=seeded(1)), expected, strict=True):
        assert one.dtype == dtype
        assert one.device == image.device
        torch.testing.assert_close(one.float(), other, atol=tolerance, rtol=tolerance)


@each_kind_of_draw
def test_parameters_are_drawn_per_sample_and_per_crop(groups):
    batch = torch.rand(3, 60, 60, generator=seeded()).expand(4, 3, 60, 60)
    crops = MultiCropTransform(groups)(batch, generator=seeded())
    for same_size in (crops[:2], crops[3:]):
        samples = [sample for crop in same_size for sample in crop]
        for one, other in itertools.combinations(samples, 2):
            assert not torch.allclose(one, other)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 4), (2, 500)])
def test_small_and_elongated_images(shape):
    for crop in MultiCropTransform(DISTORTED)(torch.full((3, *shape), 0.25, dtype=torch.float64)):
        assert crop.isfinite().all()
    plain = MultiCropTransform(PLAIN, mean=0.25, std=2.0)
    for crop in plain(torch.full((7, *shape), 0.75, dtype=torch.float64)):
        torch.testing.assert_close(crop, torch.full_like(crop, 0.25))


@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_any_number_of_channels(channels):
    transform = MultiCropTransform(PLAIN, mean=[0.5] * channels, std=0.25)
    batch = torch.full((2, channels, 9, 9), 0.75)
    assert [crop.shape[:2] for crop in transform(batch)] == [(2, channels)] * 5
    torch.testing.assert_close(transform(batch)[0], torch.ones(2, channels, 12, 12))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_an_empty_batch_gives_empty_crops(dtype):
    crops = MultiCropTransform(DISTORTED)(torch.empty(0, 3, 20, 20, dtype=dtype))
    assert [tuple(crop.shape) for crop in crops] == [(0, 3, 12, 12)] * 2 + [(0, 3, 6, 6)] * 3
    assert all(crop.dtype == (torch.float32 if dtype == torch.uint8 else dtype) for crop in crops)


def test_the_default_device_and_dtype_of_the_session_do_not_matter():
    images = torch.randint(0, 256, (2, 3, 20, 20), generator=seeded(), dtype=torch.uint8)
    expected = MultiCropTransform(DISTORTED)(images, generator=seeded())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            crops = MultiCropTransform(DISTORTED)(images, generator=seeded())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, crops, expected))


def test_the_input_is_never_written():
    for image in (torch.rand(3, 12, 12), torch.rand(2, 3, 12, 12)):
        before = image.clone()
        MultiCropTransform(DISTORTED)(image)
        assert torch.equal(image, before)


# PIL modes


def test_pil_image_of_mode_l_has_the_channels_that_mean_names():
    picture = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    whole = (CropGroup(5, 1, (1.0, 1.0), (2.0, 2.0), flip=0.0, photometric=None),)
    one = MultiCropTransform(whole, mean=[0.0], std=[1.0])(picture)[0]
    free = MultiCropTransform(whole, mean=0.0, std=1.0)(picture)[0]
    three = MultiCropTransform(whole, mean=[0.0] * 3, std=1.0)(picture)[0]
    assert one.shape == free.shape == (1, 5, 5)
    assert torch.equal(three, one.expand(3, 5, 5))
    tensor = torch.arange(200, dtype=torch.uint8).view(1, 10, 20)
    assert torch.equal(one, MultiCropTransform(whole, mean=0.0, std=1.0)(tensor)[0])


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
def test_other_pil_modes_become_rgb(mode):
    colours = np.random.default_rng(0).integers(0, 256, (14, 11, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).convert(mode)
    transform = MultiCropTransform(PLAIN)
    rgb = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    expected = transform(rgb, generator=seeded())
    for one, other in zip(transform(picture, generator=seeded()), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_pil_modes_of_unknown_range_are_refused(mode):
    with pytest.raises(TypeError, match=rf"8-bit PIL image, got mode '{mode}'"):
        MultiCropTransform(PLAIN)(Image.new(mode, (5, 5)))


# A photometric step of the user's


def test_a_callable_gets_crops_in_0_1_in_the_rank_of_the_input():
    seen: list[torch.Tensor] = []

    def invert(crops: torch.Tensor) -> torch.Tensor:
        seen.append(crops)
        return 1 - crops

    inverted = MultiCropTransform(
        (CropGroup(6, 2, (0.5, 1.0), photometric=invert),), mean=0.0, std=1.0
    )
    plain = MultiCropTransform((CropGroup(6, 2, (0.5, 1.0), photometric=None),), mean=0.0, std=1.0)
    for image, shape in (
        (torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8), (3, 6, 6)),
        (torch.rand(4, 5, 9, 9, dtype=torch.bfloat16), (4, 5, 6, 6)),
    ):
        seen.clear()
        results = inverted(image, generator=seeded())
        assert [(tuple(s.shape), s.dtype) for s in seen] == [(shape, torch.float32)] * 2
        assert all(s.min() >= 0 and s.max() <= 1 for s in seen)
        for one, other in zip(results, plain(image, generator=seeded()), strict=True):
            torch.testing.assert_close(one, 1 - other, atol=1e-2, rtol=0)


def test_groups_may_have_different_photometric_steps():
    groups = (
        CropGroup(6, 1, (0.5, 1.0), photometric=torch.zeros_like),
        CropGroup(6, 1, (0.5, 1.0), photometric=torch.ones_like),
    )
    zeros, ones = MultiCropTransform(groups, mean=0.0, std=1.0)(torch.rand(3, 9, 9))
    assert (zeros == 0).all()
    assert (ones == 1).all()


# Replay and data loaders


@each_kind_of_draw
def test_a_generator_replays_the_same_crops_and_leaves_the_global_one_alone(groups):
    transform = MultiCropTransform(groups)
    image = torch.rand(3, 60, 60, generator=seeded())
    state = torch.get_rng_state()
    first, again, other = (transform(image, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    torch.manual_seed(1)
    assert all(map(torch.equal, first, transform(image)))


def test_copies_and_pickles_draw_the_same_crops():
    transform = MultiCropTransform(DISTORTED, mean=0.4, std=(0.1, 0.2, 0.3))
    image = torch.rand(3, 30, 30)
    expected = transform(image, generator=seeded())
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert all(map(torch.equal, expected, twin(image, generator=seeded())))
        assert repr(twin) == repr(transform)


class OneImage(torch.utils.data.Dataset):
    """The same image at every index, so that crops differ by their random numbers only."""

    def __init__(self, groups: tuple[CropGroup, ...]) -> None:
        self.image = torch.rand(3, 60, 60, generator=seeded())
        self.transform = MultiCropTransform(groups)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(self.image)[0]


@each_kind_of_draw
def test_workers_draw_different_crops_and_different_ones_each_epoch(groups):
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(OneImage(groups), batch_size=2, num_workers=2)
    crops = [crop for _ in range(2) for batch in loader for crop in batch]
    assert len(crops) == 16
    for one, other in itertools.combinations(crops, 2):
        assert not torch.equal(one, other)


# multi_crop_forward


class Recorder(torch.nn.Module):
    """A network without batch statistics that keeps the shapes of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(crops.shape))
        return self.layers(crops)


@pytest.mark.parametrize("sizes", [(8,), (8, 8, 6, 6, 6), (6, 8, 6, 7, 8)])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_one_pass_per_resolution_equals_one_pass_per_crop(sizes, batch, device):
    network = Recorder().to(device)
    crops = [torch.rand(batch, 3, size, size, device=device) for size in sizes]
    features = multi_crop_forward(network, crops)
    assert sorted(network.shapes) == sorted(
        (sizes.count(size) * batch, 3, size, size) for size in set(sizes)
    )
    assert features.shape == (len(sizes), batch, 5)
    for index, crop in enumerate(crops):
        torch.testing.assert_close(features[index], network.layers(crop))


def test_height_and_width_both_make_the_resolution():
    network = Recorder()
    crops = [torch.rand(2, 3, *size) for size in ((6, 8), (8, 6), (6, 8))]
    features = multi_crop_forward(network, crops)
    assert network.shapes == [(4, 3, 6, 8), (2, 3, 8, 6)]
    for index, crop in enumerate(crops):
        torch.testing.assert_close(features[index], network.layers(crop))


def test_gradients_are_those_of_one_pass_per_crop():
    network = Recorder().double()
    crops = [torch.rand(2, 3, size, size, dtype=torch.float64) for size in (6, 8, 6)]
    weights = torch.rand(3, 2, 5, dtype=torch.float64)
    (multi_crop_forward(network, crops) * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    sum((network(c) * w).sum() for c, w in zip(crops, weights, strict=True)).backward()
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": 0}, ValueError, r"size must be at least 1, got 0"),
        ({"size": 2.0}, TypeError, r"size must be an int, got float"),
        ({"count": 0}, ValueError, r"count must be at least 1, got 0"),
        ({"count": True}, TypeError, r"count must be an int, got bool"),
        ({"scale": 0.5}, TypeError, r"scale must be two numbers \(low, high\), got float"),
        ({"scale": ()}, ValueError, r"scale .* 0 < low <= high <= 1, got \(\)"),
        ({"scale": (0.5, 0.2)}, ValueError, r"scale .* got \(0.5, 0.2\)"),
        ({"scale": (0.0, 0.2)}, ValueError, r"scale .* got \(0.0, 0.2\)"),
        ({"scale": (0.5, 1.1)}, ValueError, r"scale .* got \(0.5, 1.1\)"),
        ({"scale": (math.nan, 1.0)}, ValueError, r"scale\[0\] must be a finite number, got nan"),
        ({"scale": ("a", 1.0)}, TypeError, r"scale\[0\] must be a number, got str"),
        ({"ratio": (4 / 3, 3 / 4)}, ValueError, r"ratio .* 0 < low <= high, got"),
        ({"ratio": (-1.0, 1.0)}, ValueError, r"ratio .* got \(-1.0, 1.0\)"),
        ({"ratio": (1.0, math.inf)}, ValueError, r"ratio\[1\] must be a finite number, got inf"),
        ({"flip": 1.5}, ValueError, r"flip must be in \[0, 1\], got 1.5"),
        ({"flip": True}, TypeError, r"flip must be a number, got bool"),
        ({"photometric": "blur"}, TypeError, r"photometric must be a callable or None, got str"),
    ],
)
def test_bad_groups(settings, error, message):
    with pytest.raises(error, match=message):
        CropGroup(**{"size": 8, "count": 1, "scale": (0.1, 1.0), **settings})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"brightness": 1.1}, ValueError, r"brightness must be in \[0, 1\], got 1.1"),
        ({"contrast": -0.1}, ValueError, r"contrast must be in \[0, 1\], got -0.1"),
        ({"saturation": None}, TypeError, r"saturation must be a number, got NoneType"),
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
    ],
)
def test_bad_photometric_settings(settings, error, message):
    with pytest.raises(error, match=message):
        PhotometricDistortion(**settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"crops": ()}, ValueError, r"crops must hold at least one CropGroup, got none"),
        (
            {"crops": CropGroup(8, 1, (0.1, 1.0))},
            TypeError,
            r"sequence of CropGroup, got CropGroup",
        ),
        ({"crops": (PLAIN[0], (6, 3))}, TypeError, r"crops\[1\] must be a CropGroup, got tuple"),
        (
            {"crops": PLAIN[::-1]},
            ValueError,
            r"crops\[0\] .* largest .* 6 there and 12 in crops\[1\]",
        ),
        ({"mean": (0.5, 0.5)}, ValueError, r"mean and std must have the same length"),
        ({"mean": "grey"}, TypeError, r"mean must be a number, got str"),
        ({"mean": (0.5, math.inf, 0.5)}, ValueError, r"mean\[1\] must be a finite number, got inf"),
        ({"std": (0.2, 0.0, 0.2)}, ValueError, r"std\[1\] must be a finite number above 0, got 0"),
        ({"std": -1.0}, ValueError, r"std must be a finite number above 0, got -1"),
    ],
)
def test_bad_transforms(arguments, error, message):
    with pytest.raises(error, match=message):
        MultiCropTransform(**arguments)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((8, 8, 3)), TypeError, r"PIL image or a torch.Tensor, got ndarray"),
        (None, TypeError, r"PIL image or a torch.Tensor, got NoneType"),
        ("cat.png", TypeError, r"PIL image or a torch.Tensor, got str"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, r"uint8 or floating.*torch.int64"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), TypeError, r"uint8 or floating.*torch.bool"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), TypeError, r"torch.complex64"),
        (torch.zeros(8, 8), ValueError, r"\(C, H, W\) or \(B, C, H, W\), got \(8, 8\)"),
        (torch.zeros(1, 1, 3, 8, 8), ValueError, r"got \(1, 1, 3, 8, 8\)"),
        (torch.zeros(3, 0, 8), ValueError, r"must have channels and pixels, got shape \(3, 0, 8\)"),
        (torch.zeros(2, 0, 8, 8), ValueError, r"got shape \(2, 0, 8, 8\)"),
        (Image.new("RGB", (0, 5)), ValueError, r"got shape \(3, 5, 0\)"),
        (torch.zeros(8, 8, 3), ValueError, r"got 3 numbers and an image of 8 channels"),
        (torch.zeros(2, 1, 8, 8), ValueError, r"got 3 numbers and an image of 1 channels"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        MultiCropTransform(DISTORTED)(image)


def test_a_generator_must_be_one():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
        MultiCropTransform(PLAIN)(torch.rand(3, 8, 8), generator=3)


def test_colour_steps_refuse_other_channels_and_say_what_to_do():
    with pytest.raises(ValueError, match=r"needs 3 channels, got 1: .*photometric=None"):
        MultiCropTransform(DISTORTED, mean=0.5, std=0.5)(torch.rand(2, 1, 8, 8))


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
def test_bad_crops_to_distort(crops, error, message):
    with pytest.raises(error, match=message):
        PhotometricDistortion()(crops)


@pytest.mark.parametrize(
    ("photometric", "error", "message"),
    [
        (
            lambda crops: crops[:1],
            ValueError,
            r"crops\[1\]\.photometric .* \(3, 6, 6\), got \(1, 6, 6\)",
        ),
        (
            lambda crops: None,
            TypeError,
            r"crops\[1\]\.photometric must be a torch.Tensor, got None",
        ),
        (lambda crops: crops.byte(), TypeError, r"crops\[1\]\.photometric .*torch.uint8"),
    ],
)
def test_what_a_callable_returns_is_checked(photometric, error, message):
    groups = (PLAIN[0], CropGroup(6, 1, (0.1, 1.0), photometric=photometric))
    with pytest.raises(error, match=message):
        MultiCropTransform(groups)(torch.rand(3, 8, 8))


@pytest.mark.parametrize(
    ("crops", "error", "message"),
    [
        ([], ValueError, r"crops must hold at least one tensor, got none"),
        (
            torch.rand(2, 2, 3, 8, 8),
            TypeError,
            r"crops must be a sequence of torch.Tensor, got Tensor",
        ),
        ([torch.rand(2, 3, 8, 8), None], TypeError, r"crops\[1\] must be a torch.Tensor"),
        (
            [torch.zeros(2, 3, 8, 8).byte()],
            TypeError,
            r"crops\[0\] must have a floating-point dtype",
        ),
        ([torch.rand(3, 8, 8)], ValueError, r"crops\[0\] must have shape \(B, C, H, W\)"),
        (
            [torch.rand(2, 3, 8, 8), torch.rand(4, 3, 6, 6)],
            ValueError,
            r"crops\[1\] .* got \(4, 3, 6, 6\) beside \(2, 3, 8, 8\)",
        ),
    ],
)
def test_bad_crops_to_forward(crops, error, message):
    with pytest.raises(error, match=message):
        multi_crop_forward(Recorder(), crops)


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (lambda crops: (crops,), TypeError, r"crops of 8x8 must be a torch.Tensor, got tuple"),
        (lambda crops: crops.sum(), ValueError, r"must have shape \(4, D\), got \(\)"),
        (lambda crops: crops.mean(1), ValueError, r"must have shape \(4, D\), got \(4, 8, 8\)"),
        (
            lambda crops: crops[:2].flatten(1),
            ValueError,
            r"must have shape \(4, D\), got \(2, 192\)",
        ),
        (
            lambda crops: crops.flatten(1),
            ValueError,
            r"crops of 6x6 must have D = 192 .* got \(2, 108\)",
        ),
    ],
)
def test_what_a_network_returns_is_checked(network, error, message):
    crops = [torch.rand(2, 3, size, size) for size in (8, 6, 8)]
    with pytest.raises(error, match=message):
        multi_crop_forward(network, crops)
