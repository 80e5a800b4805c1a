"""A tiny recipe compiled for real TPU slices, on this machine; needs the TPU compiler, which the dev extra brings."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from tanuki_jax import config, model, plan
from tanuki_jax.cli.main import main
from tanuki_jax.errors import UserError
from tanuki_jax.plan import estimate, program, topology
from tanuki_jax.train.metrics import PEAK_FLOPS
from tests.tiny import small

HLO = """
%all-reduce-scatter.3 (p: f32[16,8]) -> f32[2,8] {
  %r0 = f32[16,8]{1,0} all-reduce(%p), to_apply=%add
}

%fused_computation.1 (p: f32[8,8]) -> f32[8,8] {
  %inner = f32[999999,8]{1,0} broadcast(%p)
}

ENTRY %main (a: bf16[4,8]) -> f32[8,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %g = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%a), op_name="jit(train_step)/gather"
  %s = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%a)
  %dynamic-update-slice.7 = bf16[128,8]{1,0} dynamic-update-slice(%zeros, %a, %i, %j)
  %c = bf16[128,8]{1,0} copy(%dynamic-update-slice.7)
  %t = (bf16[128,8]{1,0}, f32[4]{0}, /*index=5*/f32[4]{0}) all-reduce(%c, %loss, %norm), to_apply=%add
  %r = f32[2,8]{1,0} reduce-scatter(f32[16,8]{1,0} %x), dimensions={0}
  %expert_outer.4 = f32[8,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %f = f32[8,8]{1,0} fusion(%expert_outer.4), kind=kLoop, calls=%fused_computation.1
}
"""


def test_reading_a_compiled_module():
    gathered = (64 + 32 + 128) * 8 * 2  # the last one by adding up arrays that are zero but for a slice
    assert program.collectives(HLO) == {"all-gather": gathered, "reduce-scatter": 2 * 16 * 8 * 4, "all-reduce": 2 * 4 * 4}
    assert program.kernels(HLO) == {"expert_outer": 1}
    first = program.largest(HLO)[0]
    assert (first["name"], first["bytes"]) == ("dynamic-update-slice", 2048)  # what a fusion holds inside is no buffer


@pytest.mark.parametrize("experts", [0, 4])
def test_the_least_flops_of_a_layer_against_the_parameters(experts):
    cfg = small(n_experts=experts, remat="none")
    _, active = model.count_parameters(cfg)
    weights = active - 2 * cfg.vocab_size * cfg.d_model - cfg.d_model - cfg.n_layers * (2 + experts) * cfg.d_model
    np.testing.assert_allclose(estimate.least_flops(cfg, 10) * cfg.n_layers, 6 * 10 * weights)


def test_instructions_that_the_compiler_cannot_price_count_nothing():
    short, long = {"seconds": 0.5 - 4, "flops": 40.0}, {"seconds": 0.7 - 7, "flops": 60.0}  # 3 more in 2 layers
    layer, rest = estimate.split_layers(*(estimate.with_cost(cost, peak=100.0) for cost in (short, long)))
    assert (round(layer["seconds"], 6), round(rest["seconds"], 6)) == (0.1, 0.3)
    assert estimate.with_cost({"seconds": 1.2 - 2, "flops": 110.0}, peak=100.0)["seconds"] == pytest.approx(1.2)
    rounded = {"seconds": -35.0, "flops": 1e-3}  # the priced 0.00001 seconds are lost in single precision
    assert estimate.with_cost(rounded, peak=100.0)["seconds"] == pytest.approx(1e-5)
    layer, rest = estimate.split_layers({"seconds": 1.5, "flops": 7.0}, {"seconds": 2.1, "flops": 11.0})
    assert layer == pytest.approx({"seconds": 0.3, "flops": 2.0}) and rest == pytest.approx({"seconds": 0.9, "flops": 3.0})


def recipe(remat="full", **sizes):
    made = config.recipe(name="tiny")
    made.model.update(
        dict(vocab_size=512, n_layers=6, d_model=128, d_ff=256, n_heads=2, n_kv_heads=2, head_dim=128, n_experts=4)
    )
    made.compute.remat = remat
    made.model.update(sizes)
    made.data = dict(text="text/*.txt")
    common = dict(seq_len=256, batch_size=8, mixture=dict(text=(1.0,)))
    made.stages.first = config.stage("pretrain", tokens=256 * 8 * 100, **common)
    made.stages.upcycle = config.stage("upcycle", init_from="first")
    made.stages.second = config.stage("pretrain", init_from="upcycle", tokens=256 * 8 * 50, **common)
    made.stages.third = config.stage("pretrain", init_from="second", tokens=256 * 8 * 50, **common)
    made.stages.dpo = config.stage("dpo", init_from="third", epochs=1.0, **common)
    return config.resolve(made)


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed")


@needs_compiler
@pytest.mark.parametrize(
    ("stage", "steps", "kernel"),
    [("first", 100, "splash"), pytest.param("second", 50, "expert_", marks=pytest.mark.slow)],
    ids=["dense", "mixture"],
)
def test_a_stage_on_a_slice(stage, steps, kernel):
    found = plan.plan(recipe(remat="none"), stage, plan.parse("v5p-8"))
    [staged] = found["stages"]
    json.dumps(found)
    assert staged["fits"] and staged["chips"] == 4 and staged["mesh"] == {"fsdp": 4}
    assert 1.0 <= staged["layer"]["flops_over_least"] < 2.5  # tiles that are not full cost much at this size
    assert any(kernel in name for name in staged["kernels"]), staged["kernels"]
    assert any("splash" in name for name in staged["kernels"]), staged["kernels"]
    assert staged["steps"] == steps and staged["days"] > 0
    assert found["chip_hours"] == pytest.approx(staged["days"] * 96)
    assert sum(staged["collective_bytes"].values()) > 0
    assert stage in plan.table(found)


@needs_compiler
@pytest.mark.slow
def test_a_chip_of_two_devices_has_the_memory_and_the_speed_of_both():
    [one] = plan.plan(recipe(remat="none"), "first", plan.parse("tpu7x-8"))["stages"]
    assert one["chips"] == 4 and one["mesh"] == {"fsdp": 8} and one["fits"]
    assert one["hbm_limit"] == 2 * int(94.75 * 2**30)
    assert PEAK_FLOPS["TPU7x"] * 2 == 2307e12
    assert one["mfu_estimate"] > 0 and 1.0 <= one["layer"]["flops_over_least"] < 2.5  # seconds this small are lost in rounding
    # The same model FLOPs whichever way they are added up: of a chip and step, and of the whole step.
    assert one["flops_per_step_per_chip"] * one["chips"] > one["model_flops_per_step"] * 0.8


@needs_compiler
def test_what_does_not_fit_says_what_to_change():
    found = plan.plan(recipe(d_model=16_384, d_ff=65_536, n_layers=64, n_experts=8), "first", plan.parse("v5e-4"))
    assert not found["stages"][0]["fits"]
    [line] = plan.problems(found)
    assert "needs" in line and "gradient_accumulation_steps=" in line


@needs_compiler
@pytest.mark.parametrize(
    ("mesh", "stage", "words"),
    [
        ({}, dict(seq_len=128), ["stages.first.seq_len 128", "mesh.context 16", "batch_size 8"]),
        ({}, dict(batch_size=6), ["batch_size 6"]),
        (dict(context=3), {}, ["mesh", "128 devices"]),
        (dict(context=256), {}, ["mesh", "128 devices"]),
        (dict(fsdp=4, data=4), {}, ["16 places for 128 devices"]),
        (dict(tensor=4), {}, ["mesh.tensor 4", "n_kv_heads 2"]),
        (dict(expert=8), {}, ["batch_size 8"]),
        (dict(data=-1), {}, ["mesh", "positive"]),
    ],
)
def test_what_cannot_be_laid_out_says_what_to_set_before_it_compiles(mesh, stage, words):
    made = recipe()
    made = dataclasses.replace(made, mesh=dataclasses.replace(made.mesh, **mesh))
    made.stages["first"] = dataclasses.replace(made.stages["first"], **stage)
    with pytest.raises(UserError) as error:
        estimate.lay_out(made, "first", plan.parse("v5p-256"))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


@needs_compiler
def test_a_single_chip_is_a_slice():
    assert len(topology.devices(plan.parse("v6e-1"))) == 1


def test_what_no_check_has_foreseen_is_one_line(monkeypatch):
    def fails(*_):
        raise ValueError("the kernel has no room\nand says so in a stack of lines")

    monkeypatch.setattr(estimate.program, "compile_step", fails)
    monkeypatch.setattr(estimate, "lay_out", lambda *_: jax.make_mesh((1,), ("fsdp",)))
    with pytest.raises(UserError, match="stage first cannot be compiled for v5p-8.*no room; set other") as error:
        plan.plan_stage(recipe(), "first", plan.parse("v5p-8"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=v7-3"], "v5p-256"),
        (["--topology=v5p-8", "--stage=nothing"], "it has pretrain"),
        (["--topology=v5p-8", "--search"], "name it with --stage"),
    ],
)
def test_bad_input_is_one_line(flags, words, capsys):
    assert main(["plan", "--config=configs/nano.py", *flags]) == 1
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out
