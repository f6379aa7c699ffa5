"""Prototypes of which each process has a part, and the loss of ``SwAVLoss`` with them."""

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
from swavkit._head_losses import Batch, HeadLoss, SwAVDetails
from swavkit._tensors import at_least_float32
from swavkit.distributed.collectives import (
    GroupHandle,
    gather_over_ranks,
    is_sharded,
    local_part,
    participants,
    rank_and_size,
    rows_of,
    sharded,
)
from swavkit.prototypes import PrototypeLayer
from swavkit.sharded.loss import (
    Spread,
    gathered,
    largest_of_rows,
    own_part,
    sharded_codes,
    sharded_losses,
    whole_batch,
)
from swavkit.sinkhorn.module import SinkhornKnopp
from swavkit.swapped_prediction import SwappedPredictionLoss, normalized_weights

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup


class ShardedPrototypeLayer(PrototypeLayer):
    """A :class:`PrototypeLayer` with its rows spread over processes.

    Each process has K/W of the rows, rounded up, and the last ones have fewer or none. Nothing on
    any process is as long as K, so that the layer gives no scores: what needs them is done on the
    part of each process.

    Args:
        feature_dim: D.
        num_prototypes: K.
        gradient: As of :class:`PrototypeLayer`.
        process_group: The processes, more than one; the default group if ``None``.

    Attributes:
        weight: (K, D) parameter, a ``DTensor`` with ``Shard(0)``, and so is its gradient. To begin
            with, the rows are drawn independently, also where all processes have the same seed.
    """

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int,
        *,
        gradient: Literal["tangent", "published"] = "tangent",
        process_group: ProcessGroup | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._configure(feature_dim, num_prototypes, gradient)
        self._group = GroupHandle(process_group)
        self._held = rows_of(self.num_prototypes, *rank_and_size(self._processes()))
        held = self._held.stop - self._held.start
        self.weight = nn.Parameter(self._spread(torch.empty(held, self.feature_dim)))
        self.reset_parameters()

    def _processes(self) -> ProcessGroup:
        group = participants(self._group.get(), synchronize=True)
        assert group is not None, "one process alone has a PrototypeLayer"
        return group

    def _rows(self) -> Tensor:
        return local_part(self.weight)

    def _spread(self, own: Tensor) -> Tensor:
        """Return the tensor (K, ...) of which this process has its ``own`` rows."""
        return sharded(own, 0, self.num_prototypes, self._processes())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the prototypes uniformly on the unit sphere, from torch's global generator.

        They are drawn in the order of the processes, and each keeps its own.
        """
        rank, size = rank_and_size(self._processes())
        for other in range(size):
            part = rows_of(self.num_prototypes, other, size)
            drawn = self._rows().new_empty(part.stop - part.start, self.feature_dim)
            nn.init.normal_(drawn)
            if other == rank:
                self._rows().copy_(drawn)
        self.normalize_()

    def forward(self, features: Tensor, *, frozen: Tensor | None = None) -> NoReturn:
        """Refuse to return scores."""
        raise RuntimeError(
            f"scores of all {self.num_prototypes} prototypes are on no process, as each has a part "
            f"of them; expected the use of assign(features), by all processes, or of "
            f"weight.full_tensor()"
        )

    @property
    def directions(self) -> Tensor:
        """The prototypes as unit rows, (K, D), a ``DTensor`` like the weight, without gradient."""
        return self._spread(super().directions)

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Return the index of the nearest prototype of each feature, (...,) int64.

        All processes of the group must make the call, in ``eval()`` too, each with its own
        features (..., D), as many or few as it has.
        """
        unit, directions = self._factors(features, None)
        rows = unit.flatten(0, -2) if unit.dim() > 1 else unit[None]
        batch = whole_batch(len(rows), None, rows.device, self._processes())
        scores = F.linear(gathered(rows, batch), directions)
        nearest = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        if len(directions):
            nearest = scores.argmax(dim=-1) + self._held.start
        best_of = gather_over_ranks(largest_of_rows(scores), batch.group).argmax(dim=0)
        chosen = gather_over_ranks(nearest, batch.group).gather(0, best_of[None])
        return own_part(chosen[0], batch).view(features.shape[:-1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Take the own rows of a weight that is there as a whole, from before it was spread."""
        value = state_dict.get(prefix + "weight")
        if isinstance(value, Tensor) and not is_sharded(value) and value.shape == self.weight.shape:
            own = value[self._held].to(self.weight.device, copy=True)
            state_dict = {**state_dict, prefix + "weight": self._spread(own)}
        super()._load_from_state_dict(state_dict, prefix, *others)


def layer_class(
    shard_prototypes: bool, process_group: ProcessGroup | None, synchronize: bool | str
) -> Callable[..., PrototypeLayer]:
    """Return what makes a layer of prototypes: a sharded one, if told so and not alone."""
    _checks.boolean("shard_prototypes", shard_prototypes)
    if shard_prototypes and not synchronize:
        raise ValueError("shard_prototypes must be False with synchronize=False, got True")
    if not shard_prototypes or participants(process_group, True) is None:
        return PrototypeLayer
    return partial(ShardedPrototypeLayer, process_group=process_group)


@_disable_dynamo  # type: ignore[untyped-decorator, unused-ignore]
def sharded_head_losses(
    batch: Batch,
    heads: Sequence[PrototypeLayer],
    sinkhorn: nn.Module,
    loss: nn.Module,
    group: ProcessGroup | None,
    *,
    memory: str,
    details: bool,
) -> list[HeadLoss]:
    """Return the loss with each sharded head, and with ``details`` its codes and scores.

    Codes (A, N, K) and scores (V, N, K) are those of the samples of all ranks, as ``DTensor``
    sharded over the prototypes.
    """
    if group is None:
        raise RuntimeError(
            "no process has all prototypes, so that none can compute a loss alone; expected a call "
            "on all processes, in training mode or with synchronize='always'"
        )
    if not (
        all(is_plainly(head, ShardedPrototypeLayer) for head in heads)
        and is_plainly(sinkhorn, SinkhornKnopp)
        and is_plainly(loss, SwappedPredictionLoss)
    ):
        raise RuntimeError(
            "prototypes, sinkhorn and loss must be as SwAVLoss made them and without hooks where "
            "prototypes are sharded: the parts are not called, since none can work on what one "
            "process has"
        )
    assert isinstance(sinkhorn, SinkhornKnopp)
    assert isinstance(loss, SwappedPredictionLoss)
    settings = sinkhorn._settings()
    temperature = _checks.positive_float("temperature", loss.temperature)
    unsupported = {
        "sinkhorn.hard": (settings.hard, False),
        "sinkhorn.relaxation": (settings.relaxation, math.inf),
        "sinkhorn.tolerance": (settings.tolerance, None),
        "sinkhorn.validate": (settings.validate, False),
        "memory": (memory if memory == "streamed" else "auto", "auto"),
    }
    for name, (value, only) in unsupported.items():
        if value != only:
            raise ValueError(f"{name} must be {only!r} where prototypes are sharded, got {value!r}")
    samples = batch.features.shape[1]
    spread = whole_batch(samples, batch.sample_weight, batch.features.device, group)
    share = normalized_weights(batch.sample_weight, batch.features[0])
    own = share.new_ones(samples)
    if batch.sample_weight is not None:
        own = batch.sample_weight.detach().to(share.dtype)
    weight, share = gathered(torch.stack([own, share], dim=1).detach(), spread).unbind(dim=1)
    features = gathered(batch.features, spread)  # (V, N, D)
    if batch.queued is not None and batch.queue_mask is not None:
        slots = Spread([len(batch.queue_mask)] * len(spread.sizes), group, False)
        queued = gathered(batch.queued, slots)  # (A, M, D)
        mask = batch.queue_mask.to(weight.dtype).unsqueeze(-1)
        weight = torch.cat([weight, gathered(mask, slots).squeeze(-1)])

    results = []
    for head in heads:
        unit, directions = head._factors(features, batch.frozen)
        if directions.requires_grad:
            # Nobody averages this gradient over ranks, as those of other parameters are averaged.
            directions = directions.view_as(directions)
            directions.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: gradient / len(spread.sizes)
            )
        scores = linear(unit, directions)  # (V, N, k)
        with torch.no_grad():
            to_code = scores[: batch.num_code_views].to(at_least_float32(scores.dtype))
            if batch.queued is not None:
                of_queued = F.linear(*head._factors(queued, None))
                to_code = torch.cat([to_code, of_queued.to(to_code.dtype)], dim=1)
        codes = sharded_codes(
            to_code,
            weight,
            head.num_prototypes,
            epsilon=settings.epsilon,
            iterations=settings.iterations,
            fractional=spread.fractional,
            group=group,
        )[:, : scores.shape[1]]
        of_samples = sharded_losses(scores, codes, share, temperature=temperature, group=group)
        head_loss = own_part(of_samples, spread).sum()
        if details:
            both = (sharded(values, 2, head.num_prototypes, group) for values in (codes, scores))
            results.append(HeadLoss(head_loss, SwAVDetails(*(values.detach() for values in both))))
        else:
            results.append(HeadLoss(head_loss))
    return results
