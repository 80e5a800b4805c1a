"""The schema of every config: typed defaults, ranges and one documentation line per key."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tanuki_jax.config.keys import key, key_types, range_of
from tanuki_jax.config.kinds import STAGE_KINDS
from tanuki_jax.config.ranges import AMOUNT, COEFFICIENT, COUNT, DEVICES, NEVER, NONE, SEED, SHARE, SIZE, TOKENS, Range
from tanuki_jax.config.synthesis import METHODS, PII, Endpoint, Filters, Synth

__all__ = ["key_types", "range_of"]  # with which the schema is read


@dataclass(frozen=True)
class Model:
    """Architecture of the transformer, which every checkpoint records.  Letters as in every docstring: V D L N K H F E."""

    vocab_size: int = key(65_024, "V: rows of the embedding; the tokenizer's pieces padded to a multiple of 128", SIZE)
    n_layers: int = key(32, "L", Range(1, 10_000))
    d_model: int = key(4096, "D: width of the residual stream", SIZE)
    d_ff: int = key(14_336, "F: inner width of the SwiGLU block, and of each expert", SIZE)
    n_heads: int = key(32, "N: query heads", Range(1, 65_536))
    n_kv_heads: int = key(8, "K: key and value heads, shared by N/K query heads each", Range(1, 65_536))
    head_dim: int = key(128, "H", Range(1, 65_536))
    rope_theta: float = key(10_000.0, "base of the rotary position encoding; a stage may set its own", Range(1, 1e12))
    norm_eps: float = key(1e-5, "epsilon of RMSNorm", Range(1e-12, 1))
    qk_norm: bool = key(False, "RMSNorm of every head's query and key, against growing attention logits (Qwen3's)")
    init_std: float = key(
        0.008, "standard deviation of the initial weights; residual outputs are divided by sqrt(2L)", Range(0, 10, open="low")
    )
    n_experts: int = key(
        0, "E: experts per block of the mixture; 0 where there is none (dense stages ignore it)", Range(0, 65_536, zero="none")
    )
    expert_d_ff: int = key(
        0, "F of an expert where it is not d_ff: virtual groups split the dense block into parts", Range(0, 2**24)
    )
    first_dense: int = key(0, "layers at the beginning that stay dense in a mixture", Range(0, 10_000))
    moe_every: int = key(1, "of the layers after them every n-th is a mixture", Range(1, 10_000))
    top_k: int = key(2, "experts that a token visits", Range(1, 65_536))
    normalized_gate: bool = key(True, "router logits are z-scored over experts (Tanuki, Skywork-MoE) or plain (Mixtral)")
    gate_scale: float = key(
        1.0,
        "lambda: the z-scores are multiplied by it; more makes the gate sharper (Skywork-MoE, eq. 5)",
        Range(0, 1000, open="low"),
    )
    router_bias: bool = key(False, "a bias of each expert that only counts in choosing the top-k (loss-free balancing)")
    param_dtype: str = key("float32", "dtype of the stored matrices (docs/scaling.md); norms and biases are float32")
    capacity_factor: float = key(
        0.0,
        "room of an expert relative to an even load, tokens beyond it are dropped; 0 = dropless",
        Range(0, 1000, zero="dropless"),
    )

    @property
    def expert_width(self) -> int:
        """F of an expert."""
        return self.expert_d_ff or self.d_ff


@dataclass(frozen=True)
class Compute:
    """How the model is computed: precision, kernels and memory.  None of it is part of a checkpoint's architecture."""

    dtype: str = key("auto", "dtype of matrix products: float32, bfloat16, or auto (bfloat16 except on CPU)")
    attention_impl: str = key("auto", "auto (by platform), splash (TPU), cudnn (GPU), xla or reference", resumable=True)
    expert_impl: str = key(
        "auto",
        "auto (by platform), pallas or megablox (TPU), mosaic (Hopper GPUs), ragged, blocked, padded or reference",
        resumable=True,
    )
    remat: str = key(
        "none",
        "kept for the backward pass: none = everything, dots = matrix products, attention, ffn, full = nothing, offload",
        resumable=True,
    )
    scan_unroll: int = key(1, "blocks that one pass of the compiled loop over layers holds", Range(1, 10_000), resumable=True)
    logits_chunk: int = key(512, "most positions of a row whose float32 logits exist at one time", COUNT, resumable=True)


