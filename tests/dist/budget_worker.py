"""`lowmem_budget` on two processes: `torchrun ... -m tests.dist.budget_worker`."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import LlamaForCausalLM

from hf_lowmem.planner.models import token_maker
from hf_lowmem.training.sft import LowMemSFTTrainer
from tests.planner.real import arguments, small_config


def train(budget: str) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(small_config(num_hidden_layers=1))
    args = arguments(optim="lion", lowmem_activations="fp8", lowmem_weights="bf16_sr", lowmem_budget=budget)
    rows = torch.randint(3, 500, (8, 48), generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_dict({"input_ids": rows})
    trainer = LowMemSFTTrainer(model.to(torch.bfloat16), args, train_dataset=data, processing_class=token_maker())
    trainer.train()
    return trainer


def main() -> None:
    trainer = train("64MiB")
    assert trainer.predicted["settings"]["parallel"] == "ddp"
    assert os.environ["WORLD_SIZE"] == "2"
    assert trainer.args.world_size == dist.get_world_size() == 2
    choices: list[Any] = [None, None]
    dist.all_gather_object(choices, (trainer.args.lowmem_state, trainer.predicted["reserved_bytes"]))
    assert choices[0] == choices[1]
    assert trainer.args.lowmem_state is not None
    for p in trainer.model.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach())
        assert torch.equal(*both)
    with pytest.raises(ValueError, match=r"nothing fits in 1\.00 MiB"):
        train("1MiB")
    if dist.get_rank() == 0:
        print("passed all", flush=True)


if __name__ == "__main__":
    main()
