"""Every rule at every door: the same sentence, or the door is listed as blind to a fact, with the reason."""

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hf_lowmem.optim import ALL_METHODS
from hf_lowmem.rules import RULES, Run
from hf_lowmem.specs import OptimSpec, parse_options
from tests.rules.doors import DOORS


class Row(NamedTuple):
    """run: what a rule refuses. from_: where the part of its sentence begins that no door writes in its own way."""

    run: dict[str, Any]
    from_: str


ADAMW = {"optim": "adamw"}
STEPPING = ADAMW | {"in_backward": True}
POWER = {"schedule": "power"}
SAMPLE = {"sample": 0.3}
WHOLE_LAYERS = SAMPLE | {"checkpointing": False}  # which TRL checkpoints unless it is told
MEZO = {"optim": "mezo"}
HOSTED = {"host": "weights"}
FP8 = {"tiers": "fp8"}
SUMS = {"lowmem_accumulation": "int8_sr"}
ZERO2 = {"zero_optimization": {"stage": 2}}
ROWS = {
    "fields_of_ours": Row({"optim": "sgd", "fields": {"lowmem_rank": 4}}, "has no effect with"),
    "stochastic_nothing": Row({"stochastic": True}, "has no effect without"),
    "offload_nothing": Row({"host": "inputs"}, "has no effect without"),
    "least_nothing": Row({"matmul_least": 0}, "has no effect without"),
    "chunk_nothing": Row({"chunk": 256}, "has no effect without"),
    "schedule_loop": Row(POWER, "has no effect in"),
    "schedule_scheduler": Row(POWER | {"scheduler": "cosine"}, "both say what"),
    "schedule_zero": Row(
        POWER | {"engine": "deepspeed", "zero": ZERO2 | {"scheduler": {"type": "WarmupLR"}}},
        "DeepSpeed's settings have",
    ),
    "sample_loop": Row(SAMPLE, "has no effect in"),
    "sample_zeroth": Row(MEZO | SAMPLE, "cannot be combined with lowmem_sample=0.3: nothing is kept"),
    "sample_tiers": Row(FP8 | SAMPLE, "a linear's input, of"),
    "sample_checkpointing": Row(SAMPLE | {"checkpointing": True}, "a linear's input, of"),
    "sample_matmul": Row(SAMPLE | {"matmul": "fp8_row"}, "both say from what"),
    "sample_compile": Row(WHOLE_LAYERS | {"compile": True}, "the number of the step"),
    "sample_n_gpu": Row(WHOLE_LAYERS | {"n_gpu": 2}, "DataParallel's replicas"),
    "sample_engine": Row(WHOLE_LAYERS | {"engine": "deepspeed", "zero": ZERO2}, "it was not tried"),
    "sample_rest": Row(SAMPLE | STEPPING | {"fields": {"lowmem_weights": "int8_sr"}}, "weights at rest make"),
    "passed": Row(ADAMW | {"passed": True}, "cannot be combined with"),
    "loop_budget": Row({"budget": "1GiB"}, "has no effect in"),
    "zeroth_backward": Row(MEZO | {"tiers": "fp8"}, "cannot be combined with optim='mezo': nothing is kept"),
    "zeroth_whole": Row(MEZO | {"engine": "deepspeed", "zero": ZERO2}, "cannot be combined with optim='mezo': a pass"),
    "zeroth_sums": Row(MEZO | {"fields": SUMS}, "losses are added up"),
    "zeroth_rest": Row(MEZO | {"fields": {"lowmem_weights": "int8_sr"}}, "a weight at rest has no values"),
    "weights_first_order": Row(ADAMW | HOSTED, "cannot be combined with optim='adamw': a backward pass needs"),
    "weights_states": Row({"optim": "zo_adam"} | HOSTED, "its states would stay"),
    "weights_corrected": Row(MEZO | HOSTED | {"fields": {"lowmem_weights": "bf16_ecc"}}, "the 8 bits beside"),
    "weights_processes": Row(MEZO | HOSTED | {"engine": "ddp", "processes": 2}, "DDP wants all weights"),
    "zeroth_window": Row({"optim": "zo_conservative", "accumulation": 4}, "it tries an update on the batch"),
    "zeroth_budget": Row(MEZO | {"budget": "1GiB"}, "what is searched are"),
    "zeroth_loop": Row(MEZO, "the loop that it serves"),
    "fsdp1": Row(FP8 | {"engine": "fsdp", "fsdp_version": 1}, "FSDP1 flattens"),
    "fsdp2_method": Row({"optim": "soap", "engine": "fsdp", "fsdp_version": 2}, "'soap' under FSDP2"),
    "zero_matrices": Row({"optim": "apollo", "engine": "deepspeed", "zero": ZERO2}, "ZeRO flattens"),
    "zero_cautious": Row(
        ADAMW | {"fields": {"optim_args": "cautious=True"}, "engine": "deepspeed", "zero": ZERO2}, "it takes the share"
    ),
    "zero_weights": Row(
        ADAMW | {"fields": {"lowmem_weights": "bf16_sr"}, "engine": "deepspeed", "zero": ZERO2}, "ZeRO keeps fp32"
    ),
    "zero_in_backward": Row(STEPPING | {"engine": "deepspeed", "zero": ZERO2}, "ZeRO takes each gradient"),
    "zero_stage": Row(
        ADAMW | {"engine": "deepspeed", "zero": {"zero_optimization": {"stage": 3}}}, "zero_optimization.stage=3 cannot"
    ),
    "zero_optimizer": Row(ADAMW | {"engine": "deepspeed", "zero": ZERO2 | {"optimizer": "auto"}}, "optimizer='auto'"),
    "zero_zero_optimization.offload_optimizer.device": Row(
        ADAMW
        | {"engine": "deepspeed", "zero": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
        "zero_optimization.offload_optimizer.device='cpu'",
    ),
    "zero_zero_optimization.elastic_checkpoint": Row(
        ADAMW | {"engine": "deepspeed", "zero": {"zero_optimization": {"stage": 2, "elastic_checkpoint": True}}},
        "zero_optimization.elastic_checkpoint=True",
    ),
    "zero_checkpoint.load_universal": Row(
        ADAMW | {"engine": "deepspeed", "zero": ZERO2 | {"checkpoint": {"load_universal": True}}},
        "checkpoint.load_universal=True",
    ),
    "tiers_checkpointing": Row(FP8 | {"checkpointing": True}, "inside a checkpoint"),
    "tiers_offload": Row(FP8 | {"offload": True}, "both decide where"),
    "tiers_liger": Row(FP8 | {"liger": True}, "its norms and MLPs"),
    "tiers_pieces": Row(
        {"tiers": "stream_fp8/4", "pieces": {"cp_size": 2}, "engine": "fsdp", "fsdp_version": 2}, "context and sequence"
    ),
    "tiers_n_gpu": Row(FP8 | {"n_gpu": 2}, "DataParallel's replicas"),
    "in_backward_max_grad_norm": Row(STEPPING | {"max_grad_norm": 1.0}, "the global norm needs"),
    "in_backward_precision": Row(STEPPING | {"precision": "fp16"}, "loss scaling checks"),
    "in_backward_compile": Row(STEPPING | {"compile": True}, "a compiled backward pass"),
    "in_backward_reentrant": Row(STEPPING | {"reentrant": True}, "a reentrant checkpoint"),
    "in_backward_processes": Row(STEPPING | {"engine": "ddp", "processes": 2}, "DDP averages"),
    "in_backward_n_gpu": Row(STEPPING | {"n_gpu": 2}, "DataParallel adds up"),
    "in_backward_accumulation": Row(STEPPING | {"accumulation": 4}, "with step in backward: 'adamw' needs"),
    "sums_in_backward": Row(ADAMW | {"fields": SUMS, "in_backward": False}, "has no effect without"),
    "sums_nothing": Row(STEPPING | {"fields": SUMS, "accumulation": 1}, "there is nothing to add up"),
    "sums_sharded": Row(
        STEPPING | {"fields": SUMS, "accumulation": 2, "engine": "fsdp", "fsdp_version": 2}, "gradients are reduced"
    ),
    "in_backward_clips": Row(STEPPING, "which clips gradients"),
    "rest_in_backward": Row(
        ADAMW | {"fields": {"lowmem_weights": "int8_sr"}, "in_backward": False}, "needs lowmem_step"
    ),
    "store_sharded": Row(
        ADAMW | {"fields": {"lowmem_weights": "bf16_sr"}, "engine": "fsdp", "fsdp_version": 2, "precision": "bf16"},
        "makes fp32 of all trained weights",
    ),
    "rest_offloaded": Row(
        STEPPING | {"fields": {"lowmem_weights": "int8_sr"}, "engine": "fsdp", "fsdp_version": 2, "cpu_offload": True},
        "codes are gathered from the devices",
    ),
    "rest_budget": Row(
        STEPPING | {"fields": {"lowmem_weights": "int8_sr"}, "engine": "fsdp", "fsdp_version": 2, "budget": "1GiB"},
        "for one process alone",
    ),
    "rest_streamed": Row(
        STEPPING | {"fields": {"lowmem_weights": "int8_sr"}, "tiers": "stream"}, "adds up the gradients of its chunks"
    ),
    "budget_passed": Row({"budget": "1GiB", "passed": True}, "what an optimizer of yours"),
    "budget_engine": Row({"budget": "1GiB", "engine": "deepspeed", "zero": ZERO2}, "DeepSpeed's engine cannot"),
    "budget_n_gpu": Row({"budget": "1GiB", "n_gpu": 2}, "DataParallel cannot be planned"),
}

OF_OPTIMIZERS = ("zeroth", "in_backward", "rest", "sums", "budget", "zero", "passed", "fields", "fsdp2")
OF_OPTIMIZERS += ("schedule", "sample", "weights", "store")
NO_OPTIMIZER = "it is told of tiers alone: the optimizer is whoever's"
ARGUMENTS_NONE = "an optimizer is passed to a trainer or a loop, after the arguments were made"
NO_REPLICAS = "accelerate starts a process a GPU; DataParallel is the Trainer's, where it does not"
A_LOOP = "there is no loop of one's own behind it"
NO_BUDGET = "a budget is refused there in any case, by another rule"
NO_HOST = "nothing is known of a program that trains by itself"
TRLS = "a field of TRL's trainers alone"
BLIND = {
    **{(rule, door): ARGUMENTS_NONE for rule in ("passed", "budget_passed") for door in ("arguments", "replace")},
    **{(rule, door): "nothing is passed there" for rule in ("passed", "budget_passed")
       for door in ("launch", "planner", "axolotl")},
    **{("sample_loop", d): A_LOOP for d in DOORS if d not in ("plugin", "axolotl")},
    **{(rule, d): "a sample is refused there in any case, by another rule" for rule in ROWS
       if rule.startswith("sample_") and rule != "sample_loop" for d in ("plugin", "axolotl")},
    **{("schedule_loop", d): A_LOOP for d in DOORS if d not in ("plugin", "axolotl")},
    **{(f"schedule_{rule}", d): "a schedule is refused there in any case, by another rule"
       for rule in ("scheduler", "zero") for d in ("plugin", "axolotl")},
    ("schedule_scheduler", "launch"): "accelerate has no such option",
    **{("loop_budget", d): A_LOOP for d in DOORS if d not in ("plugin", "axolotl")},
    **{(rule, d): NO_BUDGET for rule in ROWS if rule.startswith("budget") for d in ("plugin", "axolotl")},
    **{("in_backward_clips", d): NO_HOST for d in DOORS if d != "axolotl"},
    **{(rule, d): NO_REPLICAS for rule in ROWS if rule.endswith("n_gpu") for d in ("plugin", "launch", "axolotl")},
    **{("zeroth_loop", d): A_LOOP for d in DOORS if d not in ("plugin", "axolotl")},
    **{(rule, d): "no method of zeroth order gets so far there"
       for rule in ("zeroth_whole", "zeroth_window", "zeroth_budget", "weights_processes")
       for d in ("plugin", "axolotl")},
    **{(rule, "callback"): NO_OPTIMIZER for rule in ROWS
       if rule.startswith(OF_OPTIMIZERS)},
    **{(rule, "axolotl"): "the step in backward that such weights need is refused there in any case"
       for rule in ("rest_offloaded", "rest_budget")},
    ("rest_budget", "plugin"): NO_BUDGET,
    ("rest_offloaded", "planner"): "a plan is told of processes alone; the trainer says it",
    ("stochastic_nothing", "callback"): "a spec of tiers has checked its own rounding",
    ("offload_nothing", "callback"): "a spec of tiers has checked what it keeps in host memory",
    ("least_nothing", "callback"): NO_OPTIMIZER,
    ("chunk_nothing", "callback"): "a spec of tiers has checked its own chunk",
    ("fsdp1", "planner"): "the processes that are planned are those of FSDP2 or DDP",
    ("tiers_offload", "plugin"): TRLS,
    ("tiers_offload", "launch"): TRLS,
    ("tiers_liger", "plugin"): "a loop has patched the model itself; its report says what was not recognised",
    ("tiers_liger", "launch"): "accelerate has no such option",
    ("in_backward_max_grad_norm", "plugin"): "a loop calls clip_grad_norm_, which raises then: see test_untaken.py",
    ("in_backward_max_grad_norm", "launch"): "accelerate's file says it for DeepSpeed alone, which is refused anyway",
    ("in_backward_reentrant", "plugin"): "how a loop checkpoints its model is not visible before it runs",
    ("in_backward_reentrant", "launch"): "accelerate has no such option",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION", "HF_LOWMEM_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_every_rule_has_a_row_and_every_blind_door_a_reason() -> None:
    names = [rule.name for rule in RULES]
    assert sorted(set(names)) == sorted(names) == sorted(ROWS)
    assert all(rule in ROWS and door in DOORS for rule, door in BLIND)


@pytest.mark.parametrize(("rule", "door"), [pair for pair in product(ROWS, DOORS) if pair not in BLIND])
def test_a_rule_says_the_same_at_every_door(
    rule: str, door: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = ROWS[rule]
    run = dict(row.run)
    if rule in ("tiers_checkpointing", "sample_checkpointing") and door in ("plugin", "launch"):
        run["engine"] = "fsdp"  # whose plugin is what checkpoints
    with pytest.raises(ValueError) as caught:
        DOORS[door](run, monkeypatch, tmp_path)
    said = str(caught.value)
    assert row.from_ in said, said
    loop = "axolotl" if door == "axolotl" else "LowMemPlugin"
    assert said[said.index(row.from_) :] == sentence(rule, loop), said


def sentence(rule: str, loop: str = "LowMemPlugin") -> str:
    """What the table itself says, from where no door has words of its own."""
    row = ROWS[rule]
    facts: dict[str, Any] = {**row.run, "loop": loop, "clips": "axolotl"}
    facts |= {"passed": "optimizers="} if "passed" in row.run else {}
    if "optim" in facts and facts["optim"] in ALL_METHODS:
        options = parse_options(facts.get("fields", {}).get("optim_args"), facts["optim"])
        facts["spec"] = OptimSpec(name=facts["optim"], options=options)
    said = next(r for r in RULES if r.name == rule).refusal(Run(**facts))
    assert said is not None
    return said[said.index(row.from_) :]
