"""The transform: images of every kind, batches and lists, boxes, replay, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

from swavkit import CropGroup, MultiCropTransform, PhotometricDistortion
from swavkit.multicrop import image_input, separable
from swavkit.multicrop import transform as transform_module
from tests.image_oracles import DISTORTED, PLAIN, other_defaults, resized_box, seeded
from tests.modes import CountingBackend, RefuseSynchronisation, RoundedProducts

PIXEL = 2e-6  # float32 arithmetic on pixels in [0, 1]
# Boxes that leave nothing to chance, so that only the photometric step is drawn.
COLOURED = tuple(
    CropGroup(size, 3, (1.0, 1.0), (1.0, 1.0), 0.0, PhotometricDistortion(jitter_probability=1))
    for size in (12, 6)
)
each_kind_of_draw = pytest.mark.parametrize(
    "groups", [PLAIN, DISTORTED, COLOURED], ids=["boxes", "both", "colours"]
)


def uint8_image(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (channels, height, width), generator=seeded(seed), dtype=torch.uint8
    )


# Images


def test_the_published_crops_are_the_default():
    groups = MultiCropTransform().crops
    assert [(g.size, g.count, g.scale, g.ratio, g.flip, g.photometric) for g in groups] == [
        (224, 2, (0.14, 1.0), (3 / 4, 4 / 3), 0.5, PhotometricDistortion()),
        (96, 6, (0.05, 0.14), (3 / 4, 4 / 3), 0.5, PhotometricDistortion()),
    ]
    crops = MultiCropTransform()(torch.rand(3, 40, 60))
    assert [tuple(crop.shape) for crop in crops] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 6


def test_an_image_gives_its_boxes_resized_and_normalised():
    image = torch.rand(3, 20, 30, generator=seeded(), dtype=torch.float64)
    crops, boxes, flips = MultiCropTransform(PLAIN)(image, seed=8, return_boxes=True)
    mean = np.array([0.485, 0.456, 0.406])[:, None, None]
    std = np.array([0.229, 0.224, 0.225])[:, None, None]
    sizes = [12, 12, 6, 6, 6]
    for crop, box, flip, size in zip(crops, boxes, flips, sizes, strict=True):
        left, top, right, bottom = box.tolist()
        row = top, left, bottom - top, right - left, flip
        expected = (resized_box(image.numpy(), row, size) - mean) / std
        np.testing.assert_allclose(crop, expected, atol=10 * PIXEL)


@pytest.mark.parametrize("groups", [PLAIN, DISTORTED], ids=["plain", "distorted"])
def test_kinds_of_images_agree(groups, device):
    pixels = uint8_image(33, 21)
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


ANY_KIND_OF_IMAGES = {
    "image": lambda pixels: pixels[0],
    "batch": lambda pixels: pixels,
    "list": list,
    "channels last": lambda pixels: pixels.contiguous(memory_format=torch.channels_last),
    "many": lambda pixels: pixels.repeat(8, 1, 1, 1),
    "floating": lambda pixels: pixels / 255,
    "float16": lambda pixels: (pixels / 255).half(),
    "gradient": lambda pixels: (pixels / 255).requires_grad_(),
    "floating and channels last": lambda pixels: (pixels / 255).contiguous(
        memory_format=torch.channels_last
    ),
    "float16 list with a gradient": lambda pixels: [
        image.half().div(255).requires_grad_() for image in pixels
    ],
    "PIL": lambda pixels: Image.fromarray(pixels[0].permute(1, 2, 0).numpy()),
    "16-bit PIL": lambda pixels: Image.fromarray(pixels[0, 0].numpy().astype(np.uint16)),
}
any_kind_of_images = pytest.mark.parametrize("kind", ANY_KIND_OF_IMAGES)


@any_kind_of_images
@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_default_device_and_dtype_of_the_session_do_not_matter(kind, eight_bit):
    images = ANY_KIND_OF_IMAGES[kind](torch.stack([uint8_image(20, 20, seed=s) for s in range(2)]))
    expected = MultiCropTransform(DISTORTED, eight_bit=eight_bit)(images, seed=1, return_boxes=True)
    with other_defaults():
        transform = MultiCropTransform(DISTORTED, eight_bit=eight_bit)
        results = transform(images, seed=1, return_boxes=True)
        transform(images)
    for some, same in zip(results, expected, strict=True):
        assert all(map(torch.equal, some, same))


@any_kind_of_images
def test_nothing_returned_is_a_view_of_more(kind):
    images = ANY_KIND_OF_IMAGES[kind](torch.stack([uint8_image(20, 20, seed=s) for s in range(2)]))
    groups = (*DISTORTED, CropGroup(4, 1, (0.1, 1.0), photometric=torch.clone))
    for results in MultiCropTransform(groups)(images, return_boxes=True):
        for result in results:
            assert result.untyped_storage().nbytes() == result.numel() * result.element_size()


@any_kind_of_images
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(kind, dtype):
    images = ANY_KIND_OF_IMAGES[kind](torch.stack([uint8_image(20, 20, seed=s) for s in range(2)]))
    expected = MultiCropTransform(DISTORTED)(images, seed=1)
    with torch.autocast("cpu", dtype=dtype):
        crops = MultiCropTransform(DISTORTED)(images, seed=1)
        if crops[0].requires_grad:
            sum(crop.float().sum() for crop in crops).backward()
    for one, other in zip(crops, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [kind for kind in ANY_KIND_OF_IMAGES if "PIL" not in kind])
@pytest.mark.parametrize("groups", [PLAIN, DISTORTED], ids=["plain", "distorted"])
def test_a_nan_pixel_makes_the_crops_nan_that_show_it_and_no_other_image(groups, kind):
    pixels = torch.stack([uint8_image(20, 20, seed=s) for s in range(2)]).float()
    pixels[0, 1, 10, 10] = math.nan
    given_as_they_are = kind in ("image", "batch", "list", "channels last", "many")
    images = ANY_KIND_OF_IMAGES[kind](pixels / 255 if given_as_they_are else pixels)
    for seed in range(3):
        crops, boxes, _ = MultiCropTransform(groups)(images, seed=seed, return_boxes=True)
        if kind == "image":
            crops, boxes = [crop[None] for crop in crops], [box[None] for box in boxes]
        for crop, box in zip(crops, boxes, strict=True):
            assert crop[1::2].isfinite().all()
            left, top, right, bottom = box[0].tolist()
            if left <= 10 < right and top <= 10 < bottom:
                row = int((10.5 - top) / (bottom - top) * crop.shape[-1])
                assert crop[0, 1, row].isnan().any()


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


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "HSV"])
def test_other_pil_modes_become_rgb(mode):
    colours = np.random.default_rng(0).integers(0, 256, (14, 11, 3), dtype=np.uint8)
    picture = Image.fromarray(colours).convert(mode)
    transform = MultiCropTransform(PLAIN)
    rgb = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    expected = transform(rgb, generator=seeded())
    for one, other in zip(transform(picture, generator=seeded()), expected, strict=True):
        torch.testing.assert_close(one, other)


WHOLE = (CropGroup(9, 1, (1.0, 1.0), (1.0, 1.0), flip=0.0, photometric=None),)


def whole(image: object, **settings: object) -> torch.Tensor:
    """Return all pixels of an image of 9 by 9, as they are."""
    return MultiCropTransform(WHOLE, **{"mean": 0.0, "std": 1.0, **settings})(image)[0]


def saved_and_opened(image: Image.Image, kind: str, **settings: object) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return Image.open(io.BytesIO(file.getvalue()))


def transparent_pictures() -> dict[str, Image.Image]:
    """Pictures of 9 by 9 pixels in every mode that knows transparency, as files hold them."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (9, 9, 4), dtype=np.uint8))
    palette = Image.fromarray(rng.integers(0, 8, (9, 9), dtype=np.uint8), "P")
    palette.putpalette(rng.integers(0, 256, 24, dtype=np.uint8).tobytes())
    with_alpha = palette.convert("PA")
    with_alpha.putalpha(rgba.getchannel("A"))
    grey = Image.fromarray(rng.integers(0, 4, (9, 9), dtype=np.uint8))
    return {
        "RGBA": saved_and_opened(rgba, "png"),
        "RGBA in WebP": saved_and_opened(rgba, "webp", lossless=True, exact=True),
        "LA": saved_and_opened(rgba.convert("LA"), "png"),
        "RGBa": rgba.convert("RGBa"),
        "PA": with_alpha,
        "P with one": saved_and_opened(palette, "png", transparency=3),
        "P with many": saved_and_opened(palette, "png", transparency=bytes(range(0, 256, 32))),
        "P in GIF": saved_and_opened(palette, "gif", transparency=2),
        "RGB": saved_and_opened(grey.convert("RGB"), "png", transparency=(2, 2, 2)),
        "L": saved_and_opened(grey, "png", transparency=1),
    }


