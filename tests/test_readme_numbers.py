"""Every number that somebody has written into a README: computed here, from a record or the code, or no measurement.

Tables between markers are compared whole, in test_readme.py. Here a phrase is computed and must stand in its README as
it is; what is left over must be one of CONSTANTS, which say what kind of number it is.
"""

import importlib
import json
import re
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_lowmem.codecs import CODECS, codec_pair
from hf_lowmem.memory import human_bytes
from hf_lowmem.optim import OPTIMIZERS
from tests.readmes import READMES, RECORDS, ROOT, by_hand

NUMBER = re.compile(r"(?<![\w.,-])[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?[MB]?(?![\w]|\.\d)")


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RECORDS / name).read_text().splitlines()]


def part(name: str, part: str) -> list[dict[str, Any]]:
    return [row for row in records(name) if row["part"] == part]


def demo_claim() -> list[str]:
    first, second = json.loads((RECORDS / "demo.json").read_text())["training"][:2]
    return [
        f"{human_bytes(second['optimizer'])} of optimizer state instead of {human_bytes(first['optimizer'])}",
        f"{second['saved'] / 2**20:.0f} MiB of saved activations instead of {first['saved'] / 2**20:.0f} MiB",
        f"Held-out loss is {second['heldout_loss']:.3f} beside AdamW's {first['heldout_loss']:.3f}",
        f"speed {second['relative_speed']:.2f} of AdamW's",
    ]


def int8_weights() -> list[str]:
    """The largest of the table's differences between weights in int8 and fp32 masters, a mean over seeds."""
    losses: dict[tuple[str, str, float], dict[str, list[float]]] = {}
    for row in records("weights.jsonl"):
        found = losses.setdefault((row["kind"], row["method"], row["rate"]), {})
        found.setdefault(row["store"], []).append(row["heldout_loss"])
    gaps = (statistics.fmean(found["int8_sr"]) / statistics.fmean(found["masters"]) - 1 for found in losses.values())
    return [f"`int8_sr` is within {100 * max(map(abs, gaps)):.2f} % of fp32 masters"]


def stream_time() -> list[str]:
    rows = {row["setting"]: row for row in part("long_sequences.jsonl", "time")}
    plain, coded = rows["stream"], rows["stream_fp8"]
    return [
        f"a step of {plain['tokens']:,} tokens with the same loss: {plain['ratio']:.3f} times (`stream_fp8`: "
        f"{coded['ratio']:.3f} times) HuggingFace's checkpointing"
    ]


def smallest_claim() -> list[str]:
    rows = json.loads((RECORDS / "demo_smallest.json").read_text())["training"]
    theirs, ours = (sum(row[part] for part in ("weights", "gradients", "optimizer")) for row in (rows[0], rows[-1]))
    return [
        f"are {ours / 2**20:.0f} MiB instead of {human_bytes(theirs)}, the loss {rows[-1]['heldout_loss']:.3f}",
    ]


def demo_details() -> list[str]:
    record = json.loads((RECORDS / "demo.json").read_text())
    after = {row["model"]: row["pairs"] for row in record["after"]}
    shown = {
        name: f"{100 * after[name]['accuracy']:.1f}% ± {100 * after[name]['accuracy_error']:.1f}%"
        for name in ("SFT, low memory", "then ASFT", "then more SFT")
    }
    margin = record["against_control"]
    before, asft, control = shown.values()
    pairs = record["size"]["heldout_pairs"]
    return [
        f"took {record['seconds']:.0f} s after installation on two CPU cores",
        f"{pairs} held-out pairs: {before} before, {asft} after ASFT, {control} after the control",
        f"{margin['margin']:+.4f} ± {margin['margin_error']:.4f} nats",
        f"another {record['training'][0]['weights'] / 2**20:.0f} MiB",
    ]


def bytes_of_8bit() -> list[str]:
    (then,) = [row for row in records("optimizers_speed.jsonl") if row["setting"] == "adamw 8bit"]
    signed, unsigned = codec_pair("8bit")
    now = (signed.nbytes(2**20, signed=True) + unsigned.nbytes(2**20, signed=False)) / 2**20
    return [f"{then['state_bytes_per_parameter']:.2f} bytes a parameter", f"{now:.2f} now"]


