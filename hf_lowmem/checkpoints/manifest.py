"""A checkpoint's manifest, and what is held against it; see the package for the whole picture."""

import hashlib
import json
import os
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from hf_lowmem.checkpoints.files import (
    LOADED,
    MANIFEST,
    PICKLED,
    BadCheckpoint,
    check_links,
    check_pickles,
    check_whole,
    files_of,
)

STATE = "trainer_state.json"
# Where the trainers keep weights, and the optimizer's state: Trainer and PEFT, accelerate's FSDP whole, by process and
# in shards, DeepSpeed.
_WEIGHTS = ("*model*.safetensors", "*model*.bin", "pytorch_model_fsdp_*/.metadata", "*/adapter_model.*", "global_step*")
_OPTIMIZER = (
    "optimizer.pt", "optimizer.bin", "optimizer_*_rank*.bin", "optimizer_*/.metadata", "global_step*/*_optim_states.pt",
    "rank*-of-*-optimizer.pt", "optimizer.pt_*",
)  # fmt: skip


def write_manifest(folder: str | os.PathLike[str], **facts: Any) -> None:
    """Mark a checkpoint as complete: its files with sizes and SHA-256, and `facts` (plain values) beside them.

    Every file is flushed to the disk first, so that after a power cut a manifest does not vouch for data that were
    still in memory. Reads each file once: about a second for 1.5 GB.
    """
    root = Path(folder)
    files = {}
    for path in files_of(root):
        _flush(path)
        files[path.relative_to(root).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    text = json.dumps({"format": 1, **facts, "files": files}, indent=1)
    partial = root / (MANIFEST + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(root / MANIFEST)
    _flush(root)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The manifest, or None where there is none. Raises BadCheckpoint where it cannot be read or is not one."""
    path = Path(folder) / MANIFEST
    try:
        if not os.path.lexists(path):
            return None
        manifest = json.loads(path.read_text(encoding="utf-8"))
        named = all(isinstance(n, str) and _is_inside(n) for n in manifest["files"])
        sized = all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in manifest["files"].values())
    except OSError as error:
        raise _unreadable(error, path) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    if not named or not sized:
        raise BadCheckpoint(f"{path} is damaged: it does not say what the files are.")
    return manifest


def verify(folder: str | os.PathLike[str]) -> None:
    """Raise unless the checkpoint is complete and unchanged, or, without a manifest, whole as far as can be seen.

    Raises:
        BadCheckpoint: naming the file: missing, unreadable, of another size or content than when it was saved, added
            since, cut off, a link to somewhere else, or holding objects that only code could rebuild.
        FileNotFoundError: where there is no such folder.
    """
    root = Path(folder)
    try:
        if not root.is_dir():
            raise FileNotFoundError(
                f"there is no checkpoint {root}. Give a checkpoint-N of output_dir, or resume_from_checkpoint='auto'."
            )
        check_links(root)
        manifest = read_manifest(root)
        if manifest is None:
            _check_structure(root)
        else:
            _check_files(root, manifest["files"])
        check_pickles(root)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not root.is_dir():
            raise
        raise _unreadable(error, root) from error


def check_resumable(folder: str | os.PathLike[str]) -> None:
    """Raise where training could go on from a checkpoint's model alone, with empty moments and a schedule begun anew.

    Raises:
        BadCheckpoint: where it has weights, but no state of an optimizer or none of its schedule.
    """
    root = Path(folder)
    try:
        weights, moments = (any(any(root.glob(p)) for p in patterns) for patterns in (_WEIGHTS, _OPTIMIZER))
        # DeepSpeed keeps a schedule of its own beside its optimizer.
        schedule = (root / "scheduler.pt").is_file() or any(root.glob("global_step*"))
    except OSError as error:
        raise _unreadable(error, root) from error
    if weights and not (moments and schedule):
        lacks = "optimizer state" if not moments else "learning rate schedule"
        raise BadCheckpoint(
            f"{root} has a model and no {lacks} (a Trainer with save_only_model=True saves such ones), so a run cannot "
            f"go on from it. Save with save_only_model=False; to start a new run from its weights, pass {root} as the "
            "model and leave resume_from_checkpoint unset."
        )


def _check_files(root: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        path = root / name
        if not path.is_file():
            raise BadCheckpoint(f"{path} is missing: the checkpoint had it when it was saved.")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise BadCheckpoint(f"{path} has {size:,} bytes, and had {expected['bytes']:,} when it was saved.")
        if _digest(path) != expected["sha256"]:
            raise BadCheckpoint(f"{path} is not what was saved: it has the same size and other content.")
    for path in files_of(root):
        name = path.relative_to(root).as_posix()
        if name not in files and (path.suffix in LOADED or path.name.endswith(".metadata")):
            raise BadCheckpoint(f"{path} was added after the checkpoint was saved, and would be loaded with it.")


def _check_structure(root: Path) -> None:
    """Raise where a checkpoint without a manifest lacks STATE, which is written last, or has a damaged file."""
    if not (root / STATE).is_file():
        raise BadCheckpoint(f"{root} is incomplete: it has neither {MANIFEST} nor {STATE}, which are written last.")
    for path in files_of(root):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                _check_safetensors(path)
            elif path.suffix in PICKLED and path.name != "training_args.bin":
                check_whole(path)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{path} is damaged: {error}.") from error


def _check_safetensors(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(length))
    end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise ValueError(f"it has {size:,} bytes and says {8 + length + end:,}")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _unreadable(error: OSError, where: Path) -> BadCheckpoint:
    return BadCheckpoint(
        f"{error.filename or where} cannot be read ({error.strerror or error}), so the checkpoint is not complete. "
        "Make it readable for this user, or take another checkpoint."
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    if sys.platform == "win32":  # a folder cannot be opened there, nor a file flushed through another handle
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
