"""The small Llama with int8 in its weights or products, by other packages and by us: what it takes and where it ends.

All compute in bf16, begin with the same weights and see the same data. Each steps AdamW with its moments in 8 bits,
everybody's own, so that what differs is how weights are kept:

    masters                     fp32 weights, seen as bf16; ours
    bf16_sr, int8_sr            ours
    torchao int8 weights        int8 with a scale a row in bf16, rounded at random, in linear layers
    torchao int8 products       bf16 weights, rounded at random; operands of linear layers' products are made int8
    Q-GaLore's store            uint8 with a scale and a zero point for 256 values, by arithmetic in bf16, rounded at
                                random in each step (arXiv 2407.08296). Its package does not run here, so this is
                                written after it
    bitsandbytes paged          bf16 weights, rounded to nearest; moments are paged on a CUDA device and ordinary memory
                                here

`drift` is what a thousand updates of zero do to a store.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lowmem.memory import optimizer_bytes
from hf_lowmem.weights import AtRest
from parts.peers import PEERS
from parts.record import Row
from parts.small_llama import batches, build_model, heldout_loss, rate_at
from parts.weights.runs import Job, base_of, run

OURS = ("masters", "bf16_sr", "int8_sr")
RATE = 0.001  # AdamW's, of runs that continue; see runs.py
GROUP = 256


def linears(model: nn.Module) -> Iterator[Tensor]:
    """Weights of linear layers but the output head."""
    return (m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")


def qgalore_codes(values: Tensor, draw: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points, all in the values' own dtype; rounded at random, or to the nearest."""
    groups = values.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low).clamp_(min=1e-5) / 255
    zero = (-(low / scale)).round().clamp_(0, 255)
    scaled = groups / scale
    if draw is None:
        rounded = scaled.round()
    else:
        rounded = scaled.floor()
        rounded += torch.rand(scaled.shape, generator=draw) < scaled - rounded
    return (rounded + zero).clamp_(0, 255), scale, zero


def qgalore_(values: Tensor, draw: torch.Generator | None = None) -> None:
    """Write values through that store; rounded to the nearest, as the first time, or at random."""
    codes, scale, zero = qgalore_codes(values, draw)
    values.copy_(((codes - zero) * scale).view_as(values))


class QGaLore:
    """AdamW of bitsandbytes, whose linear weights go through Q-GaLore's store after each step."""

    def __init__(self, model: nn.Module, rate: float, decay: float, seed: int) -> None:
        self.inner = PEERS["bitsandbytes AdamW8bit"].load()(model.parameters(), lr=rate, weight_decay=decay)
        self.weights, self.draw = list(linears(model)), torch.Generator().manual_seed(seed)
        for p in self.weights:
            qgalore_(p.data)

    @torch.no_grad()
    def store(self) -> None:
        for p in self.weights:
            qgalore_(p, self.draw)


def _torchao(model: nn.Module, config: str) -> None:
    made = getattr(import_module("torchao.prototype.quantized_training"), config)()
    convert = import_module("torchao.quantization").quantize_
    convert(model, made, lambda m, n: isinstance(m, nn.Linear) and n != "lm_head")


def _int8_weights(model: nn.Module, rate: float, decay: float, seed: int) -> Optimizer:
    _torchao(model, "int8_weight_only_quantized_training")
    made = PEERS["torchao AdamW8bit"].load()
    return made(model.parameters(), lr=rate, weight_decay=decay, bf16_stochastic_round=True)


def _int8_products(model: nn.Module, rate: float, decay: float, seed: int) -> Optimizer:
    _torchao(model, "int8_mixed_precision_training")
    made = PEERS["torchao AdamW8bit"].load()
    return made(model.parameters(), lr=rate, weight_decay=decay, bf16_stochastic_round=True)


def _paged(model: nn.Module, rate: float, decay: float, seed: int) -> Optimizer:
    from bitsandbytes import optim

    return optim.PagedAdamW8bit(model.parameters(), lr=rate, weight_decay=decay)


THEIRS: dict[str, Callable[[nn.Module, float, float, int], "Optimizer | QGaLore"]] = {
    "torchao int8 weights": _int8_weights,
    "torchao int8 products": _int8_products,
    "Q-GaLore's store": QGaLore,
    "bitsandbytes paged": _paged,
}
WAYS = (*OURS, *THEIRS)


