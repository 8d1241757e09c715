"""torch's own optimizer checks, for every optimizer of the house.

The tests have the names of those in torch's `test/test_optim.py`; what they do is written from the name, for optimizers
that have no `foreach`, no `fused` and no `capturable`. They run over torch's own `OptimizerInfo`, see torch_infos.py.
"""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo, OptimizerInput

from tests.contracts.test_optimizers import same_bits
from tests.contracts.torch_infos import Problem, all_at_once, every_class, every_input, make, train, trained


@every_class
def test_errors(info: OptimizerInfo) -> None:
    assert info.optim_error_inputs_func is not None
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        case = error.optimizer_error_input
        assert error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = [nn.Parameter(torch.randn(1, 1))] if case.params is None else case.params
        context = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with context(error.error_type, match=error.error_regex):
            info.optim_cls(params, **case.kwargs)  # type: ignore[operator]


@every_class
def test_optim_infos_do_not_specify_global_cliquey_kwargs(info: OptimizerInfo) -> None:
    """Nor does any class take them: one that it does not know is named, never ignored."""
    for flag in ("foreach", "fused", *info.not_og_supported_flags):
        with pytest.raises(ValueError, match=f"{flag}=True"):
            info.optim_cls(Problem().params, **{flag: True})  # type: ignore[operator]


@pytest.mark.train
@every_input
def test_forloop_goes_right_direction(info: OptimizerInfo, case: OptimizerInput) -> None:
    for makers, contiguous in [([], False), *((makers, True) for makers in info.scheduler_inputs)]:
        problem = Problem(contiguous)
        optimizer = make(info, problem.params, case)
        running = [m(optimizer) for m in makers]
        first = problem.loss()
        for _ in range(20):
            loss = optimizer.step(problem.loss)
            for schedule in running:
                schedule.step(*([loss] if isinstance(schedule, schedules.ReduceLROnPlateau) else []))
        assert problem.loss() < first


@every_class
def test_param_group_with_lrscheduler_goes_right_direction(info: OptimizerInfo) -> None:
    for makers in info.scheduler_inputs[1:3]:
        problem = Problem()
        groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
        optimizer = make(info, groups)
        running = [m(optimizer) for m in makers]
        first = problem.loss()
        for _ in range(20):
            optimizer.step(problem.loss)
            for schedule in running:
                schedule.step()
        one, other = (g["lr"] for g in optimizer.param_groups)
        assert problem.loss() < first
        assert other == pytest.approx(10 * one)


@every_class
@pytest.mark.parametrize("num_dim", [0, 1, 2])
def test_tensor_lr(info: OptimizerInfo, num_dim: int) -> None:
    """The same bits as with a number, and a schedule may write into the tensor."""
    results = []
    for lr in (2**-7, torch.tensor(2**-7).reshape([1] * num_dim)):
        problem = Problem()
        optimizer = make(info, problem.params, lr=lr)
        schedule = schedules.StepLR(optimizer, step_size=2, gamma=0.5)
        for _ in range(5):
            optimizer.step(problem.loss)
            schedule.step()
        results.append(problem.values())
        assert float(optimizer.param_groups[0]["lr"]) == 2**-9
    assert same_bits(*results)


@every_class
def test_param_groups_lr(info: OptimizerInfo) -> None:
    problem = Problem()
    optimizer = make(info, [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}], lr=0.0)
    train(optimizer, problem)
    assert torch.equal(problem.weight, problem.start[0])
    assert not torch.equal(problem.bias, problem.start[1])


@every_class
def test_param_groups_weight_decay(info: OptimizerInfo) -> None:
    problem = Problem()
    optimizer = make(info, [{"params": [problem.weight], "weight_decay": 0.1}, {"params": [problem.bias]}], lr=0.1)
    for _ in range(3):
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert (problem.weight.abs() < problem.start[0].abs()).all()
    assert torch.equal(problem.bias, problem.start[1])


@all_at_once
def test_step_is_noop_when_params_have_no_grad(info: OptimizerInfo, case: OptimizerInput) -> None:
    problem = Problem()
    optimizer = make(info, problem.params, case)
    assert optimizer.step() is None
    assert same_bits(problem.values(), problem.start)
    assert not optimizer.state


@all_at_once
def test_step_is_noop_for_zero_grads(info: OptimizerInfo, case: OptimizerInput) -> None:
    problem = Problem()
    optimizer = make(info, problem.params, case, weight_decay=0.0)
    for _ in range(8):
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert same_bits(problem.values(), problem.start)


