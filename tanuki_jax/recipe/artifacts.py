"""What the stages of a recipe read, made once and kept under a fingerprint: tokenizer and token stores."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tanuki_jax import config, files
from tanuki_jax.config.derived import waits_for_stage
from tanuki_jax.config.schema import Recipe
from tanuki_jax.data import sources
from tanuki_jax.data.prepare import Options, is_current_version, open_store, read_manifest, text_of
from tanuki_jax.data.prepare import prepare as prepare_store
from tanuki_jax.data.tokenizer import Tokenizer
from tanuki_jax.errors import UserError
from tanuki_jax.files import lock
from tanuki_jax.recipe.source_files import SourceFiles, locate
from tanuki_jax.recipe.workdir import Workdir

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifacts:
    """A recipe's tokenizer, and the token store and the files of each source."""

    tokenizer: Tokenizer
    stores: dict[str, Path]
    sources: dict[str, SourceFiles] = field(default_factory=dict)


def prepare(recipe: Recipe, workdir: Workdir, names: set[str]) -> Artifacts:
    """Makes what is missing in the workdir's data: the tokenizer, and the token stores of the sources `names`."""
    return prepare_stores(recipe, workdir, prepare_tokenizer(recipe, workdir), names)


def prepare_tokenizer(recipe: Recipe, workdir: Workdir) -> Tokenizer:
    """The recipe's tokenizer, trained first where it names none."""
    with files.disk_errors(workdir.data, "data"):
        tokenizer = Tokenizer(_prepare_tokenizer(recipe, workdir))
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"config: model.vocab_size {recipe.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} "
            f"pieces; set it to {-(-tokenizer.vocab_size // 128) * 128}"
        )
    return tokenizer


def prepare_stores(recipe: Recipe, workdir: Workdir, tokenizer: Tokenizer, names: set[str]) -> Artifacts:
    """The token stores of sources; those that are missing are made."""
    with files.disk_errors(workdir.data, "data"):
        return _prepare_stores(recipe, workdir, tokenizer, names)


def _prepare_stores(recipe: Recipe, workdir: Workdir, tokenizer: Tokenizer, names: set[str]) -> Artifacts:
    located = {name: locate(recipe, name, workdir) for name in sorted(names)}
    where = workdir.data
    stores = {}
    for name, (patterns, identity, fields, *_) in located.items():
        if patterns.endswith(".bin") and "," not in patterns:  # tokens of Megatron-LM's, used where they lie
            stores[name] = Path(patterns)
            continue
        source = recipe.data[name]
        identity_options = [fields.text, source.skip_invalid, *([fields.row_format] if fields.row_format != "auto" else [])]
        stores[name] = where / f"store-{name}-{files.fingerprint(identity, tokenizer.fingerprint, identity_options)}"
        if stores[name].is_dir():
            _remove_damaged(stores[name], open_store)
        if stores[name].is_dir() and not is_current_version(read_manifest(stores[name])):
            logger.warning("data %s: chat templates were followed otherwise when it was made; it is made anew", name)
            shutil.rmtree(stores[name])
        if not stores[name].is_dir():
            options = Options(fields, source.skip_invalid)
            summary = prepare_store(patterns, tokenizer, stores[name], options)
            print(f"data {name}: {summary}", file=sys.stderr, flush=True)
        elif read_manifest(stores[name]).tokenizer != tokenizer.fingerprint:
            raise UserError(f"data {name}: {stores[name]} was made with another tokenizer; remove it")
    return Artifacts(tokenizer, stores, located)


def _tokenizer_sources(recipe: Recipe) -> tuple[str, ...]:
    """The sources that train the tokenizer, in this order: not what a stage makes, nor what has no files and no reader."""
    used = {name for stage in recipe.stages.values() for name in config.stage_sources(stage)}
    ready = (name for name, source in recipe.data.items() if not waits_for_stage(recipe, source.files))
    return recipe.tokenizer.sources or tuple(name for name in ready if recipe.data[name].files or name in used)


def _remove_damaged(path: Path, opens: Callable[[Path], object]) -> None:
    """Removes what was made before and cannot be opened, and says so: it is made anew."""
    try:
        opens(path)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("data: %s is damaged (%s) and made anew", path, error)
        shutil.rmtree(path)


def _prepare_tokenizer(recipe: Recipe, workdir: Workdir) -> Path:
    """The directory of the tokenizer, trained first where the recipe names none."""
    options, where = recipe.tokenizer, workdir.data
    if options.path:
        return Path(options.path)
    names = _tokenizer_sources(recipe)  # in this order, so that the fingerprint does not depend on the stages run
    located = {name: locate(recipe, name, workdir) for name in names}
    origins = [[located[n].identity, located[n].fields.text, recipe.data[n].language] for n in names]
    output = where / f"tokenizer-{files.fingerprint(config.to_dict(options), origins)}"
    if output.is_dir():
        _remove_damaged(output, Tokenizer)
    if not output.is_dir():
        from tanuki_jax.recipe.train_tokenizer import HOOKS, user_errors
        from tokenization.options import TrainOptions
        from tokenization.train import train

        train_options = TrainOptions(
            vocab_size=options.vocab_size,
            character_coverage=options.character_coverage,
            boundary=options.boundary,
            dictionary=options.dictionary,
            language_weights=options.language_weights,
        )
        texts = chain.from_iterable(_texts(recipe.data[n], located[n], options.max_bytes) for n in names)
        with user_errors(), lock.output(output), files.atomic_path(output) as temporary:
            trained = train(texts, temporary, train_options, HOOKS)
        print(f"tokenizer: {trained}", file=sys.stderr, flush=True)
    return output


def _texts(source: config.Source, located: SourceFiles, max_bytes: int) -> Iterator[tuple[str, str]]:
    """(language, text) of each row."""
    read = 0
    for row in sources.read_rows(located.files, located.fields, sources.skip_silently if source.skip_invalid else None):
        try:
            text = text_of(row)
        except UserError:
            if not source.skip_invalid:
                raise
            continue
        read += len(text.encode("utf-8", "surrogatepass"))
        if read > max_bytes:
            print(f"tokenizer: {located.files}: the first {max_bytes:,} bytes (tokenizer.max_bytes)", file=sys.stderr)
            return
        yield source.language, text
