"""Which checkpoint of a killed run can be trusted.

transformers writes the files of `checkpoint-N` one after the other, in place, and resumes from the highest N that is a
folder. A run killed inside a save leaves a folder with the highest number and half of its files; a full disk, a cut
copy or a flipped bit leave one that looks whole. Here a checkpoint is complete when `lowmem_manifest.json`, which is
written last and renamed into place, lists its files with their sizes and SHA-256, and they agree.

    write_manifest(folder)      after the last file
    verify(folder)              raises BadCheckpoint, naming the file
    last_complete(run)          the newest that verifies, and why the newer ones do not
    set_aside(folder)           before a save over an existing checkpoint: nothing complete is overwritten in place

A checkpoint without a manifest was written by plain transformers, or its save was not finished. It is taken only where
nothing better exists or the user names it, and only if each of its files is whole as far as its own format can tell:
torch's files are zip archives with checksums, safetensors says how long it is, JSON parses.

Nothing that would be unpickled is trusted: a file that `torch.load(weights_only=True)` would refuse is refused here,
by name, before any of it is loaded. `training_args.bin` is not looked at: no trainer reads it on resuming.

Why not write into a temporary folder and rename that: transformers decides the folder's name inside its own method, and
under FSDP and DeepSpeed their libraries write into it as well. A marker that comes last works with all of them.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

MANIFEST = "lowmem_manifest.json"
ASIDE = ".replaced"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What resuming reads, by suffix. Other files (a card, a tokenizer's text) may be added to a checkpoint by anybody.
_LOADED = (".pt", ".pth", ".bin", ".safetensors", ".distcp")
# torch.distributed.checkpoint unpickles this one without a list of what is allowed. What it writes there is of these.
_SHARDS_METADATA = ".metadata"
_NEVER_LOADED = ("training_args.bin",)
# DeepSpeed unpickles its own files without a list of what is allowed. In those it wrote in ZeRO-1 and ZeRO-2 are these,
# which hold numbers and do nothing when they are made.
_DEEPSPEED_FILE = re.compile(r"global_step\d+/[^/]*_(optim|model)_states\.pt")
_DEEPSPEED_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}
STATE = "trainer_state.json"
_CHUNK = 1 << 22


class BadCheckpoint(ValueError):
    """A checkpoint that must not be loaded; the message names the file and the reason."""


def write_manifest(folder: str | os.PathLike[str], **facts: Any) -> None:
    """Mark a checkpoint as complete: its files with sizes and SHA-256, and `facts` (plain values) beside them.

    Every file is flushed to the disk first, so that after a power cut a manifest does not vouch for data that were
    still in memory. Reads each file once: about a second for 1.5 GB.
    """
    root = Path(folder)
    files = {}
    for path in _files(root):
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
    """The manifest, or None where there is none. Raises BadCheckpoint where it is not one."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sound = all(
            isinstance(n, str) and isinstance(f["bytes"], int) and isinstance(f["sha256"], str)
            for n, f in manifest["files"].items()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    if not sound:
        raise BadCheckpoint(f"{path} is damaged: it does not say what the files are.")
    return manifest


def verify(folder: str | os.PathLike[str]) -> None:
    """Raise unless the checkpoint is complete and unchanged, or, without a manifest, whole as far as can be seen.

    Raises:
        BadCheckpoint: naming the file: missing, of another size or content than when it was saved, added since, cut
            off, or holding objects that only code could rebuild.
        FileNotFoundError: where there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {root}.")
    manifest = read_manifest(root)
    if manifest is None:
        _check_structure(root)
        return
    for name, expected in manifest["files"].items():
        path = root / name
        if not path.is_file():
            raise BadCheckpoint(f"{path} is missing: the checkpoint had it when it was saved.")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise BadCheckpoint(f"{path} has {size:,} bytes, and had {expected['bytes']:,} when it was saved.")
        if _digest(path) != expected["sha256"]:
            raise BadCheckpoint(f"{path} is not what was saved: it has the same size and other content.")
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        if name not in manifest["files"] and path.suffix in _LOADED:
            raise BadCheckpoint(f"{path} was added after the checkpoint was saved, and would be loaded with it.")
    _check_pickles(root)


def last_complete(run: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint of a run that verifies or None, why each newer one was passed over).

    Where no checkpoint of the run has a manifest (it was made by plain transformers), the newest whose files are whole.
    """
    root = Path(run)
    restore_aside(root)
    found = sorted(_checkpoints(root), reverse=True)
    marked = any((path / MANIFEST).exists() for _, path in found)
    passed: list[str] = []
    for _, path in found:
        if marked and not (path / MANIFEST).exists():
            passed.append(f"{path} is incomplete: its save was not finished (it has no {MANIFEST}).")
            continue
        try:
            verify(path)
        except BadCheckpoint as error:
            passed.append(str(error))
            continue
        return path, passed
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


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in run.iterdir()] if run.is_dir() else []
    return [(int(match[1]), path) for match, path in found if match and path.is_dir()]


