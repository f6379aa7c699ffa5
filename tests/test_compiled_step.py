"""A whole training step, compiled: one graph, and the results of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from swavkit import SwAVLoss, multi_crop_forward
from tests.test_statistics_of_loss import of_form

DIMENSION, PROTOTYPES, SAMPLES = 6, 5, 8
SETTINGS: dict[str, Any] = {"queue_length": 20, "queue_start": 2, "freeze_steps": 3}


def crops_of(samples: int) -> list[Tensor]:
    # No size is that of a batch: equal sizes would be one symbol of a dynamic graph.
    return [torch.rand(samples, 1, size, size, dtype=torch.float64) for size in (10, 10, 7)]


class Training(nn.Module):
    """A network, its loss and an optimizer, whose step is a function of tensors alone."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, DIMENSION)),
        )
        self.criterion = SwAVLoss(DIMENSION, PROTOTYPES, **SETTINGS)
        self.double()
        self.optimizer = optimizer
        self.trained = list(self.parameters())
        zeros = [torch.zeros_like(parameter) for parameter in self.trained]
        self.first, self.second = zeros, copy.deepcopy(zeros)
        self.steps = [torch.zeros((), dtype=torch.float64) for _ in zeros]

    def loss(self, crops: list[Tensor]) -> Tensor:
        return self.criterion(multi_crop_forward(self.network, crops))

    def step(self, crops: list[Tensor]) -> Tensor:
        """Make a step. torch.optim.Optimizer.step breaks the graph, and the functions do not."""
        loss = self.loss(crops)
        gradients = list(torch.autograd.grad(loss, self.trained))
        with torch.no_grad():
            if self.optimizer == "SGD":
                sgd(
                    self.trained,
                    gradients,
                    self.first,  # type: ignore[arg-type]
                    foreach=True,
                    **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "dampening": 0.0},
                    **{"nesterov": False, "maximize": False},
                )
            else:
                adamw(
                    self.trained,
                    gradients,
                    *(self.first, self.second, [], self.steps),
                    foreach=True,
                    capturable=torch.compiler.is_compiling(),  # elsewhere not on a CPU
                    **{"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
                    **{"weight_decay": 0.05, "amsgrad": False, "maximize": False},
                )
        return loss.detach()


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    assert_close(first.state_dict(), second.state_dict())


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch traces no gradient inside a graph",
)
@torch._dynamo.config.patch(trace_autograd_ops=True)
@pytest.mark.parametrize(
    ("optimizer", "backend", "options", "last", "graphs"),
    [
        ("SGD", "eager", {}, 5, 2),
        pytest.param("AdamW", "eager", {}, SAMPLES, 1, marks=pytest.mark.slow),
        pytest.param("AdamW", "inductor", {"dynamic": True}, 4, 2, marks=pytest.mark.slow),
    ],
)
def test_forward_backward_and_update_are_one_graph(
    optimizer: str, backend: str, options: dict[str, Any], last: int, graphs: int
) -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend(backend)
    eager = Training(optimizer)
    training = copy.deepcopy(eager)
    compiled = torch.compile(training.step, fullgraph=True, backend=counting, **options)
    for samples in [SAMPLES] * 20 + [last]:  # the queue fills, takes part, and freezing ends
        crops = crops_of(samples)
        assert_close(compiled(crops), eager.step(crops))
        assert_same(training, eager)
    assert len(training.criterion.queue) == 20
    assert training.criterion.steps == 21
    assert counting.frame_count == graphs


@pytest.mark.slow
def test_reduced_overhead_gives_the_results_of_eager() -> None:
    torch._dynamo.reset()
    eager = Training("SGD")
    training = copy.deepcopy(eager)
    compiled = torch.compile(training.loss, fullgraph=True, mode="reduce-overhead")
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (training, eager)]
    for _ in range(5):
        crops = crops_of(SAMPLES)
        losses = compiled(crops), eager.loss(crops)
        assert_close(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_same(training, eager)


# Compiled as usual: the loss alone, and its gradients by the backward pass of the graph

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full, heads, all that can be returned": (
        {"memory": "full", "num_prototypes": (PROTOTYPES, 3)},
        {"sample_weight": True, "return_details": True, "return_statistics": True},
    ),
    "streamed": ({"memory": "streamed"}, {"sample_weight": True, "return_statistics": True}),
    "auto, fused": ({"memory": "auto"}, {"return_statistics": True}),
    "full, teacher": ({"memory": "full", "relaxation": 0.5}, {"code_features": True}),
    "streamed, heads, teacher": (
        {
            "memory": "streamed",
            "num_prototypes": (PROTOTYPES, 3),
            "prototype_weight": [torch.tensor([1, 2, 0.5, 0, 1]), None],
            "hard": True,
        },
        {"code_features": True},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_any_settings_is_one_graph(device: torch.device, form: str) -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("aot_eager")
    settings, given = FORMS[form]
    settings = {"num_prototypes": PROTOTYPES, "queue_length": 12} | settings
    eager, teacher = (
        SwAVLoss(DIMENSION, queue_start=2, freeze_steps=1, **settings).double().to(device)
        for _ in range(2)
    )
    criterion = copy.deepcopy(eager)
    compiled = torch.compile(criterion, fullgraph=True, backend=counting)
    for step in range(4):
        features = torch.randn(3, SAMPLES, DIMENSION, dtype=torch.float64, device=device)
        arguments = dict(given)
        if "sample_weight" in given:
            arguments["sample_weight"] = torch.arange(SAMPLES, device=device) % 4 + float(step)
        if "code_features" in given:
            arguments["code_features"] = features[:2] + 0.1 * torch.rand_like(features[:2])
            arguments["code_prototypes"] = teacher.prototypes
        results = []
        with of_form(form, rows=24):  # 2 blocks
            for function, module in ((compiled, criterion), (eager, eager)):
                leaf = features.clone().requires_grad_()
                found = function(leaf, **arguments)
                loss = found if isinstance(found, Tensor) else found[0]
                gradients = torch.autograd.grad(loss, [leaf, *module.parameters()])
                results.append((found, gradients, module.state_dict()))
        assert_close(*results)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.1)
    assert counting.frame_count == 1
