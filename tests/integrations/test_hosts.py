"""The glue for other training programs, against those programs' own classes where they are installed."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hf_lowmem.optim import AdamW
from hf_lowmem.training import section
from tests.conftest import tiny_llama

ROOT = Path(__file__).parents[2] / "integrations"
ARGS = SimpleNamespace(learning_rate=0.25, weight_decay=0.5, seed=3)


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "axolotl"))
    import hf_lowmem_axolotl  # pyright: ignore[reportMissingImports]

    yield hf_lowmem_axolotl
    sys.modules.pop("hf_lowmem_axolotl", None)


def test_axolotl_loads_the_plugin_and_gets_our_optimizer_and_activations(axolotl: Any) -> None:
    from axolotl.integrations.base import PluginManager  # pyright: ignore[reportMissingImports]
    from axolotl.utils.dict import DictDefault  # pyright: ignore[reportMissingImports]

    manager = PluginManager.get_instance()
    manager.register("hf_lowmem_axolotl.HfLowmemPlugin")
    plugin = manager.plugins["hf_lowmem_axolotl.HfLowmemPlugin"]
    assert manager.get_input_args() == ["hf_lowmem_axolotl.HfLowmemArgs"]
    cfg = DictDefault({"hf_lowmem": {"optim": "adamw", "lowmem_state": "8bit", "lowmem_activations": "exact"}})
    plugin.register(cfg)
    model = tiny_llama().train()
    manager.post_model_load(cfg, model)
    assert "forward" in vars(model.model.layers[0])
    manager.cfg = cfg
    optimizer = manager.create_optimizer(SimpleNamespace(args=ARGS, model=model))
    assert type(optimizer) is AdamW
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0.0}


def test_axolotl_settings_that_cannot_be_are_refused(axolotl: Any) -> None:
    plugin = axolotl.HfLowmemPlugin()

    def cfg(**values: Any) -> Any:
        return SimpleNamespace(hf_lowmem=values, gradient_checkpointing=True)

    with pytest.raises(ValueError, match="hf_lowmem: field='optimiser' is not available"):
        plugin.register(cfg(optimiser="adamw"))
    with pytest.raises(ValueError, match="hf_lowmem: learning_rate=1: axolotl has a setting of that name"):
        plugin.register(cfg(optim="adamw", learning_rate=1))
    with pytest.raises(ValueError, match="gradient_checkpointing=True cannot be combined"):
        plugin.post_model_load(cfg(lowmem_activations="fp8"), tiny_llama())
    assert plugin.create_optimizer(SimpleNamespace(hf_lowmem=None), SimpleNamespace(args=ARGS)) is None


def test_the_axolotl_glue_without_axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own lines, where axolotl's two names stand for it."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = object  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "hf_lowmem_axolotl", raising=False)
    monkeypatch.syspath_prepend(str(ROOT / "axolotl"))
    import hf_lowmem_axolotl  # pyright: ignore[reportMissingImports]

    plugin, model = hf_lowmem_axolotl.HfLowmemPlugin(), tiny_llama()
    trainer = SimpleNamespace(args=ARGS, model=model)
    both = SimpleNamespace(hf_lowmem={"optim": "adamw", "lowmem_activations": "exact"}, bf16=True, max_grad_norm=1.0)
    plugin.register(both)
    plugin.post_model_load(both, model)
    assert "forward" in vars(model.model.layers[0])
    optimizer = plugin.create_optimizer(both, trainer)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert plugin.create_optimizer(SimpleNamespace(hf_lowmem={"lowmem_activations": "exact"}), trainer) is None
    for name, value in (("learning_rate", 1), ("optimiser", "adamw")):
        with pytest.raises(ValueError, match=rf"hf_lowmem: (field=)?'?{name}"):
            plugin.register(SimpleNamespace(hf_lowmem={"optim": "adamw", name: value}))
    for asked in ({"lowmem": "auto"}, {"lowmem_budget": "24GiB"}):
        with pytest.raises(ValueError, match=r"has no effect in axolotl, whose steps.*preset.*hf-lowmem plan"):
            plugin.register(SimpleNamespace(hf_lowmem=asked))
    plugin.register(SimpleNamespace(hf_lowmem={"lowmem": "balanced"}))
    by_preset = plugin.create_optimizer(SimpleNamespace(hf_lowmem={"lowmem": "balanced"}), trainer)
    assert {(group["method"], group["state"]) for group in by_preset.param_groups} == {
        ("apollo", "int8_softsign,fp8_expand")
    }
    sys.modules.pop("hf_lowmem_axolotl", None)


def test_llamafactory_is_handed_our_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "llamafactory"))
    import train  # pyright: ignore[reportMissingImports]

    try:
        monkeypatch.setenv(section.VARIABLE, '{"optim": "adamw", "lowmem_state": "8bit"}')
        optimizer = train.optimizer_for(tiny_llama(), ARGS)
        assert type(optimizer) is AdamW
        assert {group["lr"] for group in optimizer.param_groups} == {0.25}
        monkeypatch.setenv(section.VARIABLE, '{"lowmem_activations": "fp8"}')
        assert train.optimizer_for(tiny_llama(), ARGS) is None
        monkeypatch.setenv(section.VARIABLE, '{"optim": "adamw", "lowmem_step_in_backward": true}')
        with pytest.raises(ValueError, match="is not supported under LLaMA-Factory"):
            train.optimizer_for(tiny_llama(), ARGS)
        monkeypatch.setenv(section.VARIABLE, '{"lowmem": "auto"}')
        with pytest.raises(ValueError, match=r"has no effect in LLaMA-Factory, whose steps.*preset.*hf-lowmem plan"):
            train.main()  # before anything of LLaMA-Factory is imported
    finally:
        sys.modules.pop("train", None)
