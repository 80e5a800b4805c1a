"""One client and one runner for every job that asks a model over HTTP (docs/endpoints.md)."""

from tanuki_jax.endpoint.budget import Budget
from tanuki_jax.endpoint.client import Client
from tanuki_jax.endpoint.dry_run import Estimate, estimate
from tanuki_jax.endpoint.job import Answer, Ask, Chain, Drop, Empty, Failed, Job, NoAnswer, Overflow, Refused
from tanuki_jax.endpoint.runner import run
from tanuki_jax.endpoint.summary import Summary

__all__ = [
    "Answer",
    "Ask",
    "Budget",
    "Chain",
    "Client",
    "Drop",
    "Empty",
    "Estimate",
    "Failed",
    "Job",
    "NoAnswer",
    "Overflow",
    "Refused",
    "Summary",
    "estimate",
    "run",
]
