"""What a session keeps of earlier views is given again for the same choice alone, and not once the store has grown."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.explorer import State
from hoanalysis.explorer.session import TAUS, Session

RULES = [(None, 1.0), ("ridge", 1.0), ("ridge", 0.3), ("cubic", 0.3), ("cubic", 2.0), ("r", 2.0), ("r", 0.3)]


@pytest.fixture(scope="module")
def ds():
    return example(layers=3, size=3, steps=4)


def regularized(one, rule, epsilon):
    """H-bar + epsilon times the added diagonal of a rule without iteration."""
    h = one.D2.values
    added = {None: 0 * h, "ridge": np.diag(np.abs(np.diag(h)))}
    third = np.abs(np.einsum("sss->s", one.D3.values)) ** (2 / 3)
    return h + epsilon * {**added, "r": np.diag(third)}[rule]


def test_every_rule_and_strength_has_its_own_numbers_in_one_session(ds):
    """Inverse, learning rates and prediction, one after the other, then all again: as if each were the first."""
    session, first = Session(ds), {}
    for again in (False, True):
        for step in (10, 30):
            for rule, epsilon in RULES:
                state = State(step=step, matrix="inverse", regularization=rule, epsilon=epsilon)
                found = (session.view(state).shown.values, session.rates(state)[0][1].values, *session.along(state))
                if again:
                    for one, other in zip(found, first[step, rule, epsilon], strict=True):
                        assert np.array_equal(one, other)
                    continue
                first[step, rule, epsilon] = found
                one = ds.sel(step=step)
                if rule != "cubic":
                    m = regularized(one, rule, epsilon)
                    assert_allclose(found[0], np.linalg.inv(m), rtol=1e-8)
                    assert_allclose(found[1], np.linalg.solve(m, one.D1.values), rtol=1e-8)
                eta = found[1]
                terms = [-one.D1.values @ eta, eta @ one.D2.values @ eta / 2,
                         -np.einsum("stu,s,t,u", one.D3.values, eta, eta, eta) / 6]  # fmt: skip
                at_one = int(np.abs(TAUS - 1).argmin())
                assert_allclose(found[2][:, at_one], np.cumsum(terms), rtol=1e-9)
    of_cubic = [first[30, "cubic", epsilon] for epsilon in (0.3, 2.0)]
    assert all(np.abs(a - b).max() > 1e-3 * np.abs(a).max() for a, b in zip(*of_cubic, strict=True))


def test_a_store_that_has_grown_shows_what_it_holds_now(ds):
    """Every view of a checkpoint that was missing, and of one whose numbers were computed again, is new."""
    early = ds.where(ds.step == 0)
    explorer = ho.explore(early, state={"step": 30, "shared": True})
    states = [State(step=30), State(step=30, matrix="inverse"), State(step=30, grouping="layer"),
              State(step=30, order=3), State(step=30, order=1), State(step=30, grouping="suggested")]  # fmt: skip
    for state in states:
        assert not np.isfinite(explorer.session.view(state).shown.values).any()
    assert_allclose(explorer.view.limit, np.abs(ds.D2.sel(step=0)).max())
    assert not np.isfinite(explorer.session.rates(State(step=30))[0][1].values).any()
    assert explorer.session.offer(State()).computed == (0,)
    for now in (ds, ds.assign(D1=2 * ds.D1, D2=3 * ds.D2, D3=5 * ds.D3)):
        explorer.session.update(now)
        fresh = Session(now)
        for state in states:
            found, expected = explorer.session.view(state), fresh.view(state)
            assert np.isfinite(found.shown.values).all()
            assert np.array_equal(found.shown.values, expected.shown.values)
            assert found.shown.rows == expected.shown.rows
        assert_allclose(explorer.view.shown.values, now.D2.sel(step=30))
        assert_allclose(explorer.view.limit, np.abs(now.D2).max())
        rates = explorer.session.rates(State(step=30))[0][1].values
        assert_allclose(rates, np.linalg.solve(now.D2.sel(step=30), now.D1.sel(step=30)), rtol=1e-9)
        assert explorer.session.offer(State()).computed == (0, 10, 20, 30)
    state = {"step": 30}
    assert np.isfinite(explorer.session.trajectories(State(**state))[1][0].values).all()
