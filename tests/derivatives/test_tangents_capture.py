"""Capture: what is seen, what is refused and with which reason, and what a captured program may be used for."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hoanalysis as ho
from hoanalysis.derivatives import nested as nested_engine
from hoanalysis.derivatives.common import Request
from hoanalysis.derivatives.engines import BRANCHES as BRANCHES_KEPT
from hoanalysis.derivatives.engines import Tangents, Task
from hoanalysis.derivatives.tangents import OtherBranch, TangentsUnsupported, capture, capture_key
from hoanalysis.derivatives.tangents.rules import base, scalar
from hoanalysis.derivatives.tangents.rules.linear import _largest_of_four
from hoanalysis.errors import ModelError
from hoanalysis.models import MLP
from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem
from tests.derivatives.cases_tangents import ARCHITECTURES, Case, nested


@pytest.fixture(autouse=True)
def double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Net(nn.Module):
    """One hidden layer with a given function in the middle."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(4, 4), nn.Linear(4, 3), middle

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


def net_case(middle) -> Case:
    return Case(Net(middle), (torch.randn(6, 4), torch.randint(0, 3, (6,))), F.cross_entropy)


class Doubled(torch.autograd.Function):
    """The identity, with a gradient that is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def no_grad_gate(x):
    with torch.no_grad():
        gate = torch.sigmoid(x)
    return torch.tanh(x) * gate


def masked_by_slices(x):
    mask = torch.ones(4, 4)
    mask[0, 1:] = 0
    seen = (x.detach() > 0).to(x.dtype)
    seen[:, 0] = 1
    return torch.tanh(x) @ mask * seen


def columns_swapped(x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1].sin()
    y[1:, 1::2] = x[1:, ::2] ** 2
    y.t()[2] += y[:, 0]
    return y


def row_by_row(x):
    """A recurrence that writes its states into one tensor, and reads them from there."""
    states = x.new_zeros(len(x) + 1, x.shape[1])
    for i in range(len(x)):
        states[i + 1] = torch.tanh(states[i] + x[i])
    return states[1:]


def through_views(x):
    y = x.sin()
    first, rest = y.narrow(1, 0, 1), y[:, 1:]
    top, flat = y[0], y.view(-1)
    first.mul_(2.0)  # seen by all of the others
    flat[3:7] -= 0.5 * x.flatten()[3:7].cos()
    y.diagonal().zero_()
    return y * top + rest.sum() * flat[4]


def copied_first(x):
    """A copy does not see what is written afterwards, and what was computed before keeps its value."""
    y = x * 1.0
    copy, before = y.clone(), y + 1
    y[:, :2] = 0
    y.unsqueeze_(0)
    return copy.sin() * before + y.squeeze(0).masked_fill_(x > 0.5, 1.5)


def placed(x):
    flat, index = x.flatten(), torch.tensor([5, 0, 5, 2])
    y = torch.zeros(24).index_put((index,), flat[:4].sin(), accumulate=True)
    y = y.scatter_add(0, index, flat[4:8] ** 2).index_add(0, index, flat[8:12], alpha=2)
    y = y.scatter(0, torch.tensor([1, 3]), flat[1:3].cos())
    y[y > 0.3] = flat[0]
    y = y.masked_scatter(torch.arange(24) % 5 == 0, flat)
    return y.view_as(x)


def rotated(x):
    """Rotary positions: a product with fixed complex numbers."""
    angle = torch.polar(torch.ones(2), torch.tensor([0.3, 1.0]))
    turned = torch.view_as_complex(x.sin().reshape(-1, 2, 2)) * angle
    return torch.view_as_real(turned).flatten(1) * x


def squared_in_the_plane(x):
    """Products, sums, conjugates and parts of complex numbers that both depend on parameters."""
    z = torch.view_as_complex(x.reshape(len(x), 2, 2).contiguous())
    w = (z * z.conj().roll(1, 0) + 0.5 * z[:, [1, 0]] - z.sum(1, keepdim=True)).unsqueeze(-1)
    first, second = w.unbind(1)
    return torch.cat([first.real * second.imag, (first * second).abs(), torch.view_as_real(w[:, 0]).flatten(1)], 1)


def picked(x):
    values, index = x.topk(2, dim=1)
    middle = torch.cat([x.median(1).values, x.kthvalue(2, 1).values, x.min(0).values[:2]])
    return torch.cat([values.sin(), x.sort(1, descending=True)[0][:, :2] * index], 1) * middle.sum()


SEEN = {
    "writes into columns": columns_swapped,
    "writes in a loop": row_by_row,
    "writes through views": through_views,
    "copies and writes": copied_first,
    "scatter, index_put": placed,
    "topk, sort, median": picked,
    "kthvalue, mode": lambda x: x.sin() * x.kthvalue(2).values[:, None] + x.round().mode().values[:, None] * x,
    "maximum, minimum": lambda x: torch.maximum(x.sin(), x.flip(0)) * torch.minimum(x, x.detach()),
    "clamp between": lambda x: x.sin().clamp(min=x.flip(0) - 0.2, max=x.flip(1) + 0.2) * x,
    "filled with a number": lambda x: x.sin().masked_fill(x > 0.2, x.mean()) * x,
    "pad": lambda x: F.pad(x.sin(), (1, 2), value=1.5)[:, 1:5] * F.pad(x, (0, 1), value=1.0)[:, 4:],
    "prod": lambda x: x * (F.relu(x).prod(1, keepdim=True) + x[:, :3].prod()),
    "cumprod": lambda x: torch.cumprod(F.relu(x) * x.sin(), 1) + F.relu(x[:5]).cumprod(0).sum(0),
    "rotary": rotated,
    "complex": squared_in_the_plane,
    "softmax in another dtype": lambda x: (
        x.softmax(1, dtype=torch.float64) * F.log_softmax(x, 0, dtype=torch.float64).mean(0)
    ),
    "numbers": lambda x: (x * x.mean().exp() + x.sum() * x.square().mean()).sin(),
    "masks written in place": masked_by_slices,
    "one minus": lambda x: (1 - x).sin() * torch.rsub(x, 2 * x.cos(), alpha=0.5),
    "detach": lambda x: torch.tanh(x) * torch.sigmoid(x.detach()),
    "no_grad": no_grad_gate,
    "in place": lambda x: torch.sin(x).mul_(2.0).add_(x),
    "max": lambda x: x - x.max(1, keepdim=True).values,
    "where": lambda x: torch.where(x > 0, x * x, x.sin()),
    "power of two tensors": lambda x: (x.square() + 1) ** torch.tanh(x),
    "einsum": lambda x: torch.einsum("ij,ik->ik", x, torch.tanh(x)),
    "std": lambda x: x / x.std(1, keepdim=True),
    "norm": lambda x: F.normalize(x),
    "logsumexp": lambda x: x - torch.logsumexp(x, 1, keepdim=True),
    "cumsum": lambda x: torch.cumsum(x, 1).softmax(0),
    "stack, split": lambda x: torch.stack(x.split(1, 1), 0).squeeze(-1).T.contiguous() ** 3,
    "index": lambda x: torch.tanh(x)[:, [1, 0, 3, 3]],
    "rms_norm": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3),
    "glu": lambda x: torch.cat([F.glu(x), F.glu(x.sin())], 1),
    "generic": lambda x: torch.special.i0(x) + torch.atan2(x, 2 + x * x),
    "softplus, mish, silu, elu": lambda x: F.softplus(x) * F.mish(x) + F.silu(x) - F.elu(x),
    "hardtanh, clamp, abs": lambda x: F.hardtanh(x) + x.clamp(-0.3, 0.4) * x.abs(),
}


@pytest.mark.parametrize("name", SEEN)
def test_functions_of_all_kinds(name):
    case = net_case(SEEN[name])
    problem, state, u, partition = case.ready()
    c = torch.randn(len(partition))
    first, second, third = nested(problem, state, u, partition, case.batch, c)
    program = capture(problem, state, case.batch)
    result = program.derivatives(state, u, partition, case.batch, Request(3))
    streamed = program.derivatives(state, u, partition, case.batch, Request(2, diagonal=3))
    program.check(problem, state, u, partition, case.batch, result)
    for got, expected in ((result.tensors[1], first), (result.tensors[2], second), (result.tensors[3] @ c, third)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    torch.testing.assert_close(streamed.tensors[2], result.tensors[2], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(streamed.diagonals[3], torch.einsum("iii->i", result.tensors[3]), rtol=1e-9, atol=1e-13)


@pytest.mark.row("M6")
def test_a_custom_backward_is_found_out_by_the_check():
    problem, state, u, partition = (case := net_case(Doubled.apply)).ready()
    with pytest.raises(TangentsUnsupported, match=r"eager gradient|cannot be traced"):  # noqa: PT012 - either will do
        program = capture(problem, state, case.batch)
        program.check(problem, state, u, partition, case.batch)


BRANCHES = {
    "if": lambda x: x.sin() if x.sum() > 0 else -x.exp(),
    "item": lambda x: x.sin() * x.mean().item(),
    "tolist": lambda x: x.sin() * sum((x > 0).sum(1).tolist()),
    "nonzero": lambda x: x.sin().index_add(0, (x[:, 0] > 0).nonzero()[:, 0], x[x[:, 0] > 0] ** 2),
    "equal": lambda x: x.sin() if torch.equal(x.mean() > 0, torch.tensor(True)) else x.exp(),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_on_values_are_captured_one_by_one(name):
    """Each batch and point gets the derivatives of the branch that it takes; a program refuses the others."""
    model = Net(BRANCHES[name])
    batches = [(torch.randn(6, 4) * scale, torch.randint(0, 3, (6,))) for scale in (1.0, -3.0, 0.3, 1.0)]
    problem = Problem(model, batches, loss=F.cross_entropy)
    partition, state = Partition.canonical(model), problem.state()
    u = {n: torch.randn_like(p) for n, p in state.parameters.items()}
    engine = Tangents(Task(problem, state, u, partition, Request(2), 2**30), check_all=True)
    for batch in batches:
        first, second, _ = nested(problem, state, u, partition, batch, torch.ones(len(partition)))
        result = engine.chunk(batch)
        torch.testing.assert_close(result.tensors[1], first, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(result.tensors[2], second, rtol=1e-10, atol=1e-13)
    (programs,) = engine.programs.values()
    assert len(programs) > 1
    program = capture(problem, state, batches[0])
    with pytest.raises(OtherBranch, match="depends on values"):  # noqa: PT012 - one of the two is another branch
        for shift in (3.0, -3.0):
            moved = problem.state({n: p + shift for n, p in state.parameters.items()})
            program.derivatives(moved, u, partition, batches[0], Request(2))


def test_few_branches_are_kept():
    model = Net(lambda x: x.sin() * x.mean().item())
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(BRANCHES_KEPT + 3)]
    problem = Problem(model, batches, loss=F.cross_entropy)
    ds = ho.summarize(problem, 2, engine="tangents", progress=False)
    assert "captured anew" in ds.engine_detail.item()
    (programs,) = problem.cache["programs"].values()
    assert len(programs) == BRANCHES_KEPT
    expected = ho.summarize(problem, 2, engine="nested", progress=False)
    np.testing.assert_allclose(ds.D2, expected.D2, rtol=1e-9, atol=1e-14)


def test_writing_into_a_view_of_unknown_make_is_refused():
    def middle(x):
        y = x.sin()
        y.as_strided((2, 2), (4, 1)).zero_()
        return y

    problem, state, _, _ = (case := net_case(middle)).ready()
    with pytest.raises(TangentsUnsupported, match="as_strided"):
        capture(problem, state, case.batch)


def test_a_program_serves_other_batches_and_points_of_the_same_shapes():
    case = net_case(torch.tanh)
    problem, state, u, partition = case.ready()
    program = capture(problem, state, case.batch)
    batch = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    moved = problem.state({n: p + 0.3 for n, p in state.parameters.items()})
    assert capture_key(problem, moved, batch) == program.key
    result = program.derivatives(moved, u, partition, batch, Request(2))
    first, second, _ = nested(problem, moved, u, partition, batch, torch.ones(len(partition)))
    torch.testing.assert_close(result.tensors[1], first, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(result.tensors[2], second, rtol=1e-10, atol=1e-14)
    with pytest.raises(TangentsUnsupported, match="captured for a tensor"):
        program.derivatives(state, u, partition, (batch[0][:3], batch[1][:3]), Request(2))


def test_unused_parameters_give_exact_zeros_and_frozen_ones_are_constants():
    model = MLP([4, 5, 3], "tanh")
    model.unused = nn.Parameter(torch.randn(3))
    model.layers[0].bias.requires_grad_(False)
    batch = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    problem = Problem(model, [batch], loss=F.cross_entropy)
    state, partition = problem.state(), Partition.canonical(model)
    u = {n: torch.randn_like(p) for n, p in state.parameters.items()}
    result = capture(problem, state, batch).derivatives(state, u, partition, batch, Request(3))
    s = partition.labels.index("unused")
    assert "layers.0.bias" not in partition.labels
    assert all(not t.select(0, s).any() for t in result.tensors.values())
    _, second, _ = nested(problem, state, u, partition, batch, torch.ones(len(partition)))
    torch.testing.assert_close(result.tensors[2], second, rtol=1e-10, atol=1e-14)


def test_what_detach_cuts_off_is_exactly_zero():
    problem, state, u, partition = (case := net_case(lambda x: x.detach())).ready()
    result = capture(problem, state, case.batch).derivatives(state, u, partition, case.batch, Request(2))
    s = partition.labels.index("first.weight")
    assert result.tensors[1][s] == 0
    assert result.tensors[2][s].count_nonzero() == 0


def close_at_all_orders(case: Case, partition: Partition, order: int) -> None:
    """Tensors up to ``order``, and its diagonal alone, against nested reverse mode, to 1e-10 of the largest entry."""
    problem, state, u, _ = case.ready()
    expected = nested_engine.derivatives(problem, state, u, partition, case.batch, Request(order)).tensors
    program = capture(problem, state, case.batch)
    tensors = program.derivatives(state, u, partition, case.batch, Request(order)).tensors
    alone = program.derivatives(state, u, partition, case.batch, Request(1, order)).diagonals[order]
    assert set(tensors) == set(range(1, order + 1))
    diagonal = torch.stack([expected[order][(s,) * order] for s in range(len(partition))])
    for got, wanted in [*((tensors[d], expected[d]) for d in tensors), (alone, diagonal)]:
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10 * float(expected[order].abs().max()))


@pytest.mark.parametrize("name", SEEN)
def test_order_four_of_functions_of_all_kinds(name):
    case = net_case(SEEN[name])
    close_at_all_orders(case, Partition.blocks(case.model, 2), 4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_order_four_of_architectures(name):
    case = ARCHITECTURES[name]()
    close_at_all_orders(case, Partition.blocks(case.model, 2), 4)


@pytest.mark.parametrize("name", ["mlp tanh", "lenet", "gpt tied", "resnet"])
def test_order_five(name):
    case = ARCHITECTURES[name]()
    close_at_all_orders(case, Partition.blocks(case.model, 2), 5)


@pytest.mark.parametrize("kind", ["kind", "split", "mixed"])
def test_order_four_of_groups_that_cut_and_join_tensors(kind):
    """Groups whose first use is not in their own order, that share a tensor, and that join tensors far apart."""
    case = ARCHITECTURES["mlp gelu"]()
    names = [n for n, _ in case.model.named_parameters()]
    canonical = Partition.canonical(case.model)
    partition = {
        "kind": lambda: Partition.by_kind(case.model),
        "split": lambda: Partition.split(case.model, {names[0]: (1, 5)}).merge({"rest": names[2:]}),
        "mixed": lambda: canonical.merge({"ends": [names[0], names[-1]], "middle": names[1:-1]}),
    }[kind]()
    close_at_all_orders(case, partition, 4)


def test_single_precision_agrees_with_double():
    case = net_case(F.gelu)
    problem, state, u, partition = case.ready()
    exact = capture(problem, state, case.batch).derivatives(state, u, partition, case.batch, Request(3))
    state = problem.state(dtype=torch.float32)
    batch = problem.cast(case.batch, torch.float32)
    program = capture(problem, state, batch)
    single = program.derivatives(state, u, partition, batch, Request(3))
    program.check(problem, state, u, partition, batch, single)
    assert single.tensors[3].dtype == torch.float64
    scale = float(exact.tensors[3].abs().max())
    torch.testing.assert_close(single.tensors[3], exact.tensors[3], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("softmax", [torch.softmax, torch.log_softmax])
def test_a_softmax_in_another_dtype(softmax):
    """As models in half precision do it: up, softmax, down again. The cast is a node of its own."""
    case = net_case(lambda x: softmax(x, 1, dtype=torch.float32).to(x.dtype) + x)
    problem, state, u, partition = case.ready()
    program = capture(problem, state, case.batch)
    result = program.derivatives(state, u, partition, case.batch, Request(3))
    first, second, third = nested(problem, state, u, partition, case.batch, c := torch.randn(len(partition)))
    for got, expected in ((result.tensors[1], first), (result.tensors[2], second), (result.tensors[3] @ c, third)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_complex_numbers_out_of_nowhere_are_refused():
    """Cut off, they would be silently wrong."""
    problem, state, _, _ = (case := net_case(lambda x: torch.fft.fft(x).real)).ready()
    with pytest.raises(TangentsUnsupported, match="complex"):
        capture(problem, state, case.batch)


MIXED = {
    "where": lambda low, x: torch.where(x > 0, low, x),
    "cat": lambda low, x: torch.cat([low[:, :2], x[:, :2].sin()], 1),
    "mul": lambda low, x: low * x.sin(),
    "add": lambda low, x: low.tanh() + x,
    "maximum": lambda low, x: torch.maximum(low.sin(), x),
    "index_put": lambda low, x: x.sin().index_put((torch.tensor([1, 4]),), low[:2].to(x.dtype)),
}


@pytest.mark.parametrize("name", MIXED)
def test_operands_of_different_dtypes(name):
    """Single precision in one branch, as in routers and norms of language models; promoted where they meet."""
    case = net_case(lambda x: MIXED[name](x.float().tanh(), x))
    problem, state, u, partition = case.ready()
    program = capture(problem, state, case.batch)
    result = program.derivatives(state, u, partition, case.batch, Request(3))
    streamed = program.derivatives(state, u, partition, case.batch, Request(2, diagonal=3))
    first, second, third = nested(problem, state, u, partition, case.batch, c := torch.randn(len(partition)))
    for got, expected in (
        (result.tensors[1], first), (result.tensors[2], second), (result.tensors[3] @ c, third),
        (streamed.tensors[2], second), (streamed.diagonals[3], torch.einsum("iii->i", result.tensors[3])),
    ):  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(3, 2, 6, 8), (2, 4, 4), (1, 1, 2, 2)])
def test_the_largest_of_four_is_torchs(shape):
    """Values and places, ties included (every second entry is one of three numbers), and infinities."""
    x = torch.where(torch.rand(shape) < 0.5, torch.randint(-1, 2, shape).double(), torch.randn(shape))
    x.view(-1)[0] = -torch.inf
    x.view(-1)[-1] = torch.inf
    value, index = F.max_pool2d(x, 2, return_indices=True)
    torch.testing.assert_close(_largest_of_four(x)[0], value, rtol=0, atol=0)
    assert torch.equal(_largest_of_four(x)[1], index)


@pytest.mark.parametrize(
    "options", [(2,), (2, 2), ([2, 2], [2, 2], 0, 1, False), (2, 1), (3,), (2, 2, 1), (2, 2, 0, 2), (2, 2, 0, 1, True)]
)
def test_poolings_of_all_kinds(options):
    case = net_case(lambda x: F.max_pool2d(x.sin().flatten().view(1, 4, 6), *options).sin().sum() * x)
    problem, state, u, partition = case.ready()
    result = capture(problem, state, case.batch).derivatives(state, u, partition, case.batch, Request(3))
    first, second, third = nested(problem, state, u, partition, case.batch, c := torch.randn(len(partition)))
    for got, expected in ((result.tensors[1], first), (result.tensors[2], second), (result.tensors[3] @ c, third)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


# ---- teaching it an op ----------------------------------------------------------------------------------------------


@functools.cache  # an op is registered once in a process
def cube_of_another_library():
    """x^3 with a kernel of NumPy's and a first derivative alone."""

    @torch.library.custom_op("hoanalysis_tests::cube", mutates_args=())
    def cube(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.detach().numpy() ** 3)

    def backward(ctx, g):
        return g * torch.from_numpy(3 * ctx.saved_tensors[0].detach().numpy() ** 2)

    cube.register_fake(torch.empty_like)
    cube.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]))
    return torch.ops.hoanalysis_tests.cube.default


