"""The step of `SummaryNewton` against methods that it must become in its limits, and what a loop asks of it."""

import copy
import io

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian

import hoanalysis as ho
from hoanalysis import models
from hoanalysis.analysis.groups import system_of
from hoanalysis.optim import SummaryNewton, passes
from hoanalysis.optim.descent import FLOOR, SHARE, absolute, separable
from hoanalysis.optim.updates import adam


def batch(samples: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, generator=g, dtype=torch.float64), torch.randint(0, 3, (samples,), generator=g)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def train(model: nn.Module, data: list, steps: int, loss=F.cross_entropy, **options) -> SummaryNewton:
    optimizer = SummaryNewton(ho.Problem(model, data, loss), **options)
    for i in range(steps):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return optimizer


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient_and_hessian(model: nn.Module, x: Tensor, y: Tensor, loss) -> tuple[Tensor, Tensor]:
    """Of the flat parameters, by torch.func."""
    shapes = {n: p.shape for n, p in model.named_parameters()}

    def f(theta: Tensor) -> Tensor:
        parts = theta.split([s.numel() for s in shapes.values()])
        return loss(
            functional_call(model, {n: t.view(s) for (n, s), t in zip(shapes.items(), parts, strict=True)}, (x,)), y
        )

    theta = flat(model)
    return torch.func.grad(f)(theta), hessian(f)(theta)


def test_one_group_is_the_method_of_cauchy():
    model, data = network(), [batch()]
    g, h = gradient_and_hessian(model, *data[0], F.cross_entropy)
    expected = flat(model) - (g @ g) / (g @ h @ g) * g
    train(model, data, 1, partition="trivial", regularization=None, backtracking=0)
    torch.testing.assert_close(flat(model), expected, rtol=1e-12, atol=1e-12)


def test_one_group_per_parameter_is_the_method_of_newton_on_a_convex_problem():
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(3, 3).double(), batch(60)

    def loss(output, target):  # the ridge makes the Hessian of softmax regression definite
        return F.cross_entropy(output, target) + 0.05 * output.square().mean()

    for _ in range(3):
        g, h = gradient_and_hessian(model, x, y, loss)
        expected = flat(model) - torch.linalg.solve(h, g)
        train(model, [(x, y)], 1, loss=loss, partition="discrete", regularization=None)
        torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-9)
    assert float(gradient_and_hessian(model, x, y, loss)[0].norm()) < 1e-6


