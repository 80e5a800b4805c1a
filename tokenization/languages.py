"""Several languages in one vocabulary: their models mixed by given weights, and the pieces that each one uses."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping

from tokenization import vocabulary
from tokenization.errors import TokenizationError
from tokenization.fit import ModelProto, fit, load_processor
from tokenization.options import Hooks, TrainOptions

SURPLUS = 1.1  # pieces trained for each language above its share, since some will be common to several


def fit_mixture(counts: Mapping[str, collections.Counter[str]], options: TrainOptions, hooks: Hooks) -> ModelProto:
    """One model of languages trained apart: p(piece) = sum over languages of (its share of tokens) x p(piece | language).

    Each language has exactly its share of the pieces of several characters, as long as it has that many; a piece of several
    languages counts for the one in which it is commonest.  Single characters are common to all.
    """
    weights, vocab_size = options.language_weights or {}, options.vocab_size
    if set(weights) != set(counts):
        raise TokenizationError(
            f"tokenizer: language_weights are given for {', '.join(weights)}, the text is in {', '.join(map(repr, counts))}"
        )
    total_weight = sum(weights.values())
    models = {}
    for language, units in counts.items():
        # special tokens and bytes, required characters, those of the text
        common = 300 + len(vocabulary.required_characters(vocab_size)) + len(set("".join(units)))
        size = min(vocab_size, common + math.ceil(SURPLUS * vocab_size * weights[language] / total_weight))
        models[language] = fit(units, dataclasses.replace(options, vocab_size=size), hooks)
    tokens = {language: _count_tokens(models[language], units) for language, units in counts.items()}
    probability: dict[str, dict[str, float]] = {}  # piece -> language -> its part of the mixture
    for language, model in models.items():
        for piece in model.pieces:
            if piece.type == piece.NORMAL:
                part = tokens[language] / sum(tokens.values()) * math.exp(piece.score)
                probability.setdefault(piece.piece, {})[language] = part
    total = {name: sum(parts.values()) for name, parts in probability.items()}
    main_language = {name: max(parts, key=lambda language: parts[language]) for name, parts in probability.items()}
    ranked = sorted(total, key=lambda name: (-total[name], name))
    result = next(iter(models.values()))
    special = [piece for piece in result.pieces if piece.type != piece.NORMAL]
    chosen = {name for name in ranked if len(name) == 1}
    left = max(0, vocab_size - len(special) - len(chosen))
    edges = [round(left * part / total_weight) for part in itertools.accumulate(weights.values(), initial=0.0)]
    for language, first, last in zip(weights, edges, edges[1:], strict=False):
        candidates = [name for name in ranked if main_language[name] == language and len(name) > 1]
        chosen.update(candidates[: last - first])
    del result.pieces[:]
    result.pieces.extend(special)
    for name in ranked:
        if name in chosen:
            result.pieces.add(piece=name, score=math.log(total[name]))
    result.trainer_spec.vocab_size = len(result.pieces)
    return result


def _count_tokens(model: ModelProto, counts: Mapping[str, int]) -> int:
    """Tokens of the counted units."""
    units = list(counts)
    return sum(n * len(ids) for n, ids in zip(counts.values(), load_processor(model).encode(units), strict=True))


def count_pieces(model: ModelProto, counts: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """For each language the number of pieces that are likelier in its units than in the others'; unused ones count nowhere."""
    share: dict[int, tuple[float, str]] = {}
    processor = load_processor(model)
    for language, units in counts.items():
        used: collections.Counter[int] = collections.Counter()
        for n, ids in zip(units.values(), processor.encode(list(units)), strict=True):
            for i in ids:
                used[i] += n
        total = max(1, used.total())
        for i, n in used.items():
            share[i] = max(share.get(i, (0.0, "")), (n / total, language))
    normal = {i for i, piece in enumerate(model.pieces) if piece.type == piece.NORMAL}
    likeliest = collections.Counter(language for i, (_, language) in share.items() if i in normal)
    return {language: likeliest[language] for language in counts}
