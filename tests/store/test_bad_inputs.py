"""The rows of group S of the table of bad inputs, and C5 and C19, as far as they are the store's."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import xarray as xr

from hoanalysis.errors import ArgumentError, CheckpointError, StoreError
from hoanalysis.store import Store, StoreWarning, container, open_store, unlock
from hoanalysis.store import core as core_module
from tests.store import workload
from tests.store.faults import ROOT, Job, Server


def failing(number: int):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EIO, "the disk reports an input/output error"),
        (errno.EFBIG, "a file would exceed the file-size limit"),
        (errno.ESTALE, "the network file system lost the folder"),
    ],
)
def test_S1_the_disk_fails(folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str) -> None:
    with Store.open(folder, mode="w") as store:
        store.publish({"a": 0}, workload.unit(0))
        monkeypatch.setattr(os, "write", failing(number))
        with pytest.raises(StoreError) as raised:
            store.publish({"a": 1}, workload.unit(1))
        monkeypatch.undo()
        error = raised.value
        assert error.what == f"cannot publish a unit: {sentence}"
        assert error.where.endswith(".unit")
        assert error.do
        assert error.kept == f"this unit was not published; 1 finished units are kept in {folder}"
        assert store.read({"a": 1}) is None
        assert list((folder / "tmp").iterdir()) == []
        store.publish({"a": 1}, workload.unit(1))  # the same handle goes on when the cause is gone


def test_S1_reading_from_a_failing_disk_is_an_error_and_no_quarantine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input/output error may pass; taking the unit for damaged would throw it away."""
    with Store.open(folder, mode="w") as store:
        store.publish({"a": 0}, workload.unit(0))
        monkeypatch.setattr(Path, "read_bytes", failing(errno.EIO))
        with pytest.raises(StoreError, match="cannot read a unit: the disk reports an input/output error"):
            store.read({"a": 0})
        monkeypatch.undo()
        assert store.read({"a": 0}) is not None


def test_S1_a_file_size_limit(server: Server, quiet: dict[str, bytes], folder: Path) -> None:
    end = server.run(Job(str(folder), file_size=4000))
    assert end.status == 3
    assert "file-size limit" in end.error
    assert list((folder / "tmp").iterdir()) == []
    workload.run(folder)
    assert workload.snapshot(folder) == quiet


def test_S1_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 200 kB in memory: units are published until it is full; what was acknowledged is there."""
    program = f"""
import sys
from pathlib import Path
from tests.store import workload
from hoanalysis.errors import StoreError
done = []
folder = Path({str(tmp_path)!r}) / "disk" / "store"
try:
    workload.run(folder, done.append, units=1000)
except StoreError as error:
    print(error.what)
