"""Several processes as one run: start-up, coordination, and a watchdog that names the straggling process."""

from tanuki_jax.multihost.coordination import (
    all_gather_text,
    assert_equal_across_processes,
    first_error,
    first_then_all,
    hostname,
    on_process_zero,
    process_label,
    process_slice,
    wait_seconds,
)
from tanuki_jax.multihost.startup import handle_sigterm, initialize, preemption_requested, to_host
from tanuki_jax.multihost.watchdog import enter_phase, report_input_wait, slowest_process, watch_for_hangs

__all__ = [
    "all_gather_text",
    "assert_equal_across_processes",
    "enter_phase",
    "first_error",
    "first_then_all",
    "handle_sigterm",
    "hostname",
    "initialize",
    "on_process_zero",
    "preemption_requested",
    "process_label",
    "process_slice",
    "report_input_wait",
    "slowest_process",
    "to_host",
    "wait_seconds",
    "watch_for_hangs",
]
