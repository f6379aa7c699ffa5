"""The monitor: its figures, its window, its state, its arguments, its plot."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from swavkit import ClusterMonitor, PrototypeLayer, SwAVLoss, SwAVStatistics, cluster_statistics
from swavkit.monitor import figures as figures_module
from swavkit.monitor import monitor as monitor_module
from tests import oracles
from tests.modes import LargestTensor
from tests.states import same, snapshot

K, D = 5, 4
KEYS = ["assigned", "code_usage", "scalars", "updates"]
ALWAYS = {
    "perplexity",
    "used",
    "code_perplexity",
    "code_entropy",
    "prediction_entropy",
    "marginal_error",
    "agreement",
    "nonfinite",
}
OF_LOSS = {"loss", "below_ln_k", "above_code_entropy"}
OF_FEATURES = {"feature_std", "effective_rank"}


def statistics_of(seed: int, samples: int = 6, *, prototypes: int = K, **to: Any) -> SwAVStatistics:
    """Return the statistics of 3 views, of which 2 have codes."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, samples, prototypes, generator=generator)
    codes = torch.softmax(scores[:2] / 0.3, dim=-1)
    return cluster_statistics(scores.to(**to), codes.to(**to))


def as_arrays(statistics: SwAVStatistics) -> dict[str, np.ndarray]:
    return {name: value.cpu().numpy() for name, value in statistics._asdict().items()}


def floats(figures: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in figures.items()}


def assert_figures(found: dict[str, Tensor], expected: dict[str, float]) -> None:
    """Compare figures with those of the oracle; ``nonfinite`` is 0 unless it is expected."""
    expected = {"nonfinite": 0} | expected
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.shape == ()
        np.testing.assert_allclose(value.item(), expected[name], rtol=2e-6, atol=2e-6, err_msg=name)


def updated(*seeds: int, **settings: Any) -> ClusterMonitor:
    monitor = ClusterMonitor(K, **settings)
    for seed in seeds:
        monitor.update(statistics_of(seed))
    return monitor


# The figures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 4, 5, 9])
def test_figures_are_those_of_the_window(
    device: torch.device, steps: int, dtype: torch.dtype
) -> None:
    monitor = ClusterMonitor(K, window=5)
    given = [statistics_of(seed, 3 + seed, dtype=dtype, device=device) for seed in range(steps)]
    losses = [0.5 + seed for seed in range(steps)]
    for index, statistics in enumerate(given):
        loss = torch.tensor(losses[index], dtype=dtype, device=device, requires_grad=True)
        monitor.update(statistics, loss=loss if index % 2 else losses[index])
        last = [as_arrays(each) for each in given[max(0, index - 4) : index + 1]]
        figures = monitor.compute()
        assert_figures(
            figures, oracles.cluster_figures(last, losses[max(0, index - 4) : index + 1])
        )
        assert {value.device.type for value in figures.values()} == {device.type}


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=7),
    st.integers(1, 8),
    st.integers(0, 2**16),
)
def test_law_a_window_has_the_figures_of_the_summed_statistics(
    sizes: list[int], window: int, seed: int
) -> None:
    monitor, together = ClusterMonitor(K, window=window), ClusterMonitor(K, window=1)
    steps = [statistics_of(seed + index, samples) for index, samples in enumerate(sizes)]
    for step in steps:
        monitor.update(step)
    together.update(SwAVStatistics(*(sum(parts) for parts in zip(*steps[-window:], strict=True))))
    found, expected = monitor.compute(), together.compute()
    for name, value in found.items():  # NaN where all steps are empty
        torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("form", ["views", "sequence", "rows"])