@pytest.mark.parametrize("direction", ["gradient", "momentum", "adam"])
def test_the_first_step_reaches_the_minimum_of_a_quadratic_along_the_groups(direction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=True)).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    y = torch.randn(20, 2, dtype=torch.float64)
    before = copy.deepcopy(model)
    F.mse_loss(before(x), y).backward()
    optimizer = train(model, [(x, y)], 1, loss=F.mse_loss, direction=direction, regularization=None)
    u = [
        p.grad if direction != "adam" else p.grad / (p.grad.abs() + 1e-5 * p.grad.square().mean().sqrt())
        for p in before.parameters()
    ]  # the first u of momentum is g, that of Adam g / (|g| + eps rms)
    J = torch.stack([(x @ u[0].T).flatten(), u[1].expand(20, 2).flatten()], 1)
    eta = torch.linalg.lstsq(J, (before(x) - y).detach().flatten()).solution
    np.testing.assert_allclose(list(optimizer.rates.values()), eta.numpy(), rtol=1e-9)
    for p, b, u_s, eta_s in zip(model.parameters(), before.parameters(), u, eta, strict=True):
        torch.testing.assert_close(p.detach(), b.detach() - eta_s * u_s, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("regularization", ["cubic", None])
def test_the_default_solves_with_the_absolute_value_of_the_pseudo_hessian(regularization):
    model, (x, y) = network(), batch()
    g, h = gradient_and_hessian(model, x, y, F.cross_entropy)
    sizes = [p.numel() for p in model.parameters()]
    parts = [torch.cat([v if i == s else 0 * v for i, v in enumerate(g.split(sizes))]) for s in range(len(sizes))]
    pseudo = np.array([[float(a @ h @ b) for a in parts] for b in parts])
    size = np.sqrt(np.abs(np.diag(pseudo)))
    c = pseudo / np.outer(size, size)
    np.fill_diagonal(c, 1.0)
    w, v = scipy.linalg.eigh(scipy.linalg.sqrtm(c @ c).real)  # |C|
    positive = (v * np.maximum(w, 1.0)) @ v.T * np.outer(size, size)
    slope = np.array([float(a @ a) for a in parts])
    given = {"direction": "gradient"} if regularization == "cubic" else dict(PAPER_BUT_ABSOLUTE)
    rates = np.array(list(train(model, [(x, y)], 1, regularization=regularization, **given).rates.values())) / SHARE
    if regularization is None:
        return np.testing.assert_allclose(rates, scipy.linalg.solve(positive, slope), rtol=1e-7)
    third = [ho.taylor_terms(ho.Problem(network(), [(x, y)], F.cross_entropy), 3, direction=d)[2] for d in named(parts)]
    r = np.abs(np.array(third, float)) ** (2 / 3)
    sigma = 0.5 * np.sqrt((r * rates**2).sum())  # lambda / 2 |D eta|
    assert sigma * (r / size**2).max() > 1e-2  # it matters here
    np.testing.assert_allclose((positive + sigma * np.diag(r)) @ rates, slope, rtol=1e-6)


PAPER_BUT_ABSOLUTE = {"curvature": "absolute", "backtracking": 0}


def named(parts: list[Tensor]) -> list[dict[str, Tensor]]:
    """Flat directions as mappings by the names of the network's parameters."""
    shapes = {n: p.shape for n, p in network().named_parameters()}
    sizes = [s.numel() for s in shapes.values()]
    return [{n: t.view(s) for (n, s), t in zip(shapes.items(), u.split(sizes), strict=True)} for u in parts]


matrices = hnp.arrays(float, (5, 5), elements=st.floats(-1, 1, allow_subnormal=False))


@given(matrices, hnp.arrays(float, 5, elements=st.floats(0.01, 1)), hnp.arrays(float, 5, elements=st.floats(-3, 3)))
def test_the_absolute_curvature_is_positive_and_no_scale_matters(a, slope, exponent):
    h = (a + a.T) / 2 + np.diag(np.where(np.diag(a) < 0, -0.1, 0.1))
    groups = system_of({"D1": slope, "D2": h}, np.ones(5), 2.0**-52)
    size = groups.scale
    positive = absolute(groups, h)
    w = scipy.linalg.eigvalsh(positive / np.outer(size, size))
    assert w.min() > FLOOR * (1 - 1e-9)
    c = 10.0**exponent
    scaled = {"D1": slope * c, "D2": h * np.outer(c, c)}
    again = absolute(system_of(scaled, c, 2.0**-52), scaled["D2"])
    np.testing.assert_allclose(
        again / np.outer(c, c) / np.outer(size, size), positive / np.outer(size, size), atol=1e-7
    )


@given(matrices, hnp.arrays(float, 5, elements=st.floats(-1, 1)), hnp.arrays(float, 5, elements=st.floats(-3, 3)))
def test_the_separable_curvature_bounds_the_pseudo_hessian_and_no_scale_matters(a, slope, exponent):
    h = (a + a.T) / 2 + np.diag(np.where(np.diag(a) < 0, -0.1, 0.1))
    tensors = {"D1": slope, "D2": h}
    groups = system_of(tensors, np.ones(5), 2.0**-52)
    bound = separable(groups, slope, h)
    size = np.sqrt(np.abs(np.diag(h)))
    np.testing.assert_array_equal(bound, np.diag(np.diag(bound)))
    for sign in (-1, 1):  # bound >= |h| as quadratic forms
        assert scipy.linalg.eigvalsh((bound + sign * h) / np.outer(size, size)).min() > -1e-9 * np.diag(bound).max()
    c = 10.0**exponent
    scaled = {"D1": slope * c, "D2": h * np.outer(c, c)}
    again = separable(system_of(scaled, c, 2.0**-52), scaled["D1"], scaled["D2"])
    np.testing.assert_allclose(np.diag(again) / c**2, np.diag(bound), rtol=1e-9)
    if np.abs(slope).min() > 0.1:  # by hand: the groups' own steps share what is left of the curvature
        y = np.abs(slope) / size
        by_hand = [
            sum(abs(h[s, t]) / size[s] / size[t] * y[t] for t in range(5)) * size[s] ** 2 / y[s] for s in range(5)
        ]
        np.testing.assert_allclose(np.diag(bound), by_hand, rtol=1e-9)


@pytest.mark.parametrize("direction", ["momentum", "adam", "gradient"])
def test_slopes_of_the_steps_are_averaged_in_units_of_the_direction(direction):
    model, data = network(), [batch(12, seed) for seed in range(4)]
    optimizer = SummaryNewton(ho.Problem(model, data[:1], F.cross_entropy), direction=direction, period=3)
    kept = {n: [] for n, _ in model.named_parameters()}
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for n, p in model.named_parameters():
            kept[n].append(p.grad.clone())
        optimizer.step()
    assert min(optimizer.last_slopes) >= 0
    for i, gs in enumerate(kept.values()):
        slopes = []
        for k in range(1, 5):
            weights = 0.1 * 0.9 ** torch.arange(k - 1, -1, -1, dtype=torch.float64)
            squares = 0.001 * 0.999 ** torch.arange(k - 1, -1, -1, dtype=torch.float64)
            g = torch.stack(gs[:k])
            m = torch.tensordot(weights, g, 1) / weights.sum()
            v = torch.tensordot(squares, g**2, 1) / squares.sum()
            u = {"momentum": m, "adam": m / (v.sqrt() + 1e-5 * v.mean().sqrt()), "gradient": g[-1]}[direction]
            slopes.append(float((g[-1] * u).sum() / u.norm()))
        expected = max(float(weights.numpy() @ slopes / weights.sum()) * float(u.norm()), 0.0)
        np.testing.assert_allclose(optimizer.last_slopes[i], expected, rtol=1e-9)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_of_the_rates_the_part_is_taken_that_other_batches_confirm(average):
    steps = [batch(12, seed) for seed in range(4)]
    others = [tuple(torch.cat([t[:8], t_[:4]]) for t, t_ in zip(b, batch(12, 9), strict=True)) for b in steps]
    each = F.cross_entropy(network()(steps[1][0]), steps[1][1], reduction="none")
    others[1] = tuple(t[each.topk(3).indices] for t in steps[1])  # steeper than the whole
    others[3] = (others[3][0], network()(others[3][0]).argmin(1))  # slopes the other way

    def gradients(x: Tensor, y: Tensor) -> list[Tensor]:
        model = network()
        return list(torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters())))

    options = {"direction": "gradient", "period": 1, "average": average, "damping": 1e-14}  # the weights stay
    made = {}
    for slope in ("steps", "confirmed"):
        model = network()
        made[slope] = model, SummaryNewton(ho.Problem(model, others, F.cross_entropy), slope=slope, **options)
    slopes, weight, parts = np.zeros(4), 0.0, []
    for one, other in zip(steps, others, strict=True):
        for model, optimizer in made.values():
            optimizer.zero_grad()
            F.cross_entropy(model(one[0]), one[1]).backward()
            optimizer.step()
        plain, confirmed = (optimizer for _, optimizer in made.values())
        eta = np.array(list(plain.rates.values()))
        u, g = gradients(*one), gradients(*other)
        norms = np.array([float(v.norm()) for v in u])
        measured = np.array([float((a * b).sum()) for a, b in zip(g, u, strict=True)]) / norms
        slopes, weight = average * slopes + (1 - average) * measured, average * weight + 1 - average
        gain, expected = float(eta @ (slopes * norms)) / weight, float(eta @ plain.last_slopes)
        parts.append(max(gain / expected, 0.0))
        assert plain.confirmed == 1.0
        np.testing.assert_allclose(confirmed.confirmed, parts[-1], rtol=1e-8)
        np.testing.assert_allclose(list(confirmed.rates.values()), parts[-1] * eta, rtol=1e-8)
        assert ("other batches confirm no part" in confirmed.status) == (parts[-1] == 0.0)
    assert sum(0.05 < p < 0.95 for p in parts) >= 2
    assert max(parts) > 1.0
    assert (min(parts) == 0.0) == (average == 0.0)


