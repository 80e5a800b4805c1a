"""tanuki_jax: the Tanuki paper as one recipe, in JAX.  See README.md for the two commands."""

__version__ = "0.2.0"
