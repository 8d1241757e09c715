"""bitsandbytes' 4-bit layers on a CPU, kept such that they have a backward pass after an evaluation.

On a CPU with AVX512-BF16 a `Linear4bit` that runs in eval mode without gradients (an evaluation, generation, the
reference of DPO) lays its weight out anew for a faster product, for good. From then on training goes through that
product, too, which has no backward pass: no gradient reaches what stands before the layer, and nothing is raised
(bitsandbytes 0.50). The layer has an attribute that says whether the CPU can; here it says no.

And adapters on such layers, which TRL trains in bf16: PEFT loads a checkpoint's in fp32, with the same values, and a
resumed run would go on in another dtype than the one that was interrupted.
"""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

__all__ = ["keep_backward", "keep_dtypes"]


def keep_backward(model: nn.Module | None) -> None:
    """Let 4-bit layers keep the layout that has a backward pass, and take it back where they have left it."""
    for module in model.modules() if model is not None else ():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            vars(module)["support_avx512bf16_for_cpu"] = False
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                module.state_dict()  # which bitsandbytes makes of the first layout, in place


@contextmanager
def keep_dtypes(model: nn.Module | None) -> Generator[None]:
    """Give trained parameters the dtype again that they have now, should they be loaded in a wider one."""
    before = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad} if model is not None else {}
    yield
    for name, p in model.named_parameters() if model is not None else ():
        if name in before and p.dtype != before[name]:
            p.data = p.data.to(before[name])
