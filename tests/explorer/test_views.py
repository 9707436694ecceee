"""What a state shows, against the verbs of `ds.ho` on merged Datasets and against plain numpy."""

import io
import json
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import Normalize
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

import hoanalysis as ho
from hoanalysis.analysis.example import example
from hoanalysis.errors import ArgumentError
from hoanalysis.explorer import State, figures
from hoanalysis.explorer.session import TAUS, Session

MERGED = [("tensor", None), ("layer", "layer"), ("kind", "kind"), ("blocks", 3)]


@pytest.fixture(scope="module")
def ds():
    return example(layers=3, size=3, steps=4)


def merged(ds, by):
    return ds if by is None else ds.ho.merge(by)


@pytest.mark.parametrize(("grouping", "by"), MERGED)
@pytest.mark.parametrize("step", [0, 20])
def test_every_matrix_with_its_errors_is_that_of_the_merged_dataset(ds, grouping, by, step):
    session, one = Session(ds), merged(ds, by).sel(step=step)
    state = State(step=step, grouping=grouping, n_blocks=3)
    h = session.view(state).shown
    assert_allclose(h.values, one.D2, rtol=1e-12)
    assert_allclose(h.errors, one.D2_se, rtol=1e-9)
    for regularization, epsilon in ((None, 1.0), ("ridge", 0.3), ("r", 0.5), ("cubic", 2.0)):
        state = State(step=step, grouping=grouping, n_blocks=3, matrix="inverse", regularization=regularization,
                      epsilon=epsilon)  # fmt: skip
        found, expected = session.view(state).shown, one.ho.inverse(regularization, epsilon)
        assert_allclose(found.values, expected, rtol=1e-9)
        assert_allclose(found.errors, expected.inverse_se, rtol=1e-6)
        rates, told = session.rates(state)[0][1], one.ho.learning_rates(regularization, epsilon)
        assert_allclose(rates.values, told.learning_rates, rtol=1e-9)
        assert_allclose(rates.errors, told.learning_rates_se, rtol=1e-6)
    free = session.view(State(step=step, grouping=grouping, n_blocks=3, matrix="scale_free")).shown
    assert_allclose(free.values, one.ho.scale_free(), rtol=1e-12)
    assert_allclose(free.errors, one.ho.scale_free().scale_free_se, rtol=1e-8)
    slope = session.view(State(step=step, grouping=grouping, n_blocks=3, order=1)).shown
    assert_allclose(slope.values, one.D1, rtol=1e-12)
    assert_allclose(slope.errors, one.D1_se, rtol=1e-9)


@pytest.mark.parametrize(("grouping", "by"), MERGED)
def test_slices_of_the_third_order_never_make_the_merged_tensor_and_are_its_slices(ds, grouping, by):
    from hoanalysis.analysis.triples import third_slice

    one, session = merged(ds, by).sel(step=10), Session(ds)
    for u, label in enumerate(one.group.values.tolist()):
        state = State(step=10, order=3, slices=(label,), grouping=grouping, n_blocks=3)
        raw, free = session.view(state).shown, session.view(state.but(matrix="scale_free")).shown
        assert_allclose(raw.values, one.D3[:, :, u], rtol=1e-11, atol=1e-14)
        assert_allclose(raw.errors, one.D3_se[:, :, u], rtol=1e-8)
        expected = third_slice(one, u, scale_free=True)
        assert_allclose(free.values, expected, rtol=1e-11, atol=1e-13)
        assert_allclose(free.errors, expected.third_se, rtol=1e-7)


def test_a_slice_of_the_fourth_order_by_hand():
    small = example(layers=2, size=2, steps=2)
    n = small.sizes["group"]
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, n, n, n, n))
    four = small.assign_coords(group4=small.group.values).assign(
        D4=(("step", "group", "group2", "group3", "group4"), values)
    )
    labels = four.group.values.tolist()
    shown = Session(four).view(State(step=0, order=4, slices=(labels[1], labels[3]), matrix="scale_free")).shown
    size = np.sqrt(np.abs(np.diagonal(four.D2[0].values)))
    assert_allclose(shown.values, values[0, :, :, 1, 3] / np.outer(size, size) / size[1] / size[3], rtol=1e-12)


