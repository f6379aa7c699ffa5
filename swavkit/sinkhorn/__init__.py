"""Sinkhorn-Knopp: codes from scores."""

from swavkit.sinkhorn.functional import sinkhorn_knopp
from swavkit.sinkhorn.marginals import marginal_error, power_law_prior
from swavkit.sinkhorn.module import SinkhornKnopp

__all__ = ["SinkhornKnopp", "marginal_error", "power_law_prior", "sinkhorn_knopp"]
