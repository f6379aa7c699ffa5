"""Tells from the figures of a training what is wrong, and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from swavkit import _checks
from swavkit.distributed.collectives import participants, rank_and_size

__all__ = ["Diagnosis", "check_sizes"]

_LEAST_STEPS = 200  # of training; the loss of healthy runs is above ln K in the first 100
_LEAST_WINDOW = 50  # steps in the figures
_LEAST_QUEUED = 16  # features, for a mean and a spread
# Effective rank of the features. Healthy: 18 to 28. One linear direction: 1.0. A feature_dim of 2
# is no fault, and allows 2.
_RANK = 1.5
# Spread of unit features, 1 over the sphere. Healthy: 0.61 to 0.99. A common offset of 10 times
# their norm: 0.08.
_STD = 0.1
# Loss over ln K. Healthy: 0.39 to 0.94. Epsilon 10 times too large, alike features or views of
# different images: 0.99 to 1.01. Scores that are no cosines: 3.2.
_LN_K = 0.98
# Code entropy over ln K. Healthy: 0.17 to 0.56, and up to 0.89 with epsilon 0.05, which learns.
# Epsilon 0.08 in place of 0.02, which does not, or alike features: 0.97 to 1.00.
_NEAR_UNIFORM = 0.95
# Code entropy over ln K, of a loss at or above ln K. Healthy: 0.17 to 0.89. Scores that are no
# cosines: 0.11. Small epsilons (0.07 to 0.11) and hard codes (0.00) are no fault while it falls.
_ONE_HOT = 0.15
# Agreement above chance, 0 by chance and 1 for all pairs, of a loss at or above ln K. Healthy: 0.08
# to 0.57. Views of different images: 0.00 to 0.01. Epsilon 10 times too large: 0.02 to 0.03.
_DISAGREE = 0.01
# Perplexity of the nearest prototypes over those that are in reach. Healthy: 0.67 to 0.96. Codes
# by softmax: 0.01. Most prototypes turned away: 0.04.
_COLLAPSED = 0.1
# Share of the prototypes that are the nearest of no sample. Healthy: 0 to 0.02. A queue that is not
# refreshed: 0.70 to 0.78. Of alike features: 0.40 to 0.50.
_DEAD = 0.1
_DRAWS = 4  # samples per prototype in the figures; equally likely ones are missed with 0.02
# Share of prototypes with a copy. Healthy: 0. AdamW at a learning rate of 1: 0.04. A tenth of
# them copied: 0.20.
_DUPLICATES = 0.05
# Distance of the means of queued and current features, over the spread of the latter. Healthy, with
# 4 or 8 batches in the queue: 0.03 to 0.18. A queue that is not refreshed: 1.1 to 1.7. One of 30
# batches had 0.5 to 0.8 while the features changed fast. Used from step 400, it did no harm. Used
# from step 50, it left 10 % to 22 % of the prototypes dead, and 89 % of accuracy in place of 95 %.
# So drift is a fault only with its effect: queued features take the prototypes of current ones.
_DRIFT = 0.5
_OF_A_STALE_QUEUE = ("collapsed", "stuck_at_ln_k", "dead_prototypes")
# Spread of the queued features over that of the current ones. Healthy: 0.98 to 1.01,
# and 0.89 with a teacher's in the queue. Noisy copies of one feature: 0.13.
_ALIKE = 0.3
# Samples that the codes see, per prototype. With 0.16, 0.32, 0.64 and 1.28 of them, 35 %, 46 %,
# 57 % and 70 % of the codes have the same largest entry as codes of all samples of the data. The
# paper has 1.37, the examples of swavkit 0.64.
_SAMPLES = 0.5

_SMALLER_EPSILON = (
    "a smaller epsilon: the authors advise 0.03 in place of 0.05 for a collapse early in training; "
    "the digits example of swavkit needs 0.02"
)
_WARM_UP = (
    "a warm-up of the learning rate: the paper has 10 epochs at batch 4096, the digits example has "
    "300 steps"
)
_LOWER_RATE = (
    "a lower learning rate: the paper has 0.6 at batch 256 and 4.8 at batch 4096, with SGD and LARC"
)
_FREEZE = "a larger freeze_steps: the paper has 313 at batch 4096 and 5005 at batch 256"
_QUEUE = "a queue (queue_length): the paper has 3840 features at batch 256, used from epoch 15"
_SAME_IMAGE = "row b of every view must be of the same image: check the order of crops and batches"
_HEAD = (
    "the paper's projection head: Linear, BatchNorm, ReLU, Linear, with no normalization after it; "
    "and centered pixels"
)
_COSINES = (
    "L2-normalized features and prototypes, as in the paper: use PrototypeLayer, or divide by the "
    "norms before the product"
)
_SINKHORN = (
    "codes of SinkhornKnopp with the paper's 3 iterations and relaxation=inf; without equal use of "
    "the prototypes, one of them takes all samples"
)
_SYNCHRONIZE = (
    "synchronize=True in a distributed job, so that the codes see the samples of all ranks"
)
_REINITIALIZE = (
    "reinitialize these prototypes from features of the batch or of the queue: "
    "prototypes.reinitialize_(index, features)"
)
_LARGER_EPSILON = "a larger epsilon: the paper has 0.05 for scores that are cosines, and hard=False"
_BFLOAT16 = "bfloat16 in place of float16 under autocast, or a GradScaler"
_WEAKER_CROPS = "larger crops: the paper cuts 0.14 to 1 of the area at 224 pixels"
_LARGER_BATCH = "a larger batch, on more ranks or by codes from several micro-batches"
_REFRESH = "forwards of SwAVLoss in training mode, each of which pushes the features of its step"
_SHORTER_QUEUE = "a shorter queue: the paper's holds the features of 15 steps"
_QUEUE_LATER = "a larger queue_start: the paper uses its queue from epoch 15"
_EMPTY_QUEUE = "an empty queue: criterion.queue.reset_parameters()"
_FEWER = "fewer prototypes: the paper has 3000 for 1.3 million images of 1000 classes"


_ORDER = (  # worst first: a cause before what follows from it
    "non_finite",
    "features_of_rank_one",
    "collapsed",
    "views_disagree",
    "codes_near_uniform",
    "codes_one_hot",
    "stuck_at_ln_k",
    "local_codes",
    "queue_alike",
    "queue_stale",
    "dead_prototypes",
    "duplicates",
    "too_few_samples",
)


class Diagnosis(NamedTuple):
    """Something that is wrong with training.

    Attributes:
        name: The name, the same in every version, such as ``"stuck_at_ln_k"``.
        text: The metrics that show it, in words.
        remedies: What to change, the most promising first, with the source of each.
    """

    name: str
    text: str
    remedies: tuple[str, ...]


def diagnose(
    figures: Mapping[str, float],
    *,
    num_prototypes: int,
    samples: float,
    steps: int,
    window: int = 100,
    processes: int = 1,
    criterion: Any = None,
) -> list[Diagnosis]:
    """Return what is wrong with training, worst first; an empty list if nothing is.

    Rules need evidence. Non-finite values, local codes and sizes are reported at any step. All
    others wait for 200 training steps, and for 50 steps in the window. ``steps`` counts both, but
    the counter of ``criterion``, if given, counts training steps across resets of a monitor.
    Figures that are absent or NaN are skipped.

    Args:
        figures: The result of ``ClusterMonitor.compute()``, as floats, and figures of the features
            in the queue: their number ``"queued"``, and their ``"queue_std"`` and ``"queue_drift"``
            over the spread of the current features.
        num_prototypes: K, the number of prototypes.
        samples: The number of samples in a step, over all ``processes``.
        steps: The number of steps that the figures come from, before the window cuts them.
        window: The largest number of steps in the figures.
        processes: The number of ranks that the figures come from.
        criterion: The :class:`SwAVLoss` of the training, for its queue and its settings. A loss of
            several heads is compared with the mean of their ln K.

    Returns:
        A list of :class:`Diagnosis`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> figures = {"loss": 4.60, "code_entropy": 1.2}
        >>> [stuck] = diagnose(figures, num_prototypes=100, samples=64, steps=500)
        >>> stuck.name, stuck.text
        ('stuck_at_ln_k', 'loss 4.60 is ln K = 4.61 for the last 100 steps')
    """
    prototypes = _checks.positive_int("num_prototypes", num_prototypes)
    samples = _checks.non_negative_float("samples", samples)
    steps = _checks.non_negative_int("steps", steps)
    window = min(_checks.positive_int("window", window), steps)
    if not isinstance(figures, Mapping):
        raise TypeError(f"figures must be a mapping, got {type(figures).__name__}")

    found = _certain(figures, prototypes, samples / processes, processes, window, criterion)
    trained = max(steps, int(getattr(criterion, "steps", 0)))
    if trained >= _LEAST_STEPS and window >= _LEAST_WINDOW and prototypes > 1:
        found += _of_features(figures)
        found += _of_codes(figures, prototypes, _chance(criterion, prototypes), window)
        found += _of_prototypes(figures, prototypes, samples * window)
        found += _of_queue(figures, harmed=any(each.name in _OF_A_STALE_QUEUE for each in found))
    return sorted(found, key=lambda diagnosis: _ORDER.index(diagnosis.name))


def check_sizes(
    batch_size: int, num_prototypes: int, *, processes: int = 1, queue_length: int = 0
) -> list[Diagnosis]:
    """Return a diagnosis if the codes see too few samples for the prototypes, before training.

    The codes of a code view see ``(batch_size + queue_length) * processes`` samples. Far fewer
    than K cannot use the prototypes equally, and the code of a sample depends on which other
    samples are in the batch.
    The paper has 4096 samples for 3000 prototypes, with a batch of 4096, or of 256 and a queue of
    3840. Fewer than half a sample per prototype give a diagnosis.

    Args:
        batch_size: The number of samples per rank in a step, at least 1.
        num_prototypes: K, the number of prototypes; of the largest head.
        processes: The number of ranks that share the batch.
        queue_length: The slots of the queue, per rank and code view.

    Returns:
        An empty list, or a list of one :class:`Diagnosis`, ``"too_few_samples"``.

    Raises:
        TypeError: If a size is not an int.
        ValueError: If a size is out of range.

    Example:
        >>> check_sizes(256, 3000, queue_length=3840)
        []
        >>> [diagnosis] = check_sizes(256, 3000)
        >>> diagnosis.text
        'the codes see 256 samples for 3000 prototypes, 0.09 per prototype; expected at least 0.5'
    """
    batch = _checks.positive_int("batch_size", batch_size)
    prototypes = _checks.positive_int("num_prototypes", num_prototypes)
    ranks = _checks.positive_int("processes", processes)
    queue = _checks.non_negative_int("queue_length", queue_length)
    return _too_few((batch + queue) * ranks, prototypes)


def _too_few(seen: float, prototypes: int, remark: str = "") -> list[Diagnosis]:
    if seen >= _SAMPLES * prototypes:
        return []
    text = (
        f"the codes see {seen:.0f} samples for {prototypes} prototypes, "
        f"{seen / prototypes:.2f} per prototype; expected at least {_SAMPLES}{remark}"
    )
    return [Diagnosis("too_few_samples", text, (_QUEUE, _LARGER_BATCH, _FEWER))]


def _certain(
    figures: Mapping[str, float],
    prototypes: int,
    samples: float,
    processes: int,
    window: int,
    criterion: Any,
) -> list[Diagnosis]:
    """Return the diagnoses that need no evidence over many steps, by ``samples`` of a rank."""
    found = []
    nonfinite = _figure(figures, "nonfinite")
    if nonfinite > 0:
        text = f"{nonfinite:.0f} steps with NaN or infinite values among the last {window} steps"
        remedies = (_LOWER_RATE, _WARM_UP, _BFLOAT16, _COSINES)
        found.append(Diagnosis("non_finite", text, remedies))

    ranks, unknown = processes, "; a queue counts in diagnose(criterion) only"
    if criterion is not None:
        sinkhorn, unknown = getattr(criterion, "sinkhorn", None), ""
        group = participants(getattr(sinkhorn, "process_group", None), True)
        _, ranks = rank_and_size(group)
        if ranks > 1 and not getattr(sinkhorn, "synchronize", True):
            text = f"each of the {ranks} ranks computes its codes from its own samples alone"
            found.append(Diagnosis("local_codes", text, (_SYNCHRONIZE,)))
            ranks = 1
    if samples > 0:
        queue = getattr(criterion, "queue", None)
        queued = 0 if queue is None else queue.length
        found += _too_few((samples + queued) * ranks, prototypes, unknown)
    return found


def _of_features(figures: Mapping[str, float]) -> list[Diagnosis]:
    rank, spread = _figure(figures, "effective_rank"), _figure(figures, "feature_std")
    if not (rank < _RANK or spread < _STD):
        return []
    text = (
        f"the features have effective rank {rank:.2f} and a standard deviation of {spread:.2f} of "
        f"that of features spread over the sphere"
    )
    return [Diagnosis("features_of_rank_one", text, (_HEAD, _LOWER_RATE, _WARM_UP))]


def _chance(criterion: Any, prototypes: int) -> float:
    """Return the loss of uniform predictions: ln K, or its mean over the heads of a criterion."""
    heads = getattr(criterion, "prototypes", None)
    if not isinstance(heads, Iterable):
        return math.log(prototypes)
    return fmean(math.log(head.num_prototypes) for head in heads)


def _of_codes(
    figures: Mapping[str, float], prototypes: int, chance: float, window: int
) -> list[Diagnosis]:
    found = []
    ln_k, last = math.log(prototypes), f"for the last {window} steps"
    loss, entropy = _figure(figures, "loss"), _figure(figures, "code_entropy")
    perplexity, agreement = _figure(figures, "perplexity"), _figure(figures, "agreement")
    learning = loss < _LN_K * chance
    if loss >= _LN_K * chance:
        compared = "is" if loss <= (2 - _LN_K) * chance else "is above"
        text = f"loss {loss:.2f} {compared} ln K = {chance:.2f} {last}"
        found.append(
            Diagnosis(
                "stuck_at_ln_k", text, (_SMALLER_EPSILON, _WARM_UP, _LOWER_RATE, _QUEUE, _FREEZE)
            )
        )
    if entropy > _NEAR_UNIFORM * ln_k:
        text = (
            f"code entropy {entropy:.2f} is {entropy / ln_k:.0%} of ln K = {ln_k:.2f} {last}: "
            f"epsilon is too large, or the features are too much alike"
        )
        found.append(Diagnosis("codes_near_uniform", text, (_SMALLER_EPSILON, _HEAD, _WARM_UP)))
    if entropy < _ONE_HOT * ln_k and not learning:
        text = (
            f"code entropy {entropy:.2f} is {entropy / ln_k:.1%} of ln K = {ln_k:.2f}, and the "
            f"loss is {loss:.2f} {last}: the codes are one-hot and nothing is learned from them"
        )
        found.append(Diagnosis("codes_one_hot", text, (_COSINES, _LARGER_EPSILON, _WARM_UP)))
    by_chance = 1 / perplexity if perplexity >= 1 else math.nan
    if agreement - by_chance < _DISAGREE * (1 - by_chance) and not learning:
        text = (
            f"{agreement:.1%} of the pairs of views have the same nearest prototype {last}; "
            f"{by_chance:.1%} would by chance"
        )
        found.append(Diagnosis("views_disagree", text, (_SAME_IMAGE, _WEAKER_CROPS, _WARM_UP)))
    return found


def _of_prototypes(figures: Mapping[str, float], prototypes: int, draws: float) -> list[Diagnosis]:
    """Return the diagnoses of the use of prototypes, by ``draws`` samples of a code view."""
    found = []
    perplexity, used = _figure(figures, "perplexity"), _figure(figures, "used")
    duplicates = _figure(figures, "duplicates")
    reached = -math.expm1(-draws / prototypes)  # share of equally likely prototypes ever drawn
    if perplexity - 1 < _COLLAPSED * (reached * prototypes - 1):
        text = (
            f"the nearest prototypes have a perplexity of {perplexity:.1f} of {prototypes}, and "
            f"{used:.0%} are used"
        )
        found.append(
            Diagnosis(
                "collapsed",
                text,
                (_SINKHORN, _SMALLER_EPSILON, _WARM_UP, _QUEUE, _SYNCHRONIZE, _FREEZE),
            )
        )
    if draws >= _DRAWS * prototypes and used < (1 - _DEAD) * reached:
        text = f"{1 - used:.0%} of {prototypes} prototypes are the nearest one of no sample"
        found.append(Diagnosis("dead_prototypes", text, (_REINITIALIZE, _FREEZE, _QUEUE, _FEWER)))
    if duplicates > _DUPLICATES * prototypes:
        text = f"{duplicates:.0f} of {prototypes} prototypes have another one at cosine > 0.99"
        found.append(Diagnosis("duplicates", text, (_REINITIALIZE, _FEWER, _FREEZE)))
    return found


def _of_queue(figures: Mapping[str, float], *, harmed: bool) -> list[Diagnosis]:
    queued, spread = _figure(figures, "queued"), _figure(figures, "queue_std")
    drift = _figure(figures, "queue_drift")
    if not queued >= _LEAST_QUEUED:
        return []
    found = []
    if spread < _ALIKE:
        text = (
            f"{queued:.0f} queued features are alike: they spread {spread:.2f} times as far as the "
            f"current ones"
        )
        found.append(Diagnosis("queue_alike", text, (_EMPTY_QUEUE, _REFRESH, _QUEUE_LATER)))
    if drift > _DRIFT and harmed:
        text = (
            f"the mean of {queued:.0f} queued features is {drift:.1f} standard deviations of the "
            f"current features away from theirs"
        )
        remedies = (_REFRESH, _SHORTER_QUEUE, _QUEUE_LATER, _LOWER_RATE)
        found.append(Diagnosis("queue_stale", text, remedies))
    return found


def _figure(figures: Mapping[str, float], name: str) -> float:
    """Return a figure; NaN, which no threshold exceeds, if it is absent."""
    return float(figures.get(name, math.nan))