@pytest.mark.parametrize(("grouping", "by"), MERGED)
def test_the_taylor_panel_is_the_verb_along_minus_the_rates(ds, grouping, by):
    one = merged(ds, by).sel(step=30)
    state = State(step=30, grouping=grouping, n_blocks=3, regularization="cubic")
    values, errors = Session(ds).along(state)
    rates = one.ho.learning_rates("cubic").learning_rates
    for order in (1, 2, 3):
        for k in (0, 7, 20, 40):
            expected = one.ho.taylor(-TAUS[k] * rates, order)
            assert_allclose(values[order - 1, k], expected.item(), rtol=1e-9, atol=1e-14)
            assert_allclose(errors[order - 1, k], expected.taylor_se.item(), rtol=1e-7, atol=1e-14)


def test_without_any_rate_there_is_no_prediction(ds):
    """Not one of no change: every rate is unknown where no group has an effect."""
    values, errors = Session(ds.assign(D1=0 * ds.D1, D2=0 * ds.D2)).along(State(step=30))
    assert np.isnan(values).all()
    assert np.isnan(errors).all()


def test_differences_are_those_of_compare_paired_over_blocks(ds):
    ds = ds.assign_attrs(provenance=json.dumps({"data": "the same"}))
    expected = ds.ho.compare(ds, step=(10, 30))
    state = State(step=30, compare_run="this run", compare_step=10)
    shown = Session(ds).view(state).shown
    assert shown.how == "paired by block"
    assert_allclose(shown.values, expected.D2, rtol=1e-12)
    assert_allclose(shown.errors, expected.D2_se, rtol=1e-8)
    free = Session(ds, {"other": ds.isel(step=[1])}).view(
        state.but(matrix="scale_free", compare_run="other", compare_step=None)
    )
    assert free.reference == "other, step 10"
    assert_allclose(free.shown.values, expected.scale_free, rtol=1e-10)
    assert_allclose(free.shown.errors, expected.scale_free_se, rtol=1e-7)


def test_differences_of_other_data_add_their_errors_in_squares(ds):
    other = example(layers=3, size=3, steps=4, seed=5).assign_attrs(provenance=json.dumps({"data": "other"}))
    shown = Session(ds, {"other": other}).view(State(step=0, compare_run="other")).shown
    assert shown.how == "independent"
    assert_allclose(shown.errors, np.hypot(ds.D2_se[0], other.D2_se[0]))


def test_differences_of_the_same_data_in_blocks_of_other_weights_are_not_paired(ds):
    """As many blocks with other weights are other blocks."""
    ds = ds.assign_attrs(provenance=json.dumps({"data": "the same"}))
    weight = ds.weight.values.copy()
    weight[:, :2] = weight[:, 1::-1]
    assert not np.array_equal(weight, ds.weight)
    other = ds.assign(weight=(ds.weight.dims, weight), D2_se=2 * ds.D2_se)
    session = Session(ds, {"other": other, "alike": ds})
    shown = session.view(State(step=0, compare_run="other", compare_step=10)).shown
    assert shown.how == "independent"
    assert_allclose(shown.errors, np.hypot(ds.D2_se[0], 2 * ds.D2_se[1]))
    assert session.view(State(step=0, compare_run="alike", compare_step=10)).shown.how == "paired by block"


def test_blocks_are_rows_and_columns_of_their_kinds(ds):
    session, one = Session(ds), ds.sel(step=0)
    assert session.offer(State()).blocks == ("all", "WW", "BB", "WB")
    weights, biases = (np.flatnonzero(one.kind.values == k) for k in ("weight", "bias"))
    shown = session.view(State(step=0, block="WB")).shown
    assert_allclose(shown.values, one.D2.values[np.ix_(weights, biases)])
    assert list(shown.rows) == one.group.values[weights].tolist()
    assert list(shown.columns) == one.group.values[biases].tolist()


def test_the_mask_hides_what_two_errors_do_not_tell_from_zero(ds):
    one = ds.sel(step=0)
    session = Session(ds)
    shown = session.view(State(step=0, mask=True)).shown
    doubtful = np.abs(one.D2.values) < 2 * one.D2_se.values
    assert doubtful.any()
    assert_array_equal(shown.values == 0, doubtful)
    errors = np.abs(shown.values) / np.linspace(1.99, 2.01, len(shown.values))  # on both sides of two
    assert_array_equal(replace(shown, errors=errors).settled, (np.abs(shown.values) >= 2 * errors) | doubtful)


def test_a_shared_scale_ends_at_the_largest_entry_of_the_run(ds):
    limit = Session(ds).view(State(step=0, shared=True)).limit
    assert_allclose(limit, np.abs(ds.D2).max())