@all_at_once
def test_optimizer_can_be_printed(info: OptimizerInfo, case: OptimizerInput) -> None:
    problem = Problem()
    optimizer = make(info, [{"params": [p]} for p in problem.params], case)
    train(optimizer, problem, 1)
    text = repr(optimizer)
    assert text.startswith(f"{info.name} (\nParameter Group 0")
    assert all(f"{k}: {v}" in text for k, v in optimizer.defaults.items())


@all_at_once
def test_state_dict_deterministic(info: OptimizerInfo, case: OptimizerInput) -> None:
    """Two optimizers on the same weights keep the same state; loaded into a third, they all go on alike."""
    problems = [Problem() for _ in range(3)]
    optimizers = [make(info, p.params, case) for p in problems]
    for optimizer, problem in zip(optimizers[:2], problems[:2], strict=True):
        train(optimizer, problem)
    assert same_bits(optimizers[0].state_dict(), optimizers[1].state_dict())
    for p, q in zip(problems[2].params, problems[0].params, strict=True):
        p.data.copy_(q.data)
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for optimizer, problem in zip(optimizers, problems, strict=True):
        train(optimizer, problem)
    for optimizer, problem in zip(optimizers[1:], problems[1:], strict=True):
        assert same_bits(problem.values(), problems[0].values())
        assert same_bits(optimizer.state_dict(), optimizers[0].state_dict())


@every_class
def test_can_load_older_state_dict(info: OptimizerInfo) -> None:
    """A checkpoint from before an option was there goes on with this optimizer's value of it."""
    problem, optimizer = trained(info)
    saved = copy.deepcopy(optimizer.state_dict())
    newer = optimizer.param_groups[0].keys() - {"lr", "params", *optimizer.STRUCTURAL}
    assert newer
    for option in newer:
        del saved["param_groups"][0][option]
    again = make(info, problem.params)
    again.load_state_dict(saved)
    assert {k: again.param_groups[0][k] for k in newer} == {k: optimizer.param_groups[0][k] for k in newer}
    train(again, problem)
    assert again.state[problem.weight]["step"] == 10


@every_class
def test_can_load_from_to_named_state_dict(info: OptimizerInfo) -> None:
    for named_from, named_to in itertools.product((True, False), repeat=2):
        problem = Problem()
        names = list(zip(("weight", "bias"), problem.params, strict=True))
        optimizer = make(info, names if named_from else problem.params)
        train(optimizer, problem)
        again = make(info, names if named_to else problem.params)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert same_bits(again.state_dict()["state"], optimizer.state_dict()["state"])


@all_at_once
def test_save_load_equality_with_weights_only(info: OptimizerInfo, case: OptimizerInput) -> None:
    (_, optimizer), buffer = trained(info, case), io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert same_bits(torch.load(buffer, weights_only=True), optimizer.state_dict())


@every_class
def test_load_nontensor_step(info: OptimizerInfo) -> None:
    """Ours is a whole number in a tensor on the CPU, was a plain one once; torch's fp32 marks another optimizer."""
    problem, optimizer = trained(info)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        assert (type(state["step"]), state["step"].dtype, state["step"].shape) == (Tensor, torch.int64, ())
        state["step"] = int(state["step"])
    optimizer.load_state_dict(saved)
    train(optimizer, problem, 1)
    assert [(type(s["step"]), s["step"].dtype, int(s["step"])) for s in optimizer.state.values()] == [
        (Tensor, torch.int64, 6)
    ] * 2
    saved["state"][0]["step"] = torch.tensor(5.0)
    with pytest.raises(ValueError, match="expected an integer"):
        optimizer.load_state_dict(saved)


