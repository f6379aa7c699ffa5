"""Train SimCLR with multi-crop: the crops and ``multi_crop_forward`` work with any method.

    python docs/examples/simclr.py                  # 4,000 MNIST digits, about a minute on one core
    python docs/examples/simclr.py --data digits    # scikit-learn's 8x8 digits, seconds

This file contains the loss, NT-Xent (Chen et al. 2020, arXiv 2002.05709). Every crop is contrasted
with each of the two full crops. With six small crops, an image has thirteen pairs instead of one,
for about 1.5 times the computation at the published sizes.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit import CropGroup, MultiCropTransform, multi_crop_forward

try:
    from encoder import MEAN, STD, Network, distort_digits, features_of, pixels_of
    from evaluation import compare
    from images import load_images
except ModuleNotFoundError as missing:
    sys.exit(
        f"simclr.py: error: the package {missing.name!r} is missing; it comes with the extra: "
        f'pip install -e ".[examples]"'
    )

FULL_CROPS = 2
TEMPERATURE = 0.2


def nt_xent(one: Tensor, other: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return the NT-Xent loss: each of 2 B features has one positive and 2 B - 2 negatives.

    Args:
        one: (B, D) features of one crop of each image.
        other: (B, D) features of another crop.
        temperature: The temperature of the softmax over cosines.
    """
    features = F.normalize(torch.cat([one, other]), dim=1)
    similarities = (features @ features.T / temperature).fill_diagonal_(-math.inf)
    partner = torch.arange(len(features), device=features.device).roll(len(one))
    return F.cross_entropy(similarities, partner)


def multi_crop_nt_xent(features: Tensor, full_crops: int = FULL_CROPS) -> Tensor:
    """Return the mean loss over the pairs of a full crop and any later crop.

    Args:
        features: (V, B, D) features, the full crops first.
        full_crops: The number of full crops.
    """
    pairs = [
        (full, other) for full in range(full_crops) for other in range(full + 1, len(features))
    ]
    return torch.stack([nt_xent(features[full], features[other]) for full, other in pairs]).mean()


def crops_of_digits(size: int) -> MultiCropTransform:
    """Return the transform of images of this size."""
    small = max(1, round(0.7 * size))
    return MultiCropTransform(
        (
            CropGroup(size, FULL_CROPS, (0.7, 1.0), flip=0.0, photometric=distort_digits),
            CropGroup(small, 2, (0.5, 0.9), flip=0.0, photometric=distort_digits),
        ),
        mean=MEAN,
        std=STD,
    )


def train(
    network: Network,
    transform: MultiCropTransform,
    images: Tensor,
    *,
    epochs: int,
    batch_size: int,
) -> list[float]:
    """Train the network and return the loss of each step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    losses = []
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: len(images) // batch_size * batch_size]
        for rows in order.split(batch_size):
            features = multi_crop_forward(network, transform(images[rows]))  # (4, B, D)
            loss = multi_crop_nt_xent(features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        print(f"epoch {epoch + 1} of {epochs}: loss {float(losses[-1]):.3f}", flush=True)
    return torch.stack(losses).tolist()


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description="Train SimCLR with multi-crop on digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data", choices=["mnist", "digits"], default="mnist", help="the images")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the images")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step")
    parser.add_argument("--seed", type=int, default=0, help="of every random number")
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    torch.manual_seed(options.seed)
    images = load_images(options.data, validation=False, image_size=28)
    print(images, flush=True)
    network = Network(images.train.shape[1], feature_dim=64)
    untrained = copy.deepcopy(network.encoder).eval()
    transform = crops_of_digits(images.train.shape[-1])
    train(network, transform, images.train, epochs=options.epochs, batch_size=options.batch_size)
    return compare(
        {
            "SimCLR": partial(features_of, network.encoder.eval()),
            "random encoder": partial(features_of, untrained),
            "raw pixels": pixels_of,
        },
        images,
    )


if __name__ == "__main__":
    main()
