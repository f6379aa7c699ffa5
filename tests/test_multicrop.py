"""The transform: images of every kind, batches and lists, boxes, replay, and what is refused."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from swavkit import CropGroup, MultiCropTransform, PhotometricDistortion
from tests.image_oracles import DISTORTED, PLAIN, resized_box, seeded
from tests.modes import CountingBackend, RefuseSynchronisation

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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@each_kind_of_draw
def test_an_accelerator_gives_the_pixels_of_a_cpu(groups):
    pixels = torch.stack([uint8_image(60, 45, seed=seed) for seed in range(4)])
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    for images in (pixels, pixels / 255, list(pixels)):
        on_device = [i.cuda() for i in images] if isinstance(images, list) else images.cuda()
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


def test_it_compiles_into_one_graph():
    groups = (CropGroup(12, 1, (0.3, 1.0)), CropGroup(6, 1, (0.05, 0.3), photometric=None))
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
            r"image must be uint8 or lie in \[0, 1\] .* 255",
        ),
        (torch.full((3, 8, 8), math.nan), ValueError, r"got values from nan to nan"),
        (
            torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), -1.0)]),
            ValueError,
            r"image\[1\] must be uint8 or lie in \[0, 1\] for PhotometricDistortion, got .* -1 to",
        ),
        (torch.zeros(2, 1, 8, 8), ValueError, r"got 3 numbers and an image of 1 channels"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        MultiCropTransform(DISTORTED)(image)


def test_a_generator_must_be_one():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
        MultiCropTransform(PLAIN)(torch.rand(3, 8, 8), generator=3)


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


def test_values_outside_0_1_are_no_error_where_no_colours_are_changed():
    for crop in MultiCropTransform(PLAIN, mean=0.0, std=1.0)(torch.full((3, 8, 8), 255.0)):
        torch.testing.assert_close(crop, torch.full_like(crop, 255.0))


@pytest.mark.parametrize("seed", [-1, 1.0, True])
def test_a_seed_must_be_a_non_negative_int(seed):
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
