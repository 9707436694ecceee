"""A minute of fuzzing the loader and the parser of studies: whatever they are given, they answer by name.

Coverage guides it: an input that reaches lines of ours in an order not seen before is mutated further. All of it
follows from the seed; only how far it comes depends on the time. What fails is kept as a file, named in the message.
"""

import os
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hoanalysis import checkpoints
from hoanalysis.checkpoints import load_checkpoint
from hoanalysis.errors import HoError
from hoanalysis.study import StudySpec
from tests import damage
from tests.conftest import write_study

SECONDS = float(os.environ.get("HOANALYSIS_FUZZ_SECONDS", "30"))  # for each of the two
SEED = int(os.environ.get("HOANALYSIS_FUZZ_SEED", "0"))
SLOW = 5.0

Mutate = Callable[[bytes, random.Random], bytes]


class Coverage:
    """Steps from line to line in the files of a folder."""

    def __init__(self, folder: Path, pattern: str = "*.py") -> None:
        self.files = {str(p) for p in folder.glob(pattern)}
        self.seen: set[tuple] = set()

    def new_from(self, call: Callable[[], None]) -> bool:
        reached: set[tuple] = set()
        before = None

        def line(frame, event, _):
            nonlocal before
            here = (id(frame.f_code), frame.f_lineno)
            reached.add((before, here))
            before = here
            return line

        def enter(frame, event, argument):
            return line(frame, event, argument) if frame.f_code.co_filename in self.files else None

        outer = sys.gettrace()
        sys.settrace(enter)
        try:
            call()
        finally:
            sys.settrace(outer)
        new = reached - self.seen
        self.seen |= new
        return bool(new)


def fuzz(
    corpus: list[tuple[str, bytes, Mutate]], read: Callable[[str, bytes], None], cover: Coverage, out: Path
) -> int:
    """Mutate, read, keep what is new; how many inputs that were.

    ``read`` raises where an input is answered by anything else than a value or a `HoError`.
    """
    end, tried = time.monotonic() + SECONDS, 0
    for name, content, _ in corpus:
        assert cover.new_from(lambda c=content, n=name: read(n, c))  # type: ignore[misc]
    while time.monotonic() < end:
        rng = random.Random(f"{SEED}-{tried}")
        name, content, mutate = corpus[rng.randrange(len(corpus))]
        changed = damage.havoc(content, rng) if rng.random() < 0.2 else mutate(content, rng)
        begin = time.process_time()
        try:
            found = cover.new_from(lambda c=changed, n=name: read(n, c))  # type: ignore[misc]
        except Exception as error:
            kept = out / f"failed-{tried}-{name}"
            kept.write_bytes(changed)
            pytest.fail(
                f"input {tried} of seed {SEED} ({name}, kept as {kept}) raised {type(error).__name__}: {error}",
                pytrace=True,
            )
        assert time.process_time() - begin < SLOW, (
            f"input {tried} of seed {SEED} took {time.process_time() - begin:.1f} s"
        )
        tried += 1
        if found and len(changed) < 200_000:
            corpus.append((name, changed, mutate))
    return tried


@pytest.mark.row("C5", "C6", "C9", "C11")
@pytest.mark.filterwarnings("ignore")
def test_the_loader_answers_anything_by_name(tmp_path: Path, monkeypatch) -> None:
    import torch.distributed.checkpoint as dcp

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    tensors = {"fc.weight": torch.randn(3, 4), "fc.bias": torch.randn(3)}
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"training": "{}"})
    torch.save(whole, tmp_path / "a.pt")
    torch.save(whole, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    dcp.save(whole, checkpoint_id=tmp_path / "d", no_dist=True)
    (tmp_path / "a.index.json").write_text('{"weight_map": {"fc.weight": "a.safetensors", "fc.bias": "a.safetensors"}}')
    corpus = [
        ("a.safetensors", (tmp_path / "a.safetensors").read_bytes(), damage.header_edited),
        ("a.pt", (tmp_path / "a.pt").read_bytes(), damage.archive_edited),
        ("old.pt", (tmp_path / "old.pt").read_bytes(), damage.pickle_edited),
        ("a.index.json", (tmp_path / "a.index.json").read_bytes(), damage.json_edited),
        ("d", (tmp_path / "d" / ".metadata").read_bytes(), damage.pickle_edited),
    ]

    def read(name: str, content: bytes) -> None:
        path = tmp_path / name
        before = (path / ".metadata" if path.is_dir() else path).read_bytes()
        (path / ".metadata" if path.is_dir() else path).write_bytes(content)
        try:
            with warnings.catch_warnings(action="ignore"):
                load_checkpoint(path)
        except HoError as error:
            assert error.where  # noqa: PT017
        finally:
            (path / ".metadata" if path.is_dir() else path).write_bytes(before)

    tried = fuzz(corpus, read, Coverage(Path(checkpoints.__file__).parent), tmp_path)
    print(f"{tried} inputs, {len(corpus)} kept")
    assert tried > SECONDS
    assert list(work.iterdir()) == []  # nothing was written by what was read


@pytest.mark.row("M1")
@pytest.mark.filterwarnings("ignore")
def test_the_parser_of_studies_answers_anything_by_name(tmp_path: Path) -> None:
    import hoanalysis

    study = write_study(tmp_path / "small", "factories_of_fuzz")
    study.write_text(study.read_text() + 'taus = [0.5]\nmeasure = ["along"]\ndirections = ["gradient", "to:next"]\n')

    def read(_: str, content: bytes) -> None:
        study.write_bytes(content)
        try:
            spec = StudySpec.read(study)
            spec.run(), spec.log(), spec.settings()
            safe = all("factories_of_fuzz" in t.factory for t in (spec.model, spec.data))
            if safe and spec.loss.factory == "torch.nn.functional:cross_entropy" and not spec.loss.args:
                from hoanalysis.summaries import Settings, Work

                problem = spec.problem()
                for options in spec.settings():
                    Work(problem, Settings(**options))
        except HoError as error:
            assert error.what  # noqa: PT017

    cover = Coverage(Path(hoanalysis.__file__).parent, "stud*.py")
    corpus = [("study.toml", study.read_bytes(), damage.toml_edited)]
    tried = fuzz(corpus, read, cover, tmp_path)
    print(f"{tried} inputs, {len(corpus)} kept")
    assert tried > SECONDS
