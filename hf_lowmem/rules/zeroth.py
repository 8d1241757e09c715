"""Rules of methods of zeroth order, which have forward passes alone: see hf_lowmem/optim/zeroth."""

from collections.abc import Callable
from typing import NamedTuple

from hf_lowmem.optim import ZEROTH
from hf_lowmem.rules.rule import Rule
from hf_lowmem.rules.run import Run
from hf_lowmem.specs import STORES_AT_REST

__all__ = ["RULES"]


class Needless(NamedTuple):
    """A setting of backward passes.

    fact: of a run, that is true where it is set. why: what it would work on and is not there.
    """

    fact: str
    why: str
    remedy: str = "Leave it unset"
    when: Callable[[Run], bool] | None = None

    def found(self, run: Run) -> bool:
        return bool(getattr(run, self.fact)) if self.when is None else self.when(run)


def _scaled(run: Run) -> bool:
    return run.precision == "fp16"


def _flattened(run: Run) -> bool:
    return run.engine == "deepspeed" or (run.engine == "fsdp" and str(run.fsdp_version) != "2")


def _replicated(run: Run) -> bool:
    return (run.n_gpu or 0) > 1


STATELESS = [name for name, cls in ZEROTH.items() if not cls.STATES]
NOTHING_KEPT = "nothing is kept for a backward pass"
NEEDLESS = (
    Needless("in_backward", "there is no backward pass"),
    Needless("tiers", NOTHING_KEPT),
    Needless("checkpointing", NOTHING_KEPT, "Set it to False"),
    Needless("offload", NOTHING_KEPT),
    Needless("max_grad_norm", "there is no gradient whose norm could be bounded", "Set max_grad_norm=0"),
    Needless("precision", "a loss is scaled for the sake of gradients", "Use bf16", _scaled),
)
WHOLE = (
    Needless(
        "engine",
        "a pass at other weights makes them weight by weight, and this engine has them flattened",
        "Use FSDP2, DDP or one process",
        _flattened,
    ),
    Needless("cpu_offload", "an update draws a number for each weight, and would draw them on the host's processor"),
    Needless(
        "n_gpu",
        "DataParallel's replicas would have the weights of the first pass",
        "Make one GPU visible, or start a process a GPU with `accelerate launch` or `torchrun`",
        _replicated,
    ),
    Needless("compile", "a compiled pass was made for the model's own weights", "Do not compile"),
)


def _which(table: tuple[Needless, ...], run: Run) -> Needless | None:
    return next((row for row in table if row.found(run)), None)


def _rule(name: str, table: tuple[Needless, ...]) -> Rule:
    def message(run: Run) -> str:
        row = _which(table, run)
        assert row is not None
        return f"{run.say(row.fact)} cannot be combined with {run.say('zeroth')}: {row.why}"

    def remedy(run: Run) -> str:
        row = _which(table, run)
        assert row is not None
        return row.remedy

    return Rule(name, ("zeroth",), lambda run: _which(table, run) is not None, message, remedy)


def _hosts(run: Run) -> bool:
    return run.host == "weights"


def _field(run: Run, name: str) -> object:
    return (run.fields or {}).get(name)


RULES = (
    _rule("zeroth_backward", NEEDLESS),
    _rule("zeroth_whole", WHOLE),
    Rule(
        "zeroth_sums",
        ("zeroth", "fields"),
        lambda run: _field(run, "lowmem_accumulation") is not None,
        lambda run: (
            f"lowmem_accumulation={_field(run, 'lowmem_accumulation')!r} has no effect with {run.say('zeroth')}: "
            "losses are added up, exactly, and no gradients"
        ),
        "Leave it unset",
    ),
    Rule(
        "zeroth_rest",
        ("zeroth", "fields"),
        lambda run: _field(run, "lowmem_weights") in STORES_AT_REST,
        lambda run: (
            f"lowmem_weights={_field(run, 'lowmem_weights')!r} cannot be combined with {run.say('zeroth')}: a weight "
            "at rest has no values that a pass could move"
        ),
        "Set lowmem_weights='bf16_sr'",
    ),
    Rule(
        "weights_first_order",
        ("host", "optim"),
        lambda run: _hosts(run) and run.zeroth is None,
        lambda run: (
            f"{run.say('host')} cannot be combined with {run.say('optim')}: a backward pass needs each layer's weights "
            "again, and its update a third time, where a method of forward passes needs them once"
        ),
        f"Set optim to one of: {', '.join(STATELESS)}; or leave it unset",
    ),
    Rule(
        "weights_states",
        ("host", "zeroth"),
        lambda run: _hosts(run) and run.zeroth not in STATELESS,
        lambda run: (
            f"{run.say('host')} cannot be combined with {run.say('zeroth')}: its states would stay on the device, and "
            "are as large as the weights"
        ),
        f"Set optim to one of: {', '.join(STATELESS)}; or leave it unset",
    ),
    Rule(
        "weights_corrected",
        ("host", "zeroth", "fields"),
        lambda run: _hosts(run) and _field(run, "lowmem_weights") == "bf16_ecc",
        lambda run: (
            f"{run.say('host')} cannot be combined with lowmem_weights='bf16_ecc': the 8 bits beside each weight would "
            "stay on the device"
        ),
        "Set lowmem_weights='bf16_sr'",
    ),
    Rule(
        "weights_processes",
        ("host", "zeroth", "processes"),
        lambda run: _hosts(run) and (run.processes or 1) > 1,
        lambda run: (
            f"{run.say('host')} cannot be combined with {run.say('processes')}: DDP wants all weights on one device, "
            "and the host would hold the model once for each process"
        ),
        "Train in one process, or leave it unset",
    ),
    Rule(
        "zeroth_window",
        ("zeroth", "accumulation"),
        lambda run: (run.accumulation or 1) > 1 and not ZEROTH[str(run.zeroth)].ACCUMULATES_LOSSES,
        lambda run: (
            f"{run.say('accumulation')} cannot be combined with {run.say('zeroth')}: it tries an update on the batch "
            "that the update is from, and only the last micro-batch is still there"
        ),
        "Set gradient_accumulation_steps=1, or optim='mezo'",
    ),
    Rule(
        "zeroth_budget",
        ("zeroth", "budget"),
        lambda run: True,
        lambda run: (
            f"{run.say('budget')} cannot be combined with {run.say('zeroth')}: what is searched are the settings of "
            "backward passes"
        ),
        "Leave it unset, and ask `hf-lowmem plan` what a step takes",
    ),
    Rule(
        "zeroth_loop",
        ("zeroth", "loop"),
        lambda run: True,
        lambda run: (
            f"{run.say('zeroth')} cannot be used in {run.loop}: the loop that it serves makes backward passes, which "
            "this method has not"
        ),
        "Make the optimizer with hf_lowmem.make_optimizer, prepare it as your own, and call "
        "optimizer.step(lambda: model(**batch).loss); or use a LowMem trainer",
    ),
)
