"""Files as the libraries write them pass the scan that executes nothing."""

import contextlib
import io
import pickle
import random
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hf_lowmem.checkpoints import known
from hf_lowmem.checkpoints.archives import Window
from hf_lowmem.checkpoints.files import BadCheckpoint, check_archive, check_pickles
from hf_lowmem.checkpoints.opcodes import Known, Refused, read
from hf_lowmem.codecs import CODECS
from hf_lowmem.optim import OPTIMIZERS, make_optimizer


def check(value: Any, kind: Known) -> None:
    file = io.BytesIO()
    torch.save(value, file)
    check_archive(Window(file, 0, file.tell()), kind)


def state_of(name: str, codec: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False), torch.nn.LayerNorm(96)).to(torch.bfloat16)
    rank: dict[str, Any] = {"rank": 8} if OPTIMIZERS[name].DEFAULTS.get("rank") else {}
    optimizer = make_optimizer(name, model, lr=1e-3, state=codec, **rank)
    model(torch.randn(2, 64, dtype=torch.bfloat16)).float().square().sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_our_optimizers(name: str) -> None:
    """As optimizer.pt, and where a reader has no list of its own: in shards, and in DeepSpeed's files."""
    for codec in CODECS if name == "adamw" else ("fp32",):
        for kind in (known.guarded(), known.TENSORS, known.DEEPSPEED):
            check(state_of(name, codec), kind)