@every_class
def test_step_all_hooks(info: OptimizerInfo) -> None:
    """Pre and post hooks, of all optimizers and of this one, in torch's order; one may replace the arguments."""
    problem, calls = Problem(), []
    optimizer = make(info, problem.params)
    handles = [
        register_optimizer_step_post_hook(lambda *_: calls.append("all post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("all pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
    ]
    try:
        optimizer.step(lambda: calls.append("step") or problem.loss())
        assert calls == ["all pre", "pre", "step", "post", "all post"]
    finally:
        for handle in handles:
            handle.remove()
    train(optimizer, problem, 1)
    assert len(calls) == 5
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


@every_class
def test_state_dict_pre_post_hook(info: OptimizerInfo) -> None:
    _, optimizer = trained(info)
    optimizer.register_state_dict_pre_hook(lambda o: o.param_groups[0].update(lr=0.5))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": 1})
    saved = optimizer.state_dict()
    assert (saved["note"], saved["param_groups"][0]["lr"]) == (1, 0.5)


@every_class
def test_load_state_dict_pre_post_hook_and_prepend(info: OptimizerInfo) -> None:
    (problem, optimizer), calls = trained(info), []
    saved, again = optimizer.state_dict(), make(info, problem.params)

    def pre(o: Any, given: dict[str, Any]) -> dict[str, Any]:
        calls.append("pre")
        return {**given, "param_groups": [{**g, "lr": 0.25} for g in given["param_groups"]]}

    again.register_load_state_dict_pre_hook(pre)
    again.register_load_state_dict_pre_hook(lambda o, given: calls.append("first pre"), prepend=True)
    again.register_load_state_dict_post_hook(lambda o: calls.append(("post", o.state[problem.weight]["step"])))
    again.register_load_state_dict_post_hook(lambda o: calls.append("first post"), prepend=True)
    again.load_state_dict(saved)
    assert calls == ["first pre", "pre", "first post", ("post", 5)], "a post hook finds the state loaded"
    assert again.param_groups[0]["lr"] == 0.25
    assert saved["param_groups"][0]["lr"] != 0.25


@all_at_once
def test_deepcopy_copies_all_public_attrs(info: OptimizerInfo, case: OptimizerInput) -> None:
    problem, optimizer = trained(info, case)

    def public(o: Any) -> dict[str, Any]:
        return {k: v for k, v in vars(o).items() if not k.startswith("_")}

    copied = copy.deepcopy(optimizer)
    assert public(copied).keys() == public(optimizer).keys() >= {"state", "param_groups", "defaults"}
    assert same_bits(copied.state_dict(), optimizer.state_dict())
    assert same_bits({k: copied.defaults[k] for k in optimizer.defaults}, optimizer.defaults)
    assert not {p.data_ptr() for g in copied.param_groups for p in g["params"]} & {p.data_ptr() for p in problem.params}


@every_class
def test_non_empty_state(info: OptimizerInfo) -> None:
    problem, optimizer = trained(info, steps=1)
    for p in problem.params:
        assert any(isinstance(v, Tensor) and v.numel() for v in optimizer.state[p].values())


@every_class
def test_complex(info: OptimizerInfo) -> None:
    """Refused, with the way out."""
    for params in ([nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))], [{"params": [torch.zeros(2) * 1j]}]):
        with pytest.raises(TypeError, match=r"complex64.*view_as_real"):
            make(info, params)
    with pytest.raises(TypeError, match=r"complex64.*view_as_real"):
        make(info, Problem().params).add_param_group({"params": [torch.zeros(2) * 1j]})


@every_class
def test_param_group_without_params(info: OptimizerInfo) -> None:
    for params, error in (([{"lr": 0.1}], KeyError), ([], ValueError)):
        with pytest.raises(error):
            make(info, params)


@every_class
@pytest.mark.parametrize("dtypes", itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2), ids=str)
def test_mixed_device_dtype(info: OptimizerInfo, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Each parameter keeps its dtype, and is updated as if it were alone."""
    together, apart = Problem(dtypes=dtypes), Problem(dtypes=dtypes)
    both = make(info, list(zip("ab", together.params, strict=True)))  # a stream of random numbers begins at the name
    single = [make(info, [named]) for named in zip("ab", apart.params, strict=True)]
    for _ in range(4):
        both.step(together.loss)
        apart.loss()
        for optimizer in single:
            optimizer.step()
    assert same_bits(together.values(), apart.values())
    assert [p.dtype for p in together.params] == list(dtypes)
    assert not any(same_bits(p, q) for p, q in zip(together.values(), together.start, strict=True))


@every_class
def test_rosenbrock(info: OptimizerInfo) -> None:
    p = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = make(info, [p], lr=5e-3)

    def loss() -> Tensor:
        x, y = p.unbind()
        value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        p.grad = None
        value.backward()
        return value.detach()

    first = loss().item()
    for _ in range(200):
        optimizer.step(loss)
    assert loss().item() < 0.01 * first