@pytest.mark.parametrize("kind", transparent_pictures())
def test_what_is_transparent_lies_on_white(kind):
    picture = transparent_pictures()[kind]
    assert picture.mode == kind.split()[0]
    rgba = np.array(picture.convert("RGBA"), dtype=float) / 255
    colours, alpha = rgba[..., :3], rgba[..., 3:]
    assert (alpha < 1).any()
    expected = np.moveaxis(colours * alpha + (1 - alpha), -1, 0)
    np.testing.assert_allclose(whole(picture, mean=[0.0] * 3), expected, atol=0.51 / 255)
    if kind in ("L", "LA"):
        np.testing.assert_allclose(whole(picture), expected[:1], atol=0.51 / 255)


def wide_pictures() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Pictures of more than 8 bits, and their pixels in [0, 1]."""
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 9))
    pixels[0, :2] = 0, 65535
    narrow = Image.fromarray(pixels.astype(np.uint16))
    values = (pixels / 65535).astype(np.float32)
    return {
        "PNG": (saved_and_opened(narrow, "png"), values),
        "TIFF": (saved_and_opened(narrow, "tiff"), values),
        "I;16": (narrow, values),
        "I;16B": (Image.frombytes("I;16B", (9, 9), pixels.astype(">u2").tobytes()), values),
        "I": (Image.fromarray(pixels.astype(np.int32)), values),
        "F": (saved_and_opened(Image.fromarray(values), "tiff"), values),
    }


@pytest.mark.parametrize("kind", wide_pictures())
def test_pictures_of_more_than_8_bits_are_scaled_by_their_range(kind):
    picture, values = wide_pictures()[kind]
    assert picture.mode[0] in "IF"
    crop = whole(picture)
    assert crop.dtype == torch.float32
    np.testing.assert_allclose(crop, values[None], atol=PIXEL)
    assert torch.equal(whole(picture, mean=[0.0] * 3), crop.expand(3, 9, 9))
    floating = torch.from_numpy(values).expand(3, 9, 9)
    for one, other in zip(
        MultiCropTransform(DISTORTED)(picture, seed=1),
        MultiCropTransform(DISTORTED)(floating, seed=1),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_transparent_grey_of_a_16_bit_png_is_white():
    pixels = np.full((9, 9), 1000, np.uint16)
    pixels[4, 4] = 300
    picture = saved_and_opened(Image.fromarray(pixels), "png", transparency=300)
    pixels[4, 4] = 65535
    np.testing.assert_allclose(whole(picture)[0], pixels / 65535, atol=PIXEL)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((9, 9), 65536, np.int32), r"\[0, 65535\] .* mode 'I', got .* 65536 to 65536"),
        (np.full((9, 9), -1, np.int32), r"\[0, 65535\] .* mode 'I', got values from -1 to -1"),
        (np.full((9, 9), 727.0, np.float32), r"\[0, 1\] .* mode 'F', got values from 727 to 727"),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_pictures_beyond_their_range_are_refused(values, message, listed):
    picture = Image.fromarray(values)
    name = r"image\[0\]" if listed else "image"
    with pytest.raises(ValueError, match=f"^{name} must have values in {message}"):
        MultiCropTransform(PLAIN)([picture] if listed else picture)


@pytest.mark.parametrize("orientation", [*range(10), "garbage", None])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
def test_pictures_are_turned_as_exif_says(orientation, mode):
    rng = np.random.default_rng(0)
    shape, dtype = ((9, 5, 3) if mode == "RGB" else (9, 5)), "uint16" if ";" in mode else "uint8"
    picture = Image.fromarray(rng.integers(0, 256, shape, dtype=dtype))
    assert picture.mode == mode
    if orientation is not None:
        picture.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(picture)
    assert 0x0112 not in upright.getexif() or orientation not in range(2, 9)
    transform = MultiCropTransform(PLAIN)
    crops, boxes, _ = transform(picture, seed=2, return_boxes=True)
    expected, same_boxes, _ = transform(upright, seed=2, return_boxes=True)
    assert all(map(torch.equal, crops, expected))
    assert all(map(torch.equal, boxes, same_boxes))


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
def test_files_are_turned_once(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255  # the right half is white, which lies below once it is turned
    crop = whole(saved_and_opened(Image.fromarray(pixels), kind, exif=exif))
    assert crop[:, 8].min() > 0.9
    assert crop[:, 0].max() < 0.1


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


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_different_crops_and_different_ones_each_epoch(persistent):
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(
        OneImage(DISTORTED), batch_size=2, num_workers=2, persistent_workers=persistent
    )
    crops = [crop for _ in range(2) for batch in loader for crop in batch]
    assert len(crops) == 16
    for one, other in itertools.combinations(crops, 2):
        assert not torch.equal(one, other)


class Seeded(OneImage):
    """Each index has a seed; with boxes, as a loader collates them."""

    def __getitem__(self, index: int):
        return self.transform(self.image, seed=index, return_boxes=True)


def test_a_seed_gives_the_same_crops_in_any_worker_and_boxes_are_collated():
    dataset = Seeded(DISTORTED)
    here, there = (
        next(iter(torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=workers)))
        for workers in (0, 2)
    )
    for one, other in zip(here, there, strict=True):
        assert all(map(torch.equal, one, other))
    crops, boxes, flips = here
    assert [tuple(crop.shape) for crop in crops] == [(8, 3, 12, 12)] * 2 + [(8, 3, 6, 6)] * 3
    assert [tuple(box.shape) for box in boxes] == [(8, 4)] * 5
    assert [tuple(flip.shape) for flip in flips] == [(8,)] * 5
    assert flips[0].dtype == torch.bool


def test_a_seed_is_a_generator_with_that_seed():
    transform = MultiCropTransform(DISTORTED)
    image = uint8_image(30, 40)
    state = torch.get_rng_state()
    crops = transform(image, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, crops, transform(image, generator=seeded(3))))
    assert not any(map(torch.equal, crops, transform(image, seed=4)))


def test_boxes_do_not_depend_on_the_photometric_step():
    image = uint8_image(30, 40)
    plain, distorted = (
        MultiCropTransform(groups)(image, seed=3, return_boxes=True)
        for groups in (PLAIN, DISTORTED)
    )
    for one, other in zip(plain[1], distorted[1], strict=True):
        assert torch.equal(one, other)
    assert not any(map(torch.equal, plain[0], distorted[0]))


def test_boxes_of_a_batch_lie_in_the_image_and_on_its_device(device):
    batch = torch.rand(50, 3, 30, 17, device=device)
    crops, boxes, flips = MultiCropTransform(PLAIN)(batch, seed=0, return_boxes=True)
    assert len(crops) == len(boxes) == len(flips) == 5
    for box, flip in zip(boxes, flips, strict=True):
        assert box.dtype == torch.int64
        assert box.device == flip.device == batch.device
        left, top, right, bottom = box.unbind(1)
        assert ((left >= 0) & (left < right) & (right <= 17)).all()
        assert ((top >= 0) & (top < bottom) & (bottom <= 30)).all()
        assert 0 < flip.sum() < 50


# Batches


@each_kind_of_draw
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_a_batch_is_drawn_as_its_images_would_be_one_after_the_other(groups, dtype):
    pixels = torch.stack([uint8_image(40, 30, seed=seed) for seed in range(4)])
    batch = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)
    transform = MultiCropTransform(groups)
    generator = seeded(3)
    images = [transform(image, generator=generator) for image in batch]
    crops = transform(batch, generator=seeded(3))
    listed = transform(list(batch), generator=seeded(3))
    for crop, same, parts in zip(crops, listed, zip(*images, strict=True), strict=True):
        assert torch.equal(crop, torch.stack(parts))
        assert torch.equal(crop, same)


@each_kind_of_draw
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_many_small_images_on_a_cpu_get_the_crops_of_a_few(groups, dtype):
    pixels = torch.stack([uint8_image(28, 28, seed=seed) for seed in range(16)])
    batch = pixels if dtype == torch.uint8 else (pixels / 255).to(dtype)
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    with Operations() as together:
        crops = transform(batch, seed=3)
    generator = seeded(3)
    with Operations() as one_by_one:
        images = [transform(image, generator=generator) for image in batch]
    assert together.count < one_by_one.count / 3
    for crop, parts in zip(crops, zip(*images, strict=True), strict=True):
        assert crop.dtype == parts[0].dtype
        torch.testing.assert_close(crop, torch.stack(parts), atol=1e-5, rtol=0)


def test_many_small_images_are_rounded_to_8_bits_where_that_is_asked_for():
    batch = torch.stack([uint8_image(28, 28, seed=seed) for seed in range(16)])
    transform = MultiCropTransform(PLAIN, mean=0.0, std=1.0, eight_bit=True)
    for crop in transform(batch):
        torch.testing.assert_close(crop * 255, (crop * 255).round(), atol=1e-3, rtol=0)


def test_a_list_holds_images_of_any_sizes_and_kinds():
    sizes = [(40, 30), (1, 1), (200, 3), (35, 60)]
    images = [uint8_image(*size, seed=seed) for seed, size in enumerate(sizes)]
    transform = MultiCropTransform(DISTORTED)
    generator = seeded(3)
    expected = [transform(image, generator=generator) for image in images]
    images[0] = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    crops, boxes, _ = transform(images, generator=seeded(3), return_boxes=True)
    for crop, parts in zip(crops, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(crop, torch.stack(parts), atol=1e-5, rtol=0)
    for box in boxes:
        for (left, top, right, bottom), (height, width) in zip(box.tolist(), sizes, strict=True):
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def together(transform: MultiCropTransform, images: object, seed: int) -> list[torch.Tensor]:
    """Take the path of an accelerator, which a gradient takes on a CPU too."""
    images = [image.requires_grad_() for image in images]
    one_size = len({image.shape for image in images}) == 1
    return transform(torch.stack(images) if one_size else images, seed=seed)


@each_kind_of_draw
@pytest.mark.parametrize("sizes", [[(40, 30)] * 5, [(40, 30), (1, 1), (200, 3), (35, 60)]])
def test_both_paths_give_the_same_pixels(groups, sizes):
    images = [torch.rand(3, *size, generator=seeded(seed)) for seed, size in enumerate(sizes)]
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    for seed in range(4):
        expected = transform([image.detach() for image in images], seed=seed)
        crops = together(transform, images, seed)
        for one, other in zip(crops, expected, strict=True):
            assert one.requires_grad
            torch.testing.assert_close(one.detach(), other, atol=1e-4, rtol=0)


@each_kind_of_draw
@pytest.mark.parametrize("tf32", [False, True])
def test_the_path_of_an_accelerator_gives_the_pixels_of_a_cpu(groups, tf32, monkeypatch):
    pixels = torch.stack([uint8_image(60, 45, seed=seed) for seed in range(4)])
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    for images in (pixels, pixels / 255, [*pixels, uint8_image(20, 90)]):
        expected = transform(images, seed=1)
        with monkeypatch.context() as patched:
            patched.setattr(image_input, "one_by_one", lambda tensor: False)
            patched.setattr(transform_module, "on_cpu", lambda tensor: False)
            patched.setattr(separable, "_may_be_rounded", lambda factor: tf32)
            with RoundedProducts() if tf32 else contextlib.nullcontext():
                crops = transform(images, seed=1)
        for one, other in zip(crops, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@each_kind_of_draw
def test_an_accelerator_gives_the_pixels_of_a_cpu(groups):
    pixels = torch.stack([uint8_image(60, 45, seed=seed) for seed in range(4)])
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    for images in (pixels, pixels / 255, list(pixels)):
        on_device = [i.cuda() for i in images] if isinstance(images, list) else images.cuda()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says of itself that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            crops = transform(on_device, seed=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for one, other in zip(crops, transform(images, seed=1), strict=True):
            torch.testing.assert_close(one.cpu(), other, atol=1e-4, rtol=0)


class Waits(TorchDispatchMode):
    """Raises an error where the host waits for a device: reading a value, or a blocking copy."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            crosses = torch.device(kwargs["device"]) != args[0].device
            assert kwargs.get("non_blocking") or not crosses, f"{func} waits for the device"
        return func(*args, **kwargs)


