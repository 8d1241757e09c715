"""What each case of `compile_cases()` has to do: values of a thread, bytes of a value, counted for large tensors."""

from hf_lowmem.kernels.apollo.triton import COLUMNS, ROWS
from hf_lowmem.kernels.codecs.triton import TILE
from hf_lowmem.kernels.glu.triton import TILE as GLU_GROUPS
from hf_lowmem.kernels.quantize.triton import TILE_VALUES
from hf_lowmem.kernels.step.triton import CHECK_BLOCK
from parts.kernel_targets.ahead import CompileCase
from parts.limits.model import Work

NORM = 4096  # values of a row, as in rmsnorm/triton.py
SAVED = {"e4m3": 1 + 2 / 128, "int8": 1 + 2 / 32}
# Bytes of a value in a state, of first moments and of second ones.
STATES = {
    "fp32": (4.0, 4.0),
    "int8": (1 + 4 / 256, 1 + 4 / 256),
    "int8_softsign": (1 + 2 / 64, 1 + 4 / 64),
    "fp8_expand": (1 + 5 / 128, 1 + 5 / 128),
}


def work_of(case: CompileCase) -> Work | None:
    """None for what is small beside the rest of its step: sums of parts, factors, many small parameters at once."""
    threads = 32 * case.warps
    words = case.label.split()
    if case.kernel in ("adamw", "lion"):
        if "many" in words:
            return None
        return _step(words, threads)
    if case.kernel == "codecs":
        state = 4 + STATES[words[1]][0 if words[2] == "signed" else 1]
        return Work(TILE / threads, state, state)
    if case.kernel == "quantize":
        size = 2 + SAVED[words[1]]
        return Work(TILE_VALUES / threads, size, size)
    if case.kernel == "glu":
        return _glu(words, GLU_GROUPS * 128 / threads)
    if case.kernel == "rmsnorm":
        return _norm(words, threads)
    if words[0] in ("step", "norm"):
        size = 2.0 if words[0] == "norm" else 8.0 if words[-1] == "bf16_ecc" else 6.0
        return Work(ROWS.value * COLUMNS.value / threads, size, size, loop=words[0] == "norm")
    return None


def _step(words: list[str], threads: int) -> Work:
    if words[0].startswith("check"):
        return Work(CHECK_BLOCK.value / threads, 0.0, 2.0, loop=True)
    rule, codecs, store = words
    first, *rest = codecs.split(",")
    second = (rest or [first])[0]
    least = 6.0 + (2 if store == "bf16_ecc" else 0) + 2 * STATES[first][0]
    if rule != "lion":
        least += 2 * STATES[second][1]
    return Work(_tile(threads), least, least + 2)  # the check has read the gradient


def _tile(threads: int) -> float:
    return TILE / threads


def _glu(words: list[str], values: float) -> Work:
    saved = 2 * SAVED["e4m3"]
    if words[0] == "glu_save":
        size = 6 + saved
    else:
        size = (saved if "saved" in words else 4.0) + (6.0 if words[0] == "glu_backward" else 2.0)
    return Work(values, size, size)


def _norm(words: list[str], threads: int) -> Work | None:
    if "parts" in words:
        return None
    backward = words[0] == "rmsnorm_backward"
    size = (2.0 if words[0] == "rmsnorm_again" else 4.0) + SAVED["e4m3"]
    size += 4.0 if "residual" in words else 2.0 if "total" in words else 0.0
    return Work(NORM / threads, size, size, loop=backward)
