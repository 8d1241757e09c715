"""What runs on each of several gloo processes: `python -m tests.dist.start 2 tests.dist.worker TASK WORDS ...`."""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_lowmem.distributed import local
from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import StepInBackward
from hf_lowmem.optim.slot import SMALLEST_COMPRESSED
from hf_lowmem.optim.state import values_of
from tests.dist.launch import run_jobs
from tests.dist.net import (
    Net,
    apart,
    equal_on_all,
    make,
    replicated,
    same,
    sharded,
    target,
    train,
    train_alone,
    train_by_rows,
    weights,
    wrap,
)

STEPS = 20
# A sum of N numbers in another order differs by about sqrt(N) roundings of 2**-24; the longest here has 5000 terms.
# Each of 20 steps may add that to an update, and an update is a part of the way that the bound is relative to.
SUMMATION = STEPS * math.sqrt(5000) * 2.0**-24
ELEMENTWISE = ("adamw", "lion")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_wrapped(
    kind: str, name: str, codec: str, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[Any, Any]:
    model = Net(dtype)
    if kind == "ddp":
        return wrap(kind, model), make(name, codec, model, **kwargs)
    model = sharded(model)
    return model, make(name, codec, model, **kwargs)


def check_equals_one_process(kind: str, name: str, codec: str) -> str:
    alone = Net()
    start, single = weights(alone), make(name, codec, alone)
    train_alone(alone, single, range(STEPS))
    model, optimizer = make_wrapped(kind, name, codec)
    train(model, optimizer, range(STEPS))
    assert equal_on_all(replicated(optimizer)), "state that every process has differs"
    assert equal_on_all(weights(model).values())
    promised = sum(optimizer.state_bytes(p, g) for g in optimizer.param_groups for p in g["params"])
    assert optimizer_bytes(optimizer) == promised
    ours, theirs = weights(model), weights(alone)
    if kind == "ddp":
        assert not same(ours, theirs), "one process with the same gradients has the same bits"
        return ""
    distance = apart(ours, theirs, start)
    if codec == "fp32":
        assert max(distance.values()) <= (0 if name in ELEMENTWISE else SUMMATION), distance
        return f"{max(distance.values()):.1e}"
    exact = Net()
    train_alone(exact, make(name, "fp32", exact), range(STEPS))
    truth = weights(exact)
    mine, other = apart(ours, truth, start), apart(theirs, truth, start)
    for key in ours:
        if name in ELEMENTWISE and key.startswith(("tall", "wide")):  # rows of whole blocks
            assert distance[key] == 0, key
        # Other blocks of about the same size: both runs are off the fp32 one by a draw of the codec's error.
        assert mine[key] <= 1.5 * other[key] + SUMMATION, (key, mine[key], other[key])
    return f"{max(distance.values()):.1e}"


def check_refused(name: str, message: str, **kwargs: Any) -> None:
    model = sharded(Net())
    with pytest.raises(ValueError, match=re.escape(message)):
        make(name, "fp32", model, **kwargs)


def check_replicas(kind: str, name: str, store: str, steps: int) -> None:
    """bf16 weights, 8-bit states, rounding at random: replicas and bases stay equal, shards round each for itself."""
    model, optimizer = make_wrapped(kind, name, "8bit", torch.bfloat16, weights=store, lr=1e-3)
    for first in range(0, steps, 10):
        train(model, optimizer, range(first, min(first + 10, steps)))
    assert equal_on_all(replicated(optimizer))
    assert equal_on_all(weights(model).values())
    assert all(w.isfinite().all() for w in weights(model).values())


def check_independent_shards() -> None:
    """Two shards with equal weights and gradients are rounded by different random numbers, under DDP by the same."""
    layer = nn.Linear(64, 128, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = make("adamw", "fp32", layer, weights="bf16_sr", lr=1e-3, weight_decay=0.0)
    layer(torch.ones(1, 64, dtype=torch.bfloat16)).float().sum().backward()
    optimizer.step()
    first, second = next(layer.parameters()).full_tensor().detach().chunk(2)  # type: ignore[attr-defined]
    assert len(first.unique()) == 2, "every weight moved by a quarter of bf16's step"
    share = (first == second).float().mean().item()
    assert share < 0.9, share


def check_thresholds() -> None:
    """Whether a state is compressed depends on the whole parameter, not on the rows that are here.

    The 67 x 70 values of `odd` are above the threshold, those of a half of it would not be; of `one` a process has all
    5000 or none. A vector's shards keep fp32 at any length, by a rule of their own (hf_lowmem/codecs/rows.py).
    """
    alone = Net()
    single = make("adamw", "int8", alone)
    train_alone(alone, single, range(1))
    model, optimizer = make_wrapped("fsdp2", "adamw", "int8")
    train(model, optimizer, range(1))

    def layouts(net: nn.Module, states: Any) -> dict[str, dict[str, torch.dtype]]:
        return {
            name: {k: v.dtype for k, v in values_of(states[p]).items()}
            for name, p in net.named_parameters()
            if p.ndim > 1
        }

    cut = layouts(model, optimizer.state)
    assert cut == layouts(alone, single.state)
    assert cut["odd.weight"]["exp_avg.codes"] == cut["one.weight"]["exp_avg.codes"] == torch.uint8
    here = {name: local(p).numel() for name, p in model.named_parameters()}
    assert 0 < here["odd.weight"] < SMALLEST_COMPRESSED < alone.odd.weight.numel()
    assert here["one.weight"] == (0 if dist.get_rank() else 5000)


def check_bad_gradient(name: str) -> None:
    """A NaN on one process is left out on all, and the step after it is as if it had not been but for the count."""
    model, optimizer = make_wrapped("fsdp2", name, "int8")
    train(model, optimizer, range(3))
    before, state = weights(model), copy.deepcopy(replicated(optimizer))
    optimizer.zero_grad()
    model(9).backward()
    for p in model.parameters():
        here = local(p.grad).detach()
        if dist.get_rank() == 0 and here.numel():
            here.view(-1)[-1] = float("nan")
    optimizer.step()
    assert not same(weights(model), before)
    assert all(torch.equal(a, b) for a, b in zip(state, replicated(optimizer), strict=True))
    train(model, optimizer, range(4, 6))
    after = weights(model)
    assert all(after[k].isfinite().all() and not torch.equal(after[k], before[k]) for k in after)


def check_step_in_backward(name: str) -> str:
    """The same as a step of its own; no gradient is left, and the norm is that of all shards."""
    model, optimizer = make_wrapped("fsdp2", name, "8bit")
    train(model, optimizer, range(4))
    other, stepped = make_wrapped("fsdp2", name, "8bit")
    stepping = StepInBackward(stepped)
    for step in range(4):
        other(2 * step + dist.get_rank()).backward()
        assert all(p.grad is None for p in other.parameters())
        stepped.step()
    assert not same(weights(model), weights(other))
    alone = Net()
    alone.load_state_dict(weights(other))
    ((alone(8) + alone(9)) / 2).backward()
    expected = torch.stack([p.grad.norm() for p in alone.parameters() if p.grad is not None]).norm()
    other(8 + dist.get_rank()).backward()
    stepped.step()
    norm = stepping.grad_norm()
    assert norm is not None
    assert math.isclose(norm, expected.item(), rel_tol=1e-6)
    return f"{norm:.4g}"


def save(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """The same moment in both forms."""
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    model_state, state = get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": state}, checkpoint_id=folder / "sharded")
    whole = {
        "model": get_model_state_dict(model, options=FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    if dist.get_rank() == 0:
        torch.save(whole, folder / "full.pt")
    dist.barrier()


def load(model: nn.Module, optimizer: Any, folder: Path, form: str) -> None:
    if form == "sharded":
        found = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(found, checkpoint_id=folder / "sharded")
        set_model_state_dict(model, found["model"])
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
        return
    whole = torch.load(folder / "full.pt", weights_only=True)
    everywhere = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, whole["model"], options=everywhere)
    set_optimizer_state_dict(model, optimizer, whole["optimizer"], options=everywhere)


def shards_of(optimizer: Any) -> list[Tensor]:
    """All state on this process."""
    return [
        local(v).detach()
        for g in optimizer.param_groups
        for p in g["params"]
        for _, v in sorted(optimizer.state[p].items())
        if isinstance(v, Tensor)
    ]


def check_resume(name: str, codec: str, folder: Path) -> None:
    """Saved, loaded into a fresh run and continued: the bits of a run that was never interrupted."""
    store = {"int8": "bf16_ecc", "fp8_expand": "bf16_sr"}
    narrow = {"dtype": torch.bfloat16, "weights": store[codec]} if codec in store else {}
    model, optimizer = make_wrapped("fsdp2", name, codec, **narrow)
    train(model, optimizer, range(5))
    where = folder / f"{name}-{codec}"
    save(model, optimizer, where)
    saved = [t.clone() for t in shards_of(optimizer)]
    train(model, optimizer, range(5, 9))
    for form in ("sharded", "full"):
        again, resumed = make_wrapped("fsdp2", name, codec, **narrow)
        load(again, resumed, where, form)
        loaded = shards_of(resumed)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(saved, loaded, strict=True)), form
        train(again, resumed, range(5, 9))
        assert not same(weights(model), weights(again)), form
        assert all(torch.equal(a, b) for a, b in zip(shards_of(optimizer), shards_of(resumed), strict=True)), form


def reshard_save(name: str, codec: str, folder: Path) -> None:
    """A run to be continued on another number of processes, and how it ends on this one."""
    model, optimizer = make_wrapped("fsdp2", name, codec)
    start = weights(model)
    train_by_rows(model, optimizer, range(8))
    where = folder / f"{name}-{codec}"
    save(model, optimizer, where)
    train_by_rows(model, optimizer, range(8, 8 + STEPS))
    end = weights(model)
    if dist.get_rank() == 0:
        torch.save({"start": start, "end": end}, where / "end.pt")


def loss_of(found: dict[str, Tensor]) -> float:
    return sum((w.double() - target(k, w.shape, 99)).pow(2).sum().item() for k, w in found.items())


def reshard_load(name: str, codec: str, folder: Path) -> str:
    where = folder / f"{name}-{codec}"
    end = torch.load(where / "end.pt", weights_only=True)
    worst = 0.0
    for form in ("sharded", "full"):
        model, optimizer = make_wrapped("fsdp2", name, codec)
        load(model, optimizer, where, form)
        train_by_rows(model, optimizer, range(8, 8 + STEPS))
        ours = weights(model)
        assert equal_on_all(replicated(optimizer))
        distance = max(apart(ours, end["end"], end["start"]).values())
        # Element by element nothing is summed. A sum in another order may tip a value over the border of two codes.
        allowed = 0 if name in ELEMENTWISE else SUMMATION if codec == "fp32" else 2e-3
        assert distance <= allowed, (form, distance)
        assert math.isclose(loss_of(ours), loss_of(end["end"]), rel_tol=1e-5)
        worst = max(worst, distance)
    return f"{worst:.1e}"


def check_conversion(name: str, codec: str) -> str:
    """A checkpoint of one process goes on in shards, and one of shards in one process."""
    alone = Net()
    start, single = weights(alone), make(name, codec, alone)
    train_by_rows(alone, single, range(6))
    saved = copy.deepcopy({"model": alone.state_dict(), "optimizer": single.state_dict()})
    train_by_rows(alone, single, range(6, 12))

    cut = Net()
    cut.load_state_dict(saved["model"])
    model = sharded(cut)
    optimizer = make(name, codec, model)
    optimizer.load_state_dict(saved["optimizer"])
    # A copy: torch hands out the optimizer's own tensors where there is nothing to gather.
    whole = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)))
    train_by_rows(model, optimizer, range(6, 12))
    there = apart(weights(model), weights(alone), start)

    back = Net()
    back.load_state_dict(saved["model"])
    returned = make(name, codec, back)
    set_optimizer_state_dict(back, returned, whole)
    layouts = zip(single.state.values(), returned.state.values(), strict=True)
    assert all(
        {k: getattr(v, "shape", None) for k, v in a.items()} == {k: getattr(v, "shape", None) for k, v in b.items()}
        for a, b in layouts
    ), "the layout is one process's"
    train_by_rows(back, returned, range(6, 12))
    home = apart(weights(back), weights(alone), start)
    for distance in (there, home):
        for key, value in distance.items():
            exact = name in ELEMENTWISE and (codec == "fp32" or key.startswith(("tall", "wide")))
            # One more rounding of each moment, by at most a tenth of it (int8: 0.0703), and 6 of 12 steps feel it.
            assert value <= (0 if exact else SUMMATION if codec == "fp32" else 0.1), (key, value)
    return f"{max(there.values()):.1e} {max(home.values()):.1e}"


