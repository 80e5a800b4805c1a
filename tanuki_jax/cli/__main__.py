"""`python -m tanuki_jax.cli` is `tanuki`."""

from tanuki_jax.cli.main import command

command()
