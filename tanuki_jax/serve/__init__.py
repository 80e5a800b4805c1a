"""Our checkpoints behind an OpenAI-compatible HTTP server.

    tanuki serve --checkpoint=runs/nano/stages/dpo --port=8000

    with serve.background("runs/nano/stages/dpo") as base_url:       # in this process
        openai.OpenAI(base_url=base_url, api_key="none")

`server.py` holds it together; `app.py` has the routes; `requests.py` and `prompts.py` check what comes in; `engine.py` makes
the tokens, for all requests together; `answers.py` writes what goes out.  docs/serving.md is for users.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tanuki_jax.serve.server import Options, background, load, serve

__all__ = ["Options", "background", "load", "serve"]


def __getattr__(name: str) -> object:
    """Imports the server, and with it openai's types, when it is first asked for."""
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.server"), name)
    raise AttributeError(name)
