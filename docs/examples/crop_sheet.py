"""Draw photographs, the boxes of their crops, and the crops, for the documentation.

python docs/examples/crop_sheet.py --output docs/images/crops.png
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from swavkit import MultiCropTransform

try:
    import skimage.data
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ModuleNotFoundError as missing:
    sys.exit(
        f"crop_sheet.py: error: the package {missing.name!r} is missing; it comes with the extra: "
        f'pip install -e ".[examples]"'
    )

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")  # inside the package, so nothing is downloaded
FULL, SMALL = "#2f6db3", "#c0392b"  # colors of the two crop sizes
FONT_SIZE = 10


def load(name: str) -> Tensor:
    """Return a photograph, uint8 (3, H, W)."""
    return torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)


def show(axes: Axes, image: Tensor, title: str = "", color: str = "black") -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=FONT_SIZE, color=color, pad=3)


def draw_boxes(axes: Axes, boxes: list[Tensor], colors: list[str]) -> None:
    """Draw each box with its number, alternately at its upper left and its lower right corner."""
    for number, (box, color) in enumerate(zip(boxes, colors, strict=True), start=1):
        left, top, right, bottom = box.tolist()
        corner, extent = (left - 0.5, top - 0.5), (right - left, bottom - top)
        axes.add_patch(Rectangle(corner, *extent, fill=False, edgecolor=color, linewidth=1.5))
        label = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
        place = {"x": left, "y": top, "ha": "left", "va": "top"}
        if number % 2 == 0:
            place = {"x": right, "y": bottom, "ha": "right", "va": "bottom"}
        axes.text(**place, s=str(number), color="white", fontsize=FONT_SIZE - 2, bbox=label)


def draw(photographs: list[Tensor], seed: int, path: Path) -> None:
    """Draw the boxes of the crops of each photograph, then the crops, all at one scale."""
    transform = MultiCropTransform()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    full, small = transform.crops
    columns = math.ceil(small.count / 2)  # of small crops, in two rows
    height_of_small = small.size / full.size
    figure = Figure(figsize=(10, 2.35 * len(photographs)), layout="constrained")
    grid = figure.add_gridspec(
        len(photographs), 3, width_ratios=(1.5, 2, columns * height_of_small)
    )
    generator = torch.Generator().manual_seed(seed)
    colors = [FULL] * full.count + [SMALL] * small.count
    for row, photograph in enumerate(photographs):
        crops, boxes, flips = transform(photograph, generator=generator, return_boxes=True)
        first = figure.add_subplot(grid[row, 0])
        show(first, photograph)
        draw_boxes(first, boxes, colors)
        large = grid[row, 1].subgridspec(1, full.count).subplots(squeeze=False)
        others = grid[row, 2].subgridspec(2, columns).subplots(squeeze=False)
        for axes in others.flat:
            axes.axis("off")  # also for cells without a crop
        places = [*large.flat, *others.flat[: small.count]]
        for number, (axes, crop, flip) in enumerate(
            zip(places, crops, flips, strict=True), start=1
        ):
            title = f"{number}, mirrored" if flip else str(number)
            show(axes, (crop * std + mean).clamp(0, 1), title, colors[number - 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw photographs and the crops of each.")
    parser.add_argument("--output", type=Path, default=Path("runs/crops.png"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    draw([load(name) for name in PHOTOGRAPHS], options.seed, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
