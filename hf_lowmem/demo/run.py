"""The demo from beginning to end: data, model, four runs, two tables, a plot, a model with its card.

(a) SFT twice, same seed, data and steps: as plain HuggingFace does it, and with low-memory fields.
(b) From the low-memory SFT model, ASFT on pairs; beside it a control, SFT on the same prompts and chosen
    lines with the same optimizer and number of steps. Without the control one could not tell what the pairs
    taught from what a little more training on such lines teaches anyway. The control never sees a rejected
    line, so it reads half as much text.

Expect little from (b) in a few minutes: thirty pairs are not a preference data set.
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import hf_lowmem
from hf_lowmem.demo import data, report
from hf_lowmem.demo.card import write_card
from hf_lowmem.demo.plot import draw
from hf_lowmem.demo.process import alone
from hf_lowmem.demo.runs import Result, Run
from hf_lowmem.demo.score import Referee
from hf_lowmem.memory import human_bytes
from hf_lowmem.runs import facts

LOW_MEMORY = {"optim": "apollo_mini", "lowmem_state": "8bit", "lowmem_activations": "fp8"}

# Each optimizer's learning rate is the best of 1e-4, 3e-4 and 1e-3 (AdamW also 2e-4) by held-out loss after 16 steps,
# with another seed, so on other plays, than the demo's default. Held-out losses from 4.18 before training:
#   adamw_torch   1e-4 3.79   2e-4 3.76   3e-4 3.79   1e-3 4.11
#   apollo_mini   1e-4 3.78               3e-4 3.71   1e-3 4.03
# The second stage has one for both of its runs: at 1e-4 either forgets whole speeches for two lines.
RATES = {"adamw_torch": 2e-4, "apollo_mini": 3e-4, "second stage": 3e-5}

# True lines stand near 5 nats a token, a log-odds of -5. There the paper's λ = 1 gives a rejected answer 4 % of the
# pull that a chosen one has, at β = 0.1 (at β = 1, 0.3 %): more SFT in all but name. These give it 22 %.
ASFT = {"loss_type": "asft", "beta": 0.2, "asft_lambda": 10.0}
DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the packaged model comes from
HELD_OUT_PLAYS = 4
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
PROMPT = "HAMLET\nTo be, or not to be"


@dataclass(frozen=True)
class Size:
    """Sizes of a demo: steps, batches, texts and pairs. The two that exist are below."""

    sft_steps: int
    pair_steps: int
    heldout_texts: int
    heldout_pairs: int
    sft_batch: int = 2
    pair_batch: int = 4
    tokens: int = 128  # of a text
    lines: int = 2  # of a prompt, and of each answer


FULL = Size(sft_steps=14, pair_steps=7, heldout_texts=10, heldout_pairs=40)
QUICK = Size(sft_steps=3, pair_steps=2, heldout_texts=4, heldout_pairs=8, pair_batch=2, tokens=64)


@dataclass(frozen=True)
class Material:
    """The data of all runs."""

    texts: data.Dataset
    pairs: data.Dataset
    referee: Referee
    heldout_plays: list[str]


def run_demo(*, model: str | None, output_dir: Path, quick: bool, seed: int, command: Sequence[str]) -> int:
    """Run everything; the exit status. Writes results.json, demo.png, sft/ and model/ under
    ``output_dir``."""
    began = time.perf_counter()
    console = Console()
    size = QUICK if quick else FULL
    output_dir.mkdir(parents=True, exist_ok=True)
    console.print(f"Reading Shakespeare; setting {HELD_OUT_PLAYS} plays aside.")
    material = gather(size, seed)
    console.print(f"Loading {public_name(model)}.")
    base = alone("prepare_model", model, output_dir)
    results = train_all(base, material, size, output_dir, seed)
    final = output_dir / "model"
    console.print("Loading the fine-tuned model with plain transformers.")
    sample = {"prompt": PROMPT, "text": alone("generate", final, PROMPT, tokens=24)}

    record = {
        "command": shlex.join(command),
        "base_model": public_name(model),
        "mode": "quick" if quick else "full",
        "seed": seed,
        "size": asdict(size),
        "heldout_plays": material.heldout_plays,
        "training": report.training_rows(results),
        "after": report.stage_rows(results),
        "against_control": report.against_control(results),
        "sample": sample,
        "versions": facts.versions_of(PACKAGES),
        "device": facts.device_name(),
        "commit": facts.commit_of(Path(hf_lowmem.__file__).parent.parent),
        "runs": [asdict(result) for result in results],
        "seconds": time.perf_counter() - began,
    }
    (output_dir / "results.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    draw(
        results,
        output_dir / "demo.png",
        title=f"{public_name(model)} on Shakespeare, all weights trained, {facts.device_name()}",
    )
    card(final, record, results, demo_model=model is None)

    report.show(results)
    console.print(f"[bold]{PROMPT}[/bold]{sample['text']}", highlight=False)
    console.print(
        f"\nThe low-memory run kept {saved_bytes(results)} less optimizer state than plain HuggingFace.\n"
        f"Written to {output_dir}: model/ (with its card), demo.png, results.json; "
        f"{time.perf_counter() - began:.0f} s in all."
    )
    return 0


def gather(size: Size, seed: int) -> Material:
    """Texts and pairs for training, and the referee's; the plays of one are not in the other."""
    train, heldout = data.split_plays(data.load_plays(), held_out=HELD_OUT_PLAYS, seed=seed)
    return Material(
        texts=data.sft_dataset(train, size=size.sft_steps * size.sft_batch, tokens=size.tokens, seed=seed),
        pairs=data.pair_dataset(train, size=size.pair_steps * size.pair_batch, lines=size.lines, seed=seed),
        referee=Referee(
            data.sft_dataset(heldout, size=size.heldout_texts, tokens=size.tokens, seed=seed),
            data.pair_dataset(heldout, size=size.heldout_pairs, lines=size.lines, seed=seed),
            size.tokens,
        ),
        heldout_plays=sorted(heldout),
    )