def optimizer_runs() -> list[str]:
    figures = importlib.import_module("_readme").single_figures()
    quality, states = records("optimizers.jsonl")[0], records("states.jsonl")[0]
    assert "--heldout 16" in states["command"]
    return [
        f"{quality['parameters'] / 1e6:.1f}M-parameter Llama on Shakespeare, {quality['size']['steps']} steps",
        f"last bits, {figures['control']}, means nothing",
        f"ends {figures['subspace']} from",
        f"{states['steps']} steps of {states['tokens_a_step']} tokens",
        f"held-out loss {states['heldout_loss_before']:.3f} before training",
    ]


def smallest_compressed() -> list[str]:
    """Found by trying: the fewest values of which a state is kept in fewer bytes."""
    adamw = OPTIMIZERS["adamw"]

    def coded(numel: int) -> bool:
        p = torch.nn.Parameter(torch.zeros(numel))
        p.grad = torch.ones(numel)
        optimizer = adamw([("p", p)], state="int8")
        optimizer.step()
        return any(t.dtype == torch.uint8 for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))

    assert coded(4096)
    assert not coded(4095)
    return ["fewer than 4,096 values keep fp32 states"]


def headlines() -> list[str]:
    rows = records("plan_headlines.jsonl")
    seconds, memory = [row["seconds"] for row in rows], {round(row["rss"] / 2**30, 1) for row in rows}
    (cpu,) = {
        r["parameters"] for r in records("plan_vs_cpu.jsonl") if not r["setting"].startswith(("QLoRA", "SmolLM2"))
    }
    assert any("70B" in row["case"] for row in rows)
    return [
        f"took {int(min(seconds))} to {max(seconds):.0f} s and {max(memory)} GiB of RAM, for models of up to 70B",
        f"a model of {cpu / 1e6:.0f}M parameters",
    ]


def searches() -> list[str]:
    rows = [row for row in records("budget.jsonl") if row["max_length"] != "auto"]
    found = list(dict.fromkeys(row["combinations"] for row in rows))
    return [
        f"looked at {' or '.join(f'{n:,}' for n in found)} combinations",
        f"in {max(row['memory_bytes'] for row in rows) / 2**30:.1f} GiB of RAM",
    ]


def sums() -> list[str]:
    size = {row["setting"]: row["state_bytes_per_parameter"] for row in records("arithmetic.jsonl")}
    return [f"for {size['scale']:.2f} bytes a parameter instead of {size['adamw']:.2f}"]


def pairs() -> list[str]:
    (sharing,) = part("preference.jsonl", "sharing")
    (memory,) = {json.dumps(row["size"]) for row in part("preference.jsonl", "memory")}
    size = json.loads(memory)
    assert (size["layers"], size["pairs"]) == (8, 4)
    assert sharing["size"]["prompt"] == 4 * sharing["size"]["answer"]
    scored = [row for row in part("preference.jsonl", "cosmosqa") if row["stage"] == "score"]
    found = scored[0]["size"]
    means = [
        statistics.fmean(row["pair_accuracy"] for row in scored if row["method"] == method)
        for method in {row["method"] for row in scored}
    ]
    collapse = part("preference.jsonl", "collapse")[0]["size"]
    return [
        f"a step takes {sharing['tokens_ratio']:.2f} of the tokens and {sharing['time_ratio']:.2f} of the time",
        f"at eight layers, four pairs of {size['prompt']} + {size['answer']} tokens",
        f"{collapse['steps']} steps, three seeds",
        f"{found['steps'] * found['batch']} pairs, too few",
        f"{min(means):.2f} to {max(means):.2f} of {found['test']} held-out pairs",
    ]


def sizes_of_activations() -> list[str]:
    row = part("activations.jsonl", "loss")[0]
    return [f"{row['parameters'] / 1e6:.0f}M-parameter Llama", f"after {row['size']['steps']} steps"]


def kills() -> list[str]:
    record = json.loads((ROOT / "scripts/stress/records/kill_resume.json").read_text())
    return [f"{record['kills']} kills, {record['inside a save']} of them inside a save"]


def shapes_sent() -> list[str]:
    row = next(row for row in records("wire.jsonl") if row["method"] == "apollo")
    return [f"matrices of {row['m']:,} × {row['n']:,} both ways and rank {row['rank']}"]


