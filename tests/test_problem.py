"""A Problem against plain torch: the same numbers, and a model that comes back as it was."""

import collections
import copy
import dataclasses
import functools
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hoanalysis as ho
from hoanalysis.directions import gradient
from hoanalysis.errors import ArgumentError, DataError, LossError, ModelError
from hoanalysis.problem import Problem, batch_digest, count_rows, describe_callable, map_tensors, tensors_of


def tensors(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def classes(n: int, seed: int = 0, of: int = 3) -> torch.Tensor:
    return torch.randint(of, (n,), generator=torch.Generator().manual_seed(seed))


class BatchNormNet(nn.Module):
    """A model with buffers, a frozen parameter and submodules in different modes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5, momentum=None))
        self.head = nn.Linear(5, 3)
        self.head.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.ones(2), persistent=False)
        self.double()
        self.train()
        self.body[3].eval()

    def forward(self, x):
        self.calls += 1
        self.scratch = self.scratch * 2  # a buffer that is replaced, not changed in place
        return self.head(self.body(x))


def photograph(model: nn.Module) -> dict:
    """Everything that must come back: values, identities, versions, gradients, flags, random states."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "values": {n: t.detach().clone() for n, t in named},
        "identities": {n: (id(t), t.data_ptr(), t._version, t.requires_grad) for n, t in named},
        "gradients": {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()},
        "flags": {n: m.training for n, m in model.named_modules()},
        "torch": torch.get_rng_state().clone(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }


def check_untouched(before: dict, model: nn.Module) -> None:
    after = photograph(model)
    for key in ("values", "gradients", "torch"):
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0, equal_nan=True)
    for key in ("identities", "flags", "numpy", "python", "grad mode"):
        assert after[key] == before[key], key