def train_all(base: str, material: Material, size: Size, output_dir: Path, seed: int) -> list[Result]:
    """The four runs, one after another."""
    sft = common(size.sft_steps, size.sft_batch, size.tokens, seed)
    pair = common(size.pair_steps, size.pair_batch, None, seed) | LOW_MEMORY  # a few lines need no limit
    pair["learning_rate"] = RATES["second stage"]
    control = material.pairs.rename_column("chosen", "completion").remove_columns("rejected")
    during = (0, size.sft_steps // 2, size.sft_steps)
    last = (size.pair_steps,)
    tuned = str(output_dir / "sft")
    runs = [
        Run(
            name="SFT, HuggingFace",
            trainer="trl.SFTTrainer",
            model=base,
            dataset=material.texts,
            settings=sft | {"optim": "adamw_torch", "learning_rate": RATES["adamw_torch"]},
            output=str(output_dir / "runs" / "plain"),
            evaluate_at=during,
        ),
        Run(
            name="SFT, low memory",
            trainer="LowMemSFTTrainer",
            model=base,
            dataset=material.texts,
            settings=sft | LOW_MEMORY | {"learning_rate": RATES["apollo_mini"]},
            output=tuned,
            evaluate_at=during,
            score_pairs=during[-1:],
            save=True,
        ),
        Run(
            name="then ASFT",
            trainer="LowMemDPOTrainer",
            model=tuned,
            dataset=material.pairs,
            settings=pair | ASFT,
            output=str(output_dir / "model"),
            evaluate_at=last,
            score_pairs=last,
            save=True,
        ),
        Run(
            name="then more SFT",
            trainer="LowMemSFTTrainer",
            model=tuned,
            dataset=control,
            settings=pair,
            output=str(output_dir / "runs" / "control"),
            evaluate_at=last,
            score_pairs=last,
        ),
    ]
    return [alone("train", run, material.referee) for run in runs]


def common(steps: int, batch: int, tokens: int | None, seed: int) -> dict[str, Any]:
    """Settings that all runs share.

    TRL's defaults of bf16 autocast and checkpointing are replaced: on a CPU the first is slower than fp32, and the
    second would hide the memory of activations.
    """
    cuda = torch.cuda.is_available()
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "max_length": tokens,
        "seed": seed,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 10),
        "weight_decay": 0.0,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "gradient_checkpointing": False,
        "dataloader_pin_memory": cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def card(folder: Path, record: dict[str, Any], results: Sequence[Result], *, demo_model: bool) -> None:
    """README.md of the final model: the low-memory SFT run and the ASFT run that follows made it."""
    name = record["base_model"].split("/")[-1]
    size = record["size"]
    values = record | {
        "title": f"{name}, Shakespeare, hf-lowmem",
        "base_name": name,
        "stages": [asdict(results[1]), asdict(results[2])],
        "recipe": f"Seed {record['seed']}; texts of {size['tokens']} tokens; "
        f"prompts and answers of {size['lines']} lines; "
        f"ASFT with beta {ASFT['beta']} and lambda {ASFT['asft_lambda']}.",
    }
    base_license = "apache-2.0" if demo_model else None
    write_card(folder, name=values["title"], base_model=record["base_model"], license=base_license, values=values)


def public_name(model: str | None) -> str:
    """``base_model`` of a model card: a hub name, or a folder's own name without this machine's path."""
    if model is None:
        return DEMO_MODEL
    return facts.public_name(model)


def saved_bytes(results: Sequence[Result]) -> str:
    """Optimizer state of the first run less that of the second."""
    return human_bytes(results[0].memory["optimizer"] - results[1].memory["optimizer"])
