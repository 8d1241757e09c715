"""The section `hf_lowmem_config` of an accelerate YAML, on its way to the processes that train.

accelerate refuses keys that it does not know, so `hf-lowmem launch` takes the section out of the file and hands it to
every worker in one environment variable, as JSON; `HF_LOWMEM_CONFIG='{"optim": "adamw"}'` set by hand, or by another
launcher, does the same. A section holds fields by name, as TrainingArguments would: `optim`, `lowmem_state`, …

Who reads it: every LowMem*Config, for fields that were not set otherwise, and `LowMemPlugin.from_env` for loops of
one's own. Under `hf-lowmem launch` every config of transformers and TRL does, so that a script need not be changed (see
hf_lowmem/cli/worker.py); a script that is started by another launcher has to import ours. Which fields there are is
known there; here is only how a section travels, and whether it has arrived.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY = "hf_lowmem_config"
VARIABLE = "HF_LOWMEM_CONFIG"


@dataclass
class State:
    """launched: whether this process was started by `hf-lowmem launch` with a section; taken: whether a trainer or a
    plugin applies it."""

    launched: bool = False
    taken: bool = False


state = State()


def from_env(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The section in the environment; empty where there is none.

    Raises:
        ValueError: where the variable is not a JSON object.
    """
    text = (os.environ if environ is None else environ).get(VARIABLE, "")
    if not text.strip():
        return {}
    try:
        section = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f'{VARIABLE}={text!r} is not JSON ({error}). Write an object, such as {{"optim": "adamw"}}.'
        ) from error
    return checked(VARIABLE, section)


def from_yaml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our section, the rest of the file, which is accelerate's).

    Raises:
        FileNotFoundError, ValueError: naming the file and what is wrong with it.
    """
    import yaml  # accelerate depends on it

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"config_file={str(path)!r}: there is no such file.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config_file={str(path)!r} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config_file={str(path)!r}: expected keys with values, as `accelerate config` writes them.")
    rest = {str(key): value for key, value in content.items()}
    return checked(f"{KEY} in {path}", rest.pop(KEY, None) or {}), rest


def to_env(section: Mapping[str, Any]) -> dict[str, str]:
    """The variable that carries a section to workers."""
    return {VARIABLE: json.dumps(dict(section))}


def checked(label: str, section: Any) -> dict[str, Any]:
    if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
        raise TypeError(f"{label}={section!r}: expected fields with values, such as {{'optim': 'adamw'}}.")
    return section
