"""WeLore (arXiv 2407.11239): weights of low rank are cut to it and trained as two factors; all else is frozen.

    python scripts/train_welore.py --model_name_or_path MODEL --dataset_name DATA --output_dir OUT \
        --welore_reduction 0.5 --optim adamw --lowmem_state 8bit --learning_rate 5e-5

Singular values of every linear weight but the output head's, each weight's divided by its largest, are compared with
one threshold, which is such that the part `welore_reduction` of all of them is below. The rank of a weight is the
number of its values that are not. Weights fall in two kinds:

    rank < min(m, n) / 2    W = B @ A, of (m, rank) and (rank, n), fewer values than W has; B and A are trained
    all others              stay whole and frozen, as embeddings, norms and the head do

So gradients and optimizer states are of the factors alone, by any method, codec and weight store. Checkpoints hold
factors, and a run is resumed with the same model and reduction. What is saved at the end is a plain model of the old
shapes, in which B @ A is multiplied.

Not for you when the model's spectra fall slowly, as those of small models do: what is cut off is gone before the first
step, and the loss jumps there. The share that each cut weight loses of its squared norm is logged; LoRA, `galore` or
`apollo` cut nothing off. The paper's evidence is LLaMA-2, 7B and 13B; here nothing of its quality was measured.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.cli.train import train

logger = logging.getLogger(__name__)


@dataclass
class WeLoreConfig(LowMemSFTConfig):
    """LowMemSFTConfig, and how much of all ranks goes."""

    welore_reduction: float = field(
        default=0.5,
        metadata={"help": "Part of all ranks of the linear weights that is below the threshold, in (0, 1)."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.welore_reduction < 1:
            raise ValueError(f"welore_reduction={self.welore_reduction!r}: expected a number between 0 and 1.")
        super().__post_init__()


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Linear layers by name, without the output head."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}


def ranks_of(spectra: Mapping[str, Tensor], reduction: float) -> dict[str, int]:
    """Rank of each weight, from its singular values, the largest first."""
    parts = {name: values / values[0].clamp(min=torch.finfo(values.dtype).tiny) for name, values in spectra.items()}
    every = torch.cat(list(parts.values())).sort().values
    threshold = every[min(round(reduction * len(every)), len(every) - 1)]
    return {name: max(1, int((values >= threshold).sum())) for name, values in parts.items()}


def factored(linear: nn.Linear, rank: int) -> nn.Sequential:
    """Two layers in the place of one: its best approximation of that rank, the singular values shared out equally."""
    weight = linear.weight.detach()
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    first = nn.Linear(linear.in_features, rank, bias=False).to(weight)
    second = nn.Linear(rank, linear.out_features, bias=linear.bias is not None).to(weight)
    with torch.no_grad():
        first.weight.copy_(root[:, None] * v[:rank])
        second.weight.copy_(u[:, :rank] * root)
        if linear.bias is not None:
            second.bias.copy_(linear.bias)
    return nn.Sequential(first, second)


def multiplied(factors: nn.Sequential) -> nn.Linear:
    """One layer in the place of two, with the product of their weights."""
    first, second = factors
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    weight = second.weight.detach().float() @ first.weight.detach().float()
    whole = nn.Linear(first.in_features, second.out_features, bias=second.bias is not None, device="meta")
    whole.weight = nn.Parameter(weight.to(first.weight.dtype))
    if second.bias is not None:
        whole.bias = nn.Parameter(second.bias.detach().clone())
    return whole


def cut(model: PreTrainedModel, reduction: float) -> dict[str, int]:
    """Put factors in the place of weights of low rank and freeze all else, in place; the ranks, by name.

    Raises:
        ValueError: where no weight is of low rank, so that nothing would be trained.
    """
    found = linears(model)
    spectra = {name: torch.linalg.svdvals(linear.weight.detach().float()) for name, linear in found.items()}
    ranks = ranks_of(spectra, reduction)
    low = {name: rank for name, rank in ranks.items() if rank < min(found[name].weight.shape) / 2}
    if not low:
        raise ValueError(
            f"welore_reduction={reduction}: no linear weight of {type(model).__name__} has a rank below half of its "
            "smaller side then, and nothing would be trained. Raise it, or train with LoRA or optim='galore'."
        )
    model.requires_grad_(False)
    for name, rank in low.items():
        squares = spectra[name].square()
        lost = 100 * float(squares[rank:].sum() / squares.sum())
        logger.info("%s: rank %d of %d, %.1f %% of its squared norm lost", name, rank, len(squares), lost)
        model.set_submodule(name, factored(found[name], rank))
    return low


@contextmanager
def whole(model: nn.Module, names: Mapping[str, int]) -> Iterator[None]:
    """The model with products in the place of factors, as plain transformers has it."""
    factors = {name: model.get_submodule(name) for name in names}
    try:
        for name, pair in factors.items():
            assert isinstance(pair, nn.Sequential)
            model.set_submodule(name, multiplied(pair))
        yield
    finally:
        for name, pair in factors.items():
            model.set_submodule(name, pair)


class WeLoreTrainer(LowMemSFTTrainer):
    """LowMemSFTTrainer of a model whose weights of low rank are factors.

    Raises:
        ValueError: with adapters, a quantised model or FSDP; where no weight is of low rank.
    """

    def __init__(self, model: PreTrainedModel | str, args: WeLoreConfig, **kwargs: Any) -> None:
        for name in ("peft_config", "quantization_config"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} cannot be combined with WeLore, which trains factors of plain weights.")
        if args.fsdp:
            raise ValueError(f"fsdp={args.fsdp!r} cannot be combined with WeLore. Train on one device, or with DDP.")
        if isinstance(model, str):
            settings = args.model_init_kwargs
            assert not isinstance(settings, str), settings  # a command line's has been read by now
            given = {name: value for name, value in (settings or {}).items() if value is not None}
            model, args.model_init_kwargs = AutoModelForCausalLM.from_pretrained(model, **given), None
        self.ranks = cut(model, args.welore_reduction)
        super().__init__(model, args, **kwargs)
        values = [p.numel() for p in model.parameters() if p.requires_grad]
        logger.info("WeLore: %d weights are cut and trained, %s values", len(self.ranks), f"{sum(values):,}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a plain model; within a checkpoint, the factors."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        with whole(self.accelerator.unwrap_model(self.model), self.ranks):
            super().save_model(output_dir, _internal_call)


if __name__ == "__main__":
    sys.exit(train(WeLoreConfig, WeLoreTrainer))
