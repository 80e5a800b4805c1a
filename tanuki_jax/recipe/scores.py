"""Scores of a finished stage: exact answers to held-out prompts, and preferences between held-out pairs."""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from tanuki_jax import checkpoint, files, multihost
from tanuki_jax.config import STAGE_KINDS
from tanuki_jax.config.schema import Recipe
from tanuki_jax.data import chat
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.evaluate import score
from tanuki_jax.evaluate.suggested import suggested_questions
from tanuki_jax.model import Sampling
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.synth import rules


class Scores(NamedTuple):
    """What a stage's model does, and what people are shown of it."""

    scores: dict[str, Any]
    samples: list[dict[str, Any]]  # prompts with their answers
    questions: list[str]  # that a conversation may begin with


def score_stage(recipe: Recipe, stage: str, workdir: Workdir, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Scores:
    """Scores the stage's last checkpoint."""
    if not recipe.scoring.prompts or STAGE_KINDS[recipe.stages[stage].kind].makes_rows:
        return Scores({}, [], [])
    began, options = time.monotonic(), recipe.scoring
    loaded = checkpoint.load(workdir.stage_dir(stage), mesh)
    prompts = rules.held_out_prompts(options.prompts, recipe.seed)
    sampling = Sampling(max_new_tokens=options.max_new_tokens, stop=chat.stop_ids(tokenizer))

    def answers(conversations: list[list[dict[str, str]]]) -> list[str]:
        return score.answers(loaded.cfg, loaded.params, tokenizer, conversations, sampling, options.batch_size)

    with jax.set_mesh(mesh):
        multihost.enter_phase(f"the answers of stage {stage}")
        replies = answers([row["messages"] for row in prompts])
        scores = score.exact_answers(prompts, replies, rules.correct)
        samples = [{**row, "given": reply} for row, reply in zip(prompts, replies, strict=True)][: 2 * len(rules.FAMILIES)]
        questions = suggested_questions(samples, scores["families"], rules.correct, answers, options.batch_size)
        if options.pairs:
            multihost.enter_phase(f"the preferences of stage {stage}")
            pairs = rules.held_out_pairs(options.pairs, recipe.seed)
            margins = score.pair_margins(loaded.cfg, loaded.params, tokenizer, pairs)
            scores |= _preferences(recipe, stage, workdir, margins)
    scores["seconds"] = round(time.monotonic() - began, 1)
    return Scores(scores, samples, questions)


def _preferences(recipe: Recipe, stage: str, workdir: Workdir, margins: np.ndarray) -> dict[str, float]:
    """`pair_accuracy`; for a stage with a reference model also TRL's rewards/accuracies on these pairs.

    That is: has the stage moved the pair apart in the right direction?
    """
    scores = {"pair_accuracy": round(float((margins > 0).mean()), 4)}
    if jax.process_index() == 0:
        files.write_json(workdir.pair_margins_file(stage), [round(float(m), 4) for m in margins])
    options = recipe.stages[stage]
    before = workdir.pair_margins_file(options.init_from)
    if STAGE_KINDS[options.kind].needs_reference and before.is_file():
        reference = np.array(json.loads(before.read_text(encoding="utf-8")))
        scores["reward_accuracy"] = round(float((margins > reference).mean()), 4)
    return scores