def test_figures_of_the_last_features(device: torch.device, form: str) -> None:
    views = torch.randn(3, 6, D, device=device) + torch.tensor([2.0, 0, 0, 0], device=device)
    forms: dict[str, Any] = {"views": views, "sequence": list(views), "rows": views.flatten(0, 1)}
    monitor = ClusterMonitor(K)
    monitor.update(statistics_of(0, device=device), features=torch.randn(2, 9, 7, device=device))
    monitor.update(statistics_of(1, device=device), features=forms[form])
    expected = oracles.feature_figures(views.flatten(0, 1).cpu().double().numpy())
    monitor.update(statistics_of(2, device=device))  # the last ones are kept
    views.zero_()  # what is kept is a copy
    figures = monitor.compute()
    for name in OF_FEATURES:
        np.testing.assert_allclose(figures[name].item(), expected[name], rtol=1e-6)
    assert figures.keys() == ALWAYS | OF_FEATURES


def test_features_of_a_uniform_sphere_and_of_a_collapse(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.randn(20_000, 8, generator=generator).to(device)
    for features, deviation, rank in (
        (uniform, 1.0, 8.0),
        (torch.ones(50, 8, device=device), 0.0, 1.0),
        (uniform[:, :1].sign() * torch.ones(8, device=device), 1.0, 1.0),  # two poles
        (torch.zeros(3, 8, device=device), 0.0, 0.0),
        (torch.zeros(1, 8, device=device), 0.0, 0.0),
        (torch.ones(1, 8, device=device), 0.0, 1.0),
    ):
        monitor = ClusterMonitor(K)
        monitor.update(statistics_of(0, device=device), features=features)
        figures = floats(monitor.compute())
        assert abs(figures["feature_std"] - deviation) < 1e-2
        assert abs(figures["effective_rank"] - rank) < 1e-2


def test_rows_of_features_that_are_not_finite_are_skipped(device: torch.device) -> None:
    features = torch.randn(9, D, device=device)
    spoiled = torch.cat([features, features[:3]])
    spoiled[9, 1], spoiled[10, 0], spoiled[11, 3] = math.nan, math.inf, -math.inf
    expected = oracles.feature_figures(features.cpu().double().numpy())
    monitor = ClusterMonitor(K)
    monitor.update(statistics_of(0, device=device), features=spoiled)
    figures = floats(monitor.compute())
    for name in OF_FEATURES:
        np.testing.assert_allclose(figures[name], expected[name], rtol=1e-6)
    monitor.update(statistics_of(0, device=device), features=spoiled[9:])
    figures = floats(monitor.compute())
    assert all(math.isnan(figures[name]) for name in OF_FEATURES)
    assert figures.keys() == ALWAYS | OF_FEATURES


@pytest.mark.parametrize("block", [1, 60, 2**22])
def test_duplicates_are_counted_block_by_block(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(figures_module, "_BLOCK", block)
    layer = PrototypeLayer(D, 20).to(device)
    with torch.no_grad():
        layer.weight[7] = 3 * layer.weight[2]
        layer.weight[19] = layer.weight[2] + 0.01
        layer.weight[4] = -layer.weight[5]
        layer.weight[11].zero_()
        layer.weight[12].fill_(math.nan)
    stored = layer.weight.detach().cpu().double().numpy()
    expected = oracles.num_duplicates(np.delete(stored, 12, axis=0))
    assert expected >= 3
    for prototypes in (layer, layer.weight, layer.weight.detach()):
        monitor = ClusterMonitor(20)
        monitor.update(statistics_of(0, prototypes=20, device=device), prototypes=prototypes)
        figures = monitor.compute()
        assert figures.keys() == ALWAYS | {"duplicates"}
        assert figures["duplicates"] == expected


def test_never_are_the_cosines_of_all_prototypes_held() -> None:
    size = 4096
    with LargestTensor(torch.float32) as largest:
        count = figures_module.num_duplicates(torch.randn(size, 3))
    assert largest.numel == 2**22 < size**2
    assert count > 0


@pytest.mark.parametrize("given", ["layer", "weight"])
def test_prototypes_are_referred_to_and_not_copied(given: str) -> None:
    layer = PrototypeLayer(D, K)
    monitor = ClusterMonitor(K)
    monitor.update(statistics_of(0), prototypes=layer if given == "layer" else layer.weight)
    assert monitor.compute()["duplicates"] == 0
    nn.init.ones_(layer.weight)
    assert monitor.compute()["duplicates"] == K
    assert list(monitor.state_dict()) == KEYS
    assert not [*monitor.parameters(), *monitor.children(), *monitor.buffers()]


# What is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_loss_that_is_not_finite_is_left_out_and_counted(
    device: torch.device, bad: float, as_tensor: bool
) -> None:
    monitor = ClusterMonitor(K, window=3)
    losses = [1.0, bad, 3.0]
    given = [statistics_of(seed, 3 + seed, device=device) for seed in range(3)]
    for statistics, loss in zip(given, losses, strict=True):
        value = torch.tensor(loss, device=device) if as_tensor else loss
        monitor.update(statistics, loss=value)
    expected = oracles.cluster_figures([as_arrays(each) for each in given], losses)
    assert_figures(monitor.compute(), expected | {"nonfinite": 1})
    for _ in range(3):
        monitor.update(given[0], loss=bad)
    figures = floats(monitor.compute())
    assert figures.keys() == ALWAYS | OF_LOSS
    assert {name for name, value in figures.items() if math.isnan(value)} == OF_LOSS
    assert figures["nonfinite"] == 3


@pytest.mark.parametrize("field", SwAVStatistics._fields)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_a_statistic_that_is_not_finite_is_left_out_and_counted(
    field: str, bad: float
) -> None:
    monitor = ClusterMonitor(K, window=3)
    given = [statistics_of(seed) for seed in range(2)]
    value = getattr(given[0], field).clone()
    value.view(-1)[-1] = bad
    monitor.update(given[0], loss=1.0)
    monitor.update(given[0]._replace(**{field: value}), loss=7.0)
    monitor.update(given[1], loss=3.0)
    expected = oracles.cluster_figures([as_arrays(each) for each in given], [1.0, 3.0])
    assert_figures(monitor.compute(), expected | {"nonfinite": 1})


@pytest.mark.parametrize("views", [slice(0, 1), slice(2, 3), slice(0, 3)], ids=str)
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_step_with_rows_that_are_not_finite_is_counted(
    views: slice, samples: int, weighted: bool
) -> None:
    scores = torch.rand(3, 6, K)
    weight = torch.rand(6) + 0.1 if weighted else None
    codes = torch.softmax(scores[:2], dim=-1)
    monitor = ClusterMonitor(K)
    monitor.update(cluster_statistics(scores, codes, sample_weight=weight))
    assert monitor.compute()["nonfinite"] == 0
    scores[views, :samples] = math.nan
    codes = torch.softmax(scores[:2], dim=-1)
    statistics = cluster_statistics(scores, codes, sample_weight=weight)
    whole = samples == 6 and views != slice(0, 3)  # as if there were a view less
    monitor.update(statistics)
    figures = floats(monitor.compute())
    assert figures["nonfinite"] == (not whole)
    assert all(math.isfinite(value) for value in figures.values())


def test_figures_without_rows_are_nan_and_an_empty_step_has_no_weight() -> None:
    empty = statistics_of(0, samples=0)
    monitor = ClusterMonitor(K)
    monitor.update(empty, loss=0.0)
    figures = floats(monitor.compute())
    assert figures.pop("nonfinite") == 0
    assert figures.keys() == (ALWAYS | OF_LOSS) - {"nonfinite"}
    assert all(math.isnan(value) for value in figures.values())
    monitor.update(statistics_of(1), loss=2.0)
    assert_figures(monitor.compute(), oracles.cluster_figures([as_arrays(statistics_of(1))], [2.0]))


def test_an_empty_step_keeps_the_features_before_it() -> None:
    monitor = ClusterMonitor(K)
    monitor.update(statistics_of(0, samples=0), features=torch.ones(2, 0, D))
    assert all(math.isnan(floats(monitor.compute())[name]) for name in OF_FEATURES)
    monitor.update(statistics_of(0), features=torch.randn(2, 6, D))
    before = floats(monitor.compute())
    monitor.update(statistics_of(0, samples=0), features=torch.ones(2, 0, D))
    assert floats(monitor.compute()) == before


# Devices and synchronization


def test_the_monitor_follows_the_statistics_to_their_device(device: torch.device) -> None:
    with torch.device("meta"):
        monitor = ClusterMonitor(K)
    for place in ("cpu", device, "cpu"):
        monitor.update(statistics_of(0, device=place), features=torch.ones(3, D, device=place))
        assert {value.device.type for value in monitor.state_dict().values()} == {
            torch.device(place).type
        }
    assert monitor.updates == 3
    assert_figures(
        {name: value for name, value in monitor.compute().items() if name in ALWAYS},
        oracles.cluster_figures([as_arrays(statistics_of(0))]),
    )


@pytest.mark.parametrize("call", ["compute", "diagnose", "plot"])
def test_figures_on_the_meta_device_are_refused(call: str) -> None:
    with pytest.raises(RuntimeError, match="on a device with values, got the meta device"):
        getattr(updated(0).to("meta"), call)()


def test_a_compiled_update_is_the_eager_one() -> None:
    layer = PrototypeLayer(D, K)
    eager, monitor = ClusterMonitor(K, window=3), ClusterMonitor(K, window=3)

    def update(monitor: ClusterMonitor, statistics: SwAVStatistics, features: Tensor) -> None:
        monitor.update(statistics, loss=features.mean(), features=features, prototypes=layer)

    compiled = torch.compile(update, fullgraph=True, backend="eager")
    for seed in range(5):
        arguments = statistics_of(seed), torch.randn(2, 6, D)
        update(eager, *arguments)
        compiled(monitor, *arguments)
    assert same(snapshot(monitor), snapshot(eager))
    assert floats(monitor.compute()) == floats(eager.compute())


def test_updates_in_inference_mode_and_under_autocast(device: torch.device) -> None:
    layer, views = PrototypeLayer(D, K).to(device), torch.randn(2, 6, D, device=device)
    figures = []
    for context in (
        torch.enable_grad(),
        torch.inference_mode(),
        torch.autocast(device.type, dtype=torch.bfloat16),
    ):
        monitor = ClusterMonitor(K)
        with context:
            statistics = statistics_of(0, device=device)
            monitor.update(statistics, features=views, prototypes=layer)
            figures.append(floats(monitor.compute()))
        assert floats(monitor.compute()) == figures[0]
    assert figures[0] == figures[1] == figures[2]


# State


def test_the_state_survives_a_round_trip_and_goes_on() -> None:
    monitor = updated(0, 1, 2, window=4)
    assert list(monitor.state_dict()) == KEYS
    other = ClusterMonitor(K, window=4)
    other.load_state_dict(snapshot(monitor))
    for each in (monitor, other):
        each.update(statistics_of(7))
        each.update(statistics_of(8))
    assert same(snapshot(monitor), snapshot(other))
    assert floats(monitor.compute()) == floats(other.compute())


@pytest.mark.parametrize("settings", [(K, 3), (K + 1, 4)], ids=str)
def test_another_window_or_number_of_prototypes_is_a_size_mismatch(
    settings: tuple[int, int],
) -> None:
    prototypes, window = settings
    other = ClusterMonitor(prototypes, window=window)
    with pytest.raises(RuntimeError, match="size mismatch for assigned"):
        other.load_state_dict(snapshot(updated(0, window=4)))
    assert not other.updates


def test_the_state_keeps_its_dtype() -> None:
    monitor = updated(0, 1)
    before = snapshot(monitor)
    model = nn.ModuleList([nn.Linear(2, 2), monitor])
    for change in (model.half, model.double, model.bfloat16):
        change()
        assert same(snapshot(monitor), before)
        assert monitor.assigned.dtype == monitor.scalars.dtype == torch.float32
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_the_state_without_features_and_prototypes(
    copied: Callable[[ClusterMonitor], ClusterMonitor],
) -> None:
    monitor = updated(0)
    layer = PrototypeLayer(D, K)
    monitor.update(statistics_of(1), features=layer(torch.randn(3, D)), prototypes=layer.weight * 2)
    other = copied(monitor)
    assert same(snapshot(monitor), snapshot(other))
    assert other.compute().keys() == ALWAYS
    assert monitor.compute().keys() == ALWAYS | OF_FEATURES | {"duplicates"}
    other.update(statistics_of(1))
    assert monitor.updates == 2


def test_reset_empties_the_monitor_in_place() -> None:
    monitor = ClusterMonitor(K)
    monitor.update(statistics_of(0), features=torch.ones(3, D), prototypes=torch.eye(K))
    held = dict(monitor.state_dict())
    monitor.reset()
    assert all(value is held[key] for key, value in monitor.state_dict().items())
    assert not any(value.any() for value in held.values())
    with pytest.raises(RuntimeError, match="must follow an update, got none"):
        monitor.compute()
    monitor.update(statistics_of(1))
    assert_figures(monitor.compute(), oracles.cluster_figures([as_arrays(statistics_of(1))]))


@pytest.mark.parametrize("call", ["compute", "diagnose", "plot"])
def test_figures_before_an_update_are_refused(call: str) -> None:
    with pytest.raises(RuntimeError, match=r"must follow an update, got none on any rank"):
        getattr(ClusterMonitor(K), call)()


def test_the_settings_are_shown() -> None:
    assert repr(ClusterMonitor(3, window=7)) == "ClusterMonitor(num_prototypes=3, window=7)"


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_prototypes": 0}, ValueError, "num_prototypes must be at least 1, got 0"),
        ({"num_prototypes": [3]}, TypeError, "num_prototypes must be an int, got list"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 1.5}, TypeError, "window must be an int, got float"),
        ({"process_group": 3}, TypeError, "process_group must be a torch.distributed.ProcessGroup"),
    ],
)
def test_bad_settings_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ClusterMonitor(**({"num_prototypes": K} | arguments))


