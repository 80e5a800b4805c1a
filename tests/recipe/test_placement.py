"""Whether a stage's sizes divide over its mesh, and which mesh it gets."""

import pytest

from tanuki_jax import config, parallel
from tanuki_jax.errors import UserError
from tanuki_jax.recipe import placement
from tests import tiny_recipe

UNEVEN = {  # sizes of the mesh, changes of the recipe, and the words of the message
    "batch": (dict(fsdp=4, expert=2), dict(batch_size=12), ["batch_size 12", "multiple of 8"]),
    "gradient_accumulation_steps": (
        dict(fsdp=8),
        dict(batch_size=8, gradient_accumulation_steps=2),
        ["batch_size 8", "multiple of 16"],
    ),
    "heads": (dict(fsdp=2, tensor=4), dict(n_kv_heads=2), ["mesh.tensor 4", "model.n_kv_heads 2"]),
    "ffn": (dict(fsdp=2, tensor=4), dict(d_ff=30), ["mesh.tensor 4", "model.d_ff 30"]),
    "vocabulary": (dict(fsdp=2, tensor=4), dict(vocab_size=770), ["mesh.tensor 4", "model.vocab_size 770"]),
    "experts": (dict(fsdp=1, expert=8), dict(), ["mesh.expert 8", "model.n_experts 4"]),
    "tokens": (dict(fsdp=2, context=4), dict(seq_len=36), ["stages.continued.seq_len 36", "multiple of 8", "mesh.context 4"]),
}


def divided(sizes, changes):
    c = tiny_recipe.get_config()
    c.model.update(dict(n_heads=4, n_kv_heads=4))
    for key, value in changes.items():
        (c.model if key in c.model else c.stages.continued)[key] = value
    placement.check_mesh(config.resolve(c), "continued", parallel.make_mesh(config.Mesh(**sizes)))


@pytest.mark.parametrize("case", UNEVEN)
def test_a_size_that_does_not_divide_over_the_mesh_is_named_with_its_key(case):
    sizes, changes, words = UNEVEN[case]
    with pytest.raises(UserError) as error:
        divided(sizes, changes)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("sizes", [dict(), dict(fsdp=2, expert=2, tensor=2), dict(fsdp=2, context=4), dict(data=2, expert=4)])
def test_sizes_that_divide_over_the_mesh_are_accepted(sizes):
    divided(sizes, {})


@pytest.mark.parametrize(
    ("rows", "gradient_accumulation_steps", "sizes", "expected"),
    [
        (16, 1, {}, (1, 8, 1)),
        (16, 4, {}, (1, 4, 2)),  # 4 rows for 8 devices: two share a row
        (12, 1, {}, (1, 4, 2)),
        (4, 1, dict(data=2), (2, 2, 2)),
        (4, 1, dict(fsdp=8), (1, 8, 1)),  # what is asked for stays, and is refused later
        (3, 1, dict(data=2), (2, 4, 1)),
    ],
)
def test_devices_that_rows_do_not_need_split_the_tokens(rows, gradient_accumulation_steps, sizes, expected):
    made = config.recipe(name="tiny", mesh=sizes)
    made.data = dict(ja="x.jsonl")
    made.stages.only = config.stage(
        "pretrain",
        mixture=dict(ja=(1.0,)),
        steps=1,
        seq_len=32,
        batch_size=rows,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    mesh = placement.make_mesh(config.resolve(made), "only")
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "context")) == expected
