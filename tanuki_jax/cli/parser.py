"""The command line's verbs and flags, and what they say of themselves."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tanuki_jax.config.ranges import AMOUNT, SEED, TEMPERATURE, TOP_P, Range
from tanuki_jax.config.schema import CHOICES, Model, Scoring, Tokenizer, Upcycle, range_of
from tanuki_jax.errors import UserError

HELP = """\
A trainer in which the whole Tanuki paper is one recipe.

  tanuki run --config=configs/nano.py --workdir=runs/nano        every stage, resumable; report.html at the end
  tanuki chat --checkpoint=runs/nano/stages/dpo                  talk to the result
  tanuki plan --config=configs/tanuki_8x8b.py --topology=v5p-256 --stage=moe_01      what fits, how fast, for how many days
  tanuki run --config=configs/local_text.py --workdir=runs/mine --config.data.ja='ja/*.jsonl.gz' --config.data.en='en/*.txt'

Any key of a config can be set as --config.a.b=value.  `tanuki <verb> --help` says more.
"""


class Parser(argparse.ArgumentParser):
    """Bad flags get one line and exit code 1, like any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def make_parser() -> Parser:
    """All verbs; the parsed options name what does the work as `work`."""
    parser = Parser(prog="tanuki", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="<verb>")

    def verb(where: Any, name: str, work: str, text: str) -> argparse.ArgumentParser:
        made = where.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(work=work)
        return made

    for name, text in (("run", "run or resume a whole recipe"), ("train", "run or resume one stage of a recipe")):
        made = verb(verbs, name, "run", text)
        made.add_argument("--workdir", type=path, required=True, help="where everything is written")
        made.add_argument("--allow_data_change", action="store_true", help="resume although the training data changed")
        made.epilog = "--config=FILE.py[:argument] names the recipe; --config.a.b=value sets one of its keys."
        if name == "train":
            made.add_argument("--stage", type=stage, required=True, help="name of the stage")

    made = verb(
        verbs, "plan", "plan", "compile a recipe's train steps for a TPU slice that need not be here: memory, speed, days"
    )
    made.add_argument("--topology", required=True, help="v5p-256, v6e-256, v5e-256, 2xv5p-256 for two slices, ...")
    made.add_argument("--stage", default="", help="one stage; without it every stage of the recipe")
    made.add_argument(
        "--search", action="store_true", help="try gradient_accumulation_steps x remat x mesh, and rank what fits"
    )
    made.add_argument(
        "--explain_sharding", action="store_true", help="how every parameter and activation is split; no compilation"
    )
    made.epilog = "--config=FILE.py[:argument] names the recipe; --config.a.b=value sets one of its keys."
    _add(made, "json")

    _upcycle(verb(verbs, "upcycle", "upcycle", "turn a dense checkpoint into a mixture of experts"))

    made = verb(verbs, "import", "import", "a Hugging Face model, or PEFT's adapters, to a checkpoint; streamed, exact")
    made.add_argument(
        "--hf", type=path, required=True, help="directory of a Llama, Mixtral or Tanuki (config.json) or of adapter_config.json"
    )
    made.add_argument("--base", type=path, help="for adapters: the checkpoint of ours that they lie on")
    made.add_argument(
        "--param_dtype", choices=CHOICES["param_dtype"], default="", help="cast all weights; without it they come as they are"
    )
    _vocabulary(made)
    _add(made, "output")
    made = verb(verbs, "export", "export", "a checkpoint to a Hugging Face directory; streamed, exact")
    _add(made, "checkpoint", "output")
    made.add_argument(
        "--format",
        choices=("hf", "peft"),
        default="hf",
        help="hf: all weights, adapters merged into them (default); peft: the adapters alone",
    )
    made.add_argument("--base_name", default="", help="peft: the model that adapter_config.json names")
    made.add_argument(
        "--param_dtype",
        choices=CHOICES["param_dtype"],
        default="",
        help="hf: cast the matrices; without it they stay as they are",
    )
    _vocabulary(made)

    tokenizer = verbs.add_parser("tokenizer", help="train a tokenizer, or report on one").add_subparsers(
        dest="what", required=True, metavar="train|report"
    )
    made = verb(tokenizer, "train", "tokenizer_train", "MeCab-bounded SentencePiece from text to tokenizer.json")
    _add(made, "input", "output", "fields")
    _key(made, Tokenizer, "vocab_size", "pieces")
    _key(made, Tokenizer, "character_coverage", "share of characters with a piece of their own")
    made.add_argument(
        "--boundary",
        choices=CHOICES["boundary"],
        default=Tokenizer.boundary,
        help="what no piece may cross (default %(default)s; the paper: morpheme)",
    )
    made.add_argument(
        "--dictionary", choices=CHOICES["dictionary"], default=Tokenizer.dictionary, help="of MeCab (default %(default)s)"
    )
    made.add_argument("--language_weights", default="", help="share of the vocabulary of each language: ja=0.65,en=0.35")
    made = verb(tokenizer, "report", "tokenizer_report", "compression, round trip, boundaries and vocabulary use of tokenizers")
    _add(made, "tokenizer", "input", "fields", "json")
    made.add_argument("--compare", default="", help="other tokenizers, comma-separated: directories, tokenizer.json, .model")
    made.add_argument(
        "--boundary",
        choices=("morpheme", "predicate", "bunsetsu"),
        default="bunsetsu",
        help="units whose boundaries are watched",
    )
    made.add_argument("--plot", type=path, help="draw compression and byte fallback there (.svg, .png)")

    data = verbs.add_parser("data", help="make a token store, or look into one").add_subparsers(
        dest="what", required=True, metavar="prepare|inspect"
    )
    made = verb(data, "prepare", "data_prepare", "from text, dialogues, pairs or tokens to a token store; resumable")
    _add(made, "input", "tokenizer", "output", "fields")
    made.add_argument("--skip_invalid", action="store_true", help="leave out bad rows, and count and list them")
    made.add_argument(
        "--workers", type=number(int, Range(0, 10_000)), default=0, help="processes; 0 = as many as are of use (default)"
    )
    made.add_argument(
        "--shard_characters",
        type=number(int, Range(1, 10**12)),
        default=100_000_000,
        help="text of a shard, what a kill loses (default %(default)s)",
    )
    made.add_argument(
        "--executor", choices=("local", "ray", "slurm"), default="local", help="where workers run; ray and slurm: docs/data.md"
    )
    made.add_argument("--slurm", default="", help="options of the jobs, comma-separated: partition=cpu,time=24:00:00,...")
    made.epilog = "Killed, the same command goes on from the last finished shard; the result has the same bytes."
    made = verb(data, "inspect", "data_inspect", "what a token store holds")
    made.add_argument("--data", type=path, required=True, help="directory of the token store")
    _add(made, "tokenizer", "json")
    made.add_argument("--rows", type=number(int, AMOUNT), default=3, help="documents or rows shown (default %(default)s)")
    made.add_argument(
        "--seq_len", type=number(int, Range(0, 2**27)), default=0, help="show rows of so many tokens, as a stage packs them"
    )

    made = verb(verbs, "score", "score", "log-probabilities of given texts")
    _add(made, "checkpoint", "input", "json")
    made = verb(verbs, "generate", "generate", "continue a text")
    _add(made, "checkpoint", "sampling", "json")
    made.add_argument("--prompt", required=True, help="the text to continue")
    made = verb(verbs, "chat", "chat", "talk to a trained model")
    _add(made, "checkpoint", "sampling")
    made.epilog = "/new begins a new conversation, /quit or the end of input leaves; Ctrl-C ends an answer, twice it leaves."
    return parser


