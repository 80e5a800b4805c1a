"""Addresses in configs, which are stored in every checkpoint: none may hold a password or key."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from tanuki_jax.errors import UserError

SECRET = r"(?:sig|[^=&/,]*(?:key|token|secret|signature|credential|auth|password|pwd))"
CREDENTIALS = re.compile(rf"://[^/@,]*@|://[^,]*[?&]{SECRET}=", re.IGNORECASE)


def check_address(key: str, address: str, instead: str = "give it in the environment, as the file system asks for it") -> None:
    """An error where the value of a config key has a password or key in it; `instead` says how to give it."""
    if CREDENTIALS.search(address):
        raise UserError(
            f"config: {key} has a password or key in its address, and configs are stored in every checkpoint; {instead}"
        )


def check_base_url(where: str, url: str, variable: str = "api_key_env") -> None:
    """An error where the address of an API has a password or key in it, or is none; `variable` is the key that holds it."""
    if CREDENTIALS.search(url):
        raise UserError(
            f"{where} has a password or key in its address, which is stored; name the variable that holds it in {variable}"
        )
    if not is_url(url):
        raise UserError(f"{where} is {url!r}; it must be an address, http://127.0.0.1:8000/v1 for example")


def is_url(address: str) -> bool:
    """Whether an address is that of a server, http://127.0.0.1:8000/v1 for example."""
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", address)
    except ValueError:  # a port that is none, brackets that do not close
        return False
