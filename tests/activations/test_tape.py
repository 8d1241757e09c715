"""What a tape concludes from the graph, on layers made to mislead it: gradients must stay equal bit for bit.

Each case is the inside of a layer: w (16, 16) trained, x (2, 6, 16) with gradient. `saved` is how many fp32 values a
token may keep, where the case is about that.
"""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_lowmem.activations.blocks import Block, Cheap, Layer
from hf_lowmem.memory import measure_saved

Inside = Callable[["Toy", Tensor], Tensor]


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Toy(nn.Module):
    def __init__(self, inside: Inside) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.norm, self.inside = nn.Linear(16, 16), nn.Linear(16, 16), Norm(), inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self, x)


def product_changed_in_place(m: Toy, x: Tensor) -> Tensor:
    p = m.a(x) * m.b(x)
    p.add_(1)
    return m.a(p)


def product_scaled_in_place(m: Toy, x: Tensor) -> Tensor:
    p = m.a(x) * m.b(x)
    p.mul_(2)
    return m.a(p)


def product_changed_behind_autograd(m: Toy, x: Tensor) -> Tensor:
    p = m.a(x) * m.b(x)
    p.data.add_(1)
    return m.a(p)


def copy_of_a_transposed_tensor(m: Toy, x: Tensor) -> Tensor:
    y = m.norm(x).view(2, 6, 4, 4).transpose(1, 2).contiguous()
    return m.a(y.view(2, 6, 16))


def cast_into_other_strides(m: Toy, x: Tensor) -> Tensor:
    y = m.norm(x).transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format)
    return F.linear(y.transpose(0, 1), m.a.weight.double()).float()


def cast_of_square_sizes(m: Toy, x: Tensor) -> Tensor:
    y = m.norm(x).view(2, 6, 4, 4).transpose(2, 3).double()
    return F.linear(y.reshape(2, 6, 16), m.a.weight.double()).float()


def product_with_a_broadcast_factor(m: Toy, x: Tensor) -> Tensor:
    return m.a(m.b(x) * torch.sigmoid(m.a(x)[..., :1]))


def square(m: Toy, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * y)


def product_with_a_constant(m: Toy, x: Tensor) -> Tensor:
    return m.a(m.norm(x) * 3.0)


def parts_of_one_projection(m: Toy, x: Tensor) -> Tensor:
    gate, up = m.a(x).chunk(2, -1)
    return m.b(torch.cat([F.silu(gate) * up, torch.sin(up)], -1))


def memory_used_again(m: Toy, x: Tensor) -> Tensor:
    y = m.norm(x)
    shape = y.shape
    del y  # nothing saved it: the next tensor may get its address
    z = torch.sin(x).view(shape)
    return m.a(z) + m.a(m.norm(z))


def expanded_and_copied(m: Toy, x: Tensor) -> Tensor:
    k = m.a(x).view(2, 6, 4, 4).transpose(1, 2)  # (2, 4, 6, 4)
    heads = k[:, :, None].expand(2, 4, 3, 6, 4).reshape(2, 12, 6, 4)
    return (heads.sin() * heads).sum((1, 3))


def norm_of_a_slice(m: Toy, x: Tensor) -> Tensor:
    return m.a(m.norm(x[:, ::2])) + m.b(x[:, 1::2])


CASES = [
    product_changed_in_place,
    product_scaled_in_place,
    copy_of_a_transposed_tensor,
    cast_into_other_strides,
    cast_of_square_sizes,
    product_with_a_broadcast_factor,
    square,
    product_with_a_constant,
    parts_of_one_projection,
    memory_used_again,
    expanded_and_copied,
    norm_of_a_slice,
]


def converted(inside: Inside, kind: str | None) -> Toy:
    layer = Toy(inside).train()
    if kind:
        Block(layer, kind).put()  # below the layer's own patch
    Layer(layer, "toy", "exact", seeds=None).put()
    Cheap(layer.norm).put()
    return layer


def gradients(layer: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = layer(x * 1.0)
    out.square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [None, "attention", "mlp"])
@pytest.mark.parametrize("inside", CASES, ids=lambda f: f.__name__)
def test_gradients_stay_equal(inside: Inside, kind: str | None) -> None:
    plain = gradients(Toy(inside).train())
    for ours, expected in zip(gradients(converted(inside, kind)), plain, strict=True):
        if expected is None:
            assert ours is None
        else:
            assert torch.equal(ours, expected)


def test_what_autograd_cannot_see_is_not_trusted() -> None:
    """A write through `.data` leaves no version behind; HuggingFace's gradient is that of the changed product."""
    plain = gradients(Toy(product_changed_behind_autograd).train())
    ours = gradients(converted(product_changed_behind_autograd, None))
    unequal = [not torch.equal(a, b) for a, b in zip(ours, plain, strict=True) if b is not None]
    assert any(unequal)  # the one way to mislead a tape: documented in hf_lowmem/activations/tape.py


def test_a_graph_that_is_dropped_is_freed() -> None:
    """No cycle through autograd's nodes, which Python's collector cannot see."""
    layer = converted(parts_of_one_projection, "mlp")
    x = torch.randn(2, 6, 16, requires_grad=True) * 1.0  # kept, for the first projection's weight
    kept = weakref.ref(x.untyped_storage())
    out = layer(x)
    del x
    gc.collect()
    assert kept() is not None
    del out
    gc.collect()
    assert kept() is None


def test_the_product_is_not_kept() -> None:
    """y·y needs y; the projection that follows needs y·y, which is computed again: one tensor of 16 values a token."""
    layer = converted(square, None)
    with measure_saved(layer) as saved:
        out = layer(torch.randn(2, 6, 16, requires_grad=True) * 1.0)
        kept = saved.total
    del out
    assert kept == 2 * 6 * 16 * 4 * 2  # x, the first projection's input, and y


def test_a_copied_patch_is_the_copys() -> None:
    layer = converted(square, "mlp")
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        layer.a.weight.zero_()
    assert any(g.abs().max() > 0 for g in gradients(copied))
