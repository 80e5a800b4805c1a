"""The model on its device, as the engine uses it: `model.slots` with every program compiled at the start."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config
from tanuki_jax.model import slots
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.sampling import Choices, request_key
from tanuki_jax.serve.jobs import TOP, Choice, Job
from tanuki_jax.serve.rows import Block, PromptScores

N_TOGETHER = 4  # prompts that one program admits
SMALLEST = 16  # width of a prompt's program
PROGRAMS = ((1, 0), (4, 0), (8, 0), (1, TOP), (8, TOP))  # steps of a block, and likeliest tokens of each


class SlotsDecoder:
    """See `engine.Decoder`.

    Args:
      params: a list with the parameters, which are taken out of it.
      length: tokens that a slot holds, prompt and answer.
      mesh: over which the parameters lie, if they lie on several devices.
    """

    def __init__(
        self, cfg: config.ModelConfig, params: list[Params], n_slots: int, length: int, mesh: jax.sharding.Mesh | None = None
    ) -> None:
        self.n_slots, self.n_together = n_slots, min(N_TOGETHER, n_slots)
        self._cfg, self._length, self._mesh = cfg, length, mesh
        with self._on_mesh():
            self._weights = slots.unstack(cfg, params.pop())
            self._slots = slots.empty(cfg, n_slots, length)

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def compile(self, take_note: Callable[[str], None]) -> None:
        """Runs every program once, so that none is compiled while somebody waits."""
        widths = sorted({self.width(n) for n in range(1, self._length + 1)})
        calls: list[Callable[[], object]] = []
        for width in widths:
            prompt = (0,) * width
            calls.append(functools.partial(self.admit, [(self.n_slots, Job(prompt, 0, Choice()))]))
            calls.append(functools.partial(self.score, prompt))
        calls += [functools.partial(self.start, n, top) for n, top in PROGRAMS]
        calls.append(functools.partial(self.release, [0]))
        for number, call in enumerate(calls):
            take_note(f"program {number + 1} of {len(calls)} is being compiled")
            call()
        jax.block_until_ready(self._slots)

    def width(self, n_tokens: int) -> int:
        """The next power of two, from 16 to the slots' length."""
        return min(self._length, max(SMALLEST, 1 << (n_tokens - 1).bit_length()))

    def admit(self, rows: Sequence[tuple[int, Job]]) -> None:
        """Puts jobs of one width into slots; rows that are missing go to a slot that is not there."""
        R, P = self.n_together, self.width(max(len(job.prompt) for _, job in rows))
        tokens_RP, lengths_R = np.zeros((R, P), np.int32), np.ones(R, np.int32)
        slots_R = np.full(R, self.n_slots, np.int32)
        for i, (slot, job) in enumerate(rows):
            tokens_RP[i, : len(job.prompt)] = job.prompt
            lengths_R[i], slots_R[i] = len(job.prompt), slot
        jobs = [job for _, job in rows] + [rows[0][1]] * (R - len(rows))
        keys_R = jnp.stack([request_key(job.seed, job.prompt, job.sample) for job in jobs])
        with self._on_mesh():
            self._slots = slots.admit(
                self._cfg, self._weights, self._slots, tokens_RP, lengths_R, slots_R, _stack_choices(jobs), keys_R
            )

    def start(self, n: int, top: int) -> slots.Tokens:
        """Starts n steps of all slots."""
        with self._on_mesh():
            self._slots, tokens = slots.step(self._cfg, self._weights, self._slots, n, top)
        return tokens

    def read(self, started: slots.Tokens) -> Block:
        """Waits for the tokens of these steps."""
        return Block(*jax.device_get(started))

    def release(self, free: Sequence[int]) -> None:
        """These slots are not in use: no work is done for the options of what they held."""
        slots_B = np.full(self.n_slots, self.n_slots, np.int32)
        slots_B[: len(free)] = free
        with self._on_mesh():
            self._slots = slots.release(self._slots, slots_B)

    def score(self, prompt: Sequence[int]) -> PromptScores:
        """The log-probabilities of a prompt's tokens, the likeliest ones of each place among them."""
        tokens_1S = np.zeros((1, self.width(len(prompt))), np.int32)
        tokens_1S[0, : len(prompt)] = prompt
        with self._on_mesh():
            scores = jax.device_get(slots.score(self._cfg, self._weights, tokens_1S, TOP))
        return PromptScores(*(np.concatenate([a[0, :1], a[0]])[: len(prompt)] for a in scores))


def _stack_choices(jobs: Sequence[Job]) -> Choices:
    def stack(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(job.choice, name) for job in jobs], dtype)

    return Choices(**{name: stack(name, np.int32 if name == "top_k" else np.float32) for name in Choices._fields})
