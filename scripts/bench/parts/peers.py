"""Optimizers of other packages, which ours stand beside. A package is imported when one of its own is asked for."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch.optim import AdamW, Optimizer


class Peer(NamedTuple):
    """Name of the package on PyPI, and how its class is had.

    `load()` raises ImportError where the package is missing. What it returns takes parameters and settings of torch's
    own optimizers.
    """

    package: str
    load: Callable[[], Callable[..., Optimizer]]


def _bitsandbytes() -> Any:
    from bitsandbytes import optim

    return optim


def _torchao() -> Any:
    from torchao import optim  # pyright: ignore[reportMissingImports]

    return optim


def _lion_pytorch() -> Any:
    import lion_pytorch

    return lion_pytorch


def _flashoptim() -> Any:
    import flashoptim  # pyright: ignore[reportMissingImports]

    return flashoptim


REFERENCE = "torch AdamW fused"
PEERS: dict[str, Peer] = {
    REFERENCE: Peer("torch", lambda: partial(AdamW, fused=True)),
    "torch AdamW foreach": Peer("torch", lambda: partial(AdamW, foreach=True)),
    "bitsandbytes AdamW8bit": Peer("bitsandbytes", lambda: _bitsandbytes().AdamW8bit),
    "bitsandbytes Lion8bit": Peer("bitsandbytes", lambda: _bitsandbytes().Lion8bit),
    "torchao AdamW8bit": Peer("torchao", lambda: _torchao().AdamW8bit),
    "torchao AdamWFp8": Peer("torchao", lambda: _torchao().AdamWFp8),
    "torchao AdamW4bit": Peer("torchao", lambda: _torchao().AdamW4bit),
    "lion-pytorch Lion": Peer("lion-pytorch", lambda: _lion_pytorch().Lion),
    "FlashOptim FlashAdamW": Peer("flashoptim", lambda: _flashoptim().FlashAdamW),
}