def weight_bytes(model: nn.Module, way: str) -> int:
    """Bytes of the weights as they are kept between two steps."""
    total = 0
    coded = set(map(id, linears(model))) if way == "Q-GaLore's store" else set[int]()
    for p in model.parameters():
        codes, scale = getattr(p, "int_data", None), getattr(p, "scale", None)
        if id(p) in coded:
            total += p.numel() + (2 + 1) * p.numel() // GROUP  # a scale in bf16 and a zero point
        elif codes is not None and scale is not None:
            total += codes.nbytes + scale.nbytes
        else:
            total += p.numel() * p.element_size()
    return total


def run_way(way: str, seed: int, size: Row) -> Row:
    """Train once; the row of the record."""
    if way in OURS:
        row = run(Job("continued", "adamw", way, RATE, seed), size)
        names = ("heldout_loss", "weight_bytes_per_parameter", "state_bytes_per_parameter", "cpu_seconds")
        return {"part": "run", "way": way, "seed": seed, "size": size} | {name: row[name] for name in names}
    warnings.simplefilter("ignore")
    began = time.process_time()
    model = build_model(size, seed, bf16=True)
    model.load_state_dict(base_of(seed, tuple(size.items())))
    optimizer = THEIRS[way](model, RATE, size["weight_decay"], seed)
    inner = optimizer.inner if isinstance(optimizer, QGaLore) else optimizer
    for step, ids in enumerate(batches(size, seed + 1000)):
        for group in inner.param_groups:
            now = RATE * rate_at(step, size)
            if isinstance(group["lr"], Tensor):  # torchao's, which is compiled around it
                group["lr"].fill_(now)
            else:
                group["lr"] = now
        model(input_ids=ids, labels=ids).loss.backward()
        inner.step()
        inner.zero_grad()
        if isinstance(optimizer, QGaLore):
            optimizer.store()
    count = sum(p.numel() for p in model.parameters())
    return {
        "part": "run",
        "way": way,
        "seed": seed,
        "size": size,
        "heldout_loss": heldout_loss(lambda ids: model(input_ids=ids, labels=ids).loss, size),
        "weight_bytes_per_parameter": weight_bytes(model, way) / count,
        "state_bytes_per_parameter": optimizer_bytes(inner) / count,
        "cpu_seconds": time.process_time() - began,
    }


def drift(way: str, updates: int) -> Row:
    """What updates of zero do to a weight of a deviation of 0.02, and to one whose values are all near 0.02."""
    draw = torch.Generator().manual_seed(0)
    contents = {
        "normal": 0.02 * torch.randn(128, 512, generator=draw),
        "all positive": 0.02 + 1e-4 * torch.randn(128, 512, generator=draw).abs(),
    }
    found: Row = {"part": "drift", "way": way, "updates": updates}
    for name, values in contents.items():
        first, last = _updated(way, values.bfloat16(), updates, draw)
        found[name] = {
            "first": float((first - values).norm() / values.norm()),  # what encoding alone does
            "moved": float((last - first).norm() / values.norm()),
        }
    return found


def _updated(way: str, values: Tensor, updates: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """The values as they are after the first encoding, and after updates of zero."""
    if way == "int8_sr":
        kept = AtRest("w", values)
        first = kept.load()
        for step in range(updates):
            kept.save(kept.load(), step)
        return first, kept.load()
    if way == "torchao int8 weights":
        torch.manual_seed(0)
        module = import_module("torchao.prototype.quantized_training.int8")
        weight = module.Int8QuantizedTrainingLinearWeight.from_float(values)
        first = weight.dequantize().float()
        for _ in range(updates):
            weight.add_(torch.zeros_like(values))
        return first, weight.dequantize().float()
    weight = values.clone()
    qgalore_(weight)
    first = weight.float()
    for _ in range(updates):
        qgalore_(weight, draw)
    return first, weight.float()


STORES = ("int8_sr", "torchao int8 weights", "Q-GaLore's store")
__all__ = ["OURS", "STORES", "WAYS", "drift", "qgalore_codes", "run_way", "weight_bytes"]
