"""The benchmarks measure what they say, against a published form that is right."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_loss, bench_sinkhorn, harness
from benchmarks.__main__ import table
from benchmarks.published import published_codes, published_loss, published_step
from tests import oracles

ROOT = Path(__file__).resolve().parent.parent


def random_scores(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_published_codes_are_those_of_the_oracle(iterations: int, epsilon: float) -> None:
    scores = random_scores(7, 4)
    expected = oracles.sinkhorn(scores.numpy(), epsilon, iterations)
    codes = published_codes(scores, epsilon, iterations)
    np.testing.assert_allclose(codes.numpy(), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("code_views", [1, 2, 3])
def test_published_loss_is_that_of_the_oracle(code_views: int) -> None:
    scores = random_scores(3, 5, 4)
    codes = random_scores(code_views, 5, 4).softmax(dim=-1)
    expected = oracles.loss(scores.numpy(), codes.numpy(), 0.3)
    loss = published_loss(scores, list(codes), 0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_published_step_normalises_the_prototypes_in_place() -> None:
    features, weight = bench_loss.Problem(6, 5, views=3).inputs()
    longer = 2 * weight
    torch.testing.assert_close(
        published_step(features, longer, 2), published_step(features, weight, 2)
    )
    torch.testing.assert_close(longer, weight)


def test_calls_are_timed_in_turn_and_each_begins_a_round() -> None:
    ticks = itertools.count()
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    samples = harness.time_interleaved(calls, seconds=0, least=3, clock=lambda: float(next(ticks)))
    assert "".join(made) == "abcabc" + "abcbcacab"
    assert samples == {name: [1.0] * 3 for name in "abc"}


def test_rounds_end_with_the_time_or_at_most() -> None:
    ticks = itertools.count()
    calls = {"a": lambda: None}

    def rounds(seconds: float) -> int:
        samples = harness.time_interleaved(
            calls, seconds=seconds, most=20, clock=lambda: float(next(ticks))
        )
        return len(samples["a"])

    assert rounds(0) == 5
    assert 5 < rounds(24) < 20
    assert rounds(1e6) == 20


def test_summary_is_the_median_and_the_quartiles() -> None:
    assert harness.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
    }


def test_ratios_are_taken_round_by_round() -> None:
    assert harness.paired_ratios([2.0, 20.0, 6.0], [1.0, 10.0, 3.0]) == [2.0] * 3


@dataclass(frozen=True)
class Allocation:
    samples: int
    prototypes: int


def prepare_allocation(problem: Allocation) -> harness.Calls:
    thrice = torch.ones(3, problem.samples, problem.prototypes)  # must not count
    given = thrice[0].clone()
    return {"one more": lambda: given + 1, "two more": lambda: (given + 1) + 1}


@pytest.mark.skipif(not harness.PEAK_RESET.exists(), reason="this system counts no peak of memory")
@pytest.mark.parametrize(("name", "copies"), [("one more", 1), ("two more", 2)])
def test_extra_memory_is_what_a_call_takes_beyond_its_inputs(name: str, copies: int) -> None:
    problem = Allocation(samples=4096, prototypes=4096)
    size = 4 * problem.samples * problem.prototypes
    extra = harness.extra_memory(prepare_allocation, problem, name)
    assert extra == pytest.approx(copies * size, rel=0.05)


def test_another_contender_s_wrong_answer_stands_in_its_row() -> None:
    problem = bench_sinkhorn.Problem(64, 300, "bfloat16")
    rows = harness.measure(bench_sinkhorn.SUITE, problem, seconds=0)
    assert {row["contender"]: row["wrong"] for row in rows} == {
        "swavkit": False,
        "published": True,
        "published, float32 inside": False,
    }
    assert "wrong" in table(rows).splitlines()[2]


def test_our_wrong_answer_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sinkhorn, "sinkhorn_knopp", lambda scores: scores.softmax(dim=-1))
    with pytest.raises(ValueError, match="swavkit must be within"):
        harness.measure(bench_sinkhorn.SUITE, bench_sinkhorn.SUITE.quick, seconds=0)


def test_a_wrong_gradient_is_an_error() -> None:
    problem = bench_loss.SUITE.quick
    calls = dict(bench_loss.prepare(problem))
    loss, of_features, of_weight = calls["published"]()
    for wrong in (
        (loss * 1.01, of_features, of_weight),
        (loss, -of_features, of_weight),
        (loss, of_features, of_weight.roll(1, 0)),
    ):
        calls["published"] = lambda wrong=wrong: wrong
        errors = bench_loss.errors(problem, calls)
        assert errors["swavkit"] < problem.tolerance < errors["published"]


def test_the_quick_run_reports_what_it_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "benchmarks.png").stat().st_size > 0

    report = json.loads((tmp_path / "benchmarks.json").read_text())
    assert report["quick"] is True
    assert report["environment"]["threads"] == 1
    assert report["environment"]["torch"] == torch.__version__
    assert {row["suite"] for row in report["results"]} == {"sinkhorn", "loss"}
    for row in report["results"]:
        assert row["contender"] in run.stdout
        assert row["error"] is None or 0 <= row["error"] < row["tolerance"]
        assert row["wrong"] is False
        assert row["seconds"] == harness.summary(row["samples"])
        assert len(row["samples"]) >= 5
        if row["contender"] == "swavkit":
            assert set(row["ratio"].values()) == {1.0}


def test_an_unknown_suite_is_one_line() -> None:
    command = [sys.executable, "-m", "benchmarks", "sinkhorm"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "SUITE must be any of sinkhorn, loss, got 'sinkhorm'" in run.stderr