class Scaled(nn.Module):
    """The same function whatever alpha: tensor s enters as alpha_s T_s, with T_s = theta_s / alpha_s."""

    def __init__(self, alpha: list[float]) -> None:
        super().__init__()
        self.alpha = alpha
        self.t = nn.ParameterList([p.detach() / a for p, a in zip(network().parameters(), alpha, strict=True)])

    def forward(self, x: Tensor) -> Tensor:
        w1, b1, w2, b2 = (a * t for a, t in zip(self.alpha, self.t, strict=True))
        return torch.tanh(x @ w1.T + b1) @ w2.T + b2


OPTIONS = [
    {},
    {"slope": "measured", "average": 0.5, "batches": 2, "trust": 1.0},
    {"regularization": "cubic", "curvature": "signed", "direction": "gradient", "slope": "measured"},
    {"regularization": None, "curvature": "absolute"},
    {"curvature": "separable", "slope": "steps"},
    {"direction": "momentum"},
    {"regularization": "r", "epsilon": 0.7},
    {"regularization": "ridge", "negative": "clip"},
    {"regularization": "cubic", "average": 0.5, "rates_momentum": 0.3, "batches": 2, "trust": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_trajectories_do_not_depend_on_the_scale_of_tensors(options):
    data = [batch(12, seed) for seed in range(4)]
    alpha = np.random.default_rng(0).uniform(0.1, 10, 4).tolist()
    plain, scaled = Scaled([1.0] * 4), Scaled(alpha)
    for model in (plain, scaled):
        train(model, data, 20, period=3, **options)
    assert float((flat(plain) - flat(Scaled([1.0] * 4))).norm()) > 1e-2
    for a, t, expected in zip(alpha, scaled.t, plain.t, strict=True):
        torch.testing.assert_close(a * t, expected, rtol=1e-6, atol=1e-6)


def test_trajectories_do_not_depend_on_the_parameterization():
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 12, generator=g).double(), torch.randint(0, 3, (8,), generator=g)) for _ in range(4)]
    outputs, made = {}, {}
    for kind in models.PARAMETERIZATIONS:
        torch.manual_seed(0)
        made[kind] = models.MLP((12, 7, 3), activation="tanh", parameterization=kind).double()
    for plain, ntk in zip(made["standard"].layers, made["ntk"].layers, strict=True):
        plain.weight.data = ntk.scale * ntk.weight.data  # in float64: they are drawn in float32
    for kind, model in made.items():
        before = model(data[0][0]).detach()
        train(model, data, 20, period=3)
        outputs[kind] = model(data[0][0]).detach(), before
    (ntk, ntk_before), (standard, standard_before) = outputs["ntk"], outputs["standard"]
    torch.testing.assert_close(ntk_before, standard_before, rtol=1e-12, atol=1e-12)
    assert float((ntk - ntk_before).norm()) > 1e-2
    torch.testing.assert_close(ntk, standard, rtol=1e-6, atol=1e-6)


