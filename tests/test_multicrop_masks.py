"""Masks and label maps cut like the crops, against a definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swavkit import CropGroup, MultiCropTransform, crop_masks
from tests.image_oracles import nearest_box, other_defaults, seeded
from tests.modes import CountingBackend

ROWS = [  # top, left, height, width, mirrored
    [0, 0, 23, 31, 0],
    [3, 4, 17, 9, 1],
    [22, 30, 1, 1, 0],
    [5, 0, 2, 31, 1],
    [1, 1, 8, 8, 0],
]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.float64,
]


def as_given(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes and flips in the form of the transform."""
    top, left, height, width, mirrored = torch.tensor(rows).unbind(1)
    return torch.stack([left, top, left + width, top + height], 1), mirrored > 0


def label_maps(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    labels = torch.randint(0, 200, shape, generator=seeded())
    return labels > 99 if dtype == torch.bool else labels.to(dtype)


@pytest.mark.parametrize("size", [1, 8, 40, (5, 12), (23, 31), (40, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(), (1,), (3,), (0,)], ids=str)
def test_masks_are_the_nearest_pixels_of_their_own_boxes(size, dtype, channels, device):
    masks = label_maps(5, *channels, 23, 31, dtype=dtype)
    pair = size if isinstance(size, tuple) else (size, size)
    boxes, flips = as_given(ROWS)
    cut = crop_masks(masks.to(device), boxes.to(device), flips.to(device), size).cpu()
    assert cut.dtype == dtype
    assert cut.shape == (5, *channels, *pair)
    for index, row in enumerate(ROWS):
        expected = nearest_box(masks[index].numpy(), row, pair)
        np.testing.assert_array_equal(cut[index].numpy(), expected)
        if not channels:
            alone = crop_masks(masks[index], boxes[index], flips[index], size)
            np.testing.assert_array_equal(alone.numpy(), expected)


@st.composite
def cuts(draw: st.DrawFn):
    """A mask, a box in it and the size of the result."""
    height, width, *size = (draw(st.integers(1, 40)) for _ in range(4))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    box = [top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left))]
    return label_maps(height, width), [*box, draw(st.integers(0, 1))], tuple(size)


@given(cuts())
def test_any_mask_is_cut_by_any_box_to_any_size(cut):
    mask, row, size = cut
    boxes, flips = as_given([row])
    result = crop_masks(mask, boxes[0], flips[0], size).numpy()
    np.testing.assert_array_equal(result, nearest_box(mask.numpy(), row, size))


