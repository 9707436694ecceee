import numpy as np
import pytest

from hoanalysis.analysis.example import example
from hoanalysis.analysis.merge import merge
from hoanalysis.analysis.spectra import spectrum
from hoanalysis.errors import SchemaError


def test_eigenvalues_of_the_compression():
    ds = example(2, steps=2)
    for i in range(2):
        norm = ds.direction_norm.values[i]
        expected = np.linalg.eigvals(ds.D2.values[i] / norm[:, None] / norm[None, :])
        np.testing.assert_allclose(spectrum(ds).values[i], np.sort(expected.real)[::-1], rtol=1e-10)


def test_discrete_partition_has_the_spectrum_of_the_hessian_and_merging_interlaces():
    ds = example(2, size=1, layers=4)  # every group is one parameter
    u = np.sqrt(ds.D1.values)  # D1_s = g_s U^s = (U^s)^2 along the gradient
    hessian = np.linalg.eigvalsh(ds.D2.values / np.outer(u, u))
    np.testing.assert_allclose(np.abs(spectrum(ds).values).max(), np.abs(hessian).max(), rtol=1e-9)
    coarse = spectrum(merge(ds, 3)).values
    full = spectrum(ds).values
    assert full[-1] - 1e-12 <= coarse[-1]
    assert coarse[0] <= full[0] + 1e-12


def test_errors_are_a_delete_one_jackknife():
    ds = example(2)
    w, total, n, norm = ds.weight.values, ds.weight.values.sum(), ds.sizes["batch"], ds.direction_norm.values
    squares = 0.0
    for b in range(n):
        keep = np.arange(n) != b
        other = ds.D2_batch.values[keep].sum(0) / w[keep].sum() / np.outer(norm, norm)
        squares = squares + ((total - w[b]) / total * (np.linalg.eigvalsh(other)[::-1] - spectrum(ds).values)) ** 2
    np.testing.assert_allclose(spectrum(ds).spectrum_se.values, np.sqrt(n / (n - 1) * squares), rtol=1e-8)


def test_zero_directions_and_missing_checkpoints():
    ds = example(steps=2)
    norm = ds.direction_norm.values.copy()
    norm[0, 1] = 0.0
    ds = ds.assign_coords(direction_norm=(("step", "group"), norm))
    ds.D2[1] = np.nan
    found = spectrum(ds).values
    assert np.isfinite(found[0]).tolist() == [True, True, True, False]
    assert np.isnan(found[1]).all()
    with pytest.raises(SchemaError, match="direction_norm"):
        spectrum(ds.drop_vars("direction_norm"))