from hoanalysis.store import Store
store = Store.open(folder)
assert all(store.read(workload.key(int(k))).identical(workload.unit(int(k))) for k in done if k.isdigit())
print(len(done), len(store.keys()), list((folder / "tmp").iterdir()))
"""
    (tmp_path / "disk").mkdir()
    (tmp_path / "program.py").write_text(program)
    mount = f"mount -t tmpfs -o size=200k tmpfs '{tmp_path}/disk'"
    run = f"cd '{ROOT}' && PYTHONPATH=\"$PWD:$PYTHONPATH\" '{os.sys.executable}' '{tmp_path}/program.py'"
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-Urm", "sh", "-c", mount], check=False).returncode
    ):
        pytest.skip("a file system cannot be mounted here")
    out = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", f"{mount} && {run}"], stdout=subprocess.PIPE, text=True, check=True
    )
    sentence, counts = out.stdout.splitlines()
    assert sentence == "cannot publish a unit: the disk is full"
    acknowledged, units, left = counts.split(maxsplit=2)
    assert int(acknowledged) == int(units) + 1 > 3  # the plan is acknowledged too
    assert left == "[]"


def test_S1_a_read_only_folder_is_told_before_computing(server: Server, folder: Path) -> None:
    """Another user may read the store, and learns at once that writing will not do."""
    workload.run(folder)
    me = os.getuid()
    for top, _, _ in os.walk(folder.parent.parent):
        os.chmod(top, 0o555)
    try:
        read = server.run(Job(str(folder), task="read", user=0 if me else 65534))
        write = server.run(Job(str(folder), user=0 if me else 65534))
    finally:
        for top, _, _ in os.walk(folder.parent.parent):
            os.chmod(top, 0o755)
    assert (read.status, read.error) == (0, "")
    assert write.status == 3
    assert write.error.startswith("cannot lock the store: permission denied")
    assert write.acks == []


def test_S1_a_place_that_cannot_hold_a_store(server: Server, folder: Path) -> None:
    os.chmod(folder.parent.parent, 0o755)
    os.chmod(folder.parent, 0o555)
    end = server.run(Job(str(folder), user=0 if os.getuid() else 65534))
    os.chmod(folder.parent, 0o755)
    assert end.status == 3
    assert end.error.startswith("cannot open the store: permission denied")


def test_S3_a_second_writer_is_told_who_is_the_first(server: Server, folder: Path) -> None:
    acks = str(folder.parent.parent / "acks")
    pid = server.start(Job(str(folder), task="hold", acks=acks))
    while not Path(acks).read_text():
        time.sleep(0.001)
    with pytest.raises(StoreError, match=rf"another writer holds this store: process {pid} on {os.uname().nodename}"):
        Store.open(folder, mode="w")
    with pytest.raises(StoreError, match="another writer holds this store"):
        unlock(folder)
    assert Store.open(folder, mode="r").keys() == []  # --read-only works
    os.kill(pid, 9)
    server.end()
    Store.open(folder, mode="w").close()  # S4: of a dead process here, taken over silently


def test_S3_the_same_process_is_no_exception(folder: Path) -> None:
    with Store.open(folder, mode="w"), pytest.raises(StoreError, match=f"process {os.getpid()} on"):
        Store.open(folder, mode="w")
    Store.open(folder, mode="w").close()


def test_S3_a_handle_that_may_not_write_says_why(folder: Path) -> None:
    with Store.open(folder, mode="w") as store:
        pass
    with pytest.raises(StoreError, match="it was closed"):
        store.publish({"a": 1}, workload.unit(0))
    with pytest.raises(StoreError, match="it was opened to read"):
        Store.open(folder).register("study", {})
    assert Store.open(folder).keys() == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_S4_a_forked_child_does_not_keep_the_lock(folder: Path) -> None:
    """An orphaned worker must not block the resume, nor may it write."""
    store = Store.open(folder, mode="w")
    ready, go = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        try:
            store.publish({"a": 1}, workload.unit(0))
            os.write(ready[1], b"published")
        except StoreError as error:
            os.write(ready[1], error.why.encode())
        os.read(go[0], 1)
        os._exit(0)
    assert b"forked child" in os.read(ready[0], 1000)
    with pytest.raises(StoreError, match="another writer"):  # the child's end did not end the parent's lock
        Store.open(folder, mode="w")
    store.close()
    Store.open(folder, mode="w").close()  # although the child lives
    os.write(go[1], b"!")
    os.waitpid(pid, 0)
    for fd in (*ready, *go):
        os.close(fd)


def test_S4_a_lock_left_by_another_host(folder: Path) -> None:
    workload.run(folder)
    (folder / "lock").write_text(json.dumps({"pid": 12, "host": "far.example", "boot": "other"}))
    with pytest.raises(StoreError) as raised:
        Store.open(folder, mode="w")
    assert raised.value.what == "this store was locked by process 12 on far.example, another host, and not given back"
    assert "unlock" in raised.value.do
    workload.check_acknowledged(folder, ["plan"])  # readers do not care
    assert unlock(folder) == "cleared the lock of process 12 on far.example"
    workload.run(folder)


def test_S4_nothing_to_unlock(folder: Path) -> None:
    with pytest.raises(StoreError, match="no lock to clear"):
        unlock(folder)
    workload.run(folder)
    (folder / "lock").write_text(json.dumps({"pid": 12, "host": os.uname().nodename}))
    assert unlock(folder).startswith("nothing to unlock")
    (folder / "lock").write_bytes(b"\0\0\0")  # a power loss
    workload.run(folder)


def test_S6_a_changed_study_shows_the_difference_and_mixes_nothing(folder: Path) -> None:
    with Store.open(folder, mode="w") as store:
        assert store.plan() is None
        assert store.register("study", workload.plan(order=2)) == []
        assert store.register("study", workload.plan(order=2)) == []
        changed = {"study": {"order": 3, "direction": "gradient", "data": {"seed": 1}}, "units": [{"other": 1}]}
        assert store.register("study", changed) == ["study.data: absent -> {'seed': 1}", "study.order: 2 -> 3"]
        assert store.plan("study") == changed
        assert store.register("study", workload.plan(order=2)) == [
            "study.data: {'seed': 1} -> absent",
            "study.order: 3 -> 2",
        ]
        assert store.plan("study") == workload.plan(order=2)  # the newest, although its content is that of the first
        assert len(list((folder / "plans").iterdir())) == 3


def test_S6_several_studies_have_to_be_named(folder: Path) -> None:
    with Store.open(folder, mode="w") as store:
        for name in ("by layer", "a/b-000001", "ü"):
            store.register(name, {"study": {"name": name}, "units": []})
        assert store.plan_names() == sorted(["by layer", "a/b-000001", "ü"])
        assert store.plan("a/b-000001") == {"study": {"name": "a/b-000001"}, "units": []}
        with pytest.raises(StoreError, match="this store holds 3 studies"):
            store.plan()
        with pytest.raises(StoreError, match=r"did you mean 'by layer'\?"):
            store.plan("by layr")
        for bad in ("", "x" * 250):
            with pytest.raises(ArgumentError, match="name of a study"):
                store.register(bad, {})
        with pytest.raises(ArgumentError, match="a plan must be a JSON document"):
            store.register("bad", {"x": {1}})


def test_S5_a_damaged_plan_is_registered_anew_and_no_older_one_stands_in(folder: Path) -> None:
    with Store.open(folder, mode="w") as store:
        store.register("study", workload.plan(order=2))
        store.register("study", workload.plan(order=3))
        newest = max((folder / "plans").iterdir())
        newest.write_bytes(newest.read_bytes()[:-2])
        with pytest.raises(StoreError, match="the newest plan of the study 'study' is damaged"):
            store.plan("study")
        with pytest.warns(StoreWarning, match="quarantine"):
            assert store.register("study", workload.plan(order=3)) == ["study.order: 2 -> 3"]
        assert store.plan("study") == workload.plan(order=3)


def test_S7_a_store_of_a_newer_version_is_read_and_not_written(folder: Path) -> None:
    workload.run(folder)
    (folder / "store.json").write_text('{"format": "hoanalysis-store", "version": 2, "more": 1}')
    new = folder / "units" / f"{container.digest_of({'new': 1})}.unit"
    new.write_bytes(b"hoanalysis-unit 2 ...")
    before = workload.snapshot(folder)
    with pytest.raises(StoreError, match="version 2, written by a newer hoanalysis, and this one writes version 1"):
        Store.open(folder, mode="w")
    with pytest.warns(StoreWarning, match="newer version"):
        store = Store.open(folder)
    xr.testing.assert_identical(store.read(workload.KEYS[0]), workload.unit(0))
    with pytest.warns(StoreWarning, match="newer version"):
        assert store.read({"new": 1}) is None
    assert workload.snapshot(folder) == before


def test_S8_too_many_units_are_advised_against(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "_MANY_UNITS", 3)
    plan = {"study": {}, "steps": [{"units": [{"a": 1}, {"a": 2}]}] * 2}
    advice = "asks for 4 units, one file each: larger data shards make fewer"
    with Store.open(folder, mode="w") as store, pytest.warns(StoreWarning, match=advice):
        store.register("study", plan)


def test_S8_no_inode_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC with room for bytes is another trouble, with another remedy."""
    state = os.statvfs(folder.parent)
    fields = list(state)
    fields[5:8] = [1000, 0, 0]  # f_files, f_ffree, f_favail
    with Store.open(folder, mode="w") as store:
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
        monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(StoreError, match="inodes are used up") as raised:
            store.publish({"a": 1}, workload.unit(0))
        assert "larger data shards" in raised.value.do


