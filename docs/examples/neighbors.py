"""The k-NN accuracy of an encoder, on all ranks together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import processes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEIGHBORS, TEMPERATURE = 20, 0.07

Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, C, H, W) and labels (N,)


@torch.no_grad()
def accuracy(encoder: nn.Module, known: Batches, new: Batches) -> float:
    """Return the share of new images that their nearest known images classify correctly by vote.

    Each rank passes its part of the images. All ranks must make the call.
    """
    training, device = encoder.training, next(encoder.parameters()).device
    encoder.eval()
    own = [(rows.cpu(), labels.cpu()) for rows, labels in features_of(encoder, known, device)]
    everyones = [pair for of_rank in processes.everyones(own) for pair in of_rank]
    features, labels = (torch.cat(part).to(device) for part in zip(*everyones, strict=True))
    counts = torch.zeros(2, device=device)  # of the images classified rightly, and of all
    for rows, truth in features_of(encoder, new, device):
        counts[0] += (vote(rows, features, labels) == truth).sum()
        counts[1] += len(rows)
    encoder.train(training)
    right, count = processes.add_up(counts).tolist()
    return right / count


def features_of(
    encoder: nn.Module, batches: Batches, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield unit features (N, D) and labels (N,) of each batch."""
    for images, labels in batches:
        with torch.autocast(device.type, torch.bfloat16):
            features = encoder(images.to(device))
        yield F.normalize(features.float()), labels.to(device)


def vote(rows: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """Return the label of each row: a neighbor's vote weighs exp(cosine / temperature).

    Args:
        rows: (N, D), of unit length.
        features: (M, D), of unit length.
        labels: (M,).
    """
    nearest = (rows @ features.T).topk(min(NEIGHBORS, len(features)))
    votes = rows.new_zeros(len(rows), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest.indices], (nearest.values / TEMPERATURE).exp())
    return votes.argmax(dim=1)
