"""SwAV as one module: the parts, wired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._precision import at_least_float32, product_dtype
from swavkit.feature_queue import FeatureQueue
from swavkit.prototypes import PrototypeLayer, product, unit_rows
from swavkit.sinkhorn import SinkhornKnopp
from swavkit.streaming import streamed_loss
from swavkit.swapped_prediction import SwappedPredictionLoss, loss_of_factors

if TYPE_CHECKING:
    from swavkit._distributed import ProcessGroup

__all__ = ["SwAVDetails", "SwAVLoss"]

# Scores of more than that are streamed, unless told otherwise.
_BYTES_OF_FULL_SCORES = 2**29


class SwAVDetails(NamedTuple):
    """What :class:`SwAVLoss` computed on the way to the loss, without gradient.

    Attributes:
        codes: (A, B, K), what the views had to predict, float32 (float64 for float64 scores).
        scores: (V, B, K), the cosines of features and prototypes.
    """

    codes: Tensor
    scores: Tensor


class SwAVLoss(nn.Module):
    """The SwAV loss of the features of several views, with its prototypes and its queue.

    It is the parts, wired; with a queue and nothing else switched on, a training step is::

        scores = [prototypes(view) for view in features]
        recent = prototypes(queue.features)
        codes = sinkhorn(cat([scores[:A], recent], dim=1), cat([ones(B), queue.valid]))[:, :B]
        value = loss(scores, codes)
        queue.push(unit_rows(features[:A]))

    While nobody looks at the parts, by hooks or by asking for details, the gradient of the scores
    goes to features and prototypes without being held: the same numbers, with one matrix of the
    size of the scores instead of three.

    Parameters and state belong to the module: give its parameters to the optimizer, save its
    ``state_dict()``, and in a distributed job wrap it in DDP, alone or inside the model.

    Args:
        feature_dim: D, the number of features.
        num_prototypes: K, the number of prototypes; or a sequence of numbers for as many heads,
            each with prototypes and codes of its own: the loss is the mean over heads.
        num_code_views: A, how many of the views, the first ones, give codes.
        temperature: The softmax temperature τ of the predictions.
        epsilon: The entropy temperature ε of the codes.
        iterations: The Sinkhorn-Knopp iterations of the codes.
        queue_length: The slots of the feature queue, per process and code view; 0 for no queue.
        queue_start: For how many training steps the queue only fills. From then on, and not before
            the second step, codes are computed on the current features and the queue's.
        freeze_steps: For how many training steps the prototypes get a gradient of zeros. Weight
            decay may rescale them meanwhile, which changes no score; Adam's coupled decay can turn
            them, and so can SGD with momentum and a decay of several per cent a step.
        memory: ``"full"`` holds the scores of all views; ``"streamed"`` computes them again block
            by block, with the same result, and holds none; ``"auto"`` streams where the scores, the
            queue's and copies included, would take more than 512 MiB. Details, validated codes, and
            a part that is replaced or has hooks need ``"full"`` or ``"auto"``.
        process_group: The processes that share the batch for codes; the default group if ``None``.
        synchronize: Whether to share the batch for codes with other processes in training mode.
        prototype_gradient: How the norm of the stored prototypes is differentiated, see
            :class:`PrototypeLayer`.

    Attributes:
        prototypes: The :class:`PrototypeLayer`; for a sequence of numbers, of length 1 too, a
            ``ModuleList`` of them.
        sinkhorn: The :class:`SinkhornKnopp`.
        loss: The :class:`SwappedPredictionLoss`.
        queue: The :class:`FeatureQueue`, or ``None`` without one.
        steps: int64 scalar, the training steps so far. A forward in ``eval()`` changes no state.

    Raises:
        TypeError: If a setting or an input is of the wrong type.
        ValueError: If a setting is out of range or a shape or device does not fit.
        RuntimeError: In a backward pass with ``create_graph=True``: there is no second derivative.

    Example:
        >>> criterion = SwAVLoss(feature_dim=16, num_prototypes=10)
        >>> features = torch.randn(4, 8, 16, requires_grad=True)  # 4 views of 8 images, 2 full-size
        >>> loss = criterion(features)
        >>> loss.backward()
        >>> loss.shape, features.grad.shape
        (torch.Size([]), torch.Size([4, 8, 16]))
    """

    steps: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int | Sequence[int],
        *,
        num_code_views: int = 2,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue_length: int = 0,
        queue_start: int = 0,
        freeze_steps: int = 0,
        memory: Literal["full", "streamed", "auto"] = "auto",
        process_group: ProcessGroup | None = None,
        synchronize: bool = True,
        prototype_gradient: Literal["tangent", "published"] = "tangent",
    ) -> None:
        super().__init__()
        self.num_code_views = _checks.positive_int("num_code_views", num_code_views)
        queue_length = _checks.non_negative_int("queue_length", queue_length)
        self.queue_start = _checks.non_negative_int("queue_start", queue_start)
        self.freeze_steps = _checks.non_negative_int("freeze_steps", freeze_steps)
        _checks.choice("memory", memory, ("full", "streamed", "auto"))
        self.memory = memory
        self.prototypes: PrototypeLayer | nn.ModuleList
        if isinstance(num_prototypes, (list, tuple)):
            sizes = _checks.positive_ints("num_prototypes", num_prototypes)
            self.prototypes = nn.ModuleList(
                PrototypeLayer(feature_dim, size, gradient=prototype_gradient) for size in sizes
            )
        else:
            self.prototypes = PrototypeLayer(
                feature_dim,
                num_prototypes,  # type: ignore[arg-type]
                gradient=prototype_gradient,
            )
        self.sinkhorn = SinkhornKnopp(
            epsilon, iterations, process_group=process_group, synchronize=synchronize
        )
        self.loss = SwappedPredictionLoss(temperature)
        self.queue = (
            FeatureQueue(queue_length, feature_dim, num_code_views) if queue_length else None
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @overload
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        sample_weight: Tensor | None = None,
        return_details: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        sample_weight: Tensor | None = None,
        return_details: Literal[True],
    ) -> tuple[Tensor, SwAVDetails | tuple[SwAVDetails, ...]]: ...

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        sample_weight: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, SwAVDetails | tuple[SwAVDetails, ...]]:
        """Return the loss of one batch; in training mode count the step and fill the queue.

        Args:
            features: (V, B, D) features of V views of B images, of any norm, or a sequence of V
                tensors (B, D); the code views first.
            sample_weight: (B,) weights of the samples in the codes and in the loss, bool or
                floating. A sample of weight 0 takes no part and does not enter the queue.
            return_details: Whether to return ``(loss, details)``.

        Returns:
            The loss, a scalar in float32 (float64 for float64 features), the mean over the local
            batch; with ``return_details`` also the :class:`SwAVDetails`, or for a sequence of heads
            a tuple of them, one for each.
        """
        heads = self._heads()
        views = _checks.views(
            "features",
            features,
            "features",
            least=max(2, self.num_code_views),
            last=heads[0].feature_dim,
        )
        if sample_weight is not None:
            _checks.weight("sample_weight", sample_weight, (views[0].shape[:1],), views[0])
        _checks.same_device("features", views[0], heads[0].weight)

        together = features if isinstance(features, Tensor) else torch.stack(views)  # (V, B, D)
        around = None
        if sample_weight is not None:
            # An absent sample may hold NaN. In the product that would reach every gradient, as
            # 0 · NaN, so it goes around the product.
            finite = together.detach().isfinite().all(dim=-1, keepdim=True)
            around = (sample_weight == 0).unsqueeze(-1) & ~finite  # (V, B, 1)
            together = together.masked_fill(around, 0)
        losses, details = zip(
            *(
                self._loss_of_head(head, together, around, sample_weight, return_details)
                for head in heads
            ),
            strict=True,
        )
        loss: Tensor = losses[0] if len(heads) == 1 else torch.stack(losses).mean()

        if self.training:
            if self.queue is not None:
                present = None if sample_weight is None else sample_weight != 0
                newest = [unit_rows(view.detach()) for view in views[: self.num_code_views]]
                self.queue.push(newest, valid=present)
            self.steps.add_(1)
        if not return_details:
            return loss
        return loss, details if isinstance(self.prototypes, nn.ModuleList) else details[0]

    def _heads(self) -> list[PrototypeLayer]:
        several = isinstance(self.prototypes, nn.ModuleList)
        return list(self.prototypes) if several else [self.prototypes]  # type: ignore[arg-type, list-item]

    def _loss_of_head(
        self,
        head: PrototypeLayer,
        features: Tensor,
        around: Tensor | None,
        sample_weight: Tensor | None,
        return_details: bool,
    ) -> tuple[Tensor, SwAVDetails | None]:
        """Return the loss with one layer of prototypes.

        Where ``around`` (V, B, 1) is true, the scores of ``features`` (V, B, D) count as NaN. The
        scores in the details are only there if they are asked for.
        """
        frozen = self.steps < self.freeze_steps if self.freeze_steps else None
        unobserved = all(
            _is_plainly(part, kind)
            for part, kind in (
                (head, PrototypeLayer),
                (self.sinkhorn, SinkhornKnopp),
                (self.loss, SwappedPredictionLoss),
            )
        )
        if self._streams(head, features, unobserved, return_details):
            recent = None if self.queue is None else unit_rows(self.queue.features)
            factors = head._factors(features, frozen)
            loss = streamed_loss(
                *factors,
                recent,
                num_code_views=self.num_code_views,
                code_weight=self._code_weight(features.shape[1], sample_weight),
                sample_weight=sample_weight,
                temperature=self.loss.temperature,
                **self.sinkhorn._settings(),
            )
            return loss, None
        # Features times their factor would leave the range of float16 in a batch of thousands.
        fused = unobserved and product_dtype(features) != torch.float16
        if fused:
            factors = head._factors(features, frozen)
            scores = product(*factors)
        else:
            scores = head(features, frozen=frozen)  # (V, B, K)
        if around is not None:
            scores = scores.masked_fill(around, torch.nan)
        constant = scores.detach()
        codes = self._codes(head, constant[: self.num_code_views], sample_weight)
        if fused:
            loss = loss_of_factors(
                *factors,
                constant,
                codes,
                temperature=self.loss.temperature,
                sample_weight=sample_weight,
                residual=None if return_details else constant,
            )
        else:
            loss = self.loss(scores, codes, sample_weight)
        return loss, SwAVDetails(codes, constant)

    def _streams(
        self, head: PrototypeLayer, features: Tensor, unobserved: bool, return_details: bool
    ) -> bool:
        """Tell whether to compute the loss of a head block by block."""
        possible = unobserved and not return_details and not self.sinkhorn.validate
        if self.memory == "streamed" and not possible:
            raise ValueError(
                "memory must be 'full' or 'auto' for details, for validated codes, and with a part "
                "that is replaced or has hooks, got 'streamed'"
            )
        views, samples, _ = features.shape
        queued = 0 if self.queue is None else self.queue.length
        rows = views * samples + self.num_code_views * queued
        if queued or product_dtype(features).itemsize < 4:  # put together, or in float32
            rows += self.num_code_views * (samples + queued)
        size = rows * head.num_prototypes * at_least_float32(features.dtype).itemsize
        large = size > _BYTES_OF_FULL_SCORES
        return possible and (self.memory == "streamed" or (self.memory == "auto" and large))

    @torch.no_grad()
    def _codes(self, head: PrototypeLayer, scores: Tensor, sample_weight: Tensor | None) -> Tensor:
        """Return the codes of the current samples, (A, B, K), computed along with the queue."""
        scores = scores.to(at_least_float32(scores.dtype))  # so that the codes stay float32
        if self.queue is None:
            codes: Tensor = self.sinkhorn(scores, sample_weight)
            return codes
        samples = scores.shape[1]
        recent = head(self.queue.features).to(scores.dtype)
        weight = self._code_weight(samples, sample_weight)
        together: Tensor = self.sinkhorn(torch.cat([scores, recent], dim=1), weight)
        return together[:, :samples]

    def _code_weight(self, samples: int, sample_weight: Tensor | None) -> Tensor | None:
        """Return the weights in the codes: of the current samples and then of the queue's."""
        if self.queue is None:
            return sample_weight
        takes_part = self.queue.valid & (self.steps >= self.queue_start)
        present = takes_part.new_ones(samples) if sample_weight is None else sample_weight
        return torch.cat([present, takes_part.to(present.dtype)])

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"num_code_views={self.num_code_views}, queue_start={self.queue_start}, "
            f"freeze_steps={self.freeze_steps}"
        )


def _is_plainly(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a part is what it was made as, and nothing is hooked onto it."""
    return type(part) is kind and not (
        "forward" in vars(part)
        or part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
    )
