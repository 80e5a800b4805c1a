"""Files of other projects, in and out."""

from tanuki_jax.interop.huggingface import is_huggingface, open_llama

__all__ = ["is_huggingface", "open_llama"]
