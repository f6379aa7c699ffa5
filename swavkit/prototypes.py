"""Prototypes: K learned directions, and the cosines of features with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swavkit import _checks
from swavkit._tensors import at_least_float32, autocast_disabled, empty, on_cpu, product_dtype
from swavkit.distributed.collectives import is_sharded

__all__ = ["PrototypeLayer"]


class PrototypeLayer(nn.Module):
    r"""Scores of features against K prototypes: S = Z Cᵀ for unit rows Z and C, without a bias.

    The layer normalises both itself, so scores are cosines whatever the norms of the features and
    of the stored weight. The published procedure renormalises the weight in place before each step
    instead, which breaks when a forward runs twice before a backward and is lost under sharding.

    The stored norms change no score, but they set the pace: a row of twice the norm turns half as
    far in a step. To keep them at 1, as the authors do, add one line behind the optimizer::

        optimizer.register_step_post_hook(lambda *_: prototypes.normalize_())

    Args:
        feature_dim: D, the number of features, at least 1.
        num_prototypes: K, the number of prototypes, at least 1.
        gradient: ``"tangent"`` differentiates through the normalisation of the weight: the gradient
            of a row is orthogonal to it, and no renormalisation is ever needed. ``"published"``
            takes the norm of a row as a constant; with :meth:`normalize_` after each optimizer step
            this is the authors' procedure exactly.

    Attributes:
        weight: (K, D) parameter, drawn uniformly on the unit sphere. Its rows need not stay of unit
            norm.

    Shape:
        features (..., D) give scores (..., K). Without autocast the product is made in the promoted
        dtype of features and weight; under autocast in the autocast dtype, like ``nn.Linear``. The
        normalisation is in float32, or float64 for float64 input. A zero row has cosine 0 with
        everything, and a gradient of 0.

    Raises:
        TypeError: If a size is no int or ``features`` is no floating tensor.
        ValueError: If a setting is out of range, the last dimension of ``features`` is not D, or
            they are on another device.
        RuntimeError: If FSDP2 has not gathered the weight, or if a method would change a weight
            that a parametrization computes.

    Example:
        >>> prototypes = PrototypeLayer(feature_dim=16, num_prototypes=5)
        >>> scores = prototypes(torch.randn(8, 16))
        >>> scores.shape, bool((scores.abs() <= 1 + 1e-6).all())
        (torch.Size([8, 5]), True)
        >>> prototypes.assign(prototypes.directions)
        tensor([0, 1, 2, 3, 4])
    """

    __prepare_scriptable__ = _checks.refuse_scripting

    _held = slice(None)  # which of the prototypes this process has

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int,
        *,
        gradient: Literal["tangent", "published"] = "tangent",
    ) -> None:
        super().__init__()
        self._configure(feature_dim, num_prototypes, gradient)
        self.weight = nn.Parameter(torch.empty(self.num_prototypes, self.feature_dim))
        self.reset_parameters()

    def _configure(self, feature_dim: int, num_prototypes: int, gradient: str) -> None:
        self.feature_dim = _checks.positive_int("feature_dim", feature_dim)
        self.num_prototypes = _checks.positive_int("num_prototypes", num_prototypes)
        self.gradient = gradient
        self._check_gradient()

    def _check_gradient(self) -> None:
        _checks.choice("gradient", self.gradient, ("tangent", "published"))

    def reset_parameters(self) -> None:
        """Draw the prototypes uniformly on the unit sphere, from torch's global generator."""
        self._require_stored_weight()
        nn.init.normal_(self.weight)
        self.normalize_()

    @torch.no_grad()
    def initialize_(self, features: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Let the prototypes start where features are, in place; before the first step.

        Wrap the layer in ``DistributedDataParallel`` afterwards, which hands the prototypes of rank
        0 to all processes, or pass the same features and random state on each.

        Args:
            features: (K, D) centres, one for each prototype and taken in this order; or (..., D)
                features of more than K samples, of which K different ones are drawn. Of any norm.
                Those without a direction, zeros or with a NaN or infinite entry, are passed over;
                if too few others are left, the remaining prototypes stay as they are.
            generator: Where the draw comes from, on the device of ``features``; by default torch's
                global one.
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
            features: (..., D) features of any norm, floating.
            frozen: A bool scalar tensor; where it is true the weight gets a gradient of zeros,
                which turns no prototype and leaves no parameter without a gradient (which DDP
                would not take). The device decides, so a compiled step stays one graph.

        Returns:
            (..., K) scores in [-1, 1] up to rounding.
        """
        return F.linear(*self._factors(features, frozen))

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns anything

    def _factors(self, features: Tensor, frozen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return unit rows (..., D) and (K, D), in one dtype, whose product the scores are."""
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

        Where FSDP2 shards the weight they are a ``DTensor`` in the same shards, whose
        ``full_tensor()`` all processes must call.
        """
        return unit_rows(self._rows().detach()).to(self.weight.dtype)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Rescale the stored rows to unit norm, in place. It changes no score.

        Under FSDP2 the place for it is behind the optimizer, while the weight lies in shards: of
        what is done to the gathered copy that a forward works on, nothing lasts.
        """
        self._require_stored_weight()
        rows = self._rows()
        rows.copy_(unit_rows(rows).to(rows.dtype))

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Return the index of the nearest prototype of each feature, (...,) int64.

        Under FSDP2 the weight must be gathered, by ``unshard()`` of the module that was given to
        ``fully_shard``.
        """
        return self(features).argmax(dim=-1)

    def _rows(self) -> Tensor:
        """Return the stored rows that this process has."""
        return self.weight

    def _require_stored_weight(self) -> None:
        """Refuse to write to a weight that is computed anew from other parameters at each use."""
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
                "unshard() and reshard() on all processes, or, of initialize_, before fully_shard"
            )

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"feature_dim={self.feature_dim}, num_prototypes={self.num_prototypes}, "
            f"gradient={self.gradient!r}"
        )


@torch.no_grad()
def product(features: Tensor, directions: Tensor) -> Tensor:
    """Return what ``torch.nn.functional.linear`` does of two factors, without gradient."""
    if not on_cpu(features) or type(features) is not Tensor:
        return F.linear(features, directions)
    dtype = product_dtype(features)
    rows = features.flatten(0, -2).to(dtype)
    scores = empty((len(rows), len(directions)), dtype, rows)
    with autocast_disabled(features.device):
        torch.mm(rows, directions.to(dtype).T, out=scores)
    return scores.view(*features.shape[:-1], len(directions))


def unit_rows(rows: Tensor, *, differentiate_norm: bool = True) -> Tensor:
    """L2-normalise the last dimension in float32 or better; a zero row stays zero.

    ``torch.nn.functional.normalize`` will not do: its eps underflows in float16, a row of norm
    1e-30 comes out short, and the gradient of a zero row is too large for half precision.

    Args:
        rows: (..., D).
        differentiate_norm: Whether the norm has a gradient or counts as a constant.

    Returns:
        (..., D) unit rows in float32, or float64 for float64 input.
    """
    rows = rows.to(at_least_float32(rows.dtype))
    if rows.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        unit: Tensor = _UnitRows.apply(rows, differentiate_norm)[0]  # type: ignore[no-untyped-call]
        return unit
    return _unit_rows(rows, differentiate_norm)[0]


def _unit_rows(rows: Tensor, differentiate_norm: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unit rows, and the two divisors (..., 1) of which they are the quotient."""
    # Scaled by its largest entry first, so that no square over- or underflows. The scale is a
    # constant: it cancels in the result.
    constant = rows.detach()
    largest = torch.maximum(constant.amax(-1, keepdim=True), -constant.amin(-1, keepdim=True))
    largest = torch.where(largest == 0, 1, largest)
    scaled = rows / largest
    norm = torch.linalg.vector_norm(
        scaled if differentiate_norm else scaled.detach(), dim=-1, keepdim=True
    )
    norm = torch.where(norm == 0, torch.inf, norm)  # so the gradient of a zero row is 0
    tracked = rows.requires_grad and torch.is_grad_enabled()
    return scaled / norm if tracked else scaled.div_(norm), norm, largest


class _UnitRows(torch.autograd.Function):
    """What autograd makes of :func:`_unit_rows`, in fewer operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, differentiate_norm: bool) -> tuple[Tensor, Tensor, Tensor]:
        return _unit_rows(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        rows, ctx.differentiate_norm = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(rows, *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        rows, unit, norm, largest = ctx.saved_tensors
        if ctx.differentiate_norm:
            if torch.is_grad_enabled():  # for a second derivative
                unit, norm, largest = _unit_rows(rows)
            with autocast_disabled(gradient.device):  # a backward pass may run inside autocast
                along = torch.linalg.vecdot(gradient, unit).unsqueeze(-1)
            gradient = torch.addcmul(gradient, along, unit, value=-1)
            if not torch.is_grad_enabled():
                return gradient.div_(norm).div_(largest), None
        return gradient / norm / largest, None
