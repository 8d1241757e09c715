"""`plan(model, args)`: what a training step will take, part by part, before there is a GPU or a weight."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedConfig

from hf_lowmem import rules
from hf_lowmem.memory import human_bytes
from hf_lowmem.optim import ZEROTH
from hf_lowmem.optim.resting import rest
from hf_lowmem.planner.four_bit import quantization_of
from hf_lowmem.planner.methods import Method, method_of
from hf_lowmem.planner.modelled import check_modelled
from hf_lowmem.planner.models import (
    DTYPES,
    Shape,
    find_config,
    layer_count,
    meta_model,
    period_of,
    shapes_of,
    sharing_of,
    with_depth,
)
from hf_lowmem.planner.moments import KEPT, ROUNDING, Moment, NotLinear, edge_of, extrapolate, highest, outline
from hf_lowmem.planner.parallel import spread
from hf_lowmem.planner.parts import PARTS, curve_of
from hf_lowmem.planner.step import EVALUATION, IMPLEMENTATIONS, MICRO_BATCHES, STEPS, simulate_step
from hf_lowmem.planner.words import assumed, in_words
from hf_lowmem.specs import STORES_AT_REST, OptimSpec, check_choice, check_integer

__all__ = ["CUDA_CONTEXT", "Plan", "Point", "config_and_dtype", "plan"]

T = TypeVar("T")

# What a process takes of a GPU before its first tensor: driver, kernels, cuBLAS's workspaces. Not measured: a round
# number for today's cards. It lies outside of the allocator, and so of `peak_bytes`.
CUDA_CONTEXT = 600 * 2**20

DEEP = 3  # depths to extrapolate from
FEW = 12  # layers more than the model has that the shallow models may have together: they prove that it is linear


@dataclass(frozen=True)
class Point:
    """The highest point of one stretch of the step: phase, module, and bytes by part."""

    step: int
    phase: str
    module: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Memory of a training step. Bytes are exact for the tensors of the step; `hf_lowmem.planner.allocations` says
    what they are.

    peak_bytes:   tensors alive at once, at most
    parts:        the same, by part: weights, gradients, states, activations, temporaries, logits, ...
    phase, module: when in the step that is, and where
    saved_bytes:  activations alive when the last backward pass begins
    timeline:     points in the order of the steps, one for each layer, phase and side of the layers
    host_bytes:   of host memory, beside: what `lowmem_offload` keeps there, in each process
    reserved_bytes: peak_bytes with every block rounded up as torch's CUDA allocator does, and the CUDA context. An
                  estimate: fragmentation is not in it
    depths:       layers of the models that were simulated: the model's own, or those it was extrapolated from
    """

    peak_bytes: int
    parts: dict[str, int]
    phase: str
    module: str
    saved_bytes: int
    timeline: Sequence[Point]
    reserved_bytes: int
    depths: tuple[int, ...]
    settings: dict[str, Any]
    notes: Sequence[str] = ()
    seconds: float = 0.0
    host_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        points = [{"step": p.step, "phase": p.phase, "module": p.module, **p.parts} for p in self.timeline]
        return {**vars(self), "timeline": points, "depths": list(self.depths), "notes": list(self.notes)}

    def __str__(self) -> str:
        """The answer in words, what was assumed, and the parts of the peak."""
        rows = sorted(self.parts.items(), key=lambda item: -item[1])
        lines = [f"{name:<16}{human_bytes(size):>12}" for name, size in rows]
        lines += [f"{'peak':<16}{human_bytes(self.peak_bytes):>12}   in {self.phase}, {self.module}"]
        context = "" if self.settings["device"] == "cpu" else " and a CUDA context"
        lines += [f"{'to have free':<16}{human_bytes(self.reserved_bytes):>12}   with rounding{context}"]
        if self.host_bytes:
            lines += [f"{'host memory':<16}{human_bytes(self.host_bytes):>12}   pinned, beside"]
        words = [in_words(self.reserved_bytes, self.settings), f"assumed: {assumed(self.settings)}"]
        return "\n".join([*words, *lines, *(f"- {note}" for note in self.notes)])


