"""Libraries of the extra `quality`, imported where a filter needs one."""

from __future__ import annotations

import importlib
from types import ModuleType

from tanuki_jax.errors import UserError


def require(module: str, purpose: str) -> ModuleType:
    """The module; where it is not installed, an error that names the extra.

    purpose: the filter that needs it, for the message.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise UserError(f'{purpose} needs {package}; install it with: pip install "tanuki-jax[quality]"') from error
