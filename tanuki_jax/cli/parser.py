"""The command line's verbs and flags, with their help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

from tanuki_jax import launch
from tanuki_jax.cli import quality_flags
from tanuki_jax.cli.flags import (
    add_checkpoint,
    add_choice,
    add_fields,
    add_input,
    add_json,
    add_key,
    add_output,
    add_padded_vocab_size,
    add_sampling,
    add_seed,
    add_tokenizer_directory,
    number,
    path,
    stage,
)
from tanuki_jax.config.ranges import AMOUNT, LARGEST, Range
from tanuki_jax.config.schema import CHOICES, Model, Source, Tokenizer, Upcycle
from tanuki_jax.errors import UserError

HELP = """\
A trainer in which the whole Tanuki paper is one recipe.

  tanuki run --config=configs/nano.py --workdir=runs/nano        every stage, resumable; report.html at the end
  tanuki chat --checkpoint=runs/nano/stages/dpo                  talk to the result
  tanuki serve --checkpoint=runs/nano/stages/dpo --port=8000     the same over HTTP, in the browser and for OpenAI's clients
  tanuki synth --config=configs/synth/persona.py --workdir=runs/persona --dry_run      rows that models make, and what they cost
  tanuki plan --config=configs/tanuki_8x8b.py --topology=v5p-256 --stage=moe_01      what fits, how fast, for how many days
  tanuki run --config=configs/local_text.py --workdir=runs/mine --config.data.ja='ja/*.jsonl.gz' --config.data.en='en/*.txt'

Any key of a config can be set as --config.a.b=value.  `tanuki <verb> --help` says more.
"""


CONFIG_EPILOG = "--config=FILE.py[:argument] names the recipe; --config.a.b=value sets one of its keys."
SHARD_CHARACTERS = 100_000_000


class Parser(argparse.ArgumentParser):
    """Bad flags get one line and exit code 1, like any other bad input; one that is cut short is bad."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def make_parser() -> Parser:
    """All verbs; the parsed options name the function that does the work as `work` (a key of verbs.WORK)."""
    parser = Parser(prog="tanuki", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="<verb>")
    _add_run_and_train(verbs)
    _add_plan(verbs)
    _add_upcycle(verbs)
    _add_import_and_export(verbs)
    _add_tokenizer(verbs)
    _add_data(verbs)
    _add_score(verbs)
    _add_generate_and_chat(verbs)
    _add_serve(verbs)
    _add_synth(verbs)
    _add_launch(verbs)
    return parser