def split_config(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of the config, each as `--config.key=value` also where a space stands for the sign, and the others."""
    ours, others, left = [], [], list(given)
    while left:
        flag = left.pop(0)
        if flag != "--config" and not flag.startswith(("--config=", "--config.")):
            others.append(flag)
            continue
        if "=" not in flag and left and not left[0].startswith("--"):
            flag += f"={left.pop(0)}"
        ours.append(flag)
    return ours, others


def number(kind: type[int] | type[float], allowed: Range) -> Callable[[str], float]:
    """What argparse makes a flag's number with, in the range of the config's key."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a {'whole ' * (kind is int)}number") from None
        if value not in allowed:
            raise argparse.ArgumentTypeError(f"it is {text[:80]}; it must be {allowed.describe()}")
        return value

    return parse


def stage(text: str) -> str:
    """The name of one stage."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a stage, or use `tanuki run` for all")
    return text


def path(text: str) -> Path:
    """A file or directory that can be looked for."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("a path holds no NUL" if text else "it is empty; name a file or directory")
    try:
        Path(text).exists()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {error.strerror}") from None
    return Path(text)


def _upcycle(made: argparse.ArgumentParser) -> None:
    """Flags of `tanuki upcycle`; docs/upcycling.md says more."""
    made.add_argument(
        "--checkpoint",
        required=True,
        help="a dense stage's directory, or a Hugging Face Llama directory; several, comma-separated, give the experts in turn",
    )
    _add(made, "output")
    made.add_argument(
        "--strategy",
        choices=CHOICES["strategy"],
        default=Upcycle.strategy,
        help="the dense FFN; with noise (default, Tanuki); partly drawn anew (Drop-Upcycling); split (virtual groups)",
    )

    _key(made, Upcycle, "noise_std", "noise: absolute standard deviation on every FFN weight")
    _key(made, Upcycle, "drop_ratio", "drop: share of the inner dimensions that is drawn anew")
    made.add_argument(
        "--router_init", choices=CHOICES["router_init"], default=Upcycle.router_init, help="the fresh router's distribution"
    )
    _key(made, Upcycle, "router_std", "standard deviation of the fresh router; Tanuki: 1")
    _key(made, Model, "n_experts", "experts of each block", 8)
    _key(made, Model, "top_k", "experts that a token visits")
    _key(made, Model, "expert_d_ff", "groups: inner width of an expert, a divisor of the dense one; 0 = the same")
    _key(made, Model, "first_dense", "layers at the beginning that stay dense")
    _key(made, Model, "moe_every", "of the other layers every n-th becomes a mixture")
    made.add_argument("--no_normalized_gate", action="store_true", help="Mixtral's gate instead of Tanuki's normalised one")
    _key(made, Model, "gate_scale", "lambda of the normalised gate")
    made.add_argument("--router_bias", action="store_true", help="with a bias of each expert for loss-free balancing, at 0")
    made.add_argument("--param_dtype", choices=CHOICES["param_dtype"], help="of the output; the checkpoint's without it")
    _add(made, "seed")
    made.add_argument("--dry_run", action="store_true", help="only say what would come out, in what time and memory")
    made.epilog = (
        "Layer by layer: memory holds one dense layer and one expert.  A few random tokens go through both models on the way, "
        "and how far their logits differ is told: the order of sums alone for copy, and for groups of 2, 4, 8, ... parts; "
        "other numbers of parts round the weights."
    )


