"""What a codec does to the update m / sqrt(v), on the moments of AdamW in real training: every pair of codecs.

    python scripts/bench/codecs.py                     # about ten minutes on two cores; writes records/codecs.jsonl
    python scripts/bench/codecs.py --steps 20 --tuning-steps 2 --record short.jsonl

Three sets of moments: a Llama of 3.3M parameters trained from nothing on Shakespeare's bytes; layers 0, 15 and 29 of
SmolLM2-135M fine-tuned on the plays; the first 4096 rows of its embedding, whose rows are far apart in size.

Each row of kind "pair": the set, the codecs of m and v, bytes a value of both together, and of the update u, in
learning rates, before and after the two codecs: mean |Δu|, the same as a part of mean |u|, the root of the mean square
as a part of u's, and the largest |Δu|. The codecs of one moment alone stand beside "fp32". Rows of kind "design" are
designs that were not taken, on one moment alone: the paper's 4-bit maps, and the softsign with c = 1. Rows of kind
"speed": nanoseconds a value on this device, one thread.

COAT (arXiv 2410.19313) publishes 8.27 for dynamic int8 m with range-expanded fp8 v, and 12.31 for range-expanded fp8 of
both, in a measure and on a training of its own: the order can be compared, the figures cannot.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowmem.codecs import CODECS, PAIRS, StateCodec
from hf_lowmem.codecs.int8 import dynamic_map
from hf_lowmem.demo import data
from hf_lowmem.demo.model import load, prepare_model
from parts.record import RECORDS, provenance, write_rows

RECORD = RECORDS / "codecs.jsonl"
TOKENS, SEED, BETAS = 128, 0, (0.9, 0.999)
LAYERS, EMBEDDING_ROWS = (0, 15, 29), 4096
SMALLEST = 4096  # values; a smaller parameter keeps fp32 states
EIGHT_BITS = ("int8", "int8_softsign", "fp8", "fp8_expand")

Moments = list[tuple[Tensor, Tensor]]  # of each parameter m and v, such that m / sqrt(v) is AdamW's update
Compressor = Callable[[Tensor], Tensor]  # what a codec makes of a value


def train(model: torch.nn.Module, batches: Iterable[Tensor], lr: float) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameter name → its moments after AdamW has seen the batches, with the bias correction in m."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    model.train()
    steps = 0
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    correction = (1 - BETAS[1] ** steps) ** 0.5 / (1 - BETAS[0] ** steps)
    return {
        name: (optimizer.state[p]["exp_avg"] * correction, optimizer.state[p]["exp_avg_sq"])
        for name, p in model.named_parameters()
        if p.numel() >= SMALLEST
    }


def scratch(plays: dict[str, list[data.Speech]], steps: int) -> Moments:
    """Of a small Llama on bytes, eight windows a step."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
    )
    text = "\n\n".join(speech.text for speeches in plays.values() for speech in speeches).encode()
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(values) - TOKENS, (steps, 8))
    batches = (values[start[:, None] + torch.arange(TOKENS)] for start in starts)
    return list(train(LlamaForCausalLM(config), track(batches, "Llama", total=steps), 1e-3).values())


def tuned(plays: dict[str, list[data.Speech]], steps: int) -> tuple[Moments, Moments]:
    """Of SmolLM2's layers, and of its embedding; two texts a step."""
    with tempfile.TemporaryDirectory() as cache:
        model, tokenizer = load(prepare_model(None, Path(cache)))
    texts = list(data.sft_dataset(plays, size=2 * steps, tokens=TOKENS, seed=SEED)["text"])

    def batches() -> Iterator[Tensor]:
        for start in track(range(0, len(texts), 2), "SmolLM2"):
            encoded = tokenizer(texts[start : start + 2], truncation=True, max_length=TOKENS, return_tensors="pt")
            yield encoded["input_ids"]

    found = train(model, batches(), 2e-4)
    wanted = tuple(f".layers.{i}." for i in LAYERS)
    layers = [moments for name, moments in found.items() if any(part in name for part in wanted)]
    m, v = next(moments for name, moments in found.items() if "embed_tokens" in name)
    return layers, [(m[:EMBEDDING_ROWS].clone(), v[:EMBEDDING_ROWS].clone())]


def compressor(codec: StateCodec, *, signed: bool) -> Compressor:
    def compress(value: Tensor) -> Tensor:
        enc = codec.init(value, signed=signed)
        codec.encode_(enc, value)
        return codec.decode(enc, value.shape)

    return compress


def in_blocks(block: int, rule: Callable[[Tensor, Tensor], Tensor]) -> Compressor:
    """A naive design: `rule(quotients, sign)` decides in units of each block's extreme, an fp32."""

    def compress(value: Tensor) -> Tensor:
        flat = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % block)).view(-1, block)
        scale = flat.gather(1, flat.abs().argmax(1, keepdim=True))
        scale = torch.where(scale == 0, 1, scale)
        return (rule(flat / scale, flat) * scale).flatten()[: value.numel()].view(value.shape)

    return compress


