"""Cost of a combination in time: a stated model of a nominal device, not a measurement.

Only the order of combinations is asked of it, so its unit is the floating-point operation of a matrix product, and it
counts, for one token:

    forward and backward    2 FLOPs a weight forward, 2 for the input's gradient, 2 for a trained weight's; and causal
                            attention's 2 * tokens * hidden a layer
    computing again         checkpointing and checkpoint_fp8 run the layers' forward pass once more, fp8_recompute the
                            MLP's gate and up products
    bytes                   what is kept for backward is written and read. Norms and activations that are computed again
                            are written and read once more. An fp8 codec reads 2 bytes a value and writes 1, and back
    weights at rest         decoded each time that a layer runs, forward, again and backward: 1 byte read, 2 written and
                            2 read
    products in 8 bits      EIGHT times as fast as others, of calls and weights that `lowmem_matmul` takes; each reads
                            the values of an operand and of a weight, and writes codes: 3 bytes a value
    the update              weights and states read and written, gradients read; clipping reads and writes them once
                            more, each further micro-batch reads and writes them too; a codec's arithmetic, per value of
                            a state; a projection; muon's five steps of Newton and Schulz on each matrix of a layer
    a micro-batch           costs as much as so many tokens more: launches, and products too small to fill the device

Four numbers turn all this into one, and none was measured: RATIO operations of a matrix product take as long as a
byte of memory (an H100's 990 TFLOP/s of dense bf16 over 3.35 TB/s are 300; half of the peak is common, so 150); one
operation outside of matrix products takes as long as VECTOR of those in them; a micro-batch costs MICRO_BATCH tokens;
and EIGHT, for products whose rows have scales.
Time between processes is left out: it is alike for all combinations, but for gradients' reduction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hf_lowmem.codecs import codec_pair
from hf_lowmem.matmul.spec import LEAST, MatmulSpec
from hf_lowmem.optim import OPTIMIZERS
from hf_lowmem.optim.muon import STEPS
from hf_lowmem.planner.models import Shape, layer_count
from hf_lowmem.planner.search.space import AS_IS, CHECKPOINTING, Choice, layers_by_tier
from hf_lowmem.specs import STORES_AT_REST, STREAMED

__all__ = ["Work", "cost_a_token"]

RATIO = 150
VECTOR = 16
EIGHT = 1.5
MICRO_BATCH = 256
REST_BYTES = 5  # a weight: its code read, its value written and read
CODEC_BYTES = 6  # a value: 2 read and 1 written to encode, 1 read and 2 written to decode
# Operations to decode and encode a value of a state, counted roughly from hf_lowmem.kernels.codecs.
CODEC_WORK = {"fp32": 0, "bf16": 4}
CODEC_WORK_OTHERS = 30
AGAIN = (CHECKPOINTING, "checkpoint_fp8", *STREAMED)  # policies that run a layer's forward pass once more
CODE_BYTES = 3  # a value: 2 read and 1 written
MANY = 1 << 16  # values, so that a codec's scales count as they do in a large tensor


@dataclass(frozen=True)
class Work:
    """A model's, for one token, in FLOPs unless said otherwise.

    forward: of all products; layers: of those in the layers; gate_up: of MLPs' gate and up; trained: part of the
    weights in products whose gradients are computed; trained_values, trained_bytes: of all trained parameters;
    orthogonal: of muon's iterations in one step, not for one token; eight: of the layers' products that 8-bit codes may
    make, operands: bytes that one product's codes take for a token, recoded: for the weights once, least: tokens of a
    call from which they are made so
    """

    forward: float
    layers: float
    gate_up: float
    trained: float
    trained_values: int
    trained_bytes: int
    orthogonal: float = 0.0
    eight: float = 0.0
    operands: float = 0.0
    recoded: float = 0.0
    least: int = 0

    @classmethod
    def of(
        cls, config: PreTrainedConfig, shapes: Sequence[Shape], tokens: int, matmul: MatmulSpec | None = None
    ) -> "Work":
        """Work of a model, from its parameters' shapes. Only the experts that a token meets are counted."""
        text: Any = config.get_text_config()
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
        met = (getattr(text, "num_experts_per_tok", None) or experts) / experts
        active = lambda s: s.numel * (met if len(s.shape) == 3 else 1)  # noqa: E731
        products = [s for s in shapes if len(s.shape) >= 2]
        in_layers = [s for s in products if s.layer is not None]
        inner = getattr(text, "intermediate_size", None)
        first = [s for s in in_layers if inner and len(s.shape) == 2 and s.shape[0] in (inner, 2 * inner)]
        outside = max((s.numel for s in products if s.layer is None), default=0)  # the head; a look-up is no product
        attention = 2.0 * tokens * getattr(text, "hidden_size", 0) * layer_count(config)
        layers = 2.0 * sum(map(active, in_layers)) + attention
        weights = sum(map(active, in_layers)) + outside
        trained = [s for s in shapes if s.trained]
        least = LEAST if matmul is None or matmul.least is None else matmul.least
        coded = [s for s in in_layers if matmul is not None and len(s.shape) == 2 and s.numel >= least * least]
        return cls(
            forward=layers + 2.0 * outside,
            layers=layers,
            gate_up=2.0 * sum(s.numel for s in first),
            trained=min(1.0, sum(active(s) for s in trained if len(s.shape) >= 2) / max(weights, 1)),
            trained_values=sum(s.numel for s in trained),
            trained_bytes=sum(s.nbytes for s in trained),
            eight=2.0 * sum(s.numel for s in coded),
            operands=CODE_BYTES * sum(sum(s.shape) / 2 for s in coded),
            recoded=float(CODE_BYTES * sum(s.numel for s in coded)),
            least=least,
            orthogonal=sum(map(_newton_schulz, (s for s in trained if s.layer is not None and len(s.shape) >= 2))),
        )