def default_gaps() -> list[str]:
    gaps = {name: cls.DEFAULTS["update_gap"] for name, cls in OPTIMIZERS.items() if "update_gap" in cls.DEFAULTS}
    (family,) = {gap for name, gap in gaps.items() if name != "soap"}
    return [f"| {family}; `soap` {gaps['soap']} |"]


FIGURES: dict[str, list[Callable[[], list[str]]]] = {
    "README.md": [demo_claim, smallest_claim, bytes_of_8bit],
    "hf_lowmem/activations/README.md": [sizes_of_activations, stream_time],
    "hf_lowmem/optim/README.md": [bytes_of_8bit, optimizer_runs, smallest_compressed],
    "hf_lowmem/planner/README.md": [headlines, searches],
    "hf_lowmem/preference/README.md": [pairs],
    "hf_lowmem/weights/README.md": [int8_weights],
    "hf_lowmem/training/README.md": [default_gaps, shapes_sent, kills],
    "scripts/bench/README.md": [bytes_of_8bit, demo_details, sums],
}

SETTING, NAME, PAPER, RULE = "a setting", "a name", "of the paper", "what is asked, tests hold it"
FAMILIES = {
    "Qwen 2 and 3": NAME,
    "Gemma 1 to 3": NAME,
    "Phi 2 and 3": NAME,
    "OLMo 1 and 2": NAME,
    "SmolLM 1 and 3": NAME,
    "StarCoder 2": NAME,
    "Ernie 4.5": NAME,
}
CONSTANTS: dict[str, dict[str, str]] = {
    "README.md": {
        "8-bit": NAME,
        "4-bit": NAME,
        "ZeRO-1 and 2": NAME,
        "sequences of 2,048 tokens": SETTING,
        '"8 as 4 × 2" is a micro-batch of 4': SETTING,
    },
    ".github/CONTRIBUTING.md": {
        "Files of 150 to 250 lines (400 at most), functions under 80": RULE,
        "8-bit": NAME,
    },
    "integrations/README.md": {},
    "hf_lowmem/matmul/README.md": {
        "8 bits": NAME,
        "8-bit": NAME,
        "4-bit": NAME,
        "multiples of 16": RULE,
        "20,000 steps at one learning rate": SETTING,
        "1 and 135 million parameters": SETTING,
        "1 byte a value in the place of 2": RULE,
        "512 inputs and 384 outputs and 2,048 tokens": SETTING,
        "one batch of 512 tokens": SETTING,
        "fewer than 2,048 tokens": SETTING,
        "narrower than 2,048": SETTING,
    },
    "hf_lowmem/activations/README.md": FAMILIES
    | {
        "2,048 tokens": SETTING,
        "4-bit": NAME,
        "| Llama-8B | 500,000 | one H100 of 80 GB |": "published, arXiv 2506.13996",
        "| Llama-8B | 3,700,000 | 8 H100 of 80 GB |": "published, arXiv 2506.13996",
        "[1.13]": "published by TRL",
        "| Qwen3-8B | 1,048,576 | 8 H100, 56.2 GB each |": "published by TRL",
        "| Llama-3-8B | 524,288 | one of 80 GB |": "a plan of long_sequences.jsonl, whose table stands above",
        "| Llama-3-8B | 1,048,576 | one of 80 GB |": "a plan of long_sequences.jsonl, whose table stands above",
        "An 80 GB card has 74.5 GiB": "80e9 bytes",
        "to train 524,288 tokens": SETTING,
        "and 1,048,576 tokens need": SETTING,
        "(any whole number from 2 on)": RULE,
        "32 wide, with an MLP of 12,288": SETTING,
        "beyond the 24 GiB of the machine": SETTING,
        "of 32 layers there are 11 inputs at most in place of 32": "32 / 4 + 4 - 1",
        "8-bit": NAME,
        "a graph of the layer in 1 GiB holds (3,072 for Llama-3-8B)": "ROOM, and what tests hold chunk_of to",
    },
    "hf_lowmem/kernels/README.md": {"8-bit": NAME},
    "hf_lowmem/optim/README.md": {
        "a learning rate 3 to 10 times smaller than AdamW's": PAPER,
        "(2 + history)mr": "a formula",
        "3-D": NAME,
        "None is more than 0.5 % worse": "the limit that test_what_the_records_promise holds",
        "keeps 8 more bits": "of the format",
        "takes 4 bytes beside": "of fp32",
        "Over 100 steps, to 1e-5": RULE,
        "a magnitude above 1e15": RULE,
    },
    "hf_lowmem/optim/zeroth/README.md": {"at 2,048 tokens": SETTING},
    "hf_lowmem/planner/README.md": {},
    "hf_lowmem/weights/README.md": {"for 150 steps": SETTING, "8-bit moments": NAME},
    "hf_lowmem/preference/README.md": {
        "1, 1; after an SFT stage 0.1": PAPER,
        "| 0.1 |": PAPER,
        "2, 0.5": PAPER,
        "0.1, 1": PAPER,
        "about 4.13 bits a linear weight": "of nf4: 4 bits and a scale in 8 bits for 64 values",
        "to 1e-5": RULE,
        "Qwen 2 and 3": NAME,
        "Gemma 1 to 3": NAME,
        "Phi 3": NAME,
    },
    "hf_lowmem/training/README.md": {
        "in 8 bits": NAME,
        "0: none does": SETTING,
        "off; 0.5, 0.5": SETTING,
        "a hidden size of 4,096": "what BLOCK_BYTES of head_blocks.py holds of TRL's 32,768 columns",
    },
    "scripts/README.md": {
        "where 2 bytes a parameter": NAME,
        "where 1 byte a parameter": NAME,
        "batches below 64": PAPER,
        "a LoRA of rank 1 is small": SETTING,
        "seeds 0 and 1": SETTING,
        "without it, seed 0": SETTING,
    },
    "scripts/examples/README.md": {
        "under 40 lines": RULE,
        "by at most three lines": RULE,
        "4-bit": NAME,
        "8-bit states": NAME,
        "in 8 bits": NAME,
        "16,384 tokens": SETTING,
    },
    "scripts/bench/README.md": {
        "a 1B at": NAME,
        "5,000 steps of that": SETTING,
        "20,000 steps of AdamW": SETTING,
        "8-bit": NAME,
        "a seed of its own (100)": SETTING,
        "differ by 2^-20": SETTING,
        "Llama-3-8B's 291 parameters made tiny": SETTING,
        "for 250 steps": SETTING,
        "Its vocabulary has 14 tokens": SETTING,
        "made anew every 50 steps": SETTING,
        "The first 150 steps": SETTING,
        "weights differ by 2^-20": SETTING,
    },
}


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_those_of_the_records(name: str) -> None:
    text = flat(READMES[name]).replace("**", "")
    for figure in FIGURES[name]:
        for phrase in figure():
            assert phrase in text, figure.__name__


