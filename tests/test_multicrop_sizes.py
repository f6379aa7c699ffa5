"""Rectangular and bicubic crops of every kind of image, against definitions in NumPy."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from swavkit import CropGroup, MultiCropTransform
from swavkit.multicrop import box_ops
from tests.image_oracles import resized_box, seeded
from tests.modes import RefuseSynchronisation

PIXEL = 1e-5  # float32 arithmetic on pixels in [0, 1]
EACH_GROUP = tuple(
    CropGroup(size, 2, scale, photometric=None, interpolation=interpolation)
    for size, scale in (((12, 18), (0.3, 1.0)), ((9, 4), (0.05, 0.3)), (5, (0.05, 0.3)))
    for interpolation in ("bicubic", "bilinear")
)
OF_ONE_IMAGE = {
    "float32": lambda pixels: pixels[0] / 255,
    "float64": lambda pixels: pixels[0].double() / 255,
    "uint8": lambda pixels: pixels[0],
    "PIL": lambda pixels: Image.fromarray(pixels[0].permute(1, 2, 0).numpy()),
}
OF_BATCHES = {
    "uint8 batch": lambda pixels: pixels,
    "float64 batch": lambda pixels: pixels.double() / 255,
    "list": list,
    "list of PIL": lambda pixels: [
        Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels
    ],
    "channels last": lambda pixels: pixels.contiguous(memory_format=torch.channels_last),
    "gradient": lambda pixels: (pixels / 255).requires_grad_(),
    "list with a gradient": lambda pixels: [(image / 255).requires_grad_() for image in pixels],
    "many": lambda pixels: pixels.repeat(8, 1, 1, 1),
}


def black_and_white(number: int = 2, height: int = 24, width: int = 31) -> torch.Tensor:
    """Pixels of 0 and 255, where bicubic interpolation overshoots both."""
    images = torch.randint(0, 2, (number, 3, height, width), generator=seeded(), dtype=torch.uint8)
    return 255 * images


def definition(image, group, box, flip, **settings):
    """Return the crop of (C, H, W) pixels, and how far it overshoots [0, 1] before clamping."""
    left, top, right, bottom = box.tolist()
    row = top, left, bottom - top, right - left, flip
    crop = resized_box(image, row, group.size, group.interpolation, **settings)
    return np.clip(crop, 0, 1), np.abs(crop - np.clip(crop, 0, 1)).max()


def in_order(groups):
    return [group for group in groups for _ in range(group.count)]


@pytest.mark.parametrize("kind", OF_ONE_IMAGE)
def test_an_image_gives_its_boxes_in_any_size_and_interpolation(kind):
    pixels = black_and_white(1)
    transform = MultiCropTransform(EACH_GROUP, mean=0.0, std=1.0)
    crops, boxes, flips = transform(OF_ONE_IMAGE[kind](pixels), seed=3, return_boxes=True)
    overshoots = []
    for crop, group, box, flip in zip(crops, in_order(EACH_GROUP), boxes, flips, strict=True):
        expected, overshoot = definition(pixels[0].numpy() / 255, group, box, flip)
        np.testing.assert_allclose(crop, expected, atol=PIXEL)
        overshoots.append(overshoot)
    assert max(overshoots) > 0.1


@pytest.mark.parametrize("kind", OF_BATCHES)
def test_a_batch_gives_its_boxes_in_any_size_and_interpolation(kind, device):
    images = OF_BATCHES[kind](black_and_white())
    if isinstance(images, torch.Tensor):
        images = images.to(device)
    transform = MultiCropTransform(EACH_GROUP, mean=0.0, std=1.0)
    crops, boxes, flips = transform(images, seed=3, return_boxes=True)
    pixels = black_and_white().numpy() / 255
    for crop, group, box, flip in zip(crops, in_order(EACH_GROUP), boxes, flips, strict=True):
        assert len(crop) == len(images)
        for index, one in enumerate(crop.detach().cpu()):
            image = pixels[index % 2]
            expected, _ = definition(image, group, box[index], flip[index])
            np.testing.assert_allclose(one, expected, atol=PIXEL)


@pytest.mark.parametrize("size", [(12, 18), (9, 4), 1, (1, 7), (7, 1)])
@pytest.mark.parametrize("kind", ["uint8", "PIL"])
def test_8_bit_bicubic_crops_are_clamped_after_each_axis(size, kind):
    pixels = black_and_white(1)
    group = CropGroup(size, 8, (0.05, 1.0), photometric=None, interpolation="bicubic")
    transform = MultiCropTransform((group,), mean=0.0, std=1.0, eight_bit=True)
    crops, boxes, flips = transform(OF_ONE_IMAGE[kind](pixels), seed=3, return_boxes=True)
    for crop, box, flip in zip(crops, boxes, flips, strict=True):
        left, top, right, bottom = box.tolist()
        row = top, left, bottom - top, right - left, flip
        image = pixels[0].numpy().astype(float)
        # Along an axis of length 1 torch resizes in float32, and clamps once.
        rounded = 1 not in (row[2], row[3], *box_ops.height_and_width(size))
        expected = resized_box(image, row, size, "bicubic", eight_bit=rounded)
        np.testing.assert_allclose(crop * 255, np.clip(expected, 0, 255), atol=1.5)


@pytest.mark.parametrize("size", [(12, 18), (40, 9), (40, 50)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_8_bit_crops_are_those_of_pil(size, interpolation):
    # Of low contrast: versions of PIL differ in the axis that they resize, and clamp, first.
    pixels = 64 + black_and_white(1)[0] // 2
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    group = CropGroup(size, 8, (0.05, 1.0), flip=0.0, photometric=None, interpolation=interpolation)
    transform = MultiCropTransform((group,), mean=0.0, std=1.0, eight_bit=True)
    crops, boxes, _ = transform(picture, seed=1, return_boxes=True)
    for crop, box in zip(crops, boxes, strict=True):
        theirs = picture.crop(box.tolist()).resize(
            size[::-1], Image.Resampling[interpolation.upper()]
        )
        difference = crop.permute(1, 2, 0).numpy() * 255 - np.array(theirs)
        assert np.abs(difference).max() < 2.01


def test_boxes_do_not_depend_on_the_size_or_the_interpolation():
    image = torch.rand(3, 40, 50, generator=seeded())
    drawn = [
        MultiCropTransform((CropGroup(size, 6, (0.1, 1.0), interpolation=interpolation),))(
            image, seed=5, return_boxes=True
        )[1:]
        for size, interpolation in (
            (8, "bilinear"),
            ((8, 8), "bicubic"),
            ((4, 16), "bilinear"),
            ((16, 4), "bicubic"),
        )
    ]
    for one, other in itertools.pairwise(drawn):
        assert all(map(torch.equal, one[0], other[0]))
        assert all(map(torch.equal, one[1], other[1]))


def test_two_equal_lengths_are_a_square():
    image = torch.rand(3, 40, 50, generator=seeded())
    one, other = (
        MultiCropTransform((CropGroup(size, 3, (0.1, 1.0)),))(image, seed=5) for size in (8, (8, 8))
    )
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_both_paths_give_the_same_distorted_rectangles(interpolation):
    groups = tuple(
        CropGroup(size, 2, (0.3, 1.0), interpolation=interpolation) for size in ((9, 20), (15, 3))
    )
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    batch = torch.rand(3, 3, 40, 30, generator=seeded())
    for seed in range(3):
        expected = transform(batch, seed=seed)
        shapes = [tuple(crop.shape) for crop in expected]
        assert shapes == [(3, 3, 9, 20)] * 2 + [(3, 3, 15, 3)] * 2
        for one, other in zip(
            transform(batch.clone().requires_grad_(), seed=seed), expected, strict=True
        ):
            torch.testing.assert_close(one.detach(), other, atol=1e-4, rtol=0)


def test_a_callable_gets_rectangles():
    seen = []

    def step(crops: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(crops.shape), bool(crops.min() >= 0), bool(crops.max() <= 1)))
        return crops

    group = CropGroup((9, 20), 1, (0.3, 1.0), photometric=step, interpolation="bicubic")
    for images in (black_and_white()[0], black_and_white()):
        MultiCropTransform((group,))(images)
    assert seen == [((3, 9, 20), True, True), ((2, 3, 9, 20), True, True)]


def test_an_image_of_the_size_of_a_bicubic_crop_is_not_written():
    group = CropGroup((9, 20), 4, (1.0, 1.0), (20 / 9, 20 / 9), interpolation="bicubic")
    for shape in ((3, 9, 20), (2, 3, 9, 20)):
        image = torch.rand(shape, generator=seeded(), dtype=torch.float64)
        before = image.clone()
        crops = MultiCropTransform((group,), mean=0.0, std=1.0)(image)
        assert crops[0].shape == shape
        assert torch.equal(image, before)


def test_bicubic_crops_are_differentiable_with_respect_to_the_pixels():
    batch = 0.4 + 0.2 * torch.rand(2, 1, 7, 6, dtype=torch.float64, generator=seeded())
    group = CropGroup((3, 8), 2, (0.3, 1.0), photometric=None, interpolation="bicubic")
    transform = MultiCropTransform((group,), mean=0.0, std=1.0)
    torch.autograd.gradcheck(
        lambda pixels: tuple(transform(pixels, seed=1)), batch.requires_grad_()
    )


def test_nothing_waits_for_an_accelerator_with_rectangular_bicubic_crops():
    batch = torch.empty(4, 3, 40, 30, device="meta", dtype=torch.uint8)
    with RefuseSynchronisation():
        crops = MultiCropTransform(EACH_GROUP)(batch)
    assert [tuple(crop.shape[2:]) for crop in crops] == [
        box_ops.height_and_width(group.size) for group in in_order(EACH_GROUP)
    ]


def test_the_settings_are_kept_compared_and_shown():
    group = CropGroup([9, 20], 1, (0.3, 1.0), interpolation="bicubic")
    assert group.size == (9, 20)
    assert CropGroup(9, 1, (0.3, 1.0)).size == 9
    assert CropGroup(9, 1, (0.3, 1.0)).interpolation == "bilinear"
    assert "size=(9, 20)" in repr(group)
    assert "interpolation='bicubic'" in repr(MultiCropTransform((group,)))
    for twin in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        assert twin == group
        assert hash(twin) == hash(group)


@pytest.mark.parametrize("sizes", [(8, (4, 16)), ((4, 16), 8), ((8, 16), (11, 11)), ((8, 8), 8)])
def test_the_first_group_may_be_any_shape_with_the_most_pixels(sizes):
    groups = tuple(CropGroup(size, 1, (0.3, 1.0)) for size in sizes)
    crops = MultiCropTransform(groups)(torch.rand(3, 20, 20))
    assert [tuple(crop.shape[1:]) for crop in crops] == [
        box_ops.height_and_width(size) for size in sizes
    ]


def test_fewer_pixels_may_come_first_if_it_is_named():
    groups = tuple(CropGroup(size, 1, (0.3, 1.0)) for size in ((3, 15), 7))
    assert MultiCropTransform(groups, smaller_first=True)(torch.rand(3, 20, 20))[1].shape[1] == 7