def test_S9_nothing_is_appended_so_labels_cannot_be_reordered(folder: Path) -> None:
    turned = workload.unit(0).isel(group=slice(None, None, -1))
    with Store.open(folder, mode="w") as store:
        store.publish({"a": 1}, workload.unit(0))
        store.publish({"a": 1}, turned)  # dropped
        store.publish({"a": 2}, turned)
        xr.testing.assert_identical(store.read({"a": 1}), workload.unit(0))
        xr.testing.assert_identical(store.read({"a": 2}), turned)


def test_S10_what_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "zarr").mkdir()
    (tmp_path / "zarr" / "zarr.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch1.safetensors").write_text("")
    (tmp_path / "file.nc").write_bytes(b"\x89HDF\r\n\x1a\n")
    cases = {
        "zarr": "it is a Zarr folder",
        "run": "it holds 'epoch1.safetensors'",
        "file.nc": "it is an HDF5 or netCDF-4 file",
    }
    for name, why in cases.items():
        before = workload.snapshot(tmp_path / name)
        for mode in ("r", "w"):
            with pytest.raises(
                StoreError, match=r"this folder is not a store|this is a file, not the folder"
            ) as raised:
                Store.open(tmp_path / name, mode=mode)  # type: ignore[arg-type]
            assert why in raised.value.why
        assert workload.snapshot(tmp_path / name) == before
    with pytest.raises(StoreError, match=r"did you mean 'zarr'\?"):
        Store.open(tmp_path / "zar")
    with pytest.raises(ArgumentError, match="mode 'a' is unknown"):
        Store.open(tmp_path / "zarr", mode="a")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "{}", "[]", "\0\0\0", '{"format": "zarr", "version": 1}'])
