"""Plans of whole recipes and the search, with the compiler replaced by arithmetic: what is compiled, and what is made of it."""

import pytest

from tanuki_jax import plan
from tanuki_jax.errors import UserError
from tanuki_jax.plan import planner
from tests.plan.test_plan import recipe

SLICE = plan.parse("v5p-8")
KEPT = {"none": 8, "dots": 6, "ffn": 4, "attention": 2, "full": 1}


@pytest.fixture
def compiled(monkeypatch):
    """The list of what was compiled; memory is what remat keeps of a microbatch, a step is longer the less it keeps."""
    calls = []

    def plan_stage(made, name, topology, costs=True):
        this, mesh = made.stages[name], made.mesh
        calls.append((name, costs))
        if mesh.tensor > 1:
            raise UserError("does not divide")
        remat = made.compute.remat
        found = dict(
            stage=name,
            mesh={"context": mesh.context},
            gradient_accumulation_steps=this.gradient_accumulation_steps,
            remat=remat,
        )
        found |= dict(
            topology=topology.name, fits=KEPT[remat] / this.gradient_accumulation_steps <= 5, tokens_per_step=2048, chips=4
        )
        found |= dict(hbm_bytes_per_chip={"total": 2**30}, hbm_limit=2**29)
        return found | dict(step_seconds_estimate=432 / KEPT[remat] + 10 * mesh.context) if costs and found["fits"] else found

    monkeypatch.setattr(planner, "plan_stage", plan_stage)
    monkeypatch.setattr(planner, "lay_out", lambda *_: None)
    return calls


def test_a_recipe_compiles_each_program_once_and_adds_up_its_days(compiled):
    made = recipe(remat="full")
    found = plan.plan(made, "", SLICE)
    assert [s["stage"] for s in found["stages"]] == ["first", "second", "third", "dpo"]  # nothing is trained while upcycling
    assert [name for name, _ in compiled] == ["first", "second", "dpo"]  # the third is the second with other data
    steps = [s["steps"] for s in found["stages"]]
    assert steps == [100, 50, 50, None]  # how long dpo takes depends on the pairs
    assert found["days"] == pytest.approx(200 * 442 / 86400) and found["chip_hours"] == pytest.approx(found["days"] * 96)
    assert plan.problems(found) == []


def test_the_plan_of_one_stage_is_the_document(compiled):
    found = plan.plan(recipe(remat="full"), "second", SLICE)
    [stage] = found["stages"]
    assert stage.items() <= found.items() and (found["stage"], found["chips"], found["fits"]) == ("second", 4, True)


def test_each_stage_that_does_not_fit_says_what_to_change(compiled):
    found = plan.plan(recipe(remat="none"), "", SLICE)
    lines = plan.problems(found)
    assert [line.split()[2] for line in lines] == ["first", "second", "third", "dpo"] and found["days"] is None
    assert all(f"stages.{line.split()[2]}.gradient_accumulation_steps=2" in line for line in lines)


def test_a_search_takes_what_keeps_most_and_ranks_it_by_speed(compiled):
    found = plan.search(recipe(), "second", SLICE)["ranked"]
    fitting = [p for p in found if p["fits"]]
    assert found[: len(fitting)] == fitting and plan.problems({"ranked": found, "topology": "x"}) == []
    told = [p["step_seconds_estimate"] for p in found if "step_seconds_estimate" in p]
    assert told == sorted(told) and len(told) == planner.KEEP
    assert found[0]["remat"] == "none" and found[0]["gradient_accumulation_steps"] == 2 and found[0]["mesh"] == {"context": 1}
    # Of one mesh and number of rows nothing is tried that keeps less than what fits.
    places = [(p["mesh"]["context"], p["gradient_accumulation_steps"]) for p in fitting]
    assert len(places) == len(set(places))


def test_a_search_that_finds_nothing_says_so(compiled, monkeypatch):
    monkeypatch.setattr(planner, "REMAT", ("none",))
    monkeypatch.setitem(KEPT, "none", 1000)
    found = plan.search(recipe(), "second", SLICE)
    assert found["ranked"] and plan.problems(found) == [f"plan: nothing that was tried fits {SLICE.name}"]


def test_a_search_without_a_mesh_that_the_rows_divide_over_says_what_to_take(compiled):
    with pytest.raises(UserError, match="batch_size 8 of stage second divides over no mesh of v5p-256.*multiple of 128"):
        plan.search(recipe(), "second", plan.parse("v5p-256"))
