"""Trainers on gloo, under DDP and then under FSDP2: `python -m tests.dist.start 2 tests.dist.trainer_worker FOLDER`."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hf_lowmem.distributed import is_sharded
from hf_lowmem.training.arguments import LowMemTrainingArguments
from hf_lowmem.training.mixin import LowMemTrainer
from tests.cli.launch.cases import fresh_engine
from tests.conftest import tiny_llama
from tests.dist import budget_worker, fsdp_on_cpu


def data() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 128, (48, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def run(folder: Path, form: str, resume: str | None = None, **settings: Any) -> tuple[list[torch.Tensor], list[float]]:
    args = LowMemTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        fsdp=True,  # type: ignore[arg-type]
        fsdp_config={"state_dict_type": form, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        **settings,
    )
    trainer = LowMemTrainer(model=tiny_llama(), args=args, train_dataset=data())  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    found = list(trainer.model.parameters())
    assert all(is_sharded(p) for p in found)
    assert all(is_sharded(v) for s in trainer.optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg"))
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return [p.full_tensor().detach() for p in found], norms  # type: ignore[attr-defined]


def main(folder: Path) -> None:
    settings: dict[str, Any] = {"optim": "apollo", "lowmem_rank": 16, "lowmem_state": "8bit", "max_grad_norm": 0.0}
    settings |= {"lowmem_activations": "exact"}
    ends = []
    for form in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        where = folder / form
        whole, norms = run(where, form, **settings)
        again, _ = run(where, form, resume=str(where / "checkpoint-3"), **settings)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)), form
        ends.append((whole, norms))
        if dist.get_rank() == 0:
            print("passed", form, flush=True)
    stepped, norms = run(folder / "backward", "SHARDED_STATE_DICT", lowmem_step_in_backward=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], stepped, strict=True))
    torch.testing.assert_close(norms, ends[0][1], rtol=1e-4, atol=0)  # both log six digits or so
    if dist.get_rank() == 0:
        print("passed all", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    budget_worker.main()
    if dist.get_rank() == 0:
        print("passed budget", flush=True)
    fresh_engine()
    fsdp_on_cpu.allow()
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
