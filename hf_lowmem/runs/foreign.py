"""A run that has left no report, from the files of its checkpoint: what plain Trainer and TRL write.

Sizes come from headers and directories of files. Nothing is unpickled, and no tensor is read.
"""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_lowmem.checkpoints.archives import Window, records
from hf_lowmem.checkpoints.opcodes import Refused

__all__ = ["memory_of_files", "model_of_files", "versions_of_card"]

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_VERSION = re.compile(r"^- (TRL|Transformers|Pytorch|Datasets|Tokenizers|PEFT):? (\d[\w.+]*)$", re.MULTILINE)


def memory_of_files(folder: Path) -> dict[str, int]:
    """Bytes of weights and optimizer state, as far as the folder has their files."""
    found = {}
    sizes = [size * width for size, width, _ in _tensors(folder)]
    if sizes:
        found["weights"] = sum(sizes)
    state = folder / "optimizer.pt"
    try:
        with state.open("rb") as file:
            members = records(Window(file, 0, state.stat().st_size))
    except (OSError, Refused):
        return found
    return found | {"optimizer": sum(record.size for name, record in members.items() if name.startswith("data/"))}


def model_of_files(folder: Path) -> dict[str, object]:
    """Number of parameters, and the dtype of most; nothing for a folder without a whole model."""
    counts: dict[str, int] = {}
    for size, _, dtype in _tensors(folder):
        counts[dtype] = counts.get(dtype, 0) + size
    if not counts:
        return {}
    most = max(counts, key=counts.__getitem__)
    return {"parameters": sum(counts.values()), "dtype": DTYPES.get(most, most)}


def versions_of_card(folder: Path) -> dict[str, str]:
    """Versions of packages that the card of a trainer of TRL or transformers names."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    found: list[tuple[str, str]] = _VERSION.findall(text)
    return {"torch" if name == "Pytorch" else name.lower(): version for name, version in found}


def _tensors(folder: Path) -> list[tuple[int, int, str]]:
    """Values, bytes of each, and dtype of every tensor in the model's own files."""
    found = []
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    part = file.get_slice(name)
                    size = 1
                    for side in part.get_shape():
                        size *= side
                    found.append((size, WIDTHS.get(part.get_dtype(), 1), part.get_dtype()))
        except (OSError, SafetensorError):
            return []
    return found
