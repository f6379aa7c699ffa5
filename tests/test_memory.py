"""Memory for large results: like torch's own, but for where it comes from."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from swavkit._tensors import empty
from tests import tolerances

SHAPES = pytest.mark.parametrize("shape", [(3, 5), (2, 1024, 1031)], ids=["small", "large"])


@SHAPES
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_new_memory_is_like_that_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    new, usual = empty(shape, dtype, torch.zeros(1)), torch.empty(shape, dtype=dtype)
    assert (new.shape, new.stride(), new.dtype) == (usual.shape, usual.stride(), usual.dtype)
    assert new.data_ptr() % 64 == 0
    assert not new._is_view()
    assert not new.requires_grad
    new.fill_(2)
    assert new.sum(dtype=torch.float64) == 2 * usual.numel()
    assert torch.equal(torch.stack([new, new])[1], new)


@SHAPES
def test_gradients_flow_through_changes_of_it_in_place(shape: tuple[int, ...]) -> None:
    factor = torch.tensor(3.0, requires_grad=True)
    empty(shape, torch.float32, torch.zeros(1)).fill_(1).mul_(factor).mean().backward()
    torch.testing.assert_close(factor.grad, torch.tensor(1.0))


def test_memory_outlives_whoever_asked_for_it() -> None:
    tensors = [empty((1024, 1031), torch.float32, torch.zeros(1)).fill_(i) for i in range(8)]
    copies = [tensor.clone() for tensor in tensors]
    for index, (tensor, copy) in enumerate(zip(tensors, copies, strict=True)):
        assert torch.equal(tensor, torch.full_like(tensor, index))
        assert torch.equal(tensor, copy)


@SHAPES
def test_a_tensor_without_memory_gets_another_one(shape: tuple[int, ...]) -> None:
    assert empty(shape, torch.float32, torch.zeros(1, device="meta")).device.type == "meta"
    with FakeTensorMode():
        assert isinstance(empty(shape, torch.float32, torch.zeros(1)), FakeTensor)
