"""Stages that train adapters: what they leave, what they start from, and what they refuse."""

import json
import math
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tanuki_jax import checkpoint, config, model, parallel
from tanuki_jax.cli.main import main
from tanuki_jax.data import loader
from tanuki_jax.recipe import artifacts, placement
from tanuki_jax.recipe.dataset import make_dataset
from tanuki_jax.recipe.workdir import Workdir
from tanuki_jax.train import losses
from tanuki_jax.train.optimizer import make_optimizer
from tanuki_jax.train.preference import pair_scores
from tests import tiny_lora
from tests.tiny_recipe import times

RANKS = {f"layers/attn/{name}": 2 for name in "qkvo"} | {f"layers/mlp/{name}": 3 for name in ("gate", "up", "down")}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_lora.trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def copy(home, tmp_path):
    """All of the run at another place, to be changed."""
    return shutil.copytree(home, tmp_path / "moved")


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def adapters(home, name):
    return flat(checkpoint.load_adapters(home / "stages" / name).params)


def weights(home, name):
    return flat(checkpoint.load(home / "stages" / name).params)


def rows_of(home, name):
    return [json.loads(line) for line in (home / "stages" / name / "metrics.jsonl").read_text().splitlines()]


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        np.testing.assert_array_equal(found[path], wanted, err_msg=path)


def merged_by_hand(home, name):
    """The base and its adapters, read apart and added up in a loop, in float64."""
    found = checkpoint.load_adapters(home / "stages" / name)
    result = weights(home, "base")
    sides = flat(found.params["lora"])
    for path, rank in found.ranks.items():
        a, b = (sides[f"{path}/{side}"].astype(np.float64) for side in "ab")
        product = [x.reshape(-1, rank) @ y.reshape(rank, -1) for x, y in zip(a, b, strict=True)]
        result[path] = result[path] + 8.0 / rank * np.stack(product).reshape(result[path].shape)
    return result


def one(tmp_path, source, *flags, more=()):
    """A single stage of adapters from a directory, in a run of its own."""
    names = ["run", f"{tiny_lora.CONFIG}:one", f"--workdir={tmp_path / 'one'}", f"--config.tokenizer.path={source}/tokenizer"]
    changes = (f"init_from={source}", "steps=1", "lora.rank=2", "lora.targets={'attn/*': 0, 'mlp/*': 3}", *flags)
    return main([*names, *(f"--config.stages.one.{change}" for change in changes), *more])


def refused(capsys, status, *words):
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tanuki: ")]
    assert status == 1 and all(word in line for word in words), line


# --- what a stage leaves --------------------------------------------------------------------------------------------


def test_only_adapters_and_their_moments_are_saved(home):
    step = home / "stages" / "sft" / "checkpoints" / "4"
    assert {p.name for p in step.iterdir() if p.is_dir()} == {"params", "optimizer", "meta"}
    saved = {path for item in ("params", "optimizer") for path in saved_arrays(step / item)}
    sides = {f"lora.{path.replace('/', '.')}.{side}" for path in RANKS for side in "ab"}
    assert {name for name in saved if "lora" not in name} == {"step", "rate", "key", "opt_state.0.count"}
    assert {name for name in saved if name.startswith("lora")} == sides
    assert len(saved) == 4 + 3 * len(sides)  # and two moments of each
    meta = checkpoint.read_meta(home / "stages" / "sft", 4)
    assert meta["adapter"]["ranks"] == RANKS and meta["adapter"]["base"] == "../base/checkpoints/2"
    assert meta["adapter"]["scales"] == {path: pytest.approx([8.0 / rank] * 2) for path, rank in RANKS.items()}


