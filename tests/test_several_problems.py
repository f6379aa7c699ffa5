"""A list of scores: independent problems that are solved together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from swavkit import SinkhornKnopp, sinkhorn_knopp
from swavkit.sinkhorn.functional import reference
from tests import oracles
from tests.modes import CountingBackend
from tests.strategies import CodesProblem, codes_problems

SETTINGS: list[dict[str, Any]] = [
    {},
    {"hard": True},
    {"relaxation": 0.1},
    {"tolerance": 0.3, "iterations": 30},
    {"iterations": 8, "validate": True},
]
SHAPES = [(6, 5), (2, 9, 3), (1, 7), (0, 4), (2, 1, 4, 5)]


def scores_of(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator, dtype=dtype) for shape in SHAPES]


@given(codes_problems())
def test_the_reference_is_that_of_the_oracle(problem: CodesProblem) -> None:
    """The scores are divided by ε / 0.5, since the reference is not made for extreme ones."""
    scores = problem.scores * problem.epsilon / 0.5
    codes = reference(torch.tensor(scores), problem.epsilon, problem.iterations)
    expected = oracles.sinkhorn(scores, problem.epsilon, problem.iterations)
    np.testing.assert_allclose(codes.numpy(), expected, rtol=0, atol=1e-10)


def test_the_fast_path_has_the_codes_of_the_reference() -> None:
    scores = scores_of()[0]
    torch.testing.assert_close(sinkhorn_knopp(scores), reference(scores), rtol=0, atol=1e-12)


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_codes_are_those_of_separate_calls(settings: dict[str, Any], container: type) -> None:
    scores = container(scores_of())
    together = sinkhorn_knopp(scores, **settings)
    assert isinstance(together, list)
    for codes, alone in zip(together, scores, strict=True):
        expected = sinkhorn_knopp(alone, **settings)
        torch.testing.assert_close(codes, expected, rtol=0, atol=1e-12)
    module = SinkhornKnopp(**settings)
    for codes, expected in zip(module(scores), together, strict=True):
        torch.testing.assert_close(codes, expected, rtol=0, atol=0)


@given(st.lists(st.booleans(), min_size=5, max_size=5), st.booleans())
def test_each_has_weights_of_its_own_or_none(weighted: list[bool], prior: bool) -> None:
    scores = scores_of()
    sample_weight = [
        torch.arange(shape[-2]) % 3 / 2 if has else None
        for shape, has in zip(SHAPES, weighted, strict=True)
    ]
    prototype_weight = [1.0 + torch.arange(shape[-1]) if prior else None for shape in SHAPES]
    together = sinkhorn_knopp(
        scores, sample_weight=sample_weight, prototype_weight=prototype_weight if prior else None
    )
    for codes, *alone in zip(together, scores, sample_weight, prototype_weight, strict=True):
        values, sample, prototype = alone
        expected = sinkhorn_knopp(values, sample_weight=sample, prototype_weight=prototype)
        torch.testing.assert_close(codes, expected, rtol=0, atol=1e-12)


def test_each_keeps_its_dtype() -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    codes = sinkhorn_knopp([torch.eye(3, dtype=dtype) for dtype in dtypes])
    assert [each.dtype for each in codes] == dtypes


def test_a_list_compiles_to_one_graph() -> None:
    backend = CountingBackend()
    compiled = torch.compile(SinkhornKnopp(), fullgraph=True, backend=backend)
    for _ in range(3):
        scores = [torch.rand(6, 5), torch.rand(2, 9, 3)]
        for codes, expected in zip(compiled(scores), SinkhornKnopp()(scores), strict=True):
            torch.testing.assert_close(codes, expected)
    assert backend.graphs == 1


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"scores": []}, TypeError, "scores must be a torch.Tensor, got list; or a list"),
        ({"scores": [0.5]}, TypeError, "scores must be a torch.Tensor, got list; or a list"),
        ({"scores": [torch.eye(2), torch.ones(3)]}, ValueError, r"scores\[1\] must have at least"),
        ({"scores": [torch.eye(2, dtype=torch.int64)]}, TypeError, r"scores\[0\] must have a fl"),
        (
            {"scores": [torch.eye(2)], "sample_weight": torch.ones(2)},
            ValueError,
            "sample_weight must be None or a list with an entry or None for each of the 1 scores, "
            "got Tensor",
        ),
        (
            {"scores": [torch.eye(2)], "prototype_weight": [None, None]},
            ValueError,
            "prototype_weight must be None or a list .* got 2",
        ),
        (
            {"scores": [torch.eye(2)] * 2, "sample_weight": [None, torch.ones(3)]},
            ValueError,
            r"sample_weight\[1\] must have shape",
        ),
        (
            {"scores": [torch.eye(2), torch.empty(2, 2, device="meta")]},
            ValueError,
            r"scores\[1\] must be on device cpu, got meta",
        ),
    ],
)
def test_bad_lists_are_named(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    for function in (sinkhorn_knopp, lambda **each: SinkhornKnopp()(**each)):
        with pytest.raises(error, match=text):
            function(**arguments)
