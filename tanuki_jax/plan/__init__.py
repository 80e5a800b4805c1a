"""What a recipe needs of a TPU slice, found out on any machine: `tanuki plan`."""

from tanuki_jax.plan.estimate import plan_stage
from tanuki_jax.plan.planner import explain, plan, problems, search
from tanuki_jax.plan.table import table
from tanuki_jax.slices import Topology, parse

__all__ = [
    "Topology",
    "explain",
    "parse",
    "plan",
    "plan_stage",
    "problems",
    "search",
    "table",
]
