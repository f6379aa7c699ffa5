"""Draw the plots of a healthy run and of runs with a fault, for the documentation.

python docs/examples/stuck.py --output docs/images
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import torch
from encoder import distort_digits
from images import load_images
from monitoring import in_words
from PIL import Image
from torch import Tensor, nn

from swavkit import ClusterMonitor, SwAVLoss, cluster_statistics

BATCH, STEPS, K, DIM = 64, 400, 50, 32
CASES: dict[str, dict[str, Any]] = {
    "healthy": {},
    "large-epsilon": {"epsilon": 0.3},
    "other-images": {"other_images": True},
    "collapsed": {"softmax_codes": True},
    "rank-one": {"bottleneck": 1},
    "duplicates": {"copies": 15},
}


def network_of(bottleneck: int | None) -> nn.Sequential:
    """Return two layers, and a linear bottleneck if one is given."""
    layers = [nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, DIM)]
    if bottleneck is not None:
        layers += [nn.Linear(DIM, bottleneck, bias=False), nn.Linear(bottleneck, DIM, bias=False)]
    return nn.Sequential(*layers)


def views_of(images: Tensor, other_images: bool) -> Tensor:
    """Return two distorted copies of some digits, (2, B, 64)."""
    batch = images[torch.randint(len(images), (BATCH,))]
    views = torch.stack([distort_digits(batch).flatten(1) for _ in range(2)])
    if other_images:
        views[1] = views[1, torch.randperm(BATCH)]
    return views


def train(
    images: Tensor,
    *,
    epsilon: float = 0.03,
    other_images: bool = False,
    softmax_codes: bool = False,
    bottleneck: int | None = None,
    copies: int = 0,
) -> tuple[ClusterMonitor, SwAVLoss]:
    """Train with at most one fault, and return the monitor of the last half of the steps."""
    torch.manual_seed(0)
    network = network_of(bottleneck)
    criterion = SwAVLoss(DIM, K, epsilon=epsilon)
    with torch.no_grad():
        criterion.prototypes.weight[K - copies :] = criterion.prototypes.weight[:1]
    optimizer = torch.optim.AdamW([*network.parameters(), *criterion.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    monitor = ClusterMonitor(K, window=STEPS // 2)
    for _ in range(STEPS):
        features = network(views_of(images, other_images).flatten(0, 1)).view(2, BATCH, -1)
        scores = criterion.prototypes(features)
        codes = criterion.sinkhorn(scores.detach())
        if softmax_codes:
            codes = torch.softmax(scores.detach() / epsilon, dim=-1)
        loss = criterion.loss(scores, codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        statistics = cluster_statistics(scores.detach(), codes)
        monitor.update(statistics, loss=loss, features=features, prototypes=criterion.prototypes)
    return monitor, criterion


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the pictures")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    images = load_images("digits", validation=False, image_size=8).train / 255
    for name, fault in CASES.items():
        monitor, criterion = train(images, **fault)
        print(f"--- {name}\n{in_words(monitor.diagnose(criterion)) or 'no diagnosis'}", flush=True)
        content = io.BytesIO()
        monitor.plot().savefig(content)
        small = Image.open(content).convert("RGB").quantize(64)  # colors
        small.save(options.output / f"stuck-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
