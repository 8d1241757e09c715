"""Where a picture is to be written: found to be impossible before the work, not after it."""

from importlib.util import find_spec
from pathlib import Path

from hf_lowmem.cli.wrong import WrongCommand

__all__ = ["check_picture"]

FORMATS = (".png", ".svg", ".pdf")


def check_picture(label: str, path: Path) -> None:
    """Raise where no picture can be written to `path`.

    Args:
        label: how the command line calls it.

    Raises:
        WrongCommand: for a name or a folder that cannot be.
        ModuleNotFoundError: without matplotlib.
    """
    said = f"{label} {path}"
    if path.suffix.lower() not in FORMATS:
        raise WrongCommand(f"{said}: the name ends in none of {', '.join(FORMATS)}. Give it one of them.")
    if path.is_dir():
        raise WrongCommand(f"{said} is a folder. Give the name of a file.")
    if not path.parent.is_dir():
        raise WrongCommand(f"{said}: there is no folder {path.parent}. Make it, or give another.")
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(f"{label} needs matplotlib: pip install matplotlib")
