"""What modules find out about the other processes before their numbers mix."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import SinkhornKnopp, SwAVLoss
from tests import oracles
from tests.modes import Collectives, CountingBackend
from tests.ranks import Ranks, refusal

pytestmark = pytest.mark.distributed

D, K = 4, 5
RECORD = 3 * 32  # numbers in a comparison of three processes


def features(seed: int, samples: int = 6) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(3, samples, D)))


def same_criterion(*sizes: Any, **settings: Any) -> SwAVLoss:
    torch.manual_seed(0)
    return SwAVLoss(D, *(sizes or (K,)), **settings).double()


# Settings


def codes_with(rank: int, argument: dict[str, Any]) -> tuple[list[str | None], list[int]]:
    """Return what the first calls are refused with, and the collectives that they have made."""
    scores = torch.zeros(argument.pop("shape", (6, K)), dtype=argument.pop("dtype", torch.float64))
    weight = argument.pop("prototype_weight", None)
    sinkhorn = SinkhornKnopp(**argument)
    with Collectives() as collectives:
        texts = [refusal(partial(sinkhorn, scores, None, weight)) for _ in range(2)]
    return texts, collectives.numels


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"shape": (6, 9)}, "num_prototypes must be .* got 5 on ranks 0, 2 and 9 on rank 1"),
        ({"shape": (2, 6, K)}, "the number of problems must be .* got 1 .* and 2 on rank 1"),
        ({"dtype": torch.float32}, r"the dtype of scores .* torch\.float64 .* torch\.float32 "),
        ({"epsilon": 0.1}, "epsilon must be .* got 0.05 on ranks 0, 2 and 0.1 on rank 1"),
        ({"iterations": 2}, "iterations must be .* got 3 on ranks 0, 2 and 2 on rank 1"),
        ({"relaxation": 2.0}, "relaxation must be .* got inf on ranks 0, 2 and 2 on rank 1"),
        ({"tolerance": 0.5}, "tolerance must be .* got None on ranks 0, 2 and 0.5 on rank 1"),
        ({"hard": True}, "hard must be .* got False on ranks 0, 2 and True on rank 1"),
        ({"validate": True}, "validate must be .* got False on ranks 0, 2 and True on rank 1"),
        (
            {"prototype_weight": torch.ones(K)},
            "whether prototype_weight is given must be .* got False .* and True on rank 1",
        ),
    ],
)
def test_codes_with_other_settings_are_refused_before_anything_else_is_sent(
    ranks: Ranks, other: dict[str, Any], text: str
) -> None:
    for texts, numels in ranks.run(codes_with, [{}, dict(other), {}]):
        assert numels == [RECORD, RECORD]
        for refused in texts:
            assert refused is not None
            assert re.fullmatch(f"{text}.*", refused), refused


def loss_with(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    sizes = settings.pop("num_prototypes", K)
    steps = settings.pop("steps", 0)
    double = settings.pop("double", True)
    criterion = same_criterion(sizes, **settings)
    criterion.steps.fill_(steps)
    given = features(rank)
    if not double:
        criterion.float()
    outcome: dict[str, Any] = {"asked": refusal(criterion.check_ranks)}
    with Collectives() as collectives:
        outcome["called"] = refusal(lambda: criterion(given))
    outcome["numels"] = collectives.numels
    outcome["state"] = int(criterion.steps) - steps, len(criterion.queue or ())
    return outcome


@pytest.mark.parametrize(
    ("other", "texts"),
    [
        ({"num_prototypes": 7}, ["num_prototypes must be", "num_prototypes[0] must be"]),
        ({"num_prototypes": [K]}, []),
        (
            {"num_prototypes": [2, 3]},
            ["the number of heads must be", "num_prototypes[0] must be"],
        ),
        ({"num_code_views": 1}, ["num_code_views must be"]),
        ({"temperature": 0.2}, ["temperature must be"]),
        ({"epsilon": 0.1}, ["epsilon must be"]),
        ({"iterations": 1}, ["iterations must be"]),
        ({"queue_start": 3}, ["queue_start must be"]),
        ({"freeze_steps": 3}, ["freeze_steps must be"]),
        ({"steps": 3}, ["steps must be", "; load a checkpoint on every rank"]),
        ({"reduction": "global_mean"}, ["reduction='global_mean' must be"]),
        ({"double": False}, ["the dtype of the prototypes must be"]),
    ],
)
def test_losses_with_other_settings_are_refused_before_anything_else_is_sent(
    ranks: Ranks, other: dict[str, Any], texts: list[str]
) -> None:
    for outcome in ranks.run(loss_with, [{"queue_length": 4}, {"queue_length": 4} | other, {}]):
        if not texts:
            assert outcome["asked"] is None
            continue
        assert outcome["asked"] == outcome["called"]
        for text in texts:
            assert text in outcome["called"]
        assert "on rank 1" in outcome["called"]
        assert outcome["numels"] == [RECORD]
        assert outcome["state"] == (0, 0)


def permuted_heads(rank: int) -> str | None:
    return refusal(same_criterion([3, 4] if rank else [4, 3]).check_ranks)


def test_heads_in_another_order_are_found(ranks: Ranks) -> None:
    (text, *others) = ranks.run(permuted_heads)
    assert text is not None
    assert "num_prototypes[0] must be the same on all ranks, got 4 on rank 0 and 3 on" in text
    assert others == [text, text]


def what_a_step_sends(rank: int, argument: dict[str, Any]) -> list[list[int]]:
    criterion = same_criterion(
        (3, 4), reduction="global_mean", queue_length=4, memory=argument["memory"]
    )
    if argument["hooked"]:
        criterion.sinkhorn.register_forward_hook(lambda module, given, codes: None)
    sent = []
    for step in range(9):
        with Collectives() as collectives:
            criterion(features(rank + 3 * step)).backward()
        sent.append(collectives.numels)
    return sent


@pytest.mark.parametrize("memory", [("full",) * 3, ("streamed",) * 3, ("full", "streamed", "auto")])
def test_a_step_compares_at_first_and_ever_more_rarely_and_counts_samples(
    ranks: Ranks, memory: tuple[str, ...]
) -> None:
    arguments = [{"memory": of_rank, "hooked": False} for of_rank in memory]
    # The number of samples. Two heads with two code views, in step: the largest mass of each goes
    # with the maximum.
    sums = [2 * (7 + 2), 2 * 7, 2 * 7, 2 * 7]
    for sent in ranks.run(what_a_step_sends, arguments):
        first, *later = sent
        assert first == [RECORD, 1, RECORD, *sums]  # the second by the codes' own first call
        for step, numels in enumerate(later, start=2):
            assert numels == [*([RECORD] if step in (2, 4, 8) else []), 1, *sums]


def test_a_hook_on_the_codes_makes_heads_send_one_by_one(ranks: Ranks) -> None:
    sums = [[2 * (size + 1), 2 * size, 2 * size, 2 * size] for size in (3, 4)]
    for sent in ranks.run(what_a_step_sends, [{"memory": "full", "hooked": True}] * 3):
        first, *later = sent
        assert first == [RECORD, 1, RECORD, *sums[0], *sums[1]]
        for step, numels in enumerate(later, start=2):
            assert numels == [*([RECORD] if step in (2, 4, 8) else []), 1, *sums[0], *sums[1]]


# Prototypes


def bare_beside_ddp(rank: int, argument: dict[str, Any]) -> tuple[int, str | None, str | None]:
    """Train a wrapped encoder with a bare criterion; return the step in which that is found."""
    torch.manual_seed(0)
    encoder = DistributedDataParallel(nn.Linear(D, D).double())
    torch.manual_seed(rank if argument["other start"] else 0)
    criterion = SwAVLoss(D, K, freeze_steps=argument["freeze_steps"]).double()
    asked = refusal(criterion.check_ranks)
    optimizer = torch.optim.SGD([*encoder.parameters(), *criterion.parameters()], lr=0.1)
    for step in range(1, 20):
        optimizer.zero_grad()
        try:
            criterion(encoder(features(rank + 3 * step))).backward()
        except ValueError as error:
            return step, str(error), asked
        optimizer.step()
    return 0, None, asked


@pytest.mark.parametrize(
    ("other_start", "freeze_steps", "found"), [(True, 0, 1), (False, 0, 2), (False, 5, 8)]
)
def test_a_criterion_left_bare_beside_ddp_is_found(
    ranks: Ranks, other_start: bool, freeze_steps: int, found: int
) -> None:
    argument = {"other start": other_start, "freeze_steps": freeze_steps}
    for step, text, asked in ranks.run(bare_beside_ddp, [argument] * 3):
        assert step == found
        assert text is not None
        assert text.startswith("the checksum of the prototypes must be the same on all ranks")
        assert text.endswith("each rank trains its own prototypes")
        assert "wrap SwAVLoss in DistributedDataParallel or fully_shard" in text
        assert asked == (text if other_start else None)


def inside_ddp(rank: int) -> list[str | None]:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(D, D), SwAVLoss(D, K)).double()
    alone = SwAVLoss(D, (K, 3)).double()
    parallels = DistributedDataParallel(model), DistributedDataParallel(alone)
    optimizers = [torch.optim.SGD(parallel.parameters(), lr=0.1) for parallel in parallels]
    for step in range(5):
        for parallel, optimizer in zip(parallels, optimizers, strict=True):
            optimizer.zero_grad()
            parallel(features(rank + 3 * step)).backward()
            optimizer.step()
    return [refusal(model[1].check_ranks), refusal(alone.check_ranks)]


def test_a_criterion_in_ddp_passes_inside_the_model_and_alone(ranks: Ranks) -> None:
    assert ranks.run(inside_ddp) == [[None, None]] * 3


def compiled_and_bare(rank: int) -> tuple[list[str | None], int]:
    backend = CountingBackend()
    torch.manual_seed(rank)
    criterion = SwAVLoss(D, K).double()
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    texts = [refusal(lambda: compiled(features(rank))) for _ in range(2)]
    return [*texts, refusal(criterion.check_ranks)], backend.graphs


@pytest.mark.slow
def test_a_compiled_step_compares_only_when_asked(ranks: Ranks) -> None:
    for texts, graphs in ranks.run(compiled_and_bare):
        assert graphs == 1
        assert texts[:2] == [None, None]
        assert texts[2] is not None


def test_one_process_has_nobody_to_differ_from() -> None:
    same_criterion().check_ranks()


def alone_among_others(rank: int) -> list[str | None]:
    torch.manual_seed(rank)
    criterion = SwAVLoss(D, K, synchronize=False).double()
    return [refusal(lambda: criterion(features(rank))), refusal(criterion.check_ranks)]


def test_who_works_alone_is_compared_only_when_asked(ranks: Ranks) -> None:
    for called, asked in ranks.run(alone_among_others):
        assert called is None
        assert asked is not None


def test_a_part_that_knows_no_processes_is_refused_where_they_matter() -> None:
    criterion = same_criterion(reduction="global_mean")
    criterion.sinkhorn = nn.Identity()  # type: ignore[assignment]
    for call in (criterion.check_ranks, lambda: criterion(features(0))):
        with pytest.raises(TypeError, match="sinkhorn must be a SinkhornKnopp, got Identity"):
            call()


def call_of_shards(rank: int, argument: dict[str, Any]) -> tuple[str | None, bool]:
    """Return what a call is refused with, and whether it has changed nothing."""
    settings = {"queue_length": argument.get("queue_length", 4)}
    criterion = same_criterion(shard_prototypes=True, **settings)
    options: dict[str, Any] = {"return_statistics": argument.get("statistics", False)}
    if argument.get("taught", False):
        options["code_features"] = features(9)[:2]
    text = refusal(lambda: criterion(features(rank), **options))
    empty = criterion.queue is None or len(criterion.queue) == 0
    return text, int(criterion.steps) == 0 and empty


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"queue_length": 5}, r"queue_length must be the same on all ranks .* got \[4, 5, 4\]"),
        ({"queue_length": 0}, r"queue_length must be the same on all ranks .* got \[4, 0, 4\]"),
        ({"statistics": True}, r"return_statistics must be the same on all ranks"),
        ({"taught": True}, r"whether code_features are given must be the same on all ranks"),
    ],
)
def test_calls_of_sharded_prototypes_that_differ_are_refused(
    ranks: Ranks, other: dict[str, Any], text: str
) -> None:
    for found, unchanged in ranks.run(call_of_shards, [{}, other, {}]):
        assert found is not None
        assert re.search(text, found)
        assert unchanged


def losses_by_scale(rank: int) -> list[float]:
    losses = []
    for dtype, scale in (
        (torch.float32, 1.0),
        (torch.float32, 1e38),
        (torch.float64, 1e300),
        (torch.float64, 1e-60),
    ):
        weight = scale * torch.tensor([1.0, 0.5, 0, 2, 1, 1][: 6 - rank], dtype=dtype)
        criterion = same_criterion(reduction="global_mean").float()
        losses.append(criterion(features(rank, 6 - rank).float(), sample_weight=weight).item())
    return losses


def test_the_global_mean_does_not_depend_on_the_scale_of_weights(ranks: Ranks) -> None:
    for first, *others in ranks.run(losses_by_scale):
        np.testing.assert_allclose(others, first, rtol=1e-5)


# Synchronising always


def codes_in_eval(rank: int, scores: np.ndarray) -> np.ndarray:
    return SinkhornKnopp(synchronize="always").eval()(torch.tensor(scores)).numpy()


def details_in_eval(rank: int, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    criterion = same_criterion(synchronize="always").eval()
    _, details = criterion(features(rank, len(scores)), return_details=True)
    return details.scores.numpy(), details.codes.numpy()


def test_always_means_in_eval_too(ranks: Ranks) -> None:
    parts = [np.random.default_rng(size).uniform(-1, 1, (size, K)) for size in (6, 3, 4)]
    codes = np.concatenate(ranks.run(codes_in_eval, parts))
    expected = oracles.sinkhorn(np.concatenate(parts), 0.05, 3)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-12)

    scores, codes = (
        np.concatenate(values, axis=1)
        for values in zip(*ranks.run(details_in_eval, parts), strict=True)
    )
    for view in range(2):
        expected = oracles.sinkhorn(scores[view], 0.05, 3)
        np.testing.assert_allclose(codes[view], expected, rtol=0, atol=1e-12)


def asked_in_a_pair(rank: int) -> list[str | None]:
    pair = dist.new_group([0, 2])
    if rank == 1:
        return []
    torch.manual_seed(rank)
    criterion = SwAVLoss(D, K, process_group=pair).double()
    return [refusal(criterion.check_ranks), refusal(lambda: criterion(features(rank)))]


def test_a_group_compares_its_own(ranks: Ranks) -> None:
    first, stranger, last = ranks.run(asked_in_a_pair)
    assert stranger == []
    assert first == last
    assert all("on rank 2" in text for text in first)
