"""DeepSpeed's ZeRO over gloo: `python -m tests.dist.start 2 tests.dist.zero_worker FOLDER`.

`DS_ACCELERATOR=cpu` makes DeepSpeed run on a CPU; its all-reduce in shared memory would first be compiled, so it is
turned off. accelerate takes a CPU without GPUs for a single process under DeepSpeed: a patch for this test says gloo.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # type: ignore[import-not-found]
import deepspeed.ops  # type: ignore[import-not-found]
import pytest
import torch
import torch.distributed as dist
import transformers.training_args
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_lowmem.optim import LowMemOptimizer, from_spec
from hf_lowmem.specs import OptimSpec
from hf_lowmem.training.arguments import LowMemTrainingArguments
from hf_lowmem.training.mixin import LowMemTrainer
from hf_lowmem.training.plugin import LowMemPlugin
from tests.conftest import tiny_llama
from tests.dist.net import Net, apart, equal_on_all, same, train_alone, weights

STAGES, METHODS, CODECS, STEPS = (1, 2), ("adamw", "lion"), ("fp32", "int8", "8bit"), 20
EXAMPLE = Path(__file__).parents[2] / "integrations" / "accelerate" / "zero2.yaml"


class Even(nn.Module):
    """Every weight, and every partition on two processes, is a multiple of a block: blocks lie as in one process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(256, 32, bias=False), nn.Linear(256, 64, bias=False)
        self.norm = nn.LayerNorm(64)

    forward = Net.forward


def spec(name: str, codec: str) -> OptimSpec:
    return OptimSpec(name=name, lr=0.01, weight_decay=0.1, state=codec)


def engine_of(stage: int, model: nn.Module, name: str, codec: str, **more: Any) -> tuple[Any, LowMemOptimizer]:
    optimizer = from_spec(spec(name, codec), model, flat=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # not set, it is 1
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config | more)[0], optimizer


def train(engine: Any, steps: range) -> None:
    for step in steps:
        engine.backward(engine(2 * step + dist.get_rank()))
        engine.step()


def alone(kind: type[nn.Module], name: str, codec: str) -> dict[str, Tensor]:
    model = kind()
    train_alone(model, from_spec(spec(name, codec), model), range(STEPS))
    return weights(model)