@pytest.mark.parametrize("listed", [False, True])
def test_nothing_waits_for_an_accelerator(listed):
    images = torch.empty(4, 3, 40, 30, device="meta", dtype=torch.uint8)
    with RefuseSynchronisation(), Waits():
        crops, boxes, flips = MultiCropTransform(DISTORTED)(
            list(images) if listed else images, return_boxes=True
        )
    assert [tuple(crop.shape) for crop in crops] == [(4, 3, 12, 12)] * 2 + [(4, 3, 6, 6)] * 3
    assert {t.device.type for t in (*crops, *boxes, *flips)} == {"meta"}


class Operations(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_grow_with_the_batch():
    counts = []
    for samples in (2, 50):
        with Operations() as operations:
            MultiCropTransform(DISTORTED)(torch.empty(samples, 3, 40, 30, device="meta"))
        counts.append(operations.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "groups",
    [
        (CropGroup(12, 1, (0.3, 1.0)), CropGroup(6, 1, (0.05, 0.3), photometric=None)),
        tuple(
            CropGroup((12, 18), 2, (0.3, 1.0), photometric=None, interpolation=interpolation)
            for interpolation in ("bicubic", "bilinear")
        ),
    ],
    ids=["squares", "rectangles"],
)
def test_it_compiles_into_one_graph(groups):
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    backend = CountingBackend()
    compiled = torch.compile(transform.__call__, backend=backend, fullgraph=True)
    for seed in range(2):
        batch = torch.rand(3, 3, 40, 30, generator=seeded(seed))
        torch.manual_seed(seed)
        crops = compiled(batch)
        torch.manual_seed(seed)
        for one, other in zip(crops, transform(batch), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert backend.graphs == 1


def test_it_compiles_for_any_batch_size():
    # Without a photometric step, which is compiled in tests of its own.
    groups = (CropGroup(12, 1, (0.3, 1.0), photometric=None),)
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    backend = CountingBackend()
    compiled = torch.compile(transform.__call__, backend=backend, fullgraph=True)
    for samples in (3, 5, 7):
        batch = torch.rand(samples, 3, 40, 30, generator=seeded(samples))
        torch.manual_seed(samples)
        crops = compiled(batch)
        torch.manual_seed(samples)
        for one, other in zip(crops, transform(batch), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert backend.graphs == 2  # one for the first size, one for any


def test_it_is_differentiable_with_respect_to_the_pixels():
    batch = 0.1 + 0.8 * torch.rand(2, 3, 7, 6, dtype=torch.float64, generator=seeded())
    groups = (CropGroup(5, 1, (0.3, 1.0)), CropGroup(3, 1, (0.2, 0.4)))
    transform = MultiCropTransform(groups)
    for seed in range(5):
        torch.autograd.gradcheck(
            lambda pixels, seed=seed: tuple(transform(pixels, seed=seed)),
            batch.requires_grad_(),
            fast_mode=True,
        )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_channels_last_batches_give_channels_last_crops(requires_grad):
    batch = torch.rand(2, 3, 40, 30, generator=seeded())
    transform = MultiCropTransform(DISTORTED)
    expected = transform(batch, seed=1)
    last = batch.contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)
    for crop, same in zip(transform(last, seed=1), expected, strict=True):
        assert same.is_contiguous()
        assert crop.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(crop.detach(), same, atol=1e-4, rtol=1e-4)


# Bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": 0}, ValueError, r"size must be at least 1, got 0"),
        ({"size": 2.0}, TypeError, r"size must be an int, got float"),
        (
            {"size": (8, 8, 3)},
            ValueError,
            r"CropGroup\(\(8, 8, 3\), 1\): size must be an int or \(height, width\), got \(8,",
        ),
        ({"size": ()}, ValueError, r"size must be an int or \(height, width\), got \(\)"),
        ({"size": (8, 0)}, ValueError, r"size\[1\] must be at least 1, got 0"),
        ({"size": [8.0, 8]}, TypeError, r"size\[0\] must be an int, got float"),
        ({"size": None}, TypeError, r"size must be an int, got NoneType"),
        (
            {"interpolation": "nearest"},
            ValueError,
            r"\): interpolation must be 'bilinear' or 'bicubic', got 'nearest'",
        ),
        ({"interpolation": 3}, ValueError, r"interpolation must be 'bilinear' or .*, got 3"),
        ({"count": -1}, ValueError, r"CropGroup\(8, -1\): count must be at least 0, got -1"),
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
            r"crops\[0\] .* largest .* 6 there and 12 in crops\[1\]; smaller_first=True",
        ),
        (
            {"crops": (CropGroup((3, 15), 1, (0.1, 1.0)), CropGroup(7, 1, (0.1, 1.0)))},
            ValueError,
            r"crops\[0\] .* largest .* \(3, 15\) there and 7 in crops\[1\]; smaller_first=True",
        ),
        (
            {"crops": [CropGroup(8, 0, (0.1, 1.0)), CropGroup(6, 0, (0.1, 1.0))]},
            ValueError,
            r"crops must hold a group with a count of 1 or more, got \[CropGroup\(size=8, count=0",
        ),
        ({"smaller_first": None}, ValueError, r"smaller_first must be False or True, got None"),
        ({"eight_bit": 1}, ValueError, r"eight_bit must be False or True, got 1"),
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


@pytest.mark.parametrize("groups", [PLAIN, DISTORTED], ids=["plain", "distorted"])
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
        ([], ValueError, r"image must hold at least one image, got an empty list"),
        ([torch.zeros(3, 8, 8), None], TypeError, r"image\[1\] must be a PIL image or a torch.T"),
        ([torch.zeros(2, 3, 8, 8)], ValueError, r"image\[0\] must have shape \(C, H, W\), got \("),
        (
            [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8).half()],
            TypeError,
            r"image\[1\] must have the dtype and device of image\[0\], torch.float32 on cpu, got t",
        ),
        (
            [torch.zeros(3, 8, 8), torch.zeros(3, 8, 0)],
            ValueError,
            r"image\[1\] must have channels",
        ),
        ([torch.zeros(1, 8, 8)], ValueError, r"channel of image\[0\], got 3 numbers and an image"),
        (
            torch.full((3, 8, 8), 255.0),
            ValueError,
            r"image must be uint8 or lie in \[0, 1\], got values from 255 to 255",
        ),
        (
            torch.tensor([math.nan, 0, 300.0] * 64).view(3, 8, 8),
            ValueError,
            r"image must be uint8 or lie in \[0, 1\], got values from 0 to 300",
        ),
        (torch.full((3, 8, 8), math.inf), ValueError, r"got values from inf to inf"),
        (
            torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), -1.0)]),
            ValueError,
            r"image\[1\] must be uint8 or lie in \[0, 1\], got values from -1 to -1",
        ),
        (torch.zeros(2, 1, 8, 8), ValueError, r"got 3 numbers and an image of 1 channels"),
        (
            torch.zeros(3, 8, 8).to(torch.float8_e4m3fn),
            TypeError,
            r"image must be uint8 or floating-point of 16 to 64 bits, got torch\.float8_e4m3fn",
        ),
        (
            torch.eye(8).expand(3, 8, 8).to_sparse(),
            TypeError,
            r"image must be a dense tensor, got torch\.sparse_coo",
        ),
    ],
)
def test_bad_images(groups, image, error, message):
    with pytest.raises(error, match=message):
        MultiCropTransform(groups)(image)


