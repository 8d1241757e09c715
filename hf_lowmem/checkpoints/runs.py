"""The checkpoints of an output_dir: whose they are, which one a run goes on from, and how a save replaces one.

An output_dir may hold more than one run's: a second training was started there. The manifest says whose a checkpoint
is:

    run = {"id": a random name, "order": 2, "began": "2026-03-01T12:00:00+00:00", "after": 0}

`order` counts the runs of the folder, so neither clocks nor the times of files, which a copy loses, decide which is the
newest. A run that is resumed keeps its id; if another one was started meanwhile, it becomes the newest again. `after`
is the step from which it went on where that checkpoint had no id: older releases wrote none.
"""

import os
import re
import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from hf_lowmem.checkpoints.files import MANIFEST, BadCheckpoint
from hf_lowmem.checkpoints.manifest import check_resumable, read_manifest, verify

ASIDE = ".replaced"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_NAMED = 4  # checkpoints of another run that are listed by name


class _Found(NamedTuple):
    step: int
    path: Path
    marked: bool
    run: dict[str, Any] | None  # None: no manifest, one that cannot be read, or one of an older release

    @property
    def id(self) -> str | None:
        return None if self.run is None else self.run["id"]


def begin_run(run: str | os.PathLike[str], resume: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Who writes the next checkpoints of `run`, as their manifests will say it.

    Args:
        run: the output_dir.
        resume: the checkpoint that the training goes on from; None where it starts anew.
    """
    others = [found.run for found in _found(Path(run)) if found.run is not None]
    own, after = None, 0
    if resume is not None:
        own = _run_of(Path(resume))
        match = _CHECKPOINT.fullmatch(Path(resume).name)
        after = int(match[1]) if own is None and match else 0
    highest = max((other["order"] for other in others if own is None or other["id"] != own["id"]), default=0)
    if own is not None:
        return {**own, "order": max(own["order"], highest + 1)}
    began = datetime.now(UTC).isoformat(timespec="seconds")
    return {"id": uuid.uuid4().hex, "order": highest + 1, "began": began, "after": after}


def last_complete(run: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that training can go on from or None, why the newer ones and other runs' are passed over).

    Of several runs in the folder it is one of the run that was begun or resumed last. Where no checkpoint has a
    manifest (they were made by plain transformers), the newest whose files are whole.
    """
    root = Path(run)
    restore_aside(root)
    found = sorted(_found(root), key=lambda entry: entry.step, reverse=True)
    # The beginning decides where two folders were put together, each with a first run.
    runs = (entry.run for entry in found if entry.run is not None)
    newest = max(runs, key=lambda run: (run["order"], run["began"]), default=None)
    mine = [entry for entry in found if newest is None or _belongs(entry, newest)]
    passed = _others([entry for entry in found if entry not in mine], newest)
    marked = any(entry.marked for entry in found)
    for entry in mine:
        if marked and not entry.marked:
            passed.append(f"{entry.path} is incomplete: its save was not finished (it has no {MANIFEST}).")
            continue
        try:
            verify(entry.path)
            check_resumable(entry.path)
        except (BadCheckpoint, OSError) as error:  # an OSError: it was deleted meanwhile
            passed.append(str(error))
            continue
        return entry.path, passed
    return None, passed


def set_aside(folder: str | os.PathLike[str]) -> None:
    """Make room for a save: a complete checkpoint is renamed until `drop_aside`, an incomplete one is deleted."""
    path = Path(folder)
    if not path.exists():
        return
    if (path / MANIFEST).exists():
        aside = path.with_name(path.name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    else:
        shutil.rmtree(path)


def drop_aside(folder: str | os.PathLike[str]) -> None:
    """The new one is complete: the one that was set aside goes."""
    path = Path(folder)
    shutil.rmtree(path.with_name(path.name + ASIDE), ignore_errors=True)


def restore_aside(run: str | os.PathLike[str]) -> None:
    """Put back what was set aside for a save that was never finished."""
    root = Path(run)
    for aside in root.glob(f"checkpoint-*{ASIDE}") if root.is_dir() else ():
        path = aside.with_name(aside.name.removesuffix(ASIDE))
        if (path / MANIFEST).exists():
            shutil.rmtree(aside)
        else:
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)


def _found(run: Path) -> list[_Found]:
    named = [(_CHECKPOINT.fullmatch(path.name), path) for path in run.iterdir()] if run.is_dir() else []
    return [
        _Found(int(match[1]), path, os.path.lexists(path / MANIFEST), _run_of(path))
        for match, path in named
        if match and path.is_dir()
    ]


def _run_of(folder: Path) -> dict[str, Any] | None:
    """The run that a checkpoint belongs to, by its manifest; None where that does not say."""
    try:
        manifest = read_manifest(folder) or {}
    except BadCheckpoint:
        return None
    run = manifest.get("run")
    kinds = {"id": str, "order": int, "began": str, "after": int}
    if isinstance(run, dict) and all(type(run.get(key)) is kind for key, kind in kinds.items()):
        return {key: run[key] for key in kinds}
    return None


def _belongs(entry: _Found, run: dict[str, Any]) -> bool:
    """Whether a checkpoint is of a run, or could be: it does not say, and is incomplete or what the run began from."""
    if entry.run is not None:
        return entry.id == run["id"]
    return not _is_older_releases(entry) or entry.step <= run["after"]


def _is_older_releases(entry: _Found) -> bool:
    try:
        return entry.marked and read_manifest(entry.path) is not None
    except BadCheckpoint:
        return False


def _others(found: list[_Found], newest: dict[str, Any] | None) -> list[str]:
    """One sentence for each other run."""
    said = []
    for run in dict.fromkeys(entry.id for entry in found):
        theirs = [entry for entry in found if entry.id == run]
        names = ", ".join(entry.path.name for entry in theirs[:_NAMED])
        more = f" and {len(theirs) - _NAMED} more" if len(theirs) > _NAMED else ""
        began = theirs[0].run["began"] if theirs[0].run else "by an older release"
        said.append(
            f"{theirs[0].path.parent} holds two runs' checkpoints: {names}{more} of the run begun {began}, and those "
            f"of the run begun {newest['began'] if newest else ''}, which is the newer one and goes on. To go on with "
            f"the other, pass resume_from_checkpoint={str(theirs[0].path)!r}."
        )
    return said
