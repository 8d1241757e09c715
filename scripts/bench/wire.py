"""Bytes that each method sends in a step under FSDP2, beside FSDP2 with torch's AdamW, counted over gloo on a CPU.

    python scripts/bench/wire.py                    # half a minute; writes records/wire.jsonl and prints the tables
    python scripts/bench/wire.py --sizes 256 688 16 --record wire_small.jsonl

Two layers of three linear weights, m = 1024 and n = 2752 (the ratio of Llama's), rank m/16, on two processes. "layers":
square, up (n x m) and down (m x n), as a decoder layer has them. "tall": square and up alone, no side of whose
gradients that a method projects is the one that FSDP2 cuts. The counts are those of arithmetic and have no error; on
W processes a sum of x bytes costs each one 2 (W - 1) / W x, a gathering or scattering half of that.

Each row of the record: method, case, bytes that one process sends in the forward and backward passes (`passes`), in the
optimizer's first step, in one that makes a new basis (`refresh`; equal to `step` where a method has none) and in an
ordinary one (`step`), calls of collectives in that one, and the ratio of passes + step to those of torch's AdamW.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_lowmem.optim import OPTIMIZERS, make_optimizer
from hf_lowmem.specs import OptimSpec
from parts.record import RECORDS, provenance, read_rows, write_rows

LAYERS = 2
SIZES = (1024, 2752, 64)  # m, n, rank
CASES = ("layers", "tall")
BASELINE = "torch AdamW"
PROCESSES = 2
ROW = "row "
# Two of them were renamed in torch 2.13, where FSDP2 uses the new ones.
HALVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter_single")


def shardable(name: str) -> bool:
    """Whether a method works on rows of a matrix; soap needs the whole and is refused."""
    cls = OPTIMIZERS[name]
    group = cls.resolve(OptimSpec(name=name)) | {"rank": 1}
    return cls.unsharded_only(torch.Size((2, 2)), group) is None


METHODS = (BASELINE, *filter(shardable, OPTIMIZERS))


class Layer(nn.Module):
    def __init__(self, case: str, m: int, n: int) -> None:
        super().__init__()
        self.square = nn.Linear(m, m, bias=False)
        self.up = nn.Linear(m, n, bias=False)  # its weight is (n, m), with more rows than columns
        self.down = nn.Linear(n, m, bias=False) if case == "layers" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(self.square(x)).tanh()
        return x + (h[..., : x.shape[-1]] if self.down is None else self.down(h))


@contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """(bytes that a process sends, calls), by the name of the collective."""
    share = (dist.get_world_size() - 1) / dist.get_world_size()
    sent: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def watch(name: str, size: Callable[..., float]) -> Callable[[], None]:
        plain = getattr(dist, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            sent[name] += round(share * size(*(t.nbytes for t in tensors)))
            calls[name] += 1
            return plain(*args, **kwargs)

        setattr(dist, name, run)
        return lambda: setattr(dist, name, plain)

    undo = [watch("all_reduce", lambda one: 2 * one)]
    undo += [watch(name, max) for name in HALVES if hasattr(dist, name)]
    try:
        yield sent, calls
    finally:
        for back in undo:
            back()


def measure(case: str, name: str, m: int, n: int, rank: int) -> dict[str, Any]:
    """One method's bytes; collective."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(case, m, n) for _ in range(LAYERS)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    options: dict[str, Any] = {}
    if name == BASELINE:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        defaults = OPTIMIZERS[name].DEFAULTS
        options |= {"rank": min(rank, defaults["rank"])} if "rank" in defaults else {}
        options |= {"update_gap": 2} if "update_gap" in defaults else {}
        optimizer = make_optimizer(name, model, lr=1e-3, **options)
    found: dict[str, Any] = {"case": case, "method": name, "m": m, "n": n, "rank": options.get("rank")}
    for part in ("first", "step", "refresh"):
        with counted() as (sent, _):
            model(torch.randn(4, m)).square().mean().backward()
        found["passes"] = sent.total()
        with counted() as (sent, calls):
            optimizer.step()
        found[part] = sent.total()
        if part == "step":
            found["calls"] = dict(calls)
        optimizer.zero_grad()
    return found


def work(m: int, n: int, rank: int) -> None:
    """On each process."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in CASES:
        for name in METHODS:
            row = measure(case, name, m, n, rank)
            if dist.get_rank() == 0:
                print(ROW + json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def count(m: int, n: int, rank: int) -> list[dict[str, Any]]:
    """The rows, from processes of their own.

    Raises:
        RuntimeError: where one is missing. gloo may end a process with an error after everything has been said, so
            the status does not count.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    sizes = ["--sizes", str(m), str(n), str(rank)]  # torchrun takes "--m" for a shortened option of its own
    done = subprocess.run([*launch, __file__, "--worker", *sizes], capture_output=True, text=True, check=False)
    rows = [json.loads(line.removeprefix(ROW)) for line in done.stdout.splitlines() if line.startswith(ROW)]
    if len(rows) != len(CASES) * len(METHODS):
        raise RuntimeError(f"{len(rows)} rows came back:\n{done.stderr[-4000:]}")
    base = {row["case"]: row["passes"] + row["step"] for row in rows if row["method"] == BASELINE}
    return [row | {"ratio": (row["passes"] + row["step"]) / base[row["case"]]} for row in rows]


def table(rows: Sequence[dict[str, Any]], case: str) -> list[str]:
    """Markdown, a line a method."""
    lines = ["| | first step | new basis | ordinary step | of FSDP2 + AdamW |", "|---|---|---|---|---|"]
    for row in rows:
        if row["case"] == case:
            name = row["method"] if row["method"] == BASELINE else f"`{row['method']}`"
            parts = [f"{row[part]:,}" for part in ("first", "refresh", "step")]
            lines.append(f"| {name} | {' | '.join(parts)} | {100 * row['ratio']:.2f} % |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bytes over the wire by method, counted over gloo.")
    parser.add_argument("--record", type=Path, default=RECORDS / "wire.jsonl", help="where the rows go")
    parser.add_argument("--sizes", type=int, nargs=3, metavar=("M", "N", "RANK"), default=SIZES)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(*options.sizes)
        return 0
    common = {
        "command": "python scripts/bench/wire.py",
        "processes": PROCESSES,
        **provenance(("torch",)),
    }
    write_rows(options.record, [row | common for row in count(*options.sizes)])
    rows = read_rows(options.record)
    for case in CASES:
        passes = next(row["passes"] for row in rows if row["case"] == case)
        print(f"\n{case}: bytes that each of {PROCESSES} processes sends, beside {passes:,} of FSDP2's passes\n")
        print("\n".join(table(rows, case)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
