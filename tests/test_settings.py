"""What a model and a loss keep as attributes: a change of it is seen, and what was captured before is not used."""

import functools
import pickle
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hoanalysis as ho
from hoanalysis.derivatives.engines import Tangents
from hoanalysis.settings import of_modules, of_value


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.act, self.options, self.factors = torch.tanh, {"k": 1.0}, [1.0]
        self.array = np.ones(5)

    def forward(self, x):
        h = self.act(self.first(x)) * self.options["k"] * self.factors[0]
        return self.last(h * torch.from_numpy(self.array))


def twice(module, inputs, output):
    return 2 * output


def closing_over(held):
    def loss(output, target):
        return F.cross_entropy(output * float(np.asarray(held["k"]).sum()), target)

    return loss


def with_default(output, target, factors=(1.0,)):
    return F.cross_entropy(factors[0] * output, target)


GLOBAL = {"k": 1.0}


def of_a_global(output, target):
    return F.cross_entropy(sum(factor * GLOBAL["k"] for factor in (0.5, 0.5)) * output, target)


HELD, HELD_ARRAY = {"k": 1.0}, {"k": np.ones(2)}
WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
CHANGES = {
    "a function": (F.cross_entropy, lambda m, loss: setattr(m, "act", torch.sin)),
    "an entry of a dict": (F.cross_entropy, lambda m, loss: m.options.update(k=2.0)),
    "an entry of a list": (F.cross_entropy, lambda m, loss: m.factors.__setitem__(0, 2.0)),
    "a hook": (F.cross_entropy, lambda m, loss: m.first.register_forward_hook(twice)),
    "a keyword of a partial": (
        functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda m, loss: loss.keywords.update(label_smoothing=0.5),
    ),
    "an option of a loss": (nn.CrossEntropyLoss(), lambda m, loss: setattr(loss, "label_smoothing", 0.3)),
    "an entry of an array": (F.cross_entropy, lambda m, loss: m.array.__setitem__(slice(0, 3), 2.0)),
    "what a loss closes over": (closing_over(HELD), lambda m, loss: HELD.update(k=HELD["k"] + 1)),
    "an array that a loss closes over": (
        closing_over(HELD_ARRAY),
        lambda m, loss: HELD_ARRAY["k"].__setitem__(0, HELD_ARRAY["k"][0] + 2),
    ),
    "a default": (with_default, lambda m, loss: setattr(loss, "__defaults__", ((loss.__defaults__[0][0] + 1,),))),
    "a global name": (of_a_global, lambda m, loss: GLOBAL.update(k=GLOBAL["k"] + 1)),
    "a tensor of a loss": (nn.CrossEntropyLoss(weight=WEIGHT), lambda m, loss: setattr(loss, "weight", 3 * WEIGHT**2)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("self_check", [False, True])
def test_after_a_change_the_new_derivatives(name, self_check):
    torch.manual_seed(0)
    model, (loss, change) = Net().double(), CHANGES[name]
    loss = loss if isinstance(loss, types.FunctionType) else pickle.loads(pickle.dumps(loss))
    problem = ho.Problem(model, [(torch.randn(20, 4).double(), torch.arange(20) % 3)], loss)
    u = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def d2(engine: str):
        ds = ho.summarize(problem, 2, direction=u, engine=engine, self_check=self_check, progress=False)
        return torch.tensor(ds.D2.values)

    before = d2("tangents")
    settings = problem.settings()
    assert problem.settings() == settings
    assert hash(problem.settings()) == hash(settings)
    change(model, loss)
    assert problem.settings() != settings
    after = d2("nested")
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(d2("tangents"), after, rtol=1e-10, atol=1e-10 * float(after.abs().max()))


def test_a_change_that_nothing_tells_is_captured_anew_when_it_is_checked():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()

    class Elsewhere:
        scale = 1.0

    def loss(output, target):
        return F.cross_entropy(Elsewhere.scale * output, target)

    data = [(torch.randn(9, 3).double(), torch.arange(9) % 2)]
    u = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def d2(problem, engine):
        return torch.tensor(ho.summarize(problem, 2, direction=u, engine=engine, progress=False).D2.values)

    problem = ho.Problem(model, data, loss, batch_size=lambda batch: len(batch[1]))
    d2(problem, "tangents")
    settings = problem.settings()
    Elsewhere.scale = 3.0
    assert problem.settings() == settings
    fresh = ho.Problem(model, data, loss, batch_size=lambda batch: len(batch[1]))
    torch.testing.assert_close(d2(problem, "tangents"), d2(fresh, "nested"), rtol=1e-10, atol=1e-12)


def test_graphs_of_settings_that_are_gone_are_not_kept():
    problem = ho.Problem(nn.Linear(4, 3), [(torch.randn(6, 4), torch.arange(6) % 3)], closing_over(held := {"k": 1}))
    for k in range(1, 4):
        held["k"] = k
        ho.summarize(problem, 1, engine="tangents", progress=False)
    assert len(problem.cache["programs"]) == 1


def test_a_shared_configuration_and_a_loop_are_read_once():
    class Options:
        width, inner = 3, None

    options = Options()
    options.inner = options
    before = of_value({"a": options, "b": options})
    assert of_value({"a": options, "b": options}) == before
    options.width = 4
    assert of_value({"a": options, "b": options}) != before
    assert of_value(1) != of_value(True)
    assert of_value(torch.zeros(2)) != of_value(torch.zeros(2))
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    training = of_modules(model)
    model.eval()
    assert of_modules(model) != training


# ---- masks and memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [slice(25, 50), slice(0, 30), slice(40, 60), slice(0, 0)])
@pytest.mark.parametrize("memory", ["200KB", "60KB", "20KB"])
def test_parts_in_which_nothing_counts(masked, memory):
    """A chunk whose targets are all masked adds nothing; nor does it make the loss one that couples samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 3)).double()
    x, y = torch.randn(60, 4).double(), torch.arange(60) % 3
    y[masked] = -100
    u = {n: torch.randn_like(p) for n, p in model.named_parameters()}

    def summary(memory: str):
        return ho.summarize(
            ho.Problem(model, [(x, y)], F.cross_entropy),
            3,
            direction=u,
            engine="tangents",
            memory=memory,
            progress=False,
        )

    parts, whole = summary(memory), summary("2GiB")
    assert "in chunks of at most" in parts.engine_detail.item()
    assert whole.engine_detail.item() == ""
    for name in ("loss", "D1", "D2", "D3"):
        torch.testing.assert_close(parts[name].values, whole[name].values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [4, 16, 40])
@pytest.mark.parametrize("self_check", [True, False])
def test_small_batches_and_the_self_check_keep_to_the_budget(monkeypatch, rows, self_check):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Tanh(), nn.Linear(50, 3)).double()
    seen, chunk = [], Tangents.chunk
    monkeypatch.setattr(Tangents, "chunk", lambda self, batch: [seen.append(len(batch[0])), chunk(self, batch)][1])
    problem = ho.Problem(model, [(torch.randn(rows, 4).double(), torch.arange(rows) % 3)], F.cross_entropy)
    ds = ho.summarize(problem, 3, engine="tangents", memory="60KB", self_check=self_check, progress=False)
    assert max(seen) <= 3
    assert "in chunks of at most 3" in ds.engine_detail.item()
    small = ho.summarize(problem, 3, engine="tangents", memory="2KB", self_check=self_check, progress=False)
    assert "a single sample takes more than the memory budget" in small.engine_detail.item()


def test_a_loss_that_couples_samples_is_taken_whole_and_says_so():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()

    def spread(output, target):
        return output.var() + F.cross_entropy(output, target)

    problem = ho.Problem(
        model, [(torch.randn(40, 4).double(), torch.arange(40) % 3)], spread, batch_size=lambda b: len(b[1])
    )
    ds = ho.summarize(problem, 2, engine="tangents", memory="5KB", progress=False)
    assert "batches of 40 samples were taken whole" in ds.engine_detail.item()
