"""Tiers beside the activation checkpointing that they switch off: which of the two keeps more, counted."""

import contextlib
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowmem.activations.report import Report
from hf_lowmem.memory import measure_saved

__all__ = ["kept_beside_inputs"]

TOKENS = 64


class _Reached(Exception):
    """A layer was called; with what."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = args, kwargs


def kept_beside_inputs(
    model: nn.Module, report: Report, context: Callable[[], Any] = contextlib.nullcontext
) -> tuple[float, float]:
    """Bytes for each token that the layers of a converted model keep for backward, and those of their inputs.

    The inputs are what checkpointing keeps. Of the layers of one tier the first is run on a few tokens; random numbers
    are drawn from a fork of the generators, and the model's modes are as before.

    Args:
        model: converted.
        report: of its conversion.
        context: makes what the forward pass runs in, such as autocast.

    Raises:
        Exception: whatever a model raises that does not run on token ids alone.
    """
    alike: dict[str | None, list[str]] = defaultdict(list)
    for layer in report.layers:
        alike[layer.tier].append(layer.name)
    kept = inputs = 0.0
    for names in alike.values():
        saved, hidden = _first_layer(model, model.get_submodule(names[0]), context)
        kept, inputs = kept + saved * len(names) / TOKENS, inputs + hidden * len(names) / TOKENS
    return kept, inputs


def _first_layer(model: nn.Module, layer: nn.Module, context: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that one layer keeps, and those of its input, for TOKENS tokens."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embedding.weight.device
    ids = torch.arange(TOKENS, device=device)[None] % embedding.weight.shape[0]
    modes = {module: module.training for module in model.modules()}
    devices = [device] if device.type == "cuda" else []
    hook = layer.register_forward_pre_hook(_reach, with_kwargs=True, prepend=True)
    with torch.random.fork_rng(devices), torch.enable_grad(), context():
        try:
            model.train()
            args, kwargs = _call_of(model, ids)
            hook.remove()
            hidden = args[0] if args else kwargs.pop("hidden_states")
            graphs, totals = [], []
            with measure_saved(model) as saved:
                for _ in range(2):  # the first keeps what all layers share, too: masks, rotary tables
                    graphs.append(layer(hidden.detach().clone().requires_grad_(), *args[1:], **kwargs))
                    totals.append(saved.total)
        finally:
            hook.remove()
            for module, training in modes.items():
                module.training = training
    return totals[1] - totals[0], hidden.nbytes


def _reach(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(args, kwargs)


def _call_of(model: nn.Module, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments, (args, kwargs), with which the model calls the layer whose hook is `_reach`."""
    try:
        model(input_ids=ids, use_cache=False)
    except _Reached as reached:
        return reached.call
    raise ValueError("the layer was not called")
