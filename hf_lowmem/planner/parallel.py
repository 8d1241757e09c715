"""Several processes: what each of them holds, as a formula over one process's moments.

A fake process group would have to be a GPU's to take the paths that matter (streams, prefetching), so this is a model,
and it says what it assumes.

ddp     torch's DistributedDataParallel as accelerate makes it. Its buckets are copies of the gradients
        (`gradient_as_bucket_view` is False), are made in the first backward pass and stay: one more set of gradients,
        at every moment.

fsdp2   `fully_shard` on every decoder layer and on the rest, as accelerate does with fsdp_version 2.
        - Weights, gradients and states are cut along the first dimension: ceil(rows / N) rows of each.
        - Under bf16=True or fp16=True accelerate keeps the shards of trained weights, their gradients and states in
          fp32, and gathers layers in the compute dtype. Without, all have the model's dtype.
        - Shards of weights at rest in int8 are codes and scales, where N divides their rows. A layer's codes are
          gathered twice over, flat and cut into weights, which is what two layers in bf16 are; bf16 is what it gets.
        - What does not belong to a layer (embeddings, head, last norm) is gathered in the first forward pass and stays
          so until its backward has ended; TRL's fused head gathers the head's weight once more.
        - In a layer two layers are gathered: it and the next one, which is prefetched.
        - In backward, beside the shards of the gradients that are finished: the layer's whole gradient and the flat
          buffer that is reduced from it; the head's whole gradient until the end, when what belongs to no layer is
          reduced together.
        - With gradient accumulation accelerate does not reduce until the last micro-batch (`no_sync`), so that whole
          gradients are kept: sharding saves nothing of them then.
        - The optimizer's temporaries are those of shards: 1/N of one process's. A method of zeroth order, which steps
          a span of values at a time, has those of one process at most, and is taken to have them.
"""

from collections.abc import Sequence
from dataclasses import replace

from hf_lowmem.planner.models import Shape
from hf_lowmem.planner.moments import KEPT, Moment
from hf_lowmem.planner.parts import PARTS
from hf_lowmem.planner.step import EVALUATION
from hf_lowmem.specs import check_choice, check_integer

__all__ = ["PARALLEL", "spread"]

PARALLEL = ("ddp", "fsdp2")
WEIGHTS, STATES, GRADIENTS, TEMPORARIES = (PARTS.index(p) for p in ("weights", "states", "gradients", "temporaries"))
BUFFERS = PARTS.index("communication")


def spread(
    moments: Sequence[Moment],
    shapes: Sequence[Shape],
    *,
    world: int,
    parallel: str,
    mixed: bool,
    accumulates: bool,
    kept: Sequence[Shape] = (),
    spans: bool = False,
) -> list[Moment]:
    """The moments of one of `world` processes. `mixed`: whether bf16 or fp16 is on; `accumulates`: whether a step has
    several micro-batches; `kept`: the parameters as FSDP2's shards keep them, where that is another form; `spans`:
    whether an update goes through a weight a span at a time, as zeroth order does."""
    check_choice("parallel", parallel, PARALLEL)
    check_integer("world_size", world, low=1)
    if parallel == "fsdp2":
        sharding = _Sharding(shapes, world, mixed, accumulates, kept or shapes, spans)
        return [sharding(moment) for moment in moments]
    buckets = sum(s.nbytes for s in shapes if s.trained) if world > 1 else 0
    made = []
    for moment in moments:
        values = moment.values.copy()
        values[BUFFERS] += buckets
        made.append(replace(moment, values=values))
    return made


class _Sharding:
    """FSDP2, as a function of a moment. Called with the moments in the order of the step."""

    def __init__(
        self, shapes: Sequence[Shape], world: int, mixed: bool, accumulates: bool, forms: Sequence[Shape], spans: bool
    ) -> None:
        trained = [s for s in shapes if s.trained]
        layers = 1 + max((s.layer for s in shapes if s.layer is not None), default=0)
        self.accumulates, self.spans = accumulates, spans
        self.of_layer = [sum(s.nbytes for s in shapes if s.layer == i) for i in range(layers)]
        self.trained_of_layer = [sum(s.nbytes for s in trained if s.layer == i) for i in range(layers)]
        self.outside = sum(s.nbytes for s in shapes if s.layer is None)
        self.trained_outside = sum(s.nbytes for s in trained if s.layer is None)
        self.head = max((s.nbytes for s in shapes if s.layer is None), default=0)
        kept = sum(_shard(s, form, world, mixed) for s, form in zip(shapes, forms, strict=True))
        self.weights = kept - sum(s.nbytes for s in shapes)
        whole = sum(s.nbytes for s in trained)
        shards = sum(s.shard(world) * (4 if mixed else s.itemsize) for s in trained)
        self.ratio = shards / whole if whole else 0.0
        self.head_gradient = 0

    def __call__(self, moment: Moment) -> Moment:
        values = moment.values.copy()
        whole = int(values[GRADIENTS])
        values[WEIGHTS] += self.weights
        values[STATES] = round(values[STATES] * self.ratio)
        values[GRADIENTS] = round(whole * self.ratio)
        if moment.phase == "optimizer" and not self.spans:
            values[TEMPORARIES] = round(values[TEMPORARIES] * self.ratio)
        elif moment.phase == EVALUATION:
            values[BUFFERS] += self.gathered(moment)
        elif moment.phase in ("forward", "backward", KEPT):
            values[BUFFERS] += self.gathered(moment)
            values[GRADIENTS] += whole if self.accumulates else 0
        if moment.phase == "backward":
            values[GRADIENTS] += self.in_the_making(moment, whole)
        return replace(moment, values=values)

    def gathered(self, moment: Moment) -> int:
        """Bytes of weights that are whole."""
        if moment.layer is None:
            return self.outside + self.head
        following = moment.layer + (-1 if moment.phase == "backward" else 1)
        prefetched = self.of_layer[following] if 0 <= following < len(self.of_layer) else 0
        return self.outside + self.of_layer[moment.layer] + prefetched

    def in_the_making(self, moment: Moment, whole: int) -> int:
        """Bytes of gradients that are whole, and of the buffers they are reduced from."""
        if moment.layer is not None:
            return self.head_gradient + 2 * self.trained_of_layer[moment.layer]
        if moment.before:
            self.head_gradient = min(whole, self.trained_outside)
            return self.head_gradient
        return 2 * self.trained_outside


def _shard(shape: Shape, form: Shape, world: int, mixed: bool) -> float:
    """Bytes of the largest shard of a parameter that is kept as `form`."""
    if form is shape or form.itemsize == shape.itemsize or shape.shape[0] % world:
        return shape.shard(world) * (4 if mixed and shape.trained else shape.itemsize)
    # Beside codes a parameter at rest has one value that is shown, which a shard has not.
    return (form.nbytes - shape.itemsize) / world
