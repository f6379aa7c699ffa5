"""Train SeLa-v2: every crop predicts the prototype that Sinkhorn-Knopp assigns to its image.

    python docs/examples/selav2.py                       # 4,000 MNIST digits
    python docs/examples/selav2.py --data digits         # scikit-learn's 8x8 digits, seconds
    torchrun --nproc-per-node 2 docs/examples/selav2.py  # each batch on two ranks

The loop, the bank and the loss are those of ``deepclusterv2.py``. The targets are computed the
other way round: prototypes are trained, and before each epoch the features of all images, on all
ranks, are spread equally over them (Asano et al. 2020, arXiv 1911.05371; Caron et al. 2020, arXiv
2006.09882, appendix).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import processes
import torch
from deepclusterv2 import Model, train
from methods import begin, crops_of, end
from torch import Tensor

from swavkit import PrototypeLayer, sinkhorn_knopp

EPSILON = 0.05


@torch.no_grad()
def spread(bank: Tensor, heads: Sequence[PrototypeLayer]) -> list[Tensor]:
    """Return for each head the prototype of each image of this rank, an index (n,).

    Args:
        bank: (A, n, D) features of the code views, which heads take in turn.
        heads: Each is a problem over the images of all ranks. All are solved together.
    """
    scores = [head(bank[number % len(bank)]) for number, head in enumerate(heads)]
    return [codes.argmax(dim=1) for codes in sinkhorn_knopp(scores, epsilon=EPSILON)]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options, images = begin(arguments, __doc__, epochs=15, batch_size=64, prototypes=100)
    model = Model(images.train.shape[1], options.prototypes).to(images.train.device)
    untrained = copy.deepcopy(model.network.encoder).eval()
    torch.manual_seed(options.seed + 10**9 * processes.RANK)  # other crops on each rank
    train(model, crops_of(options.data), images.train, options, targets_of=spread)
    return end({"SeLa-v2": model.network.encoder.eval(), "a random encoder": untrained}, images)


if __name__ == "__main__":
    main()
