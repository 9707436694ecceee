"""The data of a checkpoint in shards: any cut gives what the whole gives, up to the last bits, and units of its own."""

import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import hoanalysis as ho
from hoanalysis import summaries
from hoanalysis.errors import ArgumentError, CheckpointError, NumericsError
from hoanalysis.reports import Outcome, compute
from hoanalysis.shards import cut
from hoanalysis.study import StudySpec
from hoanalysis.units import Accumulator
from tests.conftest import write_study

SIZES = (5, 3, 7, 4, 6, 2, 5, 8, 3)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def make_batches(n: int, seed: int = 1) -> list:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(b, 4, generator=g).double(), torch.randint(0, 3, (b,), generator=g)) for b in SIZES[:n]]


def total(m: nn.Module, batch) -> torch.Tensor:
    return F.cross_entropy(m(batch[0]), batch[1], reduction="sum")


def problem_of(batches: list, reduction: str = "mean") -> ho.Problem:
    if reduction == "mean":
        return ho.Problem(make_model(), batches, F.cross_entropy)
    return ho.Problem(make_model(), batches, batch_loss=total, batch_size=lambda b: len(b[1]), reduction="sum")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> ho.checkpoints.Run:
    folder = tmp_path_factory.mktemp("run")
    for step in range(2):
        save_file(dict(make_model(seed=step).state_dict()), folder / f"step_{step}.safetensors")
    return ho.open_run(folder)


def summarize(run, problem: ho.Problem, order: int = 2, **options) -> xr.Dataset:
    return ho.summarize_run(run, problem, order, progress=False, self_check=False, **options)


@given(st.integers(1, 70), st.integers(1, 12), st.sampled_from([0, 2, 3, 4, 20]))
def test_shards_are_whole_blocks_of_the_uncut_pass(batches: int, shards: int, keep: int) -> None:
    found = cut(batches, shards, keep)
    covered = [i for s in found for i in range(s.first, s.stop)]
    assert covered == list(range(batches))
    assert all(s.first < s.stop for s in found)
    whole, parts = Accumulator(keep), [Accumulator(keep, s.block) for s in found]
    for sums, indices in [(whole, covered), *((p, range(s.first, s.stop)) for p, s in zip(parts, found, strict=True))]:
        for i in indices:
            sums.add({"loss": np.array(float(i))}, 2.0**-i, 1)
    weights = np.concatenate([p.block_weights() for p in parts])
    np.testing.assert_array_equal(weights, whole.block_weights())
    assert len(found) == min(shards, len(weights) if keep else batches)


@settings(max_examples=25, deadline=None)
@given(
    batches=st.integers(1, 9),
    shards=st.integers(2, 5),
    keep=st.sampled_from([0, 2, 4, 6]),
    reduction=st.sampled_from(["mean", "sum"]),
    limit=st.sampled_from([None, 5]),
)
def test_any_cut_gives_the_means_errors_and_blocks_of_the_whole(
    run, batches: int, shards: int, keep: int, reduction: str, limit: int | None
) -> None:
    options = {"keep_batches": keep, "max_batches": limit, "diagonal": 3, "measure": ("along",), "taus": [0.5]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one batch has no standard error
        whole, parts = (summarize(run, problem_of(make_batches(batches), reduction), shards=n, **options)
                        for n in (1, shards))  # fmt: skip
    used = min(batches, limit or batches)
    assert parts.attrs["units"] == 2 * len(cut(used, shards, keep))
    np.testing.assert_array_equal(parts.n_batches, used)
    assert dict(parts.sizes) == dict(whole.sizes)
    for name in whole.data_vars:
        size = float(np.nanmax(np.abs(whole[name].values), initial=0.0))
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-9, atol=1e-10 * size, err_msg=str(name))
    for name in ("direction_norm", "parameter_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-12)


def test_a_union_is_the_weighted_mean_of_its_shards(run) -> None:
    """Each shard as a problem of its own along one direction, put together by hand."""
    batches, keep = make_batches(9), 4
    checkpoint = ho.load_checkpoint(run.paths[0])
    cuts = cut(9, 2, keep)
    assert [(s.first, s.stop) for s in cuts] == [(0, 4), (4, 9)]
    model = make_model(seed=0)
    loss = F.cross_entropy(model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]))
    u = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))
    alone = [
        ho.summarize(problem_of(batches[s.first : s.stop]), 3, direction=u, checkpoint=checkpoint, progress=False)
        for s in cuts
    ]
    weights = [sum(SIZES[s.first : s.stop]) for s in cuts]
    union = summarize(run[:1], problem_of(batches), 3, keep_batches=keep, shards=2).isel(step=0)
    for name in ("loss", "D1", "D2", "D3"):
        mean = sum(w * ds[name].values for w, ds in zip(weights, alone, strict=True)) / sum(weights)
        np.testing.assert_allclose(union[name], mean, rtol=1e-10, atol=1e-15)
    np.testing.assert_array_equal(union.weight, [sum(SIZES[:4]), sum(SIZES[4:8]), SIZES[8]])


