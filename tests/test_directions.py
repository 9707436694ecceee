"""Directions against full-batch autograd, against files written on the spot, and against torch's own optimizers."""

import copy
import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from hoanalysis.checkpoints import Run, load_checkpoint, open_run
from hoanalysis.directions import NAMES, digest, gradient, group_norms, resolve
from hoanalysis.errors import CheckpointError, DirectionError, HoError, LossError
from hoanalysis.partitions import Partition
from hoanalysis.problem import Problem
from hoanalysis.shards import Shard


def tensors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


X, Y = tensors(17, 4), classes(17)


def problem_of(model: nn.Module | None = None, sizes=(5, 9, 3), loss=F.cross_entropy, **options) -> Problem:
    data = list(zip(X.split(list(sizes)), Y.split(list(sizes)), strict=True))
    return Problem(network() if model is None else model, data, loss, **options)


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


def check(got: dict, expected: dict, rtol: float = 1e-12) -> None:
    assert list(got) == list(expected)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-14)


# ---- gradient ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=6),
    st.sampled_from(
        [
            F.cross_entropy,
            functools.partial(F.cross_entropy, ignore_index=2),
            functools.partial(F.cross_entropy, weight=torch.tensor([0.1, 2.0, 1.0], dtype=torch.float64)),
        ]
    ),
)
def test_the_gradient_over_batches_of_any_sizes_is_that_of_all_samples_at_once(sizes, loss):
    n = sum(sizes)
    x, y = tensors(n, 4, seed=3), classes(n, 4)
    y[torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])] = 1
    model = network()
    problem = Problem(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), loss)
    u = resolve("gradient", problem, problem.state())
    expected = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    check(u.tensors, dict(zip(named(model), expected, strict=True)))
    assert u.provenance == {"over": "whole data, first pass"}


def test_the_gradient_of_a_sum():
    total = functools.partial(F.cross_entropy, reduction="sum")
    problem = problem_of(loss=total, reduction="sum")
    expected = torch.autograd.grad(total(problem.model(X), Y), list(problem.model.parameters()))
    check(gradient(problem, problem.state()), dict(zip(named(problem.model), expected, strict=True)))


def test_the_gradient_over_the_first_batches():
    problem = problem_of()
    expected = torch.autograd.grad(F.cross_entropy(problem.model(X[:14]), Y[:14]), list(problem.model.parameters()))
    check(gradient(problem, problem.state(), [Shard(0, 2)]), dict(zip(named(problem.model), expected, strict=True)))


def test_the_gradient_at_a_checkpoint_s_weights_leaves_no_grad_behind():
    problem, other = problem_of(), network(1)
    expected = torch.autograd.grad(F.cross_entropy(other(X), Y), list(other.parameters()))
    u = resolve("gradient", problem, problem.state(other.state_dict()))
    check(u.tensors, dict(zip(named(other), expected, strict=True)))
    assert all(p.grad is None for p in problem.model.parameters())


def test_the_gradient_has_the_dtype_of_the_parameters_and_float64_sums():
    model = network().float()
    data = [(X[i : i + 1].float(), Y[i : i + 1]) for i in range(17)] * 20
    u = gradient(Problem(model, data, F.cross_entropy), Problem(model, data, F.cross_entropy).state())
    double = copy.deepcopy(model).double()
    expected = torch.autograd.grad(F.cross_entropy(double(X.float().double()), Y), list(double.parameters()))
    assert {t.dtype for t in u.values()} == {torch.float32}
    for t, e in zip(u.values(), expected, strict=True):
        torch.testing.assert_close(t.double(), e, rtol=3e-6, atol=1e-7)


def test_parameters_that_the_loss_does_not_use_get_zeros():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)}).double()
    problem = Problem(
        model, [(X, Y)], batch_loss=lambda m, b: F.cross_entropy(m["used"](b[0]), b[1]), batch_size=lambda b: len(b[1])
    )
    u = resolve("gradient", problem, problem.state()).tensors
    torch.testing.assert_close(u["idle.weight"], torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=0)
    assert bool(u["used.weight"].any())


