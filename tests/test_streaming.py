"""The loss block by block: as the full one and the equations, and what it never holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swavkit import PrototypeLayer, SinkhornKnopp, SwappedPredictionLoss, SwAVLoss, _head_losses
from swavkit.fused import loss as fused_loss
from swavkit.fused import score_blocks
from swavkit.sinkhorn import kernel
from tests import oracles, tolerances
from tests.modes import LargestTensor, RefuseSynchronisation
from tests.states import same, snapshot
from tests.strategies import seeds

DIMENSION, PROTOTYPES = 6, 5


@contextmanager
def blocks_of(rows: int, entries_of_a_part: int = 10**6) -> Iterator[None]:
    """Let a block hold so many rows: of each view's samples the quotient with V, but at least 1."""
    with (
        patch.object(score_blocks, "_ENTRIES_OF_A_BLOCK", 1),  # P is not kept
        patch.object(score_blocks, "_entries_of_a_block", lambda _, prototypes: rows * prototypes),
        patch.object(score_blocks, "_ENTRIES_OF_A_PART", entries_of_a_part),
    ):
        yield


@contextmanager
def memory_for_p(criterion: SwAVLoss, samples: int, missing: int = 0) -> Iterator[None]:
    """Let ``"auto"`` have memory for P of the code views, less so many bytes, and no more."""
    prototypes = sum(head.num_prototypes for head in criterion.prototypes)
    queued = criterion.queue.length if criterion.queue else 0
    dtype = torch.promote_types(next(criterion.parameters()).dtype, torch.float32)
    size = criterion.num_code_views * (samples + queued) * prototypes * dtype.itemsize
    with (
        patch.object(_head_losses, "SCORES_OF_PARTS_ON_CPU", 0),
        patch.object(_head_losses, "SCORES_OF_PARTS", 0),
        patch.object(_head_losses, "_BYTES_OF_KEPT_KERNELS", size - missing),
    ):
        yield


def features_of(views: int = 3, samples: int = 8, **options: Any) -> Tensor:
    options = {"dtype": torch.float64} | options
    return torch.randn(views, samples, DIMENSION, **options)


def streamed_and_full(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
    sizes: Any = PROTOTYPES,
    **settings: Any,
) -> tuple[SwAVLoss, SwAVLoss]:
    """Return two losses with the same state."""
    streamed = SwAVLoss(DIMENSION, sizes, memory="streamed", **settings).to(device, dtype)
    full = copy.deepcopy(streamed)
    full.memory = "full"
    return streamed, full


