"""From a model to parameter groups: with names, split by weight decay, low-rank targets apart.

A group says everything about its parameters in plain values, because FSDP2 replaces the entries of
`group["params"]` after the optimizer was made: knowledge kept in a dict by Parameter would be lost.
"""

import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from hf_lowmem.specs import OptimSpec


def linear_weights(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module name, parameter name, weight) of nn.Linear, transformers' Conv1D and fused 3-D experts.

    The output head and anything tied to an embedding are left out: their rows are tokens, most of which have no
    gradient in a step, and the family's authors leave them to Adam.
    """
    lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    for module in model.modules():  # a PEFT or DDP wrapper keeps the method on the model inside
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), torch.Tensor):
            lookups.add(id(head.weight))
    for module_name, module in model.named_modules():
        conv1d = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
        for name, p in module.named_parameters(recurse=False):
            linear = (isinstance(module, nn.Linear) or conv1d) and name == "weight"
            experts = p.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear)
            if (linear or experts) and id(p) not in lookups:
                yield module_name, f"{module_name}.{name}".lstrip("."), p


def is_target(module_name: str, targets: str | list[str] | None) -> bool:
    """Whether `optim_target_modules` names the module, as HuggingFace reads that field."""
    if targets is None:
        return True
    if isinstance(targets, str):
        return targets.replace("_", "-") == "all-linear" or re.fullmatch(targets, module_name) is not None
    return any(t in module_name or re.fullmatch(t, module_name) for t in targets)


def parameter_groups(
    model: nn.Module,
    spec: OptimSpec,
    *,
    rank: int | None,
    decay: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups of (name, parameter), low-rank or not × decayed or not, for `LowMemOptimizer(params)`.

    Args:
        model: its trainable parameters are taken; a tied one once.
        spec: for weight decay and targets.
        rank: the low-rank method's rank; `None` for a full-rank method.
        decay: names of the parameters that decay. `None`: those with at least two dimensions, so that neither
            biases nor norms do.

    Raises:
        ValueError: where nothing can be trained, or where the rank or the targets that a user gave leave no weight to
            the low-rank rule.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"the model ({type(model).__name__}) has no trainable parameter. Set requires_grad=True on some."
        )
    low_rank: set[int] = set()
    if rank is not None:
        chosen = [(m, p) for m, _, p in linear_weights(model) if p.requires_grad and is_target(m, spec.target_modules)]
        low_rank = {id(p) for _, p in chosen if rank < min(p.shape[-2:])}
        if spec.target_modules is not None and not chosen:
            raise ValueError(
                f"{spec.label('target_modules')}={spec.target_modules!r} matches no trainable linear layer of "
                f"{type(model).__name__}. Leave it unset for every linear one, or see model.named_modules()."
            )
        if spec.rank is not None and not low_rank:
            sides = max((min(p.shape[-2:]) for _, p in chosen), default=0)
            raise ValueError(
                f"{spec.label('rank')}={rank} has no effect: no trainable linear weight has a smaller side above it "
                f"(the largest is {sides}). Lower the rank, or choose 'adamw'."
            )
        if not low_rank:
            warnings.warn(
                f"{spec.label('name')}={spec.name!r} with its default rank={rank}: no linear weight has a smaller side "
                f"above it, so all take plain Adam and nothing is saved. Set {spec.label('rank')}.",
                stacklevel=4,
            )

    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, p in named:
        decays = p.ndim >= 2 if decay is None else name in decay
        groups.setdefault((id(p) in low_rank, decays), []).append((name, p))
    return [
        {
            "params": members,
            "weight_decay": spec.weight_decay if decays else 0.0,
            **({} if rank is None else {"rank": rank if projected else None}),
        }
        for (projected, decays), members in sorted(groups.items(), reverse=True)
    ]
