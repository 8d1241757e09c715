"""DyLoRA (arXiv 2210.07558): one LoRA adapter of rank r that is an adapter of every smaller rank, too.

    python scripts/train_dylora.py --model_name_or_path MODEL --dataset_name DATA --output_dir OUT \
        --use_peft --lora_target_modules all-linear --lora_r 16 --lora_alpha 32 --optim adamw --learning_rate 2e-4
    python scripts/train_dylora.py truncate OUT --rank 4 --output OUT4

Each step draws a rank b from 1 .. r, alike often, for all layers, and the model is W0 + alpha / b * B[:, :b] @ A[:b]:
the first rows of A and columns of B learn to do without those behind them. The rank is a function of seed and step, so
that accumulation, checkpointing and a resumed run have the same one. Evaluation is at rank r.

What is saved is a plain LoRA adapter, which PEFT loads at rank r; `truncate` writes its first ranks as one that PEFT
loads at rank b. Both are the very adapters that were trained. Layers come in by PEFT's own register of custom modules.

Flags and keys of a YAML file as for scripts/train_sft.py. The paper's second variant, which changes only row and
column b in a step, is not here. Not for you when the rank is known: an adapter that is trained at one rank alone is
better there, or as good, and it saves nothing in training. For choosing a rank after one run, or serving several.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from peft import LoraConfig
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lowmem import LowMemSFTConfig, LowMemSFTTrainer
from hf_lowmem.cli.train import train

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UNFIT = {"use_dora": False, "lora_bias": False, "rank_pattern": {}, "modules_to_save": None, "target_parameters": None}


class FirstRows(nn.Module):
    """A: the first rows of its weight, as many as the rank."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.weight, self.rank = whole.weight, whole.out_features

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[: self.rank])


class FirstColumns(nn.Module):
    """B: the first columns of its weight, times what the scaling, alpha / rank**power, is more at a smaller rank."""

    def __init__(self, whole: nn.Linear, power: float) -> None:
        super().__init__()
        self.weight, self.rank, self.power = whole.weight, whole.in_features, power

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[:, : self.rank]) * self.more()

    def more(self) -> float:
        return (self.weight.size(1) / self.rank) ** self.power


class DyLoraLinear(lora.Linear):
    """PEFT's LoRA of a linear layer, at a rank that can be set."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: object) -> None:
        base = self.get_base_layer()
        if type(base) is not nn.Linear:
            raise ValueError(
                f"lora_target_modules: {kwargs['target_name']} is a {type(base).__name__}; DyLoRA is for nn.Linear. "
                "Name other modules, and load the model without quantization."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        a, b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        assert isinstance(a, nn.Linear)
        assert isinstance(b, nn.Linear)
        self.lora_A[adapter_name] = FirstRows(a)
        self.lora_B[adapter_name] = FirstColumns(b, 0.5 if config.use_rslora else 1.0)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging adds to the weight."""
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        assert isinstance(a, FirstRows)
        assert isinstance(b, FirstColumns)
        product = b.weight[:, : b.rank].float() @ a.weight[: a.rank].float()
        return (product * (self.scaling[adapter] * b.more())).to(b.weight.dtype)


def dylora(config: LoraConfig) -> LoraConfig:
    """The config, with which PEFT makes DyLoRA layers. Raises ValueError for what has no first ranks."""
    odd = [name for name, plain in UNFIT.items() if getattr(config, name, plain) not in (plain, None)]
    variants = [f.name for f in fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)]
    if odd or variants or config.init_lora_weights is not True:
        name = [*odd, *variants, "init_lora_weights"][0]
        raise ValueError(f"{name}={getattr(config, name)!r}: DyLoRA is of plain LoRA adapters. Leave it unset.")
    config._register_custom_module({nn.Linear: DyLoraLinear})
    return config


def set_rank(model: nn.Module, rank: int) -> None:
    """Let all layers use so many of their rows and columns."""
    for module in model.modules():
        if isinstance(module, FirstRows | FirstColumns):
            module.rank = rank


def rank_of(seed: int, step: int, largest: int) -> int:
    """The rank of a step."""
    return random.Random(f"{seed}, {step}").randint(1, largest)


class DyLoraTrainer(LowMemSFTTrainer):
    """LowMemSFTTrainer whose adapters have another rank in each step.

    Raises:
        ValueError: without adapters, for adapters that are not plain LoRA, or of a model whose layers are not plain.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        config = kwargs.get("peft_config")
        if not isinstance(config, LoraConfig):
            raise ValueError(
                f"peft_config={config!r}: DyLoRA trains LoRA adapters. Add --use_peft --lora_target_modules all-linear."
            )
        kwargs["peft_config"] = dylora(config)
        self.largest = config.r
        super().__init__(*args, **kwargs)

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        set_rank(self.model, rank_of(self.args.seed, self.state.global_step, self.largest))
        try:
            return super().training_step(*args, **kwargs)
        finally:
            set_rank(self.model, self.largest)


def truncate(arguments: Sequence[str] | None = None) -> int:
    """Write the first ranks of an adapter; the exit status."""
    parser = argparse.ArgumentParser(prog="train_dylora.py truncate", description="The first ranks of an adapter.")
    parser.add_argument("adapter", type=Path, help="folder of a DyLoRA adapter")
    parser.add_argument("--rank", type=int, required=True, help="from 1 to the adapter's own")
    parser.add_argument("--output", type=Path, required=True, help="a folder that there is not yet")
    asked = parser.parse_args(arguments)
    try:
        config = json.loads((asked.adapter / CONFIG).read_text(encoding="utf-8"))
        if not 1 <= asked.rank <= config["r"]:
            raise ValueError(f"--rank {asked.rank}: expected a whole number from 1 to {config['r']}, the adapter's.")
        if asked.output.exists():
            raise ValueError(f"--output {asked.output} is there already. Name a new folder.")
        tensors = load_file(asked.adapter / ADAPTER)
        for name, tensor in tensors.items():
            first = tensor[: asked.rank] if ".lora_A." in name else tensor[:, : asked.rank]
            tensors[name] = first.contiguous()
        asked.output.mkdir(parents=True)
        save_file(tensors, asked.output / ADAPTER, metadata={"format": "pt"})
        (asked.output / CONFIG).write_text(json.dumps(config | {"r": asked.rank}, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"train_dylora: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(truncate(sys.argv[2:]) if sys.argv[1:2] == ["truncate"] else train(LowMemSFTConfig, DyLoraTrainer))
