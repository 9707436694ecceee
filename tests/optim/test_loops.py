"""What training loops do to `SummaryNewton`: their data, precision and clipping, and what goes wrong in them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hoanalysis as ho
from hoanalysis.optim import SummaryNewton
from tests.optim.test_summary_newton import batch, flat, network


def one(model: nn.Module, optimizer: SummaryNewton, given: tuple[Tensor, Tensor], loss=F.cross_entropy) -> float:
    optimizer.zero_grad()
    value = loss(model(given[0]), given[1])
    value.backward()
    optimizer.step()
    return value.item()


def made(model: nn.Module, data, **options) -> SummaryNewton:
    return SummaryNewton(ho.Problem(model, data, F.cross_entropy), **options)


@pytest.mark.filterwarnings("ignore")  # of torch, about forking
def test_a_loader_with_persistent_workers_may_be_the_training_s_too():
    x, y = batch(64)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, num_workers=1, persistent_workers=True)
    model = network()
    optimizer = made(model, loader, period=2)
    for _ in range(2):
        seen = []
        for given in loader:
            one(model, optimizer, given)
            seen.append(given[0])
            assert len(seen) <= 8
        torch.testing.assert_close(torch.cat(seen), x, rtol=0, atol=0)


class Failing:
    """Three batches a pass; the second pass, which is the first after the problem's look at the data, raises inside."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        for i in range(3):
            if self.passes == 2 and i == 1:
                raise OSError("the disk")
            yield batch(12, i)


def test_data_that_failed_once_is_gone_through_again():
    model, data = network(), Failing()
    optimizer = made(model, data, period=1)
    failed = []
    for i in range(8):
        try:
            one(model, optimizer, batch(12, 9))
        except OSError:
            failed.append(i)
    assert failed == [1]
    assert data.passes == 4
    assert optimizer.information.used == 7


def test_data_for_one_pass_is_named_when_it_ends():
    class Once:
        batches = iter([batch(12, i) for i in range(3)])

        def __iter__(self):
            return self.batches

    model = network()
    problem = ho.Problem(model, Once(), F.cross_entropy, batch_size=lambda b: len(b[0]))
    optimizer = SummaryNewton(problem, period=1)
    for _ in range(2):  # the problem has looked at one
        one(model, optimizer, batch(12, 9))
    with pytest.raises(ho.errors.DataError, match="empty when it is gone through again"):
        one(model, optimizer, batch(12, 9))