def _newton_schulz(shape: Shape) -> float:
    """FLOPs of muon's iteration on one weight, of each of its matrices: a Gram matrix, its square, and their product
    with the weight, in each step."""
    *many, rows, columns = shape.shape
    small, large = sorted((rows, columns))
    return STEPS * math.prod(many) * (4.0 * small * small * large + 2.0 * small**3)


def cost_a_token(choice: Choice, work: Work, states: int, tokens: int, depth: int, kept: Mapping[str, float]) -> float:
    """Operations' worth of time for one token.

    Args:
        states: bytes that the optimizer holds.
        tokens: of a micro-batch.
        kept: bytes kept for backward a token, of all layers under one policy, of the policies that are candidates.
    """
    tiers = layers_by_tier(choice.activations, depth)
    saved = _saved(work, tokens)
    passes = (work.forward - saved) * (2 + work.trained)
    for tier in dict.fromkeys(tiers):
        share = tiers.count(tier) / depth
        again = _again(tier, work)
        again -= saved * min(1.0, again / work.layers) if again else 0.0
        passes += share * (again + RATIO * _moved(tier, kept))
    fixed = passes * MICRO_BATCH / tokens
    if choice.weights in STORES_AT_REST:
        times = 2 + sum(_again(tier, work) > 0 for tier in tiers) / depth
        fixed += RATIO * REST_BYTES * times * work.trained_values / tokens
    return passes + fixed + _update(choice, work, states) / (tokens * choice.accumulation)


def _saved(work: Work, tokens: int) -> float:
    """FLOPs that one pass of the layers' products takes less by 8-bit codes; below 0 where the codes cost more."""
    if not work.eight or tokens < work.least:
        return 0.0
    return work.eight * (1 - 1 / EIGHT) - RATIO * (work.operands + work.recoded / tokens)


def _again(tier: str, work: Work) -> float:
    """FLOPs of products that are computed twice."""
    tier, _, every = tier.partition("/")
    if tier in AGAIN:
        return work.layers * (2 - 1 / int(every or 1))
    return work.gate_up if tier == "fp8_recompute" else 0.0


def _moved(tier: str, kept: Mapping[str, float]) -> float:
    """Bytes that layers move for what is kept."""
    plain = 2 * kept.get(AS_IS, 0.0)
    if tier == AS_IS:
        return plain
    if tier.partition("/")[0] in AGAIN:
        again = plain
    else:
        again = max(0.0, plain - 2 * kept.get("exact", 0.0))
    return plain + again + (CODEC_BYTES * kept[tier] if "fp8" in tier else 0.0)


def _update(choice: Choice, work: Work, states: int) -> float:
    """Cost of the optimizer's update in one step, in FLOPs."""
    weights = gradients = work.trained_bytes
    moved = 2 * weights + gradients + 2 * states
    moved += 2 * gradients if choice.max_grad_norm else 0
    moved += 2 * gradients * (choice.accumulation - 1)
    codecs = codec_pair(choice.state or "fp32")
    coded = sum(codec.nbytes(MANY, signed=signed) for codec, signed in zip(codecs, (True, False), strict=True))
    values = states * 2 * MANY / coded
    coding = sum(CODEC_WORK.get(codec.name, CODEC_WORK_OTHERS) for codec in codecs) / 2
    rule = OPTIMIZERS.get(choice.optim)
    rank = rule.DEFAULTS.get("rank", 0) if rule is not None else 0  # a projection is 2 FLOPs a weight and row
    products = 2 * rank * work.trained_values + (work.orthogonal if choice.optim == "muon" else 0.0)
    return RATIO * moved + VECTOR * coding * values + products
