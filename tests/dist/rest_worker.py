"""Weights at rest in int8 under FSDP2, on gloo: `torchrun ... -m tests.dist.rest_worker TASK WORDS... -- ...`.

Each process has the same batch, so that the mean of their gradients is what one process has, and it is compared with:
there the layers decode for themselves, here FSDP2 gathers codes.
"""

import copy
import gc
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from hf_lowmem.distributed import Shards, is_sharded, local
from hf_lowmem.memory import parameter_bytes
from hf_lowmem.optim import StepInBackward, make_optimizer
from hf_lowmem.training.arguments import LowMemTrainingArguments
from hf_lowmem.training.mixin import LowMemTrainer
from hf_lowmem.training.plugin import LowMemPlugin
from hf_lowmem.weights import SIDE_FILE, at_rest, expect_scales, resting, wake, write_scales
from tests.cli.launch.cases import fresh_engine
from tests.conftest import tiny_llama
from tests.dist import fsdp_on_cpu
from tests.dist.imported import ROOT
from tests.dist.launch import run_jobs
from tests.dist.net import apart
from tests.dist.trainer_worker import data
from tests.dist.worker import ELEMENTWISE, report

BF16 = torch.bfloat16
IDS = torch.arange(3, 51).view(2, 24)
STEPS = 4
RESTING = 15  # of two layers, and the embedding
FIELDS: dict[str, Any] = {"lowmem_weights": "int8_sr", "lowmem_step_in_backward": True, "max_grad_norm": 0.0}


def llama(**settings: Any) -> Any:
    return tiny_llama(dtype=BF16, **{"num_hidden_layers": 2} | settings).train()


