"""Kill a training run at random moments, resume it each time, and compare its end with a run that was never killed.

    python scripts/stress/kill_resume.py --kills 20
    python scripts/stress/kill_resume.py --kills 200 --record scripts/stress/records/kill_resume.json
    python scripts/stress/kill_resume.py --kills 200 --weights int8_sr \
        --record scripts/stress/records/kill_resume_int8.json

Each run is a process of its own that is ended by SIGKILL, as the system's out-of-memory killer ends one: nothing is
flushed, no handler runs. Every second kill waits for a save to begin and falls inside it. A resumed run starts with
`resume_from_checkpoint="auto"`, so it takes the last complete checkpoint, or begins anew. What must be equal in the
end, bit for bit: weights (of those at rest in int8, codes and scales), optimizer state, and the log of losses.

The processes are forked from one that has imported everything, so that a kill costs a second and not ten.
"""

import argparse
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

STEPS, SAVE_EVERY = 40, 4
METHODS = ("adamw", "apollo", "galore", "lion")
# Fields of each store of weights; int8_sr needs a step in backward, and every step clips nothing then.
WEIGHTS: dict[str, dict[str, object]] = {
    "bf16_sr": {"lowmem_weights": "bf16_sr"},
    "int8_sr": {"lowmem_weights": "int8_sr", "lowmem_step_in_backward": True, "max_grad_norm": 0.0},
}


def train(folder: Path, method: str, weights: str) -> None:
    """One run to its end; leaves `done.json` with the digest of what it came to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_lowmem import LowMemTrainer, LowMemTrainingArguments

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=64, pad_token_id=0, attention_dropout=0.1,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 512, (16,), generator=draw) for _ in range(200)]
    low_rank = {} if method in ("adamw", "lion") else {"lowmem_rank": 8, "lowmem_update_gap": 5}
    fields: dict[str, Any] = WEIGHTS[weights] | low_rank
    args = LowMemTrainingArguments(
        str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_steps=STEPS,
        save_steps=SAVE_EVERY, save_total_limit=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=5e-3,
        warmup_steps=2, optim=method, lowmem_state="8bit", lowmem_activations="fp8",
        lowmem_activations_stochastic=True, **fields,
    )  # fmt: skip
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    trainer = LowMemTrainer(model, args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint="auto")
    log = [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]
    (folder / "done.json").write_text(json.dumps({"digest": digest(trainer), "losses": log}))


def digest(trainer: Any) -> str:
    """SHA-256 over weights, as they are kept, and optimizer state, names included."""
    from hf_lowmem.weights import resting

    found = hashlib.sha256()

    def take(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                take(f"{name}.{key}", value[key])
        elif isinstance(value, torch.Tensor):
            found.update(name.encode() + value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{name}={value!r}".encode())

    take("model", trainer.model.state_dict())
    take("rest", {name: dict(enumerate(kept.stored())) for name, kept in resting(trainer.model).items()})
    take("state", trainer.optimizer.optimizer.state_dict()["state"])
    return found.hexdigest()


def start(folder: Path, method: str, weights: str) -> int:
    """Fork a run; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with (folder.parent / "log.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            train(folder, method, weights)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int) -> int | None:
    """The status of a run that has ended by itself, None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return None if found == 0 else os.waitstatus_to_exitcode(status)


def unfinished(folder: Path) -> set[int]:
    """Checkpoints without a manifest, by inode: a later save of the same step makes another folder."""
    found = set()
    for path in folder.glob("checkpoint-*"):
        try:
            if not (path / "lowmem_manifest.json").exists():
                found.add(path.stat().st_ino)
        except FileNotFoundError:  # deleted meanwhile
            continue
    return found


def kill_one(folder: Path, begin: Callable[[], int], draw: random.Random, inside: bool, mean: float) -> str:
    """Begin a run and kill it; "inside a save", "between saves", or "finished" where it was faster."""
    left = unfinished(folder)  # by earlier kills
    pid = begin()
    began, wait = time.monotonic(), draw.uniform(0, 2 * mean)
    while True:
        status = ended(pid)
        if status is not None:
            if status:
                raise RuntimeError(f"a run ended by itself with status {status}; see {folder.parent / 'log.txt'}")
            return "finished"
        passed = time.monotonic() - began
        if (inside and passed > 0.2 * wait and unfinished(folder) - left) or (not inside and passed > wait):
            if inside:
                time.sleep(draw.uniform(0, 0.02))
            in_save = bool(unfinished(folder) - left)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "inside a save" if in_save else "between saves"
        time.sleep(0.0005)


def stress(kills: int, seed: int, methods: Sequence[str], weights: str, folder: Path) -> dict[str, Any]:
    """What came of `kills` kills, spread over runs of each method."""
    draw = random.Random(seed)
    whole: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for method in methods:
        began = time.monotonic()
        place = folder / method / "whole"
        place.mkdir(parents=True)
        if os.waitstatus_to_exitcode(os.waitpid(start(place, method, weights), 0)[1]):
            raise RuntimeError(f"the run that is never killed failed; see {place.parent / 'log.txt'}")
        whole[method], seconds[method] = json.loads((place / "done.json").read_text()), time.monotonic() - began
    counts = {"inside a save": 0, "between saves": 0}
    runs: list[dict[str, Any]] = []
    while sum(counts.values()) < kills:
        method = methods[len(runs) % len(methods)]
        place = folder / method / f"run{len(runs)}"
        place.mkdir()
        begin, killed = partial(start, place, method, weights), 0
        while not (place / "done.json").exists():
            if sum(counts.values()) < kills and killed < 8:
                how = kill_one(place, begin, draw, inside=killed % 2 == 0, mean=seconds[method] / 3)
                if how != "finished":
                    counts[how] += 1
                    killed += 1
            elif os.waitstatus_to_exitcode(os.waitpid(begin(), 0)[1]):
                raise RuntimeError(f"a resumed run failed; see {place.parent / 'log.txt'}")
        result = json.loads((place / "done.json").read_text())
        equal = result["digest"] == whole[method]["digest"]
        log = dict(map(tuple, whole[method]["losses"]))
        same_log = all(log[step] == loss for step, loss in result["losses"])
        runs.append({"method": method, "kills": killed, "equal": equal, "losses_equal": same_log})
        print(runs[-1], flush=True)
        shutil.rmtree(place)
    return {
        "kills": sum(counts.values()),
        **counts,
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "weights": weights,
        "runs": runs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, action="append", help="default: all of them")
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16_sr", help="how the runs keep them")
    parser.add_argument("--record", type=Path, help="write what came of it there, as JSON")
    options = parser.parse_args(arguments)
    if options.kills < 1:
        parser.error(f"--kills {options.kills}: at least one")
    # Imported here, once: the forked runs have them.
    import hf_lowmem.training.mixin  # noqa: F401

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hf_lowmem_kill_") as folder:
        found = stress(options.kills, options.seed, options.method or METHODS, options.weights, Path(folder))
    bad = [run for run in found["runs"] if not (run["equal"] and run["losses_equal"])]
    print(f"{found['kills']} kills, {found['inside a save']} of them inside a save; {len(found['runs'])} runs, "
          f"{len(bad)} that ended in other bits")  # fmt: skip
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        command = f"python scripts/stress/kill_resume.py --kills {options.kills} --seed {options.seed}"
        command += "" if options.weights == "bf16_sr" else f" --weights {options.weights}"
        options.record.write_text(json.dumps({"command": command, "torch": torch.__version__} | found, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
