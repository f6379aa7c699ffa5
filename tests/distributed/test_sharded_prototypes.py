"""Prototypes spread over processes: as if every process had all, but with no K anywhere."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swavkit import (
    PrototypeLayer,
    SwAVDetails,
    SwAVLoss,
    load_sharded_state_dict,
    sharded_state_dict,
)
from tests import oracles, tolerances
from tests.modes import Collectives
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

VIEWS, INPUTS, FEATURES, K = 3, 6, 4, 11
STEPS = 6


PRIOR = torch.arange(K) % 4 / 2  # some prototypes get nothing


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, FEATURES)).double()


def criteria(**given: Any) -> tuple[SwAVLoss, SwAVLoss]:
    """Return a loss, and one that begins with the same prototypes but shards them."""
    torch.manual_seed(1)
    prototypes = given.pop("num_prototypes", K)
    plain = SwAVLoss(FEATURES, prototypes, **given).double()
    sharded = SwAVLoss(FEATURES, prototypes, shard_prototypes=True, **given).double()
    sharded.load_state_dict(plain.state_dict())
    return plain, sharded


def heads(criterion: SwAVLoss) -> list[Any]:
    several = isinstance(criterion.prototypes, nn.ModuleList)
    return list(criterion.prototypes) if several else [criterion.prototypes]


def whole(tensor: Tensor) -> np.ndarray:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().double().numpy()


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([whole(tensor).ravel() for tensor in tensors])


class Both(nn.Module):
    """An encoder with its loss, as one module for DDP."""

    def __init__(self, criterion: SwAVLoss) -> None:
        super().__init__()
        self.encoder, self.criterion = encoder(), criterion

    def forward(self, inputs: Tensor, sample_weight: Tensor | None) -> Tensor:
        loss: Tensor = self.criterion(self.encoder(inputs), sample_weight=sample_weight)
        return loss


def record(
    network: Both, step: Callable[..., Tensor], inputs: np.ndarray, weights: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Train, and return losses, gradients and parameters of each step."""
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=1e-3)
    history: dict[str, list[Any]] = {"loss": [], "gradients": [], "parameters": []}
    for batch, weight in zip(torch.tensor(inputs), weights, strict=True):
        optimizer.zero_grad()
        loss = step(batch, None if weight is None else torch.tensor(weight))
        # As a scaler or an accumulation of gradients does, here by another factor on each process.
        (loss * (1 + dist.get_rank())).backward()
        optimizer.step()
        history["loss"].append(loss.item())
        history["gradients"].append(flat([parameter.grad for parameter in parameters]))
        history["parameters"].append(flat(parameters))
    return {name: np.array(values) for name, values in history.items()}


