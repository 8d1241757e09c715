"""The model card: model_cards/demo_template.md, filled with what was measured."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_lowmem.memory import human_bytes
from hf_lowmem.runs.card import GENERATED, template_path

TEMPLATE = "demo_template.md"


def write_card(folder: Path, *, name: str, base_model: str, license: str | None, values: dict[str, Any]) -> Path:
    """Write ``folder/README.md``. ``values`` are the template's variables; bytes become readable there."""
    data = ModelCardData(
        base_model=base_model,
        language="en",
        library_name="transformers",
        license=license,
        model_name=name,
        pipeline_tag="text-generation",
        tags=[GENERATED, "hf-lowmem", "trl", "sft", "asft"],
    )
    card = ModelCard.from_template(data, template_path=str(template_path(TEMPLATE)), **_readable(values))
    card.save(folder / "README.md")
    return folder / "README.md"


_BYTES = frozenset({"weights", "trainable", "gradients", "optimizer", "saved", "peak", "peak_added"})


def _readable(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _readable(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_readable(v) for v in value]
    return human_bytes(value) if key in _BYTES else value
