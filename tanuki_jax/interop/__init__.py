"""Files of other projects, in and out."""

from tanuki_jax.interop.export import export_huggingface
from tanuki_jax.interop.huggingface import copy_tokenizer, is_huggingface, open_huggingface, open_llama
from tanuki_jax.interop.importing import import_huggingface

__all__ = [
    "copy_tokenizer",
    "export_huggingface",
    "import_huggingface",
    "is_huggingface",
    "open_huggingface",
    "open_llama",
]