def test_a_shared_scale_of_a_block_ends_at_the_largest_entry_of_that_block(ds):
    for block, rows, columns in (("BB", "bias", "bias"), ("WB", "weight", "bias")):
        part = ds.D2.values[:, ds.kind.values == rows][:, :, ds.kind.values == columns]
        assert np.abs(part).max() < 0.9 * np.abs(ds.D2.values).max()
        session = Session(ds)
        assert_allclose(session.view(State(step=0, shared=True, block=block)).limit, np.abs(part).max())
        assert_allclose(session.view(State(step=0, shared=True)).limit, np.abs(ds.D2).max())


def test_trajectories_are_the_entries_at_every_step(ds):
    label = ds.group.values.tolist()
    state = State(step=0, entries=((label[0], label[3]), (label[2], label[2])), matrix="scale_free")
    steps, series = Session(ds).trajectories(state)
    assert steps == [0, 10, 20, 30]
    free = ds.ho.scale_free()
    assert_allclose(series[0].values, free[:, 0, 3])
    assert_allclose(series[0].errors, free.scale_free_se[:, 0, 3], rtol=1e-8)
    compared = State(step=30, entries=((label[0], label[3]),), compare_run="this run", compare_step=10)
    values = Session(ds).trajectories(compared)[1][0].values  # of the run itself, whatever it is compared with
    assert_allclose(values, ds.D2[:, 0, 3])
    third = State(step=0, order=3, entries=((label[0], label[1], label[4]),))
    assert_allclose(Session(ds).trajectories(third)[1][0].values, ds.D3[:, 0, 1, 4])


def test_the_pattern_merges_what_it_matches(ds):
    by = {"first": ["layer0.weight", "layer0.bias"], "*.bias": ["layer1.bias", "layer2.bias"]}
    one = ds.ho.merge(by).sel(step=20)
    shown = Session(ds).view(State(step=20, grouping="pattern", pattern="first=layer0*, *.bias")).shown
    assert list(shown.rows) == one.group.values.tolist()
    assert_allclose(shown.values, one.D2, rtol=1e-12)
    assert_allclose(shown.errors, one.D2_se, rtol=1e-9)


def test_the_suggested_groups_are_those_of_the_verb(ds):
    shown = Session(ds).view(State(step=20, grouping="suggested", n_blocks=3)).shown
    assert_allclose(shown.values, ds.ho.merge(ds.ho.suggest_partition(3)).sel(step=20).D2, rtol=1e-10)


def test_state_survives_json():
    state = State(step=120, order=3, slices=("a",), entries=(("a", "b", "a"),), epsilon=0.5, regularization="r")
    assert State.of(json.loads(json.dumps(state.chosen()))) == state
    assert State.of(State().chosen()) == State()


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"matrx": "H"}, "matrix"),
        ({"matrix": "inv"}, "inverse"),
        ({"order": 0}, "order"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"slices": "fc1"}, "lists of group labels"),
        ({"grouping": "layers"}, "layer"),
    ],
)
def test_a_wrong_choice_is_named(ds, choice, words):
    with pytest.raises(ArgumentError, match=words):
        ho.explore(ds, state=choice)


def test_the_sentence_tells_the_numbers(ds):
    one = ds.sel(step=10)
    text = ho.explore(ds, state={"step": 10}).sentence
    off = np.abs(np.triu(one.D2.values, 1))
    i, j = np.unravel_index(off.argmax(), off.shape)
    names = one.group.values
    assert f"{names[i]} × {names[j]}: {one.D2.values[i, j]:.4g} ± {one.D2_se.values[i, j]:.2g}" in text
    assert f"The loss is {one.loss.item():.4g} ± {one.loss_se.item():.2g}" in text
    upper = np.triu_indices(6)
    doubtful = int((np.abs(one.D2.values) < 2 * one.D2_se.values)[upper].sum())
    assert f"{doubtful} of 21 entries" in text


def colours(picture: bytes) -> np.ndarray:
    """The colour of each cell of the matrix in a picture, off its middle, where dots are."""
    image = Image.open(io.BytesIO(picture))
    left, top, right, bottom, rows, columns = (float(x) for x in image.text["Cells"].split())
    pixels = np.asarray(image.convert("RGB"))
    y = (top + (np.arange(rows) + 0.3) * (bottom - top) / rows).astype(int)
    x = (left + (np.arange(columns) + 0.3) * (right - left) / columns).astype(int)
    return pixels[np.ix_(y, x)]