def test_S10_a_manifest_that_is_none(folder: Path, content: str) -> None:
    workload.run(folder)
    (folder / "store.json").write_text(content)
    for mode in ("r", "w"):
        with pytest.raises(StoreError, match="the manifest of this store is damaged") as raised:
            Store.open(folder, mode=mode)  # type: ignore[arg-type]
    (folder / "store.json").write_text(raised.value.why.removeprefix("it should read "))
    workload.run(folder)


def test_S10_an_empty_folder_becomes_a_store(folder: Path, quiet: dict[str, bytes]) -> None:
    folder.mkdir()
    workload.run(folder)
    assert workload.snapshot(folder) == quiet


def test_S11_clocks_time_zones_and_dates_of_files_do_not_matter(
    folder: Path, quiet: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "C")
    time.tzset()
    workload.run(folder)
    assert workload.snapshot(folder) == quiet
    with Store.open(folder, mode="w") as store:
        store.register("study", workload.plan(order=3))
        for age, path in enumerate(sorted((folder / "plans").iterdir())):
            os.utime(path, (10**9 - age, 10**9 - age))  # the newest has the oldest date
        assert store.plan("study") == workload.plan(order=3)


def test_C5_a_flipped_bit_in_a_stored_direction(folder: Path) -> None:
    """safetensors has no checksum: the container's digest stands in."""
    workload.run(folder)
    path = folder / "units" / f"{container.digest_of(workload.DIRECTION)}.unit"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.warns(StoreWarning, match="its digest is not that of its content"):
        assert Store.open(folder).read_arrays(workload.DIRECTION) is None


