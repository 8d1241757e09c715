"""Fixtures of several files: small tiles of TRL's head."""

import pytest
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from tests.training.heads import TILE


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of vocabulary, and of tokens."""
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE)
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 16)
