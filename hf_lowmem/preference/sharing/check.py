"""Check that a shared batch is exact for a model: by its structure, and then by trying it.

Exact means: every token is computed from the same tokens at the same positions as in the plain batch. That needs three
things of a model: positions come from `position_ids` (not from columns, as ALiBi's do), what a token sees comes from
the mask alone (not from a state that is carried along the row), and the mask is HuggingFace's, so that ours is taken
in its place. Structure tells most cases by name. The trial, two small pairs through the loaded model, is for those that
structure does not know.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lowmem.patching import in_eval_mode
from hf_lowmem.preference.sharing.layout import shared_layout
from hf_lowmem.preference.sharing.share import SharedForward, backbone_of

__all__ = ["ATTENTION", "check_sharing", "sharing_error"]

FIELD = "lowmem_share_prompt=True"
LEAVE = "Leave lowmem_share_prompt unset for this model"
ATTENTION = ("sdpa", "eager", "flex_attention")  # those whose mask can be any function of two columns
LAYERS = ("full_attention", "sliding_attention")
OTHER_WINDOWS = ("window_size", "keep_window_size", "attention_window")  # of columns, which no mask of ours can change
MASKS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_masks_for_generate")
# Modules that carry a state along the row, or choose by themselves what a token sees.
OTHER_MIXERS = re.compile(r"(?i:mamba|rwkv|recurrent|deltanet|linearatt|lightning|retention|lstm|indexer)|SSM")


def check_sharing(model: Any, args: Any = None, *, trial: bool = True) -> None:
    """Raise unless prompt sharing is exact for `model`, and what `args` sets is compatible with it.

    model:  a decoder with a language-model head, or a PEFT model around one.
    args:   training arguments, of which `router_aux_loss_coef` and `parallelism_config` matter; None: neither is set.
    trial:  whether to try it, beside looking at the structure. Not where the weights are sharded.

    Sliding windows are exact, by position, for every attention of ATTENTION. Mixtures of experts are, as long as the
    load-balancing loss is off: it averages over tokens, and a shared prompt would count once instead of twice.

    The trial costs two forward passes, of 36 and of 22 tokens, in eval mode. It is left out where the weights are not
    there to be used: on the meta device, or partitioned before training starts (ZeRO-3).

    Raises:
        TypeError: for something that is no model of transformers.
        ValueError: naming the model, the reason and the remedy.
    """
    if not isinstance(model.get_base_model() if hasattr(model, "get_base_model") else model, PreTrainedModel):
        raise TypeError(f"{FIELD}: {type(model).__name__} is no model of transformers, nor of PEFT around one.")
    module = backbone_of(model)
    for reason, remedy in _obstacles(model, module, args):
        raise ValueError(f"{FIELD} with {type(module).__name__}: {reason}. {remedy}.")
    if not trial or any(p.is_meta or p.numel() == 0 for p in module.parameters()):
        return
    error, bound = sharing_error(model)
    if not error <= bound:
        raise ValueError(
            f"{FIELD} with {type(module).__name__}: in a trial the hidden states differed from those of the plain "
            f"batch by {error:.2g} of their size, while rounding explains no more than {bound:.2g}. {LEAVE}."
        )


def _obstacles(model: Any, module: nn.Module, args: Any) -> Iterator[tuple[str, str]]:
    """Reasons why sharing would not be exact for a model, each with its remedy."""
    config: Any = module.config
    if any(p.is_prompt_learning or p.is_adaption_prompt for p in getattr(model, "peft_config", {}).values()):
        yield "prompt-learning PEFT puts virtual tokens before each row, not before each sequence", "Use LoRA"
    if getattr(config, "is_encoder_decoder", False):
        yield "an encoder-decoder has the prompt in the encoder, once for each sequence", LEAVE
    if config.get_text_config() is not config:
        yield "it is a vision-language (or another composite) model, whose mask and positions depend on images", LEAVE
    attention = config._attn_implementation
    if attention not in ATTENTION:
        yield (
            f"attn_implementation={attention!r} takes no mask in which a token sees the prompt and skips what follows",
            f"Load the model with attn_implementation set to one of: {', '.join(ATTENTION)}",
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        yield "its attention is bidirectional, so a prompt's hidden states depend on what follows it", LEAVE
    if others := set(getattr(config, "layer_types", None) or ()) - set(LAYERS):
        yield f"it has layers of the kind {sorted(others)}; exact are {', '.join(LAYERS)}", LEAVE
    for name in ("attention_chunk_size", *OTHER_WINDOWS):
        if getattr(config, name, None):
            yield f"its attention is cut by columns, not by positions: {name}={getattr(config, name)}", LEAVE
    if mixer := _other_mixer(module):
        yield f"{mixer} carries a state along the row (or selects tokens), from one completion into the next", LEAVE
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(module.forward).parameters:
        yield "its positions are counted by columns: it has ALiBi, or its forward takes no position_ids", LEAVE
    if not any(hasattr(sys.modules[type(module).__module__], name) for name in MASKS):
        yield "its attention mask is not made by transformers.masking_utils, so another may not be taken", LEAVE
    yield from _obstacles_of_settings(config, args)


def _obstacles_of_settings(config: Any, args: Any) -> Iterator[tuple[str, str]]:
    coefficient = getattr(args, "router_aux_loss_coef", None)
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if hasattr(config, "output_router_logits") and (coefficient or config.output_router_logits):
        yield (
            f"router_aux_loss_coef={coefficient}: the load-balancing loss averages over tokens, and a shared prompt "
            "counts once instead of twice",
            "Set router_aux_loss_coef=0 (and output_router_logits=False in the model's config)",
        )
    parallel = getattr(args, "parallelism_config", None)
    if parallel is not None and (getattr(parallel, "cp_size", 1) > 1 or getattr(parallel, "sp_size", 1) > 1):
        yield "context or sequence parallelism cuts rows into pieces", "Set cp_size and sp_size to 1"


def _other_mixer(module: nn.Module) -> str | None:
    """The class of a module that mixes tokens otherwise than by masked attention."""
    for part in module.modules():
        if isinstance(part, nn.Conv1d | nn.RNNBase) or OTHER_MIXERS.search(type(part).__name__):
            return type(part).__name__
    return None


def _trial(vocabulary: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two pairs, (prompt, chosen, rejected) of (5, 4, 3) and (3, 2, 5) tokens: the plain batch, and one shared row."""
    ids = (n % vocabulary for n in range(5, 1000, 11))
    pairs = [[list(islice(ids, n)) for n in sizes] for sizes in ((5, 4, 3), (3, 2, 5))]
    rows = [prompt + answers[which] for which in (0, 1) for prompt, *answers in pairs]
    width = max(map(len, rows))

    def padded(values: list[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (width - len(row)) for row in values])

    prompts = [len(prompt) for prompt, *_ in pairs] * 2
    completions = [[0] * n + [1] * (len(row) - n) for n, row in zip(prompts, rows, strict=True)]
    plain = {"input_ids": padded(rows), "attention_mask": padded([[1] * len(row) for row in rows])}
    return plain, shared_layout(plain["input_ids"], plain["attention_mask"], padded(completions), budget=22)


