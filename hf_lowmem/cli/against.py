"""`hf-lowmem compare --against baseline FLAGS`: a few steps with the fields of hf_lowmem and the same without.

FLAGS are those of `hf-lowmem sft` (or `dpo`): the user's own model, data, batch and seed. Each run has a process of its
own, because a process that has trained once keeps what it took. What differs is our fields alone: in the second run
they are as if nobody had set them, neither by a flag nor in HF_LOWMEM_CONFIG, and `optim` is HuggingFace's default
where it was one of ours. No model is saved.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from hf_lowmem.cli.pictures import check_picture
from hf_lowmem.cli.wrong import WrongCommand
from hf_lowmem.memory import human_bytes
from hf_lowmem.runs.compare import compare, table
from hf_lowmem.runs.report import read_report

__all__ = ["run"]

WITH, WITHOUT = "hf_lowmem", "baseline"
STEPS = 10
METHODS = ("sft", "dpo")
# After the user's flags, so that they count: nothing is saved, evaluated or sent.
QUIET = "--save_strategy no --eval_strategy no --load_best_model_at_end False --push_to_hub False --logging_steps 1"
QUIET += " --resume_from_checkpoint null --report_to none --disable_tqdm True"
OF_OPTIM = ("optim_args", "optim_target_modules")  # which mean what they do to one of our optimizers
LINES = 12  # of what a run has said that failed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongCommand(f"{message}. `hf-lowmem compare --help` says what there is.")


def run(arguments: Sequence[str]) -> int:
    """Run both, print them side by side; the exit status.

    Raises:
        WrongCommand: for flags that cannot be, here or in training.
    """
    parser = _Parser(prog="hf-lowmem compare", add_help=False, allow_abbrev=False)
    parser.add_argument("--against", choices=[WITHOUT])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--method", choices=METHODS, default="sft")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    options, flags = parser.parse_known_args(list(arguments))
    if options.steps < 1:
        raise WrongCommand(f"--steps {options.steps}: expected at least 1.")
    if options.plot is not None:
        check_picture("--plot", options.plot)
    if any(word.split("=")[0].replace("-", "_") == "__max_steps" for word in flags):
        print(f"--max_steps is not looked at here: each run takes --steps, {options.steps}.", file=sys.stderr)
    flags = [*flags, *QUIET.split(), "--max_steps", str(options.steps)]
    folder = options.output_dir or Path(tempfile.mkdtemp(prefix="hf_lowmem_"))
    reports: dict[str, dict[str, object]] = {}
    ours = dict(os.environ)
    try:
        unset = _ours(options.method, flags)
        null = [word for name in unset for word in (f"--{name}", "null")]
        for name, more, environment in ((WITH, [], ours), (WITHOUT, null, _without(unset, ours))):
            print(f"{name}: {options.steps} steps ...", file=sys.stderr)
            _train(options.method, [*flags, *more, "--output_dir", str(folder / name)], environment)
            reports[name] = read_report(folder / name)
    finally:
        if options.output_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    compared = compare(reports)
    if options.plot is not None:
        from hf_lowmem.runs.plot import draw

        draw(reports, options.plot)
    print(json.dumps(compared, indent=1) if options.json else f"{in_words(compared['runs'])}\n\n{table(compared)}")
    return 0


def _ours(method: str, flags: Sequence[str]) -> list[str]:
    """Names of the fields that the baseline has as if nobody had set them: all of ours, and `optim` if it is ours.

    Raises:
        WrongCommand: for wrong flags, or where they set none of our fields.
    """
    from trl import ModelConfig, ScriptArguments

    from hf_lowmem.cli.parsing import Parser
    from hf_lowmem.optim import ALL_METHODS
    from hf_lowmem.training.dpo_config import LowMemDPOConfig
    from hf_lowmem.training.sft import LowMemSFTConfig

    config = LowMemDPOConfig if method == "dpo" else LowMemSFTConfig
    parser = Parser((ScriptArguments, config, ModelConfig), prog="hf-lowmem compare")
    parser.set_defaults(use_cpu=True)  # of a trial of the flags alone
    _, args, _ = parser.read(flags)
    names = [f.name for f in fields(config) if f.name.startswith("lowmem")]
    set_here = [name for name in names if getattr(args, name) not in (None, False)]
    if args.optim in ALL_METHODS:
        set_here.append("optim")
    if not set_here:
        raise WrongCommand("no field of hf_lowmem is set, so both runs would be one. Add --lowmem balanced, or others.")
    return list(dict.fromkeys([*names, *set_here]))


def _without(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose section (hf_lowmem/training/section.py) sets none of these fields; what it says of others,
    such as the learning rate, counts in both runs."""
    from hf_lowmem.training.section import VARIABLE, from_env

    gone = {*names, *(OF_OPTIM if "optim" in names else ())}
    left = {name: value for name, value in from_env(environment).items() if name not in gone}
    rest = {name: value for name, value in environment.items() if name != VARIABLE}
    return rest | ({VARIABLE: json.dumps(left)} if left else {})


def _train(method: str, flags: Sequence[str], environment: Mapping[str, str]) -> None:
    """One run in a process of its own.

    Raises:
        WrongCommand: with the run's own answer, where its flags are wrong.
        ChildProcessError: with what it has said last, where it has failed otherwise.
    """
    done = subprocess.run(
        [sys.executable, "-m", "hf_lowmem.cli.trial", method, *flags],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()
    if done.returncode == 2:
        raise WrongCommand(last[-1] if last else "the flags are wrong")
    if done.returncode:
        raise ChildProcessError(f"a run has ended with status {done.returncode}:\n" + "\n".join(last[-LINES:]))


def in_words(runs: Mapping[str, Mapping[str, Mapping[str, float | str | None]]]) -> str:
    """The two runs in a line: memory and speed as parts of the baseline's, and the loss of each."""
    ours, theirs = runs[WITH], runs[WITHOUT]
    said = []
    for label, kind, key in (("peak", "memory", "peak"), ("optimizer state", "memory", "optimizer")):
        a, b = ours[kind][key], theirs[kind][key]
        if isinstance(a, int) and isinstance(b, int) and b:
            said.append(f"{label} {human_bytes(a)} beside {human_bytes(b)} ({100 * a / b - 100:+.0f} %)")
    a, b = (run["speed"]["steps_per_second"] for run in (ours, theirs))
    if isinstance(a, float | int) and isinstance(b, float | int) and b:
        said.append(f"speed {a / b:.2f} of it, the slow first step included")
    a, b = (run["results"]["last_loss"] for run in (ours, theirs))
    if isinstance(a, float) and isinstance(b, float):
        said.append(f"last loss {a:.4g} beside {b:.4g}")
    return f"With hf_lowmem beside the baseline: {'; '.join(said)}."
