"""RULES: what does not go together, each once, with the field, its value, the reason and the remedy."""

from torch import Size

from hf_lowmem.optim import ALL_METHODS
from hf_lowmem.optim.backward import accumulation_refused
from hf_lowmem.reasons import CLIPPING, INSIDE_CHECKPOINT, NO_CHECKPOINT, NO_CLIPPING, SUMS_SHARDED, flattened
from hf_lowmem.rules import deepspeed, sample, zeroth
from hf_lowmem.rules.rule import Rule, apart
from hf_lowmem.rules.run import Run
from hf_lowmem.specs import STORES_AT_REST, STREAMED

ONE_GPU = "Make one GPU visible, or start a process a GPU with `accelerate launch` or `torchrun`"
BY_HAND = "or set neither lowmem_budget nor lowmem='auto', and choose the settings with `hf-lowmem plan`"


def _unread(run: Run) -> str:
    name, value = next(iter((run.fields or {}).items()))
    return f"{name}={value!r} has no effect with {run.say('optim')}, which is not one of hf_lowmem's"


def _unsharded(run: Run) -> str | None:
    """Why our method, or its projection, cannot work on weights of which each process has some rows."""
    if run.spec is None or run.engine != "fsdp" or not run.ours:
        return None
    cls = ALL_METHODS[run.spec.name]
    reason = cls.unsharded_only(Size((2, 2)), cls.resolve(run.spec) | {"rank": 1})
    return reason and reason.replace("projection=", f"{run.spec.label('projection')}=", 1)


def _averaged_late(run: Run) -> bool:
    return bool(run.in_backward) and (run.processes or 1) > 1 and run.engine in ("ddp", "single")


def _cautious(run: Run) -> bool:
    return run.spec is not None and bool(run.spec.options.get("cautious"))


def _why_whole(run: Run) -> str:
    if ALL_METHODS[str(run.optim)].ACCUMULATES:
        return (
            f"{run.say('accumulation')} with step in backward: cautious=True compares an update with whole gradients, "
            "which are freed in each backward pass. Set lowmem_accumulation='int8_sr' to add them up in int8, or "
            "gradient_accumulation_steps=1, or leave cautious unset."
        )
    field = None if run.engine == "fsdp" else "lowmem_accumulation"
    return accumulation_refused(run.say("accumulation"), str(run.optim), field)


def _accumulates_whole(run: Run) -> bool:
    able = run.ours and ALL_METHODS[str(run.optim)].ACCUMULATES and not _cautious(run)
    return bool(run.in_backward) and (run.accumulation or 1) > 1 and not (able or _sums(run))


def _sums(run: Run) -> bool:
    return run.ours and (run.fields or {}).get("lowmem_accumulation") is not None


def _sum(run: Run) -> str:
    return f"lowmem_accumulation={(run.fields or {}).get('lowmem_accumulation')!r}"


WITHOUT_EFFECT = (
    Rule(
        "fields_of_ours",
        ("optim", "fields"),
        lambda run: bool(run.fields) and not run.ours,
        _unread,
        f"Leave it unset, or set optim to one of: {', '.join(ALL_METHODS)}",
    ),
    Rule(
        "stochastic_nothing",
        ("stochastic",),
        lambda run: bool(run.stochastic) and run.tiers is None,
        "lowmem_activations_stochastic=True has no effect without lowmem_activations",
        "Leave it unset, or set lowmem_activations='fp8'",
    ),
    Rule(
        "offload_nothing",
        ("host",),
        lambda run: run.tiers is None and run.host == "inputs",
        lambda run: f"{run.say('host')} has no effect without lowmem_activations",
        "Leave it unset, or set lowmem_activations='checkpoint_fp8'",
    ),
    Rule(
        "chunk_nothing",
        ("chunk",),
        lambda run: run.tiers is None,
        lambda run: f"{run.say('chunk')} has no effect without lowmem_activations",
        "Leave it unset, or set lowmem_activations='stream_fp8'",
    ),
    Rule(
        "least_nothing",
        ("matmul_least",),
        lambda run: run.matmul is None,
        lambda run: f"{run.say('matmul_least')} has no effect without lowmem_matmul",
        "Leave it unset, or set lowmem_matmul='fp8_row'",
    ),
    Rule(
        "schedule_loop",
        ("loop", "schedule"),
        lambda run: True,
        lambda run: f"{run.say('schedule')} has no effect in {run.loop}, which makes no scheduler",
        "Leave it unset, and make one where you make schedulers: hf_lowmem.optim.schedules.get_power_schedule",
    ),
    apart(
        "scheduler",
        "schedule",
        "both say what the learning rate of a step is",
        "Leave one of them unset",
    ),
    Rule(
        "schedule_zero",
        ("schedule", "zero"),
        lambda run: bool(run.zero and run.zero.get("scheduler")),
        lambda run: f"{run.say('schedule')} has no effect: DeepSpeed's settings have a scheduler, which is used",
        "Take 'scheduler' out of them, or leave lowmem_schedule unset",
    ),
    Rule(
        "passed",
        ("passed", "optim"),
        lambda run: run.ours,
        lambda run: (
            f"{run.passed} cannot be combined with {run.say('optim')}, which would have no effect: an optimizer was "
            "passed as well"
        ),
        "Pass one or the other: drop it, or leave optim and the lowmem fields unset",
    ),
    Rule(
        "loop_budget",
        ("loop", "budget"),
        lambda run: True,
        lambda run: f"{run.say('budget')} has no effect in {run.loop}, whose steps cannot be planned",
        "Leave it unset, and take a preset (lowmem='light', 'balanced', 'smallest'), or the settings that "
        "`hf-lowmem plan --budget` finds for a step of that size",
    ),
)

