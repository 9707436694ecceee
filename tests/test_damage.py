"""Two hundred random damages of every kind of file: the same numbers or a named error, and never a traceback."""

import shutil
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import hoanalysis as ho
from hoanalysis import cli
from hoanalysis.checkpoints import load_checkpoint
from hoanalysis.errors import HoError
from hoanalysis.study import StudySpec
from tests import damage

N = 200


def weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"fc.weight": torch.randn(30, 4, generator=g), "fc.bias": torch.randn(30, generator=g)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.row("C4", "C5")
def test_damaged_archives_of_torch_give_the_same_numbers_or_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(weights(), path)
    refused = 0
    for content in damage.at_random(path.read_bytes(), N, seed=1):
        path.write_bytes(content)
        try:
            read = load_checkpoint(path)
        except HoError as error:
            assert "a.pt" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert same(read.state_dict, weights())
    assert refused > N / 2


@pytest.mark.row("C4", "C5")
def test_damaged_safetensors_differ_where_the_bit_flipped_and_nowhere_else(tmp_path: Path) -> None:
    """The format has no checksum: a flip among the numbers changes one of them, and the digest tells."""
    path = tmp_path / "a.safetensors"
    save_file(weights(), path)
    whole, before = path.read_bytes(), load_checkpoint(path).sha256
    start = 8 + int.from_bytes(whole[:8], "little")
    changed = 0
    for content in damage.at_random(whole, N, seed=2):
        path.write_bytes(content)
        try:
            read = load_checkpoint(path)
        except HoError:
            continue
        assert len(content) == len(whole), "a truncated file was read"
        assert read.sha256 != before
        kept = {n: t for n, t in weights().items() if n in read.state_dict}  # a name may have another letter: see `fit`
        differing = sum(
            int((read.state_dict[n].view(torch.int32) != t.view(torch.int32)).sum()) for n, t in kept.items()
        )
        at = next(i for i in range(len(whole)) if whole[i] != content[i])
        assert differing == (1 if at >= start else 0)
        changed += differing
    assert changed > N / 8


@pytest.mark.row("C4", "C5")
def test_damaged_files_of_old_torch_are_read_as_another_digest_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=False)
    whole, before = path.read_bytes(), load_checkpoint(path).sha256
    for content in damage.at_random(whole, N, seed=3):
        path.write_bytes(content)
        try:
            read = load_checkpoint(path)
        except HoError:
            continue
        assert len(content) == len(whole), "a truncated file was read"
        assert read.sha256 != before


# ---- the store and its exports ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Path:
    """A study with its store and export."""
    from tests.conftest import write_study

    folder = tmp_path_factory.mktemp("damage")
    write_study(folder / "small", "factories_of_damage")
    done = CliRunner().invoke(cli.app, ["summarize", str(folder / "small"), "--out", str(folder / "out"), "-q"])
    assert done.exit_code == 0, done.output
    return folder


def assert_no_other_numbers(ds, good) -> None:
    """What is there is what was there, bit for bit; the rest is NaN and counted as missing."""
    assert set(ds.data_vars) <= set(good.data_vars)
    for i, covered in enumerate(ds.coverage.values):
        for name in ds.data_vars:
            a = ds[name].isel(step=i).values
            if covered == 1:
                np.testing.assert_array_equal(a, good[name].isel(step=i).values, err_msg=str(name))
            else:
                assert np.isnan(a).all() or not a.any(), name


@pytest.mark.row("S5")
@pytest.mark.filterwarnings("ignore::hoanalysis.store.core.StoreWarning")
def test_damaged_stores_give_no_other_numbers(computed: Path, tmp_path: Path) -> None:
    shutil.copytree(computed / "out" / "store", tmp_path / "store")
    good = ho.open_store(tmp_path / "store")
    files = sorted(p for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert {p.suffix for p in files} >= {".unit", ".json"}
    refused = short = 0
    for k in range(N):
        path = files[k % len(files)]
        whole = path.read_bytes()
        if not whole:  # the lock, given back
            continue
        path.write_bytes(
            next(damage.at_random(whole, 1 + k % 2, seed=k))
            if k % 2
            else damage.flipped(whole, 977 * k % (8 * len(whole)))
        )
        try:
            ds = ho.open_store(tmp_path / "store")
        except HoError:
            refused += 1
        else:
            short += int((ds.coverage.values < 1).sum())
            assert_no_other_numbers(ds, good)
        path.write_bytes(whole)
    assert refused > 10
    assert short > 50


@pytest.mark.row("S5")
def test_damaged_exports_are_refused_or_give_the_same_numbers(computed: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.nc"
    whole = (computed / "out" / "summaries.nc").read_bytes()
    path.write_bytes(whole)
    good, refused = ho.open_dataset(path), 0
    for content in damage.at_random(whole, N, seed=4):
        path.write_bytes(content)
        try:
            ds = ho.open_dataset(path)
        except HoError as error:
            assert "a.nc" in str(error)  # noqa: PT017
            refused += 1
        else:
            assert ds.identical(good)
    assert refused > 0.9 * N


# ---- studies and the command line -------------------------------------------------------------------------------


def test_damaged_studies_are_studies_or_sentences(computed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(computed / "small", folder)
    whole, refused = (folder / "study.toml").read_bytes(), 0
    says = tomllib.loads(whole.decode())
    meant = StudySpec.read(folder)
    for content in damage.at_random(whole, N, seed=5):
        (folder / "study.toml").write_bytes(content)
        try:
            spec = StudySpec.read(folder)
            spec.run(), spec.log(), spec.settings()
        except HoError:
            refused += 1
            continue
        # nothing that the file says is passed over: it is the same study, or it says something else
        assert (spec == meant) == (tomllib.loads(content.decode()) == says)
    assert refused > N / 4


@pytest.mark.parametrize("seed", range(60))
def test_the_command_line_has_a_sentence_for_any_damage(computed: Path, tmp_path: Path, seed: int) -> None:
    """One file of the study or its store, damaged in one way; then everything that can be asked of it."""
    shutil.copytree(computed, tmp_path / "all")
    study, out = tmp_path / "all" / "small", tmp_path / "all" / "out"
    files = [p for p in sorted((tmp_path / "all").rglob("*")) if p.is_file() and p.stat().st_size and p.suffix != ".py"]
    path = files[7 * seed % len(files)]
    path.write_bytes(list(damage.at_random(path.read_bytes(), 2, seed))[seed % 2])
    for arguments in (
        ["show", out / "summaries.nc"],
        ["show", out / "store"],
        ["summarize", study, "--out", out, "-q"],
    ):
        with warnings.catch_warnings(action="ignore"):
            result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), (path, result.exception)
        assert "Traceback" not in result.output
        assert "not foreseen" not in result.output, (path, result.output)