@dataclass(frozen=True)
class ModelConfig(Model):
    """The model of a stage: its architecture, and how it is computed."""

    compute: Compute = dataclasses.field(default_factory=Compute)

    @property
    def architecture(self) -> Model:
        """What a checkpoint records of it."""
        return Model(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Model)})


@dataclass(frozen=True)
class Mesh:
    """Sizes of the device mesh; their product is the number of devices."""

    slices: int = key(1, "TPU slices joined by the data-centre network; each holds whole replicas", DEVICES)
    data: int = key(1, "replicas of the model in a slice", DEVICES)
    fsdp: int = key(-1, "devices that share one replica's parameters; -1 = all that are left", Range(1, 1_000_000, besides=-1))
    expert: int = key(1, "devices that share the experts; tokens travel to them by all-to-all", DEVICES)
    context: int = key(1, "devices that share the tokens of a row", DEVICES)
    tensor: int = key(1, "devices that share heads, F and vocabulary", DEVICES)


@dataclass(frozen=True)
class Tokenizer:
    """An existing tokenizer, or how to train one."""

    path: str = key("", "directory with tokenizer.json; empty = that of the checkpoint in init_from, or train one as below")
    vocab_size: int = key(65_000, "pieces, special tokens and the 256 bytes included", Range(1, 2**24))
    sources: tuple[str, ...] = key((), "names in `data` to train on; empty = all")
    character_coverage: float = key(0.9995, "share of characters that get a piece; the rest is spelt in bytes", Range(0.98, 1))
    boundary: str = key("bunsetsu", "what no piece may cross: a MeCab morpheme (the paper), predicate, bunsetsu, or none")
    dictionary: str = key("ipadic", "MeCab's dictionary: ipadic, or unidic (pip install unidic-lite)")
    language_weights: dict[str, float] = key(
        dict, "language of a source -> its share of the vocabulary; empty = as the text has it", Range(0, 1e6, open="low")
    )
    max_bytes: int = key(
        1_000_000_000, "text read of each source, in UTF-8 bytes; what is left out is reported", Range(1, 10**15)
    )


@dataclass(frozen=True)
class Source:
    """Where rows come from.  In a config, a string stands for `files` alone."""

    files: str = key("", "comma-separated globs (docs/data.md has the formats), a Megatron-LM .bin, rules:NAME or synth:NAME")
    text: str = key("text", "field that holds a document's text; meta.body for a nested one")
    row_format: str = key("auto", "how rows that can be read in several ways are read; docs/data.md has the formats")
    language: str = key("", "language tag, for the tokenizer's language_weights")
    skip_invalid: bool = key(False, "leave out bad rows, count and list them, instead of stopping at the first")
    filters: str = key("", "name in `filters`: rows that these drop are not trained on; empty = all are")


@dataclass(frozen=True)
class Validation:
    """The end of each source, held out of pretraining and scored as it goes on."""

    tokens: int = key(
        0, "tokens of each source that are held out, in whole rows; 0 = no validation", Range(0, 10**15, zero="no validation")
    )
    every_steps: int = key(500, "steps between two scorings; the last step is always scored", COUNT)


@dataclass(frozen=True)
class Rules:
    """How many rows of rule-made data to make for the `rules:` sources (synth/rules.py)."""

    documents: int = key(40_000, "documents per language", Range(0, 10**9))
    dialogues: int = key(60_000, "dialogues per language", Range(0, 10**9))
    pairs: int = key(8_000, "preference pairs", Range(0, 10**9))