def results(criterion: SwAVLoss, features: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
    """Return the loss and its gradients: of the features, then of each head's weight."""
    features = features.detach().clone().requires_grad_()
    loss = criterion(features, **inputs)
    return loss.detach(), *torch.autograd.grad(loss, [features, *criterion.parameters()])


def assert_close(found: Any, expected: Any, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# As the full loss and as the equations


@dataclass(frozen=True)
class Problem:
    """Shapes and settings of a few steps, and the precision that they are made in."""

    views: int
    code_views: int
    samples: int
    sizes: tuple[int, ...]
    dimension: int
    queue_length: int
    queue_start: int
    freeze_steps: int
    weights: str
    gradient: str
    temperature: float
    epsilon: float
    iterations: int
    relaxation: float
    tolerance: float | None
    hard: bool
    rows: int
    entries_of_a_part: int
    keeps_p: bool
    seed: int

    def criterion(self) -> SwAVLoss:
        criterion = SwAVLoss(
            self.dimension,
            self.sizes,
            num_code_views=self.code_views,
            temperature=self.temperature,
            epsilon=self.epsilon,
            iterations=self.iterations,
            queue_length=self.queue_length,
            queue_start=self.queue_start,
            freeze_steps=self.freeze_steps,
            memory="auto" if self.keeps_p else "streamed",
            prototype_gradient=self.gradient,
        )
        criterion.sinkhorn.relaxation = self.relaxation
        criterion.sinkhorn.tolerance = self.tolerance
        criterion.sinkhorn.hard = self.hard
        return criterion

    def number_of_parts(self, prototypes: int) -> int:
        """Return in how many parts the samples are taken with so many prototypes."""
        rows = max(self.rows // self.views, 1)
        part = max(self.entries_of_a_part // (self.code_views * prototypes), 1)
        blocks = [min(rows, self.samples - first) for first in range(0, self.samples, rows)]
        return sum(math.ceil(block / part) for block in blocks)


@st.composite
def problems(draw: st.DrawFn, low: bool, discrete: bool) -> Problem:
    """Draw a problem; ``low`` for one that amplifies rounding little, ``discrete`` for decisions
    that rounding could turn.
    """
    views = draw(st.integers(2, 4))
    relaxation = draw(st.sampled_from([math.inf, math.inf, 0.1]))
    tolerance = draw(st.sampled_from([None, 0.3])) if discrete and relaxation == math.inf else None
    return Problem(
        views=views,
        code_views=draw(st.integers(1, min(3, views))),
        samples=draw(st.integers(0, 6)),
        sizes=tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))),
        dimension=draw(st.integers(1, 5)),
        queue_length=draw(st.integers(0, 9)),
        queue_start=draw(st.integers(0, 2)),
        freeze_steps=draw(st.sampled_from([0, 0, 1])),
        weights=draw(st.sampled_from(["none", "bool", "float"])),
        gradient=draw(st.sampled_from(["tangent", "published"])),
        temperature=draw(st.sampled_from([0.5, 1.0] if low else [0.1, 0.5])),
        epsilon=draw(st.sampled_from([0.5, 1.0] if low else [0.05, 0.2])),
        iterations=draw(st.sampled_from([1, 3, 7])),
        relaxation=relaxation,
        tolerance=tolerance,
        hard=discrete and draw(st.booleans()),
        rows=draw(st.integers(1, 24)),
        entries_of_a_part=draw(st.sampled_from([1, 12, 30, 10**6])),
        keeps_p=draw(st.booleans()),
        seed=draw(seeds),
    )


def codes_of_the_equations(
    problem: Problem, scores: np.ndarray, recent: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Return the codes (A, B, K) of scores (A, B, K), with (A, L, K) from the queue."""
    together = np.concatenate([scores, recent], axis=1)
    weight = np.concatenate([weight, np.ones(recent.shape[1])])
    codes = np.zeros(together.shape)
    if weight.sum() > 0:
        for last in range(1, problem.iterations + 1):
            steps = problem.iterations if problem.tolerance is None else last
            for view, of_view in enumerate(together):
                codes[view] = (
                    oracles.sinkhorn(of_view, problem.epsilon, steps, weight)
                    if problem.relaxation == math.inf
                    else oracles.relaxed_sinkhorn(
                        of_view, problem.epsilon, steps, problem.relaxation, weight
                    )
                )
            errors = [oracles.marginal_error(of_view, weight) for of_view in codes]
            if problem.tolerance is None or max(errors) <= problem.tolerance:
                break
    codes = codes[:, : scores.shape[1]]
    if problem.hard:
        if codes.shape[-1] > 1:
            second, first = np.moveaxis(np.sort(codes, axis=-1)[..., -2:], -1, 0)
            assume(np.all((first - second)[:, weight[: scores.shape[1]] > 0] > 1e-6))
        codes = np.eye(codes.shape[-1])[codes.argmax(axis=-1)]
    return codes


def gradient_through_normalisation(
    rows: np.ndarray, gradient: np.ndarray, differentiate_norm: bool = True
) -> np.ndarray:
    """Return the gradient of (N, D) rows, given that of the unit rows."""
    result = np.zeros_like(rows)
    for index, (row, of_unit) in enumerate(zip(rows, gradient, strict=True)):
        length = math.sqrt(row @ row)
        unit = row / length
        along = (of_unit @ unit) * unit if differentiate_norm else 0
        result[index] = (of_unit - along) / length
    return result


def by_the_equations(
    problem: Problem,
    features: np.ndarray,
    prototypes: list[np.ndarray],
    weight: np.ndarray,
    ring: oracles.Ring | None,
    step: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the loss and its gradients as ``results`` does, and each head's codes (A, B, K)."""
    views, samples, _ = features.shape
    slots = [slot for slot in ring.slots if slot is not None] if ring else []
    queued = np.stack(slots, axis=1) if slots and step >= problem.queue_start else None
    loss, to_features, to_prototypes, all_codes = 0.0, np.zeros_like(features), [], []
    for rows in prototypes:
        scores = np.stack([oracles.cosines(view, rows) for view in features])
        recent = np.zeros((problem.code_views, 0, len(rows)))
        if queued is not None:
            recent = np.stack([oracles.cosines(view, rows) for view in queued])
        codes = codes_of_the_equations(problem, scores[: problem.code_views], recent, weight)
        all_codes.append(codes)
        to_prototype = np.zeros_like(rows)
        if weight.sum() > 0:
            loss += oracles.loss(scores, codes, problem.temperature, weight) / len(prototypes)
            to_scores = oracles.loss_gradient(scores, codes, problem.temperature)
            to_scores *= (samples * weight / weight.sum() / len(prototypes))[:, None]
            for view in range(views):
                of_unit = to_scores[view] @ oracles.unit_rows(rows)
                to_features[view] += gradient_through_normalisation(features[view], of_unit)
                of_unit = to_scores[view].T @ oracles.unit_rows(features[view])
                to_prototype += gradient_through_normalisation(
                    rows, of_unit, problem.gradient == "tangent"
                )
        to_prototypes.append(to_prototype * (step >= problem.freeze_steps))
    if ring is not None:
        newest = np.stack([oracles.unit_rows(view) for view in features[: problem.code_views]])
        newest[:, weight == 0] = np.nan  # an absent sample leaves an empty slot
        ring.push(newest)
    return [np.array(loss), to_features, *to_prototypes], all_codes


@dataclass(frozen=True)
class Precision:
    """A dtype of module and features, and perhaps one of autocast."""

    dtype: torch.dtype
    autocast: torch.dtype | None = None

    def __str__(self) -> str:
        return f"{self.dtype}" + (f" under {self.autocast}" if self.autocast else "")

    @property
    def narrowest(self) -> torch.dtype:
        return self.autocast or self.dtype

    def context(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.autocast)


PRECISIONS = [
    *map(Precision, tolerances.DTYPES),
    Precision(torch.float32, torch.bfloat16),
    Precision(torch.float32, torch.float16),
]


@contextmanager
def codes_seen() -> Iterator[list[np.ndarray]]:
    """Give the codes (A, b, K) of each block that the loss is computed of."""
    seen: list[np.ndarray] = []
    original = fused_loss.errors_of_samples

    def spy(scores: Any, codes: list[Tensor], *others: Any) -> Tensor:
        seen.append(torch.stack(list(codes)).double().numpy())
        return original(scores, codes, *others)

    with patch.object(fused_loss, "errors_of_samples", spy):
        yield seen


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_it_is_the_full_loss_and_that_of_the_equations(precision: Precision) -> None:
    dtype, narrowest = precision.dtype, precision.narrowest
    low = narrowest.itemsize == 2

    @settings(max_examples=60 if dtype == torch.float64 else 10)
    @given(problems(low=low, discrete=dtype == torch.float64))
    def check(problem: Problem) -> None:
        generator = torch.Generator().manual_seed(problem.seed)

        def normal(*shape: int) -> Tensor:
            direction = torch.randn(shape, generator=generator, dtype=torch.float64)
            # Gradients go with the inverse of the norm, and so would their errors.
            return (1.5 * direction / direction.norm(dim=-1, keepdim=True)).to(dtype)

        streamed = problem.criterion().to(dtype)
        with torch.no_grad():
            for parameter in streamed.parameters():
                parameter.copy_(normal(*parameter.shape))
        full = copy.deepcopy(streamed)
        full.memory = "full"
        prototypes = [each.detach().double().numpy() for each in streamed.parameters()]
        ring = oracles.Ring(problem.queue_length) if problem.queue_length else None
        atol = (
            tolerances.of_codes(narrowest, epsilon=problem.epsilon, largest=1)
            * (1 / problem.temperature + low / problem.epsilon)
            * 2
        )
        for step in range(3):
            features = normal(problem.views, problem.samples, problem.dimension)
            given_weight, weight = None, np.ones(problem.samples)
            if problem.weights != "none":
                draw = torch.randint(0, 3, (problem.samples,), generator=generator)
                given_weight = draw != 0 if problem.weights == "bool" else draw / 2
                weight = given_weight.double().numpy()
            exact = features.double().clone().numpy()
            features[problem.views // 2 :, weight == 0] = torch.nan
            memory = memory_for_p(streamed, problem.samples) if problem.keeps_p else nullcontext()
            with (
                blocks_of(problem.rows, problem.entries_of_a_part),
                memory,
                precision.context(),
                codes_seen() as blocks,
            ):
                found = results(streamed, features, sample_weight=given_weight)
            with precision.context():
                of_full = results(full, features, sample_weight=given_weight)
            expected, codes = by_the_equations(problem, exact, prototypes, weight, ring, step)

            at_least = torch.promote_types(dtype, torch.float32)
            assert [each.dtype for each in found] == [at_least] + [dtype] * (len(found) - 1)
            assert_close(found, of_full, atol=atol)
            for each, reference in zip(found, expected, strict=True):
                np.testing.assert_allclose(each.double(), reference, rtol=0, atol=atol)
            counts = [problem.number_of_parts(prototypes) for prototypes in problem.sizes]
            assert len(blocks) == sum(counts)
            for count, of_head in zip(counts, codes, strict=True):
                if count == 0:
                    continue
                whole = np.concatenate(blocks[:count], axis=1)
                del blocks[:count]
                present = weight > 0
                np.testing.assert_allclose(
                    whole[:, present], of_head[:, present], rtol=0, atol=atol
                )
            assert same(snapshot(streamed), snapshot(full))
            assert streamed.steps == step + 1
            if ring is not None:
                assert streamed.queue.position == ring.position
                for slot, held in enumerate(ring.slots):
                    assert streamed.queue.valid[slot] == (held is not None)
                    kept = streamed.queue.features[:, slot].double()
                    np.testing.assert_allclose(
                        kept, 0 if held is None else held, rtol=0, atol=tolerances.ATOL[dtype]
                    )

    check()


@pytest.mark.parametrize("samples", [0, 1, 2])
def test_the_queue_may_be_longer_than_a_batch_by_any_factor(
    device: torch.device, samples: int
) -> None:
    """With blocks as they are: one block holds the batch, and the queue takes larger ones."""
    streamed, full = streamed_and_full(device, queue_length=100)
    for criterion in (streamed, full):
        criterion.queue.push(unit(features_of(2, 90, device=device, generator=seeded(device))))
    features = features_of(3, samples, device=device)
    for rows in (256, 12, 1):
        with patch.object(score_blocks, "_FEATURES_OF_A_BLOCK", rows):
            assert_close(results(streamed, features), results(full, features))


def unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


def seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


# What it never holds


@pytest.mark.parametrize("queue_length", [0, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_it_never_holds_the_scores(
    device: torch.device, dtype: torch.dtype, queue_length: int
) -> None:
    views, samples, prototypes, rows = 4, 50, 90, 12
    streamed, full = streamed_and_full(
        device, dtype, prototypes, queue_length=queue_length, freeze_steps=1
    )
    weight = torch.ones(samples, device=device)
    for criterion in (streamed, full):
        with blocks_of(rows):
            criterion(features_of(views, samples, dtype=dtype, device=device))
    sizes = {}
    for criterion in (streamed, full):
        features = features_of(views, samples, dtype=dtype, device=device, requires_grad=True)
        modes = [LargestTensor(each) for each in {dtype, torch.float32}]
        with blocks_of(rows), modes[0], modes[-1]:
            criterion(features, sample_weight=weight).backward()
        sizes[criterion.memory] = max(mode.numel for mode in modes)
    factors = [views * samples, 2 * (samples + queue_length), prototypes]
    assert sizes["streamed"] <= max(rows * prototypes, *(each * DIMENSION for each in factors))
    assert sizes["full"] >= max(views * samples, 2 * (samples + queue_length)) * prototypes


@pytest.mark.parametrize("rows", [1, 2000], ids=["many blocks", "one block"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_very_many_features_add_up(
    device: torch.device, dtype: torch.dtype, rows: int
) -> None:
    """Were they summed in bfloat16, of thousand equal parts not even 300 would arrive.

    Within a block the sum of float16 residuals would be infinite.
    """
    streamed, _ = streamed_and_full(device, dtype, temperature=0.5)
    exact = copy.deepcopy(streamed).double()
    exact.memory = "full"
    centre = features_of(2, 1, device=device)
    features = (centre + 0.1 * features_of(2, 1000, device=device)).to(dtype)
    with blocks_of(rows):
        _, _, found = results(streamed, features)
    _, _, expected = results(exact, features.double())
    error = (found - expected).abs().sum() / expected.abs().sum()
    assert error < 4 * tolerances.ATOL[dtype]


# Which of both it is


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The streamed losses that are computed."""
    seen = []
    original = _head_losses.fused_losses

    def spy(*inputs: Any, **settings: Any) -> list[Tensor]:
        losses = original(*inputs, **settings)
        seen.extend(losses)
        return losses

    monkeypatch.setattr(_head_losses, "fused_losses", spy)
    return seen


@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_auto_is_fused_where_there_are_more_scores_than_a_limit(
    calls: list[Tensor], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, memory: str
) -> None:
    criterion = SwAVLoss(DIMENSION, (5, 7), memory=memory).to(dtype)
    scores = 3 * 8 * (5 + 7)  # of all heads together: neither has too many by itself
    for limit, fused in [(scores - 1, 2), (scores, 0)]:
        monkeypatch.setattr(_head_losses, "SCORES_OF_PARTS_ON_CPU", limit)
        for values in (0.0, 1.0, math.nan):
            calls.clear()
            criterion(torch.full((3, 8, DIMENSION), values, dtype=dtype))
            assert len(calls) == {"full": 0, "streamed": 2, "auto": fused}[memory]


@pytest.mark.parametrize(("memory", "fused"), [("full", 0), ("streamed", 1), ("auto", 1)])
def test_auto_is_fused_with_a_queue(calls: list[Tensor], memory: str, fused: int) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=1, memory=memory)
    criterion(features_of(dtype=torch.float32))
    assert len(calls) == fused


@pytest.mark.parametrize(("bytes_missing", "products"), [(0, 3 + 4), (1, 4 * 3 + 4)])
def test_auto_computes_no_score_of_the_codes_again_where_p_fits(
    monkeypatch: pytest.MonkeyPatch, bytes_missing: int, products: int
) -> None:
    """Or else in each iteration, and before the first."""
    criterion = SwAVLoss(DIMENSION, [PROTOTYPES])
    made = []
    original = score_blocks._product

    def spy(features: Tensor, *others: Any) -> Tensor:
        made.append(features)
        return original(features, *others)

    monkeypatch.setattr(score_blocks, "_product", spy)
    # 3 samples' code views are a block, and 2 samples' views.
    with memory_for_p(criterion, samples=8, missing=bytes_missing), blocks_of(6):
        criterion(features_of(dtype=torch.float32))
    assert len(made) == products


def test_by_default_small_losses_call_the_parts_and_large_ones_are_fused(
    calls: list[Tensor],
) -> None:
    with torch.device("meta"):
        for prototypes, streams in [(3_000, False), (1_000_000, True)]:
            calls.clear()
            SwAVLoss(128, prototypes)(torch.empty(8, 64, 128))
            assert bool(calls) == streams


class Twice(SwappedPredictionLoss):
    """A loss of a user's own."""

    def forward(self, *inputs: Any) -> Tensor:
        return 2 * super().forward(*inputs)


class OwnCodes(SinkhornKnopp):
    """Codes of a user's own."""


class OwnPrototypes(PrototypeLayer):
    """Prototypes of a user's own."""


def validate(criterion: SwAVLoss) -> None:
    criterion.sinkhorn.validate = True


def put_a_forward_onto_the_codes(criterion: SwAVLoss) -> None:
    criterion.sinkhorn.forward = criterion.sinkhorn.forward


LOOKERS: dict[str, Callable[[SwAVLoss], Any]] = {
    "own loss": lambda criterion: setattr(criterion, "loss", Twice()),
    "own codes": lambda criterion: setattr(criterion, "sinkhorn", OwnCodes()),
    "own prototypes": lambda criterion: setattr(
        criterion, "prototypes", OwnPrototypes(DIMENSION, PROTOTYPES)
    ),
    "own forward": put_a_forward_onto_the_codes,
    "hook of one of two heads": lambda criterion: setattr(
        criterion,
        "prototypes",
        nn.ModuleList([PrototypeLayer(DIMENSION, 4), hooked(PrototypeLayer(DIMENSION, 5))]),
    ),
    "hook of the codes": lambda criterion: hooked(criterion.sinkhorn),
    "hook of the loss": lambda criterion: hooked(criterion.loss),
    "validated codes": validate,
}


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("looker", [*LOOKERS, "details"])
def test_where_somebody_looks_at_the_parts_auto_is_full_and_streamed_an_error(
    calls: list[Tensor], monkeypatch: pytest.MonkeyPatch, looker: str
) -> None:
    monkeypatch.setattr(_head_losses, "SCORES_OF_PARTS_ON_CPU", 0)
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=10, memory="streamed").double()
    criterion(features_of())
    assert len(calls) == 1
    calls.clear()
    LOOKERS.get(looker, lambda _: None)(criterion)
    criterion.double()
    full = copy.deepcopy(criterion)
    inputs = {"return_details": True} if looker == "details" else {}
    features = features_of()
    before = snapshot(criterion)
    with pytest.raises(ValueError, match=r"memory must be 'full' or 'auto' for .* got 'streamed'"):
        criterion(features, **inputs)
    assert same(snapshot(criterion), before)
    calls.clear()
    criterion.memory, full.memory = "auto", "full"
    found, expected = criterion(features, **inputs), full(features, **inputs)
    assert not calls
    if looker == "details":
        assert_close(found[1], expected[1])
        found, expected = found[0], expected[0]
    assert_close(found, expected)


# Memory


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of the pieces of memory for blocks."""
    sizes = []
    original = score_blocks.empty

    def spy(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
        sizes.append(math.prod(shape) * dtype.itemsize)
        return original(shape, dtype, like)

    monkeypatch.setattr(score_blocks, "empty", spy)
    monkeypatch.setattr(kernel, "empty", spy)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_heads_share_the_memory_of_a_block(asked_for: list[int], dtype: torch.dtype) -> None:
    needed = {}
    for sizes in [5, 40, 11, (5, 40, 11)]:
        asked_for.clear()
        with blocks_of(6):  # 2 samples of 3 views
            SwAVLoss(DIMENSION, sizes, memory="streamed").to(dtype)(features_of(dtype=dtype))
        needed[sizes] = sum(asked_for)
    # 6 scores, of 2 samples' 3 views or of 3 samples' code views, and P of the latter.
    assert needed[40] == (6 + 6) * 40 * dtype.itemsize
    assert needed[5, 40, 11] == needed[40]
    asked_for.clear()  # a P that is one block stays where it is
    SwAVLoss(DIMENSION, (5, 40, 11), memory="streamed").to(dtype)(features_of(dtype=dtype))
    assert sum(asked_for) == 8 * (3 * 40 + 2 * (5 + 40 + 11)) * dtype.itemsize


@pytest.mark.parametrize("rows", [3, 6, 12, 1000])
def test_heads_that_share_memory_disturb_no_other(device: torch.device, rows: int) -> None:
    """In blocks, and as one that keeps its P; of several dtypes, too."""
    criterion, full = streamed_and_full(device, torch.float32, sizes=(9, 2, 40), queue_length=10)
    for each in (criterion, full):
        each.prototypes[1].double()
    for _ in range(2):
        features = features_of(device=device, dtype=torch.float32)
        with blocks_of(rows):
            found = results(criterion, features)
        for one, other in zip(found, results(full, features), strict=True):
            assert_close(one, other, atol=2e-6)


# Gradients, and who may use them how often


def test_the_gradient_is_that_of_the_value() -> None:
    criterion, _ = streamed_and_full(sizes=(3, 2), queue_length=5)
    criterion(features_of(samples=4))
    criterion.eval()
    criterion.sinkhorn.hard = True  # so that the codes are constants, as they are taken to be
    weight = torch.tensor([1, 0, 2], dtype=torch.float64)

    def loss(features: Tensor, *weights: Tensor) -> Tensor:
        names = [name for name, _ in criterion.named_parameters()]
        state = dict(zip(names, weights, strict=True))
        inputs = {"sample_weight": weight}
        return torch.func.functional_call(criterion, state, features, inputs)

    leaves = [features_of(samples=3), *(1.5 * each.detach() for each in criterion.parameters())]
    with blocks_of(3):
        assert torch.autograd.gradcheck(loss, [each.requires_grad_() for each in leaves])


def test_a_forward_may_be_used_twice(device: torch.device) -> None:
    criterion, _ = streamed_and_full(device)
    features = features_of(device=device, requires_grad=True)
    leaves = [features, criterion.prototypes.weight]
    loss = criterion(features)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(2 * loss + loss, leaves, retain_graph=True)
    assert_close(twice, tuple(3 * each for each in once))
    again = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, again, once))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_two_forwards_may_come_before_a_backward(device: torch.device) -> None:
    streamed, full = streamed_and_full(device, queue_length=10)
    batches = [features_of(device=device) for _ in range(2)]
    for criterion in (streamed, full):
        sum(criterion(features) for features in batches).backward()
    assert_close(streamed.prototypes.weight.grad, full.prototypes.weight.grad)


@pytest.mark.parametrize("low", [None, torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_scaler_finds_the_gradients(
    device: torch.device, low: torch.dtype | None
) -> None:
    criterion = SwAVLoss(64, 100, memory="streamed").to(device)
    exact = copy.deepcopy(criterion).double()
    features = torch.randn(8, 512, 64, device=device)
    leaf = features.clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf, *criterion.parameters()], lr=1.0)
    scaler = torch.amp.GradScaler(device.type)
    with torch.autocast(device.type, dtype=low, enabled=low is not None), blocks_of(8 * 100):
        loss = criterion(leaf)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    _, *expected = results(exact, features.double())
    for found, reference in zip(
        [leaf.grad, criterion.prototypes.weight.grad], expected, strict=True
    ):
        error = (found - reference).abs().sum() / reference.abs().sum()
        assert error < 12 * tolerances.ATOL[low or torch.float32]  # as the scores over τ, mostly


def test_no_gradient_is_formed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []
    original = fused_loss.errors_of_samples

    def spy(*inputs: Any) -> Tensor:
        formed.append(inputs[-1] is not None)
        return original(*inputs)

    monkeypatch.setattr(fused_loss, "errors_of_samples", spy)
    criterion, full = streamed_and_full()
    features = features_of()
    with torch.no_grad():
        loss = criterion(features.requires_grad_())
    assert not loss.requires_grad
    assert formed == [False]
    assert_close(loss, full(features.detach()).detach())
    criterion.requires_grad_(False)
    assert not criterion(features.detach()).requires_grad
    assert formed == [False] * 2
    criterion(features).backward()
    assert_close(features.grad, results(full, features)[1])
    assert criterion.prototypes.weight.grad is None
    criterion.requires_grad_(True)
    criterion(features.detach()).backward()
    assert_close(criterion.prototypes.weight.grad, results(full, features)[2])


@pytest.mark.parametrize("wanted", ["features", "prototypes"])
def test_a_gradient_that_nobody_wants_is_not_formed(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    formed = []
    original = fused_loss._loss

    def spy(*inputs: Any) -> Any:
        loss, gradients, statistics = original(*inputs)
        formed.extend(gradient.numel() for gradient in gradients)
        return loss, gradients, statistics

    monkeypatch.setattr(fused_loss, "_loss", spy)
    streamed, full = streamed_and_full()
    features = features_of().requires_grad_(wanted == "features")
    found = []
    for criterion in (streamed, full):
        weight = criterion.prototypes.weight.requires_grad_(wanted == "prototypes")
        leaf = weight if wanted == "prototypes" else features
        found += torch.autograd.grad(criterion(features), leaf)
    assert_close(*found)
    assert formed == [features.numel() * (wanted == "features"), leaf.numel() * (leaf is weight)]


def test_a_second_derivative_is_refused() -> None:
    criterion, _ = streamed_and_full()
    features = features_of(requires_grad=True)
    for leaf in (features, criterion.prototypes.weight):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(criterion(features), leaf, create_graph=True)


# Limits


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("view", [0, 2])
def test_a_present_sample_that_is_not_finite_is_seen_and_kept_out_of_the_queue(
    device: torch.device, view: int, bad: float, weighted: bool
) -> None:
    streamed, full = streamed_and_full(device, queue_length=10)
    weight = torch.ones(8, device=device) if weighted else None
    features = features_of(device=device)
    features[view, 3, 1] = bad
    with blocks_of(6):
        loss, to_features, to_weight = results(streamed, features, sample_weight=weight)
        assert loss.isnan()
        assert to_weight.isnan().any()  # where a GradScaler looks
        _, of_full, _ = results(full, features, sample_weight=weight)
        assert_close(to_features.nan_to_num(), of_full.nan_to_num())
        assert streamed.queue.rejected == int(view < 2)
        good = features_of(device=device)
        assert_close(
            results(streamed, good, sample_weight=weight),
            results(full, good, sample_weight=weight),
        )
    assert same(snapshot(streamed), snapshot(full))


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("low", [None, torch.float16, torch.bfloat16], ids=str)
def test_zero_rows_have_finite_gradients(
    device: torch.device, low: torch.dtype | None, dtype: torch.dtype
) -> None:
    streamed, _ = streamed_and_full(device, dtype, queue_length=10)
    with torch.no_grad():
        streamed.prototypes.weight[1] = 0
    for _ in range(2):
        features = features_of(dtype=dtype, device=device)
        features[:, 2] = 0
        autocast = torch.autocast(device.type, dtype=low, enabled=low is not None)
        with blocks_of(6), autocast:
            loss, to_features, to_weight = results(streamed, features)
        assert loss.isfinite()
        assert to_features.isfinite().all()
        assert to_weight.isfinite().all()
        assert not to_features[:, 2].any()
        assert not to_weight[1].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 10])
def test_a_batch_of_nobody_gives_zero_connected_to_the_graph(
    device: torch.device, queue_length: int, weighted: bool
) -> None:
    streamed, _ = streamed_and_full(device, queue_length=queue_length)
    streamed(features_of(device=device))
    batches = [(features_of(samples=0, device=device), torch.ones(0, device=device))]
    absent = features_of(device=device)
    absent[1, 2] = math.nan
    batches += [(absent, torch.zeros(8, device=device))] * weighted
    for features, weight in batches:
        with blocks_of(6):
            found = results(streamed, features, sample_weight=weight if weighted else None)
        assert not any(each.any() for each in found)


@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (2, 3, 97, 1), (5, 1, 2, 7)], ids=str)
def test_sizes_of_one_and_what_nothing_divides(sizes: tuple[int, ...]) -> None:
    views, samples, prototypes, rows = sizes
    streamed, full = streamed_and_full(sizes=prototypes)
    features = features_of(views, samples)
    with blocks_of(rows):
        assert_close(results(streamed, features), results(full, features))


def test_a_block_is_of_one_sample_at_least_and_of_a_limited_size() -> None:
    streamed, full = streamed_and_full(sizes=50)
    features = features_of(4, 9)
    patches = {
        "_ENTRIES_OF_A_BLOCK": 1,
        "_FEATURES_OF_A_BLOCK": 10**6,
        "_MOST_ENTRIES_OF_A_BLOCK": 1,
    }
    with patch.multiple(score_blocks, **patches), LargestTensor(torch.float64) as mode:
        found = results(streamed, features)
    assert mode.numel == max(4 * 50, 50 * DIMENSION, features.numel())
    assert_close(found, results(full, features))


@pytest.mark.parametrize("prototypes", [3_000, 200_000])
def test_elsewhere_than_on_a_cpu_a_block_is_as_large_as_its_limit(prototypes: int) -> None:
    views, samples = 8, 4_096
    features = torch.empty(views, samples, DIMENSION, device="meta")
    directions = torch.empty(prototypes, DIMENSION, device="meta")
    scores = score_blocks.BlockScores(features, directions, None, None, 2)
    most = score_blocks._MOST_ENTRIES_OF_A_BLOCK
    of_a_sample = views * prototypes
    for rows, parts in scores.blocks[:-1]:
        assert parts == [rows]
        assert most - of_a_sample < (rows.stop - rows.start) * of_a_sample <= most


def test_a_forward_in_eval_changes_no_state(device: torch.device) -> None:
    streamed, full = streamed_and_full(device, queue_length=10, queue_start=1, freeze_steps=2)
    for criterion in (streamed, full):
        criterion(features_of(device=device, generator=seeded(device)))
        criterion.eval()
    before = snapshot(streamed)
    features = features_of(device=device)
    with blocks_of(6):
        assert_close(streamed(features), full(features))
        streamed(features_of(device=device), sample_weight=torch.ones(8, device=device))
        assert same(snapshot(streamed), before)
        streamed.train()(features)
    assert not same(snapshot(streamed), before)


# Where it runs


@pytest.mark.parametrize("weighted", [False, True])
def test_no_value_is_read_on_the_host(device: torch.device, weighted: bool) -> None:
    streamed, _ = streamed_and_full(
        device, sizes=(5, 3), queue_length=10, queue_start=1, freeze_steps=2, iterations=7
    )
    weight = torch.tensor([1, 0, 1, 1, 1, 1, 1, 2.0], device=device) if weighted else None
    for mode in (True, True, True, False):
        streamed.train(mode)
        features = features_of(device=device, requires_grad=True)
        with RefuseSynchronisation(), blocks_of(6):
            streamed(features, sample_weight=weight).backward()


@pytest.mark.parametrize("rows", [6, 1000])
def test_shapes_and_dtypes_are_known_without_values(rows: int) -> None:
    with torch.device("meta"), blocks_of(rows):
        criterion = SwAVLoss(DIMENSION, (5, 3), queue_length=10, memory="streamed")
        features = torch.empty(3, 8, DIMENSION, requires_grad=True)
        loss = criterion(features, sample_weight=torch.empty(8, dtype=torch.bool))
        loss.backward()
    assert loss.shape == ()
    assert features.grad.shape == features.shape
    tensors = [loss, features.grad, *criterion.state_dict().values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
