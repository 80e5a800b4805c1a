"""Several processes as one run: how they start, what they agree on and exchange, and a watchdog that names who is behind."""

from tanuki_jax.multihost.coordination import agree, exchange, first_of, host, name, on_first, once, share, wait_seconds
from tanuki_jax.multihost.startup import initialize, listening, to_host, told_to_stop
from tanuki_jax.multihost.watchdog import at, slowest, spends, watching

__all__ = [
    "agree",
    "at",
    "exchange",
    "first_of",
    "host",
    "initialize",
    "listening",
    "name",
    "on_first",
    "once",
    "share",
    "slowest",
    "spends",
    "to_host",
    "told_to_stop",
    "wait_seconds",
    "watching",
]
