"""Marginals: target masses of samples and prototypes, and the distance of codes from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import at_least_float32, autocast_disabled
from swavkit.distributed.collectives import gather_over_ranks, participants, sum_over_ranks
from swavkit.sinkhorn.kernel import Masses

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

__all__ = ["marginal_error", "power_law_prior"]


def marginal_error(
    codes: Tensor,
    *,
    sample_weight: Tensor | None = None,
    prototype_weight: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    synchronize: bool = True,
) -> Tensor:
    r"""Return the largest relative error of the prototypes' masses.

    With the sample masses r and the target marginal c of the prototypes, which sums to 1, it is

    .. math:: \max_j \left| \frac{\sum_i r_i Q_{ij}}{c_j \sum_i r_i} - 1 \right|.

    It is 0 if every prototype has its target mass, and K - 1 if one of K prototypes of equal target
    mass has all the mass. After three iterations, 0.1 to 0.6 is common. In a distributed job, it is
    computed on the samples of all ranks, and all ranks of the group must make the call.

    Args:
        codes: (..., B, K) codes of B samples, any real floating dtype. Leading dimensions are
            independent problems.
        sample_weight: (..., B) or (B,) multiplicities, bool or floating, at least 0. A sample of
            weight 0 does not count, whatever its code holds.
        prototype_weight: (K,) relative masses of the prototypes, at least 0, at any scale; equal
            masses by default. A prototype of weight 0 has an error of 0 if nothing uses it, else an
            infinite one.
        process_group: The ranks that share the batch; the default group if ``None``.
        synchronize: Whether to share the batch with other ranks.

    Returns:
        (...) errors in float32, or float64 for float64 codes, without gradient; 0 where no sample
        counts, NaN where a code that counts is NaN.

    Raises:
        TypeError: If ``codes`` is not a floating tensor or a weight is neither bool nor floating.
        ValueError: If a shape does not fit, or the calling rank is not in ``process_group``.

    Example:
        >>> marginal_error(torch.eye(3))
        tensor(0.)
        >>> marginal_error(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    _checks.boolean("synchronize", synchronize)
    _checks.of_samples_and_prototypes("codes", codes)
    _checks.weights(sample_weight, prototype_weight, codes)
    group = participants(process_group, synchronize)

    with torch.no_grad(), autocast_disabled(codes.device):
        dtype = at_least_float32(codes.dtype)
        log_mass, log_largest = masses(sample_weight, codes.shape[:-1], codes.device, dtype)
        sample_mass = log_mass.exp()  # (..., B), r
        prototype_weights = masses(prototype_weight, codes.shape[-1:], codes.device, dtype)
        present = (sample_mass != 0).unsqueeze(-1)
        used = (torch.where(present, codes, 0) * sample_mass.unsqueeze(-1)).sum(dim=-2)  # (..., K)
        own = torch.cat([used, sample_mass.sum(dim=-1, keepdim=True), log_largest], dim=-1)
        # Each rank has its own unit, and the sum may be out of range in any of them.
        of_ranks = gather_over_ranks(own, group)
        units = of_ranks[..., -1:]
        both = (of_ranks[..., :-1] * (units - units.amax(dim=0)).exp()).sum(dim=0)
        used, total = both[..., :-1], both[..., -1:]
        wanted = prototype_weights.log.softmax(dim=-1) * total  # in proportion to c, (K,)
        error = (used / wanted - 1).abs()
        return error.masked_fill((used == 0) & (wanted == 0), 0).amax(dim=-1)


def power_law_prior(num_prototypes: int, exponent: float = 0.25) -> Tensor:
    r"""Return a power-law target marginal, for ``prototype_weight``.

    .. math:: c_k \propto k^{-\text{exponent}}, \qquad k = 1 \dots K.

    Uncurated data has few large clusters and many small ones. Equal use would split the large ones
    (Assran et al. 2022).

    Args:
        num_prototypes: The number of prototypes K, at least 1.
        exponent: The exponent, at least 0. 0 gives equal masses.

    Returns:
        (K,) float32 masses on the CPU, which sum to 1, from the largest to the smallest.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> power_law_prior(4, exponent=1.0)
        tensor([0.4800, 0.2400, 0.1600, 0.1200])

    References:
        Assran et al., "The Hidden Uniform Cluster Prior in Self-Supervised Learning", ICLR 2023.
    """
    num_prototypes = _checks.positive_int("num_prototypes", num_prototypes)
    exponent = _checks.non_negative_float("exponent", exponent)
    ranks = torch.arange(1, num_prototypes + 1, dtype=torch.float64, device="cpu")
    return (-exponent * ranks.log()).softmax(dim=0).float()


def masses(
    weight: Tensor | None, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Masses:
    """Return a weight as masses of ``shape`` in ``dtype``, computed in the wider of both dtypes."""
    if weight is None:
        log = torch.zeros(shape, device=device, dtype=dtype)
    else:
        log = weight.detach().to(torch.promote_types(weight.dtype, dtype)).log().expand(shape)
    none = log.new_full((*shape[:-1], 1), torch.finfo(dtype).min)
    largest = torch.cat([log, none], dim=-1).amax(dim=-1, keepdim=True)
    return Masses((log - largest).to(dtype), largest.to(dtype))


def may_be_fractional(*weights: Tensor | None) -> bool:
    """Tell whether a weight may be other than 0 and 1, by the dtypes."""
    return any(weight is not None and weight.is_floating_point() for weight in weights)


def target_marginal(prototype_weight: Tensor | None, like: Tensor) -> Tensor | None:
    """Return the masses (K,) of prototypes, of sum 1, as ``like``; ``None`` for equal masses."""
    if prototype_weight is None:
        return None
    log_mass, _ = masses(prototype_weight, prototype_weight.shape, like.device, like.dtype)
    return log_mass.softmax(dim=-1)


def refuse_bad_priors(priors: Sequence[Tensor | None], several: bool) -> None:
    """Raise if relative masses of prototypes have invalid values. Waits for the device.

    ``several`` tells whether they are named as entries of a sequence.
    """
    for head, prior in enumerate(priors):
        if type(prior) is not Tensor:  # but None, or a subclass that may have no values
            continue
        name = f"prototype_weight[{head}]" if several else "prototype_weight"
        for bad in _not_masses(prior, prior)[:1]:
            raise ValueError(f"{name} must be finite and at least 0, got {bad.item()}")
        if not prior.any():
            raise ValueError(f"{name} must have a positive sum, got 0.0")


def refuse_bad_values(
    scores: Tensor,
    sample_weight: Tensor | None,
    prototype_weight: Tensor | None,
    group: ProcessGroup | None,
) -> None:
    """Raise on all ranks if any rank has invalid values. Waits for the device."""
    counted, prototype_totals = scores, scores.new_empty(0)
    samples = torch.full(scores.shape[:-2], scores.shape[-2], device=scores.device).double()
    totals = samples
    if sample_weight is not None:
        counted = scores[(sample_weight != 0).expand(scores.shape[:-1])]
        totals = sample_weight.double().sum(dim=-1).expand_as(samples)
    if prototype_weight is not None:
        prototype_totals = prototype_weight.double().sum(dim=-1, keepdim=True)
    breaches = {
        "sample_weight must be finite and at least 0": _not_masses(sample_weight, scores),
        "prototype_weight must be finite and at least 0": _not_masses(prototype_weight, scores),
        "prototype_weight must have a positive sum": prototype_totals[prototype_totals == 0],
        "scores must be finite in every sample that is present": counted[~counted.isfinite()],
    }
    counts = [values.numel() for values in breaches.values()]
    record = torch.cat([totals.new_tensor(counts), totals.flatten(), samples.flatten()])
    record = sum_over_ranks(record, group)
    of_all, (totals, samples) = record[: len(breaches)].tolist(), record[len(breaches) :].chunk(2)
    for (expected, values), count in zip(breaches.items(), of_all, strict=True):
        if count > 0:
            got = values[0].item() if values.numel() else "another value on another rank"
            raise ValueError(f"{expected}, got {got}")
    if ((totals == 0) & (samples > 0)).any():
        raise ValueError("sample_weight must have a positive sum, got 0.0")


def _not_masses(weight: Tensor | None, like: Tensor) -> Tensor:
    if weight is None:
        return like.new_empty(0)
    return weight[~((weight >= 0) & weight.isfinite())]
