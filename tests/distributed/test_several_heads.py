"""Several heads on several processes: each as if it were alone, and as in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import SinkhornKnopp, SwAVLoss
from tests.modes import Collectives
from tests.optimizers import Lars, adamw, sgd
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

HEADS = (5, 3)
FROZEN, STEPS = 3, 6
SIZES = (7, 4, 5)


def criteria(settings: dict[str, Any], of_codes: dict[str, Any]) -> tuple[SwAVLoss, list[SwAVLoss]]:
    """Return a loss of several heads, and losses of one each with the same prototypes."""
    together = SwAVLoss(4, SIZES, **settings).double()
    singles = [SwAVLoss(4, size, **settings).double() for size in SIZES]
    for single, head in zip(singles, together.prototypes, strict=True):
        single.prototypes.load_state_dict(head.state_dict())
    for criterion in (together, *singles):
        for name, value in of_codes.items():
            setattr(criterion.sinkhorn, name, value)
    return together, singles


def together_and_separately(rank: int, argument: dict[str, Any]) -> float:
    """Return the largest difference of losses and gradients in three steps."""
    together, singles = criteria(argument["settings"], argument["of_codes"])
    generator = np.random.default_rng(rank)
    largest = 0.0
    for step in range(3):
        samples = argument["samples"]
        features = torch.tensor(generator.normal(size=(3, samples, 4))).requires_grad_()
        weight = None
        if argument["weighted"]:
            weight = torch.tensor(generator.integers(0, 4, samples) / 2)
        losses = [each(features, sample_weight=weight) for each in (together, *singles)]
        mean = torch.stack(losses[1:]).mean()
        found = torch.autograd.grad(losses[0], [features, *together.parameters()])
        weights = [single.prototypes.weight for single in singles]
        expected = torch.autograd.grad(mean, [features, *weights])
        for one, other in zip((losses[0], *found), (mean, *expected), strict=True):
            assert one.isfinite().all()
            largest = max([largest, *(one - other).abs().flatten().tolist()])
        assert step == 0 or samples == 0 or found[1].any()
    return largest


@pytest.mark.parametrize(("samples", "weighted"), [((4, 4, 4), False), ((5, 0, 3), True)], ids=str)
@pytest.mark.parametrize(
    ("settings", "of_codes"),
    [
        ({}, {}),
        ({"reduction": "global_mean", "queue_length": 6}, {}),
        ({"iterations": 12}, {"hard": True}),
        ({}, {"relaxation": 0.1}),
        ({"iterations": 30, "reduction": "global_mean"}, {"tolerance": 0.05}),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", ["full", "streamed"])
def test_heads_in_step_are_the_mean_of_separate_losses(
    ranks: Ranks,
    memory: str,
    settings: dict[str, Any],
    of_codes: dict[str, Any],
    samples: tuple[int, ...],
    weighted: bool,
) -> None:
    common = {"settings": {**settings, "memory": memory}, "of_codes": of_codes}
    common["weighted"] = weighted
    arguments = [{**common, "samples": count} for count in samples]
    assert max(ranks.run(together_and_separately, arguments)) < 1e-11


# Those who look at the codes, or have them otherwise


class OwnCodes(SinkhornKnopp):
    """Codes of a user's own, of scores of which each is doubled."""

    def forward(self, scores: Tensor, *others: Any) -> Tensor:
        return super().forward(2 * scores, *others)


