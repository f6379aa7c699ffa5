"""Statistics on several ranks: each has those of its own samples, with the codes of all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import PrototypeLayer, SwAVLoss, _head_losses
from swavkit.fused import score_blocks
from swavkit.swav_statistics import SwAVStatistics, cluster_statistics
from tests import oracles
from tests.modes import Collectives
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

DIMENSION, VIEWS, STEPS, K = 4, 3, 3, 11
PRIOR = torch.arange(K) % 4 / 2  # some prototypes get nothing
FORMS = ["full", "streamed", "sharded"]
SPLITS = [(4, 4), (5, 2, 6), (8, 0, 3), (0, 0, 9)]

Named = list[dict[str, np.ndarray]]  # of each head


@dataclass(frozen=True)
class Work:
    """What a rank has to compute: features (steps, V, B, D), and weights (steps, B)."""

    features: np.ndarray
    weight: np.ndarray | None = None
    form: str = "full"
    asked: bool = True
    by_details: bool = False
    taught: bool = False
    train: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


@contextmanager
def of_form(form: str) -> Iterator[None]:
    """Let blocks be of few features, and "auto, fused" be fused."""
    limit = 0 if "fused" in form else _head_losses.SCORES_OF_PARTS_ON_CPU
    with (
        patch.multiple(score_blocks, _ENTRIES_OF_A_BLOCK=1, _FEATURES_OF_A_BLOCK=6),
        patch.object(_head_losses, "SCORES_OF_PARTS_ON_CPU", limit),
    ):
        yield


def set_rows(prototypes: nn.Module, seed: int) -> None:
    """Give heads the same rows in every form, also where this rank holds few of them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in prototypes.modules():
        if isinstance(layer, PrototypeLayer):
            rows = torch.randn(layer.num_prototypes, DIMENSION, generator=generator)
            layer.load_state_dict({"weight": rows.double()})


def criterion_of(work: Work) -> SwAVLoss:
    settings = {"sizes": K} | work.settings
    sizes = settings.pop("sizes")
    settings |= (
        {"shard_prototypes": True}
        if work.form == "sharded"
        else {"memory": work.form.split(",")[0]}
    )
    criterion = SwAVLoss(DIMENSION, sizes, **settings).double().train(work.train)
    set_rows(criterion.prototypes, seed=1)
    return criterion


def named(statistics: Any) -> Named:
    """Return the statistics of each head, of one head too."""
    of_heads = (statistics,) if isinstance(statistics, SwAVStatistics) else statistics
    assert all(isinstance(of_head, SwAVStatistics) for of_head in of_heads)
    assert not any(value.requires_grad for of_head in of_heads for value in of_head)
    return [
        {name: value.numpy() for name, value in of_head._asdict().items()} for of_head in of_heads
    ]


def step_by_step(rank: int, work: Work) -> dict[str, Any]:
    """Return statistics, losses, gradients of the features and what was sent."""
    criterion = criterion_of(work)
    teacher: dict[str, Any] = {}
    found: dict[str, Any] = {"statistics": [], "loss": [], "gradient": []}
    with of_form(work.form), Collectives() as sent:
        for step, features in enumerate(torch.tensor(work.features)):
            features.requires_grad_()
            weight = None if work.weight is None else torch.tensor(work.weight[step])
            if work.taught:
                teacher["code_prototypes"] = copy.deepcopy(criterion.prototypes)
                set_rows(teacher["code_prototypes"], seed=2 + step)
                teacher["code_features"] = features.detach()[:2].roll(1, -1)
            asked = {"return_statistics": True} if work.asked and not work.by_details else {}
            if work.by_details:
                asked = {"return_details": True}
            loss = criterion(features, sample_weight=weight, **teacher, **asked)
            if work.by_details:
                loss, details = loss
                of_heads = details if isinstance(criterion.prototypes, nn.ModuleList) else [details]
                statistics: Any = tuple(
                    cluster_statistics(
                        of_head.scores,
                        of_head.codes,
                        temperature=criterion.loss.temperature,
                        sample_weight=weight,
                    )
                    for of_head in of_heads
                )
                found["statistics"].append(named(statistics))
            elif work.asked:
                loss, statistics = loss
                several = isinstance(criterion.prototypes, nn.ModuleList)
                assert isinstance(statistics, tuple if several else SwAVStatistics)
                found["statistics"].append(named(statistics))
            (gradient,) = torch.autograd.grad(loss, features)
            found["loss"].append(loss.item())
            found["gradient"].append(gradient.numpy())
    return found | {"sent": sent.numels, "state": int(criterion.steps)}