def train_both(rank: int, argument: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Train under DDP with prototypes on every process, and with sharded ones beside DDP."""
    results = []
    inputs = argument["inputs"]
    weights = argument.get("weights", [None] * len(inputs))
    for criterion in criteria(**argument.get("settings", {})):
        network = Both(criterion)
        if isinstance(heads(criterion)[0].weight, DTensor):
            parallel = DistributedDataParallel(network.encoder)

            def step(
                batch: Tensor,
                weight: Any,
                parallel: Any = parallel,
                criterion: SwAVLoss = criterion,
            ) -> Tensor:
                loss: Tensor = criterion(parallel(batch), sample_weight=weight)
                return loss
        else:
            step = DistributedDataParallel(network)
        results.append(record(network, step, inputs, weights))
    return results


def batches(sizes: Sequence[int], steps: int = STEPS, seed: int = 0) -> list[np.ndarray]:
    """(steps, V, B, inputs) for each rank, different on each."""
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(steps, VIEWS, size, INPUTS)) for size in sizes]


def assert_trained_alike(ranks: Ranks, arguments: list[dict[str, Any]]) -> list[Any]:
    results = ranks.run(train_both, arguments)
    for plain, sharded in results:
        for name, values in plain.items():
            np.testing.assert_allclose(sharded[name], values, rtol=0, atol=1e-10)
        np.testing.assert_array_equal(sharded["parameters"], results[0][1]["parameters"])
    return results


@pytest.mark.parametrize(
    ("sizes", "settings_given"),
    [
        ((4, 4), {}),
        ((4, 4, 4), {}),
        ((5, 0, 2), {"queue_length": 6}),
        ((0, 6, 0), {"queue_length": 6, "queue_start": 3}),
        ((3, 2, 4), {"num_prototypes": (7, 2, 1), "queue_length": 4}),
        ((3, 2, 4), {"num_prototypes": 1}),
        ((3, 4, 1), {"freeze_steps": 2, "prototype_gradient": "published"}),
        ((3, 4, 1), {"iterations": 9, "epsilon": 0.02, "temperature": 0.03}),
        ((3, 4, 1), {"num_code_views": 1}),
        ((3, 0, 4), {"reduction": "global_mean", "queue_length": 4}),
        ((3, 4, 1), {"num_code_views": 3, "iterations": 1}),
        ((2, 3, 0, 4), {"num_prototypes": 5}),  # one process has no prototypes
        ((3, 4, 1), {"prototype_weight": PRIOR, "queue_length": 4, "iterations": 5}),
        ((3, 4), {"num_prototypes": (K, 3), "prototype_weight": [PRIOR, None]}),
        ((3, 4, 1), {"epsilon": torch.tensor(0.07), "temperature": torch.tensor(0.2)}),
    ],
    ids=str,
)
def test_training_is_that_with_all_prototypes_on_every_process(
    start_ranks: Callable[[int], Ranks], sizes: tuple[int, ...], settings_given: dict[str, Any]
) -> None:
    arguments = [{"inputs": inputs, "settings": settings_given} for inputs in batches(sizes)]
    (plain, _), *_ = assert_trained_alike(start_ranks(len(sizes)), arguments)
    assert not np.allclose(plain["parameters"][0], plain["parameters"][-1])


def taught(rank: int, features: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Return losses, gradients and the queue of two steps with a teacher, whole and sharded."""
    results = []
    teachers = [PrototypeLayer(FEATURES, size).double() for size in (K, 3)]
    for criterion in criteria(num_prototypes=(K, 3), queue_length=4):
        copied = copy.deepcopy(criterion.prototypes)
        for layer, teacher in zip(copied, teachers, strict=True):
            torch.manual_seed(2)
            nn.init.normal_(teacher.weight)  # the same on all ranks
            layer.load_state_dict(teacher.state_dict())
        assert criterion.queue is not None
        student, theirs = (torch.tensor(features[rank][part]) for part in (0, 1))
        student.requires_grad_()
        losses = [
            criterion(student, code_features=theirs[:2], code_prototypes=copied) for _ in range(2)
        ]
        losses[1].backward()
        assert all(layer.weight.grad is None for layer in copied)
        queue = criterion.queue.features.numpy()
        results.append([losses[0].item(), losses[1].item(), student.grad.numpy(), queue])
    return results


def test_a_teacher_may_be_sharded_too(ranks: Ranks) -> None:
    generator = np.random.default_rng(0)
    features = [generator.normal(size=(2, VIEWS, size, FEATURES)) for size in SIZES]
    for plain, sharded in ranks.run(taught, [features] * len(SIZES)):
        for found, expected in zip(sharded, plain, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


def losses_with_teachers_of_other_dtypes(
    rank: int, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> list[list[Any]]:
    """Return dtype, value and gradient of the loss in each form; the student's is first."""
    results = []
    for options in ({"memory": "full"}, {"memory": "streamed"}, {"shard_prototypes": True}):
        criterion = SwAVLoss(FEATURES, K, queue_length=4, **options).to(dtypes[0])
        teacher = copy.deepcopy(criterion.prototypes).to(dtypes[2])
        torch.manual_seed(3)
        rows = torch.randn(K, FEATURES, dtype=torch.float64)
        for layer in (criterion.prototypes, teacher):
            layer.load_state_dict({"weight": rows})
        torch.manual_seed(rank)
        features = torch.randn(VIEWS, 4, FEATURES).to(dtypes[0]).requires_grad_()
        theirs = torch.randn(2, 4, FEATURES).to(dtypes[1])
        for _ in range(2):  # the second with a queue
            loss = criterion(features, code_features=theirs, code_prototypes=teacher)
        (gradient,) = torch.autograd.grad(loss, features)
        results.append([str(loss.dtype), loss.item(), gradient.double().numpy()])
    return results


DTYPES_OF_TEACHERS = [
    (torch.float32, torch.float64, torch.float32),
    (torch.float32, torch.float32, torch.float64),
    (torch.float32, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64),
    (torch.float64, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("dtypes", DTYPES_OF_TEACHERS, ids=str)
def test_the_dtype_of_a_teacher_changes_that_of_no_loss(
    ranks: Ranks, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    student = dtypes[0]
    expected_dtype = str(torch.promote_types(student, torch.float32))
    # The teacher's precision is that of the codes.
    atol = 0.05 if torch.bfloat16 in dtypes else 1e-4
    for found in ranks.run(losses_with_teachers_of_other_dtypes, [dtypes] * 3):
        assert [dtype for dtype, *_ in found] == [expected_dtype] * 3
        for _, loss, gradient in found[1:]:
            np.testing.assert_allclose(loss, found[0][1], rtol=0, atol=atol)
            np.testing.assert_allclose(gradient, found[0][2], rtol=0, atol=atol)


def whole_teacher(rank: int) -> None:
    _, criterion = criteria()
    with pytest.raises(ValueError, match="code_prototypes must be sharded like the prototypes"):
        criterion(
            torch.randn(VIEWS, 4, FEATURES).double(), code_prototypes=PrototypeLayer(FEATURES, K)
        )


def test_a_teacher_without_shards_beside_sharded_prototypes_is_an_error(ranks: Ranks) -> None:
    ranks.run(whole_teacher)


@st.composite
def drawn_arguments(draw: st.DrawFn) -> list[dict[str, Any]]:
    sizes = draw(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any))
    given_settings = {
        "num_prototypes": draw(st.integers(1, 8)),
        "queue_length": draw(st.integers(0, 5)),
        "iterations": draw(st.sampled_from([1, 3, 6])),
    }
    values = draw(st.sampled_from([[None], [True, False], [0.0, 0.5, 1.0, 3.0]]))
    weights = [
        [
            np.array(draw(st.lists(st.sampled_from(values), min_size=size, max_size=size)))
            if values != [None]
            else None
            for _ in range(2)
        ]
        for size in sizes
    ]
    inputs = batches(sizes, steps=2, seed=draw(st.integers(0, 99)))
    return [
        {"inputs": own, "settings": given_settings, "weights": weight}
        for own, weight in zip(inputs, weights, strict=True)
    ]


@pytest.mark.slow
@given(drawn_arguments())
@settings(max_examples=20)
def test_any_split_and_any_weights_train_alike(
    start_ranks: Callable[[int], Ranks], drawn: list[dict[str, Any]]
) -> None:
    assert_trained_alike(start_ranks(3), drawn)


def details_of_both(rank: int, argument: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Return loss, details and gradients with unsharded and with sharded prototypes."""
    results = []
    autocast = argument.get("autocast")
    for criterion in criteria(**argument.get("settings", {})):
        dtype = argument.get("dtype", torch.float64)
        criterion.to(dtype)
        features = torch.tensor(argument["features"], dtype=dtype, requires_grad=True)
        for name, values in argument.get("prototypes", {}).items():
            criterion.load_state_dict({name: torch.tensor(values)}, strict=False)
        weight = argument.get("weight")
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            loss, details = criterion(
                features,
                sample_weight=None if weight is None else torch.tensor(weight),
                return_details=True,
            )
        loss.backward()
        (head,) = heads(criterion)
        gradient = head.weight.grad
        if not isinstance(gradient, DTensor):  # what DDP does
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        results.append(
            {
                "loss": whole(loss),
                "codes": whole(details.codes),
                "scores": whole(details.scores),
                "to features": whole(features.grad),
                "to prototypes": whole(gradient),
            }
        )
    return results


SIZES = (5, 0, 3)


def features_on_ranks(sizes: Sequence[int] = SIZES) -> list[np.ndarray]:
    return [
        np.random.default_rng(size).normal(size=(VIEWS, size, FEATURES)).astype(np.float32)
        for size in sizes
    ]


def compared(
    ranks: Ranks, arguments: list[dict[str, Any]], tolerance: float, equal_nan: bool = False
) -> list[list[dict[str, np.ndarray]]]:
    """Compare what the processes have; of the details every process has those of all samples."""
    results = ranks.run(details_of_both, arguments)
    for rank, (plain, sharded) in enumerate(results):
        for name in ("loss", "to features", "to prototypes"):
            np.testing.assert_allclose(
                sharded[name], plain[name], rtol=0, atol=tolerance, equal_nan=equal_nan
            )
        for name in ("codes", "scores"):
            together = np.concatenate([results[other][0][name] for other in range(3)], axis=1)
            np.testing.assert_allclose(
                results[rank][1][name], together, rtol=0, atol=tolerance, equal_nan=equal_nan
            )
    return results


def test_details_are_of_all_samples_and_codes_those_of_the_oracle(ranks: Ranks) -> None:
    arguments = [{"features": features} for features in features_on_ranks()]
    for _, sharded in compared(ranks, arguments, 1e-10):
        for view in range(2):
            expected = oracles.sinkhorn(sharded["scores"][view], 0.05, 3)
            np.testing.assert_allclose(sharded["codes"][view], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, None, tolerances.of_codes(torch.float32, epsilon=0.05, largest=1)),
        (torch.bfloat16, None, 0.05),
        (torch.float16, None, 0.01),
        (torch.float32, torch.bfloat16, 0.05),
        (torch.float32, torch.float16, 0.01),
    ],
    ids=str,
)
def test_narrower_dtypes(
    ranks: Ranks, dtype: torch.dtype, autocast: torch.dtype | None, tolerance: float
) -> None:
    """Half-precision scores are rounded in products of another shape: by a last place or so."""
    arguments = [
        {"features": features, "dtype": dtype, "autocast": autocast}
        for features in features_on_ranks()
    ]
    compared(ranks, arguments, tolerance)


def test_a_feature_that_is_not_finite_does_what_it_does_elsewhere(ranks: Ranks) -> None:
    arguments = [{"features": features} for features in features_on_ranks()]
    arguments[0]["features"][1, 2, 0] = np.nan
    for rank, (plain, _) in enumerate(compared(ranks, arguments, 1e-10, equal_nan=True)):
        assert np.isnan(plain["loss"]) == (rank == 0)


def test_an_absent_sample_may_hold_anything(ranks: Ranks) -> None:
    arguments = [{"features": features} for features in features_on_ranks()]
    arguments[0] |= {"weight": np.arange(5) != 2}
    arguments[0]["features"][:, 2] = np.nan
    for _, sharded in ranks.run(details_of_both, arguments):
        for name in ("loss", "to features", "to prototypes", "codes"):
            assert np.isfinite(sharded[name]).all(), name
    compared(ranks, arguments, 1e-10, equal_nan=True)


def gradients_of_one_rank(rank: int) -> list[np.ndarray]:
    """Return the gradients of features that need one on rank 0 alone."""
    results = []
    for criterion in criteria(reduction="global_mean"):
        features = torch.tensor(features_on_ranks()[rank], requires_grad=rank == 0)
        criterion(features).backward()
        results.append(whole(torch.zeros(1) if features.grad is None else features.grad))
    return results


def test_features_may_need_a_gradient_on_one_process_alone(ranks: Ranks) -> None:
    for plain, sharded in ranks.run(gradients_of_one_rank):
        np.testing.assert_allclose(sharded, plain, rtol=0, atol=1e-6)


def test_weights_may_be_given_on_one_process_alone(ranks: Ranks) -> None:
    arguments = [{"features": features} for features in features_on_ranks()]
    weight = np.array([0.5, 2.0, 0.0, 1.0, 3.0])
    arguments[0]["weight"] = weight
    of_all = np.concatenate([weight, np.ones(3)])
    for _, sharded in ranks.run(details_of_both, arguments):
        for view in range(2):
            expected = oracles.sinkhorn(sharded["scores"][view], 0.05, 3, of_all)
            np.testing.assert_allclose(sharded["codes"][view], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("row", [0, 10])
def test_a_prototype_that_is_not_finite_makes_every_code_nan(ranks: Ranks, row: int) -> None:
    prototypes = np.random.default_rng(0).normal(size=(K, FEATURES))
    prototypes[row, 0] = np.nan
    arguments = [
        {"features": features, "prototypes": {"prototypes.weight": prototypes}}
        for features in features_on_ranks()
    ]
    for rank, (plain, sharded) in enumerate(ranks.run(details_of_both, arguments)):
        assert np.isnan(plain["codes"]).all()
        assert np.isnan(sharded["codes"]).all()
        assert np.isnan(sharded["loss"]) == np.isnan(plain["loss"]) == (SIZES[rank] > 0)


class Dimensions(TorchDispatchMode):
    """Notes every length of a dimension of a tensor that an operation takes or returns."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # to be seen again as operations on what this process has
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            # DTensor works out shapes with tensors that have no memory.
            if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                self.lengths |= set(value.shape) | {value.numel()}
        return result


UNLIKE = 1013  # prototypes: a prime that is no product or sum of the other sizes


def lengths_in_training(rank: int, shard_prototypes: bool) -> set[int]:
    seen = Dimensions()
    network = encoder()
    with seen:
        criterion = SwAVLoss(
            FEATURES, UNLIKE, queue_length=5, shard_prototypes=shard_prototypes
        ).double()
        # Nobody averages the gradients of prototypes that are on every process here.
        parts = (network, criterion) if shard_prototypes else (network,)
        optimizers = [torch.optim.AdamW(part.parameters(), foreach=False) for part in parts]
        for batch in torch.tensor(batches((4, 0, 3), steps=3)[rank]):
            for optimizer in optimizers:
                optimizer.zero_grad()
            criterion(network(batch)).backward()
            for optimizer in optimizers:
                optimizer.step()
            if shard_prototypes:
                heads(criterion)[0].normalize_()
        if shard_prototypes:
            heads(criterion)[0].assign(torch.zeros(2, FEATURES, dtype=torch.float64))
    return seen.lengths


def test_no_process_ever_holds_a_dimension_of_k(ranks: Ranks) -> None:
    for lengths in ranks.run(lengths_in_training, [True] * 3):
        assert UNLIKE not in lengths
        assert {338, 337} & lengths  # what a process has
        # 5,000 or so would be K · D, and the number of samples and slots is 22.
        assert all(length < UNLIKE or length % 338 == 0 or length % 337 == 0 for length in lengths)
    assert UNLIKE in set.union(*ranks.run(lengths_in_training, [False] * 3))


def collectives_of_a_step(rank: int, argument: dict[str, Any]) -> tuple[list[int], list[int]]:
    criterion = SwAVLoss(FEATURES, shard_prototypes=True, **argument)
    for _ in range(3):
        features = torch.randn(VIEWS, 5, FEATURES, requires_grad=True)
        with Collectives() as forward:
            loss = criterion(features)
        with Collectives() as backward:
            loss.backward()
    return forward.numels, backward.numels


@pytest.mark.parametrize("prototypes", [11, 5000])
def test_what_is_sent_does_not_grow_with_k(ranks: Ranks, prototypes: int) -> None:
    samples = 3 * 5
    for forward, backward in ranks.run(collectives_of_a_step, [{"num_prototypes": prototypes}] * 3):
        assert forward == [
            # sizes and settings, weights with masks of views and code views, features
            *(3 * 6, samples * (2 + VIEWS + 2), VIEWS * samples * FEATURES),
            *([2 * samples] * 4),  # codes: a maximum, and a sum in each iteration
            *(VIEWS * samples, 3 * VIEWS * samples),  # the loss: a maximum and a sum
        ]
        assert backward == [samples // 3 * 3, VIEWS * samples * FEATURES]


def test_each_further_head_sends_as_much_again_but_for_the_features(ranks: Ranks) -> None:
    arguments = [{"num_prototypes": (11, 5, 7), "queue_length": 4}] * 3
    for forward, backward in ranks.run(collectives_of_a_step, arguments):
        assert len(forward) + len(backward) == 13 + 2 * 7


def layer_of_both(rank: int, features: np.ndarray) -> dict[str, Any]:
    plain, sharded = (heads(criterion)[0] for criterion in criteria())
    given_features = torch.tensor(features, dtype=torch.float64)
    assert sharded.assign(given_features).dtype == torch.int64
    assert sharded.assign(torch.zeros(0, 2, FEATURES).double()).shape == (0, 2)
    torch.testing.assert_close(
        sharded.assign(given_features), plain.assign(given_features), rtol=0, atol=0
    )
    assert isinstance(sharded.directions, DTensor)
    assert sharded.directions.shape == (K, FEATURES)
    assert sharded.weight.placements == (Shard(0),)
    assert not sharded.directions.requires_grad
    with torch.no_grad():
        local = sharded.weight.to_local()
        local.mul_(3)
    torch.testing.assert_close(sharded.directions.full_tensor(), plain.directions)
    assert not torch.allclose(sharded.weight.full_tensor(), plain.weight)
    sharded.normalize_()
    torch.testing.assert_close(sharded.weight.full_tensor(), plain.weight.detach())

    centres = torch.randn(50, FEATURES, dtype=torch.float64)
    for layer in (plain, sharded):
        layer.initialize_(centres, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sharded.weight.full_tensor(), plain.weight.detach())
    with pytest.raises(RuntimeError, match="scores of all 11 prototypes are on no rank"):
        sharded(given_features)
    return {"held": len(sharded.weight.to_local())}


def test_the_layer_does_what_one_with_all_prototypes_does(ranks: Ranks) -> None:
    results = ranks.run(layer_of_both, features_on_ranks())
    assert [result["held"] for result in results] == [4, 4, 3]


def drawn_rows(rank: int, seed: int) -> tuple[np.ndarray, float]:
    torch.manual_seed(seed)
    layer = heads(SwAVLoss(FEATURES, K, shard_prototypes=True))[0]
    return whole(layer.weight), torch.rand(()).item()


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 2)])
def test_processes_begin_with_different_rows_whatever_their_seeds(
    ranks: Ranks, seeds: tuple[int, ...]
) -> None:
    (rows, draw), *others = ranks.run(drawn_rows, seeds)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert len(np.unique(rows.round(6), axis=0)) == K
    if seeds[0] == seeds[1]:  # and stay in step afterwards
        assert all(other == draw for _, other in others)


def saved(rank: int, path: str) -> np.ndarray:
    _, criterion = criteria(queue_length=5)
    criterion(torch.randn(VIEWS, 4, FEATURES, dtype=torch.float64))
    with torch.no_grad():
        criterion.prototypes.weight.to_local().add_(rank + 1)
    dcp.save({"model": sharded_state_dict(criterion)}, checkpoint_id=path)
    return whole(criterion.prototypes.weight)


def loaded(rank: int, argument: tuple[str, bool]) -> tuple[np.ndarray, int, Any]:
    path, shard_prototypes = argument
    criterion = SwAVLoss(FEATURES, K, queue_length=5, shard_prototypes=shard_prototypes).double()
    state = {"model": sharded_state_dict(criterion, checkpoint=path)}
    dcp.load(state, checkpoint_id=path)
    load_sharded_state_dict(criterion, state["model"])
    held = criterion.prototypes.weight
    local = len(held.to_local()) if isinstance(held, DTensor) else len(held)
    return whole(held), int(criterion.steps), local


def test_a_checkpoint_goes_on_with_other_numbers_of_processes(
    start_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    path = str(tmp_path / "checkpoint")
    expected = start_ranks(3).run(saved, [path] * 3)[0]
    for processes, shard_prototypes, rows in [
        (3, True, [4, 4, 3]),
        (2, True, [6, 5]),
        (4, True, [3, 3, 3, 2]),
        (2, False, [11, 11]),
        (1, True, [11]),  # one process alone keeps all
    ]:
        results = start_ranks(processes).run(loaded, [(path, shard_prototypes)] * processes)
        assert [held for _, _, held in results] == rows
        for weight, steps, _ in results:
            np.testing.assert_array_equal(weight, expected)
            assert steps == 1


class Whole(nn.Module):
    """A model with the loss inside."""

    def __init__(self, criterion: SwAVLoss) -> None:
        super().__init__()
        self.encoder, self.criterion = encoder(), criterion

    def forward(self, inputs: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.encoder(inputs))
        return loss


def wrapped_by_ddp(model: nn.Module) -> nn.Module:
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, value in model.named_parameters() if isinstance(value, DTensor)]
    )
    return DistributedDataParallel(model)


def wrapped_by_fsdp(model: nn.Module) -> nn.Module:
    return fully_shard(
        model,
        mesh=init_device_mesh("cpu", (dist.get_world_size(),)),
        ignored_params={value for value in model.parameters() if isinstance(value, DTensor)},
    )


def trained_inside(rank: int, argument: tuple[np.ndarray, Any]) -> list[np.ndarray]:
    inputs, wrap = argument
    weights = []
    for criterion, wrapper in zip(criteria(), (DistributedDataParallel, wrap), strict=True):
        model = Whole(criterion)
        parallel = wrapper(model)
        optimizer = torch.optim.SGD(
            [{"params": model.encoder.parameters()}, {"params": criterion.parameters()}], lr=0.3
        )
        for batch in torch.tensor(inputs):
            optimizer.zero_grad()
            parallel(batch).backward()
            optimizer.step()
        weights.append(flat(list(model.parameters())))
    return weights


@pytest.mark.parametrize("wrap", [wrapped_by_ddp, wrapped_by_fsdp])
def test_the_loss_may_be_inside_of_what_is_wrapped(ranks: Ranks, wrap: Any) -> None:
    for plain, sharded in ranks.run(trained_inside, [(own, wrap) for own in batches((4, 4, 4))]):
        np.testing.assert_allclose(sharded, plain, rtol=0, atol=1e-10)


def wrapped_without_care(rank: int) -> str:
    with pytest.raises(RuntimeError) as caught:
        DistributedDataParallel(Whole(criteria(num_prototypes=12)[1]))
    return str(caught.value)


def test_ddp_does_not_take_a_sharded_parameter_by_mistake(ranks: Ranks) -> None:
    assert all("DTensor" in text for text in ranks.run(wrapped_without_care))


def copies(rank: int, features: np.ndarray) -> list[float]:
    pair = dist.new_group([0, 1])
    if rank == 2:
        return []
    _, criterion = criteria(process_group=pair)
    given_features = torch.tensor(features, dtype=torch.float64)
    losses = [criterion(given_features).item(), copy.deepcopy(criterion)(given_features).item()]
    lost = pickle.loads(pickle.dumps(criterion))
    with pytest.raises(RuntimeError, match="process_group was dropped"):
        lost(given_features)
    lost.sinkhorn.process_group = pair
    losses.append(lost(given_features).item())
    assert len(criterion.prototypes.weight.to_local()) == (6, 5)[rank]
    return losses


def test_a_part_of_the_processes_and_copies(ranks: Ranks) -> None:
    for losses in ranks.run(copies, features_on_ranks((3, 2, 4)))[:2]:
        assert losses[0] == losses[1] == losses[2]


def compiled(rank: int, features: np.ndarray) -> None:
    _, criterion = criteria()
    torch._dynamo.reset()
    step = torch.compile(criterion, backend="eager")
    for number in (len(features[0]), rank + 1):
        given_features = torch.tensor(features[:, :number], dtype=torch.float64, requires_grad=True)
        (of_compiled,) = torch.autograd.grad(step(given_features), given_features)
        (of_eager,) = torch.autograd.grad(criterion(given_features), given_features)
        torch.testing.assert_close(of_compiled, of_eager)


@pytest.mark.slow
def test_a_compiled_step_leaves_its_graph_for_it(ranks: Ranks) -> None:
    ranks.run(compiled, features_on_ranks((3, 4, 2)))


def scaled(rank: int) -> tuple[bool, float]:
    """Train a step in which the gradient of one process's prototypes overflows."""
    network = nn.Linear(INPUTS, FEATURES)
    criterion = SwAVLoss(FEATURES, K, shard_prototypes=True)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (network, criterion)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(criterion(network(torch.randn(VIEWS, 4, INPUTS)))).backward()
    own = criterion.prototypes.weight.to_local()
    before = own.clone()
    if rank == 1:
        criterion.prototypes.weight.grad.to_local()[0, 0] = torch.inf
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return torch.equal(own, before), scaler.get_scale()


def test_a_gradient_that_overflows_on_one_process_stops_the_step_of_all(ranks: Ranks) -> None:
    assert ranks.run(scaled) == [(True, 4.0)] * 3


UNSUPPORTED = [
    ("sinkhorn", "hard", True),
    ("sinkhorn", "relaxation", 1.0),
    ("sinkhorn", "tolerance", 0.1),
    ("sinkhorn", "validate", True),
    ("", "memory", "streamed"),
]


def refusals(rank: int) -> None:
    features = torch.randn(VIEWS, 4, FEATURES)
    with pytest.raises(ValueError, match="shard_prototypes must be False with synchronize=False"):
        SwAVLoss(FEATURES, K, shard_prototypes=True, synchronize=False)
    with pytest.raises(ValueError, match="shard_prototypes must be True or False, got 1"):
        SwAVLoss(FEATURES, K, shard_prototypes=1)
    criterion = SwAVLoss(FEATURES, K, queue_length=4, shard_prototypes=True)
    with pytest.raises(RuntimeError, match="no rank has all prototypes"):
        criterion.eval()(features)
    together = SwAVLoss(FEATURES, K, shard_prototypes=True, synchronize="always").eval()
    assert together(features).isfinite()  # by all processes
    criterion.train()
    handle = criterion.loss.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="as SwAVLoss made them"):
        criterion(features)
    handle.remove()
    for owner, name, value in UNSUPPORTED:
        part = criterion.get_submodule(owner)
        usual = getattr(part, name)
        setattr(part, name, value)
        with pytest.raises(ValueError, match=f"{name} must be .* if prototypes are sharded"):
            criterion(features)
        setattr(part, name, usual)
    with pytest.raises(RuntimeError, match="size mismatch for prototypes"):
        criterion.load_state_dict({"prototypes.weight": torch.zeros(K + 1, FEATURES)}, strict=False)
    assert int(criterion.steps) == len(criterion.queue) == 0


def test_what_cannot_be_is_an_error_that_says_why(ranks: Ranks) -> None:
    ranks.run(refusals)


def test_one_process_alone_keeps_all_prototypes() -> None:
    criterion = SwAVLoss(FEATURES, K, shard_prototypes=True)
    assert type(criterion.prototypes) is PrototypeLayer
    loss, details = criterion.eval()(torch.randn(VIEWS, 4, FEATURES), return_details=True)
    assert isinstance(details, SwAVDetails)
    assert loss.isfinite()


HALVES = (torch.float16, torch.bfloat16)


def half_precisions(rank: int) -> None:
    for of_features, of_queue, of_autocast in itertools.product(HALVES, HALVES, HALVES):
        criterion = SwAVLoss(
            FEATURES, K, queue_length=4, queue_dtype=of_queue, shard_prototypes=True
        )
        features = torch.randn(VIEWS, 4 + rank, FEATURES, dtype=of_features, requires_grad=True)
        with torch.autocast("cpu", dtype=of_autocast):
            for _ in range(2):
                loss = criterion(list(features), sample_weight=torch.ones(4 + rank).to(of_queue))
        loss.backward()
        assert loss.isfinite()
        assert features.grad is not None


def test_any_two_half_precisions_meet_under_autocast(ranks: Ranks) -> None:
    ranks.run(half_precisions)