def shard(model: Any, mesh: Any = None, **settings: Any) -> Any:
    """As accelerate does it: the embedding, each layer and the rest are units."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.model.embed_tokens, *model.model.layers, model):
        fully_shard(part, mesh=mesh, **settings)
    return model


def make(name: str, model: Any, **settings: Any) -> tuple[Any, StepInBackward]:
    optimizer = make_optimizer(name, model, lr=1e-3, weight_decay=0.1, weights="int8_sr", **settings)
    return optimizer, StepInBackward(optimizer)


def step(model: Any, optimizer: Any) -> float:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss.item()


def whole(model: Any) -> dict[str, Tensor]:
    """Values of all weights, whole on each process."""
    found = model.state_dict()
    return {k: (v.full_tensor() if is_sharded(v) else v).clone() for k, v in found.items()}


def scales(model: Any) -> dict[str, Tensor]:
    return {name: kept.scales().clone() for name, kept in resting(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k], b[k])]


def check_equals(name: str) -> None:
    """Losses, weights and scales of one process. An element's update sees that element; norms of shards are summed in
    float64 on several, so there a weight may fall on the other side of a draw."""
    rows: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}  # of whole blocks of the states' codecs
    alone, cut = llama(**rows), shard(llama(**rows))
    start = whole(alone)
    (single, one), (optimizer, two) = make(name, alone, state="8bit"), make(name, cut, state="8bit")
    assert len(resting(cut)) == RESTING == len(resting(alone))
    losses = [(step(alone, single), step(cut, optimizer)) for _ in range(STEPS)]
    ours, theirs = whole(cut), whole(alone)
    if name in ELEMENTWISE:
        assert all(a == b for a, b in losses), losses
        same(ours, theirs)
        same(scales(cut), scales(alone))
    else:
        assert abs(losses[-1][0] - losses[-1][1]) < 0.01 * (losses[0][0] - losses[-1][0]), losses
        far = apart(ours, theirs, start)
        # A subspace of a few steps' gradients is not determined to the last place: with weights="keep" it is as far.
        assert max(far.values()) < (1 if name in ("galore", "fira", "natural_galore") else 0.1), far
    assert losses[-1][0] < losses[0][0]
    norms = one.grad_norm(), two.grad_norm()
    assert norms[0] == pytest.approx(norms[1], rel=1e-6 if name in ELEMENTWISE else 0.05)


def bf16_values(least: int) -> list[tuple[int, ...]]:
    """Shapes of all bf16 tensors with memory of so many values that are alive."""
    gc.collect()
    found: dict[int, tuple[int, ...]] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.dtype == BF16 and at_rest(thing) is None:
            storage = thing.untyped_storage()
            if storage.nbytes() >= 2 * least:
                found[storage.data_ptr()] = tuple(thing.shape)
    return list(found.values())


def check_memory() -> str:
    """Codes and scales are all that is there of a weight between two steps, and what is gathered."""
    sys.path.insert(0, str(ROOT / "scripts" / "bench"))
    from wire import counted

    sent, kept = {}, 0
    for store in ("bf16_sr", "int8_sr"):
        model = shard(llama(hidden_size=128, intermediate_size=256), reshard_after_forward=True)
        optimizer = make_optimizer("adamw", model, weights=store)
        _ = StepInBackward(optimizer)
        with counted() as (found, _):
            step(model, optimizer)
        sent[store] = sum(v for k, v in found.items() if "gather" in k)
        for part in model.modules():
            getattr(part, "reshard", int)()
        if store == "bf16_sr":
            assert bf16_values(128 * 128 // 2), "what is looked for below is found here"
            everything = sum(p.numel() for p in model.parameters())
        else:
            kept = parameter_bytes(model)
            rests = sum(p.numel() for p in model.parameters() if at_rest(p) is not None)
            # Half of the head stays, and norms.
            assert len(bf16_values(128 * 128 // 2)) == 1
            assert kept == rests // 2 + rests // 2 // 128 * 4 + 2 * (everything - rests) // 2
        del model, optimizer, part
    # A half of each weight is sent twice, for forward and for backward: 1.03 bytes a value where it was 2.
    assert sent["bf16_sr"] - sent["int8_sr"] == rests * (2 - 1 - 4 / 128)
    return f"{sent['bf16_sr']} {sent['int8_sr']}"


NAME = r"layers\.0\.mlp\.up_proj\.weight"
READS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda p, m: p + 1,
    "whole": lambda p, m: p.full_tensor(),
    "local": lambda p, m: p.to_local() * 2,
    "data": lambda p, m: p.data.float(),
    "in place": lambda p, m: torch.no_grad()(p.mul_)(2),
    "norm": lambda p, m: torch.linalg.vector_norm(p),
    "foreach": lambda p, m: torch._foreach_norm([p]),
    "clone": lambda p, m: p.clone(),
    "copy": lambda p, m: copy.deepcopy(p),
    "pickle": lambda p, m: torch.save(p, io.BytesIO()),
    "another dtype": lambda p, m: m.float(),
    "another device": lambda p, m: m.to("meta"),
    "into another": lambda p, m: torch.no_grad()(torch.zeros_like(p).copy_)(p),
    "an average": lambda p, m: torch.no_grad()(torch.zeros_like(p).lerp_)(p, 0.1),
    "another optimizer": lambda p, m: (setattr(p, "grad", torch.ones_like(p)), torch.optim.AdamW([p]).step()),
}


def check_guard() -> None:
    """Who reads a shard is told its name, and nothing has changed; who does not is answered."""
    model = shard(llama())
    make("adamw", model)
    p = model.model.layers[0].mlp.up_proj.weight
    before = [t.clone() for t in resting(model)["model.layers.0.mlp.up_proj.weight"].stored()]
    for name, read in READS.items():
        with pytest.raises(
            RuntimeError, match=rf"{NAME if 'other d' not in name else ''} is at rest in int8.*weights\.wake"
        ):
            read(p, model)
        p.grad = None
    kept = at_rest(model.model.layers[0].mlp.up_proj.weight)
    assert kept is not None
    assert all(map(torch.equal, before, kept.stored()))
    model = shard(llama())
    optimizer, _ = make("adamw", model)
    first = step(model, optimizer)
    assert model.to("cpu").to(BF16) is model
    assert len(resting(model)) == RESTING
    zeros: Any = torch.zeros_like(model.model.embed_tokens.weight)
    assert zeros.full_tensor().eq(0).all()
    assert step(model, optimizer) < first


def refused(said: str, **settings: Any) -> None:
    model = shard(llama(), **settings)
    with pytest.raises(ValueError, match=rf"weights='int8_sr' cannot be combined with {said}.*of FSDP2"):
        make("adamw", model)


def check_settings() -> None:
    """Rows that are not shared evenly, what FSDP2 can do besides, and what is refused of it."""
    world = dist.get_world_size()
    model = shard(llama(vocab_size=129))
    optimizer, _ = make("adamw", model)
    assert at_rest(model.model.embed_tokens.weight) is None
    assert len(resting(model)) == RESTING - 1
    step(model, optimizer)
    # Replicas of shards, here of one part each; a gathered dtype of its own; no resharding; and whole in evaluation.
    for settings in (
        {"mesh": init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float32)},
        {"reshard_after_forward": False},
    ):
        alone, cut = llama(), shard(llama(), **settings)
        with torch.no_grad():
            cut(input_ids=IDS)
        (single, _a), (optimizer, _b) = make("adamw", alone), make("adamw", cut)
        for _ in range(2):
            losses = step(alone, single), step(cut, optimizer)
            with torch.no_grad():
                cut(input_ids=IDS)
        assert len(resting(cut)) == RESTING
        if "mp_policy" in settings:
            assert losses[0] == pytest.approx(losses[1], abs=0.02)
        else:
            assert losses[0] == losses[1]
            same(whole(cut), whole(alone))
    refused("CPUOffloadPolicy", offload_policy=CPUOffloadPolicy(pin_memory=False))
    alone = llama()
    make("adamw", alone)
    with pytest.raises(RuntimeError, match=r"model.embed_tokens.weight is at rest in int8"):
        shard(alone)


def check_files(folder: Path) -> None:
    """Scales are those of one process, in one file; values and scales give codes back, in shards and in one process."""
    model = shard(llama())
    optimizer, stepping = make("adamw", model)
    step(model, optimizer)
    write_scales(model, folder)
    dist.barrier()
    values, found = whole(model), scales(model)
    codes = {name: kept.codes.clone() for name, kept in resting(model).items()}
    step(model, optimizer)
    expect_scales(model, folder)
    with torch.no_grad():
        model.load_state_dict({k: wrap(model, k, v) for k, v in values.items()})
    same(found, scales(model))
    same(codes, {name: kept.codes for name, kept in resting(model).items()})
    alone = llama()
    make("adamw", alone)
    expect_scales(alone, folder)
    alone.load_state_dict(values)
    same(found, scales(alone))
    stepping.remove()
    before = model(input_ids=IDS, use_cache=False).logits.detach()
    assert wake(model) is model
    assert not resting(model)
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
    same(whole(model), values)
    assert all(type(local(p).detach()) is Tensor for p in model.parameters())
    again, _ = make("adamw", model)  # to rest once more, when FSDP2 has gathered them
    step(model, again)


def wrap(model: Any, name: str, value: Tensor) -> Tensor:
    p = model.get_parameter(name)
    if not is_sharded(p):
        return value
    home = Shards(p)
    return home.wrap(home.rows(value).contiguous(), len(value))


def train(folder: Path, form: str, resume: str | None = None, **settings: Any) -> Any:
    settings = FIELDS | {"optim": "adamw"} | settings
    args = LowMemTrainingArguments(
        output_dir=str(folder), use_cpu=True, max_steps=6, save_steps=3, logging_steps=1, report_to=[],
        per_device_train_batch_size=2, learning_rate=1e-3, lowmem_state="8bit", disable_tqdm=True, eval_on_start=True,
        eval_strategy="steps", eval_steps=6, fsdp=True,  # type: ignore[arg-type]
        fsdp_config={"state_dict_type": form, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        **settings,
    )  # fmt: skip
    trainer = LowMemTrainer(model=llama(), args=args, train_dataset=data(), eval_dataset=data()[:4])  # type: ignore[arg-type]
    assert not resting(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    assert len(resting(trainer.model)) == RESTING
    return trainer


def check_trainer(folder: Path, form: str) -> None:
    """Resumed to the bit, in another trainer and in the same once more; a full checkpoint is a plain model's."""
    done = train(folder, form)
    end, codes = whole(done.model), scales(done.model)
    again = train(folder, form, resume=str(folder / "checkpoint-3"))
    same(end, whole(again.model))
    same(codes, scales(again.model))
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    same(end, whole(again.model))
    assert (folder / "checkpoint-6" / SIDE_FILE).is_file()
    if form == "FULL_STATE_DICT":
        plain = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-6", dtype=BF16)
        same(plain.state_dict(), end)