def works(samples: Sequence[int], weighted: bool = False, **options: Any) -> list[Work]:
    """Return features, and weights if asked for, that are different on each rank."""
    generator = np.random.default_rng(0)
    found = []
    for count in samples:
        features = generator.normal(size=(STEPS, VIEWS, count, DIMENSION))
        weight = generator.integers(0, 4, (STEPS, count)) / 2 if weighted else None
        if weight is not None:
            features[:, 1][weight == 0] = np.nan
        found.append(Work(features, weight, **options))
    return found


def assert_same(found: Named, expected: Named) -> None:
    assert len(found) == len(expected)
    for of_head, wanted in zip(found, expected, strict=True):
        assert list(of_head) == list(wanted) == list(SwAVStatistics._fields)
        for name, value in of_head.items():
            assert value.shape == wanted[name].shape, name
            assert value.dtype == wanted[name].dtype, name
            np.testing.assert_allclose(value, wanted[name], rtol=1e-9, atol=1e-9, err_msg=name)


def assert_those_of_each_rank_s_details(ranks: Ranks, parts: list[Work]) -> None:
    """Compare with details of all prototypes, and all else with what it is without statistics."""
    results = ranks.run(step_by_step, parts)
    by_details = ranks.run(step_by_step, [replace(p, form="full", by_details=True) for p in parts])
    plain = ranks.run(step_by_step, [replace(part, asked=False) for part in parts])
    for found, expected, without in zip(results, by_details, plain, strict=True):
        for statistics, wanted in zip(found["statistics"], expected["statistics"], strict=True):
            assert_same(statistics, wanted)
        assert len(found["statistics"]) == STEPS
        for name in ("loss", "gradient"):
            np.testing.assert_allclose(found[name], without[name], rtol=0, atol=1e-10)
        assert found["state"] == without["state"] == STEPS
        if parts[0].form != "sharded":  # there the scores of a sample are in parts
            assert found["sent"] == without["sent"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("samples", SPLITS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_each_rank_has_those_of_its_own_samples(
    start_ranks: Callable[[int], Ranks], form: str, samples: tuple[int, ...], weighted: bool
) -> None:
    parts = works(samples, weighted, form=form, settings={"queue_length": 6, "queue_start": 1})
    assert_those_of_each_rank_s_details(start_ranks(len(samples)), parts)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sizes": (7, 2, 1), "queue_length": 5},
        {"sizes": (5,)},
        {"sizes": 2},  # one rank has none of them when they are sharded
        {"sizes": 1},
        {"num_code_views": 1, "reduction": "global_mean"},
        {"num_code_views": 3, "iterations": 1, "freeze_steps": 2},
        {"prototype_weight": PRIOR, "queue_length": 4, "iterations": 5},
        {"sizes": (K, 3), "prototype_weight": [PRIOR, None]},
        {"epsilon": torch.tensor(0.07), "temperature": torch.tensor(0.2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_settings_are_obeyed(ranks: Ranks, form: str, settings: dict[str, Any]) -> None:
    assert_those_of_each_rank_s_details(ranks, works((5, 0, 3), form=form, settings=settings))


@pytest.mark.parametrize("settings", [{"hard": True}, {"tolerance": 0.2, "iterations": 30}])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "sharded"])
def test_codes_made_otherwise_are_those_that_count(
    ranks: Ranks, form: str, settings: dict[str, Any]
) -> None:
    parts = works((5, 0, 3), True, form=form, settings={"queue_length": 6, **settings})
    assert_those_of_each_rank_s_details(ranks, parts)


@pytest.mark.parametrize("sizes", [K, (7, 2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_of_a_teacher_come_the_codes_and_of_the_student_the_scores(
    ranks: Ranks, form: str, sizes: Any
) -> None:
    settings = {"sizes": sizes, "queue_length": 6}
    parts = works((3, 2, 4), form=form, taught=True, settings=settings)
    assert_those_of_each_rank_s_details(ranks, parts)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("samples", [(4, 4), (5, 0, 3)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_they_are_those_of_the_equations(
    start_ranks: Callable[[int], Ranks], form: str, samples: tuple[int, ...], weighted: bool
) -> None:
    parts = works(samples, weighted, form=form)
    criterion = criterion_of(replace(parts[0], form="full"))
    rows = criterion.prototypes.weight.detach().numpy()
    results = start_ranks(len(samples)).run(step_by_step, parts)
    cuts = np.cumsum(samples)[:-1]
    for step in range(STEPS):
        features = np.concatenate([part.features[step] for part in parts], axis=1)
        weight = np.ones(sum(samples))
        if weighted:
            weight = np.concatenate([part.weight[step] for part in parts])
        scores = np.stack([oracles.cosines(view, rows) for view in features])
        codes = np.zeros_like(scores[:2])
        for view in range(2):
            present = weight > 0
            codes[view, present] = oracles.sinkhorn(
                scores[view, present], epsilon=0.05, iterations=3, sample_weight=weight[present]
            )
        for result, own_scores, own_codes, own_weight in zip(
            results,
            np.split(scores, cuts, axis=1),
            np.split(codes, cuts, axis=1),
            np.split(weight, cuts),
            strict=True,
        ):
            expected = oracles.cluster_statistics(own_scores, own_codes, 0.1, own_weight)
            (found,) = result["statistics"][step]
            for name, value in found.items():
                np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank_of_it", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_present_sample_that_is_not_finite_leaves_those_of_all_ranks_finite(
    ranks: Ranks, form: str, rank_of_it: int
) -> None:
    parts = works((5, 0, 3), form=form, settings={"sizes": (7, 2), "queue_length": 6})
    parts[rank_of_it].features[1, 2, 1, 0] = np.nan  # of no code view
    parts[rank_of_it].features[2, 0, 1, 0] = np.inf
    for rank, result in enumerate(ranks.run(step_by_step, parts)):
        count = parts[rank].features.shape[2]
        for step, of_heads in enumerate(result["statistics"]):
            missing = int(rank == rank_of_it and step > 0)
            for of_head in of_heads:
                assert all(np.isfinite(value).all() for value in of_head.values())
                assert of_head["samples"] == count
                assert of_head["prediction_rows"] == VIEWS * count - missing
                assert of_head["assigned"].sum() == 2 * count - missing * (step == 2)
                assert of_head["pairs"] == 4 * count - missing * (step + 1)
                if step < 2:
                    assert of_head["code_rows"] == 2 * count


# Where ranks do not do the same


@pytest.mark.parametrize("form", [form for form in FORMS if form != "sharded"])
def test_one_rank_may_ask_and_others_not(ranks: Ranks, form: str) -> None:
    """Nothing that is sent depends on it."""
    parts = works((5, 2, 6), form=form, settings={"sizes": (7, 2), "queue_length": 6})
    mixed = [replace(part, asked=rank == 1) for rank, part in enumerate(parts)]
    found, expected = ranks.run(step_by_step, mixed), ranks.run(step_by_step, parts)
    assert [bool(result["statistics"]) for result in found] == [False, True, False]
    for statistics, wanted in zip(found[1]["statistics"], expected[1]["statistics"], strict=True):
        assert_same(statistics, wanted)
    for one, other in zip(found, expected, strict=True):
        assert one["sent"] == other["sent"]
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=0, atol=1e-10)


def validated(rank: int, work: Work) -> dict[str, Any] | None:
    return step_by_step(rank, work) if rank == 0 else None


@pytest.mark.parametrize("form", [form for form in FORMS if form != "sharded"])
def test_a_validation_on_one_rank_has_those_of_its_own_codes(ranks: Ranks, form: str) -> None:
    parts = works((5, 2, 6), form=form, train=False)
    found = ranks.run(validated, parts)[0]
    alone = step_by_step(0, replace(parts[0], form="full", by_details=True))
    assert found["sent"] == []
    assert found["state"] == 0
    for statistics, wanted in zip(found["statistics"], alone["statistics"], strict=True):
        assert_same(statistics, wanted)


# Inside DDP, which looks through what a forward returns


class Model(nn.Module):
    """An encoder and its loss, as one module."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(DIMENSION, DIMENSION).double()
        self.criterion = criterion_of(work)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.criterion(self.encoder(inputs), return_statistics=True)


def under_ddp(rank: int, argument: tuple[Work, dict[str, bool]]) -> None:
    work, options = argument
    model = Model(work)
    reference = copy.deepcopy(model)
    parallel = DistributedDataParallel(model, **options)
    for features in torch.tensor(work.features):
        loss, found = parallel(features)
        expected_loss, expected = reference(features)
        assert isinstance(found, tuple)
        for of_head, wanted in zip(found, expected, strict=True):
            assert_same(named((SwAVStatistics(*of_head),)), named((wanted,)))
        torch.testing.assert_close(loss, expected_loss)
        loss.backward()
    assert int(model.criterion.steps) == STEPS


@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str
)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "sharded"])
def test_they_come_through_ddp(
    start_ranks: Callable[[int], Ranks], form: str, options: dict[str, bool]
) -> None:
    parts = works((4, 3), form=form, settings={"sizes": (7, 2), "queue_length": 6})
    start_ranks(2).run(under_ddp, [(part, options) for part in parts])
