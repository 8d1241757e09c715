"""convert(model, tier) and undo(model): from structure to forwards and back.

The state of a conversion is the forwards themselves: instance attributes of modules, found again by walking the model.
There is no registry to go stale when a model is copied, wrapped by PEFT, DDP or FSDP2, or pickled.
"""

import dataclasses
from collections.abc import Iterator, Sequence

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
    draw_seed,
    put,
    put_back,
    take_out,
)
from hf_lowmem.activations.checkpoint import wrap_layer
from hf_lowmem.activations.detect import Structure, find_stack, has_experts, structure_of
from hf_lowmem.activations.fusable import gated_of, rmsnorm_of
from hf_lowmem.activations.hooks import wrap_module
from hf_lowmem.activations.report import LayerReport, Report
from hf_lowmem.activations.tape import FORMATS_OF_TIER
from hf_lowmem.specs import ActivationSpec

__all__ = ["convert", "undo"]


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

    Start with `fp8`. The forward pass is HuggingFace's in every tier: same modules, same order, loss equal bit for bit.
    On a GPU with Triton there is one exception: the tiers that round leave plain RMSNorms and act(gate) * up, with the
    codes of what they keep, to a kernel each (hf_lowmem/kernels), one pass over memory for a dozen. It rounds where
    HuggingFace rounds; what may differ is the last bits of an fp32 sum and of an exponential before that.
    Eval mode and no_grad run the untouched forward. Names, state_dict and saved checkpoints do not change; a converted
    model can be copied and pickled. Weights may be frozen, tied, quantised (bitsandbytes), or have LoRA adapters:
    convert after PEFT has wrapped the model, so that the adapters' dropouts are seen. Converting again with the same
    tier changes nothing, with another one it replaces the first.

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
    name, stack, others = find_stack(model)
    if not stack:
        raise ValueError(
            f"{label}={spec.tiers!r}: no stack of decoder layers was found in {type(model).__name__}. Wrap the modules "
            "that save most with hf_lowmem.activations.hooks.wrap_module, or leave the field unset."
        )
    tiers = spec.of_layers(len(stack))
    for index, layer in enumerate(stack):
        if tiers[index] and getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                f"{label}={spec.tiers!r}: activation checkpointing is on, and inside a checkpoint nothing is left to "
                "compress. Turn it off (activation_checkpointing=False, model.gradient_checkpointing_disable(); TRL "
                "turns it on by default), and use 'checkpoint_fp8' for the layers that should be checkpointed."
            )
    _check_shared(stack, tiers, f"{label}={spec.tiers!r}")
    before = take_out(model)
    try:
        report = Report(spec.tiers, others, notes=_notes(model))
        done: dict[int, LayerReport] = {}
        for index, (layer, layer_tier) in enumerate(zip(stack, tiers, strict=True)):
            place = f"{name}.{index}"
            if id(layer) not in done:
                done[id(layer)] = _convert_layer(_uncompiled(layer), place, layer_tier, spec)
            report.layers.append(dataclasses.replace(done[id(layer)], name=place))
        if not any(layer.handled for layer in report.layers):
            raise ValueError(
                f"{label}={spec.tiers!r}: nothing was recognised in the layers of {type(model).__name__} "
                f"({type(stack[0]).__name__}). Use the tier 'hooks_fp8', which needs no structure."
            )
    except Exception:
        take_out(model)
        put_back(before)
        raise
    return report


def undo(model: nn.Module) -> None:
    """Take every conversion back: no attribute of ours is left. Does nothing to a plain model."""
    take_out(model)


def _check_shared(stack: nn.ModuleList, tiers: Sequence[str | None], what: str) -> None:
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


def _convert_layer(layer: nn.Module, name: str, tier: str | None, spec: ActivationSpec) -> LayerReport:
    if tier is None:
        return LayerReport(name, None, left={"": "no range names it"})
    seeds = draw_seed if spec.stochastic else None
    if tier == "hooks_fp8":
        wrap_module(layer, seeds=seeds)
        return LayerReport(name, tier, handled={"every saved tensor": 1})
    if tier == "checkpoint_fp8":
        # Routing could tip over on a rounded input.
        exact = has_experts(layer)
        wrap_layer(layer, "none" if exact else "e4m3", seeds=seeds)
        left = {"": "experts: its input is kept uncompressed, or tokens might be routed otherwise"} if exact else {}
        return LayerReport(name, tier, handled={"its input": 1}, left=left)
    parts = structure_of(layer)
    if not (parts.attention or parts.mlp):
        return LayerReport(name, None, left={"": "no attention and no MLP recognised: tier 'hooks_fp8' can take it"})
    for patch in _patches_of(layer, name, parts, tier, spec):
        put(patch)
    again = "recomputed (norms, activations, dropouts)"
    handled = {"attention": len(parts.attention), "mlp": len(parts.mlp), again: len(parts.cheap)}
    return LayerReport(name, tier, handled={k: n for k, n in handled.items() if n}, left=parts.left)


def _patches_of(layer: nn.Module, name: str, parts: Structure, tier: str, spec: ActivationSpec) -> Iterator[Patch]:
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
    yield Layer(layer, name, tier, spec.stochastic)


def _unpatched(parts: dict[str, nn.Module]) -> list[nn.Module]:
    """Those that have no forward of ours yet, as a part that two layers share has."""
    return [module for module in parts.values() if not isinstance(vars(module).get("forward"), Patch)]


def _notes(model: nn.Module) -> list[str]:
    eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
    why = 'attention is "eager": it keeps its (tokens, tokens) probabilities; "sdpa" or "flash_attention_2" do not'
    return [why] if eager else []