def test_C19_a_checkpoint_replaced_meanwhile_discards_the_unit(folder: Path) -> None:
    seen = []

    def check() -> None:
        (temporary,) = (folder / "tmp").iterdir()
        seen.append(temporary.stat().st_size)
        assert list((folder / "units").iterdir()) == []
        raise CheckpointError("the checkpoint changed while it was analysed")

    with Store.open(folder, mode="w") as store:
        with pytest.raises(CheckpointError):
            store.publish({"a": 1}, workload.unit(0), check=check)
        assert seen[0] > 1000
        assert store.keys() == []
        assert list((folder / "tmp").iterdir()) == []


def test_interrupting_a_publication_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with Store.open(folder, mode="w") as store:
        for name in ("write", "fsync", "link"):
            monkeypatch.setattr(os, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                store.publish({"a": 1}, workload.unit(0))
            monkeypatch.undo()
            assert store.keys() == []
            assert list((folder / "tmp").iterdir()) == []


def test_S1_a_unit_whose_name_is_not_on_the_disk_is_taken_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fsync of the folder fails after the link: the unit was not acknowledged, and must not be counted on."""
    real, calls = os.fsync, itertools.count(1)

    def second_fails(fd: int) -> None:
        if next(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    with Store.open(folder, mode="w") as store:
        monkeypatch.setattr(os, "fsync", second_fails)
        with pytest.raises(StoreError, match="input/output error"):
            store.publish({"a": 1}, workload.unit(0))
        assert store.keys() == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links(
    folder: Path, quiet: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    workload.run(folder)
    assert workload.snapshot(folder) == quiet
    with Store.open(folder, mode="w") as store:
        store.publish(workload.KEYS[0], workload.unit(1))
        xr.testing.assert_identical(store.read(workload.KEYS[0]), workload.unit(0))


def test_a_copy_without_empty_folders_is_still_a_store(folder: Path, quiet: dict[str, bytes]) -> None:
    workload.run(folder)
    for name in ("tmp", "quarantine"):
        (folder / name).rmdir()
    (folder / "lock").unlink()
    workload.check_acknowledged(folder, ["plan", "direction", "0"])
    workload.run(folder)
    assert workload.snapshot(folder) == quiet


ODD_NAMES = {
    "spaces": b"a b  c",
    "quote": b"it's",
    "not UTF-8": b"\xff\xfe",
    "255 bytes": b"x" * 255,
    "newline": b"a\nb",
    "glob": b"[a-z]*?",
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_odd_paths(folder: Path, name: bytes) -> None:
    odd = folder.parent / os.fsdecode(name)
    workload.run(odd)
    workload.check_acknowledged(odd, ["plan", "direction", "0"])
    with Store.open(odd, mode="w") as store, pytest.raises(StoreError) as raised:
        Store.open(odd, mode="w")
    (repr(store) + str(raised.value)).encode()  # can be printed


def test_paths_that_cannot_be(folder: Path) -> None:
    loop = folder.parent / "loop"
    loop.symlink_to(loop)
    too_long = folder.parent / ("x" * 256)
    for path, sentence in ((loop, "a loop of symbolic links"), (too_long, "name is too long")):
        for mode in ("r", "w"):
            with pytest.raises(StoreError, match=sentence):
                Store.open(path, mode=mode)  # type: ignore[arg-type]
    assert list(folder.parent.glob(".hoanalysis*")) == []


def test_a_relative_path_is_that_of_the_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    with Store.open("store", mode="w") as store:
        monkeypatch.chdir("/")
        store.publish({"a": 1}, workload.unit(0))
    assert len(Store.open(folder).keys()) == 1


def test_a_symbolic_link_to_a_store(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    workload.run(link)
    workload.check_acknowledged(folder, ["plan", "direction", "0"])


def test_a_store_without_a_plan_says_so(folder: Path) -> None:
    Store.open(folder, mode="w").close()
    with pytest.raises(StoreError, match="no study was registered in this store"):
        open_store(folder)