def test_with_a_loss_that_is_a_sum_the_training_is_that_of_the_mean():
    data, found = [batch(12, s) for s in range(4)], []
    for reduction, options in (("mean", {}), ("sum", {"reduction": "sum", "batch_size": lambda b: len(b[0])})):
        model = network()

        def loss(output: Tensor, y: Tensor, reduction=reduction) -> Tensor:
            return F.cross_entropy(output, y, reduction=reduction)

        optimizer = SummaryNewton(ho.Problem(model, data[::-1], loss, **options), period=3)
        for i in range(14):
            one(model, optimizer, data[i % 4], loss)
        found.append(flat(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)
    assert float((found[0] - flat(network())).norm()) > 0.1


def test_gradients_may_be_clipped_to_any_length():
    """Without D3 nothing depends on it: the steps only say how the groups share the way."""
    data, found = [batch(12, s) for s in range(4)], []
    options = {"regularization": None, "curvature": "absolute", "slope": "confirmed", "average": 0.8}
    for scale in (1.0, 1e-3):
        model = network()
        optimizer = made(model, data[::-1], period=3, direction="adam", backtracking=0, **options)
        for i in range(14):
            optimizer.zero_grad()
            (scale * F.cross_entropy(model(data[i % 4][0]), data[i % 4][1])).backward()
            optimizer.step()
        found.append(flat(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-8)
    assert float((found[0] - flat(network())).norm()) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_groups_without_effect_stay_where_they_are_in_every_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).to(dtype)
    data = [(torch.randn(16, 1, 8, 8).to(dtype), torch.randint(0, 3, (16,))) for _ in range(4)]
    before = copy.deepcopy(model)
    optimizer = made(model, data[::-1], period=3)
    for i in range(12):
        one(model, optimizer, data[i % 4])
    assert "without effect, not moved: '0.bias'" in optimizer.status
    torch.testing.assert_close(model[0].bias, before[0].bias, rtol=0, atol=0)
    assert not torch.equal(model[0].weight, before[0].weight)


def test_rates_that_could_not_be_renewed_hold_as_between_measurements():
    model, data = network(3), [batch(12, 0)]
    optimizer = made(model, data, regularization=None, backtracking=0, period=1)
    one(model, optimizer, data[0])
    rates, lengths = np.array(list(optimizer.rates.values())), optimizer._lengths
    assert rates.min() < 0
    data[0] = data[0][0] * torch.inf, data[0][1]
    before = copy.deepcopy(model)
    one(model, optimizer, batch(12, 1), lambda output, y: 3 * F.cross_entropy(output, y))
    assert optimizer.status.startswith("kept: the loss is nan")
    for p, old, rate, length in zip(model.parameters(), before.parameters(), rates, lengths, strict=True):
        share = min(1.0, length / float(p.grad.norm()))
        torch.testing.assert_close(p.detach(), old.detach() - max(rate, 0.0) * share * p.grad, rtol=1e-12, atol=1e-12)


def test_the_status_is_that_of_the_step_and_of_the_latest_measurement():
    model, given = network(), batch(12, 0)
    optimizer = made(model, [batch(12, 1)])
    one(model, optimizer, given)
    measured = optimizer.status
    model[0].weight.grad[0] = torch.nan
    optimizer.step()
    assert optimizer.status == "skipped: the gradient is not finite in '0.weight'"
    one(model, optimizer, given)
    assert optimizer.status == measured
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.status == "skipped: no parameter of the problem's model has a gradient"


def test_a_direction_that_climbs_moves_nothing_and_says_so():
    model = network()
    optimizer = made(model, [batch(12, 1)], direction=lambda g, state: -g)
    one(model, optimizer, batch(12, 0))
    assert "no direction goes down: the new rates are 0" in optimizer.status
    torch.testing.assert_close(flat(model), flat(network()), rtol=0, atol=0)


def test_backtracking_tells_whether_the_loss_fell():
    model = network()
    said = []
    for often in (1, 30):
        optimizer = made(model, [batch(12, 1)], backtracking=often, slope="steps", period=1)
        optimizer.information.change = lambda u, eta: 1.0 if np.abs(eta).max() > 1e-4 else -1.0
        one(model, optimizer, batch(12, 0))
        said.append(optimizer.status)
    assert "halved 1 times, and the loss did not fall" in said[0]
    assert ", until the loss fell" in said[1]


def test_backtracking_is_not_stopped_by_a_batch_that_slopes_the_other_way():
    for average in (0.0, 0.8):
        model, data = network(), [batch()]
        optimizer = made(model, data, backtracking=8, period=1, slope="steps", average=average)
        for _ in range(5):
            one(model, optimizer, batch())
        x, _ = batch()
        data[0] = x, model(x).argmin(1)
        optimizer.information._stream = None
        one(model, optimizer, batch())
        assert "halved" not in optimizer.status


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x).tanh()
        return self.a(h), self.b(h)


@pytest.mark.parametrize("average", [0.0, 0.8])
def test_heads_that_are_trained_by_turns_both_train(average):
    model, (x, y) = Heads().double(), batch()
    loss = lambda out, y: F.cross_entropy(out[0], y) + F.cross_entropy(out[1], y)  # noqa: E731
    optimizer = SummaryNewton(ho.Problem(model, [(x, y)], loss), average=average)
    before = [F.cross_entropy(out, y).item() for out in model(x)]
    for i in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x)[i % 2], y).backward()
        optimizer.step()
        if i == 0:
            assert "the rate before holds: 'b.weight', 'b.bias'" in optimizer.status
            rate = optimizer.rates["a.weight"]
        if i == 1:
            assert optimizer.rates["b.weight"] > 0
            assert optimizer.rates["a.weight"] == rate > 0
    assert optimizer.information.used == 5  # at the steps 0, 1 for head b, 10, 20 and 30
    after = [F.cross_entropy(out, y).item() for out in model(x)]
    assert all(a < 0.9 * b for a, b in zip(after, before, strict=True))


