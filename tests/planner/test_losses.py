"""What choices cost in loss: the tables are the records', and the bound and the order of a search follow from them."""

import statistics
from typing import Any

import pytest

from hf_lowmem.planner.search.losses import (
    BOUND,
    EMBEDDINGS,
    STATES,
    TIERS,
    WEIGHTS,
    embedding_rules,
    is_accepted,
    parts_of,
    total,
)
from hf_lowmem.planner.search.space import AS_IS, CHECKPOINTING, Choice, candidates
from parts.optimizers import report, schedule
from parts.optimizers.settings import Setting
from parts.record import RECORDS, read_rows
from parts.small_llama import SIZE
from tests.planner.real import arguments

ROUNDED = 0.005 + 1e-9


def per_cent(ours: dict[int, float], others: dict[int, float]) -> float:
    """Of three seeds; the mean by which a loss exceeds another's."""
    seeds = sorted(set(ours) & set(others) & {0, 1, 2})
    assert len(seeds) == 3
    return statistics.fmean(100 * (ours[seed] / others[seed] - 1) for seed in seeds)


def losses(rows: Any, **wanted: Any) -> dict[int, float]:
    return {r["seed"]: r["heldout_loss"] for r in rows if all(r.get(k) == v for k, v in wanted.items())}


def test_states_are_the_record_s() -> None:
    scored = report.Scores(schedule.Record(RECORDS / "optimizers.jsonl"), SIZE)
    for (method, codec), cost in STATES.items():
        found = per_cent(scored.losses(Setting(method, codec)), scored.losses(Setting(method)))
        assert abs(found - cost) <= ROUNDED, (method, codec, found)


def test_weights_are_the_record_s_at_the_worse_of_two_rates() -> None:
    rows = [
        r for r in read_rows(RECORDS / "weights.jsonl") if (r.get("kind"), r.get("method")) == ("continued", "adamw")
    ]
    rates = {r["rate"] for r in rows}
    assert len(rates) == 2
    for store, cost in WEIGHTS.items():
        found = max(
            per_cent(
                losses(rows, method="adamw", store=store, rate=rate),
                losses(rows, method="adamw", store="masters", rate=rate),
            )
            for rate in rates
        )
        assert abs(found - cost) <= ROUNDED, (store, found)


def test_embeddings_are_the_record_s() -> None:
    rows = read_rows(RECORDS / "embeddings.jsonl")
    for (method, rule), cost in EMBEDDINGS.items():
        found = per_cent(losses(rows, setting=f"{method}, {rule}"), losses(rows, setting=f"{method}, adam"))
        assert abs(found - cost) <= ROUNDED, (method, rule, found)


def test_tiers_are_the_record_s() -> None:
    rows = [r for r in read_rows(RECORDS / "activations.jsonl") if r["part"] == "loss"]
    for tier, cost in TIERS.items():
        assert abs(per_cent(losses(rows, way=tier), losses(rows, way="HuggingFace")) - cost) <= ROUNDED, tier


def choice(optim: str = "apollo_mini", **values: Any) -> Choice:
    return Choice(1, 1, 1, values.pop("activations", AS_IS), optim, **values)


def test_what_was_not_measured_is_said_and_luck_is_no_credit() -> None:
    parts = parts_of(choice(state="8bit", weights="int8_sr", embeddings="scale"), ["checkpoint_fp8"], bf16_weights=True)
    assert parts == {
        "states 8bit": -0.12, "weights int8_sr": 0.0, "embeddings scale": 0.24, "activations checkpoint_fp8": 0.18,
    }  # fmt: skip
    assert total(parts) == pytest.approx(0.42)
    streamed = parts_of(choice(state="8bit"), ["stream", "stream_fp8"], bf16_weights=False)
    assert streamed["activations stream_fp8"] == parts["activations checkpoint_fp8"], "the same loss, bit for bit"
    unknown = parts_of(choice("muon", state="int4"), [CHECKPOINTING], bf16_weights=False)
    assert unknown == {"states int4": None}
    assert total(unknown) is None
    assert parts_of(choice("adamw_torch_fused"), [AS_IS], bf16_weights=True) == {"weights keep": 0.52}


def test_auto_takes_nothing_beyond_its_bound_and_leaves_the_user_s_own_alone() -> None:
    def accepts(args: Any, made: Choice) -> bool:
        return is_accepted(made, parts_of(made, [made.activations], bf16_weights=True), args)

    free = arguments(optim="adamw_torch_fused", gradient_checkpointing=None)
    mini: dict[str, Any] = {"state": "8bit", "weights": "bf16_sr"}
    assert accepts(free, choice(**mini, embeddings="scale", activations="checkpoint_fp8"))
    assert not accepts(free, choice(**mini, embeddings="adam_mini", activations="checkpoint_fp8"))
    assert not accepts(free, choice("adamw_torch_fused")), "bf16 weights that lose small updates cost 0.52 %"
    assert not accepts(free, choice("muon", **mini | {"state": "int4"})), "not measured"
    assert accepts(arguments(optim="adafactor"), choice("adafactor")), "the user's own"
    own = arguments(optim="muon", lowmem_state="8bit")
    assert accepts(own, choice("muon", **mini))
    assert BOUND == 0.5


def test_choices_come_in_the_order_of_what_they_cost() -> None:
    """Rounding at random first, then int8, then another rule for embedding and head, the cheapest first."""
    args = arguments(optim="apollo_mini", lowmem_state="8bit", gradient_checkpointing=None)
    found = candidates(args, depth=2, bf16_weights=True, can_rest=True)
    order = {(c.weights, c.embeddings): c.departure for c in found if c.step_in_backward}
    ranked = sorted(order, key=lambda kind: order[kind])
    assert ranked.index(("bf16_sr", None)) < ranked.index(("int8_sr", None)) < ranked.index(("bf16_sr", "scale"))
    assert (
        ranked.index(("bf16_sr", "scale")) < ranked.index(("int8_sr", "scale")) < ranked.index(("bf16_sr", "adam_mini"))
    )
    assert embedding_rules("apollo_mini") == ["scale", "adam_mini"]
    assert embedding_rules("apollo") == [], "not measured"
    assert all(c.step_in_backward and c.accumulation == 1 for c in found if c.weights == "int8_sr")
    assert "int8_sr" not in {c.weights for c in candidates(args, depth=2, bf16_weights=True)}


def test_of_rules_that_nobody_named_those_that_were_not_measured_are_not_tried() -> None:
    args = arguments(optim="adamw_torch_fused", gradient_checkpointing=None)
    tried = {(c.optim, c.state) for c in candidates(args, depth=2, bf16_weights=True) if c.state is not None}
    assert {("adamw", "bf16"), ("apollo", "8bit"), ("apollo_mini", "fp32")} <= tried
    assert not {("apollo", "bf16"), ("apollo_mini", "int4"), ("apollo_mini", "bf16")} & tried
    named = {c.state for c in candidates(arguments(optim="muon"), depth=2, bf16_weights=True)}
    assert named == {"fp32", "bf16", "8bit", "int4"}
