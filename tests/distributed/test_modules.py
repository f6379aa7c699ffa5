"""What modules do about other processes: in training, in eval, as copies, loaded, under DDP."""

from __future__ import annotations

import copy
import linecache
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import SinkhornKnopp, SwAVLoss
from tests import oracles
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

SIZES = (6, 3, 4)  # samples on each rank


def cosines_on_ranks() -> list[np.ndarray]:
    return [np.random.default_rng(size).uniform(-1, 1, (size, 5)) for size in SIZES]


def features_on_ranks(steps: int = 1) -> list[np.ndarray]:
    """(steps, V, B, D) for each rank."""
    return [np.random.default_rng(size).normal(size=(steps, 3, size, 4)) for size in SIZES]


def assert_codes(
    codes: list[np.ndarray], scores: list[np.ndarray], *groups: tuple[int, ...]
) -> None:
    """Each group of ranks has the codes of its ranks' (..., B, K) scores together."""
    for group in groups:
        whole = np.concatenate([scores[rank] for rank in group], axis=-2)
        found = np.concatenate([codes[rank] for rank in group], axis=-2)
        for index in np.ndindex(whole.shape[:-2]):
            expected = oracles.sinkhorn(whole[index], 0.05, 3)
            np.testing.assert_allclose(found[index], expected, rtol=0, atol=1e-12)


def loss_codes_and_scores(criterion: SwAVLoss, features: np.ndarray) -> tuple[Any, ...]:
    """Return the (A, B, K) codes and the scores that they come from."""
    _, details = criterion(torch.tensor(features), return_details=True)
    return details.codes.numpy(), details.scores[: criterion.num_code_views].numpy()


def codes_in_training(rank: int, scores: np.ndarray) -> np.ndarray:
    return SinkhornKnopp()(torch.tensor(scores)).numpy()


def codes_in_eval_on_rank_0(rank: int, scores: np.ndarray) -> np.ndarray | None:
    return SinkhornKnopp().eval()(torch.tensor(scores)).numpy() if rank == 0 else None


def warnings_in_eval(rank: int) -> list[tuple[str, str]]:
    """Return warnings and their lines: of a module, one that is told, the loss, and one inside."""
    scores = torch.eye(3)
    features = torch.ones(2, 3, 4)
    told = [SinkhornKnopp(synchronize=choice).eval() for choice in (False, "always")]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for module in told:
            module(scores)
        assert not seen
        sinkhorn, criterion = SinkhornKnopp(), SwAVLoss(4, 5)
        wrapped = DistributedDataParallel(nn.Sequential(SwAVLoss(4, 5, memory="streamed")))
        sinkhorn(scores)  # in training
        assert not seen
        for _ in range(2):
            sinkhorn.eval()(scores)
            criterion.eval()(features)
            wrapped.eval()(features)
    return [
        (str(warning.message), linecache.getline(warning.filename, warning.lineno).strip())
        for warning in seen
    ]


def test_local_codes_in_eval_are_told_once(ranks: Ranks) -> None:
    for seen in ranks.run(warnings_in_eval):
        assert [line for _, line in seen] == [
            "sinkhorn.eval()(scores)",
            "criterion.eval()(features)",
            "wrapped.eval()(features)",
        ]
        assert all("expected synchronize='always' for a teacher" in text for text, _ in seen)


def loss_in_training(rank: int, features: np.ndarray) -> tuple[Any, ...]:
    return loss_codes_and_scores(SwAVLoss(4, 5), features[0])


def loss_in_eval_on_rank_0(rank: int, features: np.ndarray) -> tuple[Any, ...] | None:
    return loss_codes_and_scores(SwAVLoss(4, 5).eval(), features[0]) if rank == 0 else None


def test_sinkhorn_synchronises_in_training_without_being_asked(ranks: Ranks) -> None:
    scores = cosines_on_ranks()
    assert_codes(ranks.run(codes_in_training, scores), scores, (0, 1, 2))


def test_one_rank_alone_may_use_sinkhorn_in_eval(ranks: Ranks) -> None:
    scores = cosines_on_ranks()
    assert_codes(ranks.run(codes_in_eval_on_rank_0, scores), scores, (0,))


def test_the_loss_synchronises_in_training_without_being_asked(ranks: Ranks) -> None:
    codes, scores = zip(*ranks.run(loss_in_training, features_on_ranks()), strict=True)
    assert_codes(codes, scores, (0, 1, 2))


def test_one_rank_alone_may_use_the_loss_in_eval(ranks: Ranks) -> None:
    (codes, scores), *others = ranks.run(loss_in_eval_on_rank_0, features_on_ranks())
    assert others == [None, None]
    assert_codes([codes], [scores], (0,))


def loss_in_a_pair(rank: int, features: np.ndarray) -> tuple[Any, ...]:
    pair = dist.new_group([0, 1])
    # Rank 2 works alone: if it took part in what the pair does, nobody would get an answer.
    settings: dict[str, Any] = {"synchronize": False} if rank == 2 else {"process_group": pair}
    return loss_codes_and_scores(SwAVLoss(4, 5, **settings), features[0])


