"""SwAV as one module: the parts, wired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._precision import at_least_float32
from swavkit.feature_queue import FeatureQueue
from swavkit.prototypes import PrototypeLayer, unit_rows
from swavkit.sinkhorn import SinkhornKnopp
from swavkit.swapped_prediction import SwappedPredictionLoss

if TYPE_CHECKING:
    from swavkit._distributed import ProcessGroup

__all__ = ["SwAVDetails", "SwAVLoss"]


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

    Parameters and state belong to the module: give its parameters to the optimizer, save its
    ``state_dict()``, and in a distributed job wrap it in DDP, alone or inside the model.

    Args:
        feature_dim: D, the number of features.
        num_prototypes: K, the number of prototypes.
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
        process_group: The processes that share the batch for codes; the default group if ``None``.
        synchronize: Whether to share the batch for codes with other processes in training mode.

    Attributes:
        prototypes: The :class:`PrototypeLayer`.
        sinkhorn: The :class:`SinkhornKnopp`.
        loss: The :class:`SwappedPredictionLoss`.
        queue: The :class:`FeatureQueue`, or ``None`` without one.
        steps: int64 scalar, the training steps so far. A forward in ``eval()`` changes no state.

    Raises:
        TypeError: If a setting or an input is of the wrong type.
        ValueError: If a setting is out of range or a shape or device does not fit.

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
        num_prototypes: int,
        *,
        num_code_views: int = 2,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue_length: int = 0,
        queue_start: int = 0,
        freeze_steps: int = 0,
        process_group: ProcessGroup | None = None,
        synchronize: bool = True,
    ) -> None:
        super().__init__()
        self.num_code_views = _checks.positive_int("num_code_views", num_code_views)
        queue_length = _checks.non_negative_int("queue_length", queue_length)
        self.queue_start = _checks.non_negative_int("queue_start", queue_start)
        self.freeze_steps = _checks.non_negative_int("freeze_steps", freeze_steps)
        self.prototypes = PrototypeLayer(feature_dim, num_prototypes)
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
    ) -> tuple[Tensor, SwAVDetails]: ...

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        sample_weight: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, SwAVDetails]:
        """Return the loss of one batch; in training mode count the step and fill the queue.

        Args:
            features: (V, B, D) features of V views of B images, of any norm, or a sequence of V
                tensors (B, D); the code views first.
            sample_weight: (B,) weights of the samples in the codes and in the loss, bool or
                floating. A sample of weight 0 takes no part and does not enter the queue.
            return_details: Whether to return ``(loss, details)``.

        Returns:
            The loss, a scalar in float32 (float64 for float64 features), the mean over the local
            batch; with ``return_details`` also the :class:`SwAVDetails`.
        """
        views = _checks.views(
            "features",
            features,
            "features",
            least=max(2, self.num_code_views),
            last=self.prototypes.feature_dim,
        )
        if sample_weight is not None:
            _checks.weight("sample_weight", sample_weight, (views[0].shape[:1],), views[0])
        _checks.same_device("features", views[0], self.prototypes.weight)

        scores = self._scores(torch.stack(views), sample_weight)  # (V, B, K)
        codes = self._codes(scores.detach()[: self.num_code_views], sample_weight)
        loss: Tensor = self.loss(scores, codes, sample_weight)

        if self.training:
            if self.queue is not None:
                present = None if sample_weight is None else sample_weight != 0
                newest = [unit_rows(view.detach()) for view in views[: self.num_code_views]]
                self.queue.push(newest, valid=present)
            self.steps.add_(1)
        return (loss, SwAVDetails(codes, scores.detach())) if return_details else loss

    def _scores(self, features: Tensor, sample_weight: Tensor | None) -> Tensor:
        frozen = self.steps < self.freeze_steps if self.freeze_steps else None
        if sample_weight is None:
            scores: Tensor = self.prototypes(features, frozen=frozen)
            return scores
        # An absent sample may hold NaN. In the product that would reach every gradient, as 0 · NaN,
        # so it goes around the product.
        finite = features.detach().isfinite().all(dim=-1, keepdim=True)
        around = (sample_weight == 0).unsqueeze(-1) & ~finite  # (V, B, 1)
        scores = self.prototypes(features.masked_fill(around, 0), frozen=frozen)
        return scores.masked_fill(around, torch.nan)

    @torch.no_grad()
    def _codes(self, scores: Tensor, sample_weight: Tensor | None) -> Tensor:
        """Return the codes of the current samples, (A, B, K), computed along with the queue."""
        scores = scores.to(at_least_float32(scores.dtype))  # so that the codes stay float32
        if self.queue is None:
            codes: Tensor = self.sinkhorn(scores, sample_weight)
            return codes
        samples = scores.shape[1]
        recent = self.prototypes(self.queue.features).to(scores.dtype)
        takes_part = self.queue.valid & (self.steps >= self.queue_start)
        present = takes_part.new_ones(samples) if sample_weight is None else sample_weight
        weight = torch.cat([present, takes_part.to(present.dtype)])
        together: Tensor = self.sinkhorn(torch.cat([scores, recent], dim=1), weight)
        return together[:, :samples]

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"num_code_views={self.num_code_views}, queue_start={self.queue_start}, "
            f"freeze_steps={self.freeze_steps}"
        )
