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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_lowmem.specs import PROJECTIONS
from parts.optimizers import quality as runs
from parts.optimizers import report as reports
from parts.optimizers import schedule
from parts.optimizers import speed as steps
from parts.optimizers.settings import SETTINGS, Setting
from parts.record import RECORDS, device_name, provenance, read_rows, write_rows
from parts.small_llama import SIZE, SMOKE


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
    faults = {s.name: fault for s in settings if (fault := runs.unavailable(s, size))}
    leave_out(faults, available=available, console=console)
    return [s for s in settings if s.name not in faults]


def quality(options: argparse.Namespace, console: Console) -> int:
    torch.set_num_threads(1)  # as the workers have; the device's description says so
    size = SMOKE if options.smoke else SIZE
    settings = chosen(options.only, size, available=options.available, console=console)
    common = {
        "command": f"python scripts/bench/optimizers.py --part quality --jobs {options.jobs}",
        "jobs": options.jobs,
        **provenance(),
    }
    failed = schedule.work(
        schedule.Record(options.record, common),
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
    short, size = (SMOKE, SMOKE | {"steps": 6}) if options.smoke else (SIZE, runs.LONG)
    common = {"command": "python scripts/bench/optimizers.py --part long"} | provenance()
    record = schedule.Record(options.record, common)
    rate = schedule.best_rate(record, "adamw", short)
    if rate is None:
        raise SystemExit("no rate was tuned for adamw: run --part quality first")
    for seed in options.seeds:
        for setting in (Setting("adamw"), Setting("adamw", "8bit"), Setting("adamw", control=True)):
            task = schedule.Task(setting, rate, seed)
            if record.loss(task.config(size)) is None:
                row = schedule.make(task, size)
                record.add(row)
                console.print(f"{row['setting']}, seed {seed}: {row['heldout_loss']} ({row['seconds']:.0f} s)")
    console.print(reports.long_table(record, size), highlight=False, markup=False, soft_wrap=True)
    return 0


def speed(options: argparse.Namespace, console: Console) -> int:
    size = steps.SMOKE if options.smoke else steps.SIZE
    settings = {n: b for n, b in steps.OURS.items() if not options.only or {n, n.split()[0]} & set(options.only)}
    projections = {p: steps.galore(p, 1) for p in PROJECTIONS}
    for builds in (settings, projections):
        faults = {name: fault for name, build in builds.items() if (fault := steps.fault(build, steps.SMOKE))}
        leave_out(faults, available=options.available, console=console)
        for name in faults:
            del builds[name]
    where = torch.device(options.device)
    rows = steps.measure_steps(size, settings, steps.PEERS, where) + steps.measure_refresh(
        size, list(projections), where
    )
    common = {
        "command": "python scripts/bench/optimizers.py --part speed",
        **provenance(),
        "device": device_name(where),
        "size": size,
    }
    rows = [row | common for row in rows]
    write_rows(options.speed_record, rows)
    for text in reports.speed_tables(rows):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def report(options: argparse.Namespace, console: Console) -> int:
    size = SMOKE if options.smoke else SIZE
    record = schedule.Record(options.record)
    scores = reports.Scores(record, size)
    tables = [reports.tuning_table(record, size), *reports.quality_tables(scores)]
    if speed_rows := read_rows(options.speed_record):
        tables += reports.speed_tables(speed_rows)
    for text in tables:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    reports.draw(scores, options.plot)
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