@pytest.mark.parametrize("across", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize("single", [True, False], ids=["image", "batch"])
def test_labels_lie_where_the_pixels_of_the_crops_lie(across, single):
    """Of stripes that are enlarged: along one axis the nearest pixel has the largest weight."""
    stripes = torch.randint(0, 2, (3, 1, 24), generator=seeded())
    masks = (stripes if across else stripes.mT).expand(3, 24, 24)
    images = masks[:, None].expand(3, 3, 24, 24).double()
    if single:
        masks, images = masks[0], images[0]
    groups = (
        CropGroup((41, 53), 6, (0.1, 1.0), photometric=None),
        CropGroup(29, 6, (0.1, 0.5), photometric=None),
    )
    transform = MultiCropTransform(groups, mean=0.0, std=1.0)
    crops, boxes, flips = transform(images, seed=4, return_boxes=True)
    for crop, box, flip in zip(crops, boxes, flips, strict=True):
        cut = crop_masks(masks, box, flip, crop.shape[-2:])
        plane = crop[..., 0, :, :]
        undecided = (plane - 0.5).abs() < 1e-5
        assert undecided.double().mean() < 0.2
        assert ((plane > 0.5) == cut.bool())[~undecided].all()


def test_an_image_cut_to_the_size_of_its_box_is_its_own_mask():
    image = torch.rand(3, 20, 30, generator=seeded(), dtype=torch.float64)
    whole = (CropGroup((20, 30), 4, (1.0, 1.0), (1.5, 1.5), photometric=None),)
    transform = MultiCropTransform(whole, mean=0.0, std=1.0)
    crops, boxes, flips = transform(image[None], seed=1, return_boxes=True)
    assert {bool(flip) for flip in flips} == {True, False}
    for crop, box, flip in zip(crops, boxes, flips, strict=True):
        torch.testing.assert_close(crop_masks(image[None], box, flip, (20, 30)), crop)


def test_an_empty_batch_gives_empty_masks():
    boxes, flips = torch.empty(0, 4, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    assert crop_masks(label_maps(0, 9, 9), boxes, flips, 4).shape == (0, 4, 4)
    assert crop_masks(label_maps(0, 2, 9, 9), boxes, flips, (4, 5)).shape == (0, 2, 4, 5)


def test_nothing_is_written_and_any_order_of_memory_is_read():
    masks = label_maps(5, 31, 23).mT
    before = masks.clone()
    boxes, flips = as_given(ROWS)
    cut = crop_masks(masks, boxes, flips, 8)
    assert torch.equal(cut, crop_masks(masks.contiguous(), boxes, flips, 8))
    cut.zero_()
    assert torch.equal(masks, before)


def test_the_default_device_and_dtype_of_the_session_do_not_matter_for_masks():
    masks = label_maps(5, 23, 31)
    boxes, flips = as_given(ROWS)
    expected = crop_masks(masks, boxes, flips, 8)
    with other_defaults():
        assert torch.equal(crop_masks(masks, boxes, flips, 8), expected)


def test_cutting_masks_reads_no_value():
    """A tensor on the meta device has none: reading one on the host is an error."""
    masks = torch.empty(4, 2, 40, 30, dtype=torch.uint8, device="meta")
    boxes = torch.empty(4, 4, dtype=torch.int64, device="meta")
    flips = torch.empty(4, dtype=torch.bool, device="meta")
    assert crop_masks(masks, boxes, flips, (5, 7)).shape == (4, 2, 5, 7)


def test_cutting_masks_compiles_into_one_graph():
    backend = CountingBackend()
    compiled = torch.compile(crop_masks, backend=backend, fullgraph=True)
    boxes, flips = as_given(ROWS)
    for _ in range(2):
        masks = label_maps(5, 23, 31)
        assert torch.equal(compiled(masks, boxes, flips, 8), crop_masks(masks, boxes, flips, 8))
    assert backend.graphs == 1


def test_the_gradient_of_a_map_counts_the_pixels_that_show_it():
    maps = torch.rand(5, 23, 31, generator=seeded(), dtype=torch.float64).requires_grad_()
    boxes, flips = as_given(ROWS)
    torch.autograd.gradcheck(
        lambda pixels: crop_masks(pixels, boxes, flips, (3, 5)), maps, fast_mode=True
    )


# Bad input

MASKS = torch.zeros(2, 8, 8, dtype=torch.bool)
BOXES = torch.tensor([[0, 0, 8, 8], [1, 2, 3, 4]])
FLIPS = torch.tensor([True, False])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"masks": np.zeros((8, 8))}, TypeError, r"masks must be a torch.Tensor, got ndarray"),
        ({"masks": [MASKS]}, TypeError, r"masks must be a torch.Tensor, got list"),
        ({"boxes": BOXES.tolist()}, TypeError, r"boxes must be a torch.Tensor, got list"),
        ({"flips": True}, TypeError, r"flips must be a torch.Tensor, got bool"),
        ({"masks": MASKS[0, 0]}, ValueError, r"masks .* or \(B, C, H, W\), got \(8,\)"),
        ({"masks": MASKS[None, None]}, ValueError, r"masks .* got \(1, 1, 2, 8, 8\)"),
        ({"masks": MASKS[:, :0]}, ValueError, r"masks must have pixels, got shape \(2, 0, 8\)"),
        ({"boxes": BOXES.int()}, TypeError, r"boxes must have dtype torch.int64, got torch.int32"),
        ({"boxes": BOXES.float()}, TypeError, r"boxes must have dtype .*, got torch.float32"),
        ({"flips": FLIPS.long()}, TypeError, r"flips must have dtype torch.bool, got torch.int64"),
        (
            {"boxes": BOXES[:1]},
            ValueError,
            r"boxes must have shape \(2, 4\) for masks of shape \(2, 8, 8\), got \(1, 4\)",
        ),
        ({"boxes": BOXES[:, :3]}, ValueError, r"boxes must have shape \(2, 4\) .* got \(2, 3\)"),
        ({"boxes": BOXES[0]}, ValueError, r"boxes must have shape \(2, 4\) .* got \(4,\)"),
        ({"flips": FLIPS.repeat(2)}, ValueError, r"flips must have shape \(2,\) .* got \(4,\)"),
        ({"flips": FLIPS[0]}, ValueError, r"flips must have shape \(2,\) .* got \(\)"),
        (
            {"masks": MASKS[0]},
            ValueError,
            r"boxes must have shape \(4,\) for masks of shape \(8, 8\), got \(2, 4\)",
        ),
        (
            {"masks": MASKS[0], "boxes": BOXES[0]},
            ValueError,
            r"flips must have shape \(\) for masks of shape \(8, 8\), got \(2,\)",
        ),
        ({"boxes": BOXES.to("meta")}, ValueError, r"boxes must be on device cpu, got meta"),
        ({"flips": FLIPS.to("meta")}, ValueError, r"flips must be on device cpu, got meta"),
        ({"size": 0}, ValueError, r"size must be at least 1, got 0"),
        ({"size": (4, 4, 4)}, ValueError, r"size must be an int or \(height, width\), got \(4, 4"),
        ({"size": (4, 0)}, ValueError, r"size\[1\] must be at least 1, got 0"),
        ({"size": 4.0}, TypeError, r"size must be an int, got float"),
    ],
)
def test_bad_masks(arguments, error, message):
    given_well = {"masks": MASKS, "boxes": BOXES, "flips": FLIPS, "size": 4}
    with pytest.raises(error, match=message):
        crop_masks(**{**given_well, **arguments})