def _vocabulary(made: Any) -> None:
    made.add_argument(
        "--vocab_size",
        type=number(int, Range(0, 2**24)),
        default=0,
        help="rows of embedding and head: less cuts padding off, more adds zeros; 0 = as is",
    )


def _key(made: Any, group: Any, name: str, text: str, default: float | None = None) -> None:
    """A flag that is a numeric key of the schema: its type, range and, where no other is given, its default."""
    held = getattr(group, name)
    made.add_argument(
        f"--{name}",
        type=number(type(held), range_of(group, name)),
        default=held if default is None else default,
        help=f"{text} (default %(default)s)",
    )


def _add(parser: argparse.ArgumentParser, *names: str) -> None:
    """Flags that mean the same everywhere."""
    for name in names:
        if name == "input":
            parser.add_argument(
                "--input", required=True, help="comma-separated globs of .txt, .jsonl[.gz|.zst], .parquet, ... (docs/data.md)"
            )
        elif name == "fields":
            parser.add_argument("--text_field", default="text", help="field with the text, a.b if nested (default %(default)s)")
            parser.add_argument("--language_field", default="", help="field with the language tag, meta.lang for example")
            parser.add_argument(
                "--row_format",
                choices=CHOICES["row_format"],
                default="auto",
                help="how rows that can be read in several ways are read (docs/data.md)",
            )
        elif name == "output":
            parser.add_argument("--output", type=path, required=True, help="directory to write; it must not be there yet")
        elif name == "checkpoint":
            parser.add_argument(
                "--checkpoint", type=path, required=True, help="a stage's directory (its newest step) or one step's"
            )
        elif name == "tokenizer":
            parser.add_argument("--tokenizer", type=path, required=True, help="directory with tokenizer.json")
        elif name == "json":
            parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
        elif name == "sampling":
            most = number(int, range_of(Scoring, "max_new_tokens"))
            hot, share = number(float, TEMPERATURE), number(float, TOP_P)
            parser.add_argument("--max_new_tokens", type=most, default=256, help="longest answer (default %(default)s)")
            parser.add_argument("--temperature", type=hot, default=0.0, help="0 = the likeliest token (default)")
            parser.add_argument("--top_p", type=share, default=1.0, help="share of the probability that is sampled from")
            _add(parser, "seed")
        elif name == "seed":
            parser.add_argument("--seed", type=number(int, SEED), default=0, help="of everything random (default %(default)s)")
