"""`hf-lowmem card RUN` and `hf-lowmem compare RUN RUN ...`: from runs' reports, whatever made them and wherever."""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from hf_lowmem.cli.pictures import check_picture
from hf_lowmem.memory.progress import stages
from hf_lowmem.runs.card import CARD, UsersCard, refresh, whole_card
from hf_lowmem.runs.compare import compare, names_of, table
from hf_lowmem.runs.report import BadReport, predicted_of, read_report, write_atomically, write_report

__all__ = ["card", "compare_runs", "plan_of_run"]


def card(options: argparse.Namespace) -> int:
    """Write the run's card, and draw its step if asked to; the exit status."""
    if options.plot is not None:
        check_picture("--plot", options.plot)
    try:
        report = read_report(options.run)
        if options.plot is not None:
            from hf_lowmem.runs.plot import draw_step

            draw_step(report, options.plot)
        if options.plan is not None:
            made = _read_plan(Path(options.plan)) if options.plan else plan_of_run(report)
            report["predicted"] = predicted_of(made, options.plan or "this run's settings")
        if options.output is not None:
            write_atomically(options.output, whole_card(report))
        else:
            report["card_frame"] = refresh(options.run, report)
            write_report(options.run, report)
    except UsersCard as error:
        return _failed("card", f"{error} Give --output FILE to write this run's card elsewhere.")
    except ValueError as error:
        return _failed("card", str(error))
    print(options.output or options.run / CARD)
    return 0


def compare_runs(options: argparse.Namespace) -> int:
    """Print a table of the runs, or JSON, and draw them; the exit status."""
    if options.plot is not None:
        check_picture("--plot", options.plot)
    try:
        runs = dict(zip(names_of(options.runs), map(read_report, options.runs), strict=True))
    except ValueError as error:
        return _failed("compare", str(error))
    compared = compare(runs)
    if options.plot is not None:
        from hf_lowmem.runs.plot import draw

        draw(runs, options.plot)
    print(json.dumps(compared, indent=1) if options.json else table(compared))
    return 0


def plan_of_run(report: dict[str, Any]) -> dict[str, Any]:
    """Predict a run's memory from the settings in its report, on the machine's CPU; half a minute for a large model.

    Raises:
        ValueError: where the report does not say enough, or the planner cannot plan such a run.
    """
    from transformers import logging as transformers_logging

    from hf_lowmem.planner import CannotSimulate, plan
    from hf_lowmem.planner.methods import METHODS

    config = next((m.config for m in METHODS.values() if m.config.__name__ == report["config"]), None)
    # What the budget was searched for is set already.
    model, settings = report["model"], {k: v for k, v in report["settings"].items() if k != "lowmem_budget"}
    advice = "Plan it with `hf-lowmem plan ... --json > plan.json`, and give --plan plan.json."
    if config is None:
        known = ", ".join(method.config.__name__ for method in METHODS.values())
        raise ValueError(f"--plan: the run's arguments are {report['config'] or 'not recorded'}, not {known}. {advice}")
    if model.get("quantized"):
        raise ValueError(f"--plan: the run's base weights were quantised, which a report does not describe. {advice}")
    if not model.get("config"):
        raise ValueError(f"--plan: the report has no config of the model. {advice}")
    transformers_logging.set_verbosity_error()
    processes = report["processes"] or 1
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model["config"]), encoding="utf-8")
        try:
            with stages("plan") as progress:
                made = plan(
                    folder,
                    config(output_dir=folder, **{**settings, "use_cpu": True}),
                    dtype=model.get("dtype"),
                    peft_config=_adapter(model),
                    world_size=processes,
                    parallel=None if processes == 1 else "fsdp2" if settings.get("fsdp") else "ddp",
                    device="cpu" if report["device"] is None or "CPU" in report["device"] else "cuda",
                    progress=progress,
                )
        except (CannotSimulate, TypeError, ValueError) as error:
            raise ValueError(f"--plan: {error} {advice}") from error
    return made.to_dict()


def _adapter(model: dict[str, Any]) -> Any:
    if not model.get("adapters"):
        return None
    from peft import get_peft_config

    (described, *others) = model["adapters"].values()
    if others:
        raise ValueError(f"--plan: the run has {1 + len(others)} adapters; one can be planned.")
    return get_peft_config(dict(described))


def _read_plan(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadReport(f"--plan {path} is no JSON ({error}). Make it with `hf-lowmem plan ... --json`.") from error


def _failed(command: str, message: str) -> int:
    print(f"hf-lowmem {command}: {message}", file=sys.stderr)
    return 1