GOOD = statistics_of(0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"statistics": (GOOD, GOOD)},
            TypeError,
            "statistics must be a SwAVStatistics, got a tuple of 2; expected one monitor per head",
        ),
        ({"statistics": 3.0}, TypeError, "statistics must be a SwAVStatistics, got float"),
        (
            {"statistics": statistics_of(0, prototypes=3)},
            ValueError,
            r"statistics.code_usage must have shape \(5,\) with num_prototypes=5, got \(3,\)",
        ),
        (
            {"statistics": GOOD._replace(pairs=torch.ones(2))},
            ValueError,
            r"statistics.pairs must have shape \(\) .*, got \(2,\)",
        ),
        (
            {"statistics": GOOD._replace(samples=3)},
            TypeError,
            "statistics.samples must be a torch.Tensor, got int",
        ),
        (
            {"statistics": GOOD._replace(assigned=torch.ones(K, device="meta"))},
            ValueError,
            "statistics.assigned must be on device cpu, got meta",
        ),
        ({"loss": torch.ones(2)}, ValueError, r"loss must have 1 element, got shape \(2,\)"),
        ({"loss": torch.ones((), dtype=torch.int64)}, TypeError, "loss must have a floating-point"),
        ({"loss": "low"}, TypeError, "loss must be a number, got str"),
        ({"loss": torch.ones((), device="meta")}, ValueError, "loss must be on device cpu"),
        ({"features": torch.ones(3)}, ValueError, r"features must have 2 dimensions .* or 3"),
        ({"features": torch.ones(3, 0)}, ValueError, "at least 1 of the features in its last"),
        ({"features": [torch.ones(3)]}, ValueError, r"features\[0\] must have 2 dimensions"),
        ({"features": []}, ValueError, "features must hold at least 1 view, got 0"),
        ({"features": torch.ones(3, 2).int()}, TypeError, "features must have a floating-point"),
        ({"features": 3}, TypeError, "features must be a torch.Tensor or a sequence"),
        (
            {"features": torch.ones(3, 2, device="meta")},
            ValueError,
            "features must be on device cpu, got meta",
        ),
        (
            {"prototypes": PrototypeLayer(D, 3)},
            ValueError,
            r"prototypes must have shape \(5, features\) with num_prototypes=5, got \(3, 4\)",
        ),
        ({"prototypes": torch.ones(3, D)}, ValueError, r"prototypes must have .*, got \(3, 4\)"),
        ({"prototypes": torch.ones(K)}, ValueError, r"prototypes must have .*, got \(5,\)"),
        (
            {"prototypes": torch.ones(K, D, device="meta")},
            ValueError,
            "prototypes must have values",
        ),
        (
            {"prototypes": nn.ModuleList([PrototypeLayer(D, K)])},
            TypeError,
            "prototypes must be a PrototypeLayer or a torch.Tensor, got ModuleList; expected one",
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_changes(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    monitor = ClusterMonitor(K)
    monitor.update(GOOD)
    before = snapshot(monitor)
    options = {
        "statistics": GOOD,
        "loss": 1.0,
        "features": torch.ones(3, D),
        "prototypes": torch.eye(K),
    }
    with pytest.raises(error, match=message):
        monitor.update(**(options | arguments))
    assert same(snapshot(monitor), before)
    assert monitor.compute().keys() == ALWAYS


# Loggers, diagnosis, plot


class LoggingModule(nn.Module):
    """What a Lightning module checks of figures that it is given, and keeps of them."""

    def __init__(self) -> None:
        super().__init__()
        self.monitor = ClusterMonitor(K)
        self.logged: dict[str, float] = {}

    def log_dict(self, dictionary: dict[str, Tensor]) -> None:
        for name, value in dictionary.items():
            assert isinstance(name, str)
            assert value.numel() == 1
            assert not value.requires_grad
            self.logged[name] = value.to(torch.get_default_dtype()).item()


def test_figures_are_logged_as_those_of_a_metric() -> None:
    module = LoggingModule()
    module.monitor.update(statistics_of(0), loss=torch.ones((), requires_grad=True))
    module.log_dict(module.monitor.compute())
    module.monitor.reset()
    assert module.logged.keys() == ALWAYS | OF_LOSS
    assert all(math.isfinite(value) for value in module.logged.values())
    assert [*module.state_dict()] == [f"monitor.{key}" for key in KEYS]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the last diagnosis was given."""
    arguments: dict[str, Any] = {}

    def diagnose(figures: dict[str, float], **others: Any) -> list[Any]:
        arguments.update(others, figures=figures)
        return ["worst"]

    monkeypatch.setattr(monitor_module, "diagnose", diagnose)
    return arguments


def test_the_diagnosis_is_of_the_figures(seen: dict[str, Any]) -> None:
    monitor = ClusterMonitor(K, window=2)
    features = torch.randn(8, 3)
    for samples in (100, 4, 8):
        monitor.update(statistics_of(0, samples), loss=1.0, features=features)
    criterion = SwAVLoss(3, K)
    assert monitor.diagnose(criterion) == ["worst"]
    assert seen.pop("figures") == floats(monitor.compute())
    settings = {"num_prototypes": K, "samples": 6.0, "steps": 3, "window": 2, "processes": 1}
    assert seen == {**settings, "criterion": criterion}
    monitor.diagnose()
    assert seen["criterion"] is None


def test_queued_features_are_compared_with_the_current_ones(
    device: torch.device, seen: dict[str, Any]
) -> None:
    criterion = SwAVLoss(D, K, queue_length=9).to(device)
    monitor = ClusterMonitor(K)
    current = torch.randn(2, 5, D, device=device)
    monitor.update(statistics_of(0, device=device), features=current)
    monitor.diagnose(criterion)
    assert seen["figures"]["queued"] == 0
    assert math.isnan(seen["figures"]["queue_std"])

    offset = torch.tensor([3.0, 0, 0, 0], device=device)
    queued = torch.randn(2, 6, D, device=device) + offset
    assert criterion.queue is not None
    criterion.queue.push(1000 * queued)
    monitor.diagnose(criterion)
    unit = [
        each.flatten(0, 1).cpu().double().numpy()
        / np.linalg.norm(each.cpu(), axis=2).reshape(-1, 1)
        for each in (current, queued)
    ]
    spreads = [oracles.feature_figures(each)["feature_std"] for each in unit]
    drift = np.linalg.norm(unit[1].mean(0) - unit[0].mean(0))
    figures = seen["figures"]
    assert figures["queued"] == 12
    np.testing.assert_allclose(figures["queue_std"], spreads[1] / spreads[0], rtol=1e-5)
    np.testing.assert_allclose(figures["queue_drift"], drift / spreads[0], rtol=1e-5)

    monitor.update(statistics_of(1, device=device), features=torch.randn(5, D + 1, device=device))
    monitor.diagnose(criterion)  # these are no features of the prototypes
    assert seen["figures"].keys() == ALWAYS | OF_FEATURES


@pytest.mark.parametrize("criterion", [3, nn.DataParallel(SwAVLoss(D, K))], ids=["int", "wrapper"])
def test_a_criterion_of_another_type_is_refused(criterion: Any) -> None:
    with pytest.raises(TypeError, match=r"criterion must be a SwAVLoss, got (int|DataParallel)"):
        updated(0).diagnose(criterion)


def drawn(monitor: ClusterMonitor) -> Any:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = monitor.plot()
    figure.canvas.draw()
    return figure


def lines_of(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): tuple(map(list, line.get_data()))
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_the_plot_draws_what_the_window_holds() -> None:
    monitor = ClusterMonitor(K, window=3)
    given = [statistics_of(seed) for seed in range(5)]
    losses = [1.0, 2.0, 3.0, math.nan, 5.0]
    for statistics, loss in zip(given, losses, strict=True):
        monitor.update(statistics, loss=loss, features=torch.randn(6, D), prototypes=torch.eye(K))
    figure = drawn(monitor)
    usage, entropies, agreement, table = figure.axes
    for values in (lines_of(entropies)["loss"], lines_of(agreement)["agreement"]):
        assert values[0] == [3, 4, 5]
    np.testing.assert_allclose(lines_of(entropies)["loss"][1], [3, math.nan, 5])
    for name, label in (("code_entropy", "code entropy"), ("agreement", "agreement")):
        lines = lines_of(entropies) | lines_of(agreement)
        expected = [oracles.cluster_figures([as_arrays(each)])[name] for each in given[2:]]
        np.testing.assert_allclose(lines[label][1], expected, rtol=1e-6)
    sums = sum(each.assigned for each in given[2:])
    shares = np.sort((sums / sums.sum()).numpy())[::-1]
    np.testing.assert_allclose(lines_of(usage)["nearest prototype"][1], shares[shares > 0])
    assert usage.get_yscale() == "log"
    assert entropies.get_ylabel() == "nats"
    low, high = entropies.get_ylim()
    assert low < 0 < math.log(K) < high
    assert len([text for text in table.texts if text.get_position()[0] == 0.02]) == 12
    assert figure.get_size_inches()[0] * figure.dpi == 1000


@pytest.mark.parametrize("samples", [0, 1, 6])
def test_any_window_can_be_drawn(samples: int) -> None:
    monitor = ClusterMonitor(K)
    monitor.update(statistics_of(0, samples), loss=math.nan)
    drawn(monitor)


def test_the_plot_needs_no_display_and_no_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    drawn(updated(0, 1))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'swavkit\[plot\]'"):
        updated(0).plot()
