"""Python's own time in a step: microseconds a parameter of an optimizer's step, and a saved tensor of a tape.

    python scripts/bench/overhead.py                    # half a minute on one core; adds to records/overhead.jsonl
    python scripts/bench/overhead.py --label after      # rows beside those that are there, under another label
    python scripts/bench/overhead.py --report           # the table of the record

On a GPU a step of many small kernels takes as long as Python needs to launch them. So the tensors here are as small as
they can be: the 291 parameters of Llama-3-8B, every side divided by 64, so that matrices are still compressed and
nearly all of the time is what a parameter or a saved tensor costs whatever its size.

    loop       decode, update and encode, as on a CPU; torch's operators, about a microsecond each, are part of it
    no update  the loop of a method whose `update` does nothing: what is around the mathematics alone
    fused      the path of a GPU with Triton, its kernels replaced by nothing: all of it is Python
    tape       a forward and backward pass with a tier less the same without, divided by the tensors that the tape saw
    launch     the path of a GPU down to Triton's launches, each of which is counted and does nothing; torch's kernels
               are counted in a step of their own, and run here in the time, a few microseconds each

A row is the median over repeats of process time (user and system) with the garbage collector off and one thread.
"""

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lowmem.activations import convert, undo
from hf_lowmem.activations.tape import Tape
from hf_lowmem.kernels import Kernel, use_kernels
from hf_lowmem.optim import OPTIMIZERS, LowMemOptimizer
from hf_lowmem.optim.backward import StepInBackward
from hf_lowmem.optim.lowrank.together import VALUES
from parts.record import RECORDS, commit, device_name, read_rows, versions_of, write_rows

RECORD = RECORDS / "overhead.jsonl"
SMALLER = 64  # each side of Llama-3-8B's weights is divided by it
LAYERS = 32
STEPS: dict[str, tuple[str, str, str]] = {
    # setting: method, state, path
    "adamw 8bit": ("adamw", "8bit", "loop"),
    "adamw 8bit, no update": ("adamw", "8bit", "no update"),
    "adamw 8bit, fused": ("adamw", "8bit", "fused"),
    "lion int8": ("lion", "int8", "loop"),
    "lion int8, fused": ("lion", "int8", "fused"),
    "apollo 8bit": ("apollo", "8bit", "loop"),
    "apollo_mini 8bit": ("apollo_mini", "8bit", "loop"),
}
TIERS = ("exact", "fp8")
LAUNCHES: dict[str, tuple[str, bool]] = {
    # setting, all with 8bit states and bf16_sr: method, whether in backward
    "adamw": ("adamw", False),
    "adamw in backward": ("adamw", True),
    "apollo": ("apollo", False),
    "apollo_mini": ("apollo_mini", False),
    "apollo in backward": ("apollo", True),
}
# What a GPU has no kernel for: views, memory, and what tensors are made of.
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "detach", "lift_fresh", "_local_scalar_dense"}


