"""What a type checker knows of a user's code. mypy reads this file; pytest runs it."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import assert_type

from swavkit import (
    PrototypeLayer,
    SinkhornKnopp,
    SwappedPredictionLoss,
    SwAVDetails,
    SwAVLoss,
)


def test_a_loss_is_a_tensor_and_prototypes_are_known() -> None:
    features = torch.randn(2, 3, 4)
    criterion = SwAVLoss(4, 5)
    assert_type(criterion(features), Tensor)
    loss, details = criterion(features, return_details=True)
    assert_type(loss, Tensor)
    assert_type(details, SwAVDetails | tuple[SwAVDetails, ...])
    assert_type(criterion.prototypes.assign(features), Tensor)
    criterion.prototypes.initialize_(features)
    assert_type(criterion.prototypes.weight, torch.nn.Parameter)
    layer: PrototypeLayer = criterion.prototypes
    assert_type(layer(features), Tensor)
    if criterion.queue is not None:
        criterion.queue.reset_parameters()


def test_so_are_those_of_several_heads() -> None:
    features = torch.randn(2, 3, 4)
    criterion = SwAVLoss(4, [5, 6])
    assert_type([head.assign(features) for head in criterion.prototypes], list[Tensor])
    assert_type(criterion.prototypes[1].directions, Tensor)


def test_codes_and_the_loss_of_scores_are_tensors() -> None:
    scores = torch.randn(2, 3, 4)
    codes = SinkhornKnopp()(scores)
    assert_type(codes, Tensor)
    assert_type(SwappedPredictionLoss()(scores, codes), Tensor)
