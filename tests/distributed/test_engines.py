"""The loss inside what users train with: DDP, FSDP2, torch.compile, activation checkpointing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from swavkit import PrototypeLayer, SwAVLoss
from tests.distributed.one_answer import (
    EACH_VARIANT,
    INPUTS,
    STEPS,
    VIEWS,
    Network,
    assert_one_answer,
    flat,
    under_ddp,
)
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed


def checkpointed(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    return checkpoint(module, *inputs, use_reentrant=False, **named)


class Checkpointed(nn.Module):
    """A module whose every call is checkpointed, and repeated to its very end."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor, weight: Tensor | None, details: bool) -> Any:
        with set_checkpoint_early_stop(False):
            return checkpointed(self.module, inputs, weight, False)


def ddp_around_each(network: Network, group: Any) -> nn.Module:
    encoder, criterion = map(DistributedDataParallel, (network.encoder, network.criterion))
    network.call_encoder = lambda module, *inputs: encoder(*inputs)
    network.call_criterion = lambda module, *inputs, **named: criterion(*inputs, **named)
    return network


def fsdp_around_the_root(network: Network, group: Any) -> nn.Module:
    return fully_shard(network)


def fsdp_around_each(network: Network, group: Any) -> nn.Module:
    fully_shard(network.encoder)
    fully_shard(network.criterion)
    return network


def fsdp_around_the_loss_and_the_root(network: Network, group: Any) -> nn.Module:
    fully_shard(network.criterion)
    return fully_shard(network)


def fsdp_around_prototypes_and_the_root(network: Network, group: Any) -> nn.Module:
    network.criterion.memory = "full"  # layers that FSDP2 has taken over are called
    prototypes = network.criterion.prototypes
    for layer in prototypes if isinstance(prototypes, nn.ModuleList) else [prototypes]:
        fully_shard(layer)
    return fully_shard(network)


def checkpointed_encoder(network: Network, group: Any) -> nn.Module:
    network.call_encoder = checkpointed
    return under_ddp(network, group)


def checkpointed_loss(network: Network, group: Any) -> nn.Module:
    network.call_criterion = checkpointed
    return under_ddp(network, group)


def checkpointed_network(network: Network, group: Any) -> nn.Module:
    return DistributedDataParallel(Checkpointed(network))


def checkpointed_both_under_fsdp(network: Network, group: Any) -> nn.Module:
    network.call_encoder = network.call_criterion = checkpointed
    return fsdp_around_the_loss_and_the_root(network, group)


def ddp_around_a_compiled_network(network: Network, group: Any) -> Callable[..., Any]:
    network.call_encoder = checkpointed
    torch._dynamo.reset()
    network.compile(backend="aot_eager", fullgraph=True)
    parallel = under_ddp(network, group)
    return lambda inputs, weight, details: parallel(inputs, weight, False)


def compiled_ddp(network: Network, group: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    parallel = torch.compile(under_ddp(network, group), backend="aot_eager")
    return lambda inputs, weight, details: parallel(inputs, weight, False)


ENGINES = [
    under_ddp,
    ddp_around_each,
    fsdp_around_the_root,
    fsdp_around_each,
    fsdp_around_the_loss_and_the_root,
    fsdp_around_prototypes_and_the_root,
    checkpointed_encoder,
    checkpointed_loss,
    checkpointed_network,
    checkpointed_both_under_fsdp,
]


@EACH_VARIANT
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {"sizes": (3, 3), "queue_length": 6, "freeze_steps": 4},
        {"sizes": (4, 1), "num_prototypes": (5, 3), "queue_length": 4 * STEPS, "weights": (0, 2)},
    ],
    ids=["queue and freezing", "heads and weights"],
)
def test_an_engine_gives_the_answer_of_one_process(
    start_ranks: Callable[[int], Ranks],
    engine: Callable[..., Any],
    options: dict[str, Any],
    variant: dict[str, Any],
) -> None:
    assert_one_answer(start_ranks(2), engine=engine, **options, **variant)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "num_prototypes", "iterations", "variant"),
    [  # each engine with both kinds of prototypes and of memory; iterations take long to compile
        (ddp_around_a_compiled_network, 7, 2, {}),
        (ddp_around_a_compiled_network, (5, 3), 1, {"memory": "streamed"}),
        (compiled_ddp, 7, 2, {"memory": "streamed"}),
        (compiled_ddp, (5, 3), 1, {}),
    ],
)
def test_a_compiled_step_gives_the_answer_of_one_process(
    start_ranks: Callable[[int], Ranks],
    engine: Callable[..., Any],
    num_prototypes: Any,
    iterations: int,
    variant: dict[str, Any],
) -> None:
    assert_one_answer(
        start_ranks(2),
        (3, 2),
        engine=engine,
        queue_length=3 * STEPS,
        freeze_steps=4,
        weights=(0, 1, 2),
        iterations=iterations,
        num_prototypes=num_prototypes,
        **variant,
    )


# Gradients accumulated over several batches


def sums_of_gradients(rank: int, argument: tuple[str, np.ndarray]) -> np.ndarray:
    """Return the gradients of three batches together, of two rounds with a step after each."""
    engine, inputs = argument
    network = Network(torch.float64, queue_length=8 if engine == "alone" else 4)
    call: Any = network
    if engine == "ddp":
        call = under_ddp(network, None)
    elif engine == "fsdp":
        call = fsdp_around_the_loss_and_the_root(network, None)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    gradients = []
    for of_round in torch.tensor(inputs):
        optimizer.zero_grad()
        for index, batch in enumerate(of_round):
            last = index == len(of_round) - 1
            if engine == "fsdp":
                call.set_requires_gradient_sync(last)
            with call.no_sync() if engine == "ddp" and not last else nullcontext():
                call(batch, None, False)[0].backward()
        gradients.append(flat([parameter.grad for parameter in parameters]))
        optimizer.step()
    return np.array(gradients)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_gradients_accumulate_without_synchronisation_of_the_engine(
    start_ranks: Callable[[int], Ranks], engine: str
) -> None:
    inputs = np.random.default_rng(0).normal(size=(2, 3, VIEWS, 4, INPUTS))
    shards = inputs[..., :2, :], inputs[..., 2:, :]
    alone = sums_of_gradients(0, ("alone", inputs))
    for gradients in start_ranks(2).run(sums_of_gradients, [(engine, part) for part in shards]):
        np.testing.assert_allclose(gradients, alone, rtol=0, atol=1e-10)


