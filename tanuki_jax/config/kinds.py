"""The one table of stage kinds.  Checks, plan, dataset, program and docs read it; nothing else asks for a kind by name.

A new kind is an entry here and a loss in train/losses.py; with rows of its own, also a layout (data/layouts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BatchArray:
    """An array [B, *axes] of a batch; an axis is a size, or the letter P (pairs of a row, which the data decide)."""

    axes: tuple[str | int, ...]
    dtype: str


@dataclass(frozen=True)
class StageKind:
    """What one kind of stage reads, computes and needs.  A kind without a loss trains nothing."""

    doc: str
    rows: tuple[str, ...] = ()  # kinds of rows that its sources may hold (data/sources.py)
    layout: str = ""  # how rows of S tokens are made of them: a name in LAYOUTS (data/layouts.py)
    loss: str = ""  # a name in LOSSES (train/losses.py)
    weight: str = "target_tokens"  # what the loss divides by; its metric
    batch: Mapping[str, BatchArray] = field(default_factory=dict)  # arrays beside the five of every batch
    needs_reference: bool = False  # log-probabilities of the model that it starts from, computed before the first step
    from_scratch: bool = False  # it may start from random weights
    makes_moe: bool = False  # a dense model becomes a mixture of experts
    makes_rows: bool = False  # the model that it starts from answers, and is not changed

    @property
    def trains(self) -> bool:
        """Whether it has steps at all."""
        return bool(self.loss)

    @property
    def streams(self) -> bool:
        """Whether its rows are windows of one stream per source.

        Then a weight of its mixture is a share of tokens, the mixture may change inside the stage, a source goes on where the
        stages before left it, and its end can be held out; else rows are packed anew and counted in epochs.
        """
        return self.layout == "windows"


STAGE_KINDS: Mapping[str, StageKind] = {
    "pretrain": StageKind(
        "next-token prediction on all tokens of a stream of text",
        rows=("text", "dialogue", "tokens"),
        layout="windows",
        loss="next_token",
        from_scratch=True,
    ),
    "upcycle": StageKind("a dense model becomes a mixture of experts; nothing is trained", makes_moe=True),
    "synth": StageKind(
        "the model that the stage starts from makes rows, which later stages read; nothing is trained", makes_rows=True
    ),
    "sft": StageKind("next-token prediction on the assistant's tokens", rows=("dialogue",), layout="dialogues", loss="sft"),
    "dpo": StageKind(
        "preference optimisation against the model that the stage starts from",
        rows=("pair",),
        layout="pairs",
        loss="preference",
        weight="pairs",
        batch={"pair_segments": BatchArray(("P", 2), "int32"), "ref_logprobs": BatchArray(("P", 2), "float32")},
        needs_reference=True,
    ),
}
