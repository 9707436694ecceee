"""`Run`: the checkpoints of one training run, in order, each read when it is asked for."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from hoanalysis.checkpoints.load import Checkpoint, content_sha256, load_checkpoint
from hoanalysis.checkpoints.sniff import is_slot, neighbours, recognised, slot_step, step_of, within
from hoanalysis.errors import CheckpointError, listed


class Run(Sequence[Checkpoint]):
    """Ordered checkpoints. ``run[-1]`` reads the last one, ``run[a:b]`` is a Run that reads nothing yet.

    Attributes
    ----------
    paths
        The files, in order.
    steps
        The last integers in their names where every file has one and no two agree, otherwise the positions 0, 1, ...
    """

    def __init__(self, paths: Sequence[Path], steps: Sequence[int], key: str | None = None) -> None:
        self.paths, self.steps, self.key = tuple(paths), tuple(steps), key

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Checkpoint: ...
    @overload
    def __getitem__(self, index: slice) -> "Run": ...
    def __getitem__(self, index: int | slice) -> "Checkpoint | Run":
        if isinstance(index, slice):
            return Run(self.paths[index], self.steps[index], self.key)
        try:
            path = self.paths[index]
        except IndexError:
            # an IndexError as well, since iteration by index and list(run) rely on it
            raise _NoCheckpoint(f"the run has {len(self)} checkpoints, and there is no [{index}]") from None
        checkpoint = load_checkpoint(path, self.key)
        self._refuse_turned(path, checkpoint.step)
        return checkpoint

    def __iter__(self) -> Iterator[Checkpoint]:
        return (self[i] for i in range(len(self)))

    def _refuse_turned(self, path: Path, step: int | None) -> None:
        """A recorder's ring that turns on holds other steps than when the run was opened."""
        if is_slot(path) and step != self.steps[self.paths.index(path)]:
            raise CheckpointError(
                f"the step {self.steps[self.paths.index(path)]} was overwritten by the training that goes on",
                where=str(path),
                do="open the run again; Recorder(.., every=n) keeps every n-th step",
            )

    def sha256(self, position: int) -> str:
        """The `Checkpoint.sha256` of a file, without reading its weights."""
        path = self.paths[position]
        sha256 = content_sha256(path)
        self._refuse_turned(path, slot_step(path) if is_slot(path) else None)
        return sha256

    def duplicates(self) -> list[tuple[int, ...]]:
        """Positions of files with the same bytes, by their SHA-256: ``[(3, 7)]`` where the fourth is the eighth."""
        places: dict[str, list[int]] = {}
        for position in range(len(self)):
            places.setdefault(self.sha256(position), []).append(position)
        return [tuple(same) for same in places.values() if len(same) > 1]

    def __repr__(self) -> str:
        if not self.paths:
            return "Run(no checkpoints)"
        return f"Run({len(self)} checkpoints, steps {self.steps[0]} to {self.steps[-1]}, {self.paths[0].parent})"


class _NoCheckpoint(CheckpointError, IndexError):
    pass


def open_run(folder: str | os.PathLike[str], pattern: str = "*.safetensors", key: str | None = None) -> Run:
    """The checkpoints of a folder whose names match ``pattern``, ordered by step, then by name in natural order.

    Nothing is read but the names. ``key`` is that of `load_checkpoint`. Folders that match are checkpoints where they
    hold one (``pattern="checkpoint-*"`` for those of a Hugging Face trainer).

    Raises
    ------
    CheckpointError
        If the folder is missing, or nothing in it matches.
    """
    folder = Path(folder)
    try:
        there = folder.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the folder cannot be opened: {error}"[:500], where=repr(str(folder))[:300]) from None
    if not there:
        what = "this is a file, not a folder of checkpoints" if folder.exists() else "there is no such folder"
        do = "open_run(its folder), or load_checkpoint(this file)" if folder.exists() else neighbours(folder)
        raise CheckpointError(what, where=str(folder), do=do)
    found_steps = {p: step_of(p) for p in filter(_is_checkpoint, _matching(folder, pattern))}  # each is read once
    torn = {p for p, step in found_steps.items() if is_slot(p) and step is None}  # not written to its end: it is none
    paths = sorted(found_steps.keys() - torn, key=lambda p: _order(p, found_steps[p]))
    _refuse_shards(folder, paths)
    if not paths:
        found = recognised(folder)
        if not found and (inside := sorted(p.name for p in folder.iterdir() if p.is_dir() and within(p))):
            raise CheckpointError(
                f"no file matches the pattern {pattern!r}",
                where=str(folder),
                why=f"the folders that hold a checkpoint: {listed(inside)}",
                do=f"give pattern={re.sub(r'[0-9]+', '*', inside[0])!r}",
            )
        raise CheckpointError(
            f"no file matches the pattern {pattern!r}",
            where=str(folder),
            why=f"the files that look like checkpoints: {listed(found)}" if found else "the folder holds no checkpoint",
            do=f"give pattern='*{Path(found[0]).suffix}'" if found else "give the folder of the checkpoints",
        )
    steps = [found_steps[p] for p in paths]
    distinct = None not in steps and len(set(steps)) == len(steps)
    return Run(paths, [s for s in steps if s is not None] if distinct else range(len(paths)), key)


def _matching(folder: Path, pattern: str) -> list[Path]:
    try:
        if "\0" in pattern or ".." in Path(pattern).parts:
            raise ValueError("it leaves the folder" if "\0" not in pattern else "it holds a NUL character")
        return list(folder.glob(pattern))
    except (ValueError, NotImplementedError, IndexError, re.error, RecursionError) as error:
        raise CheckpointError(
            f"the pattern {pattern!r} cannot be used",
            where=str(folder),
            why=str(error),
            do="give a pattern of file names, such as '*.safetensors' or 'step_*.pt'",
        ) from None


def _is_checkpoint(path: Path) -> bool:
    """A link to nothing is one that cannot be read: named when its turn comes, not left out silently."""
    return path.is_file() or (path.is_symlink() and not path.exists()) or (path.is_dir() and within(path) is not None)


def _refuse_shards(folder: Path, paths: Sequence[Path]) -> None:
    """Shards of one checkpoint are no run."""
    shards = [p for p in paths if re.search(r"-\d{5}-of-\d{5}\.", p.name)]
    if shards and len(shards) == len(paths):
        indices = sorted(p.name for p in folder.glob("*.index.json"))
        raise CheckpointError(
            f"the {len(paths)} files are shards of one checkpoint, not checkpoints",
            where=str(folder),
            why=f"such as {shards[0].name!r}",
            do=f"give pattern={indices[0]!r}" if indices else "copy their index, *.index.json, beside them",
        )


def _order(path: Path, step: int | None) -> tuple:
    natural = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
    return (step is None, step or 0, natural)
