"""Prototypes: K learned directions, and the cosines of features with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swavkit import _checks
from swavkit._autograd import UnitRows, linear
from swavkit._tensors import at_least_float32
from swavkit.distributed.collectives import (
    gather_over_ranks,
    is_sharded,
    local_part,
    part_of_rows,
    participants,
    rank_and_size,
    rows_are_sharded,
    sum_over_ranks,
)

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

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
        rows = _rows_of(features)
        if len(rows) < self.num_prototypes:
            raise ValueError(
                f"features must hold at least {self.num_prototypes} samples, one for each "
                f"prototype, got {len(rows)}"
            )
        usable = _have_direction(rows)
        if len(rows) > self.num_prototypes:
            rows, keys = _drawn(rows, self.num_prototypes, generator)
            usable = keys >= 0
        directions = unit_rows(rows[self._held]).to(self.weight.dtype)
        stored = self._rows()
        stored.copy_(torch.where(usable[self._held].unsqueeze(-1), directions, stored))

    @torch.no_grad()
    def reinitialize_(
        self,
        index: Tensor,
        features: Tensor,
        *,
        generator: torch.Generator | None = None,
        process_group: ProcessGroup | None = None,
        synchronize: bool = True,
    ) -> Tensor:
        """Replace dead or duplicate prototypes by features drawn without replacement, in place.

        The optimizer still has the momentum of the old prototypes. Clear it, for any optimizer
        whose state has the shape of the weight, such as SGD, AdamW and LARS::

            replaced = prototypes.reinitialize_(index, features)
            for value in optimizer.state[prototypes.weight].values():
                if torch.is_tensor(value) and value.shape == prototypes.weight.shape:
                    value.mul_(replaced.logical_not().unsqueeze(1))

        In a distributed job, all ranks make the call, and all get the same prototypes, drawn from
        the features of all ranks. A prototype is replaced only if the ``index`` of each rank asks
        for it, so ``monitor.assigned.sum(dim=0) == 0`` of a :class:`ClusterMonitor` selects those
        without samples on all ranks in its window. A single step is too short to judge: with fewer
        samples than prototypes, most get no sample. The host then waits for the number of these
        prototypes. On one rank it waits only for indices, whose range is checked, and not for a
        mask.

        Under FSDP2, call it after the optimizer step, while the weight is sharded, as
        :meth:`normalize_`.

        Args:
            index: The prototypes to replace, in any order: a (K,) bool mask, or (n,) int64 indices.
            features: (..., D) features of any norm and number, such as those of the batch or the
                ``features`` of a :class:`FeatureQueue`. Zero rows and rows with a NaN or infinite
                entry are skipped. If too few others are left, the remaining prototypes are
                unchanged. Ranks may have different numbers of features.
            generator: The random generator, on the device of ``features``; torch's global one by
                default.
            process_group: The ranks that have the same prototypes; the default group if ``None``.
            synchronize: Whether ranks act together. If false, each uses only its own arguments.

        Returns:
            A (K,) bool mask of the prototypes that were replaced; a ``DTensor`` if the weight is.

        Raises:
            TypeError: If ``index`` is neither a bool nor an int64 tensor.
            ValueError: If ``index`` has another shape, is out of range or is on another device, or
                if a sharded weight is not to be synchronized.

        Example:
            >>> prototypes, features = PrototypeLayer(16, num_prototypes=5), torch.randn(8, 16)
            >>> prototypes.reinitialize_(torch.tensor([1, 3]), features)
            tensor([False,  True, False,  True, False])
            >>> cosines = prototypes.directions @ prototypes.directions.T
            >>> duplicates = (cosines.triu(diagonal=1) > 0.99).any(dim=0)  # of an earlier prototype
            >>> bool(prototypes.reinitialize_(duplicates, features).any())
            False
        """
        self._check_features(features)
        self._require_stored_weight()
        mask = self._mask_of(index)
        group = self._pool(process_group, synchronize)
        # One rank alone prepares as many rows as there are prototypes, a number without a read.
        number = self.num_prototypes
        if group is not None:
            mask = sum_over_ranks(mask.to(torch.int64), group) == rank_and_size(group)[1]
            number = max(int(mask.sum()), 1)

        rows, keys = _drawn(_rows_of(features), number, generator)
        missing = number - len(rows)
        keys = F.pad(keys, (0, missing), value=-1)
        directions = F.pad(unit_rows(rows).to(self.weight.dtype), (0, 0, 0, missing))
        if group is not None:
            directions, keys = _best_of_ranks(directions, keys, group)

        source = mask.cumsum(dim=0) - 1  # the row that a prototype gets
        replaced = mask & (source < (keys >= 0).sum())
        source = source.clamp(0, number - 1)
        stored, of_rank = self._rows(), replaced
        if is_sharded(self.weight):
            replaced, source = (part_of_rows(each, self.weight) for each in (replaced, source))
            stored, of_rank, source = map(local_part, (self.weight, replaced, source))
        new = directions.index_select(0, source)
        stored.copy_(torch.where(of_rank.unsqueeze(-1), new, stored))
        return replaced

    def _mask_of(self, index: Tensor) -> Tensor:
        """Return the (K,) mask of an index, after a check that reads indices on the host."""
        _checks.tensor("index", index)
        if index.dtype == torch.bool:
            _checks.mask("index", index, (self.num_prototypes,), self.weight)
            return index
        if index.dtype != torch.int64:
            raise TypeError(f"index must have dtype torch.bool or torch.int64, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(
                f"index must have 1 dimension as indices, got shape {tuple(index.shape)}"
            )
        _checks.same_device("index", index, self.weight)
        for value in index.aminmax() if len(index) else ():
            if not 0 <= int(value) < self.num_prototypes:
                raise ValueError(
                    f"index must be in [0, {self.num_prototypes - 1}], got {int(value)}"
                )
        mask = torch.zeros(self.num_prototypes, dtype=torch.bool, device=index.device)
        return mask.index_fill_(0, index, True)

    def _pool(self, process_group: ProcessGroup | None, synchronize: bool) -> ProcessGroup | None:
        """Return the ranks that replace prototypes together."""
        if is_sharded(self.weight) and not synchronize:
            raise ValueError("synchronize must be True for a sharded weight, got False")
        if is_sharded(self.weight) and not rows_are_sharded(self.weight):
            raise ValueError("weight must be sharded over its rows, got another sharding")
        return participants(process_group, synchronize)

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
                "weight must be a parameter of the layer to be modified, got one that is computed "
                "from others by weight_norm or another parametrization; expected "
                "initialize_, normalize_ or reset_parameters before that is registered, or after "
                "it is removed"
            )

    def _check_features(self, features: Tensor) -> None:
        _checks.floating_tensor("features", features)
        _checks.last_dimension("features", features, self.feature_dim, "features")
        _checks.same_device("features", features, self.weight, self)

    def _check(self, features: Tensor) -> None:
        self._check_features(features)
        if is_sharded(self._rows()):
            raise RuntimeError(
                "weight is sharded, as FSDP2 keeps it between calls of the module given to "
                "fully_shard; expected a call through that module, or between its unshard() and "
                "reshard() on all ranks, or, for initialize_, before fully_shard"
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


def _rows_of(features: Tensor) -> Tensor:
    """Return features (..., D) as rows (N, D), without gradient."""
    return features.detach().flatten(0, -2) if features.dim() > 1 else features.detach()[None]


def _have_direction(rows: Tensor) -> Tensor:
    """Return which rows (N, D) are finite and not zero, (N,) bool."""
    return rows.isfinite().all(dim=-1) & (rows != 0).any(dim=-1)


def _drawn(rows: Tensor, number: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw up to ``number`` rows without replacement, those without a direction last.

    Returns:
        The rows and their keys, in descending order of the keys: random ones in [0, 1), and -1 for
        rows without a direction.
    """
    # Not torch.rand, which takes no generator=None when it is compiled for any size.
    keys = torch.empty(len(rows), device=rows.device).uniform_(generator=generator)
    keys, chosen = keys.masked_fill_(~_have_direction(rows), -1).topk(min(number, len(rows)))
    return rows.index_select(0, chosen), keys


def _best_of_ranks(rows: Tensor, keys: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the n rows with the largest keys, and the keys, given n rows and keys of each rank."""
    number = len(keys)
    of_all = gather_over_ranks(keys, group).flatten()
    # Stable, since ranks with the same seed have the same keys and must choose alike.
    order = of_all.argsort(descending=True, stable=True)[:number]
    others = order // number != rank_and_size(group)[0]
    rows = rows.index_select(0, order % number).masked_fill_(others.unsqueeze(-1), 0)
    return sum_over_ranks(rows, group), of_all.index_select(0, order)