def left_over(name: str, text: str) -> list[str]:
    """Numbers of a README that are neither computed nor one of CONSTANTS."""
    text = flat(by_hand(text)).replace("**", "")
    phrases = [flat(by_hand(phrase)) for figure in FIGURES.get(name, ()) for phrase in figure()]
    for phrase in CONSTANTS[name]:
        assert phrase in text, f"{phrase}: no longer there"
    for phrase in sorted([*phrases, *CONSTANTS[name]], key=len, reverse=True):
        text = text.replace(phrase, "")
    return NUMBER.findall(text)


@pytest.mark.parametrize("name", READMES)
def test_no_number_is_left_over(name: str) -> None:
    assert left_over(name, READMES[name]) == []


def test_a_number_that_nobody_has_measured_is_found() -> None:
    claim = "It is 7.5 times faster, takes 12 GiB, and 1,024 or 3B of `8` values, in fp32 and SmolLM2-135M.\n"
    assert left_over("integrations/README.md", READMES["integrations/README.md"] + claim) == [
        "7.5",
        "12",
        "1,024",
        "3B",
    ]


def test_one_byte_a_value() -> None:
    """So says the front page of the recommended pair."""
    signed, unsigned = codec_pair("8bit")
    assert {signed.name, unsigned.name} <= set(CODECS)
    assert signed.nbytes(2**20, signed=True) < 1.05 * 2**20
    assert unsigned.nbytes(2**20, signed=False) < 1.05 * 2**20
