"""`python -m tanuki_jax.cli` is `tanuki`."""

import sys

from tanuki_jax.cli.main import command

sys.exit(command())