def test_a_shard_that_is_missing_is_computed_again_bit_for_bit_and_no_other(run, tmp_path, monkeypatch) -> None:
    options = {"keep_batches": 4, "shards": 3, "store": tmp_path / "store"}
    summarize(run, problem_of(make_batches(9)), **options)
    units = {p.name: p.read_bytes() for p in (tmp_path / "store" / "units").iterdir()}
    assert len(units) == 2 * 3 + 2  # a direction for each checkpoint
    work = summaries.Work(problem_of(make_batches(9)),
                          summaries.Settings(keep_batches=4, shards=3, self_check=False))  # fmt: skip
    key = work.steps(run)[1]["units"][1]
    assert key["shard"] == [1, 3]
    gone = tmp_path / "store" / "units" / f"{ho.store.container.digest_of(key)}.unit"
    gone.unlink()
    ds = ho.open_store(tmp_path / "store")
    np.testing.assert_allclose(ds.coverage, [1, 2 / 3])
    np.testing.assert_array_equal(ds.n_batches, [9, 0])  # a part of the data is not shown as the whole
    assert ds.D2.isnull().any(("group", "group2")).values.tolist() == [False, True]
    computed = []
    whole = summaries.Work.of_checkpoint
    monkeypatch.setattr(
        summaries.Work, "of_checkpoint", lambda w, *args: computed.append(args[3]["shard"]) or whole(w, *args)
    )
    summarize(run, problem_of(make_batches(9)), **options)
    assert computed == [[1, 3]]
    assert {p.name: p.read_bytes() for p in (tmp_path / "store" / "units").iterdir()} == units


def test_keys_tell_cuts_apart_and_one_shard_from_none() -> None:
    def work(n: int, **options) -> summaries.Work:
        return summaries.Work(problem_of(make_batches(5)), summaries.Settings(shards=n, **options))

    assert work(1).key("sha", []) == summaries.Work(problem_of(make_batches(5)), summaries.Settings()).key("sha", [])
    assert "direction_shards" not in work(1).key("sha", [])
    keys = [work(n).key("sha", [], k) for n in (1, 2, 3) for k in range(n)]
    directions = [work(n).direction_key("sha") for n in (1, 2, 3)]
    assert all(a != b for a, b in itertools.combinations([*map(str, keys), *map(str, directions)], 2))
    assert work(5).key("sha", []) == work(9).key("sha", [])  # no shard is empty
    assert work(2).direction_key("sha") == work(2, keep_batches=2).direction_key("sha")


def test_a_batch_that_fails_is_named_by_its_place_in_the_data_and_costs_its_shard(run, tmp_path) -> None:
    batches = make_batches(6)
    batches[4] = (batches[4][0] * 1e200, batches[4][1])
    problem = ho.Problem(make_model(), batches, batch_loss=lambda m, b: (m(b[0]) * b[0][:, :3]).square().mean(),
                         batch_size=lambda b: len(b[1]))  # fmt: skip
    options = {"direction": "weights", "shards": 3, "store": tmp_path / "store"}
    with pytest.raises(NumericsError, match="2 of 2 checkpoints failed") as caught:
        summarize(run, problem, **options)
    assert "batch 4" in caught.value.where
    np.testing.assert_allclose(ho.open_store(tmp_path / "store").coverage, 2 / 3)


def test_without_a_store_a_step_says_how_much_of_it_is_there(run, monkeypatch) -> None:
    whole = summaries.Work.of_checkpoint

    def failing(work, checkpoint, run, position, key, store):
        if position == 0 and key["shard"][0] == 1:
            raise CheckpointError("the disk went away")
        return whole(work, checkpoint, run, position, key, store)

    monkeypatch.setattr(summaries.Work, "of_checkpoint", failing)
    with pytest.warns(UserWarning, match="step 0 is NaN, with 2 of 3 shards of its data: the disk went away"):
        ds = summarize(run, problem_of(make_batches(6)), shards=3)
    np.testing.assert_array_equal(ds.n_batches, [0, 6])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shards": 0}, "shards must be a whole number"),
        ({"shards": 2.0}, "shards must be a whole number"),
        ({"shards": True}, "shards must be a whole number"),
        ({"shards": 2, "tolerance": 0.1}, "a tolerance stops one pass"),
        ({"shards": 2, "errors": "unconditional", "keep_batches": 4}, "unconditional errors look at all blocks"),
    ],
)
def test_what_excludes_shards_is_named(run, options: dict, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        summarize(run, problem_of(make_batches(4)), **options)


def test_a_gradient_over_other_data_is_cut_by_its_own_batches(run) -> None:
    other = make_batches(7, seed=3)

    def problem() -> ho.Problem:
        return ho.Problem(make_model(), make_batches(1), F.cross_entropy, direction_data=other)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        whole, parts = (summarize(run, problem(), shards=n) for n in (1, 3))
    work = summaries.Work(problem(), summaries.Settings(shards=3))
    assert (len(work.shards()), len(work.gradient_shards())) == (1, 3)
    assert work.key("sha", [])["direction_shards"] == 3
    for name in ("D1", "D2", "direction_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-10, atol=1e-15)


def test_a_study_asks_for_shards(tmp_path) -> None:
    spec = StudySpec.read(write_study(tmp_path / "s", "factories_of_shards", "shards = 2\n", steps=1))
    outcome = Outcome("s", tmp_path / "out")
    (ds,) = compute(spec, outcome, progress=False, say=lambda _: None).values()
    assert outcome.error is None
    assert (outcome.computed, outcome.units, ds.attrs["units"], ds.attrs["n_samples"]) == (2, 2, 2, 32)
