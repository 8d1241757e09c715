"""The forward that runs a shared batch: in front of the backbone, behind it, and nothing in between.

`share_prompts` puts an object in the place of the *backbone's* `forward` (LlamaModel's, not LlamaForCausalLM's). With
the tensors of `layout.KEYS` among its arguments it gathers the shared rows, calls HuggingFace's forward with their
positions and their mask, and gathers the hidden states back to the plain (2B, T) shape. Whoever called the backbone
notices nothing: TRL's fused head pairs hidden states with labels as ever, so its log-probabilities, entropies and
metrics, the reference model's, and the logits for `compute_metrics` all come out in the plain shape.

Why not at the language model's forward, whose output would have to be rearranged: there the fused head gives one
number a position, and the prompt's last position needs two, one for the first token of each completion.

The mask goes through HuggingFace's mask interface, once a layer type. A token attends to its own pair's prompt and to
its own branch, no later than itself; a sliding window counts positions, not columns. HuggingFace takes ready masks as
they are (`generate` hands them over in this way), and never sees that the rows are packed.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_lowmem.patching import ForwardPatch, forwards_of
from hf_lowmem.preference.sharing.layout import KEYS, PLACES, SEGMENTS, SOURCE

__all__ = ["SharedForward", "backbone_of", "share_prompts", "shares_prompts", "unshare_prompts"]


class Visible:
    """HuggingFace's mask function: may the query at column q of row b attend to column kv?

    segments, positions: (R, L). window: a token sees so many positions, itself included; None: all. width: tokens of a
    row of the plain batch.

    By indices alone, as flex_attention and the broadcasting of sdpa and eager masks both want it. Streamed layers ask
    for `runs` in the place of values, and a plan, in which no tensor has any, for `longest_runs`.
    """

    def __init__(self, segments: Tensor, positions: Tensor, window: int | None, width: int) -> None:
        self.segments, self.positions, self.window, self.width = segments, positions, window, width

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        here, there = self.segments[b, q], self.segments[b, kv]
        seen = (here // 3 == there // 3) & ((there % 3 == 0) | (there == here)) & (kv <= q)
        if self.window is not None:
            seen = seen & (self.positions[b, kv] > self.positions[b, q] - self.window)
        return seen

    def runs(self) -> list[list[tuple[int, int, int, int]]]:
        """Runs (begin, end, prompt, prompted) of each row: each token of [begin, end) sees those before it in the run,
        and the tokens [prompt, prompted). Padding is a run, too."""
        rows = []
        for line in self.segments.cpu():
            cuts = [0, *((line.diff() != 0).nonzero()[:, 0] + 1).tolist(), len(line)]
            runs: list[tuple[int, int, int, int]] = []
            last = prompt = (-1, 0, 0)  # pair, begin and end
            for begin, end in pairwise(cuts):
                pair, branch = divmod(int(line[begin]), 3)
                if branch == 0:
                    prompt = pair, begin, end
                shared = prompt if branch == 2 and prompt[0] == pair else (pair, begin, begin)
                if branch == 1 and last[0] == pair:  # right behind its prompt
                    runs[-1] = (runs[-1][0], end, runs[-1][2], runs[-1][3])
                else:
                    runs.append((begin, end, shared[1], shared[2]))
                last = pair, begin, end
            rows.append(runs)
        return rows

    def longest_runs(self) -> list[list[tuple[int, int, int, int]]]:
        """Runs of rows of these sizes where prompts have one token, and answers are as long as they can be."""
        rows, length = self.segments.shape
        runs: list[tuple[int, int, int, int]] = []
        while not runs or runs[-1][1] < length:
            at = runs[-1][1] if runs else 0
            middle, end = min(at + self.width, length), min(at + 2 * self.width - 1, length)
            runs += [(at, middle, at, at), (middle, end, at, at + 1)][: 1 + (middle < end)]
        return [runs] * rows


def shared_masks(config: Any, segments: Tensor, positions: Tensor, width: int, dtype: torch.dtype) -> Any:
    """The mask of a shared batch, or one a layer type, in the form that the config's attention takes.

    The choice between them is that of transformers' `create_masks_for_generate`.
    """

    def mask(window: int | None) -> Any:
        return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=segments.shape[0],
            q_length=segments.shape[1],
            kv_length=segments.shape[1],
            mask_function=Visible(segments, positions, window, width),
            allow_is_causal_skip=False,
            dtype=dtype,
            config=config,
            device=segments.device,
        )

    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if not types:
        return mask(window)
    if "sliding_attention" not in types:
        return mask(None)
    return {kind: mask(window if kind == "sliding_attention" else None) for kind in types}


class SharedForward(ForwardPatch):
    """A backbone's forward, for shared batches and for plain ones."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shared = {key: kwargs.pop(key, None) for key in KEYS}
        if shared[SOURCE] is None:
            return self.original(*args, **kwargs)
        plain: Tensor = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]  # (2B, T)
        source, segments, places = shared[SOURCE], shared[SEGMENTS], shared[PLACES]
        width = plain.shape[1]
        positions = source % width  # the plain rows start at position 0
        module: Any = self.module
        kwargs["attention_mask"] = shared_masks(module.config, segments, positions, width, module.dtype)
        outputs = self.original(plain.take(source), *args[1:], **kwargs | {"position_ids": positions})
        hidden = outputs.last_hidden_state  # (R, L, H)
        plainly = hidden.flatten(0, 1).index_select(0, places.flatten().to(hidden.device))
        outputs.last_hidden_state = plainly.view(*places.shape, -1)  # (2B, T, H)
        return outputs


def backbone_of(model: Any) -> Any:
    """The decoder without its head, as TRL's fused head finds it; inside PEFT's wrapper, too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def share_prompts(model: Any) -> None:
    """Let `model` run the batches of a `SharedPairs` collator in their shared layout. Plain batches run as before.

        check_sharing(model, args)
        share_prompts(model)                    # and the reference model
        batch = SharedPairs(collator)(examples)
        model(**batch, labels=labels, fused_lm_head=True).log_probs             # (2B, T - 1), as without sharing

    The numbers are those of the plain batch up to the rounding of another order of summation; where dropout is active
    they are not, because the two copies of a prompt would have drawn two masks and now draw one.

    Doing it twice changes nothing. `unshare_prompts(model)` takes it back. `output_hidden_states` and
    `output_attentions` give the shared layout.
    """
    if not shares_prompts(model):
        SharedForward(backbone_of(model)).put()


def unshare_prompts(model: Any) -> None:
    """Take `share_prompts` back. Does nothing to another model."""
    for patch in list(forwards_of(backbone_of(model))):
        if isinstance(patch, SharedForward):
            patch.take_away()


def shares_prompts(model: Any) -> bool:
    """Whether `share_prompts` was called for this model, and not taken back."""
    return any(isinstance(patch, SharedForward) for patch in forwards_of(backbone_of(model)))