@pytest.mark.parametrize("step", [0, 30])
def test_the_picture_holds_the_colours_of_the_numbers(ds, step):
    picture = figures.panel(Session(ds), State(step=step, scale="linear"), "matrix")
    values = ds.sel(step=step).D2.values
    top = np.abs(values).max()
    expected = matplotlib.colormaps["RdBu_r"](Normalize(-top, top)(values))[..., :3] * 255
    assert np.abs(colours(picture) - expected).max() <= 2


def test_the_exported_line_makes_the_exported_picture(ds):
    explorer = ho.explore(ds, state={"step": 20, "order": 3, "matrix": "scale_free", "grouping": "layer", "mask": True})
    picture, line = explorer.export()
    namespace = {"ho": ho, "ds": ds}
    figure = eval(line, namespace)
    again = Image.open(io.BytesIO(figures.png(figure)))
    assert_array_equal(np.asarray(again), np.asarray(Image.open(io.BytesIO(picture))))
    other = ho.explore(ds, state={"step": 20}).export()[0]
    assert (
        np.asarray(again).shape != np.asarray(Image.open(io.BytesIO(other))).shape
        or (np.asarray(again) != np.asarray(Image.open(io.BytesIO(other)))).any()
    )


def test_the_exported_line_opens_the_file_that_was_given(ds, tmp_path):
    from hoanalysis.store import export

    path = export(ds, tmp_path / "run.nc")
    explorer = ho.explore(path, state={"step": 10, "matrix": "inverse"})
    picture, line = explorer.export()
    figure = eval(line, {"ho": ho})
    assert_array_equal(
        np.asarray(Image.open(io.BytesIO(figures.png(figure)))), np.asarray(Image.open(io.BytesIO(picture)))
    )


# ---- rows W of the bad inputs: a message or a picture, never a traceback


def all_views(ds, **state):
    explorer = ho.explore(ds, state=state)
    assert figures.png(explorer.figure())
    for name in ("matrix", "rates", "trajectories", "taylor"):
        assert figures.panel(explorer.session, State.of(explorer.state), name)
    return explorer.sentence


def test_w2_one_group(ds):
    assert "1 group" in all_views(ds.ho.merge(1))
    for matrix in ("inverse", "scale_free"):
        all_views(ds.ho.merge(1), matrix=matrix)


def test_w2_no_checkpoint(ds):
    assert "no checkpoints" in all_views(ds.isel(step=[]))


def test_w2_nothing_but_nan(ds):
    empty = ds.where(ds.step == 0)
    assert "This checkpoint is not computed." in all_views(empty, step=20)
    assert "Nothing here is a number" in all_views(ds.assign(D2=ds.D2 * np.nan), step=20)
    for order in (1, 3):
        all_views(empty, step=20, order=order)
    all_views(empty, step=20, shared=True, compare_run="this run", compare_step=0)


def test_w2_without_blocks_and_without_the_third_order(ds):
    bare = ds[["loss", "D1", "D2"]]
    assert "No standard errors are kept." in all_views(bare)
    assert "D3 is not stored in full" in " ".join(Session(bare).view(State(order=3)).notes)
    all_views(bare, regularization="r")
    all_views(ds[["loss", "D1"]])


def test_w3_a_million_entries_are_decimated_and_the_picture_says_so():
    rng = np.random.default_rng(0)
    n = 1000
    big = example(layers=1).isel(group=[0], group2=[0], group3=[0])[["loss", "D1", "D2"]]
    names = [f"g{i}" for i in range(n)]
    root = rng.normal(size=(n, 20))
    big = big.drop_dims(["group", "group2", "group3"], errors="ignore").assign_coords(group=names, group2=names)
    big = big.assign(D1=("group", rng.normal(size=n)), D2=(("group", "group2"), root @ root.T + np.eye(n)))
    explorer = ho.explore(big)
    values = explorer.view.shown.values
    errors = rng.random((n, n))
    small, own, rows, _, k = figures._decimated(values, errors, names, names)
    assert (k, small.shape, len(rows)) == (5, (200, 200), 200)
    for i, j in ((1, 2), (0, 0), (199, 31)):
        at = (slice(5 * i, 5 * i + 5), slice(5 * j, 5 * j + 5))
        largest = np.abs(values[at]).argmax()
        assert (small[i, j], own[i, j]) == (values[at].flat[largest], errors[at].flat[largest])
    figure = explorer.figure()
    assert any("5 × 5" in ax.get_xlabel() for ax in figure.axes)
