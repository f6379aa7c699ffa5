"""The benchmarks measure what they say, against a published form that is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_loss, bench_ranks, bench_sinkhorn, harness, kernels, peers
from benchmarks.__main__ import digest, main, table
from benchmarks.published import published_codes, published_loss, published_step
from swavkit import SwAVLoss, sinkhorn_knopp
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


class Clock:
    """A clock that only calls move."""

    def __init__(self, **durations: float) -> None:
        self.durations = durations
        self.now = 0.0
        self.made: list[str] = []

    def __call__(self) -> float:
        return self.now

    def calls(self) -> harness.Calls:
        return {name: lambda name=name: self.work(name) for name in self.durations}

    def work(self, name: str) -> None:
        self.made.append(name)
        self.now += self.durations[name]


def test_calls_are_timed_in_turn_and_each_begins_a_round() -> None:
    clock = Clock(a=1.0, b=2.0, c=0.5)
    samples = harness.time_interleaved(clock.calls(), seconds=0, least=3, clock=clock)
    # Each is made once more before it is timed.
    assert "".join(clock.made) == "aabbcc" * 2 + "aabbcc" + "bbccaa" + "ccaabb"
    assert samples == {name: dict.fromkeys(range(3), clock.durations[name]) for name in "abc"}


def test_rounds_end_with_the_time_or_at_most() -> None:
    def rounds(seconds: float) -> int:
        clock = Clock(a=1.0)
        return len(
            harness.time_interleaved(clock.calls(), seconds=seconds, most=20, clock=clock)["a"]
        )

    assert rounds(0) == 5
    assert rounds(12) == 12
    assert rounds(1e6) == 20


def test_a_slow_call_rests_in_most_rounds() -> None:
    clock = Clock(ours=1.0, slower=3.0, slowest=100.0)
    samples = harness.time_interleaved(clock.calls(), seconds=60, clock=clock)
    assert list(samples["ours"]) == list(range(60))
    assert list(samples["slower"]) == list(range(0, 60, 3))
    assert list(samples["slowest"]) == list(range(0, 60, 30))


def test_summary_is_the_median_and_the_quartiles() -> None:
    assert harness.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3.0,
        "lower_quartile": 2.0,
        "upper_quartile": 4.0,
    }


def test_ratios_are_taken_round_by_round() -> None:
    baseline = {0: 1.0, 1: 10.0, 2: 3.0, 3: 5.0}
    assert harness.paired_ratios({0: 2.0, 1: 20.0, 3: 10.0}, baseline) == [2.0] * 3


@dataclass(frozen=True)
class Allocation:
    samples: int
    prototypes: int


def prepare_allocation(problem: Allocation, device: torch.device) -> harness.Calls:
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
        "floor": False,
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


def test_each_problem_has_codes_of_its_own() -> None:
    problem = replace(bench_sinkhorn.SUITE.quick, problems=2)
    one, other = problem.scores()
    assert not torch.equal(one, other)
    errors = bench_sinkhorn.errors(problem, bench_sinkhorn.prepare(problem))
    assert errors.pop("geomloss, annealed", 1) > problem.tolerance
    assert max(errors.values()) <= problem.tolerance


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_pot_s_iterations_are_those_of_the_equations(iterations: int, method: str) -> None:
    pytest.importorskip("ot", reason="POT is not installed")
    scores = random_scores(2, 7, 4)
    codes = peers.pot_codes(-scores, 0.05, iterations, method=method)
    for view, code in zip(scores, codes, strict=True):
        expected = oracles.sinkhorn(view.numpy(), 0.05, iterations)
        np.testing.assert_allclose(code.numpy(), expected, rtol=1e-9, atol=1e-15)


def test_geomloss_converges_to_the_plan_of_the_equations() -> None:
    pytest.importorskip("geomloss", reason="geomloss is not installed")
    scores = random_scores(2, 7, 4)
    expected = [oracles.sinkhorn(view.numpy(), 0.2, 400) for view in scores]

    def error(codes: torch.Tensor) -> float:
        return float(np.abs(codes.numpy() - expected).max())

    assert error(peers.geomloss_converged(-scores, 0.2, 400)) < 1e-5
    error_of = {n: error(peers.geomloss_codes(-scores, 0.2, n)) for n in (3, 300, 600)}
    assert error_of[3] > 0.05
    assert error_of[300] < 0.01
    assert error_of[600] < 0.6 * error_of[300]


def test_a_missing_peer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.MODULES, "POT", "no_such_module")
    monkeypatch.setitem(peers.MODULES, "geomloss", "no_such_module")
    assert bench_sinkhorn.SUITE.missing() == ["POT", "geomloss"]
    problem = bench_sinkhorn.SUITE.quick
    assert list(bench_sinkhorn.prepare(problem)) == ["swavkit", "published", "floor"]


def test_an_operation_counts_unless_it_is_a_view_or_memory_without_values() -> None:
    scores = torch.zeros(2, 5, 3, device="meta")
    assert kernels.operations(lambda: torch.exp(scores / 0.05)) == 2
    assert kernels.operations(lambda: scores[0].mT.flatten(0, 0).view(-1, 1, 5)) == 0
    assert kernels.operations(lambda: torch.empty_like(scores).unbind()) == 0
    into = torch.empty_like(scores)
    assert kernels.operations(lambda: torch.mul(scores, 2, out=into).add_(1)) == 2
    assert kernels.operations(lambda: scores.max(dim=-1)) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_kernels_are_counted_without_copies_and_fills() -> None:
    scores = torch.zeros(5, 3, device="cuda")
    assert kernels.kernels(lambda: torch.exp(scores / 0.05)) == 2
    assert kernels.kernels(lambda: scores.cpu()) == 0
    assert kernels.unit(kernels.default_device()).startswith("kernels on ")


def test_launches_are_counted_on_the_path_of_an_accelerator() -> None:
    meta = torch.device("meta")
    found = {(one.contender, one.problems): one.launches for one in kernels.counts(meta)}
    # exp and its quotient, one sum of all, twice three an iteration, and the last product
    assert found["published", 1] == 2 + 2 + 6 * kernels.ITERATIONS + 1
    assert found["published", 2] == 2 * found["published", 1]
    plain, weighted = found["swavkit", 1], found["swavkit, weighted samples", 1]
    assert 0 < plain <= found["swavkit", 2] < 2 * plain
    assert plain <= weighted <= found["swavkit, both weighted", 1]


@pytest.mark.parametrize(("queue_length", "forward"), [(0, 85), (3840, 141)])
def test_a_step_of_eight_views_takes_few_operations(queue_length: int, forward: int) -> None:
    criterion = SwAVLoss(128, 3000, queue_length=queue_length, freeze_steps=1).to("meta")
    features = torch.zeros(8, 64, 128, device="meta", requires_grad=True)
    losses = []
    assert kernels.operations(lambda: losses.append(criterion(features))) <= forward
    assert kernels.operations(losses[0].backward) <= 15


@pytest.mark.parametrize(("problems", "most"), [(1, 35), (2, 40)])
def test_codes_of_present_samples_take_few_operations(problems: int, most: int) -> None:
    scores = torch.zeros(problems, 256, 3000, device="meta")
    present = torch.ones(256, dtype=torch.bool, device="meta")
    assert kernels.operations(lambda: sinkhorn_knopp(scores, sample_weight=present)) <= most


def test_the_published_crops_take_few_launches_and_passes_on_an_accelerator() -> None:
    found = kernels.counts_of_crops(torch.device("meta"))
    assert [(count.height, count.width) for count in found] == list(kernels.SIZES)
    for count in found:
        assert 0 < count.launches <= 930
        assert 0 < count.bytes <= 48e9


def test_bytes_are_those_of_what_operations_take_and_return() -> None:
    scores = torch.zeros(5, 3, device="meta")
    with kernels._Operations() as recorded:
        torch.add(scores, scores[0]).mT.exp_()
        torch.zeros(100).exp()  # on the CPU
    assert recorded.number == 2
    assert recorded.bytes == 4 * (15 + 3 + 15) + 4 * (15 + 15)


@pytest.mark.slow
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
    assert {row["suite"] for row in report["results"]} == {"sinkhorn", "loss", "queue"}
    for package in peers.missing():
        assert f"sinkhorn: {package} is not installed, and is left out" in run.stdout
    for row in report["results"]:
        assert row["contender"] in run.stdout
        other_iterations = row["contender"] == "geomloss, annealed"
        assert row["wrong"] is other_iterations
        if not other_iterations:
            assert row["error"] is None or 0 <= row["error"] < row["tolerance"]
        assert row["seconds"] == harness.summary(row["samples"])
        assert len(row["samples"]) >= 5
        if row["contender"] == "swavkit":
            assert set(row["ratio"].values()) == {1.0}
    assert report["multicrop"]["error"] <= 1e-4
    assert (tmp_path / "multicrop.png").stat().st_size > 0
    for row in report["multicrop"]["alone"] + report["multicrop"]["loaders"]:
        assert row["contender"] in run.stdout
    assert {row["processes"] for row in report["ranks"]} == {1, 2}
    for row in report["ranks"]:
        assert row["contender"] in run.stdout
        assert row["error"] < 1e-4
        assert 0 <= row["communication"] < 1
        assert (row["collectives"] > 0) == (row["numbers"] > 0) == (row["processes"] > 1)
    for count in report["kernels"]["counts"]:
        assert count["contender"] in run.stdout
        assert f" {count['launches']}" in run.stdout
    for count in report["kernels"]["crops"]:
        assert f"{count['height']} × {count['width']}" in run.stdout


def test_the_table_of_a_device_is_that_of_its_result_file() -> None:
    results = json.loads((ROOT / "benchmarks/device.json").read_text())["results"]
    assert digest(results) in (ROOT / "benchmarks/README.md").read_text()


def test_more_processes_than_cores_are_labelled() -> None:
    row = bench_ranks.Row("", 2, 1, "swavkit", 0.0, 1.0, 1.0, 1.0, 0.5, 4, 100)
    assert bench_ranks.cells(row)[1] == "2 (more than cores)"
    assert bench_ranks.cells(replace(row, cores=2))[1] == "2"


def test_an_unknown_suite_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sinkhorm"])
    listed = "sinkhorn, loss, queue, multicrop, kernels, ranks, device"
    message = f"SUITE must be any of {listed}, got 'sinkhorm'"
    assert message in capsys.readouterr().err