@pytest.mark.parametrize("how", ["detached", "another copy"])
@pytest.mark.row("M7", "M8")
def test_a_loss_that_depends_on_nothing_is_an_error_and_never_zeros(how):
    other = network().requires_grad_(False)

    def batch_loss(model, batch):
        out = model(batch[0]).detach() if how == "detached" else other(batch[0])
        return F.cross_entropy(out, batch[1])

    problem = Problem(network(), [(X, Y)], batch_loss=batch_loss, batch_size=lambda b: len(b[1]))
    with pytest.raises(LossError, match="does not depend on any selected parameter"):
        resolve("gradient", problem, problem.state())


# ---- weights, random --------------------------------------------------------------------------------------------


def test_weights_point_to_zero():
    problem = problem_of()
    check(resolve("weights", problem, problem.state()).tensors, {n: -p for n, p in named(problem.model).items()}, 0)


@pytest.mark.row("D4")
def test_random_is_reproducible_and_standard_normal():
    problem = problem_of(nn.Linear(4, 3000).double(), loss=lambda x, y: x.mean())
    state = problem.state()
    before = torch.get_rng_state()
    u, again, other = (resolve("random", problem, state, seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    check(again.tensors, u.tensors, 0)
    assert u.provenance == {"seed": 7}
    assert digest(u.tensors) == digest(again.tensors) != digest(other.tensors)
    flat = torch.cat([t.ravel() for t in u.tensors.values()])
    np.testing.assert_allclose([flat.mean(), flat.std()], [0, 1], atol=5 / len(flat) ** 0.5)
    assert flat.unique().numel() == len(flat)


def test_random_is_the_same_in_both_precisions():
    u = {d: resolve("random", problem_of(), problem_of().state(dtype=d), seed=1).tensors for d in (None, torch.float32)}
    for n, t in u[None].items():
        torch.testing.assert_close(u[torch.float32][n], t.float(), rtol=0, atol=0)


# ---- to another checkpoint --------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path) -> Run:
    for step in (0, 10, 20):
        save_file(network(step).state_dict(), tmp_path / f"step_{step:03}.safetensors")
    return open_run(tmp_path)


def apart(a: int, b: int) -> dict[str, torch.Tensor]:
    """theta_b - theta_a of the networks of these seeds."""
    here, there = named(network(a)), named(network(b))
    return {n: there[n] - here[n] for n in here}


@pytest.mark.parametrize(
    ("recipe", "position", "steps"), [("to:init", 1, (10, 0)), ("to:next", 1, (10, 20)), ("to:next", 0, (0, 10))]
)
def test_towards_another_checkpoint_of_the_run(run, recipe, position, steps):
    problem, checkpoint = problem_of(), run[position]
    u = resolve(recipe, problem, problem.state(checkpoint.state_dict), checkpoint=checkpoint, run=run)
    check(u.tensors, apart(*steps))
    assert u.provenance["to_sha256"] == run[[0, 10, 20].index(steps[1])].sha256


def test_towards_a_file(run):
    problem = problem_of()
    u = resolve(f"to:{run.paths[2]}", problem, problem.state())
    check(u.tensors, apart(0, 20))
    assert u.provenance == {"to_sha256": run[2].sha256, "digest": digest(u.tensors)}


def test_eta_of_one_arrives(run):
    problem = problem_of()
    state = problem.state()
    u = resolve(f"to:{run.paths[2]}", problem, state).tensors
    moved = {n: p + u[n] for n, p in state.parameters.items()}
    value = problem.batch_value(moved, problem.state(run[2].state_dict), problem.first_batch())
    torch.testing.assert_close(value, F.cross_entropy(network(20)(X[:5]), Y[:5]).detach(), rtol=1e-12, atol=0)


def test_the_last_has_no_next_and_the_first_is_the_init(run):
    problem = problem_of()
    with pytest.raises(DirectionError, match=r"(?s)no next one.*step_020"):
        resolve("to:next", problem, problem.state(), checkpoint=run[2], run=run)
    with pytest.raises(DirectionError, match=r"'to:init' is zero everywhere"):
        resolve("to:init", problem, problem.state(run[0].state_dict), checkpoint=run[0], run=run)


def test_without_a_run_there_is_no_init_or_next(run):
    problem = problem_of()
    for recipe, checkpoint, given_run in (("to:init", None, None), ("to:next", run[0], None), ("to:next", None, run)):
        with pytest.raises(DirectionError, match=rf"'{recipe}' needs a run"):
            resolve(recipe, problem, problem.state(), checkpoint=checkpoint, run=given_run)


def test_a_checkpoint_of_another_run_has_no_next(run, tmp_path):
    save_file(network(3).state_dict(), tmp_path / "other.safetensors")
    stranger = load_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(DirectionError, match=r"(?s)not one of the run.*other\.safetensors"):
        resolve("to:next", problem_of(), problem_of().state(), checkpoint=stranger, run=run)


def test_towards_a_file_that_does_not_fit_or_exist(tmp_path):
    save_file(nn.Linear(4, 3).state_dict(), tmp_path / "linear.safetensors")
    problem = problem_of()
    with pytest.raises(CheckpointError, match=r"'0\.weight'"):
        resolve(f"to:{tmp_path / 'linear.safetensors'}", problem, problem.state())
    with pytest.raises(CheckpointError, match="nothing_here"):
        resolve(f"to:{tmp_path / 'nothing_here.safetensors'}", problem, problem.state())


class TiedWithScratch(nn.Module):
    """A tied weight, a frozen parameter, a buffer, and a buffer that is in no file."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(3, 4), nn.Linear(4, 3)
        self.head.weight = self.embedding.weight
        self.offset = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.double()

    def forward(self, y):
        return self.head(self.embedding(y)) + self.offset


@pytest.mark.parametrize("include_frozen", [False, True])
def test_towards_a_file_of_a_model_with_ties_frozen_parameters_and_buffers(tmp_path, include_frozen):
    torch.save(TiedWithScratch(1).state_dict(), tmp_path / "other.pt")
    problem = Problem(TiedWithScratch(), [(Y, Y)], F.cross_entropy)
    state = problem.state(include_frozen=include_frozen)
    u = resolve(f"to:{tmp_path / 'other.pt'}", problem, state).tensors
    here, there = named(TiedWithScratch()), named(TiedWithScratch(1))
    check(u, {n: there[n] - here[n] for n in here if include_frozen or n != "offset"})


def test_towards_a_file_of_a_wrapped_model(tmp_path):
    torch.save(nn.DataParallel(network(4)).state_dict(), tmp_path / "wrapped.pt")
    problem = problem_of()
    check(resolve(f"to:{tmp_path / 'wrapped.pt'}", problem, problem.state()).tensors, apart(0, 4))


# ---- from the optimizer -----------------------------------------------------------------------------------------


def train(optimizer_of, steps: int = 3, model: nn.Module | None = None):
    model = network() if model is None else model
    optimizer = optimizer_of(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return model, optimizer


def save(path, model: nn.Module, optimizer, form: str, metadata: dict[str, str] | None = None) -> None:
    if form == "torch":
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        return
    slots = {
        f"optimizer.{slot}.{n}": torch.as_tensor(v).clone()
        for n, p in model.named_parameters()
        for slot, v in optimizer.state[p].items()
    }
    save_file({**model.state_dict(), **slots}, path, metadata)


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_momentum_is_the_buffer_of_sgd(tmp_path, form):
    model, optimizer = train(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    save(tmp_path / "step_3", model, optimizer, form)
    checkpoint, problem = load_checkpoint(tmp_path / "step_3"), problem_of()
    u = resolve("momentum", problem, problem.state(checkpoint.state_dict), checkpoint=checkpoint).tensors
    check(u, {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}, 0)
    # the next step of the optimizer, in the direction that u was before it, with the new gradient added
    before = named(copy.deepcopy(model))
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    check(named(model), {n: before[n] - 0.1 * (0.9 * u[n] + p.grad) for n, p in model.named_parameters()})


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_adam_is_the_step_that_adam_took(tmp_path, form):
    model, optimizer = train(functools.partial(torch.optim.Adam, lr=0.01), steps=3)
    before = named(copy.deepcopy(train(functools.partial(torch.optim.Adam, lr=0.01), steps=2)[0]))
    save(tmp_path / "step_3", model, optimizer, form)
    checkpoint, problem = load_checkpoint(tmp_path / "step_3"), problem_of()
    u = resolve("adam", problem, problem.state(checkpoint.state_dict), checkpoint=checkpoint).tensors
    check(u, {n: (before[n] - p) / 0.01 for n, p in named(model).items()}, 1e-9)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("form", ["torch", "safetensors", "safetensors without a record"])
def test_adam_with_settings_of_its_own(tmp_path, form, amsgrad):
    settings = {"lr": 0.01, "betas": (0.5, 0.8), "eps": 1e-2, "amsgrad": amsgrad}
    model, optimizer = train(functools.partial(torch.optim.Adam, **settings), steps=3)
    before = named(copy.deepcopy(train(functools.partial(torch.optim.Adam, **settings), steps=2)[0]))
    facts = {"training": json.dumps({"optimizer": {"betas": [0.5, 0.8], "eps": 1e-2}})}
    save(tmp_path / "step_3", model, optimizer, form, facts if form == "safetensors" else None)
    checkpoint, problem = load_checkpoint(tmp_path / "step_3"), problem_of()
    u = resolve("adam", problem, problem.state(checkpoint.state_dict), checkpoint=checkpoint)
    step = {n: (before[n] - p) / 0.01 for n, p in named(model).items()}
    if form == "safetensors without a record":
        source, betas, eps = "torch's defaults", [0.9, 0.999], 1e-8
        assert not torch.allclose(u.tensors["0.weight"], step["0.weight"], rtol=1e-2)
    else:
        source, betas, eps = "the checkpoint", [0.5, 0.8], 1e-2
        check(u.tensors, step, 1e-9)
    assert u.provenance == {"betas": betas, "eps": eps, "betas_from": source, "eps_from": source}


@pytest.mark.parametrize(
    "training", ["", "[", "[1]", '{"optimizer": 3}', '{"optimizer": {"betas": 0.9, "eps": "x"}}', '{"optimizer": null}']
)
def test_a_record_that_says_nothing_of_adam_leaves_torch_s_defaults(tmp_path, training):
    model, optimizer = train(functools.partial(torch.optim.Adam, lr=0.01))
    save(tmp_path / "step_3", model, optimizer, "safetensors", {"training": training})
    checkpoint, problem = load_checkpoint(tmp_path / "step_3"), problem_of()
    u = resolve("adam", problem, problem.state(checkpoint.state_dict), checkpoint=checkpoint)
    assert u.provenance["betas"] == [0.9, 0.999]
    assert u.provenance["eps_from"] == "torch's defaults"


def test_parameter_groups_that_disagree_record_nothing_in_common(tmp_path):
    model = network()
    groups = [{"params": [p], "betas": (0.5 + 0.01 * i, 0.9)} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.Adam(groups, lr=0.01, eps=1e-5)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    save(tmp_path / "step_1", model, optimizer, "torch")
    checkpoint, problem = load_checkpoint(tmp_path / "step_1"), problem_of()
    u = resolve("adam", problem, problem.state(checkpoint.state_dict), checkpoint=checkpoint)
    assert (u.provenance["betas_from"], u.provenance["eps"]) == ("torch's defaults", 1e-5)
    assert u.provenance["eps_from"] == "the checkpoint"


def test_the_names_of_a_wrapped_model_s_optimizer_are_those_of_the_model(tmp_path):
    model, optimizer = train(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    wrapped = nn.DataParallel(model)
    torch.save({"model": wrapped.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "wrapped.pt")
    checkpoint, problem = load_checkpoint(tmp_path / "wrapped.pt"), problem_of()
    u = resolve("momentum", problem, problem.state(), checkpoint=checkpoint).tensors
    check(u, {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}, 0)


@pytest.mark.row("D5")
def test_optimizer_directions_that_the_checkpoint_does_not_keep(tmp_path, run):
    problem = problem_of()
    with pytest.raises(
        DirectionError, match=r"(?s)'momentum_buffer'.*no checkpoint was given.*'gradient' or 'to:next'"
    ):
        resolve("momentum", problem, problem.state())
    with pytest.raises(DirectionError, match=r"(?s)'exp_avg', 'exp_avg_sq'.*step_000.*no optimizer state"):
        resolve("adam", problem, problem.state(), checkpoint=run[0])
    model, optimizer = train(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    save(tmp_path / "sgd_3", model, optimizer, "torch")
    with pytest.raises(DirectionError, match=r"(?s)'exp_avg'.*keeps 'momentum_buffer'"):
        resolve("adam", problem, problem.state(), checkpoint=load_checkpoint(tmp_path / "sgd_3"))


def test_optimizer_state_of_a_frozen_parameter_is_missing(tmp_path):
    model = network()
    model[0].bias.requires_grad_(False)
    model, optimizer = train(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), model=model)
    slots = {
        f"optimizer.momentum_buffer.{n}": optimizer.state[p]["momentum_buffer"]
        for n, p in model.named_parameters()
        if n != "0.bias"
    }
    save_file({**model.state_dict(), **slots}, tmp_path / "step_3.safetensors")
    checkpoint, problem = load_checkpoint(tmp_path / "step_3.safetensors"), problem_of(model)
    assert "0.bias" not in resolve("momentum", problem, problem.state(), checkpoint=checkpoint).tensors
    with pytest.raises(DirectionError, match=r"'momentum_buffer' lacks '0\.bias'"):
        resolve("momentum", problem, problem.state(include_frozen=True), checkpoint=checkpoint)


# ---- mappings and callables -------------------------------------------------------------------------------------


def like(model: nn.Module, seed: int = 5) -> dict[str, torch.Tensor]:
    return {n: tensors(*p.shape, seed=seed) for n, p in model.named_parameters()}


def test_a_mapping_is_taken_as_it_is_in_the_order_of_the_parameters():
    problem = problem_of()
    given_ = dict(reversed(like(problem.model).items()))
    u = resolve(given_, problem, problem.state())
    check(u.tensors, like(problem.model), 0)
    assert u.name == "custom"
    assert u.provenance == {"digest": digest(like(problem.model))}


@pytest.mark.row("D2")
def test_a_mapping_is_detached_and_cast():
    problem = problem_of()
    given_ = {n: t.float().requires_grad_() for n, t in like(problem.model).items()}
    u = resolve(given_, problem, problem.state()).tensors
    assert not any(t.requires_grad for t in u.values())
    check(u, {n: t.detach().double() for n, t in given_.items()}, 0)


def test_a_callable_gets_checkpoint_and_run(run):
    problem, checkpoint = problem_of(), run[1]
    seen = []

    def twice_the_weights(*args):
        seen.append(args)
        return {n: 2 * t for n, t in args[0].state_dict.items() if n in problem.state().parameters}

    u = resolve(twice_the_weights, problem, problem.state(), checkpoint=checkpoint, run=run)
    assert seen == [(checkpoint, run)]
    check(u.tensors, {n: 2 * p for n, p in named(network(10)).items()}, 0)
    assert u.name == "twice_the_weights"
    assert u.provenance["digest"] == digest(u.tensors)


def changed(**changes):
    out = like(network())
    for n, v in changes.items():
        n = n.replace("_", ".")
        if v is None:
            del out[n]
        else:
            out[n] = v
    return out


NAN = torch.tensor([1.0, float("nan"), float("inf")], dtype=torch.float64)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("gradeint", "did you mean 'gradient'"),
        ("to_init", "did you mean 'to:init'"),
        (3.0, r"not float(?s:.*)'gradient', 'weights'"),
        (lambda c, r: None, "gave a NoneType"),
        (lambda c, r: [1], "gave a list"),
        (changed(**{"0_wieght": tensors(5, 4)}), "(?s)not differentiated: '0.wieght'.*did you mean '0.weight'"),
        (changed(**{"0_weight": None}), "lacks the parameters '0.weight'"),
        (changed(**{"0_weight": tensors(4, 5)}), r"'0\.weight' has shape \(4, 5\), the parameter has shape \(5, 4\)"),
        (changed(**{"0_weight": np.zeros((5, 4))}), r"'0\.weight' is a ndarray"),
        (changed(**{"3_bias": NAN}), r"'3\.bias' has 2 entries that are not finite"),
        ({n: 0 * t for n, t in like(network()).items()}, "'custom' is zero everywhere"),
    ],
)
@pytest.mark.row("D1", "D3")
def test_directions_that_do_not_fit(recipe, words):
    problem = problem_of()
    with pytest.raises(DirectionError, match=words):
        resolve(recipe, problem, problem.state())


def test_a_gradient_that_is_not_finite_names_the_parameter():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(DirectionError, match=r"'0\.weight' has \d+ entries"):
        resolve("gradient", problem_of(model), problem_of(model).state())


@pytest.mark.row("D3")
def test_a_critical_point_says_so():
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        [p.zero_() for p in model.parameters()]
    problem = Problem(model, [(X, torch.zeros(17, 1, dtype=torch.float64))], F.mse_loss)
    with pytest.raises(DirectionError, match=r"(?s)'gradient' is zero everywhere.*critical point.*'random'"):
        resolve("gradient", problem, problem.state())


def test_one_group_may_be_zero():
    u = changed(**{"0_bias": torch.zeros(5, dtype=torch.float64)})
    check(resolve(u, problem_of(), problem_of().state()).tensors, u, 0)


def test_every_name_is_told_in_the_errors():
    with pytest.raises(HoError) as caught:
        resolve("zzzzzz", problem_of(), problem_of().state())
    assert all(repr(n) in str(caught.value) for n in (*NAMES, "to:<file>"))


# ---- norms and digests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["canonical", "layer", "trivial", "discrete", "split"])
def test_group_norms_are_those_of_the_entries(how):
    model = network()
    partition = (
        Partition.split(model, {"3.weight": (1, 5)})
        if how == "split"
        else {"layer": Partition.by_layer}.get(how, getattr(Partition, how, None))(model)
    )
    u = like(model)
    squares = [0.0] * len(partition)
    for n, t in u.items():
        for s, v in zip(np.broadcast_to(partition.assignment[n], t.shape).ravel(), t.ravel().tolist(), strict=True):
            squares[s] += v * v
    np.testing.assert_allclose(group_norms(u, partition), np.sqrt(squares), rtol=1e-13)
    problem = problem_of(model)
    np.testing.assert_allclose(resolve(u, problem, problem.state()).norms(partition), np.sqrt(squares), rtol=1e-13)


def test_group_norms_of_float32_are_summed_in_float64():
    model = nn.Linear(3, 1, bias=False)
    u = {"weight": torch.tensor([[1e25, 1.0, 1e25]])}  # the squares overflow float32
    np.testing.assert_allclose(
        group_norms(u, Partition.trivial(model)), [2**0.5 * float(torch.tensor(1e25))], rtol=1e-12
    )


def test_digests_tell_names_dtypes_shapes_and_bits_apart():
    u = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.nextafter(torch.ones(1), torch.zeros(1))},
    ]
    assert len({digest(x) for x in [u, *others]}) == 5
    assert digest(copy.deepcopy(u)) == digest(u)
    assert digest({"a": torch.zeros(3, 2).T, "b": torch.ones(1)}) == digest(u)