def nearest(values: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda q, _: values[torch.bucketize(q, (values[1:] + values[:-1]) / 2)]


def softsign(q: Tensor, _: Tensor) -> Tensor:
    y = (127 * 2 * q / (1 + q.abs())).round() / 127
    return y / (2 - y.abs())


def dynamic_of_4_bits() -> Tensor:
    """Three decades of the dynamic map, 1, 2 and 4 middles of equal parts in each, both signs, with 0 and 1."""
    middles = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    return torch.tensor(sorted([0.0, 1.0, *middles, *(-middle for middle in middles)]))


# name → (of which moment, how): of arXiv 2309.01507 the dynamic map for m and the map without zero for v
DESIGNS: dict[str, tuple[str, Compressor]] = {
    "int4, dynamic map, blocks of 128": ("m", in_blocks(128, nearest(dynamic_of_4_bits()))),
    "int4, even map without zero, blocks of 128": ("v", in_blocks(128, nearest(torch.arange(1, 17) / 16))),
    "int8, dynamic map, blocks of 64": ("m", in_blocks(64, nearest(dynamic_map(True)))),
    "softsign with c = 1, blocks of 64": ("m", in_blocks(64, softsign)),
}


def compressed(name: str, which: int, moments: Moments) -> list[Tensor]:
    return [compressor(CODECS[name], signed=which == 0)(pair[which]) for pair in moments]


def judge(moments: Moments, first: list[Tensor], second: list[Tensor]) -> dict[str, float]:
    """The update from compressed moments against that from the true ones; without eps, 0 where v is 0."""
    count, sums, worst = 0, torch.zeros(4, dtype=torch.float64), 0.0
    for (m, v), m_coded, v_coded in zip(moments, first, second, strict=True):
        u = torch.where(v > 0, m.double() / v.double().sqrt(), 0)
        delta = torch.where(v > 0, m_coded.double() / v_coded.double().sqrt(), 0).sub_(u).abs_()
        sums += torch.stack([delta.sum(), u.abs().sum(), delta.square().sum(), u.square().sum()])
        worst, count = max(worst, delta.max().item()), count + u.numel()
    error, size, error2, size2 = sums.tolist()
    return {
        "mean_error": error / count,
        "relative_mean_error": error / size,
        "relative_rms_error": (error2 / size2) ** 0.5,
        "worst_error": worst,
    }


def of_set(name: str, moments: Moments) -> Iterator[dict[str, Any]]:
    """Every row of one set."""
    coded = {codec: (compressed(codec, 0, moments), compressed(codec, 1, moments)) for codec in CODECS}
    count = sum(m.numel() for m, _ in moments)
    for first, second in itertools.product(CODECS, CODECS):
        size = sum(
            CODECS[first].nbytes(m.numel(), signed=True) + CODECS[second].nbytes(v.numel(), signed=False)
            for m, v in moments
        )
        yield {
            "kind": "pair",
            "moments": name,
            "m": first,
            "v": second,
            "values": count,
            "bytes_per_value": size / count,
            **judge(moments, coded[first][0], coded[second][1]),
        }
    for design, (which, compress) in DESIGNS.items():
        first = [compress(m) if which == "m" else m for m, _ in moments]
        second = [compress(v) if which == "v" else v for _, v in moments]
        found = judge(moments, first, second)
        yield {"kind": "design", "moments": name, "design": design, "of": which, "values": count, **found}


def speed() -> Iterator[dict[str, Any]]:
    """The fastest of five, one thread, 2**21 values."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    noise = torch.randn(1 << 21, generator=torch.Generator().manual_seed(SEED))
    for (name, codec), signed in itertools.product(CODECS.items(), (True, False)):
        value = noise if signed else noise.square()
        enc = codec.init(value, signed=signed)
        jobs: dict[str, Callable[[], object]] = {
            "encode_ns": partial(codec.encode_, enc, value),
            "decode_ns": partial(codec.decode, enc, value.shape),
        }
        row: dict[str, Any] = {"kind": "speed", "codec": name, "signed": signed}
        for key, job in jobs.items():
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                job()
                seconds.append(time.perf_counter() - began)
            row[key] = min(seconds) / value.numel() * 1e9
        yield row
    torch.set_num_threads(threads)


def show(rows: list[dict[str, Any]]) -> None:
    """The pairs of 8-bit codecs, the least mean error over the sets first; those with a name are bold."""
    sets = list(dict.fromkeys(row["moments"] for row in rows if row["kind"] == "pair"))
    found = {(row["m"], row["v"], row["moments"]): row for row in rows if row["kind"] == "pair"}
    table = Table("m", "v", "bytes", *(f"{name}: mean, worst" for name in sets))
    pairs = [*itertools.product(EIGHT_BITS, EIGHT_BITS), ("int4", "int4")]
    pairs.sort(key=lambda pair: sum(found[(*pair, name)]["relative_mean_error"] for name in sets))
    for pair in pairs:
        of_sets = [found[(*pair, name)] for name in sets]
        figures = (f"{100 * r['relative_mean_error']:.2f} % {r['worst_error']:.2f}" for r in of_sets)
        row = (pair[0], pair[1], f"{of_sets[0]['bytes_per_value']:.3f}", *figures)
        table.add_row(*row, style="bold" if pair in PAIRS.values() else None)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the small Llama")
    parser.add_argument("--tuning-steps", type=int, default=40, help="of SmolLM2")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()

    plays = data.load_plays()
    layers, embedding = tuned(plays, options.tuning_steps)
    sets = {
        "Llama from nothing": scratch(plays, options.steps),
        "SmolLM2's layers": layers,
        "SmolLM2's embedding": embedding,
    }
    common = {
        "command": f"python scripts/bench/codecs.py --steps {options.steps} --tuning-steps {options.tuning_steps}",
        "seed": SEED,
        **provenance(),
    }
    with torch.no_grad():
        rows = [row for name, moments in sets.items() for row in of_set(name, moments)]
        rows += speed()
    write_rows(options.record, [row | common for row in rows])
    show(rows)


if __name__ == "__main__":
    main()
