"""The published pipeline's steps beside torchvision's functional forms, and pipelines of others.

torchvision is no dependency: these tests run in an environment that has it, which
``benchmarks/multicrop_environment.sh`` makes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from swavkit import CropGroup, MultiCropTransform, PhotometricDistortion
from swavkit.multicrop import box_ops, color_ops, photometric
from tests.image_oracles import random_crops, seeded
from tests.tolerances import ATOL

pytest.importorskip("torchvision", reason="torchvision is not installed")
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

PAGE = Path(__file__).resolve().parent.parent / "docs" / "multicrop.rst"
RARE = 1e-3
NOTHING = [0, 1, 2, 1, 1, 1, 0, 0, 0, 0, 1, 0]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def changed(crop: torch.Tensor, **columns: float) -> list[torch.Tensor]:
    """Change one crop in both of our ways, by the columns of its row of parameters."""
    row = list(NOTHING)
    for column, value in columns.items():
        row[int(column[1:])] = value
    alone = crop.clone()
    color_ops.distort_(alone, row)
    numbers = torch.tensor([row], dtype=crop.dtype)
    return [alone, color_ops.distort(crop[None], numbers, colors=True, blur=10)[0]]


@each_dtype
@pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.8])
@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (color_ops.BRIGHTNESS, functional.adjust_brightness),
        (color_ops.CONTRAST, functional.adjust_contrast),
        (color_ops.SATURATION, functional.adjust_saturation),
    ],
)
def test_blends(kind, theirs, factor, dtype):
    for crop in random_crops(3, size=40, dtype=dtype):
        for ours in changed(crop, _0=kind, _3=factor):
            torch.testing.assert_close(ours, theirs(crop, factor), atol=ATOL[dtype], rtol=0)


@each_dtype
@pytest.mark.parametrize("shift", [-0.5, -0.2, 0.05, 0.2, 0.5])
def test_hue(shift, dtype):
    for crop in random_crops(3, size=40, dtype=dtype):
        for ours in changed(crop, _9=shift):
            theirs = functional.adjust_hue(crop, shift)
            # In float64 theirs is 7e-7 off the definition, which ours meets within 1e-12.
            torch.testing.assert_close(ours, theirs, atol=ATOL[torch.float32], rtol=0)


@each_dtype
def test_greyscale(dtype):
    for crop in random_crops(3, size=40, dtype=dtype):
        for ours in changed(crop, _10=0):
            theirs = functional.rgb_to_grayscale(crop, num_output_channels=3)
            torch.testing.assert_close(ours, theirs, atol=ATOL[dtype], rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur(sigma):
    for crop in random_crops(3, size=40, dtype=torch.float32):
        theirs = functional.gaussian_blur(crop, kernel_size=[23, 23], sigma=[sigma, sigma])
        for ours in changed(crop, _11=sigma):
            torch.testing.assert_close(ours, theirs, atol=ATOL[torch.float32], rtol=0)


def test_a_whole_photometric_step_in_its_order():
    crops = random_crops(40, size=40, dtype=torch.float32)
    uniform = torch.rand(40, photometric.NUMBERS, generator=seeded(), dtype=torch.float64)
    rows = photometric.draw(PhotometricDistortion(), uniform, 3).tolist()
    adjust = (
        functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
    )  # fmt: skip
    for crop, row in zip(crops, rows, strict=True):
        turns = list(zip(row[:3], row[3:6], row[6:9], strict=True))
        theirs = crop
        for kind, factor, _ in (turn for turn in turns if turn[2]):
            theirs = adjust[int(kind)](theirs, factor)
        theirs = functional.adjust_hue(theirs, row[9])
        for kind, factor, _ in (turn for turn in turns if not turn[2]):
            theirs = adjust[int(kind)](theirs, factor)
        if row[10] == 0:
            theirs = functional.rgb_to_grayscale(theirs, num_output_channels=3)
        if row[11]:
            theirs = functional.gaussian_blur(theirs, [21, 21], [row[11], row[11]])
        color_ops.distort_(crop, row)
        torch.testing.assert_close(crop, theirs, atol=5 * ATOL[torch.float32], rtol=0)


@pytest.mark.parametrize("mirrored", [0, 1])
def test_cutting(mirrored):
    image = torch.rand(3, 60, 80, generator=seeded())
    theirs = functional.resized_crop(image, 7, 11, 40, 50, [24, 24], antialias=True)
    theirs = functional.horizontal_flip(theirs) if mirrored else theirs
    box = [7, 11, 40, 50, mirrored]
    for ours in (
        box_ops.cut(image, box, 24),
        box_ops.cut_batch(image[None], torch.tensor([box]), 24)[0],
    ):
        torch.testing.assert_close(ours, theirs, atol=ATOL[torch.float32], rtol=0)


def test_8_bit_cutting_is_that_of_pil():
    pixels = torch.randint(0, 256, (3, 60, 80), generator=seeded(), dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    theirs = functional.pil_to_tensor(functional.resized_crop(picture, 7, 11, 40, 50, [24, 24]))
    ours = box_ops.cut(pixels, [7, 11, 40, 50, 0], 24)
    assert (ours.int() - theirs.int()).abs().max() <= 1
    exact = box_ops.cut(pixels.float(), [7, 11, 40, 50, 0], 24)
    assert (exact - theirs).abs().max() <= 1.5


def test_boxes_have_the_distribution_of_random_resized_crop():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    scale, ratio = (0.14, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    pixels = torch.empty(3, 375, 500)
    cropping = v2.RandomResizedCrop(8, scale, ratio)
    drawn = [cropping.make_params([pixels]) for _ in range(3000)]
    theirs = np.array([[one[name] for name in ("top", "left", "height", "width")] for one in drawn])
    group = CropGroup(8, 3000, scale, ratio, photometric=None)
    _, boxes, _ = MultiCropTransform((group,))(pixels, seed=0, return_boxes=True)
    left, top, right, bottom = np.array([box.tolist() for box in boxes]).T
    ours = np.stack([top, left, bottom - top, right - left], axis=1)
    for mine, their in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(mine, their).pvalue > RARE
    areas = [boxes[:, 2] * boxes[:, 3] for boxes in (ours, theirs)]
    assert stats.ks_2samp(*areas).pvalue > RARE


def test_factors_have_the_distribution_of_colour_jitter():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    jitter = v2.ColorJitter(0.8, 0.8, 0.8, 0.2)
    torch.manual_seed(0)
    drawn = [jitter.make_params([]) for _ in range(3000)]
    uniform = torch.rand(3000, photometric.NUMBERS, generator=seeded(), dtype=torch.float64)
    rows = photometric.draw(PhotometricDistortion(jitter_probability=1), uniform, 3).numpy()
    names = "brightness_factor", "contrast_factor", "saturation_factor"
    for kind, name in enumerate(names):
        ours = rows[:, 3:6][rows[:, :3] == kind]
        assert stats.ks_2samp(ours, [one[name] for one in drawn]).pvalue > RARE
    assert stats.ks_2samp(rows[:, 9], [one["hue_factor"] for one in drawn]).pvalue > RARE


# Pipelines of others as photometric steps, as the page shows them


def example(marker: str) -> dict[str, Any]:
    """Run the example of the page that names ``marker`` and return what it defined."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text, flags=re.MULTILINE)
    (block,) = (block for block in blocks if marker in block)
    defined: dict[str, Any] = {}
    exec(compile(re.sub("^   ", "", block, flags=re.MULTILINE), str(PAGE), "exec"), defined)
    return defined


@pytest.mark.parametrize("library", ["torchvision", "kornia"])
def test_the_page_s_pipeline_of_another_library(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    transform = example(library)["transform"]
    pixels = torch.randint(0, 256, (4, 3, 120, 150), generator=seeded(), dtype=torch.uint8)
    for image, batch in ((pixels[0], ()), (pixels, (4,)), (list(pixels), (4,))):
        crops = transform(image)
        sizes = [(224, 224)] * 2 + [(96, 96)] * 6
        assert [tuple(crop.shape) for crop in crops] == [(*batch, 3, *size) for size in sizes]
        assert all(crop.isfinite().all() for crop in crops)
        assert not torch.equal(crops[0], crops[1])


@pytest.mark.parametrize("library", ["torchvision", "kornia"])
def test_the_page_s_pipelines_draw_per_sample(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    step = example(library)["transform"].crops[0].photometric
    crops = torch.rand(3, 40, 40, generator=seeded()).expand(8, 3, 40, 40)
    distorted = step(crops)
    assert len({tuple(crop.flatten().tolist()) for crop in distorted}) > 4
