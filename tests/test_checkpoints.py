"""Good files give the tensors that were saved; bad files give a sentence that names them, and never other numbers."""

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from hoanalysis.checkpoints import Run, fit, fit_optimizer_state, load_checkpoint, open_run
from hoanalysis.errors import CheckpointError, HoError


@pytest.fixture
def weights():
    g = torch.Generator().manual_seed(0)
    return {"fc.weight": torch.randn(3, 4, generator=g), "fc.bias": torch.randn(3, generator=g)}


SHAPES = {"fc.weight": (3, 4), "fc.bias": (3,)}


def refused(path, *words, **kwargs):
    """Loading is refused with an error that names the file and the words."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **kwargs)
    message = str(caught.value)
    for word in (Path(path).name, *words):
        assert word in message, message
    return caught.value


# --- files that are fine


def test_importing_checkpoints_and_opening_a_run_does_not_import_torch(tmp_path, weights):
    save_file(weights, tmp_path / "step_3.safetensors")
    code = (
        "import sys; from hoanalysis.checkpoints import open_run; "
        "run = open_run(sys.argv[1]); "
        "run.steps, run[0:1], run.duplicates(); assert 'torch' not in sys.modules; "
        "run[0]; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_safetensors_of_every_dtype(tmp_path):
    tensors = {
        "f64": torch.randn(2, 3, dtype=torch.float64),
        "f32": torch.randn(0, 3),
        "scalar": torch.tensor(2.5),
        "i64": torch.arange(5),
        "u8": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model_12.safetensors", metadata={"epoch": "3"})
    checkpoint = load_checkpoint(tmp_path / "model_12.safetensors")
    assert (checkpoint.step, checkpoint.format, checkpoint.metadata) == (12, "safetensors", {"epoch": "3"})
    assert checkpoint.sha256 == hashlib.sha256((tmp_path / "model_12.safetensors").read_bytes()).hexdigest()
    assert (checkpoint.optimizer_state, checkpoint.notes) == (None, [])
    assert set(checkpoint.state_dict) == set(tensors)
    for name, tensor in tensors.items():
        assert_close(checkpoint.state_dict[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("length", [128, 640, 0x8B1F, 0x403C, 0x04034B50 // 8])
def test_a_header_whose_length_looks_like_another_format_is_safetensors(tmp_path, length):
    """0x80 begins a pickle, 0x1f 0x8b a gzip archive, 0x3c a web page."""
    header = json.dumps({"a": entry()}).encode().ljust(length)
    path = forged(tmp_path, header, struct.pack("<2f", 1.5, -2.0))
    assert_close(load_checkpoint(path).state_dict["a"], torch.tensor([1.5, -2.0]))


@pytest.mark.row("C17")
def test_half_precision_is_read_as_float32_with_a_note(tmp_path):
    halves = {"a": torch.randn(4).bfloat16(), "b": torch.randn(4).half(), "c": torch.randn(2)}
    save_file(halves, tmp_path / "a.safetensors")
    torch.save(halves, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint.notes == ["2 tensors of bfloat16 and float16 are read as float32"]
        for k, v in halves.items():
            assert_close(checkpoint.state_dict[k], v.float(), rtol=0, atol=0)


def test_optimizer_tensors_of_safetensors_are_split_off(tmp_path, weights):
    moments = {k: v.square() for k, v in weights.items()}
    stored = weights | {f"optimizer.exp_avg_sq.{k}": v for k, v in moments.items()}
    stored |= {"optimizer.weight": torch.ones(2)}  # a submodule of that name stays
    save_file(stored, tmp_path / "a.safetensors")
    checkpoint = load_checkpoint(tmp_path / "a.safetensors")
    assert set(checkpoint.state_dict) == {*weights, "optimizer.weight"}
    assert set(checkpoint.optimizer_state) == {"exp_avg_sq"}
    for name, moment in moments.items():
        assert_close(checkpoint.optimizer_state["exp_avg_sq"][name], moment)


WRAPPINGS = {
    "bare": lambda sd: sd,
    "ordered": OrderedDict,
    "state_dict": lambda sd: {"state_dict": sd, "epoch": 3},
    "model_state_dict": lambda sd: {"epoch": 3, "model_state_dict": sd},
    "model": lambda sd: {"model": sd, "args": {"lr": 0.1}},
    "module": lambda sd: {"module": sd},
    "params": lambda sd: {"params": sd},
    "nested": lambda sd: {"model": {"state_dict": sd}, "step": 7},
    "lightning": lambda sd: {
        "epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.5", "state_dict": sd, "loops": {},
        "optimizer_states": [], "lr_schedulers": [], "hyper_parameters": {"lr": 0.1},
    },
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_state_dict_inside_a_larger_file_is_found(tmp_path, weights, wrapping, legacy):
    path = tmp_path / "step-480.ckpt"
    torch.save(WRAPPINGS[wrapping](weights), path, _use_new_zipfile_serialization=not legacy)
    checkpoint = load_checkpoint(path)
    assert (checkpoint.format, checkpoint.step) == ("torch", 480)
    assert set(checkpoint.state_dict) == set(weights)
    for name, tensor in weights.items():
        assert_close(checkpoint.state_dict[name], tensor, rtol=0, atol=0)


def test_another_key_is_named_by_the_user(tmp_path, weights):
    path = tmp_path / "a.pt"
    torch.save({"nets": {"generator": weights}, "lr": 0.1}, path)
    assert set(load_checkpoint(path, key="nets.generator").state_dict) == set(weights)
    refused(path, "no state_dict", "nets: dict", "key=")
    refused(path, "no key 'nets.critic'", "generator", key="nets.critic")
    torch.save([1, 2], path)
    refused(path, "type list")


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict", "optimizer_states"])
@pytest.mark.parametrize("named", [False, True])
def test_the_optimizer_state_of_torch_is_named_by_parameters(tmp_path, key, named):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.named_parameters() if named else model.parameters())
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    torch.save({"state_dict": model.state_dict(), key: [state] if key.endswith("states") else state}, tmp_path / "a.pt")
    found = load_checkpoint(tmp_path / "a.pt").optimizer_state
    assert set(found) == {"exp_avg", "exp_avg_sq", "step"}
    for name, parameter in model.named_parameters():
        for slot in ("exp_avg", "exp_avg_sq", "step"):
            assert_close(found[slot][name], optimizer.state[parameter][slot])


def test_an_optimizer_state_that_cannot_be_named_is_left_out_with_a_note(tmp_path, weights):
    state = {"state": {0: {"momentum_buffer": torch.ones(5)}}, "param_groups": [{"params": [0]}]}
    torch.save({"model": weights, "optimizer": state}, tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint.optimizer_state is None
    assert any("could not be matched" in note for note in checkpoint.notes)


@pytest.mark.row("C8")
def test_code_for_another_loader_is_inert_and_warned_of(tmp_path, weights):
    torch.save({"state_dict": weights, "hyper_parameters": {"_instantiator": "os.system"}}, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"hyper_parameters\._instantiator = 'os\.system'"):
        checkpoint = load_checkpoint(tmp_path / "a.ckpt")
    assert any("_instantiator" in note for note in checkpoint.notes)


# --- runs


def test_a_run_is_ordered_by_step_and_read_lazily(tmp_path, weights):
    for step in (10, 9, 100):
        save_file({k: v + step for k, v in weights.items()}, tmp_path / f"step_{step}.safetensors")
    (tmp_path / "log.csv").write_text("step,loss\n")
    run = open_run(tmp_path)
    assert run.steps == (9, 10, 100)
    assert [p.name for p in run.paths] == ["step_9.safetensors", "step_10.safetensors", "step_100.safetensors"]
    assert [c.step for c in run] == [9, 10, 100]
    assert_close(run[-1].state_dict["fc.bias"], weights["fc.bias"] + 100)
    part = run[1:]
    assert isinstance(part, Run)
    assert (len(run), len(part), part.steps, run[::-1].steps) == (3, 2, (10, 100), (100, 10, 9))
    run.paths[0].write_bytes(b"")  # a damaged file spoils itself alone
    assert [c.step for c in run[1:]] == [10, 100]
    refused(run.paths[0], "empty")
    with pytest.raises(IndexError, match="3 checkpoints"):
        run[3]


def test_steps_are_positions_where_names_have_no_distinct_integers(tmp_path, weights):
    for name in ("a2.safetensors", "a10.safetensors", "best.safetensors"):
        save_file(weights, tmp_path / name)
    run = open_run(tmp_path)
    assert [p.name for p in run.paths] == ["a2.safetensors", "a10.safetensors", "best.safetensors"]
    assert run.steps == (0, 1, 2)
    assert run[1:].steps == (1, 2)
    assert run[-1].step is None


@pytest.mark.row("C18")
def test_the_same_content_twice_is_found(tmp_path, weights):
    for step in range(3):
        save_file({k: v * (step % 2) for k, v in weights.items()}, tmp_path / f"{step}.safetensors")
    run = open_run(tmp_path)
    assert run.duplicates() == [(0, 2)]
    assert run.sha256(1) == run[1].sha256 == hashlib.sha256((tmp_path / "1.safetensors").read_bytes()).hexdigest()


@pytest.mark.row("C1")
def test_a_run_that_cannot_be_opened_says_what_is_there(tmp_path, weights):
    (tmp_path / "lenet5").mkdir()
    with pytest.raises(CheckpointError, match=r"no such folder[\s\S]*did you mean 'lenet5'"):
        open_run(tmp_path / "lenet-5")
    torch.save(weights, tmp_path / "lenet5" / "epoch_1.pt")
    with pytest.raises(CheckpointError, match=r"epoch_1\.pt[\s\S]*pattern='\*\.pt'"):
        open_run(tmp_path / "lenet5")
    with pytest.raises(CheckpointError, match="this is a file"):
        open_run(tmp_path / "lenet5" / "epoch_1.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_run(tmp_path / "empty")


# --- C1 to C3, C12: the wrong file


@pytest.mark.row("C1")
def test_a_missing_file_and_a_folder(tmp_path, weights):
    save_file(weights, tmp_path / "step_00010.safetensors")
    refused(tmp_path / "step_0010.safetensors", "no such file", "step_00010.safetensors")
    refused(tmp_path / "no" / "where.pt", "no such file")
    refused(tmp_path, "folder", "step_00010.safetensors", "open_run")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty (0 bytes)"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"<HTML><body>Log in</body>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b"step,loss\n0,1.0\n", "no checkpoint"),
        (b"cos\nsystem\n(S'x'\ntR.", "no checkpoint"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.row("C2", "C3")
def test_what_is_no_checkpoint_is_named(tmp_path, content, words, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    refused(path, words)


@pytest.mark.row("C12")
def test_a_suffix_may_lie_except_for_a_pickle_in_safetensors(tmp_path, weights):
    save_file(weights, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt").notes == ["the name ends in '.pt', the content is safetensors"]
    for legacy in (True, False):
        torch.save(weights, tmp_path / "b.safetensors", _use_new_zipfile_serialization=not legacy)
        refused(tmp_path / "b.safetensors", "content is a pickle")


# --- C4, C5, C10: damaged archives


@pytest.mark.row("C4")
def test_a_truncated_file_never_gives_numbers(tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "a.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pt", "legacy.pt"):
        whole = (tmp_path / name).read_bytes()
        cut = tmp_path / ("cut_" + name)
        for k in range(64):
            cut.write_bytes(whole[: len(whole) * k // 64])
            refused(cut)
    cut = tmp_path / "cut.safetensors"
    whole = (tmp_path / "a.safetensors").read_bytes()
    cut.write_bytes(whole[:-3])
    refused(cut, f"{len(whole) - 3} bytes found, {len(whole)} needed")


@pytest.mark.row("C5")
def test_flipped_bits_of_an_archive_never_give_other_numbers(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    g = torch.Generator().manual_seed(0)
    caught = 0
    for k in torch.randint(0, 8 * len(whole), (200,), generator=g).tolist():
        flipped = bytearray(whole)
        flipped[k // 8] ^= 1 << (k % 8)
        (tmp_path / "b.pt").write_bytes(flipped)
        try:
            checkpoint = load_checkpoint(tmp_path / "b.pt")
        except CheckpointError:
            caught += 1
            continue
        for name, tensor in weights.items():  # the bit is padding or a date
            assert_close(checkpoint.state_dict[name], tensor, rtol=0, atol=0)
    assert caught > 20
    record = whole.index(weights["fc.weight"].numpy().tobytes())
    flipped = bytearray(whole)
    flipped[record + 5] ^= 4
    (tmp_path / "b.pt").write_bytes(flipped)
    refused(tmp_path / "b.pt", "CRC-32", "data/0")


def rezip(source, target, compression=zipfile.ZIP_STORED, twice=""):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            new.writestr(member, old.read(member), compress_type=compression)
            if member.endswith(twice) and twice:
                with pytest.warns(UserWarning, match="Duplicate name"):
                    new.writestr(member, old.read(member), compress_type=compression)


@pytest.mark.row("C10")
def test_forged_archives_are_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pt")
    rezip(tmp_path / "a.pt", tmp_path / "deflated.pt", zipfile.ZIP_DEFLATED)
    refused(tmp_path / "deflated.pt", "is compressed")
    rezip(tmp_path / "a.pt", tmp_path / "twice.pt", twice="data/1")
    refused(tmp_path / "twice.pt", "data/1", "twice")
    with zipfile.ZipFile(tmp_path / "plain.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "plain.pt", "not a file of torch.save", "readme.txt")


@pytest.mark.row("C10")
def test_overlapping_members_are_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        first, second = (m for m in archive.infolist() if "/data/" in m.filename)
    # the second entry of the central directory is made to point at the first one's bytes
    directory = content.rindex(second.filename.encode())
    at = directory - 46
    assert content[at : at + 4] == b"PK\x01\x02"
    content[at + 42 : at + 46] = struct.pack("<I", first.header_offset)
    (tmp_path / "overlap.pt").write_bytes(content)
    refused(tmp_path / "overlap.pt", "damaged or forged", "overlaps")


# --- C6, C7, C9: what a pickle may not do


class Canary:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class Eval:
    def __reduce__(self):
        return (eval, ("1 + 1",))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle2", "pickle5"])
@pytest.mark.row("C6")
def test_a_pickle_that_runs_code_is_listed_and_not_run(tmp_path, weights, writer, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch's own opt-out does not reach this library
    canary = tmp_path / "canary"
    content = {"state_dict": weights, "extra": Canary(canary)}
    path = tmp_path / "a.pt"
    if writer in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    else:
        path.write_bytes(pickle.dumps({"extra": Canary(canary)}, protocol=int(writer[-1])))
    error = refused(path, "safetensors")
    assert "open" in error.why
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary))).close()  # the canary sings where it is let out
    assert canary.exists()


@pytest.mark.row("C6")
def test_globals_are_listed_from_forged_archives_too(tmp_path):
    torch.save({"a": Eval()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "eval", "not read")


@pytest.mark.row("C7")
def test_a_pickled_module_says_how_to_save_its_weights(tmp_path):
    torch.save(Net(), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "whole pickled module", "Net", "torch.nn.modules.linear.Linear", "state_dict")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_named(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "TorchScript")


@pytest.mark.row("C9")
def test_strides_that_repeat_elements_are_refused_before_memory_is_taken(tmp_path):
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "'w' declares 4,000,000,000,000 bytes", "the file holds 4 of them")


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.zeros(3, device="meta"), "meta"),
        (lambda: torch.zeros(3).to(torch.float8_e4m3fn), "quantised"),
    ],
)
@pytest.mark.row("C17")
def test_tensors_that_cannot_be_differentiated_are_refused_by_name(tmp_path, tensor, word):
    torch.save({"block.w": tensor()}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "'block.w'", word)


# --- C11: headers of safetensors


def forged(tmp_path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "forged.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "huge length": (b'{"a":1}', b"", 2**63, "header declares 9,223,372,036,854,775,808 bytes"),
    "long length": (b'{"a":1}', b"", 5000, "truncated"),
    "not JSON": (b"{not json}", b"", None, "not JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", None, "not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, b"", None, "not JSON"),
    "duplicate": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8), None, "'a' twice",
    ),
    "entry": ({"a": {"dtype": "F32"}}, b"", None, "'a' does not consist of"),
    "dtype": ({"a": entry("F31")}, bytes(8), None, "dtype 'F31'"),
    "negative": ({"a": entry(shape=(-2,))}, bytes(8), None, "shape [-2]"),
    "true": ({"a": entry(shape=(True,), offsets=(0, 4))}, bytes(4), None, "shape [True]"),
    "size": ({"a": entry(shape=(3,))}, bytes(8), None, "which is 12 bytes, and its data_offsets hold 8"),
    "product": ({"a": entry(shape=(2**40, 2**40))}, bytes(8), None, "data_offsets hold 8"),
    "backwards": ({"a": entry(offsets=(8, 0))}, bytes(8), None, "[8, 0]"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "'a' and 'b' overlap"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None, "a hole of 4 bytes in front of tensor 'b'"),
    "short": ({"a": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(8), None, "the end of 'a' is missing"),
    "rest": ({"a": entry()}, bytes(9), None, "1 bytes at the end"),
    "metadata": ({"a": entry(), "__metadata__": {"x": 1}}, bytes(8), None, "mapping of strings"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.row("C11")
def test_a_forged_header_is_refused_by_a_named_check_in_less_than_a_second(tmp_path, case):
    header, data, length, words = HEADERS[case]
    path = forged(tmp_path, header, data, length)
    begin = time.process_time()
    refused(path, words)
    assert time.process_time() - begin < 1


@pytest.mark.row("C11")
def test_many_entries_are_checked_in_about_a_second(tmp_path):
    many = {f"t{i}": entry(offsets=(8 * i, 8 * i + 8)) for i in range(100_000)}
    many["t7"] = entry("F31")
    path = forged(tmp_path, many, bytes(800_000))
    took = []
    for _ in range(3):  # the quickest: processor time stretches too when cores are shared
        begin = time.process_time()
        refused(path, "'t7'")
        took.append(time.process_time() - begin)
    assert min(took) < 4  # a second is the aim; an old processor at 2 GHz took 1.4


# --- C13: indices of shards


@pytest.fixture
def sharded(tmp_path, weights):
    for name in weights:
        save_file({name: weights[name]}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def write(**weight_map):
        index.write_text(json.dumps({"weight_map": {k.replace("_", "."): v for k, v in weight_map.items()}}))
        return index

    return write


def test_an_index_joins_its_shards(sharded, weights):
    index = sharded(fc_weight="fc.weight.safetensors", fc_bias="fc.bias.safetensors")
    checkpoint = load_checkpoint(index)
    assert checkpoint.format == "safetensors"
    for name, tensor in weights.items():
        assert_close(checkpoint.state_dict[name], tensor)
    before = checkpoint.sha256
    assert open_run(index.parent, "*.index.json").sha256(0) == before
    save_file({"fc.bias": weights["fc.bias"] + 1}, index.parent / "fc.bias.safetensors")
    assert load_checkpoint(index).sha256 != before


@pytest.mark.row("C13")
def test_a_forged_index_names_its_entry(tmp_path, sharded, weights):
    for name in ("../fc.bias.safetensors", str(tmp_path / "fc.bias.safetensors"), "..", 7):
        refused(sharded(fc_weight="fc.weight.safetensors", fc_bias=name), repr(name))
    refused(sharded(fc_weight="fc.weight.safetensors", fc_bias="gone.safetensors"), "'gone.safetensors' is missing")
    refused(sharded(fc_weight="fc.weight.safetensors", fc_bias="fc.weight.safetensors"), "lacks 'fc.bias'")
    save_file(weights, tmp_path / "both.safetensors")
    refused(sharded(fc_weight="fc.weight.safetensors", fc_bias="both.safetensors"), "two shards")
    refused(sharded(fc_bias="both.safetensors"), "'fc.weight', which the index does not name")
    refused(sharded(fc_bias="model.safetensors.index.json"), "an index itself")
    (tmp_path / "model.safetensors.index.json").write_text("[1]")
    refused(tmp_path / "model.safetensors.index.json", "not an index")


@pytest.mark.row("C13")
def test_a_link_out_of_the_folder_is_refused_and_a_cache_of_links_is_read(tmp_path, sharded, weights):
    index = sharded(fc_weight="fc.weight.safetensors", fc_bias="fc.bias.safetensors")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (index, *(tmp_path / f"{n}.safetensors" for n in weights)):
        (snapshot / file.name).symlink_to(file)
    assert set(load_checkpoint(snapshot / index.name).state_dict) == set(weights)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "fc.bias.safetensors").rename(elsewhere / "fc.bias.safetensors")
    (tmp_path / "fc.bias.safetensors").symlink_to(elsewhere / "fc.bias.safetensors")
    refused(index, "'fc.bias.safetensors' is a link that leaves the folder")


# --- C14 to C16: the fit to a model


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module."],
)
@pytest.mark.row("C14")
def test_the_usual_prefixes_are_stripped_and_noted(tmp_path, weights, prefix):
    save_file({prefix + k: v for k, v in weights.items()}, tmp_path / "a.safetensors")
    checkpoint = load_checkpoint(tmp_path / "a.safetensors")
    fitted = fit(checkpoint, SHAPES)
    assert list(fitted) == list(SHAPES)
    for name, tensor in weights.items():
        assert_close(fitted[name], tensor)
    assert len(checkpoint.notes) == bool(prefix)
    fit(checkpoint, SHAPES)
    assert len(checkpoint.notes) == bool(prefix)  # noted once


def test_a_prefix_that_belongs_to_the_model_stays(weights):
    named = {"model." + k: v for k, v in weights.items()}
    assert set(fit(named, {k: tuple(v.shape) for k, v in named.items()})) == set(named)


def test_a_compiled_submodule_is_fitted(weights):
    fitted = fit({k.replace("fc.", "fc._orig_mod."): v for k, v in weights.items()}, SHAPES)
    assert_close(fitted["fc.weight"], weights["fc.weight"])


@pytest.mark.row("C14")
def test_other_prefixes_are_advised_and_stripped_on_demand(weights):
    named = {"backbone." + k: v for k, v in weights.items()} | {"criterion.w": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"strip_prefix='backbone\.'"):
        fit(named, SHAPES)
    fitted = fit(named, SHAPES, strip_prefix="backbone.")
    assert_close(fitted["fc.bias"], weights["fc.bias"])


@pytest.mark.row("C14")
def test_a_difference_shows_at_most_ten_names(weights):
    shapes = SHAPES | {f"new{i}": (1,) for i in range(12)}
    with pytest.raises(CheckpointError, match="12 names are missing and 1 are unexpected") as caught:
        fit(weights | {"old": torch.ones(1)}, shapes)
    assert "'new9' and 2 more" in caught.value.why
    assert "unexpected in the file: 'old'" in caught.value.why


def test_a_mixture_of_prefixes_is_not_stripped(weights):
    with pytest.raises(CheckpointError, match="missing"):
        fit({"module.fc.weight": weights["fc.weight"], "other.fc.bias": weights["fc.bias"]}, SHAPES)


@pytest.mark.row("C15")
def test_shapes_are_compared(weights):
    with pytest.raises(CheckpointError, match=r"'fc\.weight' is \(3, 4\) in the checkpoint and \(4, 3\) in the model"):
        fit(weights, SHAPES | {"fc.weight": (4, 3)})


@pytest.mark.row("C16")
def test_values_that_are_not_finite_are_refused_with_counts(weights):
    weights["fc.weight"][0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(CheckpointError, match=r"fc\.weight: 2 of 12"):
        fit(weights, SHAPES)
    assert fit(weights, SHAPES, allow_nonfinite=True)["fc.weight"].isnan().sum() == 1


def test_buffers_are_part_of_the_fit():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
    buffers = {n: tuple(b.shape) for n, b in model.named_buffers()}
    state = model.state_dict()
    for given in (buffers, set(buffers)):
        assert set(fit(state, parameters, given)) == set(state)
    with pytest.raises(CheckpointError, match="3 are unexpected"):
        fit(state, parameters)
    del state["1.running_mean"]
    with pytest.raises(CheckpointError, match=r"missing from the file: '1\.running_mean'"):
        fit(state, parameters, buffers)


def test_tied_weights_may_be_stored_under_either_name_or_both():
    w, other = torch.randn(4, 3), torch.randn(4, 3)
    shapes, aliases = {"embedding.weight": (4, 3)}, {"embedding.weight": ["head.weight"]}
    for stored in ({"embedding.weight": w}, {"head.weight": w}, {"embedding.weight": w, "head.weight": w.clone()}):
        assert_close(fit(stored, shapes, aliases=aliases)["embedding.weight"], w)
    assert_close(fit({"embedding.weight": w, "head.weight": w.clone()}, shapes)["embedding.weight"], w)
    with pytest.raises(CheckpointError, match=r"unexpected in the file: 'head\.weight'"):
        fit({"embedding.weight": w, "head.weight": other}, shapes, aliases=aliases)


def test_the_optimizer_state_is_fitted_as_the_weights_are(tmp_path, weights):
    stored = {"module." + k: v for k, v in weights.items()}
    stored |= {f"optimizer.momentum_buffer.module.{k}": 2 * v for k, v in weights.items()}
    save_file(stored, tmp_path / "a.safetensors")
    checkpoint = load_checkpoint(tmp_path / "a.safetensors")
    state = fit_optimizer_state(checkpoint, SHAPES)
    assert_close(state["momentum_buffer"]["fc.weight"], 2 * weights["fc.weight"])
    with pytest.raises(CheckpointError, match="momentum_buffer"):
        fit_optimizer_state(checkpoint, {"other": (1,)})


def test_errors_are_of_the_one_family():
    assert issubclass(CheckpointError, HoError)
    with pytest.raises(HoError):
        load_checkpoint(os.devnull)


def test_an_open_archive_is_closed_again(tmp_path, weights):
    """Under "warnings are errors" a file left open would raise; reading from a buffer shows that torch got no path."""
    torch.save(weights, tmp_path / "a.pt")
    load_checkpoint(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    assert set(load_checkpoint(tmp_path / "a.pt").state_dict) == set(weights)