ENGINES = (
    Rule(
        "fsdp1",
        ("engine", "fsdp_version"),
        lambda run: run.engine == "fsdp" and str(run.fsdp_version) != "2" and run.asked is not None,
        lambda run: f"{run.say('fsdp_version')} cannot be combined with {run.asked}: {flattened('FSDP1')}",
        "",
    ),
    Rule(
        "fsdp2_method",
        ("engine", "spec"),
        lambda run: _unsharded(run) is not None,
        lambda run: str(_unsharded(run)),
        "",
    ),
    *deepspeed.RULES,
)

TIERS = (
    apart("checkpointing", "tiers", INSIDE_CHECKPOINT, NO_CHECKPOINT),
    apart("offload", "tiers", "both decide where what is saved for backward is kept", "Set one of the two"),
    apart(
        "liger",
        "tiers",
        "its norms and MLPs keep tensors in functions of their own, out of reach",
        "Set use_liger_kernel=False, or leave lowmem_activations unset",
    ),
    apart(
        "n_gpu",
        "tiers",
        "DataParallel's replicas would share the first one's layers",
        ONE_GPU,
        when=lambda run: bool(run.tiers) and (run.n_gpu or 0) > 1,
    ),
)

STREAMS = (
    apart(
        "pieces",
        "tiers",
        "context and sequence parallelism cut rows into pieces, of which a streamed layer would take its own for the "
        "whole",
        "Set cp_size and sp_size to 1, or lowmem_activations='checkpoint_fp8'",
        when=lambda run: bool(run.pieces) and _streams(run),
    ),
)

IN_BACKWARD = (
    apart(
        "max_grad_norm",
        "in_backward",
        CLIPPING,
        f"Set max_grad_norm=0; {NO_CLIPPING}",
    ),
    apart(
        "precision",
        "in_backward",
        "loss scaling checks every gradient before the first update",
        "Use bf16",
        when=lambda run: bool(run.in_backward) and run.precision == "fp16",
    ),
    apart(
        "compile",
        "in_backward",
        "a compiled backward pass hands over all gradients at its end, so nothing would be freed",
        "Do not compile: leave torch_compile unset (accelerate: dynamo_backend: 'no')",
    ),
    apart(
        "reentrant",
        "in_backward",
        "a reentrant checkpoint may hand over one weight's gradient in parts",
        "Set use_reentrant to False",
    ),
    apart(
        "processes",
        "in_backward",
        "DDP averages gradients after each one's update",
        "Use FSDP2 (fsdp=True; accelerate: distributed_type: FSDP with fsdp_version: 2), train in one process, or "
        "leave lowmem_step_in_backward unset",
        when=_averaged_late,
    ),
    apart(
        "n_gpu",
        "in_backward",
        "DataParallel adds up its replicas' gradients",
        ONE_GPU,
        when=lambda run: bool(run.in_backward) and (run.n_gpu or 0) > 1,
    ),
    Rule(
        "in_backward_accumulation",
        ("accumulation", "in_backward"),
        _accumulates_whole,
        _why_whole,
        "",
    ),
    Rule(
        "sums_in_backward",
        ("fields", "in_backward", "optim"),
        lambda run: _sums(run) and not run.in_backward and run.budget is None,
        lambda run: (
            f"{_sum(run)} has no effect without lowmem_step_in_backward=True: gradients stay until the step, and are "
            "added up as they are"
        ),
        "Set it, with max_grad_norm=0, or leave lowmem_accumulation unset",
    ),
    Rule(
        "sums_nothing",
        ("fields", "accumulation", "optim"),
        lambda run: _sums(run) and run.accumulation == 1 and run.budget is None,
        lambda run: f"{_sum(run)} has no effect with {run.say('accumulation')}: there is nothing to add up",
        "Leave it unset, or accumulate over more than one backward pass",
    ),
    Rule(
        "sums_sharded",
        ("fields", "engine", "optim"),
        lambda run: _sums(run) and run.engine == "fsdp",
        lambda run: f"{_sum(run)} cannot be combined with FSDP2: {SUMS_SHARDED}",
        "",
    ),
    Rule(
        "in_backward_clips",
        ("clips", "in_backward"),
        lambda run: bool(run.in_backward),
        lambda run: (
            f"{run.say('in_backward')} is not supported under {run.clips}, which clips gradients after the backward "
            "pass"
        ),
        "Leave it unset",
    ),
)


