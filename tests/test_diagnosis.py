"""Diagnoses: each rule at both sides of its threshold, and real trainings with one fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from swavkit import ClusterMonitor, SwAVLoss, SwAVStatistics, cluster_statistics
from swavkit.monitor import diagnosis
from swavkit.monitor.diagnosis import check_sizes, diagnose

K = 100
LN_K = math.log(K)

# The figures of a healthy run of docs/examples/minimal.py, rounded.
HEALTHY = {
    "perplexity": 90.0,
    "used": 1.0,
    "code_perplexity": 96.0,
    "code_entropy": 1.1,
    "prediction_entropy": 2.6,
    "marginal_error": 0.8,
    "agreement": 0.38,
    "loss": 2.4,
    "below_ln_k": 2.2,
    "above_code_entropy": 1.3,
    "duplicates": 0.0,
    "feature_std": 0.95,
    "effective_rank": 25.0,
    "nonfinite": 0.0,
}


def names(figures: dict[str, float], **settings: Any) -> list[str]:
    known: dict[str, Any] = {"num_prototypes": K, "samples": 64, "steps": 500, **settings}
    return [found.name for found in diagnose(HEALTHY | figures, **known)]


# Pure rules


def test_healthy_figures_give_no_diagnosis() -> None:
    assert names({}) == []
    assert names({"marginal_error": 1.2, "code_entropy": 0.72 * LN_K}) == []


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("non_finite", {"nonfinite": 1.0}, {"nonfinite": 0.0}),
        ("features_of_rank_one", {"effective_rank": 1.4}, {"effective_rank": 1.6}),
        ("features_of_rank_one", {"feature_std": 0.09}, {"feature_std": 0.11}),
        ("collapsed", {"perplexity": 10.5}, {"perplexity": 11.0}),
        ("stuck_at_ln_k", {"loss": 0.985 * LN_K}, {"loss": 0.975 * LN_K}),
        ("codes_near_uniform", {"code_entropy": 0.96 * LN_K}, {"code_entropy": 0.94 * LN_K}),
        ("dead_prototypes", {"used": 0.89}, {"used": 0.91}),
        ("duplicates", {"duplicates": 6.0}, {"duplicates": 5.0}),
    ],
)
def test_each_rule_has_two_sides(name: str, bad: dict[str, float], good: dict[str, float]) -> None:
    assert names(bad) == [name]
    assert names(good) == []


def test_one_hot_codes_are_a_fault_only_if_nothing_is_learned() -> None:
    assert names({"code_entropy": 0.0}) == []
    assert names({"code_entropy": 0.0, "loss": 15.0}) == ["codes_one_hot", "stuck_at_ln_k"]
    assert names({"code_entropy": 0.16 * LN_K, "loss": 15.0}) == ["stuck_at_ln_k"]


def test_agreement_is_compared_with_chance() -> None:
    stuck = {"loss": LN_K, "perplexity": 50.0}
    assert names({**stuck, "agreement": 0.02 + 0.009}) == ["views_disagree", "stuck_at_ln_k"]
    assert names({**stuck, "agreement": 0.02 + 0.011}) == ["stuck_at_ln_k"]
    assert names({"agreement": 0.0}) == []  # with a loss far below ln K


def test_rules_hold_for_other_numbers_of_prototypes() -> None:
    large = {"num_prototypes": 3000, "samples": 4096}
    scaled = {"perplexity": 2500.0, "loss": 6.0, "code_entropy": 4.0}
    assert names(scaled, **large) == []
    assert names({**scaled, "loss": 8.006}, **large) == ["stuck_at_ln_k"]
    assert names({**scaled, "perplexity": 250.0}, **large) == ["collapsed"]
    assert names({**scaled, "duplicates": 149.0}, **large) == []
    assert names({**scaled, "duplicates": 151.0}, **large) == ["duplicates"]
    two = {"perplexity": 1.9, "loss": 0.5, "code_entropy": 0.3}
    assert names(two, num_prototypes=2) == []
    assert names({**two, "perplexity": 1.05}, num_prototypes=2) == ["collapsed"]
    assert names({}, num_prototypes=1) == []


def test_the_worst_comes_first() -> None:
    everything = {
        "nonfinite": 3.0,
        "effective_rank": 1.0,
        "perplexity": 2.0,
        "agreement": 0.6,
        "code_entropy": 4.6,
        "loss": 4.6,
        "used": 0.1,
        "duplicates": 90.0,
    }
    assert names(everything, samples=32) == [
        "non_finite",
        "features_of_rank_one",
        "collapsed",
        "codes_near_uniform",
        "stuck_at_ln_k",
        "dead_prototypes",
        "duplicates",
        "too_few_samples",
    ]


def test_absent_figures_and_nan_say_nothing() -> None:
    settings: dict[str, Any] = {"num_prototypes": K, "samples": 64, "steps": 500}
    assert diagnose({}, **settings) == []
    assert diagnose(dict.fromkeys(HEALTHY, math.nan), **settings) == []


def test_the_text_has_the_figures_and_remedies_are_ranked() -> None:
    stuck = diagnose(HEALTHY | {"loss": 4.6}, num_prototypes=K, samples=64, steps=500)[0]
    assert stuck.text == "loss 4.60 is ln K = 4.61 for the last 100 steps"
    assert "0.03" in stuck.remedies[0]
    above = diagnose(HEALTHY | {"loss": 9.0}, num_prototypes=K, samples=64, steps=500)[0]
    assert above.text == "loss 9.00 is above ln K = 4.61 for the last 100 steps"


# Evidence


def test_a_young_training_is_not_judged() -> None:
    stuck = {"loss": LN_K}
    assert names(stuck, steps=199) == []
    assert names(stuck, steps=200) == ["stuck_at_ln_k"]
    assert names({"nonfinite": 1.0}, steps=1) == ["non_finite"]
    assert names({}, steps=1, samples=16) == ["too_few_samples"]


def test_the_counter_of_the_criterion_survives_a_reset_of_the_monitor() -> None:
    criterion = SimpleNamespace(steps=torch.tensor(1000), queue=None)
    assert names({"loss": LN_K}, steps=50, criterion=criterion) == ["stuck_at_ln_k"]
    assert names({"loss": LN_K}, steps=49, criterion=criterion) == []


def test_prototypes_that_few_samples_cannot_reach_are_not_called_dead() -> None:
    few = {"used": 0.2, "perplexity": 600.0, "code_entropy": 4.0, "loss": 5.0}
    large = {"num_prototypes": 3000, "samples": 1500}
    assert names(few, window=7, **large) == []  # 10,500 samples for 3,000 prototypes
    assert names(few, window=8, **large) == []  # a window below 50 steps
    assert names(few, window=100, **large) == ["dead_prototypes"]
    for used, dead in ((0.9, False), (0.87, True)):  # 12,000 samples reach 98 %
        least = {"used": used, "perplexity": 2000.0}
        found = names(least, num_prototypes=3000, samples=120, window=100)
        assert ("dead_prototypes" in found) is dead
    # 1,600 samples reach at most 1,600 of 10,000 prototypes; a perplexity of 800 is no collapse.
    sizes = {"num_prototypes": 10_000, "samples": 16}
    assert names({"perplexity": 800.0, "used": 0.1}, **sizes) == ["too_few_samples"]


# Sizes


def test_the_paper_and_the_examples_have_enough_samples() -> None:
    assert check_sizes(4096, 3000) == []
    assert check_sizes(64, 3000, processes=64) == []
    assert check_sizes(256, 3000, queue_length=3840) == []
    assert check_sizes(64, 3000, processes=4, queue_length=960) == []
    assert check_sizes(64, 100) == []


@pytest.mark.parametrize("sizes", [(256, 3000), (16, 100), (49, 100)])
def test_too_few_samples_are_found(sizes: tuple[int, int]) -> None:
    [found] = check_sizes(*sizes)
    assert found.name == "too_few_samples"
    assert str(sizes[0]) in found.text
    assert str(sizes[1]) in found.text


def test_a_queue_of_the_criterion_counts() -> None:
    criterion = SwAVLoss(8, K, queue_length=40)
    assert names({}, samples=16, criterion=criterion) == []
    assert names({}, samples=16, criterion=SwAVLoss(8, K)) == ["too_few_samples"]


@pytest.mark.parametrize("known", [False, True])
def test_without_the_criterion_the_text_says_that_a_queue_is_unknown(known: bool) -> None:
    criterion = SwAVLoss(8, K) if known else None
    [found] = diagnose(HEALTHY, num_prototypes=K, samples=16, steps=500, criterion=criterion)
    assert ("a queue counts in diagnose(criterion) only" in found.text) is not known


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        check_sizes(0, K)
    with pytest.raises(ValueError, match="num_prototypes must be at least 1, got 0"):
        check_sizes(64, 0)
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        check_sizes(64, K, processes=0)
    with pytest.raises(ValueError, match="queue_length must be at least 0, got -1"):
        check_sizes(64, K, queue_length=-1)
    with pytest.raises(TypeError, match="batch_size must be an int, got float"):
        check_sizes(64.0, K)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        names({}, steps=-1)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        names({}, window=0)
    with pytest.raises(ValueError, match="samples must be a finite number, got inf"):
        names({}, samples=math.inf)
    with pytest.raises(TypeError, match="figures must be a mapping, got list"):
        diagnose([], num_prototypes=K, samples=64, steps=1)  # type: ignore[arg-type]


# Ranks


def test_local_codes_are_found_in_a_job_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    local = SwAVLoss(8, K, synchronize=False)
    assert names({}, criterion=local) == []  # one rank
    monkeypatch.setattr(diagnosis, "participants", lambda group, synchronize: "a group of four")
    monkeypatch.setattr(diagnosis, "rank_and_size", lambda group: (0, 4))
    assert names({}, criterion=SwAVLoss(8, K), processes=4) == []
    assert names({}, criterion=local, samples=256, processes=4) == ["local_codes"]
    # Of 64 samples, local codes see 16.
    assert names({}, criterion=local, processes=4) == ["local_codes", "too_few_samples"]
    assert names({}, criterion=SwAVLoss(8, K, queue_length=10), samples=16, processes=4) == []
    # Of a monitor of this rank alone.
    assert names({}, criterion=SwAVLoss(8, K), samples=16) == []
    assert names({}, criterion=SwAVLoss(8, K), samples=10) == ["too_few_samples"]


# The queue


def test_the_queue_rules_have_two_sides() -> None:
    queue = {"queued": 16.0, "queue_std": 1.0, "queue_drift": 0.1}
    assert names(queue) == []
    assert names({**queue, "queue_std": 0.31}) == []
    assert names({**queue, "queue_std": 0.29}) == ["queue_alike"]
    assert names({**queue, "queue_drift": 0.49, "used": 0.8}) == ["dead_prototypes"]
    assert names({**queue, "queue_drift": 0.51, "used": 0.8}) == ["queue_stale", "dead_prototypes"]
    assert names({**queue, "queue_drift": 0.51, "loss": LN_K}) == ["stuck_at_ln_k", "queue_stale"]
    assert names({**queue, "queue_drift": 2.0}) == []  # without its effect
    alike = {**queue, "queue_std": 0.01}
    assert names(alike) == ["queue_alike"]
    assert names({**alike, "queued": 15.0}) == []
    assert names(alike, steps=100) == []


# Heads


def test_a_loss_of_several_heads_is_compared_with_the_mean_of_their_ln_k() -> None:
    criterion = SwAVLoss(8, [K, 10])
    chance = (LN_K + math.log(10)) / 2
    good = {"perplexity": 9.0, "code_entropy": 1.0, "loss": 0.97 * chance}
    assert good["loss"] > math.log(10)
    assert names(good, num_prototypes=10, criterion=criterion) == []
    for size in (10, K):
        figures = {"loss": chance, "perplexity": 0.9 * size, "code_entropy": 0.5 * math.log(size)}
        assert names(figures, num_prototypes=size, criterion=criterion) == ["stuck_at_ln_k"]


# Real trainings with one fault. K = 50 on the digits of scikit-learn, 200 steps.

SETTINGS: dict[str, Any] = {"feature_dim": 32, "num_prototypes": 50, "epsilon": 0.03}
BATCH, STEPS = 64, 200


@cache
def distorted_digits() -> Tensor:
    """Return four distorted copies of all digits, (4, N, 64)."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
    copies = digits.repeat(4, 1, 1, 1)
    noise = 0.1 * torch.randn(len(copies), 2, 3, generator=generator)
    grid = F.affine_grid(torch.eye(2, 3) + noise, list(copies.shape), align_corners=False)
    copies = F.grid_sample(copies, grid, align_corners=False)
    copies = copies + 0.1 * torch.randn(copies.shape, generator=generator)
    return copies.view(4, len(digits), 64)


