"""Train with the losses of DINOv2: a teacher's codes of class tokens and of masked patches.

    python docs/examples/dino.py                       # 4,000 MNIST digits
    python docs/examples/dino.py --data digits         # scikit-learn's 8x8 digits, seconds
    torchrun --nproc-per-node 2 docs/examples/dino.py  # each batch on two ranks

The teacher is a moving average of the student, heads and prototypes included. Codes of all class
tokens are one problem and those of masked patches another; both are solved together, with as many
collectives as one (Oquab et al. 2023, arXiv 2304.07193). Regularizers are left out.
"""

from __future__ import annotations

import argparse
import copy

import processes
import torch
from encoder import MEAN, STD, PatchEncoder, distort_digits, follow, mask_patches
from methods import begin, end, say_loss
from settings import Settings, crop_groups
from torch import Tensor, nn

from swavkit import (
    MultiCropTransform,
    PrototypeLayer,
    code_prediction_loss,
    sinkhorn_knopp,
    swapped_prediction_loss,
)

DIM, FEATURES, TEMPERATURE = 64, 16, 0.1


class Branch(nn.Module):
    """An encoder with heads and prototypes of its own: the student, or the teacher."""

    def __init__(self, channels: int, size: int, prototypes: int) -> None:
        super().__init__()
        self.encoder = PatchEncoder(channels, size, DIM)
        for kind in ("class", "patch"):
            norm = nn.BatchNorm1d(2 * DIM, track_running_stats=False)  # no buffers to average
            layers = [nn.Linear(DIM, 2 * DIM), norm, nn.GELU(), nn.Linear(2 * DIM, FEATURES)]
            head = nn.Sequential(*layers, PrototypeLayer(FEATURES, prototypes))
            self.add_module(f"of_{kind}", head)

    def forward(self, crops: list[Tensor], mask: Tensor | None, buffer: Tensor) -> list[Tensor]:
        """Return scores of class tokens (V, B, K) and of the patches in ``buffer`` (M, K)."""
        tokens = self.encoder(torch.cat(crops[:2]), mask)
        classes, patches = tokens[:, 0], tokens[:, 1:].flatten(0, 1).index_select(0, buffer)
        if len(crops) > 2:
            classes = torch.cat([classes, self.encoder.class_token(torch.cat(crops[2:]))])
        return [self.of_class(classes).unflatten(0, (len(crops), -1)), self.of_patch(patches)]


def masked_tokens(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the indices (M,) of masked tokens in a buffer of a fixed size, and their weights (M,).

    A token weighs 1 / (masked tokens of its image), or 0 where the buffer holds one that is shown.
    No shape depends on how many are masked, and nothing waits for the device.
    """
    buffer = mask.flatten().byte().argsort(descending=True, stable=True)[:size]
    weight = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return buffer, weight.flatten()[buffer]


def teacher_codes(
    class_scores: Tensor, patch_scores: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the codes of class tokens (A, B, K), as one problem, and of masked patches (M, K)."""
    problems, weights = [class_scores.flatten(0, 1), patch_scores], [None, weight > 0]
    classes, patches = sinkhorn_knopp(problems, epsilon=epsilon, sample_weight=weights)
    return classes.view_as(class_scores), patches


def dino_loss(scores: Tensor, codes: Tensor) -> Tensor:
    """Return the mean cross-entropy over pairs of a student's crop s and a teacher's crop t != s.

    Scores (V, B, K) are the student's, codes (A, B, K) the teacher's of the first A crops.
    """
    return swapped_prediction_loss(scores, codes, temperature=TEMPERATURE)


def patch_loss(scores: Tensor, codes: Tensor, weight: Tensor, images: int) -> Tensor:
    """Return the mean over images of the mean cross-entropy of their masked patches, or 0.

    Scores, codes (M, K) and weight (M,) are those of the buffer, at the same positions.
    """
    errors = code_prediction_loss(
        scores, codes, temperature=TEMPERATURE, sample_weight=weight, reduction="sum"
    )
    return errors / images


def teacher_temperature(progress: float) -> float:
    """Return ε: from 0.04 up to 0.07 in the first 30 % of the training."""
    return 0.04 + 0.03 * min(1.0, progress / 0.3)


def train(student: Branch, teacher: Branch, images: Tensor, options: argparse.Namespace) -> None:
    """Train both branches and print the loss of each epoch."""
    size, patches = images.shape[-1], student.encoder.patches
    settings = Settings(options.data, crops=f"2x{size},2x{size * 3 // 4}")
    transform = MultiCropTransform(crop_groups(settings, distort_digits), mean=MEAN, std=STD)
    model = processes.averaged(student)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.04)
    steps = len(images) // options.batch_size
    total = options.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total)
    own = images[processes.RANK :: processes.SIZE]
    for epoch in range(options.epochs):
        losses = []
        order = torch.randperm(len(own), device=own.device)
        for rows in order.split(options.batch_size // processes.SIZE)[:steps]:
            progress = (epoch * steps + len(losses)) / total
            crops = transform(own[rows])
            count = torch.randint(1, patches // 2 + 1, (2 * len(rows),), device=own.device)
            count[::2] = 0  # every other image is shown as it is
            mask = mask_patches(count, patches)
            buffer, weight = masked_tokens(mask, len(rows) * (patches // 2))
            with torch.no_grad():
                scores = teacher(crops[:2], None, buffer)
                codes = teacher_codes(*scores, weight, teacher_temperature(progress))
            classes, masked = model(crops, mask, buffer)
            loss = dino_loss(classes, codes[0]) + patch_loss(masked, codes[1], weight, len(mask))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            follow(teacher, student, 1 - 0.01 * (1 - progress))
            losses.append(loss.detach())
        say_loss(losses, epoch, options)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options, images = begin(arguments, __doc__, epochs=15, batch_size=64, prototypes=64)
    _, channels, size, _ = images.train.shape
    student = Branch(channels, size, options.prototypes).to(images.train.device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    untrained = copy.deepcopy(teacher.encoder)
    torch.manual_seed(options.seed + 10**9 * processes.RANK)  # other crops on each rank
    train(student, teacher, images.train, options)
    learned = teacher.encoder.class_token
    return end({"DINO": learned, "a random encoder": untrained.class_token}, images)


if __name__ == "__main__":
    main()
