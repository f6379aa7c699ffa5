"""Oracle, strategies and laws for tests of your own codes, losses and transforms.

The strategies require Hypothesis: ``pip install 'swavkit[testing]'``. ``import swavkit`` does not
import this package.
"""

from swavkit.testing.laws import (
    assert_codes,
    assert_sinkhorn_laws,
    assert_swapped_loss_laws,
    assert_transform_laws,
)
from swavkit.testing.oracle import (
    log_sum_exp,
    marginal_error,
    sinkhorn_codes,
    swapped_loss,
    swapped_loss_gradient,
    unit_rows,
)
from swavkit.testing.strategies import (
    CodesProblem,
    LossProblem,
    codes_problems,
    loss_problems,
    reals,
    weights,
)

__all__ = [
    "CodesProblem",
    "LossProblem",
    "assert_codes",
    "assert_sinkhorn_laws",
    "assert_swapped_loss_laws",
    "assert_transform_laws",
    "codes_problems",
    "log_sum_exp",
    "loss_problems",
    "marginal_error",
    "reals",
    "sinkhorn_codes",
    "swapped_loss",
    "swapped_loss_gradient",
    "unit_rows",
    "weights",
]
