"""Two gloo processes, under DDP, then FSDP2: `... -m tests.dist.start 2 tests.dist.zeroth_worker FOLDER METHOD ...`."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hf_lowmem.distributed import is_sharded
from hf_lowmem.optim import ZEROTH
from hf_lowmem.training.arguments import LowMemTrainingArguments
from hf_lowmem.training.mixin import LowMemTrainer
from tests.cli.launch.cases import fresh_engine
from tests.dist import fsdp_on_cpu
from tests.training.zeroth_runs import data, model, settings


def sharded(folder: Path, optim: str) -> None:
    """A run under FSDP2, and the same from its checkpoint; what goes between processes beside weights and scalars."""
    form = {"state_dict_type": "SHARDED_STATE_DICT", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    own: dict[str, Any] = {"fsdp": True, "fsdp_config": form}
    saving = settings(folder, optim, rows=2) | own | {"save_strategy": "steps", "save_steps": 2}
    ends = []
    for checkpoint in (None, str(folder / "checkpoint-2")):
        args = LowMemTrainingArguments(**saving)
        trainer: Any = LowMemTrainer(model(), args, train_dataset=data())
        with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as sums:
            trainer.train(resume_from_checkpoint=checkpoint)
        assert all(is_sharded(p) for p in trainer.model.parameters())
        if checkpoint is None:
            sent = [call.args[0] for call in sums.call_args_list if call.args[0].dtype == torch.float64]
            assert {t.numel() for t in sent} <= {2, 3, 9}, sent
        ends.append(torch.cat([p.full_tensor().detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*ends), optim
    if not ZEROTH[optim.partition(":")[0]].STATES:
        fresh_engine()
        form["state_dict_type"] = "FULL_STATE_DICT"
        with pytest.raises(ValueError, match="torch loads no such checkpoint"):
            LowMemTrainer(model(), LowMemTrainingArguments(**saving), train_dataset=data())
        fresh_engine()
    if dist.get_rank() == 0:
        torch.save(ends[0], folder / f"{optim} of shards.pt")


def main(folder: Path, methods: list[str]) -> None:
    for optim in methods:
        args = LowMemTrainingArguments(**settings(folder, optim, rows=2))
        trainer: Any = LowMemTrainer(model(), args, train_dataset=data())
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        mine = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        theirs = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(theirs, mine)
        assert torch.equal(*theirs), optim
        if dist.get_rank() == 0:
            torch.save(mine, folder / f"{optim}.pt")
            print(f"passed {optim}", flush=True)
    fresh_engine()
    fsdp_on_cpu.allow()
    for optim in methods:
        sharded(folder, optim)
        if dist.get_rank() == 0:
            print(f"passed {optim} of shards", flush=True)
    dist.barrier()
    if dist.get_rank() == 0:
        print("passed all", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