def test_the_loss_shares_codes_within_its_group(ranks: Ranks) -> None:
    codes, scores = zip(*ranks.run(loss_in_a_pair, features_on_ranks()), strict=True)
    assert_codes(codes, scores, (0, 1), (2,))


def codes_of_a_deep_copy(rank: int, scores: np.ndarray) -> np.ndarray | None:
    pair = dist.new_group([0, 1])
    if rank == 2:
        return None
    criterion = SwAVLoss(4, 5, process_group=pair)
    copied = copy.deepcopy(criterion)  # as a teacher is made
    assert copied.prototypes.weight is not criterion.prototypes.weight
    assert copied.sinkhorn.process_group is pair
    codes = copied.sinkhorn(torch.tensor(scores)).numpy()
    # The copy may get another group without taking it from the original.
    copied.sinkhorn.process_group = None
    assert criterion.sinkhorn.process_group is pair
    return codes


def test_a_deep_copy_shares_the_group(ranks: Ranks) -> None:
    scores = cosines_on_ranks()
    assert_codes(ranks.run(codes_of_a_deep_copy, scores), scores, (0, 1))


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def refusal(module: nn.Module, given: Tensor) -> str | None:
    try:
        module(given)
    except RuntimeError as error:
        return str(error)
    return None


def codes_after_pickling(rank: int, scores: np.ndarray) -> dict[str, Any]:
    pair = dist.new_group([0, 1])
    given = torch.tensor(scores)
    outcome = {"default kept": pickled(SinkhornKnopp())(given).numpy()}
    if rank == 2:
        outcome["default set"] = SinkhornKnopp()(given).numpy()
        return outcome
    module = SinkhornKnopp(process_group=pair)
    for name, loaded in (
        ("loaded", pickled(module)),
        ("loaded twice", pickled(pickled(module))),
        ("loaded and copied", copy.deepcopy(pickled(module))),
    ):
        outcome[name] = refusal(loaded, given)
    criterion = pickled(SwAVLoss(5, 3, queue_length=8, process_group=pair))
    outcome["loss"] = refusal(criterion, torch.stack([given, given]))
    outcome["state of the loss"] = int(criterion.steps), len(criterion.queue)
    loaded = pickled(module)
    loaded.process_group = pair
    outcome["pair set"] = loaded(given).numpy()
    loaded = pickled(module)
    loaded.process_group = None
    outcome["default set"] = loaded(given).numpy()
    return outcome


def test_pickling_drops_a_group_and_keeps_the_default(ranks: Ranks) -> None:
    scores = cosines_on_ranks()
    outcomes = ranks.run(codes_after_pickling, scores)
    for name, group in {
        "default kept": (0, 1, 2),
        "default set": (0, 1, 2),
        "pair set": (0, 1),
    }.items():
        assert_codes([outcome.get(name) for outcome in outcomes], scores, group)
    for outcome in outcomes[:2]:
        for name in ("loaded", "loaded twice", "loaded and copied", "loss"):
            assert outcome[name].startswith("process_group was dropped when this module was")
        assert outcome["state of the loss"] == (0, 0)


class Model(nn.Module):
    """An encoder and its criterion, as one module for DDP."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.criterion = SwAVLoss(4, 5, queue_length=8)

    def forward(self, inputs: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.encoder(inputs))
        return loss


def queue_under_ddp(
    rank: int, argument: tuple[Callable[[], nn.Module], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, int, np.ndarray]:
    """Return the queue after training, and all features that were pushed, (A, N, D)."""
    make_encoder, inputs = argument
    torch.manual_seed(rank)  # DDP starts all of them from the weights of rank 0
    model = Model(make_encoder()).double()
    seen: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.5)
    for batch in torch.tensor(inputs):
        optimizer.zero_grad()
        parallel(batch).backward()
        optimizer.step()
    queue = model.criterion.queue
    assert queue is not None
    pushed = torch.cat(seen, dim=1)[: model.criterion.num_code_views].numpy()
    return queue.features.numpy(), queue.valid.numpy(), int(queue.position), pushed


def linear_encoder() -> nn.Module:
    return nn.Linear(4, 4)


@pytest.mark.parametrize("make_encoder", [nn.Identity, linear_encoder])
def test_each_rank_keeps_its_own_queue_under_ddp(
    ranks: Ranks, make_encoder: Callable[[], nn.Module]
) -> None:
    arguments = [(make_encoder, inputs) for inputs in features_on_ranks(steps=3)]
    for size, (features, valid, position, pushed) in zip(
        SIZES, ranks.run(queue_under_ddp, arguments), strict=True
    ):
        ring = oracles.Ring(8)
        ring.push(np.stack([oracles.unit_rows(view) for view in pushed]))
        assert len(pushed[0]) == 3 * size  # wraps around where there are more than 8
        assert position == ring.position
        np.testing.assert_array_equal(valid, True)
        np.testing.assert_allclose(features, np.stack(ring.slots, axis=1), rtol=0, atol=1e-12)
