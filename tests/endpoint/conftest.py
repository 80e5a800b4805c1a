"""Pauses are short, and a server is there."""

import pytest

from tanuki_jax.endpoint import gate
from tests.endpoint.faulty_server import serve


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(gate, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(gate, "MAX_PAUSE", 0.05)
    monkeypatch.setattr(gate, "MAX_BACK_OFF", {})
    monkeypatch.setattr(gate, "OTHER_BACK_OFF", 0.05)
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-provider")


@pytest.fixture
def server():
    with serve() as running:
        yield running