def _files(root: Path) -> list[Path]:
    return sorted(
        path for path in root.rglob("*") if path.is_file() and path.name not in (MANIFEST, MANIFEST + ".partial")
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


def _check_structure(root: Path) -> None:
    """What can be said without a manifest. transformers writes STATE after everything else."""
    if not (root / STATE).is_file():
        raise BadCheckpoint(f"{root} is incomplete: it has neither {MANIFEST} nor {STATE}, which are written last.")
    for path in _files(root):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                _check_safetensors(path)
            elif path.suffix in (".pt", ".pth", ".bin") and zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
                if broken is not None:
                    raise ValueError(f"{broken} in it fails its checksum")
            elif path.suffix in (".pt", ".pth"):
                raise ValueError("it is not a whole zip archive, as torch writes")
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise BadCheckpoint(f"{path} is damaged: {error}.") from error
    _check_pickles(root)


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


def _check_pickles(root: Path) -> None:
    """Refuse what `torch.load(weights_only=True)` would, before anything is loaded."""
    import numpy
    import torch

    # transformers saves numpy's random state, and allows these when it loads it.
    known = {
        "numpy.ndarray",
        "numpy.dtype",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
    }
    known |= {f"{type(numpy.dtype(t)).__module__}.{type(numpy.dtype(t)).__name__}" for t in "BHILbhilfd"}
    for path in _files(root):
        if path.name == _SHARDS_METADATA:
            _check_shards_metadata(path)
        if path.suffix not in (".pt", ".pth", ".bin") or path.name in _NEVER_LOADED:
            continue
        if not zipfile.is_zipfile(path):
            raise BadCheckpoint(f"{path} is not in torch's zip format, so it cannot be checked before it is loaded.")
        try:
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - known
            if _DEEPSPEED_FILE.fullmatch(path.relative_to(root).as_posix()):
                unsafe -= _DEEPSPEED_CLASSES
        except Exception as error:
            raise BadCheckpoint(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if unsafe:
            raise BadCheckpoint(
                f"{path} holds more than tensors and plain values ({', '.join(sorted(unsafe))}); loading it could run "
                "code, and it was not made by a trainer of hf_lowmem."
            )


def _member(kind: Any, name: str) -> Any:
    """`getattr` for members of enums alone: Python 3.11.0 to 3.11.3 pickle them by it."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of {kind!r}")


class _ShardsMetadata(pickle.Unpickler):
    """Rebuilds torch.distributed.checkpoint's description of its shards and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) == ("builtins", "getattr"):
            return _member
        found = getattr(torch, name, None) if module == "torch" else None
        plain = (module, name) in {
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("torch.serialization", "_get_layout"),
        }
        described = module.startswith("torch.distributed.checkpoint.") or module == "torch.distributed._shard.metadata"
        if plain or described or isinstance(found, torch.dtype) or found in (torch.Size, torch.device):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _check_shards_metadata(path: Path) -> None:
    try:
        with path.open("rb") as file:
            _ShardsMetadata(file).load()
    except Exception as error:
        raise BadCheckpoint(
            f"{path} is not the description of shards that torch writes ({type(error).__name__}: {error}); loading it "
            "could run code."
        ) from error