def _add_verb(verbs: Verbs, name: str, work: str, text: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(work=work)
    return parser


# --- one function per verb --------------------------------------------------------------------------------------------


def _add_run_and_train(verbs: Verbs) -> None:
    for name, text in (("run", "run or resume a whole recipe"), ("train", "run or resume one stage of a recipe")):
        parser = _add_verb(verbs, name, "run", text)
        parser.add_argument("--workdir", type=path, required=True, help="where everything is written")
        parser.add_argument("--allow_data_change", action="store_true", help="resume although the training data changed")
        parser.epilog = CONFIG_EPILOG
        if name == "train":
            parser.add_argument("--stage", type=stage, required=True, help="name of the stage")


def _add_plan(verbs: Verbs) -> None:
    text = "compile a recipe's train steps for a TPU slice that need not be here: memory, speed, days"
    parser = _add_verb(verbs, "plan", "plan", text)
    parser.add_argument("--topology", required=True, help="v5p-256, v6e-256, v5e-256, 2xv5p-256 for two slices, ...")
    parser.add_argument("--stage", default="", help="one stage; without it every stage of the recipe")
    parser.add_argument(
        "--search", action="store_true", help="try gradient_accumulation_steps x remat x mesh, and rank what fits"
    )
    parser.add_argument(
        "--explain_sharding", action="store_true", help="how every parameter and activation is split; no compilation"
    )
    parser.epilog = CONFIG_EPILOG
    add_json(parser)


def _add_upcycle(verbs: Verbs) -> None:
    """Flags of `tanuki upcycle`; docs/upcycling.md has more."""
    parser = _add_verb(verbs, "upcycle", "upcycle", "turn a dense checkpoint into a mixture of experts")
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a dense stage's directory, or a Hugging Face Llama directory; several, comma-separated, give the experts in turn",
    )
    add_output(parser)
    text = "the dense FFN; with noise (default, Tanuki); partly drawn anew (Drop-Upcycling); split (virtual groups)"
    add_choice(parser, Upcycle, "strategy", text)
    add_key(parser, Upcycle, "noise_std", "noise: absolute standard deviation on every FFN weight")
    add_key(parser, Upcycle, "drop_ratio", "drop: share of the inner dimensions that is drawn anew")
    add_choice(parser, Upcycle, "router_init", "the new router's distribution")
    add_key(parser, Upcycle, "router_std", "standard deviation of the new router; Tanuki: 1")
    add_key(parser, Model, "n_experts", "experts of each block", default=8)
    add_key(parser, Model, "top_k", "experts that a token visits")
    add_key(parser, Model, "expert_d_ff", "groups: inner width of an expert, a divisor of the dense one; 0 = the same")
    add_key(parser, Model, "first_dense", "layers at the beginning that stay dense")
    add_key(parser, Model, "moe_every", "of the other layers every n-th becomes a mixture")
    parser.add_argument(
        "--no_normalized_gate",
        dest="normalized_gate",
        action="store_false",
        default=Model.normalized_gate,
        help="Mixtral's gate instead of Tanuki's normalised one",
    )
    add_key(parser, Model, "gate_scale", "lambda of the normalised gate")
    parser.add_argument(
        "--router_bias",
        action="store_true",
        default=Model.router_bias,
        help="with a bias of each expert for loss-free balancing, at 0",
    )
    parser.add_argument("--param_dtype", choices=CHOICES["param_dtype"], help="of the output; the checkpoint's without it")
    add_seed(parser)
    parser.add_argument("--dry_run", action="store_true", help="only print what would come out, with time and memory")
    parser.epilog = (
        "Layer by layer: memory holds one dense layer and one expert.  A few random tokens go through both models on the way, "
        "and the difference of their logits is printed: the order of sums alone for copy, and for groups of 2, 4, 8, ... "
        "parts; other numbers of parts round the weights."
    )


def _add_import_and_export(verbs: Verbs) -> None:
    text = "a Hugging Face model, or PEFT's adapters, to a checkpoint; streamed, exact"
    parser = _add_verb(verbs, "import", "import", text)
    parser.add_argument(
        "--hf", type=path, required=True, help="directory of a Llama, Mixtral or Tanuki (config.json) or of adapter_config.json"
    )
    parser.add_argument("--base", type=path, help="for adapters: the checkpoint of ours that they lie on")
    parser.add_argument(
        "--param_dtype", choices=CHOICES["param_dtype"], default="", help="cast all weights; without it they come as they are"
    )
    add_padded_vocab_size(parser)
    add_output(parser)
    parser = _add_verb(verbs, "export", "export", "a checkpoint to a Hugging Face directory; streamed, exact")
    add_checkpoint(parser)
    add_output(parser)
    parser.add_argument(
        "--format",
        choices=("hf", "peft"),
        default="hf",
        help="hf: all weights, adapters merged into them (default); peft: the adapters alone",
    )
    parser.add_argument("--base_name", default="", help="peft: the model that adapter_config.json names")
    parser.add_argument(
        "--param_dtype",
        choices=CHOICES["param_dtype"],
        default="",
        help="hf: cast the matrices; without it they stay as they are",
    )
    add_padded_vocab_size(parser)