def test_averages_leave_out_the_measurements_in_which_a_group_had_no_direction():
    """Those of head b, which has a direction from the second step on, are those of an optimizer that began there."""
    (x, y), seen = batch(), []
    loss = lambda out, y: F.cross_entropy(out[0], y) + F.cross_entropy(out[1], y)  # noqa: E731
    for steps in ((0, 1, 1), (1, 1)):
        model = Heads().double()
        optimizer = SummaryNewton(ho.Problem(model, [(x, y)], loss), average=0.8, period=1, direction="gradient")
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for head in steps:
            optimizer.zero_grad()
            F.cross_entropy(model(x)[head], y).backward()
            optimizer.step()
        at = slice(4, 6)
        known = optimizer.information
        seen.append(
            (
                known._sums["D2"][at, at] / known._weights["D2"][at, at],
                known._weights["D2"][at, at],
                optimizer.last_slopes[at],
            )
        )
    np.testing.assert_allclose(seen[0][0], seen[1][0], rtol=1e-12)
    np.testing.assert_allclose(seen[0][1], seen[1][1], rtol=1e-12)
    np.testing.assert_allclose(seen[0][2], seen[1][2], rtol=1e-12)


def test_where_the_step_climbs_by_its_own_slopes_nothing_is_confirmed():
    optimizer = made(network(), [batch()], slope="confirmed")
    optimizer.last_slopes = np.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(optimizer._confirmed(np.array([-1.0, 0, 0, 0]), np.ones(4)), 0.0)
    assert optimizer.confirmed == 0.0


class Root(nn.Module):
    """Its derivatives are not finite where a sample is 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x) * (x * self.l.weight[0]).sum(1, keepdim=True).abs().sqrt()


@pytest.mark.parametrize("engine", ["auto", "tangents"])
def test_a_derivative_that_is_not_finite_once_costs_one_measurement(engine):
    model, good = Root().double(), batch()
    bad = torch.cat([good[0][:-1], 0 * good[0][:1]]), good[1]
    optimizer, said = made(model, [good, bad, good], period=1, engine=engine), []
    for _ in range(3):
        one(model, optimizer, good)
        said.append(optimizer.status.split(":")[0])
    assert said[1] == "kept"
    assert "kept" not in said[::2]
    assert optimizer.information.engine == engine


def test_one_slope_that_overflows_is_left_out():
    model = network().float()
    given = batch()[0].float(), batch()[1]
    optimizer = made(model, [given], direction="momentum")
    one(model, optimizer, given)
    model[0].weight.grad.mul_(1e22)
    optimizer.step()
    assert np.isfinite(optimizer._slopes).all()


def test_what_cannot_go_on_is_named():
    model, given = network(), batch()
    model[0].weight.requires_grad_(False)
    optimizer = made(model, [given], period=1)
    one(model, optimizer, given)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ho.errors.ArgumentError, match=r"unfrozen after the optimizer was made: '0\.weight'"):
        one(model, optimizer, given)

    model = network()
    optimizer = made(model, [given])
    model.float()
    with pytest.raises(ho.errors.ArgumentError, match="another dtype than at the start"):
        one(model, optimizer, (given[0].float(), given[1]))


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        (lambda g, state: None, "gave NoneType for '0.weight'"),
        (lambda g, state: g.sum(), r"gave shape \(\) for '0.weight', whose gradient has shape \(4, 3\)"),
        (lambda g, state: g / 0, "not finite for '0.weight'"),
    ],
)
def test_a_direction_of_the_user_s_own_is_checked(direction, words):
    model = network()
    with pytest.raises(ho.errors.DirectionError, match=words):
        one(model, made(model, [batch()], direction=direction), batch())


def test_states_of_another_regularization_and_of_other_groups_are_named():
    model, given = network(), batch()
    ridge = made(model, [given], regularization="ridge", average=0.5)
    one(model, ridge, given)
    with pytest.raises(ho.errors.ArgumentError, match="of a regularization without D3"):
        made(model, [given]).load_state_dict(ridge.state_dict())

    names = [n for n, _ in model.named_parameters()]
    two = [ho.Partition.canonical(model).merge({"x": names[:k], "y": names[k:]}) for k in (1, 2)]
    optimizer = made(model, [given], partition=two[0])
    one(model, optimizer, given)
    with pytest.raises(ho.errors.ArgumentError, match=r"in the state_dict 'x' holds other parameters: '0\.weight'"):
        made(model, [given], partition=two[1]).load_state_dict(optimizer.state_dict())


def test_numbers_of_numpy_are_numbers():
    optimizer = made(network(), [batch()], period=np.int64(5), damping=np.float32(0.5))
    assert optimizer.period == 5
