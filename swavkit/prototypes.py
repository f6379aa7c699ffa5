"""Prototypes: K learned directions, and the cosines of features with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._autograd import UnitRows, linear
from swavkit._tensors import at_least_float32
from swavkit.distributed.collectives import is_sharded

__all__ = ["PrototypeLayer"]


class PrototypeLayer(nn.Module):
    r"""Scores of features against K prototypes: S = Z Cᵀ for unit rows Z and C, without a bias.

    The layer normalizes both factors, so scores are cosines for any norms of the features and of
    the stored weight. The published procedure instead renormalizes the weight in place before each
    step, which fails if two forwards precede a backward, and is lost under sharding.

    The stored norms do not change scores, but they affect the step size: for the same update, a row
    of twice the norm turns half as far. To keep norms at 1, as the authors do, register a hook::

        optimizer.register_step_post_hook(lambda *_: prototypes.normalize_())

    Args:
        feature_dim: D, the number of features, at least 1.
        num_prototypes: K, the number of prototypes, at least 1.
        gradient: ``"tangent"`` differentiates through the normalization of the weight: the gradient
            of a row is orthogonal to it, and renormalization is never needed. ``"published"``
            treats the norm of a row as a constant; with :meth:`normalize_` after each optimizer
            step, this is exactly the authors' procedure.

    Attributes:
        weight: (K, D) parameter, initially uniform on the unit sphere. Its rows need not keep unit
            norm.

    Shape:
        features (..., D) give scores (..., K). The product is computed in the promoted dtype of
        features and weight, or under autocast in the autocast dtype, like ``nn.Linear``.
        Normalization is in float32, or float64 for float64 input. A zero row has cosine 0 with
        every row, and gradient 0.

    Raises:
        TypeError: If a size is not an int, or ``features`` is not a floating-point tensor.
        ValueError: If a setting is out of range, or if ``features`` have a last dimension other
            than D or are on another device.
        RuntimeError: If FSDP2 has not gathered the weight, or if a method would modify a weight
            computed by a parametrization.

    Example:
        >>> prototypes = PrototypeLayer(feature_dim=16, num_prototypes=5)
        >>> scores = prototypes(torch.randn(8, 16))
        >>> scores.shape, bool((scores.abs() <= 1 + 1e-6).all())
        (torch.Size([8, 5]), True)
        >>> prototypes.assign(prototypes.directions)
        tensor([0, 1, 2, 3, 4])
    """

    __prepare_scriptable__ = _checks.refuse_scripting

    _held = slice(None)  # the prototypes of this rank

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int,
        *,
        gradient: Literal["tangent", "published"] = "tangent",
    ) -> None:
        super().__init__()
        self.feature_dim = _checks.positive_int("feature_dim", feature_dim)
        self.num_prototypes = _checks.positive_int("num_prototypes", num_prototypes)
        self.gradient: Literal["tangent", "published"] = gradient
        self._check_gradient()
        self.weight = nn.Parameter(self._new_rows())
        self.reset_parameters()

    def _new_rows(self) -> Tensor:
        return torch.empty(self.num_prototypes, self.feature_dim)

    def _check_gradient(self) -> None:
        _checks.choice("gradient", self.gradient, ("tangent", "published"))

    def reset_parameters(self) -> None:
        """Draw the prototypes uniformly on the unit sphere, from torch's global generator."""
        self._require_stored_weight()
        nn.init.normal_(self.weight)
        self.normalize_()

    @torch.no_grad()
    def initialize_(self, features: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Initialize the prototypes from features, in place, before the first step.

        Wrap the layer in ``DistributedDataParallel`` afterwards, which broadcasts the prototypes of
        rank 0, or pass the same features and random state on each rank.

        Args:
            features: (K, D) centers, one per prototype and in this order; or (..., D) features of
                more than K samples, of which K are drawn without replacement. Norms are arbitrary.
                Zero rows and rows with a NaN or infinite entry are skipped; if too few others are
                left, the remaining prototypes are unchanged.
            generator: The random generator, on the device of ``features``; torch's global one by
                default.
        """
        self._check(features)
        self._require_stored_weight()
        rows = features.detach().flatten(0, -2) if features.dim() > 1 else features[None]
        if len(rows) < self.num_prototypes:
            raise ValueError(
                f"features must hold at least {self.num_prototypes} samples, one for each "
                f"prototype, got {len(rows)}"
            )
        usable = rows.isfinite().all(dim=-1) & (rows != 0).any(dim=-1)
        if len(rows) > self.num_prototypes:
            # Not torch.rand, which takes no generator=None when it is compiled for any size.
            order = torch.empty(len(rows), device=rows.device).uniform_(generator=generator)
            chosen = order.masked_fill_(~usable, -1).topk(self.num_prototypes).indices
            rows, usable = rows.index_select(0, chosen), usable.index_select(0, chosen)
        directions = unit_rows(rows[self._held]).to(self.weight.dtype)
        stored = self._rows()
        stored.copy_(torch.where(usable[self._held].unsqueeze(-1), directions, stored))

    def forward(self, features: Tensor, *, frozen: Tensor | None = None) -> Tensor:
        """Return the cosines of ``features`` with the prototypes.

        Args:
            features: (..., D) floating-point features of any norm.
            frozen: A bool scalar tensor. If true, the gradient of the weight is zero: prototypes do
                not turn, yet no parameter lacks a gradient, as DDP requires. The value is used on
                the device, so a compiled step stays one graph.

        Returns:
            (..., K) scores in [-1, 1] up to rounding.
        """
        return linear(*self._factors(features, frozen))

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns anything

    def _factors(self, features: Tensor, frozen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the factors of the scores: unit rows (..., D) and (K, D), in one dtype."""
        self._check(features)
        self._check_gradient()
        weight = self._rows()
        if frozen is not None:
            # Not a gradient times 0: that would make NaN of an infinite one.
            weight = torch.where(frozen, weight.detach(), weight)
        directions = unit_rows(weight, differentiate_norm=self.gradient == "tangent")
        dtype = torch.promote_types(features.dtype, weight.dtype)
        return unit_rows(features).to(dtype), directions.to(dtype)

    @property
    def directions(self) -> Tensor:
        """The prototypes as unit rows, (K, D), in the dtype of the weight, without gradient.

        While FSDP2 shards the weight, they are a ``DTensor`` with the same sharding. All ranks must
        call its ``full_tensor()``.
        """
        return unit_rows(self._rows().detach()).to(self.weight.dtype)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Rescale the stored rows to unit norm, in place. Scores do not change.

        Under FSDP2, call it after the optimizer step, while the weight is sharded: changes to the
        gathered copy used by a forward are lost.
        """
        self._require_stored_weight()
        rows = self._rows()
        rows.copy_(unit_rows(rows).to(rows.dtype))

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Return the index of the nearest prototype of each feature, (...,) int64.

        Under FSDP2, gather the weight first, with ``unshard()`` of the module that was given to
        ``fully_shard``.
        """
        return self(features).argmax(dim=-1)

    def _rows(self) -> Tensor:
        """Return the stored rows of this rank."""
        return self.weight

    def _require_stored_weight(self) -> None:
        """Check that the weight is stored and not computed from other parameters at each use."""
        if "weight" not in self._parameters and "weight" not in self._buffers:
            raise RuntimeError(
                "weight must be a parameter of the layer to be written to, got one that is "
                "computed from others, as by weight_norm or another parametrization; expected "
                "initialize_, normalize_ or reset_parameters before that is registered, or after "
                "it is removed"
            )

    def _check(self, features: Tensor) -> None:
        _checks.floating_tensor("features", features)
        _checks.last_dimension("features", features, self.feature_dim, "features")
        _checks.same_device("features", features, self.weight, self)
        if is_sharded(self._rows()):
            raise RuntimeError(
                "weight lies in shards, as FSDP2 keeps it between the calls of the module that was "
                "given to fully_shard; expected a call by way of that module, or between its "
                "unshard() and reshard() on all ranks, or, of initialize_, before fully_shard"
            )

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"feature_dim={self.feature_dim}, num_prototypes={self.num_prototypes}, "
            f"gradient={self.gradient!r}"
        )


def unit_rows(rows: Tensor, *, differentiate_norm: bool = True) -> Tensor:
    """L2-normalize the last dimension in float32 or better; a zero row stays zero.

    ``torch.nn.functional.normalize`` does not fit: its eps underflows in float16, a row of norm
    1e-30 comes out short, and the gradient of a zero row is too large for half precision.

    Args:
        rows: (..., D).
        differentiate_norm: Whether the norm has a gradient or is a constant.

    Returns:
        (..., D) unit rows in float32, or float64 for float64 input.
    """
    rows = rows.to(at_least_float32(rows.dtype))
    unit: Tensor = UnitRows.apply(rows, differentiate_norm)[0]  # type: ignore[no-untyped-call]
    return unit
