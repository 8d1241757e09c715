"""State bytes and time of a step, as ratios to torch's fused AdamW measured in the same minute.

Seconds say little about another machine and, on a shared one, little about the next hour. So every round steps every
optimizer once, and what counts is the median over the rounds of its time divided by that of torch's fused AdamW in that
very round. All optimizers step the same tensors: none has them warmer in a cache, and memory holds them once.

A low-rank step is measured between two refreshes of its basis. What a refresh costs is measured apart: a step that
refreshes, less one that does not. (`soap` refreshes at its own gap, by default every tenth step; the median is a step
without.)
"""

import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.optim import Optimizer

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.optim import make_optimizer
from hf_lowmem.optim.groups import linear_weights
from parts.optimizers.settings import CODECS, METHOD_OPTIONS, PAIRS
from parts.peers import PEERS as OTHERS
from parts.peers import REFERENCE, Peer
from parts.record import Rows

RATE = 1e-6  # the weights hardly move, whichever optimizer steps them, and however often
NEVER = 10**9  # steps between two refreshes
WARM_UP = 2  # steps: allocation and the first basis, then whatever is compiled

SIZE: dict[str, int] = {"width": 1024, "inner": 2816, "vocabulary": 4096, "rank": 256, "rounds": 7}
SMOKE = {"width": 64, "inner": 176, "vocabulary": 128, "rank": 8, "rounds": 1}


class Layer(nn.Module):
    """The parameters of one Llama layer and of an embedding; it computes nothing."""

    def __init__(self, size: dict[str, int]) -> None:
        super().__init__()
        width, inner = size["width"], size["inner"]
        self.embedding = nn.Embedding(size["vocabulary"], width)
        self.attention = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))


Build = Callable[[nn.Module, dict[str, int]], Optimizer]


def ours(method: str, state: str) -> Build:
    def build(model: nn.Module, size: dict[str, int]) -> Optimizer:
        options: dict[str, Any] = {}
        if method in METHOD_OPTIONS:  # the low-rank ones; apollo_mini's rank is one
            options["update_gap"] = NEVER
            if "rank" in METHOD_OPTIONS[method]:
                options["rank"] = size["rank"]
        return make_optimizer(method, model, lr=RATE, state=state, **options)

    return build


def whole(peer: Peer) -> Build:
    """A peer over all parameters."""
    return lambda model, _: peer.load()(model.parameters(), lr=RATE)


def galore_adamw() -> Callable[..., Optimizer]:
    from galore_torch import GaLoreAdamW

    return GaLoreAdamW


def apollo_adamw() -> Callable[..., Optimizer]:
    from apollo_torch import APOLLOAdamW

    return APOLLOAdamW


def low_rank(load: Callable[[], Callable[..., Optimizer]], **options: Any) -> Build:
    """A peer with the linear weights as low-rank group, as its README builds it."""

    def build(model: nn.Module, size: dict[str, int]) -> Optimizer:
        linear = [p for _, _, p in linear_weights(model)]
        known = {id(p) for p in linear}
        rest = [p for p in model.parameters() if id(p) not in known]
        group = {"params": linear, "rank": size["rank"], "update_proj_gap": NEVER, "proj_type": "std"} | options
        return load()([{"params": rest}, group], lr=RATE)

    return build


APOLLO = {"proj": "random", "scale_type": "channel", "scale": 1.0}
MINI = {"proj": "random", "scale_type": "tensor", "scale": 128.0, "rank": 1}

WHOLE = (
    REFERENCE,
    "torch AdamW foreach",
    "bitsandbytes AdamW8bit",
    "bitsandbytes Lion8bit",
    "torchao AdamW8bit",
    "torchao AdamWFp8",
    "torchao AdamW4bit",
    "lion-pytorch Lion",
)
# name → (package on PyPI, how to build it)
PEERS: dict[str, tuple[str, Build]] = {
    **{name: (OTHERS[name].package, whole(OTHERS[name])) for name in WHOLE},
    "galore-torch GaLoreAdamW": ("galore-torch", low_rank(galore_adamw, scale=0.25)),
    "apollo-torch APOLLO": ("apollo-torch", low_rank(apollo_adamw, **APOLLO)),
    "apollo-torch APOLLO-Mini": ("apollo-torch", low_rank(apollo_adamw, **MINI)),
}
OURS: dict[str, Build] = {f"{m} {c}": ours(m, c) for m, codecs in CODECS.items() for c in codecs} | {
    f"adamw {pair}": ours("adamw", pair) for pair in PAIRS
}


