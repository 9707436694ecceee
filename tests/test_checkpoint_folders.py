"""Folders that are one checkpoint: those of Hugging Face and of torch.distributed.checkpoint. Reading runs nothing."""

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import hoanalysis as ho
from hoanalysis.checkpoints import load_checkpoint, open_run
from hoanalysis.errors import CheckpointError


def refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.5, 0.75))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A distributed checkpoint of one process."""
    model, optimizer = trained()
    with warnings.catch_warnings(action="ignore"):  # torch remarks that nothing is distributed here
        dcp.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3},
            checkpoint_id=tmp_path / "step-7",
            no_dist=True,
        )
    return tmp_path / "step-7"


# ---- torch.distributed.checkpoint -------------------------------------------------------------------------------


def test_a_distributed_checkpoint_gives_what_was_saved(saved: Path) -> None:
    model, optimizer = trained()
    read = load_checkpoint(saved)
    assert (read.step, read.format, read.path) == (7, "torch", saved)
    assert set(read.state_dict) == {"weight", "bias"}
    for name, tensor in model.state_dict().items():
        assert_close(read.state_dict[name], tensor, rtol=0, atol=0)
    kept = {n: optimizer.state[p] for n, p in model.named_parameters()}
    assert read.optimizer_state is not None
    for state in ("exp_avg", "exp_avg_sq"):
        for name in kept:
            assert_close(read.optimizer_state[state][name], kept[name][state], rtol=0, atol=0)
    assert json.loads(read.metadata["training"])["optimizer"]["betas"] == [0.5, 0.75]


def test_pieces_of_a_tensor_are_joined(saved: Path) -> None:
    """The metadata are rewritten as two processes would: each holds two columns of the weight."""
    model, _ = trained()
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    cls = type(metadata.state_dict_metadata["model.weight"].chunks[0])
    index = next(i for i in metadata.storage_data if i.fqn == "model.weight")
    place = metadata.storage_data.pop(index)
    metadata.state_dict_metadata["model.weight"].chunks = [cls(torch.Size((0, k)), torch.Size((3, 2))) for k in (0, 2)]
    for k in (0, 2):
        file = saved / f"__{k}_0.distcp.part"
        torch.save(model.weight.detach()[:, k : k + 2].clone(), file)
        metadata.storage_data[type(index)("model.weight", (0, k))] = type(place)(file.name, 0, file.stat().st_size)
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_close(load_checkpoint(saved).state_dict["weight"], model.weight.detach(), rtol=0, atol=0)
    metadata.state_dict_metadata["model.weight"].chunks[1].offsets = torch.Size((0, 1))
    metadata.storage_data = {
        (type(index)("model.weight", (0, 1)) if i.fqn == "model.weight" and i.offset == torch.Size((0, 2)) else i): v
        for i, v in metadata.storage_data.items()
    }
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(saved, "damaged or forged", "two pieces overlap")


@pytest.mark.row("C6")
def test_the_metadata_of_a_distributed_checkpoint_run_nothing(saved: Path) -> None:
    """torch itself reads them by an unrestricted unpickler: the canary sings there."""
    canary = saved.parent / "canary"

    class Canary:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = [Canary(), metadata.planner_data]
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(saved, "open", "not read", "dcp_to_torch")
    assert not canary.exists()
    with pytest.warns(ResourceWarning):
        dcp.FileSystemReader(saved).read_metadata()
    assert canary.exists()


@pytest.mark.row("C13")
def test_the_pieces_of_a_distributed_checkpoint_lie_in_its_folder(saved: Path) -> None:
    whole = (saved / ".metadata").read_bytes()
    metadata = pickle.loads(whole)
    place = next(v for i, v in metadata.storage_data.items() if i.fqn == "model.weight")
    for path in ("../outside.distcp", "/etc/hostname"):
        place.relative_path = path
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))
        refused(saved, repr(path), "leaves the folder")
    place.relative_path = "gone.distcp"
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(saved, "'gone.distcp' is missing")
    (saved / ".metadata").write_bytes(whole)
    data = saved / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    refused(saved, "truncated", "1,000")


@pytest.mark.row("C9")
def test_a_declared_shape_takes_no_memory(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["model.weight"]
    entry.size = entry.chunks[0].sizes = torch.Size((2**40, 2**7))
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(saved, "damaged or forged", "the metadata say")


def test_every_flipped_bit_of_the_metadata_is_a_sentence_or_the_same_numbers(saved: Path) -> None:
    model, _ = trained()
    whole = (saved / ".metadata").read_bytes()
    g = torch.Generator().manual_seed(0)
    refusals = 0
    for k in torch.randint(0, 8 * len(whole), (200,), generator=g).tolist():
        flipped = bytearray(whole)
        flipped[k // 8] ^= 1 << (k % 8)
        (saved / ".metadata").write_bytes(flipped)
        try:
            read = load_checkpoint(saved)
        except CheckpointError:
            refusals += 1
            continue
        # a name may read otherwise: its tensor is then missing from the model, which `fit` says
        for name in set(read.state_dict) & {"weight", "bias"}:
            assert_close(read.state_dict[name], model.state_dict()[name], rtol=0, atol=0)
    assert refusals > 50


# ---- Hugging Face -----------------------------------------------------------------------------------------------


def sharded(folder: Path, suffix: str) -> dict[str, torch.Tensor]:
    """Two shards and their index, as `save_pretrained` names them."""
    folder.mkdir()
    weights = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = {n: f"{stem}-0000{i}-of-00002.{suffix}" for i, n in enumerate(weights, 1)}
    for n, file in names.items():
        if suffix == "safetensors":
            save_file({n: weights[n]}, folder / file)
        else:
            torch.save({n: weights[n]}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return weights


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_sharded_folder_is_a_checkpoint(tmp_path: Path, suffix: str) -> None:
    weights = sharded(tmp_path / "checkpoint-500", suffix)
    read = load_checkpoint(tmp_path / "checkpoint-500")
    assert (read.step, read.path) == (500, tmp_path / "checkpoint-500")
    for n, t in weights.items():
        assert_close(read.state_dict[n], t, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="shards of one checkpoint"):
        open_run(tmp_path / "checkpoint-500", f"*.{suffix}")


def test_the_folders_of_a_trainer_are_a_run(tmp_path: Path) -> None:
    for step in (1000, 500):
        sharded(tmp_path / f"checkpoint-{step}", "safetensors")
    (tmp_path / "logs").mkdir()
    run = open_run(tmp_path, "checkpoint-*")
    assert run.steps == (500, 1000)
    assert [c.sha256 for c in run] == [run.sha256(i) for i in range(2)]
    with pytest.raises(CheckpointError, match=r"pattern='checkpoint-\*'"):
        open_run(tmp_path)


@pytest.mark.row("C6", "C13")
def test_a_shard_that_runs_code_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path / "c", "bin")
    torch.save({"a": print}, tmp_path / "c" / "pytorch_model-00001-of-00002.bin")
    refused(tmp_path / "c", "print", "not read")


# ---- what is no file --------------------------------------------------------------------------------------------


@pytest.mark.row("C1")
def test_pipes_devices_and_dangling_links(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    (tmp_path / "gone_3.pt").symlink_to(tmp_path / "nowhere.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    refused(tmp_path / "pipe.pt", "a pipe, a socket or a device")
    refused(tmp_path / "zero.pt", "a pipe, a socket or a device")
    refused(tmp_path / "gone_3.pt", "link to a file that is not there", "nowhere.pt")
    refused(tmp_path / "loop.pt", "link")
    refused(tmp_path / ("x" * 300), "cannot be read", "too long")
    torch.save({"a": torch.zeros(2)}, tmp_path / "step_4.pt")
    assert "gone_3.pt" in [p.name for p in open_run(tmp_path, "*.pt").paths]  # named in its turn, not left out


@pytest.mark.parametrize("pattern", ["", "/abs/*.pt", "../*.pt", "a\0b", "**", "[", "***/x"])
@pytest.mark.row("C1")
def test_patterns_that_cannot_be(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(CheckpointError):
        open_run(tmp_path, pattern)


def test_summaries_of_a_distributed_checkpoint(saved: Path) -> None:
    model, _ = trained()
    data = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    problem = ho.Problem(model, data, loss=nn.functional.cross_entropy)
    a = ho.summarize(problem, 2, checkpoint=saved, progress=False)
    b = ho.summarize(problem, 2, progress=False)
    assert_close(torch.tensor(a.D2.values), torch.tensor(b.D2.values), rtol=0, atol=0)