def test_states_of_torchs_optimizers_and_schedules() -> None:
    model = torch.nn.Linear(3, 2)
    for cls in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.LBFGS):
        optimizer = cls(model.parameters())
        check(optimizer.state_dict(), known.guarded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedules = torch.optim.lr_scheduler
    for schedule in (
        schedules.LambdaLR(optimizer, lambda step: 1.0), schedules.MultiStepLR(optimizer, [1, 3, 3]),
        schedules.ReduceLROnPlateau(optimizer), schedules.CosineAnnealingLR(optimizer, 10),
    ):  # fmt: skip
        check(schedule.state_dict(), known.guarded())
    check(torch.amp.GradScaler("cpu").state_dict(), known.guarded())


@pytest.mark.parametrize("dtype", sorted(known.DTYPES), ids=str)
def test_tensors_of_each_dtype(dtype: Any) -> None:
    kind = getattr(torch, dtype.name, None)
    if kind is None:
        pytest.skip(f"torch {torch.__version__} has no {dtype.name}")
    value = torch.empty(4, dtype=kind)
    for list_of in (known.TENSORS, known.guarded(), known.RANDOM, known.DEEPSPEED):
        check({"a": value, "view": value[1:], "parameter": torch.nn.Parameter(value, requires_grad=False)}, list_of)


def test_plain_values_and_models() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    plain = {"n": [None, True, 1, -(2**80), 1.5, "é", b"\xff\x00", (1, (2,)), {1, 2}], "size": torch.Size([1, 2])}
    for kind in (known.TENSORS, known.guarded()):
        check([plain, plain, model.state_dict(), torch.device("cpu"), torch.float32, {("a", 1): 2}], kind)
    check({"b": bytearray(b"xyz"), "c": 1j, "sparse": torch.eye(3).to_sparse()}, known.guarded())


@pytest.mark.parametrize("kind", ["MT19937", "legacy"])
def test_random_states(kind: str) -> None:
    state = np.random.get_state(legacy=kind == "legacy")  # noqa: NPY002 - transformers saves this one
    check(
        {"python": random.getstate(), "numpy": state, "cpu": torch.get_rng_state(), "cuda": [torch.zeros(16)]},
        known.RANDOM,
    )
    with pytest.raises(Refused, match="it names numpy"):
        check({"numpy": state}, known.guarded())


def test_what_is_registered_with_torch_is_known_where_torch_checks_it() -> None:
    class Registered:
        pass

    sys.modules[__name__].Registered = Registered  # type: ignore[attr-defined]
    Registered.__qualname__ = "Registered"
    value = Registered()
    with pytest.raises(Refused, match=r"it names .*Registered"):
        check(value, known.guarded())
    with torch.serialization.safe_globals([Registered]):
        check(value, known.guarded())
        with pytest.raises(Refused, match=r"it names .*Registered"):
            check(value, known.TENSORS)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_values_of_each_protocol(protocol: int) -> None:
    value = {"a": [1, 2.5, "x", None, True, (), (1,), (1, 2, 3, 4)], 3: {"b": [[]]}, "long": 2**70, "same": "a"}
    value["again"] = value["a"]
    read(pickle.dumps(value, protocol), known.TENSORS)


def test_shards_of_dcp(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {
        "model": torch.nn.Linear(3, 2).state_dict(),
        "optimizer": state_of("adamw", "int8"),
        "step": 3,
        "none": None,
    }
    dcp.save(state, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    check_pickles(tmp_path)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """DeepSpeed's classes as far as its files name them, since the package may not be installed."""
    made = ModuleType("deepspeed")
    classes = {
        "runtime.fp16.loss_scaler.LossScaler": type("LossScaler", (), {}),
        "runtime.fp16.loss_scaler.DynamicLossScaler": type("DynamicLossScaler", (), {}),
        "runtime.zero.config.ZeroStageEnum": Enum("ZeroStageEnum", ["disabled", "gradients"], start=1),
        "utils.tensor_fragment.fragment_address": type("fragment_address", (), {}),
    }
    monkeypatch.setitem(sys.modules, "deepspeed", made)
    for path, cls in classes.items():
        module, _, name = path.rpartition(".")
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(
                sys.modules, whole := f"deepspeed.{'.'.join(parts[:end])}", sys.modules.get(whole, ModuleType(whole))
            )
        cls.__module__, cls.__qualname__ = f"deepspeed.{module}", name
        setattr(sys.modules[cls.__module__], name, cls)
        setattr(made, name, cls)
    return made


def test_deepspeeds_files(deepspeed: Any, tmp_path: Path) -> None:
    scaler, dynamic, fragment = deepspeed.LossScaler(), deepspeed.DynamicLossScaler(), deepspeed.fragment_address()
    scaler.__dict__ |= {"cur_scale": 1, "dynamic": False, "dtype": torch.bfloat16}
    dynamic.__dict__ |= {"cur_scale": 2.0**16, "cur_iter": 3, "raise_error_at_min_scale": True, "dtype": None}
    fragment.__dict__ |= {"numel": 8, "start": 0}
    state = {
        "loss_scaler": scaler, "dynamic": dynamic, "zero_stage": deepspeed.ZeroStageEnum.gradients,
        "param_slice_mappings": [{"w": fragment}], "base_optimizer_state": state_of("lion", "int8"),
        "sparse_tensor_module_names": set(), "ds_config": {"train_batch_size": "auto", "betas": [0.9, 0.95]},
    }  # fmt: skip
    folder = tmp_path / "global_step4"
    folder.mkdir()
    torch.save({"optimizer_state_dict": state}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step4")
    check_pickles(tmp_path)
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").rename(tmp_path / "optimizer.pt")
    with pytest.raises(BadCheckpoint, match=r"optimizer\.pt holds more.*it names deepspeed"):
        check_pickles(tmp_path)


class _Strict(pickle.Unpickler):
    """Python's own reader, which notes whom it was asked for and calls nobody."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.asked: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.asked.add((module, name))
        return lambda *args: None


@pytest.mark.parametrize("seed", range(3))
def test_pythons_reader_finds_no_other_names_in_damaged_files_that_pass(seed: int, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"w": torch.ones(3), "lr": [0.1, (1, 2)], "n": None}, checkpoint_id=tmp_path, no_dist=True)
    whole = (tmp_path / ".metadata").read_bytes()
    draw = random.Random(seed)
    names = {tuple(name) for name in known.SHARDS.names()}
    passed = 0
    for _ in range(700):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 4))):
            place = draw.randrange(len(data))
            if draw.random() < 0.5:
                data[place] = draw.choice(
                    b"()]}.02Rbcehijloqrstu\x81\x85\x86\x87\x8c\x93\x94\x95" + bytes([draw.randrange(256)])
                )
            else:
                end = min(len(data), place + draw.randrange(1, 30))
                data[place:end] = whole[(start := draw.randrange(len(whole))) : start + draw.randrange(30)]
        try:
            read(bytes(data), known.SHARDS)
        except Refused:
            continue
        passed += 1
        reader = _Strict(bytes(data))
        with contextlib.suppress(Exception):  # of states that the stand-ins do not take
            reader.load()
        assert reader.asked <= names
    assert passed > 20, "nothing was tried"
