"""Five lines in which `lowmem="auto"` says what it chose."""

from hf_lowmem.memory import human_bytes
from hf_lowmem.planner.search.explain import assumed, describe, in_loss, rate_of
from hf_lowmem.planner.search.losses import BOUND, total
from hf_lowmem.planner.search.ranking import Found
from hf_lowmem.training.sft import LowMemSFTConfig

__all__ = ["auto_lines"]


def auto_lines(found: Found, whence: str, args: LowMemSFTConfig) -> str:
    """Five lines of `lowmem="auto"`: what was chosen, in what memory, what it costs in loss and in time, how to pin it.

    Args:
        found: the answer of a search, `ranking.Found`.
        whence: where its budget is from.
        args: as they were before.
    """
    cost = total(found.losses)
    known = "" if cost is None else f"{cost:.2f} % at most, of {BOUND:g} % that auto allows: "
    other = str(getattr(args.optim, "value", args.optim)) != str(found.args.optim)
    rate = rate_of(found.args.optim) if other else None
    beside = "; other rules were not compared in fine-tuning" if other and rate else ""
    return "\n".join(
        (
            f"lowmem='auto' chose: {describe(found.chosen)}",
            f"memory: needs {human_bytes(found.plan.reserved_bytes)} of {human_bytes(found.budget)} ({whence}), for "
            f"{assumed(found.plan)}",
            f"loss: {known}{in_loss(found.losses)}{beside}{f'; {rate}' if rate else ''}",
            f"time: a step takes {found.time:.2f} of what the fastest of these settings without any limit of memory "
            "would, by a cost model of a nominal device",
            f"to pin it: leave lowmem unset, and set {describe(found.chosen)}",
        )
    )
