"""Choice of the kernels' implementation, by the environment or in a block."""

import contextlib
import os
from collections.abc import Iterator

from hf_lowmem.specs import check_choice

IMPLS = ("auto", "reference", "triton", "cpu")
VARIABLE = "HF_LOWMEM_KERNELS"
_forced: list[str] = []


def current_impl() -> str:
    """The choice by `use_kernels` or HF_LOWMEM_KERNELS. Raises ValueError for a value that is none of IMPLS."""
    if _forced:
        return _forced[-1]
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return "auto"
    check_choice(VARIABLE, asked, IMPLS)
    return asked


@contextlib.contextmanager
def use_kernels(impl: str) -> Iterator[None]:
    """Force one implementation of every kernel inside the block: "auto", "reference", "triton" or "cpu".

    ```python
    with use_kernels("reference"):
        optimizer.step()
    ```
    For the whole process: the choice is not kept by thread, as autograd runs backward in threads of its own.
    """
    check_choice("impl", impl, IMPLS)
    _forced.append(impl)
    try:
        yield
    finally:
        _forced.pop()