def fault(build: Build, size: dict[str, int]) -> str | None:
    """Why one of our optimizers cannot be built; None when it can."""
    try:
        build(Layer(size), size)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def seconds(step: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def with_gradients(model: nn.Module, device: torch.device) -> nn.Module:
    model.to(device)
    draw = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw, device=device) * 1e-3
    return model


def warmed(build: Build, model: nn.Module, size: dict[str, int]) -> Optimizer:
    optimizer = build(model, size)
    for _ in range(WARM_UP):
        optimizer.step()
    return optimizer


def interleaved(optimizers: dict[str, Optimizer], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step, by name, one a round."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in track(range(rounds), description="rounds"):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step, device))
    return times


def ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(t / o for t, o in zip(times, others, strict=True))


def installed(
    builds: dict[str, tuple[str, Build]], model: nn.Module, size: dict[str, int]
) -> tuple[dict[str, Optimizer], Rows]:
    """(what could be built and has stepped, rows that say why the rest has not)."""
    built: dict[str, Optimizer] = {}
    missing: Rows = []
    for name, (package, build) in track(builds.items(), description="first steps, others"):
        try:
            built[name] = warmed(build, model, size)
        except ImportError as error:
            absent = error.name is not None and error.name.split(".")[0] == package.replace("-", "_")
            missing.append({"setting": name, "note": "not installed" if absent else f"does not import: {error}"})
        except Exception as error:  # somebody else's package, on a device it may not know: said, not raised
            missing.append({"setting": name, "note": f"fails here: {type(error).__name__}: {str(error)[:200]}"})
    return built, missing


def measure_steps(
    size: dict[str, int], settings: dict[str, Build], peers: dict[str, tuple[str, Build]], device: torch.device
) -> Rows:
    """One row an optimizer: state bytes a parameter, seconds of a step, ratio to `REFERENCE`."""
    model = with_gradients(Layer(size), device)
    count = sum(p.numel() for p in model.parameters())
    theirs, rows = installed(peers, model, size)
    mine = {n: warmed(build, model, size) for n, build in track(settings.items(), description="first steps, ours")}
    times = interleaved(theirs | mine, size["rounds"], device)
    for name, optimizer in (theirs | mine).items():
        rows.append(
            {
                "setting": name,
                "package": f"{peers[name][0]} {version(peers[name][0])}" if name in peers else "hf-lowmem",
                "state_bytes_per_parameter": optimizer_bytes(optimizer) / count,
                "step_seconds": statistics.median(times[name]),
                "step_ratio": ratio(times[name], times[REFERENCE]),
            }
        )
    return [{"measured": "step", "parameters": count} | row for row in rows]


def galore(projection: str, gap: int) -> Build:
    return lambda model, size: make_optimizer(
        "galore", model, lr=RATE, rank=size["rank"], update_gap=gap, projection=projection
    )


def measure_refresh(size: dict[str, int], projections: list[str], device: torch.device) -> Rows:
    """One row a projection: seconds that a new basis of one (width, inner) weight adds to a step, ratio to `svd`."""

    def theirs(gap: int) -> Build:
        return low_rank(galore_adamw, scale=0.25, update_proj_gap=gap)

    def single() -> nn.Module:
        return nn.ModuleList([nn.Linear(size["inner"], size["width"], bias=False)])

    model = with_gradients(single(), device)
    pairs = {f"galore {p}": (galore(p, 1), galore(p, NEVER)) for p in projections}
    optimizers = {
        f"{name}, {kind}": warmed(build, model, size)
        for name, both in pairs.items()
        for kind, build in zip(("with", "without"), both, strict=True)
    }
    others = {f"galore-torch svd, {kind}": ("galore-torch", theirs(g)) for kind, g in (("with", 1), ("without", NEVER))}
    more, rows = installed(others, model, size)
    times = interleaved(optimizers | more, size["rounds"], device)
    names = [*pairs, *(["galore-torch svd"] if more else [])]
    added = {n: [a - b for a, b in zip(times[f"{n}, with"], times[f"{n}, without"], strict=True)] for n in names}
    for name in names:
        rows.append(
            {
                "setting": name,
                "refresh_seconds": statistics.median(added[name]),
                "of_svd": statistics.median(added[name]) / statistics.median(added["galore svd"])
                if "galore svd" in added
                else None,
            }
        )
    shape = [size["width"], size["inner"]]
    return [{"measured": "refresh", "shape": shape, "rank": size["rank"]} | row for row in rows]
