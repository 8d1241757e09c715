"""LowMemPlugin in a loop of one's own: the same bits as the pieces by hand, and a resumed loop as one uninterrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hf_lowmem.activations import convert
from hf_lowmem.cli.launch import prepare
from hf_lowmem.optim import make_optimizer
from hf_lowmem.training import section
from hf_lowmem.training.plugin import LowMemPlugin
from tests.conftest import tiny_llama
from tests.contracts.test_optimizers import same_bits

CONFIGS = sorted((Path(__file__).parents[2] / "integrations" / "accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _fresh_state() -> Any:
    AcceleratorState._reset_state(reset_partial_state=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=False)


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 128, (24, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def loader() -> Any:
    return torch.utils.data.DataLoader(batches(), batch_size=4)  # type: ignore[arg-type]


def scheduled(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def loop(accelerator: Any, model: Any, optimizer: Any, data: Any, scheduler: Any, first: int = 0) -> list[float]:
    losses = []
    for index, batch in enumerate(data):
        if index < first:
            continue
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loop_with_the_plugin_is_the_loop_by_hand(in_backward: bool) -> None:
    accelerator = Accelerator(cpu=True)
    plugin = LowMemPlugin(
        optim="apollo",
        lowmem_rank=8,
        lowmem_state="8bit",
        lowmem_activations="fp8",
        lowmem_step_in_backward=in_backward,
        learning_rate=1e-2,
        weight_decay=0.1,
    )
    model, optimizer, data, scheduler = plugin.prepare(accelerator, tiny_llama().train(), loader(), scheduler=scheduled)
    assert plugin.activations is not None
    losses = loop(accelerator, model, optimizer, data, scheduler)

    by_hand: Any = tiny_llama().train()
    convert(by_hand, "fp8")
    ours = make_optimizer("apollo", by_hand, lr=1e-2, weight_decay=0.1, rank=8, state="8bit", seed=42)
    steps, expected = scheduled(ours), []
    for batch in loader():
        loss = by_hand(**batch).loss
        loss.backward()
        ours.step()
        steps.step()
        ours.zero_grad()
        expected.append(loss.item())
    assert losses == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), by_hand.parameters(), strict=True))


def test_a_state_saved_by_the_accelerator_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def prepared() -> tuple[Any, ...]:
        AcceleratorState._reset_state(reset_partial_state=False)
        accelerator = Accelerator(cpu=True)
        plugin = LowMemPlugin(optim="adamw", lowmem_state="8bit", lowmem_weights="bf16_sr", learning_rate=1e-2)
        model = tiny_llama(dtype=torch.bfloat16).train()
        return accelerator, *plugin.prepare(accelerator, model, loader(), scheduler=scheduled)

    accelerator, model, optimizer, data, scheduler = prepared()
    for index, batch in enumerate(data):
        if index == 3:
            accelerator.save_state(str(tmp_path))
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    accelerator, again, other, data, scheduler = prepared()
    accelerator.load_state(str(tmp_path))
    loop(accelerator, again, other, data, scheduler, first=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert same_bits(optimizer.optimizer.state_dict(), other.optimizer.state_dict())


def test_another_optimizer_with_our_activations() -> None:
    model = tiny_llama().train()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = LowMemPlugin(lowmem_activations="exact").prepare(
        Accelerator(cpu=True), model, optimizer=theirs
    )
    assert prepared is model
    assert optimizer.optimizer is theirs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_that_we_ship_is_sound(path: Path, tmp_path: Path) -> None:
    """accelerate reads the rest without our section, and the plugin reads the section."""
    from accelerate.commands.config.config_args import load_config_from_file

    values, rest = prepare(str(path))
    assert values
    assert section.KEY not in rest
    plugin = LowMemPlugin.from_yaml(path)
    assert {name: getattr(plugin, name) for name in values} == values
    plain = path.read_text().split(f"{section.KEY}:")[0]
    without = tmp_path / "accelerate.yaml"
    without.write_text(plain)
    read: Any = load_config_from_file(str(without))
    assert read.num_processes == rest["num_processes"]


def test_accelerate_s_own_order_of_arguments_has_an_answer() -> None:
    model = tiny_llama()
    given = torch.optim.AdamW(model.parameters())
    for plugin in (LowMemPlugin(optim="adamw"), LowMemPlugin(lowmem_activations="exact")):
        with pytest.raises(TypeError, match=r"AdamW beside the model.*plugin\.prepare\(accelerator, model, loader\)"):
            plugin.prepare(Accelerator(cpu=True), model, given, loader())
        plugin.remove()
