"""The command line's verbs and flags, and what they say of themselves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from tanuki_jax.errors import UserError
from tanuki_jax.schema import CHOICES

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
        made.add_argument("--workdir", type=Path, required=True, help="where everything is written")
        made.add_argument("--allow_data_change", action="store_true", help="resume although the training data changed")
        made.epilog = "--config=FILE.py[:argument] names the recipe; --config.a.b=value sets one of its keys."
        if name == "train":
            made.add_argument("--stage", required=True, help="name of the stage")

    made = verb(
        verbs, "plan", "plan", "compile a recipe's train steps for a TPU slice that need not be here: memory, speed, days"
    )
    made.add_argument("--topology", required=True, help="v5p-256, v6e-256, v5e-256, 2xv5p-256 for two slices, ...")
    made.add_argument("--stage", default="", help="one stage; without it every stage of the recipe")
    made.add_argument("--search", action="store_true", help="try microbatches x remat x mesh, and rank what fits")
    made.add_argument(
        "--explain_sharding", action="store_true", help="how every parameter and activation is split; no compilation"
    )
    made.epilog = "--config=FILE.py[:argument] names the recipe; --config.a.b=value sets one of its keys."
    _add(made, "json")

    _upcycle(verb(verbs, "upcycle", "upcycle", "turn a dense checkpoint into a mixture of experts"))

    made = verb(verbs, "import", "import", "a Hugging Face model, or PEFT's adapters, to a checkpoint; streamed, exact")
    made.add_argument(
        "--hf", type=Path, required=True, help="directory of a Llama, Mixtral or Tanuki (config.json) or of adapter_config.json"
    )
    made.add_argument("--base", type=Path, help="for adapters: the checkpoint of ours that they lie on")
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
    made.add_argument("--vocab_size", type=int, default=65_000, help="pieces (default %(default)s)")
    made.add_argument(
        "--character_coverage",
        type=float,
        default=0.9995,
        help="share of characters with a piece of their own (default %(default)s)",
    )
    made.add_argument(
        "--level",
        choices=("morpheme", "predicate", "bunsetsu", "none"),
        default="bunsetsu",
        help="what no piece may cross (default %(default)s; the paper: morpheme)",
    )
    made.add_argument("--dictionary", choices=("ipadic", "unidic"), default="ipadic", help="of MeCab (default %(default)s)")
    made.add_argument("--shares", default="", help="share of the vocabulary of each language: ja=0.65,en=0.35")
    made = verb(tokenizer, "report", "tokenizer_report", "compression, round trip, boundaries and vocabulary use of tokenizers")
    _add(made, "tokenizer", "input", "fields", "json")
    made.add_argument("--against", default="", help="other tokenizers, comma-separated: directories, tokenizer.json, .model")
    made.add_argument(
        "--level", choices=("morpheme", "predicate", "bunsetsu"), default="bunsetsu", help="units whose boundaries are watched"
    )
    made.add_argument("--picture", type=Path, help="draw compression and byte fallback there (.svg, .png)")

    data = verbs.add_parser("data", help="make a token store, or look into one").add_subparsers(
        dest="what", required=True, metavar="prepare|inspect"
    )
    made = verb(data, "prepare", "data_prepare", "from text, dialogues, pairs or tokens to a token store; resumable")
    _add(made, "input", "tokenizer", "output", "fields")
    made.add_argument("--skip_bad", action="store_true", help="leave out bad rows, and count and list them")
    made.add_argument("--workers", type=int, default=0, help="processes; 0 = as many as are of use (default)")
    made.add_argument(
        "--shard_characters", type=int, default=100_000_000, help="text of a shard, what a kill loses (default %(default)s)"
    )
    made.add_argument(
        "--executor", choices=("local", "ray", "slurm"), default="local", help="where workers run; ray and slurm: docs/data.md"
    )
    made.add_argument("--slurm", default="", help="options of the jobs, comma-separated: partition=cpu,time=24:00:00,...")
    made.epilog = "Killed, the same command goes on from the last finished shard; the result has the same bytes."
    made = verb(data, "inspect", "data_inspect", "what a token store holds")
    made.add_argument("--data", type=Path, required=True, help="directory of the token store")
    _add(made, "tokenizer", "json")
    made.add_argument("--rows", type=int, default=3, help="documents or rows shown (default %(default)s)")
    made.add_argument("--seq_len", type=int, default=0, help="show rows of so many tokens, as a stage packs them")

    made = verb(verbs, "score", "score", "log-probabilities of given texts")
    _add(made, "checkpoint", "input", "json")
    made = verb(verbs, "generate", "generate", "continue a text")
    _add(made, "checkpoint", "sampling", "json")
    made.add_argument("--prompt", required=True, help="the text to continue")
    made = verb(verbs, "chat", "chat", "talk to a trained model")
    _add(made, "checkpoint", "sampling")
    made.epilog = "/new begins a new conversation, /quit or the end of input leaves; Ctrl-C ends an answer, twice it leaves."
    return parser


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
        default="noise",
        help="the dense FFN; with noise (default, Tanuki); partly drawn anew (Drop-Upcycling); split (virtual groups)",
    )

    def number(name: str, kind: Any, default: float, text: str) -> None:
        made.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default %(default)s)")

    number("noise_std", float, 1e-3, "noise: absolute standard deviation on every FFN weight")
    number("drop_ratio", float, 0.5, "drop: share of the inner dimensions that is drawn anew")
    made.add_argument("--router_init", choices=CHOICES["router_init"], default="normal", help="the fresh router's distribution")
    number("router_std", float, 0.02, "standard deviation of the fresh router; Tanuki: 1")
    number("n_experts", int, 8, "experts of each block")
    number("top_k", int, 2, "experts that a token visits")
    number("expert_d_ff", int, 0, "groups: inner width of an expert, a divisor of the dense one; 0 = the same")
    number("first_dense", int, 0, "layers at the beginning that stay dense")
    number("moe_every", int, 1, "of the other layers every n-th becomes a mixture")
    made.add_argument("--plain_gate", action="store_true", help="Mixtral's gate instead of Tanuki's normalised one")
    number("gate_scale", float, 1.0, "lambda of the normalised gate")
    made.add_argument("--router_bias", action="store_true", help="with a bias of each expert for loss-free balancing, at 0")
    made.add_argument("--param_dtype", choices=CHOICES["param_dtype"], help="of the output; the checkpoint's without it")
    number("seed", _seed, 0, "of everything random")
    made.add_argument("--dry_run", action="store_true", help="only say what would come out, in what time and memory")
    made.epilog = (
        "Layer by layer: memory holds one dense layer and one expert.  A few random tokens go through both models on the way, "
        "and how far their logits differ is told: the order of sums alone for copy, and for groups of 2, 4, 8, ... parts; "
        "other numbers of parts round the weights."
    )


def _vocabulary(made: Any) -> None:
    made.add_argument(
        "--vocab_size",
        type=int,
        default=0,
        help="rows of embedding and head: less cuts padding off, more adds zeros; 0 = as is",
    )


def _seed(text: str) -> int:
    if not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"the seed {text} does not fit into 64 bits")
    return int(text)


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
            parser.add_argument("--output", type=Path, required=True, help="directory to write; it must not be there yet")
        elif name == "checkpoint":
            parser.add_argument(
                "--checkpoint", type=Path, required=True, help="a stage's directory (its newest step) or one step's"
            )
        elif name == "tokenizer":
            parser.add_argument("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
        elif name == "json":
            parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
        elif name == "sampling":
            parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer (default %(default)s)")
            parser.add_argument("--temperature", type=float, default=0.0, help="0 = the likeliest token (default)")
            parser.add_argument("--top_p", type=float, default=1.0, help="share of the probability that is sampled from")
            parser.add_argument("--seed", type=int, default=0)
