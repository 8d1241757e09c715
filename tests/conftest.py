"""Shared by all tests: no hub, one thread (two workers share two cores), small models and data made on the spot."""

import functools
import gc
import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import nn

torch.set_num_threads(1)
# Kernels' Triton runs in its interpreter where there is no GPU. Triton reads this as it is imported, so before anything
# imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from tests.interpreter import patch_once

    patch_once()


class _Popen(subprocess.Popen):
    def __init__(self, args: Any, *rest: Any, **options: Any) -> None:
        words = [args] if isinstance(args, str | os.PathLike) else list(args)
        ours = not any("compile_worker" in str(word) for word in words)  # torch.compile's own, once in a process
        if ours and Path(words[0]).name.startswith("python"):
            _needs_the_marker()
        super().__init__(args, *rest, **options)


def _needs_the_marker(*args: Any, **kwargs: Any) -> NoReturn:
    pytest.fail("runs a trainer or starts a process: mark it `train`, as -m 'not train and not slow' is to be quick")


_modules_frozen = 0


def _freeze_imports() -> None:
    """Take what many new modules have brought out of the garbage collector's sight.

    Every end of a training calls `gc.collect()`, which walks through all that was ever imported, a third of a second
    each: most of the time of a small training. What a test leaves is collected before, so no leak is hidden by it.
    """
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + 50:
        _modules_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_collection_finish() -> None:
    _freeze_imports()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    _freeze_imports()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What is not marked `train` or `slow` neither trains nor starts another Python."""
    if item.get_closest_marker("train") or item.get_closest_marker("slow"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", _Popen)
        patch.setattr(multiprocessing.process.BaseProcess, "start", _needs_the_marker)
        if found := sys.modules.get("transformers.trainer"):
            train = found.Trainer.train
            # With its signature, which a test compares with our overrides'.
            patch.setattr(found.Trainer, "train", functools.wraps(train)(functools.partial(_needs_the_marker)))
        return (yield)


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A Llama of about 40,000 parameters whose largest weights are big enough to be compressed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | overrides
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    return model.to(dtype)


def word_tokenizer():
    """A word-level tokenizer of 128 entries."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(124))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


class Mixed(nn.Module):
    """Parameters of every kind that a real model may hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.linear = nn.Linear(96, 48)  # its weight is large enough to be compressed
        self.wide = nn.Linear(64, 80, bias=False)
        self.scalar = make()
        self.vector = make(7)
        self.long_vector = make(5000)
        self.experts, self.num_experts = make(3, 40, 48), 3
        self.empty = nn.Parameter(torch.zeros(0, 8))
        self.frozen = nn.Parameter(torch.ones(8, 8), requires_grad=False)
        self.strided = nn.Parameter(torch.randn(72, 90, generator=generator).T)
        self.odd = make(65, 67)

    def loss(self, seed: int = 0) -> torch.Tensor:
        """A quadratic with its minimum elsewhere than at the parameters."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(())
        for p in self.parameters():
            if p.requires_grad:
                target = torch.randn(p.shape, generator=generator)
                total = total + (p.float() - 3 * target).pow(2).sum()
        return total


@pytest.fixture
def mixed() -> Mixed:
    return Mixed()