@pytest.mark.parametrize("taught", [False, True])
def test_an_op_is_taught_by_one_registered_class(taught, monkeypatch):
    """Its rule gives what torch does not know; without one the missing derivatives are noticed."""
    cube = cube_of_another_library()
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))
    if taught:

        @base.rule(cube)
        class Cube(scalar.Scalar):
            """x^3, with derivatives 3 x^2, 6 x and 6."""

            def __init__(self, op, args, kwargs, keys, order):
                x = args[0]
                self.value, self.d = op(x), [3 * x**2, 6 * x, torch.full_like(x, 6)]

    model, written = Net(cube), Net(lambda x: x * x * x)
    written.load_state_dict(model.state_dict())
    batch = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    ours, theirs = (Problem(m, [batch], F.cross_entropy) for m in (model, written))
    u = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def summary(problem, engine):
        return ho.summarize(problem, 3, direction=u, engine=engine, self_check=False, progress=False)

    if not taught:
        with pytest.raises(ModelError, match="cube"):
            summary(ours, "tangents")
        return
    found, expected = summary(ours, "tangents"), summary(theirs, "nested")
    assert "hoanalysis_tests.cube.default" in capture(ours, ours.state(), batch).description()["scalar"]
    for d in ("D1", "D2", "D3"):
        np.testing.assert_allclose(found[d], expected[d], rtol=1e-10, atol=1e-12 * float(abs(expected[d]).max()))
