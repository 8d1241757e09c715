"""Allocations inside flash attention's backward pass, where a dispatcher does not look.

Beside the gradients that it returns there are, in torch's version of the kernel (FlashAttention 2): an fp32 sum of dq,
padded to whole blocks of queries and of the head's dimension; the row sums of out * grad; and, where heads share keys,
dk and dv *for every head*, which are added up at the end. Of a long sequence the last are the largest tensors of a
step: twice tokens x hidden.
"""

import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor

__all__ = ["BACKWARD", "OF_DOCUMENTS", "backward_in_steps", "backward_of_documents"]

BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
OF_DOCUMENTS = torch.ops.torch_attn._varlen_attn_backward.default  # of several lengths, as documents of a row are
ROWS = 128  # of a block of queries


def backward_in_steps(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, ...]:
    """The operator on (rows, heads, tokens, dimension), with its temporaries as tensors of their own."""
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    rows, heads, queries, dim = query.shape
    padded, wide = -(-queries // ROWS) * ROWS, -(-dim // 32) * 32
    inside = [
        query.new_empty((rows, heads, padded, wide), dtype=torch.float32),
        query.new_empty((rows, heads, padded), dtype=torch.float32),
    ]
    if key.shape[1] != heads:
        inside += [t.new_empty((rows, heads, t.shape[2], dim)) for t in (key, value)]
    del inside
    return grads


def backward_of_documents(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    of_queries: Tensor,
    *args: object,
    **kwargs: object,
) -> tuple[Tensor, ...]:
    """The operator on (tokens, heads, dimension), with its temporaries as tensors of their own: of each document there
    may be a block more."""
    grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    queries, heads, dim = query.shape
    padded, wide = queries + ROWS * (of_queries.numel() - 1), -(-dim // 32) * 32
    inside = [
        query.new_empty((padded, heads, wide), dtype=torch.float32),
        query.new_empty((padded, heads), dtype=torch.float32),
    ]
    if key.shape[1] != heads:
        inside += [t.new_empty((t.shape[0], heads, dim)) for t in (key, value)]
    del inside
    return grads
