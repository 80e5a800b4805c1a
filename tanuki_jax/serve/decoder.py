"""The model on its device, as the engine uses it: `model.slots` with every program compiled at the start."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tanuki_jax import config
from tanuki_jax.model import Sampling, slots
from tanuki_jax.model.generate import pad_prompts, power_of_two
from tanuki_jax.model.layer_groups import Params
from tanuki_jax.model.sampling import request_key, stack
from tanuki_jax.serve.jobs import TOP, Job
from tanuki_jax.serve.rows import Block, PromptScores

N_TOGETHER = 4  # prompts that one program admits
SMALLEST = 32  # width of a prompt's program
MAX_STEPS = 8  # of a block

Handle = tuple[int, slots.Tokens]  # a block on its way: steps, and their tokens on the device


def slots_bytes(cfg: config.ModelConfig, n_slots: int, length: int) -> int:
    """Bytes of so many slots, nearly all of them the cache's."""
    shapes = jax.eval_shape(lambda: slots.empty(cfg, n_slots, length))
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))


def memory_bytes(device: jax.Device) -> int:
    """Bytes of a device's memory, which is the machine's where the device has none of its own; 0 = not known."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int((device.memory_stats() or {}).get("bytes_limit", 0))


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
        self.n_slots, self.n_together, self.max_steps = n_slots, min(N_TOGETHER, n_slots), MAX_STEPS
        self._cfg, self._length, self._mesh = cfg, length, mesh
        with self._on_mesh():
            self._weights = slots.unstack(cfg, params.pop())
            self._slots = slots.empty(cfg, n_slots, length)

    def _on_mesh(self) -> contextlib.AbstractContextManager[object]:
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def compile(self, take_note: Callable[[str], None]) -> None:
        """Runs every program once, so that none is compiled while somebody waits: one for each width, and one for steps."""
        widths = sorted({self.width(n) for n in range(1, self._length + 1)})
        calls: list[Callable[[], object]] = [
            functools.partial(self.admit, [(-1, Job((0,) * width, Sampling()))]) for width in widths
        ]
        calls += [functools.partial(self.start, 1, False), functools.partial(self.release, [0])]
        for number, call in enumerate(calls):
            take_note(f"program {number + 1} of {len(calls)} is being compiled")
            call()
        jax.block_until_ready(self._slots)

    def width(self, n_tokens: int) -> int:
        """The next power of two, from 32 to the slots' length."""
        return min(self._length, power_of_two(max(SMALLEST, n_tokens)))

    def admit(self, rows: Sequence[tuple[int, Job]]) -> list[PromptScores] | None:
        """Puts jobs of one width into slots; rows without one, and those that are missing, go to a slot that is not there."""
        padded = [*rows, *[(-1, rows[0][1])] * (self.n_together - len(rows))]
        slots_R = np.array([slot if slot >= 0 else self.n_slots for slot, _ in padded], np.int32)
        jobs = [job for _, job in padded]
        texts = [job.prompt for job in jobs]
        tokens_RP, lengths_R = pad_prompts(texts, self.width(max(map(len, texts))))
        keys_R = jnp.stack([request_key(job.seed, job.prompt, job.sample) for job in jobs])
        prompts = slots.Prompts(tokens_RP, lengths_R, slots_R, stack([job.sampling for job in jobs]), keys_R)
        with_scores = np.bool_(any(job.score_prompt for job in jobs))
        with self._on_mesh():
            self._slots, scores = slots.admit_scored(self._cfg, self._weights, self._slots, prompts, with_scores, TOP)
        if not with_scores:
            return None
        scores = jax.device_get(scores)
        return [
            PromptScores(*(np.concatenate([a[i, :1], a[i]])[: len(job.prompt)] for a in scores))
            for i, (_, job) in enumerate(rows)
        ]

    def start(self, n: int, wants_top: bool) -> Handle:
        """Starts n steps of all slots."""
        with self._on_mesh():
            self._slots, tokens = slots.step_up_to(
                *(self._cfg, self._weights, self._slots, np.int32(n), np.bool_(wants_top), MAX_STEPS, TOP)
            )
        return n, tokens

    def read(self, block: Handle) -> Block:
        """Waits for the tokens of these steps."""
        n, tokens = block
        return Block(*(a[:n] for a in jax.device_get(tokens)))

    def release(self, free: Sequence[int]) -> None:
        """These slots are not in use: no work is done for the options of what they held."""
        slots_B = np.full(self.n_slots, self.n_slots, np.int32)
        slots_B[: len(free)] = free
        with self._on_mesh():
            self._slots = slots.release(self._slots, slots_B)
