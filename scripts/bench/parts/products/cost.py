"""Time of a decoder layer's linears, and of a step, with products in 8 bits: a model of an H100, not a measurement.

A product takes its operations at 60 % of the data sheet's dense rate in bf16 (990 TFLOP/s) and at 45 % in fp8 (1,979),
whose products of rows with scales reach less of theirs: 1.5 times as fast, which is assumed. A cast moves its
bytes at 80 % of 3.35 TB/s: x is read and its code is written once for all linears that share it, a weight and g as
often as they are coded; the second read inside of a cast is a cache's. Every launch beyond bf16's takes 4 microseconds,
hidden by nothing. Beside the linears a step has attention, at 40 % of bf16's rate, what norms and activations move, and
the head; these are the same for both.
"""

from collections.abc import Iterator

from parts.record import Row

BF16, FP8 = 990e12 * 0.6, 1979e12 * 0.45
BANDWIDTH = 3.35e12 * 0.8
LAUNCH = 4e-6
HIDDEN, FFN, KEYS, LAYERS, VOCABULARY = 4096, 14336, 1024, 32, 128256
# Linears of a layer that share an input: (inputs, outputs of each).
GROUPS = ((HIDDEN, (HIDDEN, KEYS, KEYS)), (HIDDEN, (HIDDEN,)), (HIDDEN, (FFN, FFN)), (FFN, (HIDDEN,)))
LINEARS = [(inputs, n) for inputs, outputs in GROUPS for n in outputs]


def products(tokens: int, rate: float) -> float:
    """Seconds of the three products of a layer's linears."""
    return sum(6 * tokens * k * n for k, n in LINEARS) / rate


def casts(tokens: int, codes_kept: bool) -> float:
    """Seconds of what a layer casts. `codes_kept`: x need not be coded again in backward, its codes are turned."""
    moved = launches = 0.0
    for inputs, outputs in GROUPS:
        again = 2 if codes_kept else 3
        moved += tokens * inputs * (3 + again * len(outputs))
        launches += 1 + len(outputs)
        for n in outputs:
            moved += 2 * 3 * inputs * n + 2 * 3 * tokens * n  # W forward and backward, g with either fold
            launches += 4
    return moved / BANDWIDTH + launches * LAUNCH


def around(tokens: int) -> float:
    """Seconds of the rest of a layer's step and of the layer's share of the head."""
    attention = 3.5 * 2 * tokens * tokens * HIDDEN / (990e12 * 0.4)
    elementwise = 60 * tokens * HIDDEN * 2 / BANDWIDTH
    head = 6 * tokens * HIDDEN * VOCABULARY / BF16 / LAYERS
    return attention + elementwise + head


def cost_rows() -> Iterator[Row]:
    """For 2,048 to 16,384 tokens in one sequence: speed beside bf16, of the linears and of a step."""
    for tokens in (2048, 8192, 16384):
        plain, rest = products(tokens, BF16), around(tokens)
        ours = products(tokens, FP8) + casts(tokens, codes_kept=True)
        yield {
            "case": "Llama-3-8B on an H100, modelled",
            "tokens": tokens,
            "casts": casts(tokens, codes_kept=True) / ours,
            "linears": plain / ours,
            "step": (plain + rest) / (ours + rest),
            "break_even": break_even(),
        }


def break_even() -> int:
    """Tokens from which the linears of a layer take less time from codes."""
    return next(t for t in range(64, 1 << 14, 64) if products(t, FP8) + casts(t, codes_kept=True) < products(t, BF16))
