"""The examples that other programs read: each says what we take from it, and its command names files that are there."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from hf_lowmem.cli.launch import prepare
from hf_lowmem.training import section
from tests.conftest import tiny_llama

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "scripts" / "examples"
CONFIGS = [path for path in sorted(EXAMPLES.iterdir()) if path.suffix in (".sh", ".yaml")]
ARGS = SimpleNamespace(learning_rate=0.25, weight_decay=0.5, seed=3)


def command_of(path: Path) -> list[str]:
    """The command that trains with an example, as it stands in it."""
    lines = [line.lstrip("# ") for line in path.read_text().splitlines()]
    return shlex.split(next(line for line in lines if re.match(r"hf-lowmem |[A-Z_]+=", line)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_is_short_and_on_the_list_and_names_files_that_are_there(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()
    words = [word.split("=")[-1] for word in command_of(path)]
    files = [word for word in words if word.startswith(("integrations/", "scripts/"))]
    assert len(files) >= 2
    assert all((ROOT / file).exists() for file in files)


def test_the_launcher_takes_its_file() -> None:
    words = command_of(EXAMPLES / "fsdp2.sh")
    assert words[:2] == ["hf-lowmem", "launch"]
    values, rest = prepare(str(ROOT / words[words.index("--config_file") + 1]))
    assert values["lowmem_state"] == "8bit"
    assert rest["distributed_type"] == "FSDP"


def test_axolotl_s_section_gives_the_preset_s_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ModuleType("axolotl.integrations.base")
    vars(base)["BasePlugin"] = object
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "hf_lowmem_axolotl", raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "integrations" / "axolotl"))
    from hf_lowmem_axolotl import HfLowmemPlugin  # pyright: ignore[reportMissingImports]

    cfg, model = SimpleNamespace(**yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())), tiny_llama()
    plugin = HfLowmemPlugin()
    plugin.register(cfg)
    plugin.post_model_load(cfg, model)
    assert "forward" in vars(model.model.layers[0])
    optimizer: Any = plugin.create_optimizer(cfg, SimpleNamespace(args=ARGS, model=model))
    assert {group["method"] for group in optimizer.param_groups} == {"apollo"}
    sys.modules.pop("hf_lowmem_axolotl", None)


def test_llamafactory_s_command_gives_the_preset_s_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    variable, value = command_of(EXAMPLES / "llamafactory.yaml")[0].split("=", 1)
    assert variable == section.VARIABLE
    assert json.loads(value) == {"lowmem": "balanced"}
    monkeypatch.setenv(variable, value)
    monkeypatch.syspath_prepend(str(ROOT / "integrations" / "llamafactory"))
    import train  # pyright: ignore[reportMissingImports]

    try:
        asked = yaml.safe_load((EXAMPLES / "llamafactory.yaml").read_text())
        assert asked["disable_gradient_checkpointing"] is True
        optimizer: Any = train.optimizer_for(tiny_llama(), ARGS)
        assert {group["method"] for group in optimizer.param_groups} == {"apollo"}
        assert train.Settings.from_env().lowmem_activations == "checkpoint_fp8"
    finally:
        sys.modules.pop("train", None)
