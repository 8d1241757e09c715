"""convert(model, tier) and undo(model): from structure to forwards and back.

The state of a conversion is the forwards themselves: instance attributes of modules, found again by walking the model.
There is no registry to go stale when a model is copied, wrapped by PEFT, DDP or FSDP2, or pickled.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from hf_lowmem.activations.blocks import (
    Block,
    Cheap,
    GatedMLP,
    Layer,
    Norm,
    Patch,
    Projection,
    patches,
    put_back,
    take_out,
)
from hf_lowmem.activations.checkpoint import wrap_layer
from hf_lowmem.activations.detect import Structure, find_repeated, find_stack, routing_of, structure_of
from hf_lowmem.activations.fusable import gated_of, rmsnorm_of
from hf_lowmem.activations.hooks import wrap_module
from hf_lowmem.activations.host import HostStore
from hf_lowmem.activations.report import LayerReport, Report
from hf_lowmem.activations.seeds import Seeds
from hf_lowmem.activations.streaming.able import check_streamed, why_not_streamed
from hf_lowmem.activations.streaming.chains import Sharing
from hf_lowmem.activations.streaming.masks import MaskMaker
from hf_lowmem.activations.streaming.tier import wrap_streamed
from hf_lowmem.activations.tape import FORMATS_OF_TIER
from hf_lowmem.reasons import INSIDE_CHECKPOINT, NO_CHECKPOINT
from hf_lowmem.specs import INPUT_TIERS, STREAMED, ActivationSpec

__all__ = ["at_step", "convert", "undo"]

NOT_STREAMED = "not streamed but checkpointed: "


def convert(model: nn.Module, tier: str | ActivationSpec) -> Report:
    """Let `model` keep less for its backward pass. Changes the model in place; `undo(model)` takes it back.

        report = convert(model, "fp8")                              # or "fp8:0-11,checkpoint_fp8:12-"
        print(report)                                               # what is handled, what is not and why

    tier, and U a layer of a Llama-2-7B / Llama-3-8B shape in bf16 (U = tokens x hidden x 2 bytes; plain 22.8 / 24.5):
        exact            11.4 / 11.5   gradients equal bit for bit; norms, activations and products are computed again
        fp8               5.9 /  5.9   the same set, compressed: E4M3, q, k, v and attention's output int8
        fp8_recompute     3.2 /  2.4   without gate and up, whose matrix products run again
        checkpoint_fp8    0.5 /  0.5   the layer's input, compressed; the layer runs again
        hooks_fp8                      whatever is saved, compressed: for layers that are not recognised
        stream            1.0 / 1.0   the layer's input; it runs by chunks of tokens, and inside of a layer is one chunk
        stream_fp8        0.5 / 0.5   the same, its input compressed
        stream_fp8/4                   the same, of every fourth layer; those between run forward once more

    `checkpoint_fp8` and `hooks_fp8` need to know nothing about a layer: in a model without attention and MLPs that are
    recognised they take its longest list of modules, and `hooks_fp8` the model's own parts where there is no list.

    Start with `fp8`, or with `checkpoint_fp8` where layers are checkpointed today. The forward pass is HuggingFace's in
    every tier: same modules, same order, loss equal bit for bit.
    On a GPU with Triton there is one exception: the tiers that round leave plain RMSNorms and act(gate) * up, with the
    codes of what they keep, to a kernel each (hf_lowmem/kernels), one pass over memory for a dozen. It rounds where
    HuggingFace rounds; what may differ is the last bits of an fp32 sum and of an exponential before that.
    Eval mode and no_grad run the untouched forward, but for shared prompts in streams. Names, state_dict and saved
    checkpoints do not change; a converted model can be copied and pickled. Weights may be frozen, tied, quantised
    (bitsandbytes), or have LoRA adapters: convert after PEFT has wrapped the model, so that the adapters' dropouts are
    seen. Converting again with the same tier changes nothing, with another one it replaces the first.

    Under autocast the residual stream is fp32, so `exact` keeps 13.4 of 39.9 U (512 tokens, copies of the weights
    included, which are not kept). `eager` attention keeps its (T, T) probabilities; use sdpa or flash. Where a layer's
    input has no gradient (LoRA's first layer) casts cannot be proved: with fp32 adapters on a bf16 model that layer
    keeps 16.8 U instead of 11.7. Under torch.compile the layers run eagerly, between graph breaks. Not for
    nn.DataParallel, whose replicas share the forwards of the first.

    Raises:
        TypeError, ValueError: for a tier that does not exist, a layer that does not exist, a model in which nothing is
            recognised, or one with activation checkpointing on, in which a tier would have no effect.
    """
    spec = tier if isinstance(tier, ActivationSpec) else ActivationSpec(tiers=tier)
    label = spec.label("tiers")
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model={type(model).__name__}: expected a torch.nn.Module.")
    layers, others = _layers_for(model, spec, label)
    tiers, every = spec.of_layers(len(layers)), spec.every_of_layers(len(layers))
    for (_, layer), layer_tier in zip(layers, tiers, strict=True):
        if layer_tier and getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                f"{label}={spec.tiers!r}: activation checkpointing is on: {INSIDE_CHECKPOINT}. {NO_CHECKPOINT}."
            )
    streams = set(tiers) & set(STREAMED)
    implementation = check_streamed(model, f"{label}={spec.tiers!r}") if streams else None
    _check_shared([layer for _, layer in layers], tiers, f"{label}={spec.tiers!r}")
    before = take_out(model)
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    run = torch.initial_seed() if spec.seed is None else spec.seed
    store = HostStore(sum(tier in INPUT_TIERS for tier in tiers)) if spec.offload else None
    sharing = Sharing(every)
    try:
        report = Report(spec.tiers, others, notes=_notes(model))
        done: dict[int, LayerReport] = {}
        # Modules are tried, and may draw random numbers then: the first forward pass draws what it would have drawn.
        with torch.random.fork_rng(devices):
            for index, ((name, layer), layer_tier) in enumerate(zip(layers, tiers, strict=True)):
                if id(layer) not in done:
                    seeds = Seeds(run, index) if spec.stochastic else None
                    if layer_tier in STREAMED and implementation is not None:
                        ways = (spec.chunk, implementation, seeds, store, sharing)
                        made = _stream_layer(_uncompiled(layer), name, layer_tier, index, *ways)
                    else:
                        made = _convert_layer(_uncompiled(layer), name, layer_tier, seeds, store)
                    done[id(layer)] = made
                report.layers.append(dataclasses.replace(done[id(layer)], name=name))
        if store is not None:
            store.layers -= sharing.spared
        if not any(layer.handled for layer in report.layers):
            raise ValueError(
                f"{label}={spec.tiers!r}: nothing was recognised in the layers of {type(model).__name__} "
                f"({type(layers[0][1]).__name__}). Use the tier 'hooks_fp8', which needs no structure."
            )
        if streams:
            _check_any_streams(model, report, label)
        if implementation is not None and all(layer.tier in STREAMED for layer in report.layers):
            stack = layers[0][0].rpartition(".")[0]
            MaskMaker(model.get_submodule(stack.rpartition(".")[0]), implementation).put()
    except Exception:
        take_out(model)
        put_back(before)
        raise
    return report


def undo(model: nn.Module) -> None:
    """Take every conversion back: no attribute of ours is left. Does nothing to a plain model."""
    take_out(model)


def at_step(model: nn.Module, step: int) -> None:
    """Say at which step of training the next forward passes are, for the seeds of stochastic rounding.

    A trainer of hf_lowmem and LowMemCallback do it. In a loop of one's own it lets a resumed run round as one that was
    not interrupted. Without it forward passes are counted from the conversion on.
    """
    for patch in patches(model):
        if isinstance(seeds := getattr(patch, "seeds", None), Seeds):
            seeds.at(step)


def _layers_for(
    model: nn.Module, spec: ActivationSpec, label: str
) -> tuple[list[tuple[str, nn.Module]], dict[str, str]]:
    """The layers that get tiers, by name, and the lists of layers that do not: name → why.

    Raises:
        ValueError: where there are none.
    """
    name, stack, others = find_stack(model)
    if stack:
        return [(f"{name}.{index}", layer) for index, layer in enumerate(stack)], others
    tiers = {tier for tier, _, _ in spec.ranges}
    if not tiers & {"checkpoint_fp8", "hooks_fp8"}:
        raise ValueError(
            f"{label}={spec.tiers!r}: no stack of decoder layers was found in {type(model).__name__}: none with "
            f"attention that is recognised. Set {label}='checkpoint_fp8' or 'hooks_fp8', which need no structure, or "
            "leave it unset."
        )
    name, layers, others = find_repeated(model)
    if not layers or (not name and tiers != {"hooks_fp8"}):
        raise ValueError(
            f"{label}={spec.tiers!r}: {type(model).__name__} has no list of layers. Set {label}='hooks_fp8', which "
            "needs none, or leave it unset."
            if layers
            else f"{label}={spec.tiers!r}: {type(model).__name__} has no part with weights. Leave it unset."
        )
    return layers, others


def _check_shared(stack: Sequence[nn.Module], tiers: Sequence[str | None], what: str) -> None:
    """Raise ValueError where one module stands at two places that were given two tiers."""
    first: dict[int, int] = {}
    for index, layer in enumerate(stack):
        other = first.setdefault(id(layer), index)
        if tiers[other] != tiers[index]:
            raise ValueError(
                f"{what}: layers {other} and {index} are one and the same module, which cannot have two tiers "
                f"({tiers[other]} and {tiers[index]}). Give both the same."
            )


def _uncompiled(layer: nn.Module) -> nn.Module:
    """The layer inside `torch.compile(layer)`: the compiled wrapper then meets our forward, which is eager."""
    return layer._orig_mod if isinstance(layer, OptimizedModule) else layer


def _convert_layer(
    layer: nn.Module, name: str, tier: str | None, seeds: Seeds | None, store: HostStore | None
) -> LayerReport:
    if tier is None:
        return LayerReport(name, None, left={"": "no range names it"})
    if tier == "hooks_fp8":
        wrap_module(layer, seeds=seeds)
        return LayerReport(name, tier, handled={"every saved tensor": 1})
    if tier == "checkpoint_fp8":
        routing = routing_of(layer)
        wrap_layer(layer, "e4m3" if routing is None else "none", seeds=seeds, store=store)
        left = {"": f"{routing}: its input is kept uncompressed, or tokens might be routed otherwise"}
        return LayerReport(name, tier, handled=_handled(store), left=left if routing else {})
    parts = structure_of(layer)
    if not (parts.attention or parts.mlp):
        return LayerReport(name, None, left={"": "no attention and no MLP recognised: tier 'hooks_fp8' can take it"})
    for patch in _patches_of(layer, name, parts, tier, seeds):
        patch.put()
    again = "recomputed (norms, activations, dropouts)"
    handled = {"attention": len(parts.attention), "mlp": len(parts.mlp), again: len(parts.cheap)}
    return LayerReport(name, tier, handled={k: n for k, n in handled.items() if n}, left=parts.left)


def _stream_layer(
    layer: nn.Module,
    name: str,
    tier: str,
    index: int,
    chunk: int | None,
    implementation: str,
    seeds: Seeds | None,
    store: HostStore | None,
    sharing: Sharing,
) -> LayerReport:
    routing, why = routing_of(layer), why_not_streamed(layer)
    fmt = "e4m3" if tier == "stream_fp8" and routing is None else "none"
    if why is not None:
        wrap_layer(layer, fmt, seeds=seeds, store=store)
        return LayerReport(name, "checkpoint_fp8", _handled(store), {"": f"{NOT_STREAMED}{why}"})
    chains, follows = sharing.of(index, fmt)
    wrap_streamed(layer, tier, fmt, chunk, implementation, seeds, store, chains, follows)
    left = {"": f"{routing}: its input is kept uncompressed, or tokens might be routed otherwise"}
    handled = _handled(store, chains.every)
    return LayerReport(name, tier, handled, left if routing and tier == "stream_fp8" else {})


def _handled(store: HostStore | None, every: int = 1) -> dict[str, int]:
    what = "its input" if every == 1 else f"one input for each {every} layers"
    return {what if store is None else f"{what}, in host memory": 1}


def _check_any_streams(model: nn.Module, report: Report, label: str) -> None:
    """Raise ValueError where of the layers that were to be streamed none can be."""
    why = [reason for layer in report.layers for reason in layer.left.values() if reason.startswith(NOT_STREAMED)]
    if why and not any(layer.tier in STREAMED for layer in report.layers):
        raise ValueError(
            f"{label}={report.tiers!r}: no layer of {type(model).__name__} can run by chunks: "
            f"{why[0].removeprefix(NOT_STREAMED)}. Use {label}='checkpoint_fp8'."
        )


def _patches_of(layer: nn.Module, name: str, parts: Structure, tier: str, seeds: Seeds | None) -> Iterator[Patch]:
    """The layer's own comes last: where a layer is its own attention, it must be the outer one."""
    formats = FORMATS_OF_TIER[tier]
    for module in _unpatched(parts.attention):
        yield Block(module, "attention")
    for module in _unpatched(parts.mlp):
        gated = gated_of(module) if formats.mlp == "e4m3" else None
        yield Block(module, "mlp") if gated is None else GatedMLP(module, gated)
    for module in _unpatched(parts.cheap):
        norm = rmsnorm_of(module) if formats.residual == "e4m3" else None
        yield Cheap(module) if norm is None else Norm(module, norm)
    if formats.rerun:
        for module in _unpatched(parts.projections):
            yield Projection(module)
    yield Layer(layer, name, tier, seeds)


def _unpatched(parts: dict[str, nn.Module]) -> list[nn.Module]:
    """The parts that have no forward of ours yet; a part that two layers share may have one."""
    return [module for module in parts.values() if not isinstance(vars(module).get("forward"), Patch)]


def _notes(model: nn.Module) -> list[str]:
    eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
    why = 'attention is "eager": it keeps its (tokens, tokens) probabilities; "sdpa" or "flash_attention_2" do not'
    return [why] if eager else []
