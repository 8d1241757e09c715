"""`hf-lowmem doctor`: the surroundings, then the kernels; a table, or with --json one object."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from hf_lowmem.cli.doctor.surroundings import surroundings
from hf_lowmem.cli.doctor.trial import Trial, device_of_trials, trials

GIB, GB = 2**30, 1e9
SHOWN = 3  # cases of a kernel whose difference is spelled out


def run(*, as_json: bool) -> int:
    """Print what there is; 1 where a kernel differs from its reference or fails, else 0."""
    found = surroundings()
    if not as_json:
        print(describe(found))
    device, sentence = device_of_trials()
    results = list(_watched(device)) if device is not None else []
    wrong = any(trial.wrong for trial in results)
    if as_json:
        kernels = {"where": None if device is None else str(device), "note": sentence, "same": not wrong}
        print(json.dumps(found | {"kernels": kernels | {"rows": [trial.row() for trial in results]}}, indent=1))
    else:
        print("\n" + "\n\n".join(part for part in (table_of(results), sentence, verdict(results)) if part))
    return int(wrong)


def _watched(device: Any) -> Any:
    """The trials, counted on stderr where a person looks at it."""
    for trial in trials(device):
        if sys.stderr.isatty():
            print(f"{trial.kernel}: {trial.cases} cases", file=sys.stderr)
        yield trial


def describe(found: dict[str, Any]) -> str:
    """Versions, devices, settings and packages as text."""
    lines = [", ".join(f"{name} {value}" for name, value in found["versions"].items() if value), ""]
    for device in found["devices"]:
        memory = f"{_gib(device['free'])} of {_gib(device['total'])} GiB free"
        capability = f", capability {device['capability']}" if device["capability"] else ""
        lines.append(f"{device['device']}: {device['name']}{capability}, {memory}")
    lines += [f"{name}: {value}" for name, value in found["settings"].items()]
    rows = [["package", "version", "without it"]]
    for name, package in found["packages"].items():
        rows.append([name, package["version"] or "-", package["costs"]])
    return "\n".join([*lines, "", columns(rows)])


def table_of(results: Sequence[Trial]) -> str:
    rows = [["kernel", "cases", "same bits?", "ms", "GB/s"]]
    for trial in results:
        same = "yes" if trial.exact else "within its bound"
        seconds, bandwidth = trial.seconds, trial.bandwidth
        rows.append([
            trial.kernel,
            str(trial.cases),
            f"NO: {len(trial.wrong)} differ" if trial.wrong else same,
            f"{1e3 * seconds:.3f}" if seconds else "-",
            f"{bandwidth / GB:.0f}" if bandwidth else "-",
        ])  # fmt: skip
    return columns(rows) if results else ""


def verdict(results: Sequence[Trial]) -> str:
    """Summary of the comparisons: which kernels differ, and what happens to those; "" where nothing was compared."""
    bad = [trial for trial in results if trial.wrong]
    if not bad:
        return f"All {len(results)} kernels are what their references are." if results else ""
    lines = []
    for trial in bad:
        lines += [f"{trial.kernel}, {case}: {why}" for case, why in list(trial.wrong.items())[:SHOWN]]
        if len(trial.wrong) > SHOWN:
            lines.append(f"{trial.kernel}: and {len(trial.wrong) - SHOWN} more (--json has all)")
    lines.append(
        "A kernel that differs at its first use in a training is not used there: its reference runs, slower. Another "
        "version of triton or of the driver may cure it; please report this output."
    )
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f}"