def _streams(run: Run) -> bool:
    return any(tier in str(run.tiers) for tier in STREAMED)


def _rests(run: Run) -> bool:
    return run.ours and (run.fields or {}).get("lowmem_weights") in STORES_AT_REST


def _at_rest(run: Run) -> str:
    return f"lowmem_weights={(run.fields or {}).get('lowmem_weights')!r}"


AT_REST = (
    Rule(
        "rest_streamed",
        ("fields", "tiers", "optim"),
        lambda run: _rests(run) and _streams(run),
        lambda run: (
            f"{_at_rest(run)} cannot be combined with {run.say('tiers')}: a streamed layer adds up the gradients of "
            "its chunks, and weights at rest hand theirs over product by product"
        ),
        "Set lowmem_activations='checkpoint_fp8', or lowmem_weights='bf16_sr'",
    ),
    Rule(
        "store_sharded",
        ("fields", "engine", "precision", "optim"),
        lambda run: (
            run.ours
            and (run.fields or {}).get("lowmem_weights", "keep") != "keep"
            and run.engine == "fsdp"
            and run.precision not in (None, "no")
        ),
        lambda run: (
            f"{_at_rest(run)} cannot be combined with {run.say('precision')} under FSDP2, where accelerate makes fp32 "
            "of all trained weights then"
        ),
        "Set bf16=False (accelerate: mixed_precision: 'no'): a model that is loaded in bfloat16 computes in it",
    ),
    Rule(
        "rest_offloaded",
        ("fields", "cpu_offload", "optim"),
        lambda run: _rests(run) and bool(run.cpu_offload),
        lambda run: (
            f"{_at_rest(run)} cannot be combined with {run.say('cpu_offload')}: codes are gathered from the devices "
            "that share a weight, where each keeps its part of them"
        ),
        "Offload nothing, or set lowmem_weights='bf16_sr'",
    ),
    Rule(
        "rest_budget",
        ("fields", "engine", "budget", "optim"),
        lambda run: _rests(run) and run.engine == "fsdp" and run.budget is not None,
        lambda run: (
            f"{_at_rest(run)} cannot be combined with {run.say('budget')} under FSDP2: the search estimates such "
            "weights for one process alone"
        ),
        f"Set lowmem_weights='bf16_sr', {BY_HAND}",
    ),
    Rule(
        "rest_in_backward",
        ("fields", "in_backward", "optim"),
        lambda run: _rests(run) and not run.in_backward and run.budget is None,
        lambda run: (
            f"{_at_rest(run)} needs lowmem_step_in_backward=True: gradients that wait take 2 bytes a weight, twice "
            "what the weights do"
        ),
        "Set it, with max_grad_norm=0, or set lowmem_weights='bf16_sr'",
    ),
)

BUDGET = (
    apart("passed", "budget", "what an optimizer of yours takes is not known", f"Set optim instead, {BY_HAND}"),
    apart(
        "engine",
        "budget",
        "DeepSpeed's engine cannot be planned",
        f"Use FSDP2, {BY_HAND}",
        when=lambda run: run.engine == "deepspeed",
    ),
    apart("n_gpu", "budget", "DataParallel cannot be planned", ONE_GPU, when=lambda run: (run.n_gpu or 0) > 1),
)

RULES = (*WITHOUT_EFFECT, *zeroth.RULES, *sample.RULES, *ENGINES, *TIERS, *STREAMS, *IN_BACKWARD, *AT_REST, *BUDGET)


def check(run: Run, label: str = "") -> None:
    """Raise where a rule refuses the run.

    Args:
        run: what is known of it.
        label: where the settings stand, if that is not the place where the error appears.

    Raises:
        ValueError: naming the field, its value, the reason and the remedy.
    """
    for rule in RULES:
        said = rule.refusal(run)
        if said is not None:
            raise ValueError(f"{label}: {said}" if label else said)
