"""Prototypes sharded over ranks, and the loss of ``SwAVLoss`` with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable loads the compiler at once

from swavkit import _checks
from swavkit._autograd import linear
from swavkit._checks import is_plainly
from swavkit._head_losses import Batch, Head, HeadLoss, SwAVDetails
from swavkit._prediction_errors import normalized_weights
from swavkit._tensors import at_least_float32
from swavkit.distributed.collectives import (
    GroupHandle,
    is_sharded,
    local_part,
    participants,
    rank_and_size,
    rows_of,
    sharded,
)
from swavkit.prototypes import PrototypeLayer
from swavkit.sharded.loss import (
    BatchLayout,
    batch_layout,
    gathered,
    nearest_over_ranks,
    own_part,
    sharded_codes,
    sharded_losses,
    sharded_statistics,
)
from swavkit.sinkhorn.marginals import target_marginal
from swavkit.sinkhorn.module import SinkhornKnopp
from swavkit.swapped_prediction import SwappedPredictionLoss

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup


class ShardedPrototypeLayer(PrototypeLayer):
    """A :class:`PrototypeLayer` with its rows sharded over W ranks.

    Each rank has K/W of the rows, rounded up; the last ranks have fewer or none. The layer returns
    no scores, since no rank holds a tensor of length K.

    Args:
        feature_dim: D.
        num_prototypes: K.
        gradient: See :class:`PrototypeLayer`.
        process_group: The ranks, more than one; the default group if ``None``.

    Attributes:
        weight: (K, D) parameter, a ``DTensor`` with ``Shard(0)``, like its gradient. Its initial
            rows are independent, even if all ranks have the same seed.
    """

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int,
        *,
        gradient: Literal["tangent", "published"] = "tangent",
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._group = GroupHandle(process_group)  # which has a say in the rows
        super().__init__(feature_dim, num_prototypes, gradient=gradient)

    def _new_rows(self) -> Tensor:
        self._held = rows_of(self.num_prototypes, *rank_and_size(self._participants()))
        return self._sharded(torch.empty(self._held.stop - self._held.start, self.feature_dim))

    def _participants(self) -> ProcessGroup:
        group = participants(self._group.get(), synchronize=True)
        assert group is not None, "one rank alone has a PrototypeLayer"
        return group

    def _pool(self, process_group: ProcessGroup | None, synchronize: bool) -> ProcessGroup | None:
        own = self._participants()
        if process_group is not None and participants(process_group, True) is not own:
            raise ValueError("process_group must be None or the group of the layer, got another")
        return super()._pool(own, synchronize)

    def _rows(self) -> Tensor:
        return local_part(self.weight)

    def _sharded(self, own: Tensor) -> Tensor:
        """Return the ``DTensor`` (K, ...) with this rank's ``own`` rows."""
        return sharded(own, 0, self.num_prototypes, self._participants())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the prototypes uniformly on the unit sphere, from torch's global generator.

        Each rank draws the prototypes of all ranks, in order, and keeps its own.
        """
        rank, size = rank_and_size(self._participants())
        for other in range(size):
            part = rows_of(self.num_prototypes, other, size)
            drawn = self._rows().new_empty(part.stop - part.start, self.feature_dim)
            nn.init.normal_(drawn)
            if other == rank:
                self._rows().copy_(drawn)
        self.normalize_()

    def forward(self, features: Tensor, *, frozen: Tensor | None = None) -> NoReturn:
        """Raise ``RuntimeError``: no rank has the scores of all prototypes."""
        raise RuntimeError(
            f"scores of all {self.num_prototypes} prototypes are on no rank, because each rank "
            f"keeps a part of them; expected assign(features), called by all ranks, or "
            f"weight.full_tensor()"
        )

    @property
    def directions(self) -> Tensor:
        """The prototypes as unit rows, (K, D), a ``DTensor`` like the weight, without gradient."""
        return self._sharded(super().directions)

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Return the index of the nearest prototype of each feature, (...,) int64.

        All ranks of the group must make the call, also in ``eval()``, each with its own features
        (..., D), of any number.
        """
        unit, directions = self._factors(features, None)
        rows = unit.flatten(0, -2) if unit.dim() > 1 else unit[None]
        layout = batch_layout(rows, None, self._participants(), alike={})
        scores = F.linear(gathered(rows, layout), directions)
        nearest, _ = nearest_over_ranks(scores, self._held.start, layout.group)
        return own_part(nearest, layout).view(features.shape[:-1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Load this rank's rows of the weight, also from a weight that is not sharded."""
        value = state_dict.get(prefix + "weight")
        if isinstance(value, Tensor) and not is_sharded(value) and value.shape == self.weight.shape:
            own = value[self._held].to(self.weight.device, copy=True)
            state_dict = {**state_dict, prefix + "weight": self._sharded(own)}
        super()._load_from_state_dict(state_dict, prefix, *others)


def layer_class(
    shard_prototypes: bool, process_group: ProcessGroup | None, synchronize: bool | str
) -> Callable[..., PrototypeLayer]:
    """Return the constructor of a layer, sharded if requested and if there are several ranks."""
    _checks.boolean("shard_prototypes", shard_prototypes)
    if shard_prototypes and not synchronize:
        raise ValueError("shard_prototypes must be False with synchronize=False, got True")
    if not shard_prototypes or participants(process_group, True) is None:
        return PrototypeLayer
    return partial(ShardedPrototypeLayer, process_group=process_group)


@_disable_dynamo  # type: ignore[untyped-decorator, unused-ignore]
def sharded_head_losses(
    batch: Batch,
    heads: Sequence[Head],
    sinkhorn: nn.Module,
    loss: nn.Module,
    group: ProcessGroup | None,
    *,
    memory: str,
) -> list[HeadLoss]:
    """Return the loss of each sharded head, and its details and statistics if requested.

    Codes (A, N, K) and scores (V, N, K) of the details contain the samples of all ranks. They are
    ``DTensor`` sharded over the prototypes. Statistics are those of the samples of this rank.
    """
    if group is None:
        raise RuntimeError(
            "no rank has all prototypes, so none can compute a loss alone; expected a call "
            "on all ranks, in training mode or with synchronize='always'"
        )
    if not (
        all(is_plainly(layer, ShardedPrototypeLayer) for head in heads for layer in head[:2])
        and is_plainly(sinkhorn, SinkhornKnopp)
        and is_plainly(loss, SwappedPredictionLoss)
    ):
        raise RuntimeError(
            "prototypes, sinkhorn and loss must be as SwAVLoss made them, without hooks, if "
            "prototypes are sharded: these parts are not called"
        )
    assert isinstance(sinkhorn, SinkhornKnopp)
    assert isinstance(loss, SwappedPredictionLoss)
    settings = sinkhorn._settings()
    temperature = _checks.positive_setting("temperature", loss.temperature)
    unsupported = {
        "sinkhorn.hard": (settings.hard, False),
        "sinkhorn.relaxation": (settings.relaxation, math.inf),
        "sinkhorn.tolerance": (settings.tolerance, None),
        "sinkhorn.validate": (settings.validate, False),
        "sinkhorn.dtype": (settings.dtype, None),
        "memory": (memory if memory == "streamed" else "auto", "auto"),
    }
    for name, (value, only) in unsupported.items():
        if value != only:
            raise ValueError(f"{name} must be {only!r} if prototypes are sharded, got {value!r}")
    _checks.known_setting("epsilon", settings.epsilon, batch.features.device)
    _checks.known_setting("temperature", temperature, batch.features.device)
    samples = batch.features.shape[1]
    alike = {
        "queue_length": 0 if batch.queue_mask is None else len(batch.queue_mask),
        "whether code_features are given": batch.code_features is not None,
        "return_statistics": batch.statistics,
    }
    layout = batch_layout(batch.features, batch.sample_weight, group, alike)
    normalized_weight = normalized_weights(batch.sample_weight, batch.features[0])
    weight = normalized_weight.new_ones(samples)
    if batch.sample_weight is not None:
        weight = batch.sample_weight.detach().to(normalized_weight.dtype)
    columns = torch.stack([weight, normalized_weight, *_nan_rows(batch, weight)], dim=1).detach()
    weight, normalized_weight, *nan_rows = gathered(columns, layout).unbind(dim=1)
    sample_weight = weight  # (N,)
    own_features = batch.features
    if layout.differentiable and not own_features.requires_grad:
        own_features = own_features.detach().requires_grad_()  # or the others' backward would wait
    features = gathered(own_features, layout)  # (V, N, D)
    code_features = None
    if batch.code_features is not None:
        code_features = gathered(batch.code_features, layout)  # (A, N, D)
    if batch.queued is not None and batch.queue_mask is not None:
        queue_layout = BatchLayout([len(batch.queue_mask)] * len(layout.sizes), group)
        queued = gathered(batch.queued, queue_layout)  # (A, M, D)
        mask = batch.queue_mask.to(weight.dtype).unsqueeze(-1)
        weight = torch.cat([weight, gathered(mask, queue_layout).squeeze(-1)])

    results = []
    for head, code_head, prototype_weight in heads:
        unit, directions = head._factors(features, batch.frozen)
        if directions.requires_grad:
            # DDP averages the gradients of other parameters over ranks, but not this one.
            directions = directions.view_as(directions)
            directions.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: gradient / len(layout.sizes)
            )
        scores = linear(unit, directions)  # (V, N, k)
        with torch.no_grad():
            code_scores = scores[: batch.num_code_views]
            if code_features is not None:
                code_scores = F.linear(*code_head._factors(code_features, None))
            code_scores = code_scores.to(at_least_float32(code_scores.dtype))
            if batch.queued is not None:
                queued_scores = F.linear(*code_head._factors(queued, None))
                code_scores = torch.cat([code_scores, queued_scores.to(code_scores.dtype)], dim=1)
        prototype_mass = target_marginal(prototype_weight, code_scores)
        codes = sharded_codes(
            code_scores,
            weight,
            head.num_prototypes,
            prototype_mass=None if prototype_mass is None else prototype_mass[head._held],
            epsilon=settings.epsilon,
            iterations=settings.iterations,
            fractional=layout.fractional or prototype_mass is not None,
            group=group,
        )[:, : scores.shape[1]]
        sample_losses = sharded_losses(
            scores, codes, normalized_weight, temperature=temperature, group=group
        )
        head_loss = own_part(sample_losses, layout).sum()
        of_codes = seen = None
        if batch.details:
            masks = torch.stack(nan_rows).bool().unsqueeze(-1)  # (V + A, N, 1)
            both = (
                codes.masked_fill(masks[len(scores) :], 0),
                scores.detach().masked_fill(masks[: len(scores)], torch.nan),
            )
            of_codes = SwAVDetails(*(sharded(each, 2, head.num_prototypes, group) for each in both))
        if batch.statistics:
            seen = sharded_statistics(
                scores.detach(),
                codes,
                sample_weight,
                held=head._held,
                num_prototypes=head.num_prototypes,
                temperature=temperature,
                layout=layout,
            )
        results.append(HeadLoss(head_loss, of_codes, seen))
    return results


def _nan_rows(batch: Batch, like: Tensor) -> list[Tensor]:
    """Return 1 for each row (b,) of scores that counts as NaN, of V views and then of A codes."""
    views, samples, _ = batch.features.shape
    of_views, of_codes = (
        like.new_zeros(views, samples) if rows is None else rows.squeeze(-1).to(like.dtype)
        for rows in (batch.nan_rows, batch.code_nan_rows)
    )
    if batch.code_features is None:
        of_codes = of_views
    return [*of_views, *of_codes[: batch.num_code_views]]
