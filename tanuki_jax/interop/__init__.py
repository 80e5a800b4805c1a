"""Imports and exports: models of Hugging Face, adapters of PEFT."""

from tanuki_jax.interop.config_json import is_huggingface
from tanuki_jax.interop.export import export_huggingface
from tanuki_jax.interop.huggingface import open_huggingface, open_llama
from tanuki_jax.interop.importing import import_huggingface
from tanuki_jax.interop.peft import export_adapters, import_adapters, is_peft

__all__ = [
    "export_adapters",
    "export_huggingface",
    "import_adapters",
    "import_huggingface",
    "is_huggingface",
    "is_peft",
    "open_huggingface",
    "open_llama",
]