def check_loop(folder: Path, form: str) -> None:
    """A loop with LowMemPlugin: saved, stepped, loaded; and resumed by another."""

    def start() -> tuple[Any, Any, Any, LowMemPlugin]:
        fresh_engine()
        accelerator = Accelerator(
            cpu=True,
            fsdp_plugin=FullyShardedDataParallelPlugin(
                fsdp_version=2,
                state_dict_type=form,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            ),
        )
        plugin = LowMemPlugin(
            optim="adamw", learning_rate=1e-3, **{k: FIELDS[k] for k in FIELDS if k != "max_grad_norm"}
        )
        model, optimizer = plugin.prepare(accelerator, llama())
        assert len(resting(model)) == RESTING
        return accelerator, model, optimizer, plugin

    def forward(accelerator: Any, model: Any, optimizer: Any) -> None:
        accelerator.backward(model(input_ids=IDS, labels=IDS, use_cache=False).loss)
        optimizer.step()
        optimizer.zero_grad()

    accelerator, model, optimizer, plugin = start()
    for _ in range(2):
        forward(accelerator, model, optimizer)
    accelerator.save_state(str(folder / form))
    saved, found = whole(model), scales(model)
    forward(accelerator, model, optimizer)
    end = whole(model)
    accelerator.load_state(str(folder / form))
    same(saved, whole(model))
    same(found, scales(model))
    forward(accelerator, model, optimizer)
    same(end, whole(model))
    plugin.remove()
    assert "load_state" not in vars(accelerator)
    accelerator, model, optimizer, plugin = start()
    accelerator.load_state(str(folder / form))
    same(found, scales(model))
    forward(accelerator, model, optimizer)
    same(end, whole(model))
    plugin.remove()


def main(task: str, *words: str) -> None:
    tasks: dict[str, Callable[[], Any]] = {
        "equals": lambda: [report(name, check_equals(name)) for name in words],
        "memory": lambda: report("memory", check_memory()),
        "guard": lambda: report("guard", check_guard()),
        "settings": lambda: report("settings", check_settings()),
        "number": lambda: report("number", refused("reshard_after_forward=.a number", reshard_after_forward=2)),
        "files": lambda: report("files", check_files(Path(words[0]))),
        "trainer": lambda: [report(form, check_trainer(Path(words[0]) / form, form)) for form in words[1:]],
        "loop": lambda: [report(form, check_loop(Path(words[0]), form)) for form in words[1:]],
    }
    if task in ("trainer", "loop"):
        fresh_engine()
        fsdp_on_cpu.allow()
    tasks[task]()
    report("all")


if __name__ == "__main__":
    run_jobs(main)