@torch.no_grad()
def sharing_error(model: Any) -> tuple[float, float]:
    """Error of the hidden states of a shared trial batch against the plain one, and the bound that rounding explains.

    The error is the largest over tokens of ||shared - plain|| / ||plain||. Measured on SmolLM2-135M on a CPU: 3e-6 in
    fp32 and 0.018 in bf16; with an ordinary causal mask 1.2, with a row's ordinary positions 0.28, in either dtype. The
    bound is 1e-3 for fp32 on a CPU, 0.02 on other devices, whose matrix products may be rounded to TF32, and 0.1 for
    16-bit hidden states.
    """
    module = backbone_of(model)
    device = module.get_input_embeddings().weight.device
    plain, layout = _trial(module.get_input_embeddings().weight.shape[0])
    plain = {name: tensor.to(device) for name, tensor in plain.items()}
    with in_eval_mode(module):
        expected = module(**plain, use_cache=False).last_hidden_state
        try:
            found = SharedForward(module)(**plain, **{k: v.to(device) for k, v in layout.items()}, use_cache=False)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{FIELD} with {type(module).__name__}: it takes no mask of ours. {LEAVE}.") from error
    full = expected.dtype in (torch.float32, torch.float64)
    real = plain["attention_mask"].to(expected.device).bool()
    expected, found = expected[real].double(), found.last_hidden_state[real].double()
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    return error, 0.1 if not full else 1e-3 if device.type == "cpu" else 0.02
