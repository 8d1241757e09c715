"""The model card: model_cards/template.md, filled with what was measured."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

import hf_lowmem
from hf_lowmem.memory import human_bytes


def template_path() -> Path:
    """The template, in a clone at its own place and in a wheel inside the package.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(hf_lowmem.__file__).parent
    places = (package.parent / "model_cards" / "template.md", package / "model_cards" / "template.md")
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no model card template at {' or '.join(map(str, places))}: reinstall hf-lowmem")


def write_card(folder: Path, *, name: str, base_model: str, license: str | None, values: dict[str, Any]) -> Path:
    """Write ``folder/README.md``. ``values`` are the template's variables; bytes become readable there."""
    data = ModelCardData(
        base_model=base_model,
        language="en",
        library_name="transformers",
        license=license,
        model_name=name,
        pipeline_tag="text-generation",
        tags=["hf-lowmem", "trl", "sft", "asft"],
    )
    card = ModelCard.from_template(data, template_path=str(template_path()), **_readable(values))
    card.save(folder / "README.md")
    return folder / "README.md"


_BYTES = frozenset({"weights", "trainable", "gradients", "optimizer", "saved", "peak", "peak_added"})


def _readable(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _readable(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_readable(v) for v in value]
    return human_bytes(value) if key in _BYTES else value
