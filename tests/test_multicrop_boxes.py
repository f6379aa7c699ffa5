"""Boxes and their cutting, one by one and a batch at once, against definitions in NumPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from swavkit import CropGroup, MultiCropTransform
from swavkit.multicrop import box_ops, separable
from tests.image_oracles import resized_box, seeded
from tests.modes import RoundedProducts

RARE = 1e-3  # with several laws to a test, one in a hundred would be one in ten
PIXEL = 2e-6  # float32 arithmetic on pixels in [0, 1]


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


def boxes_of(number: int, height: int, width: int, seed: int = 1, **settings) -> np.ndarray:
    """Return rows of (top, left, height, width, mirrored), half of them of each of two crops."""
    group = CropGroup(8, 2, **{"scale": (0.05, 0.7), **settings})
    uniform = torch.rand(
        number // 2, 2, box_ops.NUMBERS, generator=seeded(seed), dtype=torch.float64
    )
    sizes = torch.tensor([[height, width]]).expand(number // 2, 2)
    limits = (torch.tensor([value] * 2).double() for value in (group.scale, group.ratio))
    flips = torch.tensor([group.flip] * 2).double()
    return box_ops.draw_boxes(uniform, sizes, *limits, flips).flatten(0, 1).numpy()


def test_area_aspect_place_and_mirror_follow_their_distributions():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    # Below an area of 3/4 no box of the default shapes misses a square image: nothing is redrawn.
    top, left, height, width, mirrored = boxes_of(4000, 5000, 5000, flip=0.3).T
    uniform = stats.uniform
    area = height * width / 5000**2
    log_ratio = np.log(width / height)
    limits = math.log(3 / 4), math.log(4 / 3)
    for values, law in (
        (area, uniform(0.05, 0.65)),
        (log_ratio, uniform(limits[0], limits[1] - limits[0])),
        (top / (5001 - height), uniform()),
        (left / (5001 - width), uniform()),
    ):
        assert stats.kstest(values, law.cdf).pvalue > RARE
    assert stats.binomtest(int(mirrored.sum()), 4000, 0.3).pvalue > RARE
    for one, other in itertools.combinations((area, log_ratio, top / (5001 - height), mirrored), 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06


def test_boxes_that_miss_are_redrawn_as_in_the_plain_loop():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    group = CropGroup(8, 1, (0.3, 1.0), (0.5, 2.0))
    drawn = boxes_of(3000, 2000, 2600, seed=2, scale=group.scale, ratio=group.ratio)[:, 2:4]
    loop = np.random.default_rng(3)
    expected = np.array([plain_loop_box(loop, 2000, 2600, group) for _ in range(3000)])
    assert stats.ks_2samp(drawn.prod(1), expected.prod(1)).pvalue > RARE
    ratios = (boxes[:, 0] / boxes[:, 1] for boxes in (drawn, expected))
    assert stats.ks_2samp(*ratios).pvalue > RARE


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


def test_each_image_has_boxes_of_its_own_size_and_each_crop_its_own_ranges():
    uniform = torch.rand(400, 2, box_ops.NUMBERS, generator=seeded(), dtype=torch.float64)
    sizes = torch.tensor([[100, 120], [700, 600]]).repeat(200, 1)
    scale = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).double()
    ratio = torch.tensor([[1.0, 1.0], [0.8, 0.9]]).double()
    flip = torch.tensor([0.0, 1.0]).double()
    boxes = box_ops.draw_boxes(uniform, sizes, scale, ratio, flip)
    areas = boxes[..., 2] * boxes[..., 3] / sizes.prod(1)[:, None]
    low, high = scale.unbind(1)
    assert (areas > low * 0.97).all()
    assert (areas < high * 1.03).all()
    assert (boxes[:, 0, 4] == 0).all()
    assert (boxes[:, 1, 4] == 1).all()
    assert (boxes[..., :2] + boxes[..., 2:4] <= sizes[:, None]).all()


# Cutting

BOXES = [
    [0, 0, 23, 31, 0],
    [3, 4, 17, 9, 1],
    [22, 30, 1, 1, 0],
    [5, 0, 2, 31, 1],
    [1, 1, 8, 8, 0],
]


each_interpolation = pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])


def one_by_one(images: torch.Tensor, size: box_ops.Size, *interpolation: str) -> torch.Tensor:
    return torch.stack(
        [
            box_ops.cut(image, box, size, *interpolation)
            for image, box in zip(images, BOXES, strict=True)
        ]
    )


def at_once(images: torch.Tensor, size: box_ops.Size, *interpolation: str) -> torch.Tensor:
    boxes = torch.tensor(BOXES, device=images.device)
    return box_ops.cut_batch(images, boxes, size, *interpolation)


@each_interpolation
@pytest.mark.parametrize("size", [1, 8, 40, (5, 12), (12, 5), (40, 1)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_crops_are_the_antialiased_boxes_of_their_own_images(size, channels, interpolation, device):
    batch = torch.rand(5, channels, 23, 31, generator=seeded(), dtype=torch.float64)
    expected = [
        resized_box(image, box, size, interpolation)
        for image, box in zip(batch.numpy(), BOXES, strict=True)
    ]
    np.testing.assert_allclose(one_by_one(batch, size, interpolation), expected, atol=PIXEL)
    crops = at_once(batch.to(device), size, interpolation).cpu()
    np.testing.assert_allclose(crops, expected, atol=1e-12)


@each_interpolation
@pytest.mark.parametrize(("height", "width"), [(2, 3000), (3000, 2), (700, 900)])
def test_both_ways_agree_on_large_boxes_in_float32(height, width, interpolation):
    image = torch.rand(1, 1, height, width, generator=seeded())
    box = [0, 0, height, width, 1]
    crops = box_ops.cut(image[0], box, 96, interpolation)[None]
    together = box_ops.cut_batch(image, torch.tensor([box]), 96, interpolation)
    torch.testing.assert_close(together, crops, atol=1e-4, rtol=0)


def test_8_bit_resizing_is_that_of_8_bit_pixels():
    images = torch.randint(0, 256, (5, 3, 23, 31), dtype=torch.uint8, generator=seeded())
    exact, rounded = one_by_one(images.float(), 8), one_by_one(images, 8)
    assert rounded.dtype == torch.uint8
    torch.testing.assert_close(exact, rounded.float(), atol=1.5, rtol=0)


LAYOUTS = {
    "contiguous": lambda image: image,
    "channels last": lambda image: image.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "transposed": lambda image: image.mT.contiguous().mT,
    "reversed": lambda image: image.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "strided": lambda image: image.repeat_interleave(2, 2)[:, :, ::2],
    "one channel of four": lambda image: torch.cat([image, image[:1]])[: len(image)],
    "pixels of four": lambda image: (
        torch.cat([image, image[:1]]).permute(1, 2, 0).contiguous().permute(2, 0, 1)[: len(image)]
    ),
}


@each_interpolation
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_8_bit_resizing_is_right_in_any_order_of_memory(channels, layout, interpolation):
    lengths = (1, 2, 7)
    for height, width, size in itertools.product(lengths, lengths, (1, 2, 5)):
        image = torch.randint(
            0, 256, (channels, height, width), dtype=torch.uint8, generator=seeded()
        )
        arranged = LAYOUTS[layout](image)
        assert torch.equal(arranged, image)
        for box_height, box_width in itertools.product({1, height}, {1, width}):
            box = [height - box_height, width - box_width, box_height, box_width, 0]
            expected = resized_box(
                image.numpy().astype(float), box, size, interpolation, eight_bit=True
            )
            crop = box_ops.cut(arranged, box, size, interpolation)
            assert crop.dtype == torch.uint8
            np.testing.assert_allclose(crop, expected, atol=1.5)


def test_8_bit_crops_of_one_pixel_of_a_whole_image():
    whole = (CropGroup(1, 1, (1.0, 1.0), (1.0, 1.0), flip=0.0, photometric=None),)
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=seeded())
    exact, rounded = (
        MultiCropTransform(whole, mean=0.0, std=1.0, eight_bit=eight_bit)(image)[0]
        for eight_bit in (False, True)
    )
    torch.testing.assert_close(rounded, exact, atol=1.5 / 255, rtol=0)


def test_8_bit_resizing_is_a_setting_for_uint8_images():
    groups = (CropGroup(20, 1, (0.5, 1.0), photometric=None),)
    image = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8, generator=seeded())
    exact, rounded = (
        MultiCropTransform(groups, mean=0.0, std=1.0, eight_bit=eight_bit)
        for eight_bit in (False, True)
    )
    one, other = exact(image, seed=1)[0], rounded(image, seed=1)[0]
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, atol=1.5 / 255, rtol=0)
    assert torch.equal(exact(image / 255, seed=1)[0], rounded(image / 255, seed=1)[0])
    together = rounded(image.expand(2, 3, 50, 60), seed=1)[0]
    assert torch.equal(together[0], other)


def test_autocast_does_not_coarsen_the_pixels():
    batch = torch.rand(5, 3, 23, 31, generator=seeded())
    expected = at_once(batch, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(at_once(batch, 8), expected)


def filtering_as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separable, "_may_be_rounded", lambda factor: factor.dtype == torch.float32)


@pytest.mark.parametrize("size", [8, 40])
def test_tf32_does_not_coarsen_the_pixels_nor_their_gradient(size, monkeypatch):
    filtering_as_on_an_accelerator(monkeypatch)
    batch = torch.rand(5, 3, 23, 31, generator=seeded(), dtype=torch.float64)
    weights = torch.rand(5, 3, size, size, generator=seeded(1), dtype=torch.float64)
    exact, rounded = batch.clone().requires_grad_(), batch.float().requires_grad_()
    expected = at_once(exact, size)
    (expected * weights).sum().backward()
    with RoundedProducts() as products:
        crops = at_once(rounded, size)
        (crops * weights.float()).sum().backward()
    assert products.count
    torch.testing.assert_close(crops.double(), expected, atol=PIXEL, rtol=0)
    torch.testing.assert_close(rounded.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_tf32_of_a_device_does_not_coarsen_the_pixels(compiled):
    batch = torch.rand(5, 3, 230, 310, generator=seeded(), dtype=torch.float64)
    expected = at_once(batch, 96)
    cut = torch.compile(at_once) if compiled else at_once
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        crops = cut(batch.float().cuda(), 96).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(crops.double(), expected, atol=1e-5, rtol=0)


def test_the_gradient_of_the_pixels_is_the_same_inside_autocast():
    batch = torch.rand(5, 3, 23, 31, generator=seeded())
    gradients = []
    for enabled in (False, True):
        pixels = batch.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            at_once(pixels, 8).square().sum().backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("as_on_an_accelerator", [False, True])
def test_cutting_compiles_with_its_gradient(as_on_an_accelerator, monkeypatch):
    if as_on_an_accelerator:
        filtering_as_on_an_accelerator(monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(at_once, backend="aot_eager", fullgraph=True)
    batch = torch.rand(5, 3, 23, 31, generator=seeded())
    for cut in (at_once, compiled):
        pixels = batch.clone().requires_grad_()
        crops = cut(pixels, 8)
        (gradient,) = torch.autograd.grad(crops.square().sum(), pixels)
        if cut is at_once:
            expected = crops, gradient
    torch.testing.assert_close((crops, gradient), expected)


def test_a_crop_has_second_derivatives():
    pixels = torch.rand(5, 1, 4, 3, generator=seeded(), dtype=torch.float64).requires_grad_()
    boxes = torch.tensor([[0, 0, 4, 3, 0], [1, 0, 2, 2, 1]] * 2 + [[3, 2, 1, 1, 0]])
    torch.autograd.gradgradcheck(lambda images: box_ops.cut_batch(images, boxes, 2) ** 2, pixels)


@each_interpolation
def test_the_matrices_hold_what_interpolate_does(interpolation):
    image = torch.rand(1, 2, 37, 53, generator=seeded(), dtype=torch.float64)
    for size in ((5, 5), (37, 37), (60, 60), (11, 90)):
        expected = F.interpolate(image, size=size, mode=interpolation, antialias=True)
        crops = box_ops.cut_batch(image, torch.tensor([[0, 0, 37, 53, 0]]), size, interpolation)
        torch.testing.assert_close(crops, expected, atol=PIXEL, rtol=0)


# Laws


ranges = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: tuple(sorted(pair)))
ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(lambda pair: tuple(sorted(pair)))
lengths = st.integers(1, 400)


@given(lengths, lengths, ranges, ratios, st.floats(0, 1), st.integers(0, 2**16))
def test_any_box_lies_inside_any_image(height, width, scale, ratio, flip, seed):
    boxes = boxes_of(20, height, width, seed, scale=scale, ratio=ratio, flip=flip)
    top, left, box_height, box_width, mirrored = boxes.T
    assert (boxes == np.round(boxes)).all()
    assert (np.minimum(box_height, box_width) >= 1).all()
    assert (np.minimum(top, left) >= 0).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()
    assert np.isin(mirrored, (0, 1)).all()


@st.composite
def cuts(draw: st.DrawFn):
    """An image, a box in it, and the size and interpolation of a crop."""
    height, width, *size = (draw(st.integers(1, 40)) for _ in range(4))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    box = [top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)), 0]
    image = torch.rand(2, height, width, generator=seeded(draw(st.integers(0, 99)))).double()
    return image, box, (tuple(size), draw(st.sampled_from(["bilinear", "bicubic"])))


@given(cuts())
def test_both_ways_cut_the_same(cut):
    image, box, resizing = cut
    for mirrored in (0, 1):
        box[4] = mirrored
        together = box_ops.cut_batch(image[None], torch.tensor([box]), *resizing)[0]
        torch.testing.assert_close(box_ops.cut(image, box, *resizing), together, atol=PIXEL, rtol=0)


@given(cuts(), st.integers(0, 40), st.integers(0, 40))
def test_windows_and_several_boxes_of_an_image_change_nothing(cut, down, right):
    image, box, resizing = cut
    height, width = image.shape[1:]
    canvas = torch.rand(2, 2, height + max(height, down), width + max(width, right)).double()
    top, left = canvas.shape[2] - height, canvas.shape[3] - width
    canvas[1, :, top:, left:] = image
    boxes = torch.tensor([box] * 4).view(2, 2, 5)
    boxes[1, 1, :2] += torch.tensor([top, left])
    boxes[1, 0, 4] = 1
    crops = box_ops.cut_batch(canvas, boxes, *resizing, window=(height, width))
    expected = box_ops.cut_batch(image[None], torch.tensor([box]), *resizing)[0]
    torch.testing.assert_close(crops[1, 1], expected)
    for view in range(2):
        apart = box_ops.cut_batch(canvas, boxes[:, view], *resizing)
        torch.testing.assert_close(crops[:, view], apart)


@given(cuts())
def test_cutting_is_linear_keeps_constants_and_sees_nothing_outside_the_box(cut):
    image, box, resizing = cut
    top, left, height, width, _ = box
    crop = box_ops.cut_batch(image[None], torch.tensor([box]), *resizing)
    affine = box_ops.cut_batch(3 * image[None] + 0.25, torch.tensor([box]), *resizing)
    torch.testing.assert_close(affine, 3 * crop + 0.25)
    elsewhere = torch.rand_like(image)
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    elsewhere[inside] = image[inside]
    same = box_ops.cut_batch(elsewhere[None], torch.tensor([box]), *resizing)
    torch.testing.assert_close(same, crop)


@given(cuts())
def test_a_mirrored_crop_is_the_crop_mirrored(cut):
    image, box, resizing = cut
    mirrored = [*box[:4], 1]
    both = torch.tensor([box, mirrored])
    crops = box_ops.cut_batch(image.expand(2, *image.shape), both, *resizing)
    torch.testing.assert_close(crops[1], crops[0].flip(-1))
