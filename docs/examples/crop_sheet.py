"""Draw photographs, the boxes of their crops, and the crops: the picture sheet of the docs.

python docs/examples/crop_sheet.py --output docs/images/crops.png
"""

from __future__ import annotations

import argparse
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
FULL, SMALL = "#2f6db3", "#c0392b"


def load(name: str) -> Tensor:
    """Return a photograph, uint8 (3, H, W)."""
    return torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)


def show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])


def draw(photographs: list[Tensor], seed: int, path: Path) -> None:
    """Draw a row a photograph: the photograph with its boxes, then the crops at one scale."""
    transform = MultiCropTransform()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    sizes = [group.size for group in transform.crops for _ in range(group.count)]
    largest = max(sizes)
    widths = [1.5] + [size / largest for size in sizes]  # the same scale for every crop
    figure = Figure(figsize=(2 * sum(widths), 2.1 * len(photographs)), layout="constrained")
    rows = figure.subplots(len(photographs), len(widths), squeeze=False, width_ratios=widths)
    generator = torch.Generator().manual_seed(seed)
    for (first, *others), photograph in zip(rows, photographs, strict=True):
        crops, boxes, flips = transform(photograph, generator=generator, return_boxes=True)
        show(first, photograph)
        for axes, crop, box, flip in zip(others, crops, boxes, flips, strict=True):
            size = crop.shape[-1]
            colour = FULL if size == largest else SMALL
            left, top, right, bottom = box.tolist()
            corner, extent = (left - 0.5, top - 0.5), (right - left, bottom - top)
            first.add_patch(Rectangle(corner, *extent, fill=False, edgecolor=colour))
            show(axes, (crop * std + mean).clamp(0, 1))
            axes.set_title(f"{size}{' mirrored' * bool(flip)}", fontsize=7, color=colour)
            axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw photographs and the crops of each.")
    parser.add_argument("--output", type=Path, default=Path("runs/crops.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw([load(name) for name in PHOTOGRAPHS], options.seed, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