def wrong_step(criterion: SwAVLoss, features: Tensor, form: str) -> tuple[Tensor, SwAVStatistics]:
    """Return loss and statistics of a training loop that is wrong in the way of ``form``."""
    if form == "softmax codes":
        scores = criterion.prototypes(features)
        codes = torch.softmax(scores.detach() / criterion.sinkhorn.epsilon, dim=-1)
    else:
        scores = features @ criterion.prototypes.weight.mT
        codes = criterion.sinkhorn(scores.detach())
    return criterion.loss(scores, codes), cluster_statistics(scores.detach(), codes)


def train(
    *,
    change: Callable[[SwAVLoss], None] | None = None,
    after: Callable[[nn.Module], nn.Module] | None = None,
    at_step: tuple[int, Callable[[SwAVLoss, Tensor], None]] | None = None,
    mixed_views: bool = False,
    broken_image: bool = False,
    form: str = "",
    steps: int = STEPS,
    seed: int = 0,
    **settings: Any,
) -> dict[int, list[str]]:
    """Train a network of two layers, and return what is found at steps 200, 250, ... and last."""
    torch.manual_seed(seed)
    network: nn.Module = nn.Sequential(
        nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32)
    )
    network = after(network) if after else network
    criterion = SwAVLoss(**{**SETTINGS, **settings})
    monitor = ClusterMonitor(criterion.prototypes.num_prototypes)
    if change:
        with torch.no_grad():
            change(criterion)
    optimizer = torch.optim.AdamW([*network.parameters(), *criterion.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=100)
    digits = distorted_digits()
    found = {}
    for step in range(1, steps + 1):
        images = torch.randint(digits.shape[1], (BATCH,))
        views = digits[torch.randperm(4)[:2]][:, images]
        if mixed_views:
            views[1] = views[1, torch.randperm(BATCH)]
        if broken_image:
            views[0, 0, 0] = math.nan
        features = network(views.flatten(0, 1)).view(2, BATCH, -1)
        if form:
            loss, statistics = wrong_step(criterion, features, form)
        else:
            loss, statistics = criterion(features, return_statistics=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        monitor.update(statistics, loss=loss, features=features, prototypes=criterion.prototypes)
        if at_step and step == at_step[0]:
            at_step[1](criterion, features.detach())
        if step == steps or step in range(STEPS, steps, 50):
            found[step] = [diagnosis.name for diagnosis in monitor.diagnose(criterion)]
    return found


def worst(**faults: Any) -> list[str]:
    """Return what is found after the last step."""
    return [*train(**faults).values()][-1]


@pytest.mark.parametrize("settings", [{}, {"queue_length": 256}], ids=["plain", "queue"])
def test_a_healthy_training_gives_no_diagnosis(settings: dict[str, int]) -> None:
    assert train(steps=300, **settings) == {200: [], 250: [], 300: []}


@pytest.mark.slow
def test_a_large_epsilon_makes_codes_uniform() -> None:
    assert worst(epsilon=0.3) == ["codes_near_uniform", "stuck_at_ln_k"]


@pytest.mark.slow
def test_softmax_codes_collapse() -> None:
    assert worst(form="softmax codes")[0] == "collapsed"


@pytest.mark.slow
def test_scores_that_are_no_cosines_make_codes_one_hot() -> None:
    def enlarge(criterion: SwAVLoss) -> None:
        criterion.prototypes.weight.mul_(10)

    assert worst(form="raw scores", change=enlarge)[0] == "codes_one_hot"


@pytest.mark.slow
def test_views_of_different_images_disagree() -> None:
    found = worst(mixed_views=True)
    assert found[0] == "views_disagree"
    assert "stuck_at_ln_k" in found


@pytest.mark.slow
def test_a_bottleneck_of_one_gives_features_of_rank_one() -> None:
    def narrow(network: nn.Module) -> nn.Module:
        return nn.Sequential(network, nn.Linear(32, 1, bias=False), nn.Linear(1, 32, bias=False))

    assert worst(after=narrow)[0] == "features_of_rank_one"


class Offset(nn.Module):
    """Adds to unit features ten times their norm in one direction."""

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) + F.pad(features.new_tensor([10.0]), (0, 31))


@pytest.mark.slow
def test_a_large_common_offset_gives_features_of_rank_one() -> None:
    found = worst(after=lambda network: nn.Sequential(network, Offset()))
    assert found[0] == "features_of_rank_one"
    assert "codes_near_uniform" in found


@pytest.mark.slow
def test_prototypes_far_from_all_features_are_dead() -> None:
    def turn_away(criterion: SwAVLoss) -> None:
        criterion.prototypes.weight.abs_()[:15].neg_()

    found = worst(
        change=turn_away,
        after=lambda network: nn.Sequential(network, nn.ReLU()),
        freeze_steps=STEPS,
    )
    assert "dead_prototypes" in found


@pytest.mark.slow
def test_copied_prototypes_are_duplicates() -> None:
    def copy(criterion: SwAVLoss) -> None:
        criterion.prototypes.weight[:5] = criterion.prototypes.weight[5:10]

    assert worst(change=copy) == ["duplicates"]


def stop_the_queue(criterion: SwAVLoss, features: Tensor) -> None:
    assert criterion.queue is not None
    criterion.queue.push = lambda *_, **__: None  # type: ignore[method-assign]


def fill_the_queue(criterion: SwAVLoss, features: Tensor) -> None:
    stop_the_queue(criterion, features)
    assert criterion.queue is not None
    shape = criterion.queue.features.shape
    one = F.normalize(features[0, 0], dim=0)
    criterion.queue.features = F.normalize(one + 0.02 * torch.randn(shape), dim=-1)


@pytest.mark.slow
def test_a_queue_that_is_not_refreshed_is_stale() -> None:
    found = worst(queue_length=256, at_step=(10, stop_the_queue))
    assert found[0] == "queue_stale"


@pytest.mark.slow
def test_a_queue_of_alike_features_is_found() -> None:
    found = worst(queue_length=256, at_step=(50, fill_the_queue))
    assert found[0] == "queue_alike"


def test_a_batch_far_smaller_than_the_prototypes_is_found() -> None:
    assert worst(num_prototypes=1000, steps=2) == ["too_few_samples"]


def test_a_broken_image_gives_values_that_are_not_finite() -> None:
    assert worst(broken_image=True, steps=3)[0] == "non_finite"
