"""The matrix: each component, device, dtype and mode, against the float64 oracle.

``tests/matrix.py`` says which cells there are, and ``--matrix FILE`` writes their outcomes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests import tolerances
from tests.matrix import CELLS, COMPONENTS, FORWARD_ONLY, Case, Cell, Mode, arrays

# A graph of the backward pass as well, for the dtype of parameters, with and without autocast. In
# other dtypes autograd differentiates the compiled forward pass, which takes half the time.
BACKENDS = {torch.float32: "aot_eager"}


# A graph takes seconds, and rarely tells of one dtype what it does not tell of float32.
MARKED = [
    pytest.param(component, dtype, mode, marks=pytest.mark.slow)
    if mode.execution == "compiled" and dtype != torch.float32
    else (component, dtype, mode)
    for component, dtype, mode in CELLS
]


@pytest.mark.matrix
@pytest.mark.parametrize(("component", "dtype", "mode"), MARKED, ids=str)
def test_a_cell_of_the_matrix(
    device: torch.device, component: str, dtype: torch.dtype, mode: Mode
) -> None:
    forward = mode.direction == "forward"
    # The eager forward pass is one in no_grad mode; compiled, that would be a second graph.
    gradient = not forward or mode.execution == "compiled"
    cell, case, results = run(component, device, dtype, mode[:2], gradient)
    if forward:
        for result in results:
            assert result.requires_grad == (gradient and component not in FORWARD_ONLY)
        assert_close(results, case.expected, case.dtype, case.atol or tolerances.ATOL[case.dtype])
        return
    upstream = [torch.sign(result.detach() + 0.01) for result in results]
    with cell.inside if mode.direction == "backward inside" else nullcontext():
        found = torch.autograd.grad(results, case.leaves, upstream, retain_graph=True)
    rounded = {dtype, cell.products} if case.products else {dtype}
    atol = 4 * max(tolerances.ATOL[each] for each in rounded)
    assert_close(found, case.gradients(arrays(*upstream)), dtype, atol)


@lru_cache(maxsize=1)  # a compiled graph, and each backward pass, is that of one forward pass
def run(
    component: str,
    device: torch.device,
    dtype: torch.dtype,
    how: tuple[str, str],
    gradient: bool,
) -> tuple[Cell, Case, list[Tensor]]:
    """Return the results of a component, in no_grad mode or with their graph."""
    execution, context = how
    cell = Cell(device, dtype, context)
    case = COMPONENTS[component](cell)
    call = case.call
    if execution == "compiled":
        torch._dynamo.reset()
        call = torch.compile(call, backend=BACKENDS.get(dtype, "eager"), fullgraph=True)
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradient), cell.context:
        returned = call(*case.inputs)
        return cell, case, tree_leaves(returned) if case.read is None else list(case.read())


def test_the_file_of_the_docs_holds_every_cell() -> None:
    path = Path(__file__).resolve().parent.parent / "docs" / "matrix.json"
    file = json.loads(path.read_text(encoding="utf-8"))
    outcomes = {
        (component, device, dtype, mode): outcome
        for component, of_devices in file["cells"].items()
        for device, of_dtypes in of_devices.items()
        for dtype, of_modes in of_dtypes.items()
        for mode, outcome in of_modes.items()
    }
    cells = [
        (component, str(dtype).removeprefix("torch."), str(mode))
        for component, dtype, mode in CELLS
    ]
    expected = {(each[0], device, *each[1:]) for each in cells for device in ("cpu", "cuda")}
    assert outcomes.keys() == expected
    of_cuda = "passed" if file["devices"]["cuda"] else "skipped: there is no CUDA device"
    for (_, device, *_), outcome in outcomes.items():
        assert outcome == ("passed" if device == "cpu" else of_cuda)


def assert_close(
    found: Sequence[Tensor], expected: Sequence[Any], dtype: torch.dtype, atol: float
) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        largest = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(*arrays(one), other, rtol=0, atol=atol * largest)