def test_the_update_of_adam_does_not_depend_on_the_unit_and_is_zero_without_gradient():
    ours, scaled, torchs = {}, {}, nn.Parameter(torch.zeros(5, dtype=torch.float64))
    reference = torch.optim.Adam([torchs], lr=1.0, eps=0.0)
    for seed in range(4):
        g = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        before, torchs.grad = torchs.detach().clone(), g.clone()
        reference.step()
        u = adam(g, ours)
        torch.testing.assert_close(u, before - torchs.detach(), rtol=1e-3, atol=0)  # eps is 1e-5 of the rms
        torch.testing.assert_close(adam(1e-12 * g, scaled), u, rtol=1e-12, atol=0)
    assert adam(torch.zeros(3), {}).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("turned", [False, True])
def test_passes_in_pieces_are_those_of_the_whole(monkeypatch, turned):
    def drawn(seed: int) -> Tensor:
        g = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return g.T if turned else g

    whole, parts = {}, {}
    for seed in range(3):
        monkeypatch.setattr(passes, "PIECE", 2**17)
        expected = adam(drawn(seed), whole)
        monkeypatch.setattr(passes, "PIECE", 4)
        assert len(list(passes.pieces(drawn(seed)))) == (1 if turned else 9)
        torch.testing.assert_close(adam(drawn(seed), parts), expected, rtol=1e-13, atol=1e-13)
    model = network()
    a, b = ({n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(2))
    for partition in (ho.Partition.canonical(model), ho.Partition.split(model, {"0.weight": (0, 2)})):
        products = [(a[n] * b[n]).detach().numpy() for n in a]
        by_hand = [float(x.sum()) for x in products]
        if len(partition) > len(by_hand):
            by_hand[:1] = [float(products[0][:2].sum()), float(products[0][2:].sum())]
        np.testing.assert_allclose(passes.group_inner(a, b, partition), by_hand, rtol=1e-12)


def test_a_zero_gradient_and_a_linear_loss_move_nothing_and_say_so():
    model, (x, y) = network(), batch()
    optimizer = SummaryNewton(ho.Problem(model, [(x, y)], F.cross_entropy))
    before = flat(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.status == "skipped: the gradient is zero"
    torch.testing.assert_close(flat(model), before, rtol=0, atol=0)

    line = nn.Linear(3, 1).double()
    before = flat(line)
    optimizer = train(line, [(x, x)], 2, loss=lambda o, t: o.mean())
    assert optimizer.status.startswith("skipped: no group has curvature")
    torch.testing.assert_close(flat(line), before, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_named():
    model, data = network(), [batch()]
    optimizer = train(model, data, 1)
    before = flat(model)
    dict(model.named_parameters())["2.bias"].grad[0] = torch.nan
    optimizer.step()
    assert optimizer.status == "skipped: the gradient is not finite in '2.bias'"
    torch.testing.assert_close(flat(model), before, rtol=0, atol=0)


def test_a_saved_optimizer_goes_on_as_if_it_had_not_been():
    data = [batch(12, seed) for seed in range(5)]
    options = {"average": 0.5, "period": 3, "rates_momentum": 0.2}

    def steps(model, optimizer, which):
        for i in which:
            optimizer.zero_grad()
            F.cross_entropy(model(data[i % 5][0]), data[i % 5][1]).backward()
            optimizer.step()

    whole = network()
    steps(whole, SummaryNewton(ho.Problem(whole, data[::-1], F.cross_entropy), **options), range(11))

    first = network()
    optimizer = SummaryNewton(ho.Problem(first, data[::-1], F.cross_entropy), **options)
    steps(first, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = network(seed=9)
    second.load_state_dict(saved["model"])
    before, optimizer = optimizer, SummaryNewton(ho.Problem(second, data[::-1], F.cross_entropy), **options)
    optimizer.load_state_dict(saved["optimizer"])
    assert (optimizer.rates, optimizer.confirmed) == (before.rates, before.confirmed)
    assert optimizer.confirmed < 1
    steps(second, optimizer, range(5, 11))
    torch.testing.assert_close(flat(second), flat(whole), rtol=0, atol=0)

    other = SummaryNewton(ho.Problem(second, data, F.cross_entropy), partition="layer")
    with pytest.raises(ho.errors.ArgumentError, match="another partition"):
        other.load_state_dict(saved["optimizer"])


def test_param_groups_are_the_partition_and_schedulers_change_their_rates():
    model, data = network(), [batch()]
    optimizer = SummaryNewton(
        ho.Problem(model, data, F.cross_entropy), partition="layer", damping=0.5, direction="gradient"
    )
    assert [g["labels"] for g in optimizer.param_groups] == [["0"], ["2"]]
    assert [g["names"] for g in optimizer.param_groups] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    before = copy.deepcopy(model)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.05])
    for (n, p), b in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(
            p.detach(), b.detach() - 0.5 * optimizer.rates[n[0]] * p.grad, rtol=1e-12, atol=1e-15
        )
    with pytest.raises(ho.errors.ArgumentError, match="those of its partition"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_parts_of_a_tensor_have_rates_of_their_own():
    model, data = network(), [batch()]
    partition = ho.Partition.split(model, {"0.weight": (0, 2)})
    before = copy.deepcopy(model)
    optimizer = train(model, data, 1, partition=partition, direction="gradient")
    F.cross_entropy(before(data[0][0]), data[0][1]).backward()
    rows = (before[0].weight.detach() - model[0].weight.detach()) / before[0].weight.grad
    rates = [optimizer.rates[label] for label in partition.labels[:2]]
    np.testing.assert_allclose(rows.numpy(), np.repeat(rates, 2)[:, None] * np.ones((4, 3)), rtol=1e-9)
    assert rates[0] != pytest.approx(rates[1])


def test_between_measurements_no_rate_is_negative_and_no_group_goes_further_than_seen():
    data = [batch(12, seed) for seed in range(6)]
    model = network(seed=3)
    optimizer = train(model, data, 1, regularization=None, backtracking=0, period=100)
    assert min(optimizer.rates.values()) < 0
    lengths = [float(p.grad.norm()) for p in model.parameters()]
    for k in (0.5, 3.0):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        (k * F.cross_entropy(model(data[1][0]), data[1][1])).backward()
        optimizer.step()
        for (n, p), b, seen in zip(model.named_parameters(), before.parameters(), lengths, strict=True):
            rate = max(optimizer.rates[n], 0.0) * min(1.0, seen / float(p.grad.norm()))
            torch.testing.assert_close(p.detach(), b.detach() - rate * p.grad, rtol=1e-9, atol=1e-14)


def test_training_does_not_touch_the_random_state():
    data = torch.utils.data.DataLoader(list(zip(*batch(), strict=True)), batch_size=8, shuffle=True)
    model = network()
    optimizer = SummaryNewton(ho.Problem(model, data, F.cross_entropy), period=1)
    state = torch.get_rng_state()
    for _ in range(5):
        x, y = batch(8)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"period": 0}, "period is a whole number"),
        ({"period": 2.5}, "period is a whole number"),
        ({"damping": 0.0}, "damping is positive"),
        ({"damping": "1"}, "damping is a number"),
        ({"rates_momentum": 1.0}, "rates_momentum is at least 0 and below 1"),
        ({"negative": "drop"}, "negative is one of 'keep', 'clip'"),
        ({"direction": "nesterov"}, "no direction 'nesterov'"),
        ({"regularization": "cubik"}, "did you mean 'cubic'"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"slope": "mesured"}, "slope is one of 'measured', 'steps', 'confirmed'"),
        ({"curvature": "positive"}, "curvature is one of 'signed', 'absolute', 'separable'"),
        ({"trust": 1.0}, "batches=2 or more"),
        ({"trust": -1.0, "batches": 2}, "trust is a number of standard errors, at least 0"),
        ({"trust": "1", "batches": 2}, "trust is a number"),
        ({"backtracking": -1}, "backtracking is a whole number of at least 0"),
        ({"backtracking": 1.5}, "backtracking is a whole number of at least 0"),
        ({"backtracking": "8"}, "backtracking is a number"),
        ({"partition": "canonicle"}, "canonical"),
    ],
)
def test_wrong_options_are_named(wrong, words):
    with pytest.raises(ho.errors.HoError, match=words):
        SummaryNewton(ho.Problem(network(), [batch()], F.cross_entropy), **wrong)


def test_what_is_no_problem_is_named():
    with pytest.raises(ho.errors.ArgumentError, match="needs a Problem, not Sequential"):
        SummaryNewton(network())