def equals(folder: Path, stage: int, name: str, codec: str) -> None:
    """Two processes against one; then the same once more from a save in the middle."""
    for kind in (Even, Net):
        model = kind()
        start = weights(model)
        engine, optimizer = engine_of(stage, model, name, codec)
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(p.ndim == 1 for p in flat)
        assert len(flat) < len(start)
        train(engine, range(STEPS // 2))
        place = folder / f"{kind.__name__}-{stage}-{name}-{codec}"
        engine.save_checkpoint(str(place))
        train(engine, range(STEPS // 2, STEPS))
        done = weights(model)
        assert equal_on_all(done.values())
        states = {v.dtype for p in flat for v in optimizer.state[p].values() if isinstance(v, Tensor)}
        assert (torch.uint8 in states) == (codec != "fp32")

        one = alone(kind, name, codec)
        if kind is Even or codec == "fp32":
            assert not same(done, one), (kind, stage, name, codec, same(done, one))
        else:
            # Both are the run with fp32 states and an error of the codec, each with its own blocks. Of two errors of
            # like size, and at worst opposite, the distance is twice the one.
            exact = alone(kind, name, "fp32")
            found, bound = max(apart(done, one, start).values()), 2 * max(apart(one, exact, start).values())
            say("apart", str(stage), name, codec, f"{found:.1e} of {bound:.1e}")
            assert found <= bound, (found, bound)

        again = kind()
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()  # the weights come from the checkpoint
        other, _ = engine_of(stage, again, name, codec)
        other.load_checkpoint(str(place))
        train(other, range(STEPS // 2, STEPS))
        assert not same(done, weights(again)), (kind, stage, name, codec)


def refused() -> None:
    """By the optimizer itself at its first step: who calls `deepspeed.initialize` by hand goes through no argument."""
    for name in ("apollo", "soap", "lamb"):
        engine, _ = engine_of(2, Net(), name, "fp32")
        with pytest.raises(ValueError, match=rf"{name} got a vector.*FSDP2.*adamw, lion"):
            train(engine, range(1))


def bad() -> None:
    """A NaN that DeepSpeed lets pass: its process leaves its partition as it was, the others step."""
    model = Even()
    engine, _ = engine_of(2, model, "adamw", "int8", bf16={"enabled": True, "check_grad_overflow": False})
    train(engine, range(1))
    before = weights(model)
    engine.backward(engine(2) + float("nan") * model.a.weight[0, 0])
    engine.step()
    after = weights(model)
    assert all(torch.isfinite(w).all() for w in after.values())
    assert "a.weight" not in same(before, after)
    assert not torch.equal(before["b.weight"][-32:], after["b.weight"][-32:])  # of the other partition
    assert equal_on_all(after.values())


def data() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 128, (48, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder: Path, stage: int, bf16: bool, resume: bool | None = None) -> list[Tensor]:
    args = LowMemTrainingArguments(
        output_dir=str(folder),
        bf16=bf16,
        max_steps=6,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        optim="adamw",
        lowmem_state="8bit",
        lowmem_activations="fp8",
        deepspeed={"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
                   "zero_optimization": {"stage": stage}},
    )  # fmt: skip
    made = LowMemTrainer(model=tiny_llama(), args=args, train_dataset=data())  # type: ignore[arg-type]
    made.train(resume_from_checkpoint=resume)
    assert type(made.model_wrapped).__name__ == "DeepSpeedEngine"
    assert made.activations is not None
    found = [p.detach().clone() for p in made.model.parameters()]
    assert equal_on_all(found)
    assert {p.dtype for p in found} == {torch.bfloat16 if bf16 else torch.float32}
    engine: Any = made.model_wrapped
    groups = engine.optimizer.optimizer.param_groups
    assert {group["state"] for group in groups} == {"int8_softsign,fp8_expand", "fp32"}
    return found


def trainers(folder: Path) -> None:
    """A run killed inside its last save, resumed from the one before, ends as one never killed."""
    for stage, bf16 in ((1, True), (2, False)):
        place = folder / f"trainer-{stage}"
        whole = trainer(place, stage, bf16)
        if dist.get_rank() == 0:
            (place / "checkpoint-6" / "lowmem_manifest.json").unlink()
        dist.barrier()
        again = trainer(place, stage, bf16, resume=True)
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)), stage


def plugins() -> None:
    """The example file's section, in a loop of one's own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
    plugin = LowMemPlugin.from_yaml(EXAMPLE)
    plugin.learning_rate = 1e-3
    accelerator = Accelerator()
    rows = torch.utils.data.DataLoader([row["input_ids"] for row in data()], batch_size=4)  # type: ignore[arg-type]
    model, optimizer, loader = plugin.prepare(accelerator, tiny_llama(), rows)
    first: list[Any] = []
    for rows in loader:
        loss = model(input_ids=rows, labels=rows).loss
        first = first or [rows, loss.item()]
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert model(input_ids=first[0], labels=first[0]).loss.item() < first[1]
    assert equal_on_all(model.parameters())


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo")
    for stage in STAGES:
        for name in METHODS:
            for codec in CODECS:
                equals(folder, stage, name, codec)
                say("equals", str(stage), name, codec)
    refused()
    say("refused")
    bad()
    say("bad")
    trainers(folder)
    say("trainers")
    plugins()
    say("plugins")
    say("all")


def say(*words: str) -> None:
    if dist.get_rank() == 0:
        print("passed", *words, flush=True)


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # transformers wants a GPU or `use_cpu` for bf16, and with `use_cpu` accelerate makes DDP of DeepSpeed.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)  # type: ignore[method-assign]
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
