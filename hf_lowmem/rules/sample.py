"""Rules of `lowmem_sample`: what keeps no inputs of linears, or stands where they are multiplied."""

from hf_lowmem.rules.rule import Rule, apart
from hf_lowmem.rules.run import Run
from hf_lowmem.specs import STORES_AT_REST

__all__ = ["RULES"]

UNSET = "Leave lowmem_sample unset"
NO_INPUT = "a linear's input, of which it would keep a sample, is computed again and not kept at all"


def _rests(run: Run) -> bool:
    return run.sample is not None and run.ours and (run.fields or {}).get("lowmem_weights") in STORES_AT_REST


def _replicated(run: Run) -> bool:
    return run.sample is not None and (run.n_gpu or 0) > 1


def _on_deepspeed(run: Run) -> bool:
    return run.sample is not None and run.engine == "deepspeed"


RULES = (
    Rule(
        "sample_loop",
        ("loop", "sample"),
        lambda run: True,
        lambda run: (
            f"{run.say('sample')} has no effect in {run.loop}: at which step a loop is, and so its draws, is not known"
        ),
        UNSET,
    ),
    apart("zeroth", "sample", "nothing is kept for a backward pass", UNSET),
    apart("tiers", "sample", NO_INPUT, UNSET),
    apart("checkpointing", "sample", NO_INPUT, "Set gradient_checkpointing=False, or leave lowmem_sample unset"),
    apart("matmul", "sample", "both say from what a linear's weight gets its gradient", "Set one of the two"),
    apart("compile", "sample", "the number of the step, on which draws depend, would be compiled in", UNSET),
    apart("n_gpu", "sample", "DataParallel's replicas would share the first one's linears", UNSET, when=_replicated),
    apart("engine", "sample", "it was not tried on weights that its engine holds", UNSET, when=_on_deepspeed),
    Rule(
        "sample_rest",
        ("sample", "fields", "optim"),
        _rests,
        lambda run: (
            f"{run.say('sample')} cannot be combined with lowmem_weights={(run.fields or {}).get('lowmem_weights')!r}: "
            "weights at rest make their products themselves"
        ),
        UNSET,
    ),
)