@dataclass(frozen=True)
class Scoring:
    """Held-out rule-made prompts answered after every stage."""

    prompts: int = key(0, "held-out prompts per stage; 0 = no scoring", Range(0, 10**6, zero="no scoring"))
    pairs: int = key(0, "held-out preference pairs per stage", Range(0, 10**6))
    max_new_tokens: int = key(48, "longest answer", Range(1, 2**20))
    batch_size: int = key(256, "prompts decoded together", Range(1, 10**6))


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled weight decay on matrices (not on norms), global-norm clipping and a schedule with a floor."""

    learning_rate: float = key(1e-4, "peak", Range(0, 10))
    learning_rate_floor: float = key(0.0, "final value of the schedule", Range(0, 10))
    schedule: str = key(
        "cosine", "cosine, wsd (warm-up, stable, linear decay), constant, or lr_range_test: rises from the floor"
    )
    warmup_steps: int = key(0, "steps of linear warm-up from 0", AMOUNT)
    warmup_ratio: float = key(0.0, "the same as a share of the stage's steps; one of the two is 0", SHARE)
    decay_steps: int = key(
        0, "cosine: step at which the floor is reached; wsd: length of the decay; 0 = stage's end; a tenth of it", AMOUNT
    )
    schedule_start: int = key(
        0, "step of the schedule at which the stage begins, where it goes on with an earlier stage's", AMOUNT
    )
    beta1: float = key(0.9, "decay of Adam's first moment", Range(0, 1, open="high"))
    beta2: float = key(0.95, "decay of Adam's second moment", Range(0, 1, open="high"))
    eps: float = key(1e-8, "Adam's epsilon", Range(1e-30, 1))
    moment_dtype: str = key("float32", "dtype in which both moments are stored; bfloat16 for a beta2 up to 0.996")
    weight_decay: float = key(0.1, "decoupled decay, multiplied by the learning rate", Range(0, 10_000))
    clip_norm: float = key(1.0, "largest global gradient norm; 0 = no clipping", Range(0, 1e9, zero="off"))


@dataclass(frozen=True)
class Loss:
    """What is added to, or replaces, the token cross entropy."""

    z_loss: float = key(0.0, "coefficient of (log Z)^2 of the output softmax", COEFFICIENT)
    router_aux_loss: float = key(0.02, "coefficient of the Switch load-balancing loss, mixture only", COEFFICIENT)
    router_aux_adaptive: float = key(
        0.0,
        "xi: each layer's coefficient follows xi x its overflow, at most router_aux_loss (Skywork: 0.2); 0 = fixed",
        Range(0, 1000, zero="fixed"),
    )
    router_z_loss: float = key(0.0, "coefficient of (logsumexp of the router logits)^2, mixture only", COEFFICIENT)
    router_bias_rate: float = key(0.001, "step of model.router_bias against an expert's surplus (DeepSeek-V3: 0.001)", SHARE)
    beta: float = key(0.1, "DPO: strength of the tie to the reference model", Range(0, 1000, open="low"))
    preference: dict[str, float] = key(
        dict, "DPO: loss -> weight in the sum, TRL's names and cdpo; empty = sigmoid", Range(0, 1000, open="low")
    )
    label_smoothing: float = key(
        0.0, "DPO: probability that a preference label is wrong, for cdpo and robust", Range(0, 0.5, open="high")
    )


@dataclass(frozen=True)
class Guard:
    """What is done about steps that go wrong; every event is a line of events.jsonl.  docs/long_runs.md."""

    skip_limit: int = key(
        10, "steps in a row with a loss or gradient that is not finite, each left out, that end the run", AMOUNT
    )
    spike_sigma: float = key(
        10.0,
        "robust deviations above the median of 200 steps at which loss or gradient norm is a spike; 0 = off",
        Range(0, 1e9, zero="off"),
    )
    spike_steps: int = key(5, "spikes in a row at which the run goes back to the checkpoint before them; 0 = never", NEVER)
    rollbacks: int = key(3, "times that a stage goes back; then it ends", AMOUNT)
    rollback_lr_scale: float = key(1.0, "factor of the learning rate after each time", Range(0, 1, open="low"))
    step_timeout_seconds: float = key(
        1800.0,
        "a step that takes longer ends the process, for its launcher to restart; 0 = only reported",
        Range(0, 1e8, zero="only reported"),
    )


@dataclass(frozen=True)
class Upcycle:
    """How a dense model becomes a mixture."""

    strategy: str = key("noise", "copy, noise (Tanuki), drop (Drop-Upcycling) or groups (virtual groups); docs/upcycling.md")
    noise_std: float = key(1e-3, "noise: absolute standard deviation added to every FFN weight of every expert", COEFFICIENT)
    drop_ratio: float = key(0.5, "drop: share of an expert's inner dimensions that are drawn anew", SHARE)
    router_init: str = key("normal", "distribution of the fresh router: normal, or uniform around 0")
    router_std: float = key(0.02, "standard deviation of the fresh router (Tanuki drew N(0, 1))", COEFFICIENT)
    experts_from: tuple[str, ...] = key((), "more dense stages or checkpoints: expert e starts from the e-th in turn")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters that are trained while the model is frozen; docs/posttraining.md."""

    rank: int = key(0, "r of the adapters; 0 = none, all parameters are trained", Range(0, 65_536, zero="none"))
    alpha: float = key(16.0, "the adapters' product is multiplied by alpha / r", Range(0, 1e6, open="low"))
    rslora: bool = key(False, "multiplied by alpha / sqrt(r) instead (Kalajdzievski 2023)")
    dropout: float = key(
        0.0, "share of an adapter's inputs that is dropped; attention and dense FFN only", Range(0, 1, open="high")
    )
    targets: dict[str, int] = key(
        dict,
        "pattern of matrices (attn/q, mlp/up, moe/down, moe/router, ...) -> rank, 0 = `rank`; empty = {'attn/*': 0}",
        Range(0, 65_536, zero="lora.rank"),
    )

    def patterns(self) -> dict[str, int]:
        """The targets, or attention where none is named."""
        return self.targets or {"attn/*": 0}


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe.  Stages run in the order that `init_from` gives."""

    kind: str = key("pretrain", "pretrain, upcycle, sft, dpo or synth (config/kinds.py)")
    init_from: str = key("", "an earlier stage, a checkpoint directory, or empty: random weights")
    restore: str = key(
        "params", "taken from init_from: params (adapters merged), adapter (trained on), all (Adam's moments too)"
    )
    moe: bool = key(
        False,
        "a stage from random weights or a directory: whether it is a mixture; as the directory is, where n_experts is left out",
    )
    mixture: dict[str, tuple[float, ...]] = key(dict, "name in `data` -> its weight in each phase of the stage", Range(0, 1e9))
    phase_start_tokens: tuple[int, ...] = key((0,), "tokens after which each phase of the mixture begins", TOKENS)
    seq_len: int = key(2048, "S: tokens of a row", Range(1, 2**27))
    batch_size: int = key(256, "B: rows of a global batch", Range(1, 10**7))
    gradient_accumulation_steps: int = key(
        1, "parts of the batch that are computed one after another (gradient accumulation)", Range(1, 10**7), resumable=True
    )
    steps: int = key(0, "budget in optimizer steps; set exactly one of steps, tokens, epochs", AMOUNT)
    tokens: int = key(0, "budget in tokens, B*S per step", TOKENS)
    epochs: float = key(0.0, "budget in passes over the packed rows (sft and dpo)", Range(0, 1e6))
    reset_attention: bool = key(True, "attention and positions start anew at each document (Tanuki's pretraining: no)")
    rope_theta: float = key(0.0, "RoPE base from this stage on; 0 = as before", Range(1, 1e12, besides=0))
    optimizer: Optimizer = key(Optimizer, "AdamW and its schedule")
    loss: Loss = key(Loss, "loss options")
    lora: Lora = key(Lora, "adapters instead of all parameters")
    upcycle: Upcycle = key(Upcycle, "kind upcycle only")
    synth: str = key("", "kind synth only: the name in `synth` of the rows that the model of init_from makes")
    guard: Guard = key(Guard, "what is done about steps that go wrong", resumable=True)
    save_every: int = key(500, "steps between checkpoints; the last step is always saved", COUNT, resumable=True)
    keep_latest: int = key(
        2, "newest checkpoints kept; with two a damaged one costs no more than the steps since the other", COUNT, resumable=True
    )
    keep_every: int = key(0, "checkpoints of every so many steps are kept for ever; 0 = none", NONE, resumable=True)
    keep_best: int = key(
        0, "so many checkpoints with the lowest validation loss are kept beside the newest", AMOUNT, resumable=True
    )
    log_every: int = key(10, "steps between lines of metrics.jsonl", COUNT, resumable=True)
    profile_start: int = key(
        0, "step before which a profile begins (TensorBoard reads it); 0 = none but on SIGUSR1", NONE, resumable=True
    )
    profile_steps: int = key(5, "steps of a profile", COUNT, resumable=True)


@dataclass(frozen=True)
class Recipe:
    """Everything: model, data and the stages of one run."""

    name: str = key("", "title of the report")
    seed: int = key(0, "root of every random choice", SEED)
    model: Model = key(Model, "architecture of the transformer")
    compute: Compute = key(Compute, "precision, kernels and memory")
    mesh: Mesh = key(Mesh, "devices", resumable=True)
    tokenizer: Tokenizer = key(Tokenizer, "text to ids")
    data: dict[str, Source] = key(dict, "source name -> source")
    filters: dict[str, Filters] = key(dict, "name -> what is dropped of a source or of made rows")
    endpoints: dict[str, Endpoint] = key(dict, "name -> a model that answers over HTTP")
    synth: dict[str, Synth] = key(dict, "name -> rows that a model makes; the source synth:NAME reads them")
    validation: Validation = key(Validation, "loss of each source on text held out")
    rules: Rules = key(Rules, "amount of rule-made data")
    stages: dict[str, Stage] = key(dict, "stage name -> stage")
    scoring: Scoring = key(Scoring, "held-out prompts answered after every stage")
    tensorboard: bool = key(True, "write TensorBoard files beside metrics.jsonl", resumable=True)
    prometheus_port: int = key(
        0, "port on which the first process answers Prometheus; 0 = none", Range(0, 65_535, zero="none"), resumable=True
    )
    wandb_project: str = key(
        "", "project of Weights & Biases that metrics go to, too (extra wandb); empty = none", resumable=True
    )


CHOICES = {
    "row_format": (
        *("auto", "text", "messages", "conversations", "preference", "prompt_completion", "instruction"),
        *("question_answer", "turns", "tokens"),
    ),
    "kind": tuple(STAGE_KINDS),
    "restore": ("params", "adapter", "all"),
    "schedule": ("cosine", "wsd", "constant", "lr_range_test"),
    "strategy": ("copy", "noise", "drop", "groups"),
    "router_init": ("normal", "uniform"),
    "boundary": ("morpheme", "predicate", "bunsetsu", "none"),
    "dictionary": ("ipadic", "unidic"),
    "dtype": ("auto", "float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "attention", "ffn", "full", "offload"),
    "attention_impl": ("auto", "splash", "cudnn", "xla", "reference"),
    "expert_impl": ("auto", "pallas", "megablox", "mosaic", "ragged", "blocked", "padded", "reference"),
    "moment_dtype": ("float32", "bfloat16"),
    "method": tuple(METHODS),
    "pii": PII,
}
# Names in Loss.preference (train/pair_losses.py).
PREFERENCES = (
    *("sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down", "nca_pair", "bco_pair"),
    *("sppo_hard", "sft"),
)
# What Lora.targets may name (model/lora.py), without and with mixtures of experts; the dropout is for the first kind.
PROJECTED = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
ROUTED = ("moe/gate", "moe/up", "moe/down", "moe/router")
# Keys of a model that say nothing of a dense one.
MOE_KEYS = ("expert_d_ff", "first_dense", "moe_every", "top_k", "normalized_gate", "gate_scale", "router_bias")
