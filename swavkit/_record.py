"""What of a ``SwAVLoss`` must be the same on all processes, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from swavkit._checks import is_plainly
from swavkit.distributed.agreement import checksum
from swavkit.distributed.collectives import is_sharded

_HEADS = 8  # whose sizes are compared one by one; those of more by their sum

_ONE_BY_ONE = "whether heads get their codes one by one"

ADVICE = {
    _ONE_BY_ONE: "they do where sinkhorn is replaced or has hooks, which must be so on all ranks",
    "steps": "load a checkpoint on every process",
    "the checksum of the prototypes": "wrap SwAVLoss in DistributedDataParallel or fully_shard, "
    "alone or inside the model: left bare, each process trains prototypes of its own",
}


def record(
    criterion: Any, heads: Sequence[Any], sinkhorn: Any, kind: type[nn.Module]
) -> dict[str, Any]:
    """Return the settings and values of a loss and its heads, as ``_agreement.py`` compares them.

    Of prototypes that lie in shards on several processes there is only one matrix: nothing to
    compare. ``kind`` is what ``sinkhorn`` is unless somebody has replaced it.
    """
    sizes: list[int | None] = [head.num_prototypes for head in heads[:_HEADS]]
    sizes += [None] * (_HEADS - len(sizes))
    mean_of_all = criterion.reduction == "global_mean"
    checksums = [checksum(head.weight) for head in heads if not is_sharded(head.weight)]
    return {
        "the number of heads": len(heads),
        "num_prototypes": sum(head.num_prototypes for head in heads),
        **{f"num_prototypes[{head}]": size for head, size in enumerate(sizes)},
        "the dtype of the prototypes": heads[0].weight.dtype,
        "feature_dim": heads[0].feature_dim,
        "num_code_views": criterion.num_code_views,
        "temperature": getattr(criterion.loss, "temperature", None),
        "queue_start": criterion.queue_start,
        "freeze_steps": criterion.freeze_steps,
        "reduction='global_mean'": mean_of_all,
        "steps": criterion.steps,
        **sinkhorn._settings()._asdict(),
        _ONE_BY_ONE: (len(heads) > 1 or mean_of_all) and not is_plainly(sinkhorn, kind),
        "the checksum of the prototypes": checksum(torch.stack(checksums).unsqueeze(1))
        if checksums
        else None,
    }
