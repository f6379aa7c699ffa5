"""Train DeepCluster-v2: every crop predicts the k-means cluster of its image.

    python docs/examples/deepclusterv2.py                       # 4,000 MNIST digits
    python docs/examples/deepclusterv2.py --data digits         # scikit-learn's 8x8 digits, seconds
    torchrun --nproc-per-node 2 docs/examples/deepclusterv2.py  # each batch on two ranks

A bank holds the last epoch's features of every image; each rank keeps those of its own images.
Before each epoch, spherical k-means over the banks of all ranks gives each head its prototypes,
which are not trained, and each image an index, the target of all its crops (Caron et al. 2020,
arXiv 2006.09882, appendix). Heads are clustered on the banks of the code views in turn.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import processes
import torch
import torch.nn.functional as F
from encoder import Network
from methods import begin, crops_of, end, say_loss
from torch import Tensor, nn

from swavkit import MultiCropTransform, PrototypeLayer, code_prediction_loss, multi_crop_forward

FEATURE_DIM, CODE_VIEWS, HEADS, TEMPERATURE = 64, 2, 3, 0.1


class Model(nn.Module):
    """From crops to features (V, B, D) and, for each head, scores (V, B, K)."""

    def __init__(self, channels: int, prototypes: int) -> None:
        super().__init__()
        self.network = Network(channels, FEATURE_DIM)
        self.heads = nn.ModuleList(PrototypeLayer(FEATURE_DIM, prototypes) for _ in range(HEADS))

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        features = multi_crop_forward(self.network, crops)
        return features, [head(features) for head in self.heads]


def spherical_kmeans(
    features: Tensor, centroids: Tensor, iterations: int = 10
) -> tuple[Tensor, Tensor]:
    """Cluster the unit rows of all ranks by cosine.

    Args:
        features: (n, D) unit rows of this rank, any number of them.
        centroids: (K, D) unit rows to start from, the same on all ranks.
        iterations: How often the centroids move.

    Returns:
        The centroids (K, D), and the index of the nearest one to each feature (n,). A cluster
        without features keeps its centroid.
    """
    for _ in range(iterations):
        nearest = (features @ centroids.T).argmax(dim=1)
        sums = processes.add_up(torch.zeros_like(centroids).index_add_(0, nearest, features))
        empty = (sums == 0).all(dim=1, keepdim=True)
        centroids = torch.where(empty, centroids, F.normalize(sums, dim=1))
    return centroids, (features @ centroids.T).argmax(dim=1)


@torch.no_grad()
def cluster(bank: Tensor, heads: Sequence[PrototypeLayer]) -> list[Tensor]:
    """Move the prototypes of each head to the centroids of a bank; return the indices (n,).

    Args:
        bank: (A, n, D) unit features of the code views, which heads take in turn.
        heads: Their first centroids are features of the first rank.
    """
    indices = []
    for number, head in enumerate(heads):
        features = bank[number % len(bank)]
        first = features[torch.randperm(len(features))[: head.num_prototypes]]
        centroids, nearest = spherical_kmeans(features, processes.of_the_first(first))
        head.initialize_(centroids)
        indices.append(nearest)
    return indices


def hard_target_loss(scores: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Return the mean over heads and crops of the cross-entropy with the index of the image.

    Args:
        scores: (V, B, K) for each head.
        indices: (B,) int64 for each head.
    """
    losses = [
        code_prediction_loss(of_head, index.expand(len(of_head), -1), temperature=TEMPERATURE)
        for of_head, index in zip(scores, indices, strict=True)
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def first_bank(model: Model, transform: MultiCropTransform, images: Tensor) -> Tensor:
    """Return unit features (A, n, D) of the code views before the first epoch."""
    parts = [model(transform(part)[:CODE_VIEWS])[0] for part in images.split(500)]
    return F.normalize(torch.cat(parts, dim=1), dim=-1)


def train(
    model: Model,
    transform: MultiCropTransform,
    images: Tensor,
    options: argparse.Namespace,
    targets_of=cluster,
) -> list[Tensor]:
    """Train on targets that are computed before each epoch; return the loss of each step."""
    own = images[processes.RANK :: processes.SIZE]
    bank = first_bank(model, transform, own)
    wrapped = processes.averaged(model)
    optimizer = torch.optim.AdamW(model.parameters())
    steps = len(images) // options.batch_size
    total = options.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total)
    losses: list[Tensor] = []
    for epoch in range(options.epochs):
        targets = targets_of(bank, model.heads)
        order = torch.randperm(len(own), device=own.device)
        for rows in order.split(options.batch_size // processes.SIZE)[:steps]:
            features, scores = wrapped(transform(own[rows]))
            loss = hard_target_loss(scores, [target[rows] for target in targets])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bank[:, rows] = F.normalize(features[:CODE_VIEWS].detach(), dim=-1)
            losses.append(loss.detach())
        say_loss(losses[-steps:], epoch, options)
    return losses


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options, images = begin(arguments, __doc__, epochs=15, batch_size=64, prototypes=100)
    model = Model(images.train.shape[1], options.prototypes).to(images.train.device)
    model.heads.requires_grad_(False)
    untrained = copy.deepcopy(model.network.encoder).eval()
    torch.manual_seed(options.seed + 10**9 * processes.RANK)  # other crops on each rank
    train(model, crops_of(options.data), images.train, options)
    encoders = {"DeepCluster-v2": model.network.encoder.eval(), "a random encoder": untrained}
    return end(encoders, images)


if __name__ == "__main__":
    main()