CALLS = {
    "batch_value": lambda p: p.batch_value(p.state().parameters, p.state(), p.first_batch()),
    "other dtype": lambda p: p.batch_value(
        p.state(dtype=torch.float32).parameters,
        p.state(dtype=torch.float32),
        p.cast(p.first_batch(), torch.float32),
    ),
    "frozen": lambda p: p.state(include_frozen=True),
    "splittable": lambda p: p.splittable,
    "deterministic": lambda p: p.check_deterministic(p.state()),
    "fingerprint": lambda p: p.fingerprint(),
    "gradient": lambda p: gradient(p, p.state()),
    "description": lambda p: p.description(),
    "half a pass": lambda p: next(iter(p.batches())),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.row("M2")
def test_the_model_comes_back_untouched(call):
    model = BatchNormNet()
    data = DataLoader(TensorDataset(tensors(7, 4), classes(7)), batch_size=4)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
    random.seed(3)
    before = photograph(model)
    problem = Problem(model, data, F.cross_entropy)
    CALLS[call](problem)
    check_untouched(before, model)


def test_the_model_comes_back_untouched_from_a_call_that_fails():
    model = BatchNormNet()

    def fails(model, batch):
        model(batch[0])
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        raise RuntimeError("no")

    problem = Problem(model, [(tensors(4, 4), classes(4))], batch_loss=fails, batch_size=count_rows)
    before = photograph(model)
    with pytest.raises(RuntimeError, match="no"):
        problem.batch_value(problem.state().parameters, problem.state(), problem.first_batch())
    check_untouched(before, model)


def test_data_and_losses_that_draw_random_numbers_leave_the_random_state():
    class Drawing:
        def __iter__(self):
            for i in range(3):
                torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
                yield tensors(2, 4, seed=i), classes(2, i)

    def loss(x, y):
        torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        return F.cross_entropy(x, y)

    model = nn.Linear(4, 3).double()
    before = photograph(model)
    problem = Problem(model, Drawing(), loss)
    for call in CALLS.values():
        call(problem)
    check_untouched(before, model)


# ---- the swap ---------------------------------------------------------------------------------------------------


def test_parameters_are_swapped_for_the_whole_call():
    """A penalty on the weights, computed outside of forward, sees the swapped parameters too."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)).double()

    def penalized(model, batch):
        x, y = batch
        penalty = sum(p.square().sum() for p in model.parameters()) + model[1].weight.sum()
        return F.cross_entropy(model(x), y) + penalty

    problem = Problem(model, [(tensors(5, 4), classes(5))], batch_loss=penalized, batch_size=lambda b: len(b[1]))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
    state = problem.state(other.state_dict())
    value = problem.batch_value(state.parameters, state, problem.first_batch())
    torch.testing.assert_close(value, penalized(other, problem.first_batch()).detach(), rtol=1e-14, atol=0)
    leaves = {n: p.clone().requires_grad_() for n, p in state.parameters.items()}
    got = torch.autograd.grad(problem.batch_value(leaves, state, problem.first_batch()), list(leaves.values()))
    expected = torch.autograd.grad(penalized(other, problem.first_batch()), list(other.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


def test_tied_parameters_are_swapped_under_both_names():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)}).double()
    model["head"].weight = model["embedding"].weight

    def batch_loss(model, tokens):
        return F.cross_entropy(model["head"](model["embedding"](tokens)), tokens)

    tokens = classes(6, 1, 5)
    problem = Problem(model, [tokens], batch_loss=batch_loss, batch_size=len)
    w = tensors(5, 3, seed=4)
    state = problem.state({"embedding.weight": w})
    assert list(state.parameters) == ["embedding.weight"]
    assert not state.fixed
    torch.testing.assert_close(
        problem.batch_value(state.parameters, state, tokens), F.cross_entropy(w[tokens] @ w.T, tokens)
    )


def test_frozen_parameters_and_buffers_are_fixed_and_can_come_from_a_checkpoint():
    model = BatchNormNet()
    state = Problem(model, [(tensors(4, 4), classes(4))], F.cross_entropy).state({"head.bias": torch.ones(3)})
    assert list(state.parameters) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert {"head.bias", "calls", "scratch", "body.1.running_mean"} <= set(state.fixed)
    torch.testing.assert_close(state.fixed["head.bias"], torch.ones(3, dtype=torch.float64))


# ---- the loss over the data -------------------------------------------------------------------------------------


def over_data(problem: Problem) -> float:
    """L as design.md writes it, from the public parts."""
    state = problem.state()
    pairs = [(problem.size(b), float(problem.batch_value(state.parameters, state, b))) for b in problem.batches()]
    return sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)


WEIGHTS = torch.tensor([0.2, 3.0, 1.3], dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from(
        [
            F.cross_entropy,
            functools.partial(F.cross_entropy, ignore_index=1),
            functools.partial(F.cross_entropy, weight=WEIGHTS, ignore_index=1),
            nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
        ]
    ),
)
def test_the_loss_over_batches_of_any_sizes_is_the_loss_of_all_samples_at_once(sizes, loss):
    n = sum(sizes)
    x, y = tensors(n, 4), classes(n)
    y[torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])] = 0  # something in every batch that is not masked
    model = nn.Linear(4, 3).double()
    problem = Problem(model, list(zip(x.split(sizes), y.split(sizes), strict=True)), loss)
    torch.testing.assert_close(over_data(problem), float(loss(model(x), y).detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.row("M9")
def test_token_losses_weigh_batches_by_their_unmasked_tokens():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    x, y = classes(60, 0, 5).reshape(10, 6), classes(60, 1, 5).reshape(10, 6)
    y[tensors(10, 6, seed=2) > 0.3] = -100
    y[:, 0] = 2

    def loss(out, y):
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    batches = list(zip(x.split([3, 5, 2]), y.split([3, 5, 2]), strict=True))
    problem = Problem(model, batches, loss, batch_size=lambda b: (b[1] != -100).sum())
    torch.testing.assert_close(over_data(problem), float(loss(model(x), y).detach()), rtol=1e-12, atol=0)


def test_a_batch_in_which_nothing_counts_is_an_error():
    loss = functools.partial(F.cross_entropy, ignore_index=0)
    problem = Problem(nn.Linear(4, 3).double(), [(tensors(3, 4), torch.zeros(3, dtype=torch.long))], loss)
    with pytest.raises(DataError, match=r"(?s)size 0.*masked"):
        problem.size(problem.first_batch())


def test_sizes_that_are_not_positive_numbers():
    for bad in (float("nan"), -1.0, float("inf")):
        problem = Problem(
            nn.Linear(4, 3), [(tensors(3, 4), classes(3))], F.cross_entropy, batch_size=lambda _, b=bad: b
        )
        with pytest.raises(DataError, match="size"):
            problem.size(problem.first_batch())


def test_a_sum_over_the_data():
    model = nn.Linear(4, 3).double()
    x, y = tensors(7, 4), classes(7)
    loss = functools.partial(F.cross_entropy, reduction="sum")
    problem = Problem(model, [(x[:3], y[:3]), (x[3:], y[3:])], loss, reduction="sum")
    assert [problem.size(b) for b in problem.batches()] == [3, 4]
    assert problem.splittable
    total = gradient(problem, problem.state())
    expected = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    torch.testing.assert_close(list(total.values()), list(expected), rtol=1e-12, atol=1e-12)


# ---- what can be recombined -------------------------------------------------------------------------------------


def contrastive(z, _):
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


SPLITTABLE = {
    "mean over rows": (nn.Linear(4, 3), F.cross_entropy, True),
    "masked": (nn.Linear(4, 3), functools.partial(F.cross_entropy, ignore_index=1), True),
    "class weights": (nn.Linear(4, 3), functools.partial(F.cross_entropy, weight=WEIGHTS), True),
    "batch norm in eval mode": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), F.cross_entropy, True),
    "batch norm in train mode": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), F.cross_entropy, False),
    "batch norm without statistics": (
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval(),
        F.cross_entropy,
        False,
    ),
}


@pytest.mark.parametrize("case", SPLITTABLE)
@pytest.mark.parametrize("rows", [6, 7])
@pytest.mark.row("M2")
def test_splittable(case, rows):
    model, loss, expected = SPLITTABLE[case]
    assert Problem(model.double(), [(tensors(rows, 4), classes(rows))], loss).splittable is expected


def test_a_contrastive_loss_is_not_splittable():
    problem = Problem(nn.Linear(4, 3), [(tensors(6, 4), classes(6))], contrastive, batch_size=lambda b: len(b[0]))
    assert problem.splittable is False


def test_a_tiny_loss_that_couples_samples_is_not_taken_for_a_mean():
    def tiny(z, y):
        return 1e-12 * contrastive(z, y)

    with pytest.raises(LossError, match="batch_size="):
        Problem(nn.Linear(4, 3).double(), [(tensors(6, 4), classes(6))], tiny)


def test_batch_loss_is_splittable_only_with_split():
    def batch_loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def split(batch, i, j):
        return {k: v[i:j] for k, v in batch.items()}

    data = [{"x": tensors(5, 4), "y": classes(5)}]
    common = {"batch_loss": batch_loss, "batch_size": lambda b: len(b["y"])}
    model = nn.Linear(4, 3).double()
    assert not Problem(model, data, **common).splittable
    assert Problem(model, data, **common, split=split).splittable
    assert not Problem(model, data, **common, split=lambda b, i, j: split(b, 0, 1)).splittable


def test_rows_of_a_batch():
    problem = Problem(nn.Linear(4, 3).double(), [(tensors(5, 4), classes(5))], F.cross_entropy)
    x, y = problem.take_rows(problem.first_batch(), 1, 3)
    torch.testing.assert_close((x, y), (tensors(5, 4)[1:3], classes(5)[1:3]))


def test_one_row_cannot_be_split():
    assert not Problem(nn.Linear(4, 3).double(), [(tensors(1, 4), classes(1))], F.cross_entropy).splittable


# ---- the normalization of a custom loss -------------------------------------------------------------------------


def test_a_mean_over_rows_is_recognised():
    problem = Problem(nn.Linear(4, 3), [(tensors(5, 4), classes(5))], lambda x, y: F.cross_entropy(x, y))
    assert problem.size(problem.first_batch()) == 5
    assert any("mean over rows" in n for n in problem.notes)


@pytest.mark.row("M9")
def test_a_mask_that_only_later_batches_have_is_found():
    y = torch.tensor([0, 1, 2, 1, 0, 2, 1, -1, -1, 0])

    def loss(out, y):
        return F.cross_entropy(out, y, ignore_index=-1)

    data = list(zip(tensors(10, 4).split([3, 3, 4]), y.split([3, 3, 4]), strict=True))
    problem = Problem(nn.Linear(4, 3).double(), data, loss)
    assert len(list(problem.batches(2))) == 2
    for _ in range(2):
        with pytest.raises(LossError, match=r"(?s)unknown.*batch 2.*masked.*batch_size="):
            list(problem.batches())
    sized = Problem(problem.model, data, loss, batch_size=lambda b: (b[1] >= 0).sum())
    torch.testing.assert_close(over_data(sized), float(loss(problem.model(tensors(10, 4)), y).detach()))


def test_every_batch_is_checked_once():
    calls = []

    def loss(x, y):
        calls.append(len(y))
        return F.cross_entropy(x, y)

    data = [(tensors(n, 4), classes(n)) for n in (6, 1, 4)]
    problem = Problem(nn.Linear(4, 3).double(), data, loss)
    assert calls == [6, 2, 4]
    for _ in range(3):
        assert len(list(problem.batches())) == 3
        assert calls == [6, 2, 4, 4, 1, 3]


def test_a_loss_that_works_in_single_precision_is_recognised():
    problem = Problem(nn.Linear(4, 3), [(tensors(5, 4), classes(5))], lambda x, y: F.cross_entropy(x.float(), y))
    assert problem.splittable


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x, y, weight=WEIGHTS.to(x)),
        lambda x, y: F.cross_entropy(x, y, ignore_index=1),
        lambda x, y: F.cross_entropy(x, y, reduction="sum"),
        functools.partial(F.cross_entropy, reduction="sum"),
        functools.partial(F.cross_entropy, reduction="none"),
        contrastive,
    ],
)
@pytest.mark.row("M9")
def test_other_losses_ask_for_their_denominator(loss):
    y = torch.tensor([0, 1, 1, 1, 2])
    with pytest.raises(LossError, match=r"(?s)is unknown.*batch_size="):
        Problem(nn.Linear(4, 3), [(tensors(5, 4), y)], loss)


def test_batch_loss_asks_for_batch_size():
    with pytest.raises(LossError, match=r"(?s)needs batch_size=.*unmasked tokens"):
        Problem(nn.Linear(4, 3), [1], batch_loss=lambda m, b: 0)


def test_arguments_that_cannot_be():
    model, data = nn.Linear(4, 3), [(tensors(5, 4), classes(5))]
    for loss, batch_loss in ((None, None), (F.cross_entropy, F.cross_entropy)):
        with pytest.raises(LossError, match="either loss= or batch_loss="):
            Problem(model, data, loss, batch_loss=batch_loss)
    with pytest.raises(ArgumentError, match=r"'mean' or 'sum', not 'none'"):
        Problem(model, data, F.cross_entropy, reduction="none")
    with pytest.raises(ModelError, match="a function, not"):
        Problem(lambda x: x, data, F.cross_entropy)
    with pytest.raises(ArgumentError, match="batch_size is a function of a batch, not 32"):
        Problem(model, data, F.cross_entropy, batch_size=32)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda m, b: m(b[0]), r"shape \(5, 3\)"),
        (lambda m, b: 1.5, "is float"),
        (lambda m, b: None, "is NoneType"),
        (lambda m, b: m(b[0]).sum() * 1j, "a real number, and is complex128"),
        (lambda m, b: b[1].sum(), "and is int64"),
    ],
)
@pytest.mark.row("M7")
def test_a_loss_that_is_no_scalar_tensor(value, words):
    problem = Problem(
        nn.Linear(4, 3).double(), [(tensors(5, 4), classes(5))], batch_loss=value, batch_size=lambda b: len(b[1])
    )
    with pytest.raises(LossError, match=words):
        problem.check_deterministic(problem.state())


# ---- randomness and models that change themselves ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Dropout(0.1), "'1'"),
        (nn.AlphaDropout(0.1), "'1'"),
        (nn.Dropout2d(0.1), "'1'"),
        (nn.MultiheadAttention(4, 1, dropout=0.1), "'1'"),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.1), "'1'"),
        (nn.TransformerEncoderLayer(4, 1, 8), r"'1\.self_attn', '1\.dropout', '1\.dropout1'"),
    ],
)
@pytest.mark.row("M2")
def test_active_dropout_is_refused_by_name(layer, words):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(ModelError, match=rf"(?s)dropout is active in {words}.*model\.eval\(\)"):
        Problem(model, [(tensors(5, 4), classes(5))], F.cross_entropy)
    Problem(model.eval(), [(tensors(5, 4), classes(5))], F.cross_entropy)


def test_dropout_that_never_drops_is_accepted():
    Problem(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)), [(tensors(5, 4), classes(5))], F.cross_entropy)


NOISES = {
    "functional dropout": lambda x: F.dropout(x, 0.5, training=True),
    "torch": lambda x: x * torch.rand(1),
    "numpy": lambda x: x * np.random.rand(),  # noqa: NPY002
    "python": lambda x: x * random.random(),
    "a generator of its own": functools.partial(lambda g, x: x * g.random(), np.random.default_rng(0)),
}


@pytest.mark.parametrize("noise", NOISES)
def test_randomness_of_any_source_is_found(noise):
    class Noisy(nn.Linear):
        def forward(self, x):
            return NOISES[noise](super().forward(x))

    model = Noisy(4, 3).double().eval()
    before = photograph(model)
    problem = Problem(model, [(tensors(5, 4), classes(5))], F.cross_entropy)
    with pytest.raises(ModelError, match=r"(?s)came out as .* and .*random numbers"):
        problem.check_deterministic(problem.state())
    check_untouched(before, model)


def test_a_deterministic_model_gives_its_loss():
    problem = Problem(BatchNormNet(), [(tensors(5, 4), classes(5))], F.cross_entropy)
    expected = F.cross_entropy(copy.deepcopy(problem.model)(tensors(5, 4)), classes(5))
    torch.testing.assert_close(problem.check_deterministic(problem.state()), float(expected.detach()))


class Clipped(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.clamp_(-0.01, 0.01)
        return super().forward(x)


class ClippedData(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-0.01, 0.01)  # behind the back of autograd's version counter
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Clipped(4, 3), tensors(5, 4)),
        (ClippedData(4, 3), tensors(5, 4)),
        (nn.Sequential(nn.Embedding(5, 3, max_norm=0.1)), classes(5)),
    ],
    ids=["no_grad", "data", "max_norm"],
)
@pytest.mark.parametrize("loss", [F.cross_entropy, lambda x, y: F.cross_entropy(x, y)], ids=["known", "custom"])
@pytest.mark.row("M13")
def test_a_model_that_changes_its_parameters_is_refused_and_not_changed(model, x, loss):
    model = model.double()
    before = photograph(model)
    problem = Problem(model, [(x, classes(5))], loss)
    with pytest.raises(ModelError, match=r"changes its own parameters.*weight"):
        problem.check_deterministic(problem.state())
    check_untouched(before, model)


class Doubling(nn.Linear):
    def forward(self, x):
        x *= 2
        return super().forward(x)


def test_a_model_that_changes_its_input_is_refused_with_the_reason_and_the_input_as_it_was():
    x, y = tensors(5, 4), classes(5)
    problem, before = Problem(Doubling(4, 3).double(), [(x, y)], F.cross_entropy), x.clone()
    with pytest.raises(ModelError, match="changes the tensors of the batch in place"):
        problem.check_deterministic(problem.state())
    torch.testing.assert_close(x, before, rtol=0, atol=0)


# ---- the data ---------------------------------------------------------------------------------------------------

BATCHES = [(tensors(3, 4, seed=i), classes(3, i)) for i in range(4)]


def problem_of(data, **options) -> Problem:
    return Problem(nn.Linear(4, 3).double(), data, F.cross_entropy, **options)


@pytest.mark.row("A2")
def test_one_shot_iterators_are_refused():
    for once in (iter(BATCHES), (b for b in BATCHES), map(tuple, BATCHES)):
        with pytest.raises(DataError, match="one-shot iterator"):
            problem_of(once)


def test_what_cannot_be_iterated_is_refused():
    for data in (None, 5, object()):
        with pytest.raises(DataError, match="cannot be iterated"):
            problem_of(data)


class OneShot:
    """An iterable that hides a generator: its second pass is empty."""

    def __init__(self) -> None:
        self.generator = (b for b in BATCHES)

    def __iter__(self):
        return self.generator


class Shrinking:
    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(BATCHES[: 4 - (self.passes > 1)])


@pytest.mark.row("A2")
def test_a_second_pass_that_is_empty_or_shorter_is_an_error():
    with pytest.raises(DataError):
        problem_of(OneShot()).fingerprint()
    problem = problem_of(Shrinking())
    assert len(list(problem.batches())) == 4
    with pytest.raises(DataError, match=r"gave 4 batches, the next one 3"):
        list(problem.batches())


@pytest.mark.row("A1")
def test_empty_data():
    empty = DataLoader(TensorDataset(tensors(3, 4), classes(3)), batch_size=4, drop_last=True)
    for data in ([], empty):
        with pytest.raises(DataError, match="no batches"):
            list(problem_of(data).batches())
    with pytest.raises(DataError, match="no batches"):
        Problem(nn.Linear(4, 3).double(), [], lambda x, y: F.cross_entropy(x, y))


@pytest.mark.row("A1")
def test_a_batch_without_samples_is_named():
    problem = problem_of([BATCHES[0], (tensors(0, 4), classes(0))])
    with pytest.raises(DataError, match="batch 1 has no samples"):
        list(problem.batches())


def test_max_batches_takes_the_first():
    problem = problem_of(BATCHES)
    torch.testing.assert_close(list(problem.batches(2)), BATCHES[:2])
    assert len(list(problem.batches(9))) == 4
    assert len(list(problem.batches(4))) == 4


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.row("A3")
def test_a_shuffling_loader_is_found(own_generator):
    generator = torch.Generator().manual_seed(0) if own_generator else None
    data = DataLoader(TensorDataset(tensors(32, 4), classes(32)), batch_size=8, shuffle=True, generator=generator)
    with pytest.raises(DataError, match=r"(?s)second pass.*shuffle=False"):
        problem_of(data).fingerprint()


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), np.random.rand, random.random], ids=["torch", "numpy", "python"]
)
@pytest.mark.row("A3")
def test_random_augmentation_is_found(draw):
    class Augmented(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x + float(draw()), y

    with pytest.raises(DataError, match="second pass"):
        problem_of(DataLoader(Augmented(tensors(8, 4), classes(8)), batch_size=4)).fingerprint()


def test_a_loader_in_fixed_order_is_the_same_in_every_pass():
    data = DataLoader(TensorDataset(tensors(7, 4), classes(7)), batch_size=4, num_workers=0)
    problem = problem_of(data)
    expected = [(tensors(7, 4)[:4], classes(7)[:4]), (tensors(7, 4)[4:], classes(7)[4:])]
    for _ in range(2):
        torch.testing.assert_close([tuple(b) for b in problem.batches()], expected)
    assert problem.fingerprint() == problem_of(data).fingerprint()


Pair = collections.namedtuple("Pair", ["x", "y"])


class Encoding(collections.UserDict):
    """Like the batches of Hugging Face tokenizers."""


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "s"


STRUCTURES = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "defaultdict": lambda x, y: collections.defaultdict(list, {"x": x, "y": y}),
    "encoding": lambda x, y: Encoding({"x": x, "y": y}),
    "namedtuple": lambda x, y: Pair(x, y),
    "dataclass": lambda x, y: Sample(x, y),
    "nested": lambda x, y: {"inputs": [{"x": x}], "names": ["a", "b"], "y": (y, None, 3)},
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "read-only numpy": lambda x, y: (np.broadcast_to(x.numpy(), x.shape), y.numpy()),
    "reversed numpy": lambda x, y: (np.ascontiguousarray(x.numpy()[::-1])[::-1], y.numpy()),
    "big-endian numpy": lambda x, y: (x.numpy().astype(">f8"), y.numpy()),
    "numpy with names": lambda x, y: {"x": x.numpy(), "names": np.array(["a", "b"]), "y": y.numpy()},
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.row("A7")
def test_batches_of_any_structure(structure):
    x, y = tensors(3, 4), classes(3)
    batch = STRUCTURES[structure](x, y)

    def batch_loss(model, batch):
        x, y = tensors_of(batch)
        return F.cross_entropy(model(x), y)

    model = nn.Linear(4, 3)
    problem = Problem(model, [batch], batch_loss=batch_loss, batch_size=count_rows)
    state = problem.state(dtype=torch.float64)
    cast = problem.cast(problem.first_batch(), torch.float64)
    if structure != "defaultdict":
        assert type(cast) is type(batch)
    torch.testing.assert_close(tensors_of(cast), [x, y])
    assert count_rows(batch) == problem.size(batch) == 3
    expected = F.cross_entropy(copy.deepcopy(model).double()(x), y).detach()
    torch.testing.assert_close(problem.batch_value(state.parameters, state, cast), expected)
    assert [t.dtype for t in tensors_of(problem.cast(batch, torch.float32))] == [torch.float32, torch.int64]


def test_what_is_no_tensor_passes_through():
    batch = {"names": ["a", "b"], "n": 3, "none": None, "strings": np.array(["a"])}
    assert map_tensors(lambda t: t * 0, batch) == batch
    assert tensors_of(batch) == []
    assert count_rows(torch.tensor(3.0)) == 1


@pytest.mark.parametrize("loss", [F.mse_loss, functools.partial(F.cross_entropy, ignore_index=1), F.cross_entropy])
def test_numpy_batches_with_a_loss_of_torch(loss):
    x, y = tensors(6, 4), tensors(6, 3, seed=1) if loss is F.mse_loss else classes(6)
    model = nn.Linear(4, 3).double()
    batches = [(x[:2].numpy(), y[:2].numpy()), (x[2:].numpy(), y[2:].numpy())]
    problem = Problem(model, batches, loss)
    got = gradient(problem, problem.state())
    expected = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    torch.testing.assert_close(list(got.values()), list(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": tensors(3, 4), "y": classes(3)}, "'x', 'y'"),
        ((tensors(3, 4), classes(3), classes(3)), "of 3 parts"),
        (tensors(2, 4), "is a Tensor"),
    ],
)
@pytest.mark.parametrize("batch_size", [None, count_rows])
@pytest.mark.row("A7")
def test_batches_that_are_no_pairs_ask_for_batch_loss(batch, words, batch_size):
    problem = problem_of([batch], batch_size=batch_size)
    with pytest.raises(DataError, match=rf"(?s)\(x, y\).*{words}.*batch_loss=fn"):
        gradient(problem, problem.state())


# ---- dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(F.cross_entropy, weight=WEIGHTS.float()),
        functools.partial(nn.CrossEntropyLoss(weight=WEIGHTS.float())),
        nn.CrossEntropyLoss(weight=WEIGHTS.float()),
        nn.BCEWithLogitsLoss(pos_weight=WEIGHTS.float()),
    ],
)
def test_everything_is_cast_the_tensors_of_the_loss_too(loss):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x = tensors(5, 4, dtype=torch.float32)
    y = torch.rand(5, 3) if isinstance(loss, nn.BCEWithLogitsLoss) else classes(5)
    problem = Problem(model, [(x, y)], loss, batch_size=count_rows)
    before = copy.deepcopy(loss)
    state = problem.state(dtype=torch.float64)
    assert {t.dtype for t in (*state.parameters.values(), *state.fixed.values())} == {torch.float64, torch.int64}
    value = problem.batch_value(state.parameters, state, problem.cast(problem.first_batch(), torch.float64))
    double = copy.deepcopy(model).double()
    y64 = y.double() if y.is_floating_point() else y
    inner = loss.func if isinstance(loss, functools.partial) else loss
    expected = (
        copy.deepcopy(inner).double()(double(x.double()), y64)
        if isinstance(inner, nn.Module)
        else F.cross_entropy(double(x.double()), y64, weight=WEIGHTS.float().double())
    )
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected.detach(), rtol=1e-14, atol=0)
    assert describe_callable(loss) == describe_callable(before)


def test_a_checkpoint_in_another_precision_takes_the_model_s():
    model = BatchNormNet().float()
    problem = Problem(model, [(tensors(4, 4, dtype=torch.float32), classes(4))], F.cross_entropy)
    for dtype in (torch.float64, torch.bfloat16):
        weights = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
        state = problem.state(weights)
        dtypes = {n: t.dtype for n, t in {**state.parameters, **state.fixed}.items()}
        assert dtypes == {n: t.dtype for n, t in [*model.named_parameters(), *model.named_buffers()]}
        problem.check_deterministic(state)


class Complex(nn.Module):
    def __init__(self, joined: bool) -> None:
        super().__init__()
        w = torch.tensor([[0.3 + 0.4j, -0.2j], [1.0 - 0.5j, 0.1]], dtype=torch.complex128)
        self.joined = joined
        if joined:
            self.re, self.im = nn.Parameter(w.real.clone()), nn.Parameter(w.imag.clone())
        else:
            self.w = nn.Parameter(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex128) @ (torch.complex(self.re, self.im) if self.joined else self.w)).abs()


def test_a_frozen_complex_parameter_is_left_out():
    class Turned(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2, dtype=torch.float64)
            self.phase = nn.Parameter(torch.tensor([1j, -1.0]).to(torch.complex128), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (super().forward(x) * self.phase).abs()

    data = [(torch.eye(2).double(), torch.ones(2, 2).double())]
    ds = ho.summarize(ho.Problem(Turned(), data, F.mse_loss), direction="weights", progress=False)
    assert ds.group.values.tolist() == ["weight", "bias"]


def test_complex_parameters_are_refused_and_the_remedy_holds():
    data = [(torch.tensor([[1.0, 2.0], [0.5, -1.0]]).double(), torch.ones(2, 2).double())]
    with pytest.raises(ModelError, match=r"(?s)complex parameters: 'w'.*torch.complex"):
        ho.summarize(ho.Problem(Complex(False), data, F.mse_loss), progress=False)
    ds = ho.summarize(ho.Problem(Complex(True), data, F.mse_loss), direction="weights", progress=False)
    terms = ho.taylor_terms(ho.Problem(Complex(True), data, F.mse_loss), 2, direction="weights", progress=False)
    np.testing.assert_allclose([float(ds.D1.sum()), float(ds.D2.sum())], terms.values, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_with_the_way_out(dtype):
    problem = Problem(nn.Linear(4, 3).to(dtype), [(tensors(4, 4), classes(4))], F.cross_entropy)
    with pytest.raises(ModelError, match=r"(?s)half precision: 'weight', 'bias'.*dtype='float32'"):
        problem.state()
    assert problem.state(dtype=torch.float32).parameters["weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.row("C17")
def test_half_precision_is_summarized_in_single_with_a_note(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    problem = Problem(model, [(tensors(4, 4).to(dtype), classes(4))], F.cross_entropy)
    ds = ho.summarize(problem, 2, direction="weights", progress=False)
    assert ds.attrs["dtype"] == "float32"
    assert f"parameters in {str(dtype).removeprefix('torch.')} were cast" in ds.attrs["provenance"]
    assert model[0].weight.dtype == dtype
    single = Problem(model.float(), [(problem.first_batch()[0].float(), classes(4))], F.cross_entropy)
    expected = ho.summarize(single, 2, direction="weights", progress=False)
    np.testing.assert_array_equal(ds.D2, expected.D2)
    assert "were cast" not in expected.attrs["provenance"]


@pytest.mark.row("N5")
def test_autocast_is_off_within():
    problem = problem_of([(tensors(4, 4), classes(4))])
    expected = problem.batch_value(problem.state().parameters, problem.state(), problem.first_batch())
    model = copy.deepcopy(problem.model).float()
    single = Problem(model, [(tensors(4, 4).float(), classes(4))], F.cross_entropy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = single.batch_value(single.state().parameters, single.state(), single.first_batch())
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.row("N5")
def test_products_are_taken_in_full_precision_and_the_settings_come_back():
    """TF32 is for GPUs; bfloat16 within products of float32 is what the same switch means on a CPU."""
    conv = torch.backends.mkldnn.conv

    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, conv.fp32_precision

    seen, before = [], settings()

    def loss(output, target):
        seen.append(settings())
        return F.cross_entropy(output, target)

    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    conv.fp32_precision = "bf16"
    try:
        problem = Problem(nn.Linear(4, 3), [(tensors(5, 4).float(), classes(5))], loss, batch_size=lambda b: len(b[1]))
        seen.clear()
        for call in (
            lambda: ho.summarize(problem, 2, progress=False),
            lambda: ho.taylor_terms(problem, 2, progress=False),
            lambda: ho.curvature(problem, probes=3, progress=False),
        ):
            call()
            assert set(seen) == {("highest", False, "ieee")}
            assert settings() == ("medium", True, "bf16")
            seen.clear()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, conv.fp32_precision = before[1:]


@pytest.mark.row("M7")
def test_targets_of_another_shape_than_the_outputs_are_not_compared_with_all():
    problem = Problem(nn.Linear(4, 1).double(), [(tensors(5, 4), tensors(5))], F.mse_loss)
    with pytest.raises(LossError, match=r"each is compared with all[\s\S]*view_as"):
        ho.summarize(problem, 1, progress=False)


def test_gradients_flow_under_no_grad():
    problem = problem_of(BATCHES)
    with torch.no_grad():
        inside = gradient(problem, problem.state())
    torch.testing.assert_close(inside, gradient(problem, problem.state()))


# ---- wrapped models ---------------------------------------------------------------------------------------------


def hessian_entry(problem: Problem) -> torch.Tensor:
    """A second derivative: what compiled code does not give."""
    leaves = {n: p.clone().requires_grad_() for n, p in problem.state().parameters.items()}
    value = problem.batch_value(leaves, problem.state(), problem.first_batch())
    (g,) = torch.autograd.grad(value, [next(iter(leaves.values()))], create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), [next(iter(leaves.values()))])
    return h


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="aot_eager")
    return model


WRAPPED = {
    "torch.compile": lambda: torch.compile(mlp(), backend="aot_eager"),
    "module.compile": compiled_in_place,
    "DataParallel": lambda: nn.DataParallel(mlp()),
    "both": lambda: nn.DataParallel(torch.compile(mlp(), backend="aot_eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.row("M5")
def test_wrapped_models_are_the_model_inside(wrapper):
    data = [(tensors(5, 4), classes(5))]
    plain, wrapped = Problem(mlp(), data, F.cross_entropy), Problem(WRAPPED[wrapper](), data, F.cross_entropy)
    assert list(wrapped.state().parameters) == list(plain.state().parameters)
    torch.testing.assert_close(hessian_entry(wrapped), hessian_entry(plain), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.row("M5")
def test_a_scripted_model_is_refused_by_name():
    with pytest.raises(ModelError, match="TorchScript"):
        Problem(torch.jit.script(mlp()), [(tensors(5, 4), classes(5))], F.cross_entropy)


# ---- fingerprints and descriptions ------------------------------------------------------------------------------


def test_fingerprints_differ_when_data_differ():
    x, y = tensors(6, 4), classes(6)
    base = [(x[:3], y[:3]), (x[3:], y[3:])]
    changed = x.clone()
    changed[5, 3] = torch.nextafter(changed[5, 3], torch.tensor(9.0, dtype=torch.float64))
    others = [
        [(x[:2], y[:2]), (x[2:], y[2:])],
        base[::-1],
        base[:1],
        [(x[:3], y[:3]), (changed[3:], y[3:])],
        [(x[:3].float(), y[:3]), (x[3:], y[3:])],
        [(x[:3], y[:3].int()), (x[3:], y[3:])],
        [(x[:3].reshape(4, 3), y[:3]), (x[3:], y[3:])],
    ]
    prints = {problem_of(data).fingerprint() for data in [base, *others]}
    assert len(prints) == 1 + len(others)
    assert problem_of(copy.deepcopy(base)).fingerprint() == problem_of(base).fingerprint()
    assert problem_of(base).fingerprint(1) == problem_of(base[:1]).fingerprint(1)


class Opaque:
    def __init__(self, x, name="a") -> None:
        self.x, self.name = x, name


def test_digests_see_structure_and_what_is_no_tensor():
    x, y = torch.zeros(2), torch.ones(2)
    different = [
        {"a": x, "b": y},
        {"b": x, "a": y},
        [x, y],
        (x, y),
        [[x], y],
        [x, [y]],
        {"a": x, "b": y, "text": "one"},
        {"a": x, "b": y, "text": "two"},
        {"a": x, "b": y, "text": ["t", "wo"]},
        (x, 1),
        (x, 2),
        (x, None),
        (x, np.array(["a"])),
        (x, np.array(["b"])),
        Sample(x, y),
        Sample(y, x),
        Opaque(x),
        Opaque(y),
        Opaque(x, "b"),
        torch.zeros(1),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1, 1),
        torch.tensor([True]),
        torch.zeros(1, dtype=torch.bfloat16),
    ]
    digests = [batch_digest(b) for b in different]
    assert len(set(digests)) == len(digests)
    assert [batch_digest(copy.deepcopy(b)) for b in different] == digests


def test_a_batch_that_contains_itself_has_a_digest():
    batch = Opaque(torch.zeros(2))
    batch.itself = batch
    assert len(batch_digest(batch)) == 64


def scaled_loss(factor):
    return lambda x, y: factor * F.cross_entropy(x, y)


class Scaled:
    def __init__(self, factor) -> None:
        self.factor = factor

    def __call__(self, x, y):
        return self.factor * F.cross_entropy(x, y)

    def method(self, x, y):
        return self.factor * F.cross_entropy(x, y)


def with_default(x, y, factor=2.0):
    return factor * F.cross_entropy(x, y)


LOSSES = [
    F.cross_entropy,
    F.mse_loss,
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(ignore_index=1),
    nn.CrossEntropyLoss(weight=WEIGHTS),
    nn.CrossEntropyLoss(weight=WEIGHTS + 1e-12),
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
    functools.partial(F.cross_entropy, weight=WEIGHTS),
    functools.partial(F.cross_entropy, weight=WEIGHTS + 1e-12),
    functools.partial(F.cross_entropy, ignore_index=1),
    lambda x, y: F.mse_loss(x, y),
    lambda x, y: F.l1_loss(x, y),
    lambda x, y: F.l1_loss(x, y) + 0 * x.sum(),
    lambda x, y: sum(F.l1_loss(a, b) for a, b in zip(x, y, strict=True)),
    scaled_loss(1.0),
    scaled_loss(2.0),
    scaled_loss(WEIGHTS),
    scaled_loss(WEIGHTS + 1e-12),
    Scaled(1.0),
    Scaled(2.0),
    Scaled(1.0).method,
    Scaled(2.0).method,
    with_default,
]


def test_descriptions_tell_losses_apart():
    told = [describe_callable(loss) for loss in LOSSES]
    assert len(set(told)) == len(told)
    assert describe_callable(scaled_loss(2.0)) == describe_callable(scaled_loss(2.0))
    assert "cross_entropy" in told[0]
    assert "#" not in told[0]  # torch's own: the name is enough, in every version of Python
    assert all("0x" not in t for t in told)


def test_descriptions_of_functions_that_hold_themselves_end():
    def loss(x, y):
        return F.mse_loss(x, y) if len(x) < 2 else loss(x[1:], y[1:])

    assert "loss#" in describe_callable(loss)


SCRIPT = """
from hoanalysis.problem import describe_callable
def make():
    names = set("abcdefgh")
    def loss(x, y):
        return sum(a for a in x if a in {"i", "j", "k", "l", "m", "n"} and a in names) + [b for b in y][0]
    return loss
told = describe_callable(make())
"""


def test_descriptions_are_the_same_in_a_process_with_other_hashes_and_addresses():
    here = {"__name__": "__main__"}
    exec(SCRIPT, here)
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT + "print(told)"],
        env={"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here["told"]


@pytest.mark.row("M2")
def test_the_description_names_modules_whose_mode_matters():
    problem = Problem(BatchNormNet(), [(tensors(4, 4), classes(4))], F.cross_entropy)
    told = problem.description()
    assert told["train_mode"] == ["BatchNorm1d"]
    assert told["model"].endswith(".BatchNormNet")
    assert told["reduction"] == "mean"
    assert Problem(BatchNormNet().eval(), problem.data, F.cross_entropy).description()["train_mode"] == []


# ---- losses with parameters of their own ------------------------------------------------------------------------


class Margin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x, y):
        return F.cross_entropy(self.scale * x, y)


def test_a_loss_with_parameters_is_taken_as_it_is():
    loss = Margin()
    problem = Problem(nn.Linear(4, 3).double(), [(tensors(6, 4), classes(6))], loss)
    assert problem.splittable
    problem.check_deterministic(problem.state())
    got = gradient(problem, problem.state())
    expected = torch.autograd.grad(loss(problem.model(tensors(6, 4)), classes(6)), list(problem.model.parameters()))
    torch.testing.assert_close(list(got.values()), list(expected), rtol=1e-12, atol=1e-14)
    assert loss.scale.grad is None
    assert loss.scale.dtype == torch.float32