@dataclass
class _Job:
    """One question, and the answers so far."""

    config: PreTrainedConfig
    args: Any
    method: Method
    dtype: torch.dtype
    attention: str | None
    accelerator: bool
    implementation: str | None
    peft_config: Any
    progress: Callable[[str], None]
    quantization: Any = None
    gathered: bool = False
    host_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def moments(self, config: PreTrainedConfig) -> tuple[list[Moment], str]:
        measured = simulate_step(
            config,
            self.args,
            self.method,
            dtype=self.dtype,
            attention=self.attention,
            accelerator=self.accelerator,
            implementation=self.implementation,
            peft_config=copy.deepcopy(self.peft_config),
            quantization=self.quantization,
            gathered=self.gathered,
        )
        made = outline(curve_of(measured), measured.live, measured.start, measured.stack)
        self.shapes, self.host_bytes = measured.shapes, measured.live.host
        return made, measured.stack

    def in_full(self) -> tuple[list[Moment], str, tuple[int, ...]]:
        depth = layer_count(self.config)
        self.progress(f"simulating all {depth} layers")
        moments, stack = self.moments(self.config)
        return moments, stack, (depth,)

    def from_shallow(self) -> tuple[list[Moment], str, tuple[int, ...]]:
        """Three shallow models instead of the deep one. Raises NotLinear where that is no whole answer."""
        activations = getattr(self.args, "lowmem_activations", None)
        depth, period = layer_count(self.config), math.lcm(period_of(self.config), *sharing_of(activations))
        if ":" in (activations or ""):
            raise NotLinear("lowmem_activations names layers one by one")
        least = 2 * edge_of(period) + 1  # an inner layer, so that it is seen to be like the others
        lowest = next(d for d in range(least, least + period) if (depth - d) % period == 0)
        depths = tuple(lowest + i * period for i in range(DEEP))
        if sum(depths) > depth + FEW:
            raise NotLinear("the model has few layers")
        found, hosts, stack = {}, {}, ""
        for d in depths:
            self.progress(f"simulating {d} of {depth} layers")
            found[d], stack = self.moments(with_depth(self.config, d))
            hosts[d] = self.host_bytes
        first, second, third = (hosts[d] for d in depths)
        if third - second != second - first:
            raise NotLinear("what is kept in host memory does not grow evenly with the depth")
        hosted = (third - second) * ((depth - depths[-1]) // period)
        self.host_bytes = third + hosted
        made = extrapolate(found, depth, period)
        whole = self.whole_shapes(stack)
        sizes = sum(s.nbytes for s in self.shapes), sum(s.nbytes for s in whole)
        weights = {d: highest(found[d]).values[PARTS.index("weights")] for d in depths}
        grown = (weights[depths[1]] - weights[depths[0]]) * ((depth - depths[-1]) // period)
        if self.args.lowmem_offload == "weights":
            grown += hosted
        if sizes[1] - sizes[0] != grown:
            raise NotLinear("the model's weights do not grow evenly with its depth")
        self.shapes = whole
        return made, stack, depths

    def whole_shapes(self, stack: str, spec: OptimSpec | None = None) -> list[Shape]:
        """The parameters of the whole model, which a model on the meta device has without weighing anything; `spec`:
        of an optimizer that puts them to rest, if not the simulated one does."""
        matmul = None if self.gathered else self.args.lowmem_matmul_spec()
        model = meta_model(self.config, self.dtype, self.peft_config, self.quantization, matmul)
        if spec is None and self.args.lowmem_weights in STORES_AT_REST:
            spec = self.args.lowmem_optim_spec()
        if spec is not None:
            rest(spec, model)
        return shapes_of(model, stack)


def plan(
    model: str | Path | PreTrainedConfig,
    args: Any,
    *,
    dtype: torch.dtype | str | None = None,
    peft_config: Any = None,
    quantization_config: Any = None,
    world_size: int = 1,
    parallel: str | None = None,
    implementation: str | None = None,
    device: str = "cuda",
    extrapolate_depth: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Predict the memory of a training step, by running it on tensors without memory.

    ```python
    args = LowMemSFTConfig("out", max_length=2048, optim="apollo_mini", lowmem_state="8bit")
    print(plan("meta-llama/Llama-3.1-8B", args, dtype="bfloat16"))
    ```

    Args:
        model: a folder with a config.json, such a file, a hub id in the local cache, or a config.
        args: LowMemSFTConfig or LowMemDPOConfig: the trainer, the batch (`per_device_train_batch_size` full rows of
            `max_length`, or pairs of such rows) and all settings.
        dtype: of the weights; None for `model_init_kwargs["dtype"]`, else fp32, as TRL loads them.
        peft_config: as for the trainer.
        quantization_config: as for the trainer: a BitsAndBytesConfig with load_in_4bit, for the base weights under
            `peft_config`; None for `model_init_kwargs["quantization_config"]`, else what the model's config says.
        world_size, parallel: number of processes and how they share the work: "ddp" or "fsdp2". See `parallel`.
        implementation: of torch's AdamW: "for-loop", "foreach" or "fused"; None for the one that `optim` takes.
        device: "cuda", or "cpu" to predict a run on a CPU, where other implementations run.
        extrapolate_depth: whether a deep model may be predicted from shallow ones, where that is exact.
        progress: called with a line of text before each simulation.

    Raises:
        CannotSimulate: naming the operation, for a model whose step depends on its values.
        TypeError, ValueError: naming the argument or field, its value, the reason and the remedy.
    """
    began = time.perf_counter()
    method = method_of(args)
    check_choice("device", device, ("cuda", "cpu"))
    check_integer("world_size", world_size, low=1)
    if implementation is not None:
        check_choice("implementation", implementation, IMPLEMENTATIONS)
    if (world_size > 1) != (parallel is not None):
        raise ValueError(f"world_size={world_size!r} with parallel={parallel!r}: set both, or neither for one process.")
    rules.check(rules.Run.from_arguments(args).with_plan(world_size, parallel))
    init = args.model_init_kwargs or {}
    config, weights = config_and_dtype(model, args, dtype)
    quantization = quantization_of(config, quantization_config or init.get("quantization_config"))
    if quantization is not None and (peft_config is None or parallel == "fsdp2"):
        raise ValueError(
            "quantization_config: 4-bit weights are not trained, and their scales are not sharded. Set peft_config, "
            "and leave parallel='fsdp2' unset."
        )
    check_modelled(args, parallel=parallel)
    job = _Job(
        config=config,
        args=_awake(args) if parallel == "fsdp2" else args,
        method=method,
        dtype=weights,
        attention=init.get("attn_implementation"),
        accelerator=device == "cuda",
        implementation=implementation,
        peft_config=peft_config,
        progress=progress,
        quantization=quantization,
        gathered=parallel == "fsdp2",
    )
    try:
        if not extrapolate_depth:
            raise NotLinear("extrapolate_depth=False")
        moments, stack, depths = job.from_shallow()
    except NotLinear:
        moments, stack, depths = job.in_full()
    if parallel is not None:
        moments = spread(
            moments,
            job.shapes,
            world=world_size,
            parallel=parallel,
            mixed=args.bf16 or args.fp16,
            accumulates=args.gradient_accumulation_steps > 1,
            kept=job.whole_shapes(stack, args.lowmem_optim_spec()) if job.args is not args else (),
            spans=args.optim in ZEROTH,
        )
    moments = [_with_prefetched(m, method.shape(args), args.gradient_accumulation_steps) for m in moments]
    top = highest(moments)
    kept = [m for m in moments if m.phase == KEPT]
    rounded = max(m.total + int(m.values[ROUNDING]) for m in moments)
    return Plan(
        peak_bytes=top.total,
        parts=top.parts(),
        phase=top.phase,
        module=_module(top, stack),
        saved_bytes=kept[-1].parts().get("activations", 0) if kept else 0,
        timeline=_points(moments, stack),
        reserved_bytes=rounded + (CUDA_CONTEXT if device == "cuda" else 0),
        depths=depths,
        settings=_settings(config, args, job, world_size, parallel, device),
        notes=[*job.notes, *_notes(args, method)],
        seconds=time.perf_counter() - began,
        host_bytes=job.host_bytes,
    )


def _awake(args: T) -> T:
    """The same settings with plain bf16 weights in the place of weights at rest: as layers run, and an update rounds,
    whose weights FSDP2 gathers. Others themselves."""
    if getattr(args, "lowmem_weights", None) not in STORES_AT_REST:
        return args
    plain = copy.copy(args)
    vars(plain)["lowmem_weights"] = "bf16_sr"
    return plain


def config_and_dtype(
    model: str | Path | PreTrainedConfig, args: Any, dtype: torch.dtype | str | None
) -> tuple[PreTrainedConfig, torch.dtype]:
    """The config that `plan` plans, and the weights' dtype. See there for the arguments."""
    wanted = dtype if dtype is not None else (args.model_init_kwargs or {}).get("dtype", "float32")
    config = find_config(model, args.model_init_kwargs, trust_remote_code=getattr(args, "trust_remote_code", False))
    if wanted == "auto":
        wanted = config.dtype or "float32"
    if isinstance(wanted, str):
        check_choice("dtype", wanted, DTYPES)
        wanted = DTYPES[wanted]
    return config, wanted


def _with_prefetched(moment: Moment, shape: tuple[int, int], accumulation: int) -> Moment:
    """The trainer fetches all micro-batches of a step ahead; two of them were simulated."""
    missing = accumulation - MICRO_BATCHES
    if missing <= 0 or moment.phase == EVALUATION:
        return moment
    values = moment.values.copy()
    inputs = PARTS.index("inputs")
    values[inputs] += values[inputs] // MICRO_BATCHES * missing
    return Moment(moment.mark, moment.phase, moment.layer, moment.inside, moment.before, values)


def _notes(args: Any, method: Method) -> list[str]:
    """Assumptions of a plan about the data, where they matter much."""
    rows, tokens = method.shape(args)
    notes = []
    if method.has_documents(args):
        notes.append(
            f"a micro-batch is one row of {rows * tokens:,} tokens in several documents: the mask that keeps them "
            "apart in sdpa and eager attention grows with the square of it; flash attention has none"
        )
    if getattr(args, "lowmem_share_prompt", False):
        notes.append("prompts are taken to have no token in common, the most that a pair can need")
    return notes


def _module(moment: Moment, stack: str) -> str:
    if moment.layer is not None:
        return f"{stack}.{moment.layer}" + (f".{moment.inside}" if moment.inside else "")
    if moment.phase not in ("forward", "backward", KEPT, EVALUATION):
        return "all parameters"
    around = not moment.inside or stack.startswith(f"{moment.inside}.")
    return "the loss and its head" if around else moment.inside


def _points(moments: Sequence[Moment], stack: str) -> list[Point]:
    points, step, last = [], 1, ""
    for moment in moments:
        step += last == "end" and moment.phase == "forward"
        last = moment.phase
        points.append(Point(step, moment.phase, _module(moment, stack), moment.parts()))
    return points


def _settings(
    config: PreTrainedConfig, args: Any, job: _Job, world_size: int, parallel: str | None, device: str
) -> dict[str, Any]:
    rows, tokens = job.method.shape(args)
    return {
        "model_type": config.model_type,
        "layers": layer_count(config),
        "dtype": str(job.dtype).removeprefix("torch."),
        "sequences": rows,
        "tokens": tokens,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "optim": str(getattr(args.optim, "value", args.optim)),
        "implementation": job.implementation,
        "lowmem": {k: v for k, v in vars(args).items() if k.startswith("lowmem_") and v not in (None, False)},
        "world_size": world_size,
        "parallel": parallel,
        "device": device,
        "steps_simulated": STEPS,
        "trained": sum(s.numel for s in job.shapes if s.trained),
        "parameters": int(np.sum([s.numel for s in job.shapes])),
    }
