"""MeZO on two gloo processes under DDP: `python -m tests.dist.start 2 tests.dist.zeroth_worker FOLDER METHOD ...`."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_lowmem.training.arguments import LowMemTrainingArguments
from hf_lowmem.training.mixin import LowMemTrainer
from tests.conftest import tiny_llama
from tests.training.zeroth_runs import data, settings


def main(folder: Path, methods: list[str]) -> None:
    for optim in methods:
        args = LowMemTrainingArguments(**settings(folder, optim, rows=2))
        trainer: Any = LowMemTrainer(tiny_llama().double(), args, train_dataset=data())
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        mine = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        theirs = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(theirs, mine)
        assert torch.equal(*theirs), optim
        if dist.get_rank() == 0:
            torch.save(mine, folder / f"{optim}.pt")
            print(f"passed {optim}", flush=True)
    dist.barrier()
    if dist.get_rank() == 0:
        print("passed all", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
