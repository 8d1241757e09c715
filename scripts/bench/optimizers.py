"""Optimizers side by side: bytes, seconds and loss.

    python scripts/bench/optimizers.py --part speed                  # against torch, bitsandbytes, torchao, ...
    python scripts/bench/optimizers.py --part quality --jobs 2       # 45 minutes or so on two cores; see below
    python scripts/bench/optimizers.py --part long                   # 5,000 steps; an hour or two
    python scripts/bench/optimizers.py --part report                 # tables from the records, and the plot

quality: a small Llama on Shakespeare, every method with its sensible codecs, three seeds, the learning rate tuned per
method. Every finished run is a line of records/optimizers.jsonl under its full configuration; the same command again
makes what is missing, so it may be stopped at any time, or with --budget-minutes.

long: the same with the recommended codecs alone, twenty times as many steps and three times as many plays, at the rate
that was tuned for the short runs, beside fp32 states. What a codec loses slowly does not show in 250 steps.

A setting that the installed package cannot build is an error, unless --available leaves it out (and says so).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see hf_lowmem/cli/main.py; read when torch is imported

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _quality
import _report
import _schedule
import _speed
import torch
from _record import RECORDS, commit
from _settings import SETTINGS, Setting
from rich.console import Console

from hf_lowmem.demo.run import device, versions
from hf_lowmem.specs import PROJECTIONS


def leave_out(faults: dict[str, str], *, available: bool, console: Console) -> None:
    """Say which settings cannot be built and why; without `available` that is the end."""
    for name, fault in faults.items():
        console.print(f"left out: {name}: {fault}", highlight=False, markup=False)
    if faults and not available:
        raise SystemExit(f"{len(faults)} settings cannot be built here; --available leaves them out")


def chosen(only: Sequence[str] | None, size: dict[str, Any], *, available: bool, console: Console) -> list[Setting]:
    """The settings to run.

    Raises:
        SystemExit: where one is unknown here, or `only` matches none.
    """
    settings = [s for s in SETTINGS if not only or any(s.name == o or s.method == o for o in only)]
    if not settings:
        raise SystemExit(
            f"--only {only}: no such setting or method; settings are: {', '.join(s.name for s in SETTINGS)}"
        )
    faults = {s.name: fault for s in settings if (fault := _quality.unavailable(s, size))}
    leave_out(faults, available=available, console=console)
    return [s for s in settings if s.name not in faults]


def quality(options: argparse.Namespace, console: Console) -> int:
    torch.set_num_threads(1)  # as the workers have; the device's description says so
    size = _quality.SMOKE if options.smoke else _quality.SIZE
    settings = chosen(options.only, size, available=options.available, console=console)
    common = {
        "command": f"python scripts/bench/optimizers.py --part quality --jobs {options.jobs}",
        "jobs": options.jobs,
        "device": device(),
        "versions": versions(),
        "commit": commit(),
    }
    failed = _schedule.work(
        _schedule.Record(options.record, common),
        settings,
        options.seeds,
        size,
        jobs=options.jobs,
        budget_seconds=options.budget_minutes * 60,
        console=console,
    )
    for line in failed:
        console.print(f"failed: {line}", highlight=False, markup=False)
    return 1 if failed else 0


def long(options: argparse.Namespace, console: Console) -> int:
    torch.set_num_threads(1)
    short, size = (_quality.SMOKE, _quality.SMOKE | {"steps": 6}) if options.smoke else (_quality.SIZE, _quality.LONG)
    common = {
        "command": "python scripts/bench/optimizers.py --part long",
        "device": device(),
        "versions": versions(),
        "commit": commit(),
    }
    record = _schedule.Record(options.record, common)
    rate = _schedule.best_rate(record, "adamw", short)
    if rate is None:
        raise SystemExit("no rate was tuned for adamw: run --part quality first")
    for seed in options.seeds:
        for setting in (Setting("adamw"), Setting("adamw", "8bit"), Setting("adamw", control=True)):
            task = _schedule.Task(setting, rate, seed)
            if record.loss(task.config(size)) is None:
                row = _schedule.make(task, size)
                record.add(row)
                console.print(f"{row['setting']}, seed {seed}: {row['heldout_loss']} ({row['seconds']:.0f} s)")
    console.print(_report.long_table(record, size), highlight=False, markup=False, soft_wrap=True)
    return 0


def speed(options: argparse.Namespace, console: Console) -> int:
    size = _speed.SMOKE if options.smoke else _speed.SIZE
    settings = {n: b for n, b in _speed.OURS.items() if not options.only or {n, n.split()[0]} & set(options.only)}
    projections = {p: _speed.galore(p, 1) for p in PROJECTIONS}
    for builds in (settings, projections):
        faults = {name: fault for name, build in builds.items() if (fault := _speed.fault(build, _speed.SMOKE))}
        leave_out(faults, available=options.available, console=console)
        for name in faults:
            del builds[name]
    where = torch.device(options.device)
    rows = _speed.measure_steps(size, settings, _speed.PEERS, where) + _speed.measure_refresh(
        size, list(projections), where
    )
    common = {
        "command": "python scripts/bench/optimizers.py --part speed",
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else device(),
        "size": size,
        "versions": versions(),
        "commit": commit(),
    }
    options.speed_record.parent.mkdir(parents=True, exist_ok=True)
    with options.speed_record.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row | common) + "\n" for row in rows)
    for text in _report.speed_tables([row | common for row in rows]):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def report(options: argparse.Namespace, console: Console) -> int:
    size = _quality.SMOKE if options.smoke else _quality.SIZE
    record = _schedule.Record(options.record)
    scores = _report.Scores(record, size)
    tables = [_report.tuning_table(record, size), *_report.quality_tables(scores)]
    if speed_rows := _report.read_jsonl(options.speed_record):
        tables += _report.speed_tables(speed_rows)
    for text in tables:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    _report.draw(scores, options.plot)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("speed", "quality", "long", "report"), required=True)
    parser.add_argument("--record", type=Path, default=RECORDS / "optimizers.jsonl", help="quality runs")
    parser.add_argument("--speed-record", type=Path, default=RECORDS / "optimizers_speed.jsonl")
    parser.add_argument("--plot", type=Path, default=RECORDS / "optimizers.png", help="written by --part report")
    parser.add_argument("--device", default="cpu", help="of --part speed")
    parser.add_argument("--only", nargs="*", help="names of settings, or methods (default: all)")
    parser.add_argument("--available", action="store_true", help="leave out what cannot be built here")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="start no run after that")
    options = parser.parse_args(arguments)
    return {"speed": speed, "quality": quality, "long": long, "report": report}[options.part](options, Console())


if __name__ == "__main__":
    sys.exit(main())
