"""Which layers can run by chunks of tokens, and what else a model must be like.

A layer can if a token's output depends on other tokens by one causal attention alone, which takes a cache. What tells
against it is looked for here, before anything runs; what cannot be seen from outside (that the cache is used, that the
mask is causal) is looked at in each chunk, and `tier.Streamed` tries a layer once on a few tokens, whole and in chunks.
A layer that cannot is checkpointed instead, which the report says.
"""

import inspect
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from hf_lowmem.activations.detect import is_attention
from hf_lowmem.activations.streaming.call import cache_name

__all__ = ["check_streamed", "why_not_streamed"]

IMPLEMENTATIONS = ("sdpa", "eager")
SHARED = ("is_kv_shared_layer", "kv_shared_layer_index", "store_full_length_kv")
STREAMS = ("altup",)  # modules that mix several streams of activations, which are a dimension of a layer's input
BIASES = ("alibi", "position_bias", "rel_pos_bias")


def check_streamed(model: nn.Module, label: str) -> str:
    """The attention implementation of a model that is to be streamed.

    Raises:
        ValueError: where no layer of the model could be.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    implementation = getattr(text, "_attn_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{label} with attn_implementation={implementation!r}: a chunk's queries stand at the end of its keys, "
            f"which is cut for {' and '.join(map(repr, IMPLEMENTATIONS))} only. Load the model with "
            "attn_implementation='sdpa', whose kernel on a CUDA device is flash attention, too."
        )
    if getattr(text, "output_router_logits", False):
        raise ValueError(
            f"{label} with output_router_logits=True: what routers record while chunks run has no gradient, so the "
            "balancing loss would have no effect. Set output_router_logits=False, or use "
            "lowmem_activations='checkpoint_fp8'."
        )
    return implementation


def why_not_streamed(layer: nn.Module) -> str | None:
    """Reason against running a layer by chunks; None where there is none."""
    attentions = [module for module in layer.modules() if is_attention(module)]
    names = inspect.signature(type(layer).forward).parameters
    if not attentions:
        return "it has no attention that is recognised (a recurrence hands a state from chunk to chunk)"
    if len(attentions) > 1:
        return "it has more than one attention (cross attention)"
    if cache_name(layer) is None:
        return "it takes no key-value cache"
    if any(isinstance(module, _ConvNd) for module in layer.modules()):
        return "its convolutions mix neighbouring tokens"
    if any(getattr(module, name, None) not in (None, False) for module in layer.modules() for name in SHARED):
        return "its keys and values are shared with other layers"
    if not _hands_keys(attentions[0]):
        return "its attention hands no keys and values to a cache (a recurrence hands it a state)"
    if streams := next((name for name in STREAMS if isinstance(getattr(layer, name, None), nn.Module)), None):
        return f"its input is several streams of activations ({streams!r}), and not (rows, tokens, hidden)"
    if bias := next((name for name in BIASES if name in names), None):
        return f"its attention adds a bias of its own ({bias})"
    if own := next((name for name, _ in attentions[0].named_parameters(recurse=False)), None):
        return f"its attention has a weight of its own ({own!r}), as sinks and recurrences have"
    return None


def _hands_keys(attention: nn.Module) -> bool:
    """Whether any code of an attention calls `update` of something, as that of a cache is called. Code that cannot be
    read may."""
    own = [kind for kind in type(attention).__mro__ if not kind.__module__.startswith("torch.")]
    methods = [inspect.unwrap(value) for kind in own for value in vars(kind).values() if inspect.isfunction(value)]
    return not methods or any("update" in method.__code__.co_names for method in methods)