def check_foreign_layout() -> None:
    """A whole checkpoint of one process that torch cuts by itself is recognised and refused."""
    alone = Net()
    single = make("adamw", "int8", alone)
    train_by_rows(alone, single, range(2))
    flat = get_optimizer_state_dict(alone, single)
    model, optimizer = make_wrapped("fsdp2", "adamw", "int8")
    train_by_rows(model, optimizer, range(1))
    with pytest.raises(ValueError, match="made by one process"):
        set_optimizer_state_dict(model, optimizer, flat, options=StateDictOptions(full_state_dict=True))


def report(label: str, found: Any = None) -> None:
    if dist.get_rank() == 0:
        print("passed", label, found or "", flush=True)


def main(task: str, *words: str) -> None:
    """TASK and its words; lists are separated by commas."""
    lists = [word.split(",") for word in words]
    tasks: dict[str, Callable[[], Any]] = {
        "equals": lambda: [
            report(f"{kind} {name} {codec}", check_equals_one_process(kind, name, codec))
            for kind in lists[0] for name in lists[1] for codec in lists[2]
        ],
        "replicas": lambda: [
            report(f"{kind} {name} {store}", check_replicas(kind, name, store, int(words[3])))
            for kind in lists[0] for name in lists[1] for store in lists[2]
        ],
        "shards": lambda: [
            report("independent", check_independent_shards()),
            report("thresholds", check_thresholds()),
        ],
        "bad": lambda: [report(f"bad {name}", check_bad_gradient(name)) for name in lists[0]],
        "backward": lambda: [report(f"backward {name}", check_step_in_backward(name)) for name in lists[0]],
        "refused": lambda: [
            report("refused soap", check_refused("soap", "Use DDP, or choose 'adamw'")),
            report("refused svd", check_refused("galore", "Set projection='subspace'", projection="svd")),
        ],
        "convert": lambda: [
            report(f"convert {name} {codec}", check_conversion(name, codec)) for name in lists[0] for codec in lists[1]
        ],
        "foreign": lambda: report("foreign", check_foreign_layout()),
        "resume": lambda: [
            report(f"resume {name} {codec}", check_resume(name, codec, Path(words[2])))
            for name in lists[0] for codec in lists[1]
        ],
        "reshard-save": lambda: [reshard_save(n, c, Path(words[2])) for n in lists[0] for c in lists[1]],
        "reshard-load": lambda: [
            report(f"reshard {n} {c}", reshard_load(n, c, Path(words[2]))) for n in lists[0] for c in lists[1]
        ],
    }  # fmt: skip
    tasks[task]()
    report("all")


if __name__ == "__main__":
    run_jobs(main)
