"""The published procedure, step by step in NumPy: what "published" gradients must follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swavkit import SwAVLoss
from tests import oracles

VIEWS, SAMPLES, DIMENSION, PROTOTYPES = 3, 6, 4, 5
RATE, MOMENTUM, STEPS = 0.05, 0.9, 100


def published_training(weight: np.ndarray, batches: np.ndarray) -> tuple[list[float], np.ndarray]:
    """Return the losses and the unit prototypes of the authors' loop, with SGD and momentum."""
    weight, velocity = weight.copy(), np.zeros_like(weight)
    losses = []
    for features in batches:
        weight = oracles.unit_rows(weight)  # in place, before anything else
        features = np.stack([oracles.unit_rows(view) for view in features])
        scores = features @ weight.T
        codes = np.stack([oracles.sinkhorn(view, 0.05, 3) for view in scores[:2]])
        losses.append(oracles.loss(scores, codes, 0.1))
        of_scores = oracles.loss_gradient(scores, codes, 0.1)
        gradient = np.einsum("vbk,vbd->kd", of_scores, features)  # the norm is not differentiated
        velocity = MOMENTUM * velocity + gradient
        weight = weight - RATE * velocity
    return losses, oracles.unit_rows(weight)


@pytest.mark.parametrize(("gradient", "follows"), [("published", True), ("tangent", False)])
def test_published_gradients_follow_the_published_procedure(gradient: str, follows: bool) -> None:
    batches = np.random.default_rng(0).normal(size=(STEPS, VIEWS, SAMPLES, DIMENSION))
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, prototype_gradient=gradient).double()
    criterion.prototypes.normalize_()  # from float32 to float64, as the authors' first step would
    start = criterion.prototypes.weight.detach().numpy().copy()
    optimizer = torch.optim.SGD(criterion.parameters(), lr=RATE, momentum=MOMENTUM)
    optimizer.register_step_post_hook(lambda *_: criterion.prototypes.normalize_())
    losses = []
    for features in torch.tensor(batches):
        optimizer.zero_grad()
        loss = criterion(features)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    expected_losses, expected = published_training(start, batches)
    error = np.abs(criterion.prototypes.weight.detach().numpy() - expected).max()
    assert np.abs(expected - start).max() > 0.1
    if follows:
        assert error < 1e-10
        np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-10)
    else:
        assert error > 1e-2