def doubling(module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return 2 * given[0], *given[1:]


def looked_at(rank: int, looker: str) -> tuple[float, list[int]]:
    """Return how far codes are from what they should be, and the collectives of a late step."""
    together, singles = criteria({"reduction": "global_mean", "epsilon": 0.1}, {})
    seen: list[tuple[Tensor, Tensor]] = []
    if looker == "forward hook":
        together.sinkhorn.register_forward_hook(
            lambda _, given, codes: seen.append((given[0], codes))
        )
    else:
        for single in singles:
            single.sinkhorn.epsilon = 0.05
        if looker == "replaced":
            together.sinkhorn = OwnCodes(0.1)
        else:
            together.sinkhorn.register_forward_pre_hook(doubling)
    generator = torch.Generator().manual_seed(rank)
    difference = 0.0
    for _ in range(3):
        features = torch.randn(3, 3 + rank, 4, generator=generator, dtype=torch.float64)
        seen.clear()
        with Collectives() as sent:
            loss, details = together(features, return_details=True)
        expected = [single(features, return_details=True) for single in singles]
        pairs = [(loss, sum(of_single for of_single, _ in expected) / len(singles))]
        for of_head, (_, of_single) in zip(details, expected, strict=True):
            pairs += zip(of_head, of_single, strict=True)
        if seen:
            assert len(seen) == len(singles)
            for (scores, codes), of_head in zip(seen, details, strict=True):
                pairs += [(scores, of_head.scores[:2]), (codes, of_head.codes)]
        assert bool(seen) == (looker == "forward hook")
        difference = max([difference, *((one - other).abs().max().item() for one, other in pairs)])
    return difference, sent.numels


# The number of samples by itself; then for each head a maximum, of masses too, and the sums.
ONE_BY_ONE = [1, *(2 * (size + (place == 0)) for size in SIZES for place in range(4))]


@pytest.mark.parametrize("looker", ["forward hook", "forward pre-hook", "replaced"])
def test_codes_that_are_looked_at_or_a_user_s_own_are_right(ranks: Ranks, looker: str) -> None:
    for difference, numels in ranks.run(looked_at, [looker] * 3):
        assert difference < 1e-12
        assert numels == ONE_BY_ONE


def with_a_hook_on_one_rank(rank: int, argument: tuple[Any, str, str]) -> str | None:
    sizes, hook, reduction = argument
    criterion = SwAVLoss(4, sizes, reduction=reduction)
    if rank == 1:
        getattr(criterion.sinkhorn, f"register_{hook}")(lambda *_: None)
    try:
        criterion(torch.randn(3, 4, 4))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook"])
@pytest.mark.parametrize("reduction", ["mean", "global_mean"])
def test_one_rank_that_goes_head_by_head_is_found(ranks: Ranks, reduction: str, hook: str) -> None:
    for text in ranks.run(with_a_hook_on_one_rank, [(SIZES, hook, reduction)] * 3):
        assert text == (
            "whether heads get their codes one by one must be the same on all ranks, got False "
            "on ranks 0, 2 and True on rank 1; they do if sinkhorn is replaced or has hooks, "
            "which must hold on all ranks"
        )


@pytest.mark.parametrize("reduction", ["mean", "global_mean"])
@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook"])
def test_one_head_sends_the_same_with_a_hook(ranks: Ranks, hook: str, reduction: str) -> None:
    assert ranks.run(with_a_hook_on_one_rank, [(7, hook, reduction)] * 3) == [None] * 3


# In a model, frozen at first


class Model(nn.Module):
    """A linear encoder and its loss, as one module for DDP."""

    def __init__(self, queue_length: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.criterion = SwAVLoss(4, HEADS, freeze_steps=FROZEN, queue_length=queue_length)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.encoder(inputs))
        return loss


def train(
    model: nn.Module,
    criterion: SwAVLoss,
    optimizer_of: Callable[[Any], torch.optim.Optimizer],
    inputs: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return the loss and each head's directions after each step."""
    optimizer = optimizer_of(model.parameters())
    losses, directions = [], []
    for batch in torch.tensor(inputs):
        optimizer.zero_grad()  # to none, so that a parameter without a gradient would be found
        loss = model(batch)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
        directions.append(torch.cat([head.directions for head in criterion.prototypes]).numpy())
    return {"losses": np.array(losses), "directions": np.array(directions)}


def train_under_ddp(rank: int, argument: tuple[Any, np.ndarray]) -> dict[str, np.ndarray]:
    optimizer_of, inputs = argument
    torch.manual_seed(rank)  # DDP starts all of them from the weights of rank 0
    model = Model()
    return train(DistributedDataParallel(model), model.criterion, optimizer_of, inputs)


@pytest.mark.parametrize("optimizer_of", [sgd, adamw, Lars])
def test_heads_and_freezing_under_ddp_are_those_of_one_process(
    ranks: Ranks, optimizer_of: Callable[[Any], torch.optim.Optimizer]
) -> None:
    inputs = np.random.default_rng(0).normal(size=(3, STEPS, 3, 4, 6))  # of 3 ranks
    results = ranks.run(train_under_ddp, [(optimizer_of, shard) for shard in inputs])
    torch.manual_seed(0)
    model = Model(queue_length=3 * 12)  # as long as those of all ranks
    start = torch.cat([head.directions for head in model.criterion.prototypes]).numpy()
    alone = train(model, model.criterion, optimizer_of, np.concatenate(inputs, axis=2))

    mean_loss = np.mean([result["losses"] for result in results], axis=0)
    np.testing.assert_allclose(mean_loss, alone["losses"], rtol=0, atol=1e-10)
    for result in results:
        np.testing.assert_allclose(result["directions"], alone["directions"], rtol=0, atol=1e-10)
        cosines = (result["directions"] * start).sum(axis=-1)  # (steps, heads' rows)
        np.testing.assert_allclose(cosines[:FROZEN], 1, rtol=0, atol=1e-12)
        assert (cosines[FROZEN:] < 1 - 1e-8).all()