def _add_tokenizer(verbs: Verbs) -> None:
    tokenizer = verbs.add_parser("tokenizer", help="train a tokenizer, or report on one").add_subparsers(
        dest="subverb", required=True, metavar="train|report"
    )
    parser = _add_verb(tokenizer, "train", "tokenizer_train", "MeCab-bounded SentencePiece from text to tokenizer.json")
    add_input(parser)
    add_output(parser)
    add_fields(parser)
    add_key(parser, Tokenizer, "vocab_size", "pieces")
    add_key(parser, Tokenizer, "character_coverage", "share of characters with a piece of their own")
    add_choice(parser, Tokenizer, "boundary", "what no piece may cross (default %(default)s; the paper: morpheme)")
    add_choice(parser, Tokenizer, "dictionary", "of MeCab (default %(default)s)")
    parser.add_argument("--language_weights", default="", help="share of the vocabulary of each language: ja=0.65,en=0.35")

    text = "compression, round trip, boundaries and vocabulary use of tokenizers"
    parser = _add_verb(tokenizer, "report", "tokenizer_report", text)
    add_tokenizer_directory(parser)
    add_input(parser)
    add_fields(parser)
    add_json(parser)
    parser.add_argument("--compare", default="", help="other tokenizers, comma-separated: directories, tokenizer.json, .model")
    parser.add_argument(
        "--boundary",
        choices=[boundary for boundary in CHOICES["boundary"] if boundary != "none"],
        default=Tokenizer.boundary,
        help="units whose boundaries are watched",
    )
    parser.add_argument("--plot", type=path, help="draw compression and byte fallback there (.svg, .png)")


def _add_data(verbs: Verbs) -> None:
    data = verbs.add_parser("data", help="make a token store, or look into one; filter and audit rows").add_subparsers(
        dest="subverb", required=True, metavar="prepare|inspect|filter|audit"
    )
    text = "from text, dialogues, pairs or tokens to a token store; resumable"
    parser = _add_verb(data, "prepare", "data_prepare", text)
    add_input(parser)
    add_tokenizer_directory(parser)
    add_output(parser)
    add_fields(parser)
    parser.add_argument(
        "--skip_invalid",
        action="store_true",
        default=Source.skip_invalid,
        help="leave out invalid rows, and count and list them",
    )
    parser.add_argument(
        "--workers", type=number(int, Range(0, 10_000)), default=0, help="processes; 0 = as many as are of use (default)"
    )
    parser.add_argument(
        "--shard_characters",
        type=number(int, Range(1, 10**12)),
        default=SHARD_CHARACTERS,
        help="text of a shard, what a kill loses (default %(default)s)",
    )
    parser.add_argument(
        "--executor", choices=("local", "ray", "slurm"), default="local", help="where workers run; ray and slurm: docs/data.md"
    )
    parser.add_argument("--slurm", default="", help="options of the jobs, comma-separated: partition=cpu,time=24:00:00,...")
    parser.epilog = "Killed, the same command goes on from the last finished shard; the result has the same bytes."
    parser = _add_verb(data, "inspect", "data_inspect", "what a token store holds")
    parser.add_argument("--data", type=path, required=True, help="directory of the token store")
    add_tokenizer_directory(parser)
    add_json(parser)
    parser.add_argument("--rows", type=number(int, AMOUNT), default=3, help="documents or rows shown (default %(default)s)")
    parser.add_argument(
        "--seq_len", type=number(int, Range(0, 2**27)), default=0, help="show rows of so many tokens, as a stage packs them"
    )
    _add_filter_and_audit(data)


def _add_filter_and_audit(data: Verbs) -> None:
    parser = _add_verb(data, "filter", "data_filter", "drop rows that should not be trained on, counted and listed by reason")
    for add in (add_input, add_output, add_fields, add_json):
        add(parser)
    quality_flags.add_filter(parser)
    text = "what a corpus consists of: a random sample, labelled by hand or a judge, and shares with intervals"
    parser = _add_verb(data, "audit", "data_audit", text)
    for add in (add_input, add_fields, add_seed, add_json):
        add(parser)
    quality_flags.add_audit(parser)


def _add_score(verbs: Verbs) -> None:
    parser = _add_verb(verbs, "score", "score", "log-probabilities of given texts")
    add_checkpoint(parser)
    add_input(parser)
    add_json(parser)


