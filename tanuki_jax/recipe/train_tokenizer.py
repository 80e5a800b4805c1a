"""What `tokenization`, which imports nothing of this package, takes from it when a tokenizer is trained."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from tanuki_jax import files
from tanuki_jax.data.chat import TEMPLATE
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tokenization.errors import TokenizationError
from tokenization.options import Hooks

HOOKS = Hooks(TEMPLATE, lock.end_with_parent, functools.partial(files.disk_errors, label="tokenizer"))


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the errors of `tokenization` into UserErrors with the same message."""
    try:
        yield
    except TokenizationError as error:
        raise UserError(str(error)) from error
