"""NOLA (arXiv 2310.02556): LoRA's A and B as mixtures of random matrices, of which the coefficients alone are trained.

    python scripts/train_nola.py --model_name_or_path MODEL --dataset_name DATA --output_dir OUT \
        --use_peft --lora_target_modules all-linear --lora_r 8 --nola_bases 256 --optim adamw --learning_rate 1e-3

    A = sum of a_i A_i,  B = sum of b_i B_i,  i = 1 .. nola_bases,    W0 + alpha / r * B @ A

The random matrices are a function of (nola_seed, layer's name, i), on any device, and are never stored: a block of
them is made where a forward or backward pass needs it. So an adapter is 2 x nola_bases numbers a layer, whatever its
rank and the layer's size; gradients, optimizer states and files hold nothing else. A's coefficients begin such that A
is as large as LoRA's, B's at zero, so that training begins with the model as it is.

Layers come in by PEFT's own register of custom modules. A saved adapter is loaded by `load(model, folder)` of this
file; PEFT alone refuses it, as its tensors are no LoRA's. `merge_and_unload()` makes a plain model.

Flags and keys of a YAML file as for scripts/train_sft.py. Not for you when a LoRA of rank 1 is small enough: it learns
more a byte of training memory, and no time goes into random numbers, of which each pass here makes nola_bases times a
LoRA's size (bench: scripts/README.md). For very many adapters, kept and sent.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.cli.train import train
from hf_lowmem.optim.zeroth.draws import normal

BLOCK = 1 << 22  # random numbers that there are at a time
PLACES = 1 << 33  # random numbers that a seed has, and would then begin anew
UNFIT = {"use_dora": False, "lora_bias": False, "modules_to_save": None, "target_parameters": None}


class Kept(Protocol):
    """What the backward pass needs."""

    seed: int
    shape: torch.Size
    dtype: torch.dtype


class Mix(torch.autograd.Function):
    """The sum of random matrices by their coefficients; both passes make the matrices anew."""

    @staticmethod
    def forward(ctx: Kept, coefficients: Tensor, seed: int, rows: int, columns: int) -> Tensor:
        ctx.seed, ctx.shape, ctx.dtype = seed, coefficients.shape, coefficients.dtype
        flat, total = coefficients.flatten(), coefficients.new_zeros(rows * columns)
        for first, block in _blocks(seed, len(flat), total):
            total += flat[first : first + len(block)] @ block
        return total.view(rows, columns)

    @staticmethod
    def backward(ctx: Kept, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].to(ctx.dtype).flatten()
        made = [block @ grad for _, block in _blocks(ctx.seed, ctx.shape.numel(), grad)]
        return torch.cat(made).view(ctx.shape), None, None, None


def _blocks(seed: int, bases: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first, some matrices, a row each), of a variance of 1 / bases."""
    size = like.numel()
    several = max(1, BLOCK // size)
    for first in range(0, bases, several):
        last = min(bases, first + several)
        values = normal(seed, first * size, last * size, like.device).view(last - first, size)
        yield first, values.to(like.dtype) / math.sqrt(bases)


class Mixture(nn.Module):
    """A linear map whose matrix is a mixture; `weight` are the coefficients."""

    def __init__(self, bases: int, seed: int, rows: int, columns: int, deviation: float) -> None:
        super().__init__()
        if bases * rows * columns > PLACES:
            raise ValueError(f"nola_bases={bases} matrices of {rows} x {columns} would repeat each other. Take fewer.")
        self.seed, self.out_features, self.in_features = seed, rows, columns
        self.weight = nn.Parameter(deviation * torch.randn(1, bases))

    def matrix(self) -> Tensor:
        made = Mix.apply(self.weight, self.seed, self.out_features, self.in_features)
        assert isinstance(made, Tensor)
        return made

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.matrix().to(input.dtype))


@dataclass
class NolaConfig(LoraConfig):
    """LoraConfig, and how many random matrices there are, from which seed. adapter_config.json holds both."""

    nola_bases: int = 256
    nola_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = [name for name, plain in UNFIT.items() if getattr(self, name, plain) not in (plain, None)]
        odd += [f.name for f in fields(self) if f.metadata.get("is_lora_variant") and getattr(self, f.name)]
        if odd or self.init_lora_weights is not True:
            name = [*odd, "init_lora_weights"][0]
            raise ValueError(f"{name}={getattr(self, name)!r}: NOLA mixes plain LoRA matrices. Leave it unset.")
        self._register_custom_module({nn.Linear: NolaLinear})


class NolaLinear(lora.Linear):
    """PEFT's LoRA of a linear layer, with mixtures in the place of A and B."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: object) -> None:
        base = self.get_base_layer()
        if type(base) is not nn.Linear:
            raise ValueError(
                f"lora_target_modules: {kwargs['target_name']} is a {type(base).__name__}; NOLA is for nn.Linear. "
                "Name other modules, and load the model without quantization."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        assert isinstance(config, NolaConfig)
        assert self.in_features is not None
        assert self.out_features is not None
        seeds = [seed_of(config.nola_seed, f"{kwargs['target_name']}, {part}") for part in "AB"]
        deviation = 1 / math.sqrt(3 * self.in_features)  # of LoRA's own A
        self.lora_A[adapter_name] = Mixture(config.nola_bases, seeds[0], r, self.in_features, deviation)
        self.lora_B[adapter_name] = Mixture(config.nola_bases, seeds[1], self.out_features, r, 0.0)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the weight."""
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        assert isinstance(a, Mixture)
        assert isinstance(b, Mixture)
        return b.matrix() @ a.matrix() * self.scaling[adapter]


def seed_of(seed: int, name: str) -> int:
    """A seed of 31 bits for one matrix of one layer."""
    return int.from_bytes(hashlib.blake2b(f"{seed}, {name}".encode(), digest_size=4).digest()) >> 1


def load(model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """The model with a saved adapter: PEFT's from_pretrained, with the layers that the adapter is of."""
    saved = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    known = {f.name for f in fields(NolaConfig) if f.init}
    config = NolaConfig(**{name: value for name, value in saved.items() if name in known and value is not None})
    return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)


@dataclass
class NolaSFTConfig(LowMemSFTConfig):
    """LowMemSFTConfig, and the mixtures' size and seed."""

    nola_bases: int = field(default=256, metadata={"help": "Random matrices of which A is a mixture; B of as many."})
    nola_seed: int = field(default=0, metadata={"help": "Of the random matrices. It is kept with the adapter."})

    def __post_init__(self) -> None:
        if self.nola_bases < 1:
            raise ValueError(f"nola_bases={self.nola_bases!r}: expected a whole number of at least 1.")
        super().__post_init__()


class NolaTrainer(LowMemSFTTrainer):
    """LowMemSFTTrainer of NOLA adapters.

    Raises:
        ValueError: without adapters, for adapters that are not plain LoRA, or of a model whose layers are not plain.
    """

    def __init__(self, model: nn.Module | str, args: NolaSFTConfig, **kwargs: object) -> None:
        plain = kwargs.get("peft_config")
        if not isinstance(plain, LoraConfig):
            raise ValueError(
                f"peft_config={plain!r}: NOLA trains adapters. Add --use_peft --lora_target_modules all-linear."
            )
        given = {f.name: getattr(plain, f.name) for f in fields(LoraConfig) if f.init}
        kwargs["peft_config"] = NolaConfig(**given, nola_bases=args.nola_bases, nola_seed=args.nola_seed)
        super().__init__(model, args=args, **kwargs)


if __name__ == "__main__":
    sys.exit(train(NolaSFTConfig, NolaTrainer))
