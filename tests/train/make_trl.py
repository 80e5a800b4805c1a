"""What TRL's trainers log while they train a tiny Llama: `python -m tests.train.make_trl [CASE ...]` writes tests/train/trl/.

Needs torch, transformers and trl (1.16 made the files), and no JAX.  Weights, tokenizer and rows are made here from seeds, so a
file holds only what TRL itself says: the batches that its collators made, and what it logged at each step.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "trl"
ROWS = 4  # of a (micro)batch; pairs for DPO
RATE, BETAS, EPS, DECAY, CLIP = 3e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
SCHEDULE = {"sft": "cosine", "dpo": "constant"}
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
LETTERS = "abcdefghijklmnopqrstuvwxyz .,あいうえおかきくけこさしすせそたちつて"
MERGED = ("an", "in", "er", "th", "かき", "うえ", "the", "ing")
PIECES = (
    "以下は、タスクを説明する指示です。要求を適切に満たす応答を書きなさい。",
    "### 指示:",
    "### 応答:",
    "\n",
    *MERGED,
    *LETTERS,
)
SHAPE = dict(vocab_size=64, n_layers=2, d_model=32, d_ff=48, n_heads=4, n_kv_heads=2, head_dim=8, norm_eps=1e-5, rope_theta=1e4)


@dataclass(frozen=True)
class Case:
    """One run of a trainer."""

    rows: str  # what it is trained on: dialogues, answers, pairs or equal pairs
    steps: int = 20
    gradient_accumulation_steps: int = 1
    settings: dict = field(default_factory=dict)  # TRL's own
    reference: float = 0.0  # how far the weights of DPO's reference lie from those that the policy starts with


def other(*losses, **settings):
    """Another preference loss: a few steps, and a reference that is not the policy, so that no log-ratio is 0."""
    return Case("pairs", steps=3, settings={"loss_type": list(losses), **settings}, reference=0.02)


CASES = {
    "sft": Case("dialogues", settings={"assistant_only_loss": True}),
    "sft_packed": Case("answers", settings={"packing": True, "packing_strategy": "bfd", "max_length": 96}),
    "sft_accumulated": Case("answers", gradient_accumulation_steps=2),
    "dpo": Case("pairs"),
    **{
        f"dpo_{name}": other(name)
        for name in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sigmoid_norm")
    },
    "dpo_robust": other("robust", label_smoothing=0.1),
    # TRL's `sft` is the mean over all chosen tokens of the batch, ours the mean over pairs of each answer's mean: the same
    # where all chosen answers are equally long, and so they are here.
    "dpo_sigmoid_sft": Case(
        "equal pairs", steps=3, settings={"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.4]}, reference=0.02
    ),
}


def weights(noise=0.0):
    """Published names -> float32 arrays, drawn one after another; with `noise` moved by so much."""
    rng, moved = np.random.RandomState(11), np.random.RandomState(12)
    V, D, F, H = (SHAPE[n] for n in ("vocab_size", "d_model", "d_ff", "head_dim"))
    Q, KV = SHAPE["n_heads"] * H, SHAPE["n_kv_heads"] * H
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(SHAPE["n_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.{n}_proj.weight": s for n, s in zip("qkvo", ((Q, D), (KV, D), (KV, D), (D, Q)), strict=True)
        }
        shapes |= {f"{layer}.mlp.{n}_proj.weight": s for n, s in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F)))}
        shapes |= {f"{layer}.{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (D,), "lm_head.weight": (V, D)}
    drawn = {n: rng.standard_normal(s) * 0.15 + ("norm" in n) + moved.standard_normal(s) * noise for n, s in shapes.items()}
    return {name: w.astype(np.float32) for name, w in drawn.items()}


def write_tokenizer(directory):
    """A unigram tokenizer that cuts at newlines, as Tanuki's does, with Tanuki's chat template."""
    import tokenizers

    from tanuki_jax.data.chat import TEMPLATE

    answer = "{{ '\n\n### 応答:\n' + message['content'] + eos_token }}"  # TRL finds what the assistant says by marks
    assert answer in TEMPLATE
    marks = "{{ '\n\n### 応答:\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"

    pieces = [(piece, -10.0 if len(piece) == 1 else -8.0) for piece in (*SPECIAL, *PIECES)]
    assert len(pieces) == SHAPE["vocab_size"], len(pieces)
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("\n"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(list(SPECIAL))
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    named = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**named, "chat_template": TEMPLATE.replace(answer, marks), "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return directory


def rows(kind, count):
    """Rows as users keep them, of two-turn dialogues, answers to a prompt, or pairs of answers."""
    rng = np.random.RandomState(21)

    def text(low, high, letters):  # the first letters are the likeliest, so that there is something to learn
        chance = 1 / np.arange(1, len(letters) + 1)
        return "".join(rng.choice(list(letters), rng.randint(low, high), p=chance / chance.sum()))

    def said(role, *asked):
        return {"role": role, "content": text(*asked)}

    made = []
    for _ in range(count):
        asked = [said("user", 2, 14, LETTERS)]
        if rng.rand() < 0.4:
            asked += [said("assistant", 1, 12, "thea .in"), said("user", 2, 8, LETTERS)]
        if kind == "dialogues":
            made.append({"messages": [*asked, said("assistant", 1, 20, "the かきing")]})
        elif kind == "answers":
            made.append({"prompt": asked, "completion": [said("assistant", 1, 24, "the かきing")]})
        else:
            sizes = (9, 10) if kind == "equal pairs" else (2, 18)
            alphabet = "bcdfgj" if kind == "equal pairs" else "the かきing"  # of bcdfgj no two make one piece
            sides = {"chosen": said("assistant", *sizes, alphabet), "rejected": said("assistant", *sizes, "uhsせnき the")}
            made.append({"prompt": asked, **{side: [message] for side, message in sides.items()}})
    return made


def count(case):
    """Rows that a case is trained on; packed, several of them make a row."""
    return ROWS * case.steps * case.gradient_accumulation_steps * (3 if case.settings.get("packing") else 1)


def llama(noise=0.0):
    """transformers' model of the weights."""
    import torch
    import transformers

    settings = transformers.LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["d_model"],
        intermediate_size=SHAPE["d_ff"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        num_key_value_heads=SHAPE["n_kv_heads"],
        head_dim=SHAPE["head_dim"],
        rms_norm_eps=SHAPE["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        dtype="float32",
    )
    model = transformers.LlamaForCausalLM(settings)
    model.load_state_dict({name: torch.tensor(w) for name, w in weights(noise).items()}, strict=True)
    return model


def recorded(trainer_class):
    """The trainer, that keeps its batches, and what it logs: of SFT's metrics also those of each microbatch."""

    class Recorded(trainer_class):
        batches: list
        history: list

        def training_step(self, model, inputs, *args, **kwargs):
            self.batches.append({name: value.numpy().copy() for name, value in inputs.items() if hasattr(value, "numpy")})
            return super().training_step(model, inputs, *args, **kwargs)

        def log(self, logs, *args, **kwargs):
            parts = {
                f"{name}/{i}": value
                for name in ("entropy", "mean_token_accuracy")
                for i, value in enumerate(self._metrics["train"].get(name, ()))
            }
            super().log(logs, *args, **kwargs)
            if "grad_norm" in logs:
                self.history.append({**logs, **(parts if self.args.gradient_accumulation_steps > 1 else {})})

    return Recorded


def arrays(batch):
    """The documents of a TRL batch: `tokens`, `trained` and `positions` [R, S]; a position of -1 holds no token."""
    tokens = batch["input_ids"]
    trained = batch["completion_mask"] > 0 if "completion_mask" in batch else batch["labels"] != -100
    if "labels" in batch:
        np.testing.assert_array_equal(batch["labels"][trained], tokens[trained])
    attended = batch.get("attention_mask", np.ones_like(tokens))
    positions = batch.get("position_ids", np.where(attended > 0, np.cumsum(attended, axis=1) - 1, -1))
    return {"tokens": tokens.astype(np.uint8), "trained": trained, "positions": positions.astype(np.int8)}


def train(case):
    """A case's batches [batches, R, S], the values [steps, metrics] that TRL logged, and the metrics' names.

    With packing also the tokens in each row of the whole data set.
    """
    import datasets
    import transformers
    import trl

    dpo = "pairs" in case.rows
    config, trainer_class = (trl.DPOConfig, trl.DPOTrainer) if dpo else (trl.SFTConfig, trl.SFTTrainer)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = transformers.AutoTokenizer.from_pretrained(write_tokenizer(Path(scratch) / "tokenizer"))
        options = config(
            output_dir=scratch,
            max_steps=case.steps,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=case.gradient_accumulation_steps,
            learning_rate=RATE,
            lr_scheduler_type=SCHEDULE["dpo" if dpo else "sft"],
            optim="adamw_torch",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            logging_steps=1,
            seed=0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **{"max_length": None, **({"beta": 0.1} if dpo else {}), **case.settings},
        )
        trainer = recorded(trainer_class)(
            model=llama(),
            args=options,
            train_dataset=datasets.Dataset.from_list(rows(case.rows, count(case))),
            processing_class=tokenizer,
            **({"ref_model": llama(case.reference)} if dpo else {}),
        )
        trainer.batches, trainer.history = [], []
        trainer.train()
    if case.settings.get("packing"):
        check_isolation(trainer.batches[0], trainer.history[0]["loss"])
    names = sorted(n for n in trainer.history[0] if n not in ("epoch", "num_tokens", "step", "total_flos"))
    made = [arrays(batch) for batch in trainer.batches]
    length = max(part["tokens"].shape[1] for part in made)

    def stacked(name):
        fill = -1 if name == "positions" else 0
        return np.stack([np.pad(p[name], ((0, 0), (0, length - p[name].shape[1])), constant_values=fill) for p in made])

    return {
        **{name: stacked(name) for name in ("tokens", "trained", "positions")},
        **({"fill": np.array([len(r) for r in trainer.train_dataset["input_ids"]])} if case.settings.get("packing") else {}),
        "names": np.array(names),
        "values": np.array([[logged[name] for name in names] for logged in trainer.history]),
        "versions": np.array([f"{m.__name__} {m.__version__}" for m in (trl, transformers)]),
    }


def check_isolation(batch, loss):
    """Packed documents do not see each other: the loss that TRL logged is that of the documents one by one."""
    import torch

    model = llama()
    starts = [*np.flatnonzero(batch["position_ids"][0] == 0), batch["input_ids"].shape[1]]
    total, labelled = 0.0, 0
    for a, b in zip(starts, starts[1:], strict=False):
        with torch.no_grad():
            logits = model(torch.tensor(batch["input_ids"][:, a:b])).logits[0, :-1]
        labels = torch.tensor(batch["labels"][0, a + 1 : b]).long()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        labelled += int((labels != -100).sum())
    np.testing.assert_allclose(loss, total / labelled, rtol=1e-5)


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        np.savez_compressed(HERE / f"{name}.npz", **train(CASES[name]))