def test_a_generator_must_be_one():
    for transform in (MultiCropTransform(PLAIN), PhotometricDistortion()):
        message = r"generator must be a torch.Generator or None, got int"
        with pytest.raises(TypeError, match=message):
            transform(torch.rand(3, 8, 8), generator=3)


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


def test_the_channels_of_a_list_must_agree():
    with pytest.raises(ValueError, match=r"image\[1\] must have the channels of image\[0\], 1"):
        MultiCropTransform(PLAIN, mean=0.5, std=0.5)([torch.zeros(1, 8, 8), torch.zeros(2, 8, 8)])


@pytest.mark.parametrize("listed", [False, True])
def test_a_corrupt_picture_is_an_error_that_says_which(listed):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(
        whole, "png"
    )
    corrupt = Image.open(io.BytesIO(whole.getvalue()[:2000]))
    name = r"image\[1\]" if listed else "image"
    with pytest.raises(ValueError, match=f"^{name} must be a readable PIL image, got one where"):
        MultiCropTransform(PLAIN)([uint8_image(8, 8), corrupt] if listed else corrupt)


@pytest.mark.parametrize("seed", [-1, 1.0, True, 2**64])
def test_a_seed_must_be_an_int_of_64_bits(seed):
    with pytest.raises((TypeError, ValueError), match=r"seed must be"):
        MultiCropTransform(PLAIN)(torch.rand(3, 8, 8), seed=seed)


def test_a_generator_and_a_seed_are_one_too_many():
    with pytest.raises(ValueError, match=r"generator and seed must not both be given"):
        MultiCropTransform(PLAIN)(torch.rand(3, 8, 8), seed=1, generator=seeded())


# Groups


def test_a_count_of_0_leaves_a_group_out():
    groups = (CropGroup(4, 0, (0.1, 1.0)), *PLAIN, CropGroup(20, 0, (0.1, 1.0)))
    crops = MultiCropTransform(groups)(torch.rand(3, 30, 30))
    assert [crop.shape[-1] for crop in crops] == [12, 12, 6, 6, 6]


def test_a_smaller_group_may_come_first_if_it_is_named():
    transform = MultiCropTransform(PLAIN[::-1], smaller_first=True)
    assert [crop.shape[-1] for crop in transform(torch.rand(3, 30, 30))] == [6, 6, 6, 12, 12]
