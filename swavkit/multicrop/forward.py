"""``multi_crop_forward``: the forward pass of crops of several resolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import autocast_disabled

__all__ = ["multi_crop_forward"]


def multi_crop_forward(
    network: Callable[[Tensor], Any],
    crops: Sequence[Tensor],
    *,
    key: int | str | None = None,
    together: bool = True,
) -> Tensor | list[Tensor]:
    """Run ``network`` once per resolution and return the features in the order of ``crops``.

    Crops of one resolution are concatenated, so batch statistics are computed per resolution.
    Resolutions run in the order of their first appearance. With ``together=False`` each crop has
    its own pass, in the order of ``crops``: batch statistics are computed per crop, and without a
    gradient less memory is in use at a time.

    With ``DistributedDataParallel``, call this function inside the wrapped module, as in the
    example. If only the network is wrapped and it has BatchNorm, pass ``broadcast_buffers=False``.
    Otherwise, up to PyTorch 2.11, the wrapper overwrites the buffers between two resolutions, and
    the backward pass fails.

    Args:
        network: Maps (N, C, H, W) crops to features (N, D), tokens (N, T, D) or feature maps
            (N, D, h, w), with the same D for all resolutions.
        crops: V tensors (B, C, H, W), resolutions in any order.
        key: Location of the features in a structured output: the index into a tuple or list, the
            key of a dictionary or the name of an attribute.
        together: Whether crops of one resolution share a pass.

    Returns:
        Features (V, B, D), tokens (V, B, T, D) or feature maps (V, B, D, h, w). If T, or h and w,
        differ between resolutions, a list with (B, T, D) or (B, D, h, w) per crop.

    Raises:
        TypeError: If a crop or the network's features are not a floating-point tensor.
        ValueError: If there is no crop, the crops differ in B or C, the features have another
            shape or differ in D, or the output holds nothing under ``key``.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> crops = [torch.rand(4, 3, size, size) for size in (16, 16, 8)]
        >>> multi_crop_forward(network, crops).shape
        torch.Size([3, 4, 3])
        >>> [tuple(maps.shape) for maps in multi_crop_forward(torch.nn.Conv2d(3, 5, 1), crops)]
        [(4, 5, 16, 16), (4, 5, 16, 16), (4, 5, 8, 8)]
        >>> class Model(torch.nn.Module):  # the module to wrap in DistributedDataParallel
        ...     def __init__(self, network):
        ...         super().__init__()
        ...         self.network = network
        ...
        ...     def forward(self, crops):
        ...         return multi_crop_forward(self.network, crops)

    References:
        Caron et al. 2020, arXiv 2006.09882, section 3.2.
    """
    if not isinstance(crops, (list, tuple)):
        raise TypeError(f"crops must be a sequence of torch.Tensor, got {type(crops).__name__}")
    if not crops:
        raise ValueError("crops must hold at least one tensor, got none")
    if key is not None and (isinstance(key, bool) or not isinstance(key, (int, str))):
        raise TypeError(f"key must be an int, a str or None, got {type(key).__name__}")
    _checks.boolean("together", together)
    for index, crop in enumerate(crops):
        _checks.floating_tensor(f"crops[{index}]", crop)
        if crop.dim() != 4:
            raise ValueError(
                f"crops[{index}] must have shape (B, C, H, W), got {tuple(crop.shape)}"
            )
        if crop.shape[:2] != crops[0].shape[:2]:
            raise ValueError(
                f"crops[{index}] must have shape (B, C, H, W) with B and C as in crops[0], got "
                f"{tuple(crop.shape)} beside {tuple(crops[0].shape)}"
            )
        _checks.same_device(f"crops[{index}]", crop, crops[0])
    features: dict[int, Tensor] = {}
    for members in _passes(crops, together):
        height, width = crops[members[0]].shape[2:]
        name = f"the output of network for crops of {height}x{width}"
        with autocast_disabled(crops[0].device):  # autocast rejects the other half dtype
            batch = torch.cat([crops[index] for index in members])
        output = _entry(key, name, network(batch))
        _checks.floating_tensor(name, output)
        if not 2 <= output.dim() <= 4 or len(output) != len(batch):
            size = len(batch)
            raise ValueError(
                f"{name} must have shape ({size}, D), ({size}, T, D) or ({size}, D, h, w), got "
                f"{tuple(output.shape)}"
            )
        views = output.reshape(len(members), len(crops[0]), *output.shape[1:])
        features.update(zip(members, views, strict=True))
        if views.dim() != features[0].dim() + 1:
            raise ValueError(
                f"{name} must have {features[0].dim()} dimensions as for the crops before, got "
                f"shape {tuple(output.shape)}"
            )
        if _dimension(output) != _dimension(features[0]):
            raise ValueError(
                f"{name} must have D = {_dimension(features[0])} as for the crops before, got "
                f"{tuple(output.shape)}"
            )
    in_order = [features[index] for index in range(len(crops))]
    if not all(_checks.same_shape(one.shape, in_order[0].shape) for one in in_order):
        return in_order
    with autocast_disabled(crops[0].device):
        return torch.stack(in_order)


def _passes(crops: Sequence[Tensor], together: bool) -> list[list[int]]:
    """Return the positions of the crops in each pass."""
    if not together:
        return [[index] for index in range(len(crops))]
    positions: dict[tuple[int, int], list[int]] = {}
    for index, crop in enumerate(crops):
        positions.setdefault((crop.shape[2], crop.shape[3]), []).append(index)
    return list(positions.values())


def _dimension(features: Tensor) -> int:
    """Return D of (N, D), (N, T, D) or (N, D, h, w)."""
    return features.shape[1 if features.dim() == 4 else -1]


def _entry(key: int | str | None, name: str, output: Any) -> Any:
    """Return the entry of ``output`` under ``key``."""
    if key is None:
        if isinstance(output, (tuple, list, Mapping)):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(output).__name__}: pass key to select "
                f"the features from it"
            )
        return output
    if isinstance(output, Tensor):
        raise TypeError(f"{name} must be a tuple, list or dictionary for key={key!r}, got a Tensor")
    if isinstance(key, str) and not isinstance(output, Mapping) and hasattr(output, key):
        return getattr(output, key)
    try:
        return output[key]
    except (KeyError, IndexError, TypeError) as error:
        held = list(output) if isinstance(output, Mapping) else type(output).__name__
        raise ValueError(f"{name} must have something under key={key!r}, got {held}") from error