def saved_arrays(item):
    """Names of the arrays of an item, as Orbax tells them."""
    told = json.loads((item / "_METADATA").read_text())["tree_metadata"]
    return [".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in told.values() if not empty(entry)]


def empty(entry):
    return entry["value_metadata"].get("value_type") in ("None", "Dict", "NamedTuple", "Tuple")


def test_adapters_have_learned_and_the_base_is_as_it_was(home, copy):
    found = adapters(home, "sft")
    fresh = model.lora.init_adapters(checkpoint.load(home / "stages" / "sft").cfg, config.Lora(**tiny_lora.LORA), key())[0]
    assert found.keys() == flat(fresh).keys()
    assert all(np.abs(found[path]).max() > 1e-3 for path in found if path.endswith("/b"))
    before = times(copy / "stages" / "base")
    (copy / "stages" / "still" / "done.json").unlink()
    shutil.rmtree(copy / "stages" / "still" / "checkpoints")
    assert run(copy) == 0
    assert times(copy / "stages" / "base") == before
    assert_equal(weights(copy, "base"), weights(home, "base"))


def key():
    return jax.random.key(0)


def run(workdir, *flags):
    return main(["run", tiny_lora.CONFIG, f"--workdir={workdir}", *flags])


def test_an_interrupted_stage_ends_with_the_same_bits(home, copy):
    """Dropout goes on as well: what remains is as if it had been stopped after step 2, and the stage is run again."""
    stage = copy / "stages" / "sft"
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "checkpoints" / "4")
    assert run(copy) == 0
    assert_equal(adapters(copy, "sft"), adapters(home, "sft"))
    same = ("step", "loss", "grad_norm", "loss/talk", "loss/rare")
    assert [[r[n] for n in same] for r in rows_of(copy, "sft")] == [[r[n] for n in same] for r in rows_of(home, "sft")]


def test_whoever_loads_it_gets_the_merged_weights(home, tmp_path, capsys):
    expected = merged_by_hand(home, "sft")
    found = weights(home, "sft")
    for path, wanted in expected.items():
        assert np.abs(found[path] - wanted).max() <= 1e-6 * np.abs(wanted).max(), path
    assert_equal({p: w for p, w in found.items() if p not in RANKS}, {p: w for p, w in expected.items() if p not in RANKS})
    opened = checkpoint.open_lazy(home / "stages" / "sft")
    for path, stored in opened.tree.items():
        np.testing.assert_allclose(stored.read(), found[path], rtol=1e-6, atol=1e-7, err_msg=path)
        assert stored.read().dtype == found[path].dtype and stored.shape == found[path].shape
    np.testing.assert_array_equal(opened.tree["layers/attn/o"].read(1), opened.tree["layers/attn/o"].read()[1])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "昔々、狸が住んでいました。"}, ensure_ascii=False) + "\n")
    scores = {name: score(capsys, home, name, tmp_path) for name in ("base", "sft", "whole")}
    assert scores["sft"] == pytest.approx(scores["whole"], rel=1e-6) and abs(scores["sft"] - scores["base"]) > 0.1


