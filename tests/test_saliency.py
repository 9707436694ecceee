"""Scores beside the loss measured after really removing groups, on a model."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import hoanalysis as ho


def removed(model: nn.Module, names: list[str], batches) -> float:
    """The change of the loss with these parameters set to 0, by plain torch."""
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        before = F.cross_entropy(model(x), y)
        for n, p in model.named_parameters():
            p.copy_(torch.zeros_like(p) if n in names else state[n])
        after = F.cross_entropy(model(x), y)
        for n, p in model.named_parameters():
            p.copy_(state[n])
    return float(after - before)


def test_measured_is_what_removal_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(x, (x[:, 0] > 0).long()) for x in torch.randn(8, 40, 3).double()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for x, y in batches * 20:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    problem = ho.Problem(model, batches, F.cross_entropy)
    ds = ho.summarize(problem, 2, direction="weights", keep_batches=8, measure=("removed", "pairs"), progress=False)
    found, names = ds.ho.saliency(), ds.group.values.tolist()
    np.testing.assert_allclose(found.measured.values, [removed(model, [n], batches) for n in names], rtol=1e-9)
    for s, t in ((0, 1), (1, 2), (0, 3)):
        np.testing.assert_allclose(
            found.measured_pair.values[s, t], removed(model, [names[s], names[t]], batches), rtol=1e-9
        )
    np.testing.assert_array_equal(found.measured_se.values, ds.change_removed_se.values)
    miss = np.abs(found.obd.values - found.measured.values)
    noise = 2 * np.hypot(found.obd_se.values, found.measured_se.values)
    far = [n for n, m, x, e in zip(names, miss, found.measured.values, noise, strict=True) if m > max(abs(x) / 2, e)]
    assert far
    line = next(line for line in found.status.item().split("\n") if line.startswith("far:"))
    assert [n for n in names if repr(n) in line] == far
    twice = ds.assign(change_removed=ds.change_removed * 2, change_removed_batch=ds.change_removed_batch * 2)
    change = ds.ho.compare(twice)
    np.testing.assert_allclose(change.change_removed.values, ds.change_removed.values, rtol=1e-12)
    np.testing.assert_allclose(change.change_removed_se.values, ds.change_removed_se.values, rtol=1e-9)
    bare = ds.drop_vars(["change_removed", "change_removed_pair"]).ho.saliency()
    assert "measured" not in bare
    assert "far:" not in bare.status.item()