# Activation checkpointing that cannot be right


def repeated(rank: int, settings: dict[str, Any]) -> dict[str, str | None]:
    torch.manual_seed(0)
    features = torch.randn(3, 4, 4, requires_grad=True)

    def with_details(criterion: SwAVLoss) -> Tensor:
        loss, details = criterion(features * 2, return_details=True)
        return loss + (features.mean() * details.codes.sum()).exp()

    def with_validation(criterion: SwAVLoss) -> Tensor:
        loss: Tensor = checkpoint(criterion, features, use_reentrant=True)
        criterion.eval()(features)
        criterion.train()
        return loss

    outcome: dict[str, str | None] = {}
    for name, call in {
        "reentrant": lambda criterion: checkpoint(criterion, features, use_reentrant=True),
        "reentrant, then a validation": with_validation,
        "details": lambda criterion: checkpoint(with_details, criterion, use_reentrant=False),
    }.items():
        criterion = SwAVLoss(4, 5, **settings)
        loss = call(criterion)
        try:
            loss.backward()
        except RuntimeError as error:
            outcome[name] = str(error)
        else:
            outcome[name] = None
        assert int(criterion.steps) == 1
        assert criterion.queue is None or len(criterion.queue) == 4
    return outcome


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, {}),
        (
            {"queue_length": 8},
            {
                "reentrant": "a queue",
                "reentrant, then a validation": "a queue",
                "details": "a queue",
            },
        ),
        (
            {"freeze_steps": 3},
            {"reentrant": "freeze_steps", "reentrant, then a validation": "freeze_steps"},
        ),
    ],
)
def test_repetitions_that_would_see_another_state_are_refused(
    start_ranks: Callable[[int], Ranks], settings: dict[str, Any], refused: dict[str, str]
) -> None:
    for outcome in start_ranks(2).run(repeated, [settings] * 2):
        for name, text in outcome.items():
            if name in refused:
                assert text is not None
                assert f"SwAVLoss with {refused[name]} cannot be" in text
            else:
                assert text is None


@pytest.mark.parametrize("queue_length", [0, 8])
def test_a_repeated_loss_is_the_first_one_or_nan(queue_length: int) -> None:
    torch.manual_seed(0)
    criterion = SwAVLoss(4, 5, queue_length=queue_length)
    twin = copy.deepcopy(criterion)
    for step in range(3):
        features = torch.randn(3, 4, 4)
        gradients = []
        for module in (criterion, twin):
            inputs, scale = features.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)

            def scaled(values: Tensor, factor: Tensor, module: nn.Module = module) -> Tensor:
                return module(values) * factor

            call = checkpointed if module is criterion else lambda function, *args: function(*args)
            loss = call(scaled, inputs, scale)
            with torch.no_grad():
                module.eval()(features)  # in between, which changes nothing
            module.train()
            loss.backward()
            gradients.append((inputs.grad, scale.grad))
        (found, of_scale), (expected, expected_of_scale) = gradients
        assert torch.equal(found, expected)
        # The product needs the loss, which has another queue in the backward pass.
        if queue_length:
            assert of_scale.isnan()
        else:
            assert torch.equal(of_scale, expected_of_scale)
        assert criterion.steps == step + 1


# Between the calls of FSDP2, which keeps the weight in shards


def prototypes_in_shards(rank: int) -> dict[str, Any]:
    network = Network(torch.float64)
    prototypes = network.criterion.prototypes
    assert isinstance(prototypes, PrototypeLayer)
    with torch.no_grad():
        prototypes.weight.mul_(torch.arange(1, 8).unsqueeze(1))
    expected, samples = prototypes.directions.clone(), torch.randn(5, 4).double()
    indices = prototypes.assign(samples)
    fsdp_around_the_loss_and_the_root(network, None)
    outcome: dict[str, Any] = {}
    for name, call in {
        "assign": lambda: prototypes.assign(samples),
        "call": lambda: prototypes(samples),
        "initialize_": lambda: prototypes.initialize_(torch.randn(50, 4).double()),
    }.items():
        with pytest.raises(RuntimeError) as caught:
            call()
        outcome[name] = str(caught.value)
    network.criterion.unshard()
    outcome["gathered"] = torch.equal(prototypes.assign(samples), indices)
    network.criterion.reshard()
    outcome["directions"] = torch.equal(prototypes.directions.full_tensor(), expected)
    prototypes.normalize_()
    norms = prototypes.weight.full_tensor().norm(dim=1)
    outcome["norms"] = (norms - 1).abs().max().item()
    network.criterion.check_ranks()
    return outcome


def test_what_is_asked_of_prototypes_in_shards_is_right_or_refused(
    start_ranks: Callable[[int], Ranks],
) -> None:
    for outcome in start_ranks(2).run(prototypes_in_shards):
        for name in ("assign", "call", "initialize_"):
            assert outcome[name].startswith("weight is sharded, as FSDP2 keeps it between")
        assert outcome["gathered"]
        assert outcome["directions"]
        assert outcome["norms"] < 1e-12
