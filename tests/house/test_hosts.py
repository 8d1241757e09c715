"""What is written down here of a host's private matters, compared with the host that is installed."""

import ast
import inspect
import textwrap

from trl import DPOTrainer
from trl.trainer import utils as trl_utils

from hf_lowmem.planner.parts import HEAD_TILE
from hf_lowmem.training.dpo_config import TRL_LOSSES


def test_the_losses_are_those_that_trl_computes() -> None:
    """DPOTrainer has no table of losses: its code compares a name with each, and fails at the end for any other."""
    code = ast.parse(textwrap.dedent(inspect.getsource(DPOTrainer._compute_loss)))
    compared = [
        right.value
        for node in ast.walk(code)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == "loss_type"
        for right in node.comparators
        if isinstance(right, ast.Constant)
    ]
    assert tuple(compared) == TRL_LOSSES


def test_the_tile_of_the_fused_head() -> None:
    assert HEAD_TILE == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