def _add_generate_and_chat(verbs: Verbs) -> None:
    parser = _add_verb(verbs, "generate", "generate", "continue a text")
    add_checkpoint(parser)
    add_sampling(parser)
    add_json(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser = _add_verb(verbs, "chat", "chat", "talk to a trained model")
    add_checkpoint(parser)
    add_sampling(parser)
    parser.epilog = "/new begins a new conversation, /quit or the end of input leaves; Ctrl-C ends an answer, twice it leaves."


def _add_serve(verbs: Verbs) -> None:
    parser = _add_verb(verbs, "serve", "serve", "a checkpoint behind an OpenAI-compatible HTTP server, with a page to chat")
    add_checkpoint(parser)
    parser.add_argument("--port", type=number(int, Range(1, 65_535)), required=True, help="where it listens")
    parser.add_argument("--host", default="127.0.0.1", help="whose address it listens at: %(default)s is this machine alone")
    sizes = {
        "slots": (32, Range(1, 4096), "rows that are decoded together"),
        "max_length": (0, Range(2, LARGEST, besides=0), "tokens of a prompt and its answer; 0 = the model's longest row"),
        "queue": (256, AMOUNT, "rows that may wait; more are refused with 429"),
        "grace": (30, AMOUNT, "seconds that running requests have when the server is stopped"),
        "tensor": (1, Range(1, 1_000_000), "devices that share the weights"),
    }
    for name, (default, allowed, text) in sizes.items():
        parser.add_argument(f"--{name}", type=number(int, allowed), default=default, help=f"{text} (default %(default)s)")
    parser.add_argument("--model_name", default="", help="what clients call the model; the stage's name without it")
    parser.add_argument("--api_key_env", default="", help="environment variable with the key, or keys, that requests must have")
    parser.epilog = "SIGTERM or Ctrl-C lets running requests end, twice does not.  docs/serving.md has more."


def _add_synth(verbs: Verbs) -> None:
    parser = _add_verb(verbs, "synth", "synth", "rows of a recipe that models behind an OpenAI-compatible API make; resumable")
    parser.add_argument("--workdir", type=path, required=True, help="where everything is written")
    parser.add_argument("--name", default="", help="one entry of the recipe's `synth`; without it every one")
    parser.add_argument("--dry_run", action="store_true", help="only print how much would be asked, and what it costs at most")
    parser.epilog = f"{CONFIG_EPILOG}  Killed, or out of budget, the same command goes on; nothing is asked twice."
    add_json(parser)


def _add_launch(verbs: Verbs) -> None:
    """A platform's actions, and its settings as flags; the config's own flags are handed on to `tanuki run` on the workers."""
    platforms = verbs.add_parser("launch", help="run a recipe on Cloud TPUs, GKE or Slurm").add_subparsers(
        dest="platform", required=True, metavar="|".join(launch.PLATFORMS)
    )
    for platform in launch.PLATFORMS:
        parser = _add_verb(platforms, platform, "launch", launch.PLATFORMS[platform])
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        actions = launch.actions(platform)
        parser.add_argument("action", choices=actions, metavar="|".join(actions))
        parser.add_argument("--settings", type=path, help="TOML file with these keys; flags have the last word")
        parser.add_argument("--dry_run", action="store_true", help="print every command, run none")
        keys = parser.add_argument_group("settings, as flags or in the file")
        for name, (text, metavar) in launch.keys(platform).items():
            keys.add_argument(f"--{name}", action="append", dest=f"setting_{name}", metavar=metavar, help=text)
        listed = "\n".join(f"  {action:10s}{text}" for action, text in actions.items())
        parser.epilog = f"actions:\n{listed}\n\nlaunch/README.md leads through it."


def split_config(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of the config, each as `--config.key=value` even where a space stands for the equals sign, and the others."""
    config_flags, others, left = [], [], list(arguments)
    while left:
        flag = left.pop(0)
        if flag != "--config" and not flag.startswith(("--config=", "--config.")):
            others.append(flag)
            continue
        if "=" not in flag and left and not left[0].startswith("--"):
            flag += f"={left.pop(0)}"
        config_flags.append(flag)
    return config_flags, others