def parameters() -> list[tuple[str, nn.Parameter]]:
    """Llama-3-8B's 291 parameters by name, every side `SMALLER` times shorter, with gradients."""
    hidden, kv, mlp, words = (size // SMALLER for size in (4096, 1024, 14336, 128256))
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (words, hidden)}
    for i in range(LAYERS):
        layer = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        layer |= {"gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes |= {f"layers.{i}.norm{j}": (hidden,) for j in (1, 2)}
    shapes |= {"norm": (hidden,), "lm_head": (words, hidden)}
    draw = torch.Generator().manual_seed(0)
    named = []
    for name, shape in shapes.items():
        p = nn.Parameter(torch.randn(shape, generator=draw).mul_(0.02).to(torch.bfloat16))
        p.grad = torch.randn(shape, generator=draw).mul_(1e-3).to(torch.bfloat16)
        named.append((name, p))
    return named


def build(method: str, state: str, path: str, weights: str = "keep", width: int = 4096 // 4) -> LowMemOptimizer:
    """The optimizer; a low-rank one's rank is a quarter of the hidden size, or another `width`, of linear weights."""
    cls = OPTIMIZERS[method]
    if path == "no update":
        cls = type(cls.__name__, (cls,), {"update": lambda *args: None})
    named = parameters()
    groups: list[dict[str, Any]] = [{"params": named}]
    if "rank" in cls.DEFAULTS:
        rank = 1 if method == "apollo_mini" else width // SMALLER
        low = [(k, p) for k, p in named if k.startswith("layers.") and p.ndim == 2 and min(p.shape) > rank]
        rest = [(k, p) for k, p in named if all(p is not q for _, q in low)]
        groups = [{"params": low, "rank": rank}, {"params": rest, "rank": None}]
    return cls(groups, lr=1e-6, state=state, weights=weights, weight_decay=0.01)


def _no_reason(*args: Any) -> str:
    return ""


def _nothing(*args: Any) -> None:
    """A kernel's place. (A Mock's own call takes ten microseconds.)"""


@contextlib.contextmanager
def taking(path: str) -> Iterator[None]:
    """Inside, parameters take the path: the kernels' for "fused", where kernels do nothing."""
    if path != "fused":
        yield
        return
    with (
        use_kernels("triton"),
        mock.patch.object(Kernel, "unsupported", _no_reason),
        mock.patch.object(Kernel, "__call__", _nothing),
    ):
        yield


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median process time of `work`, after two calls that are not counted."""
    found = []
    for i in range(repeats + 2):
        gc.collect()
        gc.disable()
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
        gc.enable()
        if i < 2:
            found.clear()
    return statistics.median(found)


def steps(repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each setting of `STEPS`."""
    for setting, (method, state, path) in STEPS.items():
        optimizer = build(method, state, path)
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        with taking(path):
            each = seconds(optimizer.step, repeats) / count
        yield {"part": "step", "setting": setting, "parameters": count, "microseconds": round(each * 1e6, 1)}


class TorchKernels(TorchDispatchMode):
    """The number of torch's operators that would start a kernel on a GPU: not views, nor what has whole numbers only,
    which an optimizer's state keeps on the CPU. Ours are called past their operators, to look into them."""

    count = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        first = next((x for x in (result, *args) if isinstance(x, Tensor)), None)
        on_host = first is not None and first.dtype == torch.int64
        self.count += not (func.is_view or on_host or func.overloadpacket.__name__ in NO_KERNEL)
        return result


@contextlib.contextmanager
def counting(method: str) -> Iterator[list[str]]:
    """Inside, Triton's launches do nothing but add a name; sizes divide parameters as a real model's do.

    APOLLO-Mini's projections have one side of a weight's, all others' have two.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def launch(self: JITFunction | InterpretedFunction, *args: object, **kwargs: object) -> None:
        names.append(self.fn.__name__)

    with (
        use_kernels("triton"),
        mock.patch.object(Kernel, "unsupported", _no_reason),
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(InterpretedFunction, "run", launch),
        mock.patch("hf_lowmem.kernels.step.launch.SMALL", 4096 // SMALLER),  # norms are small, and nothing else
        mock.patch(
            "hf_lowmem.optim.lowrank.together.VALUES", VALUES // SMALLER ** (1 if method == "apollo_mini" else 2)
        ),
        mock.patch("hf_lowmem.optim.slot.SMALLEST_COMPRESSED", 4096 // SMALLER + 1),
        mock.patch("hf_lowmem.optim.slot.reads_are_free", return_value=False),
    ):
        yield names


def stepping_in_backward(optimizer: LowMemOptimizer) -> Callable[[], None]:
    """What a backward pass does for the optimizer, and the step after it."""
    stepping = StepInBackward(optimizer)
    work = [(i, p, p.grad) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]

    @torch.no_grad()  # as a hook is called
    def step() -> None:
        for i, p, grad in work:
            p.grad = grad
            stepping._update(p, i)
        optimizer.step()

    return step


def launches(repeats: int) -> Iterator[dict[str, object]]:
    """One row for each setting of `LAUNCHES`."""
    for setting, (method, in_backward) in LAUNCHES.items():
        optimizer = build(method, "8bit", "launch", "bf16_sr", 256)
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        step = stepping_in_backward(optimizer) if in_backward else optimizer.step
        with counting(method) as names:
            whole = seconds(step, repeats)
            names.clear()
            step()
            triton = len(names)
            with (
                mock.patch.object(Kernel, "__call__", lambda self, *args: self.pick(*args)(*args)),
                TorchKernels() as t,
            ):
                step()
        row = {"part": "launch", "setting": f"{setting} 8bit bf16_sr", "parameters": count, "triton": triton}
        yield row | {"torch": t.count, "microseconds": round(whole / count * 1e6, 1), "step_ms": round(whole * 1e3, 2)}


def tapes(repeats: int) -> Iterator[dict[str, Any]]:
    """One row for each tier: what a saved tensor costs more than without it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).train()
    ids = torch.zeros((1, 4), dtype=torch.int64)

    def work() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    for tier in TIERS:
        plain = seconds(work, repeats)
        convert(model, tier)
        seen = saved_tensors(work)
        each = (seconds(work, repeats) - plain) / seen
        undo(model)
        yield {"part": "tape", "setting": tier, "saved_tensors": seen, "microseconds": round(each * 1e6, 1)}


def saved_tensors(work: Callable[[], None]) -> int:
    """How many tensors autograd hands to tapes in one call."""
    seen, inner = 0, Tape.pack

    def pack(self: Tape, tensor: Tensor) -> Any:
        nonlocal seen
        seen += 1
        return inner(self, tensor)

    with mock.patch.object(Tape, "pack", pack):
        work()
    return seen


PARTS = {"step": steps, "tape": tapes, "launch": launches}


def report(rows: list[dict[str, Any]]) -> str:
    """A table with a column for each label, in microseconds a parameter or a saved tensor."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    by = {(row["part"], row["setting"], row["label"]): _cell(row) for row in rows}
    lines = ["| µs a parameter or saved tensor | " + " | ".join(labels) + " |", "|---|" + "---|" * len(labels)]
    for part, setting in dict.fromkeys((row["part"], row["setting"]) for row in rows):
        cells = [by.get((part, setting, label), "-") for label in labels]
        lines.append(f"| {part}: {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, object]) -> str:
    if row["part"] != "launch":
        return str(row["microseconds"])
    return f"{row['microseconds']} ({row['step_ms']} ms; {row['triton']} + {row['torch']} launches)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="now", help="rows with this label are replaced, the others stay")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--report", action="store_true", help="only print the table of the record")
    args = parser.parse_args()
    rows = read_rows(args.record)
    if not args.report:
        torch.set_num_threads(1)
        common = {
            "label": args.label,
            "command": f"python scripts/bench/overhead.py --label {args.label} --repeats {args.repeats}",
            "device": device_name(torch.device("cpu")),
            "versions": versions_of(("torch", "transformers")),
            "commit": commit(),
        }
        found = [row for part, run in PARTS.items() if part in args.part for row in run(args.repeats)]
        done = {(row["part"], row["setting"]) for row in found}
        rows = [r for r in rows if r["label"] != args.label or (r["part"], r["setting"]) not in done]
        rows += [row | common for row in found]
        write_rows(args.record, rows)
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