def score(capsys, home, name, tmp_path):
    capsys.readouterr()
    source = home / "stages" / name
    assert main(["score", f"--checkpoint={source}", f"--input={tmp_path / 'rows.jsonl'}", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["rows"][0]["logprob"]


def test_of_a_source_without_a_token_there_is_no_loss(home):
    rows = rows_of(home, "sft")
    assert all(isinstance(row["loss/talk"], float) for row in rows)
    missing = [row for row in rows if row["loss/rare"] is None]
    assert missing and len(missing) < len(rows)
    for row in missing:
        assert row["loss/talk"] == pytest.approx(row["loss"], rel=1e-6)
    assert not any(name.startswith("loss/") for row in rows_of(home, "dpo") for name in row)  # it has but one


def test_losses_of_the_sources_add_up_to_the_loss():
    from tests.tiny import init, of_batch, problem, small

    cfg = small()
    batch = {name: jnp.asarray(value) for name, value in problem("sft", cfg).items()}
    batch["sources"] = jnp.asarray([0, 2, 2, 0, 0, 2, 0, 0])
    made = losses.make_loss("sft", cfg, config.Loss(z_loss=0.1), ["a", "b", "c"])
    _, weight, metrics = jax.jit(of_batch(made))(init(cfg, jax.random.key(0)), batch)
    parts = [metrics[f"loss/{name}"] for name in "abc"]
    assert float(sum(w for _, w in parts)) == float(weight) == float(batch["loss_weights"].sum())
    np.testing.assert_allclose(sum(total for total, _ in parts), metrics["loss"][0], rtol=1e-6)
    assert parts[1] == (0, 0) and parts[0][1] == batch["loss_weights"][jnp.array([0, 3, 4, 6, 7])].sum()
    assert abs(parts[0][0] / parts[0][1] - parts[2][0] / parts[2][1]) > 1e-3


# --- what it starts from --------------------------------------------------------------------------------------------


def test_without_learning_the_carried_adapters_stay_and_their_moments_go_on(home):
    assert_equal(adapters(home, "still"), adapters(home, "sft"))
    found, parents = (checkpoint.load_adapters(home / "stages" / name) for name in ("still", "sft"))
    assert found.base == parents.base == home / "stages" / "base" / "checkpoints" / "2"  # not on the parent's adapters
    assert_equal(flat(found.scales), flat(parents.scales))
    assert adam_steps(home, "sft") == 4 and adam_steps(home, "still") == 5 and adam_steps(home, "dpo") == 2


def adam_steps(home, name):
    """How many steps Adam's moments of a stage's last checkpoint have seen."""
    found = checkpoint.load_adapters(home / "stages" / name)
    options = config.resolve(found.meta["recipe"]).stages[name]
    mesh = parallel.make_mesh(config.Mesh())
    abstract, _ = placement.state_shardings(found.cfg, make_optimizer(options.optimizer), mesh, options.loss, options.lora)
    opened = checkpoint.Checkpoints(home / "stages" / name, keep=checkpoint.KEEP_ALL)
    state = opened.restore(opened.latest(), abstract)
    opened.close()
    return int(state.opt_state[0].count)


def test_a_stage_that_trains_all_starts_from_the_merged_weights(home):
    found, expected = weights(home, "whole"), weights(home, "sft")
    for path, wanted in expected.items():  # merged on eight devices and on one
        assert np.abs(found[path] - wanted).max() <= 1e-6 * np.abs(wanted).max(), path
    assert checkpoint.load(home / "stages" / "whole").meta.get("adapter") is None


def test_the_reference_is_what_the_stage_starts_from(home):
    first = rows_of(home, "dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) < 1e-5
    assert abs(rows_of(home, "dpo")[1]["rewards/margins"]) > 1e-4
    found = reference_of(home, "dpo")
    online, base = (logprobs_of(home, "dpo", name) for name in ("sft", "base"))
    np.testing.assert_allclose(found, online, rtol=1e-5)
    assert np.abs(found - base).max() > 0.1  # the parent's adapters are on


@pytest.mark.slow
def test_the_reference_of_fresh_adapters_is_the_model_without_them(home, tmp_path):
    """Also where the parent is adapters itself, which are merged: it is the parent in either case."""
    flags = ["kind=dpo", "mixture={'pairs': (1.0,)}", "seq_len=256"]
    assert one(tmp_path, home / "stages" / "sft", *flags) == 0
    [first] = rows_of(tmp_path / "one", "one")
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and abs(first["rewards/chosen"]) < 1e-5
    np.testing.assert_allclose(reference_of(tmp_path / "one", "one"), logprobs_of(home, "dpo", "sft"), rtol=1e-5)
    assert checkpoint.load_adapters(tmp_path / "one" / "stages" / "one").base == home / "stages" / "sft" / "checkpoints" / "4"


def reference_of(workdir, name):
    [path] = (workdir / "data").glob("reference-*.npy")
    return np.load(path)


def logprobs_of(home, stage, name):
    """Of all pairs of a stage, row by row, under the merged weights of another."""
    recipe = config.resolve(checkpoint.load(home / "stages" / stage).meta["recipe"])
    loaded = checkpoint.load(home / "stages" / name)
    [rows] = make_dataset(recipe, stage, artifacts.prepare(recipe, Workdir(home), {"pairs"}), home / "data").sources
    batch = {key: jnp.asarray(value) for key, value in loader.stack([rows[r] for r in range(len(rows))]).items()}
    scores = np.asarray(jax.jit(lambda p, b: pair_scores(loaded.cfg, p, b)[0].logprobs)(loaded.params, batch))
    found = np.zeros((len(rows.ref_logprobs), 2))
    for r, values in enumerate(scores):
        found[rows.pairs(r)] = values[: len(rows.pairs(r))]
    return found


def test_a_moved_run_finds_its_base_and_another_one_is_refused(home, copy, capsys):
    assert checkpoint.load_adapters(copy / "stages" / "sft").base == copy / "stages" / "base" / "checkpoints" / "2"
    assert_equal(weights(copy, "sft"), weights(home, "sft"))
    base = copy / "stages" / "base"
    base.rename(copy / "stages" / "kept")
    status = main(["export", f"--checkpoint={copy / 'stages' / 'sft'}", f"--output={copy / 'hf'}"])
    refused(capsys, status, "holds adapters of", str(base), "not there")
    shutil.copytree(copy / "stages" / "whole", base)
    (base / "checkpoints" / "1").rename(base / "checkpoints" / "2")
    status = main(["export", f"--checkpoint={copy / 'stages' / 'sft'}", f"--output={copy / 'hf'}"])
    refused(capsys, status, "holds adapters of", "another model has taken its place")
    assert not (copy / "hf").exists()
