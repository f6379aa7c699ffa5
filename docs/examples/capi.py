"""Train CAPI: cluster a teacher's patches position by position; a masked student predicts them.

    python docs/examples/capi.py                       # 4,000 MNIST digits
    python docs/examples/capi.py --data digits         # scikit-learn's 8x8 digits, seconds
    torchrun --nproc-per-node 2 docs/examples/capi.py  # each batch on two ranks

The teacher's encoder is a moving average of the student's. Its patches at one position of the grid,
in the images of all ranks, are one problem, so no position has its own prototypes. The prototypes
of these codes learn from the teacher's own scores, and no gradient reaches the teacher (Darcet et
al. 2025, arXiv 2502.08769). Unlike there, the student sees mask tokens and has no predictor.
"""

from __future__ import annotations

import argparse
import copy

import processes
import torch
from encoder import MEAN, STD, PatchEncoder, follow, mask_patches
from methods import begin, end, say_loss
from torch import Tensor, nn

from swavkit import (
    CropGroup,
    MultiCropTransform,
    PrototypeLayer,
    code_prediction_loss,
    sinkhorn_knopp,
)

DIM, EPSILON, TEMPERATURE, MASKED = 64, 0.06, 0.12, 0.65


class Model(nn.Module):
    """What is trained: the student with its prototypes, and the prototypes of the clustering."""

    def __init__(self, channels: int, size: int, prototypes: int) -> None:
        super().__init__()
        self.encoder = PatchEncoder(channels, size, DIM)
        self.predicted = PrototypeLayer(DIM, prototypes)
        self.clusters = PrototypeLayer(DIM, prototypes)

    def forward(self, images: Tensor, mask: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's scores and those of the teacher's patches, (B, P, K) each."""
        return self.predicted(self.encoder(images, mask)[:, 1:]), self.clusters(patches)


def codes_by_position(scores: Tensor) -> Tensor:
    """Return the codes (B, P, K) of scores (B, P, K): one problem for each of the P positions."""
    by_position = sinkhorn_knopp(scores.transpose(0, 1), epsilon=EPSILON)  # (P, B, K)
    return by_position.transpose(0, 1)


def clustering_loss(scores: Tensor, codes: Tensor) -> Tensor:
    """Return the mean cross-entropy of the teacher's scores with their own codes, (B, P, K)."""
    return code_prediction_loss(scores, codes, temperature=TEMPERATURE)


def prediction_loss(scores: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over masked patches, mask (B, P), of the student's cross-entropy."""
    return code_prediction_loss(scores, codes, temperature=TEMPERATURE, sample_weight=mask)


def train(model: Model, teacher: PatchEncoder, images: Tensor, options: argparse.Namespace) -> None:
    """Train on one crop of each image, and print the loss of each epoch."""
    crop = CropGroup(images.shape[-1], 1, (0.6, 1.0), flip=0.0, photometric=None)
    transform = MultiCropTransform([crop], mean=MEAN, std=STD)
    wrapped = processes.averaged(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.04)
    steps = len(images) // options.batch_size
    total = options.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total)
    masked = torch.tensor(round(MASKED * teacher.patches), device=images.device)  # in each image
    own = images[processes.RANK :: processes.SIZE]
    for epoch in range(options.epochs):
        losses = []
        order = torch.randperm(len(own), device=own.device)
        for rows in order.split(options.batch_size // processes.SIZE)[:steps]:
            (crops,) = transform(own[rows])
            mask = mask_patches(masked.expand(len(crops)), teacher.patches)
            with torch.no_grad():
                patches = teacher(crops)[:, 1:]  # (B, P, D)
            predicted, clustered = wrapped(crops, mask, patches)
            codes = codes_by_position(clustered)
            loss = prediction_loss(predicted, codes, mask) + clustering_loss(clustered, codes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            follow(teacher, model.encoder, 0.99)
            losses.append(loss.detach())
        say_loss(losses, epoch, options)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options, images = begin(arguments, __doc__, epochs=15, batch_size=64, prototypes=32)
    _, channels, size, _ = images.train.shape
    model = Model(channels, size, options.prototypes).to(images.train.device)
    teacher = copy.deepcopy(model.encoder).requires_grad_(False).eval()
    untrained = copy.deepcopy(teacher)
    torch.manual_seed(options.seed + 10**9 * processes.RANK)  # other crops on each rank
    train(model, teacher, images.train, options)
    encoders = {"CAPI": teacher.mean_patch, "a random encoder": untrained.mean_patch}
    return end(encoders, images)


if __name__ == "__main__":
    main()
