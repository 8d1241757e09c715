"""Time of a training step by loss and vocabulary, and what sharing prompts saves: on a CPU, as ratios in one run.

A step is the trainer's own loss of one batch, metrics and all, and its backward pass; no optimizer. The ways take turns
and the median of each is compared, so that a busy machine slows all of them. On a CPU the fused head computes a tile of
logits with plain operations and scores prompts, too; on a CUDA device it does neither, so its ratios are a CPU's.

DPO with a precomputed reference is timed without the one pass over the data that computes it: a forward pass a pair,
once, where TRL's DPO has it in every epoch.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from trl.trainer import utils as trl_utils

from hf_lowmem.preference.sharing import share_prompts, unshare_prompts
from parts.preference.memory import (
    HEAD_OUTPUTS,
    SMOKE,
    VOCABULARIES,
    WAYS,
    Way,
    batch_of,
    build,
    make_trainer,
    ours,
    step,
)
from parts.record import Row

SIZE: dict[str, Any] = {"hidden": 256, "layers": 4, "pairs": 2, "prompt": 64, "answer": 64}
SHARING: dict[str, Any] = {"hidden": 256, "layers": 4, "pairs": 4, "prompt": 512, "answer": 128}
SHARING_VOCABULARY = 1024  # small: what is shared is the layers' work, the head scores completions either way
REPEATS = 7
TINY = SMOKE | {"prompt": 16, "answer": 4}


def medians(runs: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of each, taking turns; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def runner(way: Way, model: Any, reference: Any, size: dict[str, Any]) -> Callable[[], None]:
    """One step of `way` on `model`."""
    trainer, batch = make_trainer(way), batch_of(way, size)
    if way.reference:
        trainer.ref_model = reference
    loss = step(trainer, way)

    def run() -> None:
        (share_prompts if way.shared else unshare_prompts)(model)
        loss(model, batch).backward()
        model.zero_grad()

    return run


def models(vocabulary: int, size: dict[str, Any]) -> tuple[Any, Any]:
    """A policy and a reference, fp32, with the fused head."""
    made = []
    for outputs in (HEAD_OUTPUTS, ("log_probs",)):
        torch.manual_seed(0)
        made.append(build(vocabulary, size).train())
        trl_utils.add_fused_lm_head(made[-1], outputs=outputs)
    return made[0], made[1].eval()


def time_rows(smoke: bool) -> Iterator[Row]:
    size, repeats = (TINY, 1) if smoke else (SIZE, REPEATS)
    ways = [w for w in WAYS if w.name in ("TRL ORPO", "hf_lowmem ORPO")] if smoke else WAYS
    for vocabulary in (1024,) if smoke else VOCABULARIES:
        policy, reference = models(vocabulary, size)
        seconds = medians({w.name: runner(w, policy, reference, size) for w in ways}, repeats)
        for way in ways:
            yield {
                "way": way.name,
                "vocabulary": vocabulary,
                "size": size,
                "seconds_a_pair": seconds[way.name] / size["pairs"],
                "ratio": seconds[way.name] / seconds["TRL ORPO"],
                "repeats": repeats,
            }


def sharing_rows(smoke: bool) -> Iterator[Row]:
    """Prompts four times as long as an answer: tokens and seconds of shared batches over those of plain ones."""
    size, repeats = (TINY, 1) if smoke else (SHARING, REPEATS)
    policy, reference = models(SHARING_VOCABULARY, size)
    plain, shared = ours("ASFT"), ours("ASFT", shared=True)
    seconds = medians({w.name: runner(w, policy, reference, size) for w in (plain, shared)}, repeats)
    tokens = {
        plain.name: batch_of(plain, size)["input_ids"].numel(),
        shared.name: batch_of(shared, size)["lowmem_source"].numel(),
    }
    yield {
        "size": size,
        "vocabulary": SHARING_VOCABULARY,
        "tokens_plain": tokens[plain.name],
        "tokens_shared": tokens[shared.name],
        "tokens_ratio": tokens[shared.name] / tokens[plain.name],
        "seconds_plain": seconds[plain.name],
        "seconds_shared": seconds[shared.name],
        "time_ratio": seconds[shared.name] / seconds[plain.name],
        "repeats": repeats,
    }
