"""Re-initialising groups: the summaries against the same network with its layers put back by hand."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.analysis.reinitialization import reinitialization
from hoanalysis.errors import SchemaError


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches():
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=g).double(), torch.randint(0, 3, (n,), generator=g)) for n in (5, 3, 7, 4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three networks that share their first layer: it never moved."""
    folder = tmp_path_factory.mktemp("run")
    first = network(0)
    for step in range(3):
        model = network(step)
        model[0].load_state_dict(first[0].state_dict())
        save_file(dict(model.state_dict()), folder / f"step_{step}.safetensors")
    return ho.open_run(folder)


@pytest.fixture(scope="module")
def ds(run):
    problem = ho.Problem(network(7), batches(), loss=F.cross_entropy)
    return ho.summarize_run(
        run, problem, 3, direction="to:init", keep_batches=4, measure="removed", progress=False, self_check=False
    )


def losses(state, moved):
    """Of every batch, of a network with the entries ``moved`` replaced."""
    model = network(7)
    model.load_state_dict({**state, **moved})
    with torch.no_grad():
        return np.array([F.cross_entropy(model(x), y).item() for x, y in batches()])


def test_the_measured_loss_is_that_of_the_network_with_the_group_put_back(run, ds):
    found = reinitialization(ds).sel(step=2)
    weights = np.array([len(y) for _, y in batches()], float)
    start, state = run[0].state_dict, run[2].state_dict
    for name in ds.group.values:
        change = losses(state, {name: start[name]}) - losses(state, {})
        mean = weights @ change / weights.sum()
        n = len(weights)
        se = np.sqrt(n / (n - 1) * (weights**2 * (change - mean) ** 2).sum()) / weights.sum()
        np.testing.assert_allclose(found.measured.sel(group=name), mean, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(found.measured_se.sel(group=name), se, rtol=1e-9, atol=1e-13)
        assert found.critical.sel(group=name).item() == (mean > 2 * se)


def test_the_prediction_is_the_taylor_polynomial_of_the_group_alone(run, ds):
    """By torch's own derivatives of t -> L(theta + t U^s)."""
    found = reinitialization(ds).sel(step=1)
    start, state = run[0].state_dict, run[1].state_dict
    model, weights = network(7), torch.tensor([len(y) for _, y in batches()]).double()
    for name in ds.group.values:

        def loss(t, name=name):
            moved = {**state, name: state[name] + t * (start[name] - state[name])}
            each = [F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y) for x, y in batches()]
            return (weights * torch.stack(each)).sum() / weights.sum()

        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        value, total, factor = loss(t), 0.0, 1.0
        for order in (1, 2, 3):
            (value,) = torch.autograd.grad(value, t, create_graph=True)
            factor *= order
            total += value.item() / factor
            np.testing.assert_allclose(found.predicted.sel(order=order, group=name), total, rtol=1e-8, atol=1e-13)


def test_the_error_of_the_prediction_is_that_over_the_blocks(ds):
    one, found = ds.sel(step=2), reinitialization(ds).sel(step=2)
    w = one.weight.values
    second = one.D1_batch.values + np.einsum("bss->bs", one.D2_batch.values) / 2
    each = second / w[:, None]
    mean = np.average(each, axis=0, weights=w)
    expected = np.sqrt(4 / 3 * (w[:, None] ** 2 * (each - mean) ** 2).sum(0)) / w.sum()
    np.testing.assert_allclose(found.predicted_se.sel(order=2), expected, rtol=1e-10, atol=1e-15)


def test_what_never_moved_is_ambient_and_has_no_way_to_go(ds):
    found = reinitialization(ds).sel(step=2)
    first = [g for g in ds.group.values if g.startswith("0.")]
    assert not found.critical.sel(group=first).any()
    np.testing.assert_array_equal(found.moved.sel(group=first), 0.0)
    np.testing.assert_array_equal(found.measured.sel(group=first), 0.0)
    assert "ambient: re-initialising '0.weight', '0.bias'" in found.status.item()
    assert reinitialization(ds).status.values[0].startswith("not computed: this checkpoint has no summaries")


def test_a_diagonal_serves_as_well_as_the_full_tensor():
    full = example(3).assign_attrs(direction="to:init")
    short = example(3, order=2).assign_attrs(direction="to:init")
    for name in ("predicted", "predicted_se"):
        np.testing.assert_allclose(reinitialization(full)[name], reinitialization(short)[name], rtol=1e-10)


def test_words_say_what_was_measured_and_where_the_series_misses():
    ds = example(3).assign_attrs(direction="to:init")
    found = reinitialization(ds)
    assert "predicted only" in found.status.item()
    last = found.predicted.isel(order=-1)
    ds["change_removed"] = last.reset_coords(drop=True) * [1, 1, 4, 1]
    ds["change_removed_se"] = abs(ds.change_removed) * [0.1, 0.9, 0.1, 0.1]
    found = reinitialization(ds)
    np.testing.assert_array_equal(found.critical, (last > 0) & np.array([True, False, True, True]))
    assert "far: order 3 misses" in found.status.item()
    assert found.status.item().count("'layer1.weight'") == 2


def test_other_directions_are_refused():
    with pytest.raises(SchemaError, match="'to:init', and these are along 'gradient'"):
        reinitialization(copy.copy(example()))
