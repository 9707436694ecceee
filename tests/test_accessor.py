"""The accessor is thin: each verb is the analysis function, each plot the plot; torch stays out."""

import subprocess
import sys

import pytest
import xarray as xr

import hoanalysis  # noqa: F401, registers ds.ho
from hoanalysis import plots
from hoanalysis.analysis.coarsen import suggest_partition
from hoanalysis.analysis.compare import compare, differences
from hoanalysis.analysis.curvature import curvature
from hoanalysis.analysis.example import example
from hoanalysis.analysis.findings import findings
from hoanalysis.analysis.flatness import flatness
from hoanalysis.analysis.interactions import interactions
from hoanalysis.analysis.inverse import blocks, inverse
from hoanalysis.analysis.laplace import laplace
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.pruning import saliency
from hoanalysis.analysis.regularizer import regularizer
from hoanalysis.analysis.spectra import spectrum
from hoanalysis.analysis.steps import learning_rates
from hoanalysis.analysis.taylor import taylor
from hoanalysis.analysis.taylor_step import taylor_step
from hoanalysis.analysis.triples import triples
from hoanalysis.analysis.unsettled import unsettled


def test_verbs_are_the_analysis_functions():
    ds = example(steps=2)
    xr.testing.assert_identical(ds.ho.regularizer(), regularizer(ds))
    xr.testing.assert_identical(ds.ho.learning_rates("ridge", 0.5), learning_rates(ds, "ridge", 0.5))
    xr.testing.assert_identical(ds.ho.inverse("r", 2.0), inverse(ds, "r", 2.0))
    xr.testing.assert_identical(ds.ho.blocks("inverse")["WB"], blocks(ds, "inverse")["WB"])
    xr.testing.assert_identical(ds.ho.merge("layer"), merge(ds, "layer"))
    xr.testing.assert_identical(ds.ho.taylor(0.1, 2), taylor(ds, 0.1, 2))
    xr.testing.assert_identical(ds.ho.spectrum(), spectrum(ds))
    xr.testing.assert_identical(ds.ho.taylor_step(share=0.3), taylor_step(ds, share=0.3))
    xr.testing.assert_identical(ds.ho.curvature(), curvature(ds))
    xr.testing.assert_identical(ds.ho.compare(ds, (0, 10)), compare(ds, ds, (0, 10)))
    weights = ds.assign_attrs(direction="weights")
    xr.testing.assert_identical(weights.ho.flatness(), flatness(weights))
    xr.testing.assert_identical(weights.ho.laplace(2.0, 50), laplace(weights, 2.0, 50))
    xr.testing.assert_identical(weights.ho.saliency(), saliency(weights))
    assert ds.ho.differences(ds, (0, 10), top=3).equals(differences(compare(ds, ds, (0, 10)), 3))
    assert ds.ho.triples(2, distinct=False).equals(triples(ds, 2, distinct=False))
    assert ds.ho.unsettled(2).equals(unsettled(ds, 2))
    assert dict(ds.ho.suggest_partition(2, within="kind", epsilon=0.5)) == dict(
        suggest_partition(ds, 2, within="kind", epsilon=0.5)
    )
    assert ds.ho.interactions(3).equals(interactions(ds, 3))
    assert ds.ho.findings() == findings(ds)


def test_every_result_says_what_it_is_and_in_which_units():
    ds = example(steps=2)
    arrays = [ds.ho.regularizer(), ds.ho.inverse(), ds.ho.scale_free(), ds.ho.taylor(0.1), ds.ho.taylor_terms(0.1)]
    arrays += [ds.ho.spectrum(), ds.ho.null_groups(), *ds.ho.blocks().values()]
    for found in results(ds):
        arrays += found.data_vars.values()
    for array in arrays:
        assert array.attrs["long_name"], array.name
        assert "units" in array.attrs, array.name
        assert array.dims[0] == "step" or array.dims[0] == "order"


def results(ds):
    """Every verb that returns a Dataset."""
    weights = ds.assign_attrs(direction="weights").ho
    found = [ds.ho.learning_rates(), ds.ho.taylor_step(), ds.ho.shares(), ds.ho.curvature(), ds.ho.compare(ds)]
    return [*found, weights.flatness(), weights.saliency(), weights.laplace()]


def test_errors_say_what_they_are_conditional_on():
    ds = example(steps=2)
    free = ds.assign_attrs(standard_errors="unconditional")
    for found, other in zip(results(ds), results(free), strict=True):
        errors = [n for n in found.data_vars if str(n).endswith("_se")]
        assert errors
        assert all(found[n].attrs["conditional_on"] == "the direction u" for n in errors)
        assert not any("conditional_on" in other[n].attrs for n in errors)
    for verb in ("regularizer", "inverse", "scale_free", "spectrum"):
        name = f"{verb}_se"
        assert getattr(ds.ho, verb)()[name].attrs["conditional_on"] == "the direction u"
        assert "conditional_on" not in getattr(free.ho, verb)()[name].attrs


def test_results_can_be_stored(tmp_path):
    ds = example(steps=2)
    found = [*results(ds), ds.ho.merge("layer"), ds.ho.regularizer().to_dataset()]
    for i, one in enumerate(found):
        one.to_netcdf(tmp_path / f"{i}.nc", engine="h5netcdf")
        with xr.open_dataset(tmp_path / f"{i}.nc", engine="h5netcdf") as again:
            xr.testing.assert_allclose(again.load(), one)


def test_plots_are_found_by_name():
    ds = example()
    assert set(plots.__all__) <= set(dir(ds.ho.plot))
    assert ds.ho.plot.matrix(which="inverse").get_title().startswith("Inverse")
    with pytest.raises(AttributeError, match="did you mean 'matrix'"):
        ds.ho.plot.matrx  # noqa: B018


SCRIPT = """
import sys
sys.modules["torch"] = None  # importing torch raises
import hoanalysis
from hoanalysis.analysis.example import example
ds = example(steps=2)
ds.ho.learning_rates("cubic"), ds.ho.merge("layer"), ds.ho.findings()
for name in dir(ds.ho.plot):
    if not name.startswith("_"):
        getattr(ds.ho.plot, name)()
"""


def test_everything_works_where_importing_torch_raises():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
