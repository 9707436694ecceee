"""`write_study`: a commented ``study.toml`` for checkpoints, in which what only their owner knows is left open."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hoanalysis.checkpoints import Run, load_checkpoint, open_run
from hoanalysis.checkpoints.safetensors_file import read_header
from hoanalysis.checkpoints.sniff import existing, neighbours, recognised, sniff
from hoanalysis.errors import CheckpointError, StudyError, listed
from hoanalysis.store import files
from hoanalysis.store.files import shown

SHOWN = 12  # tensors and files named in a comment

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Written:
    """The study file, what it is about, and what its reader has to fill in."""

    path: Path
    name: str
    found: str
    missing: tuple[str, ...] = ("[model] factory", "[data] factory")


def write_study(source: str | Path, to: str | Path | None = None, *, force: bool = False) -> Written:
    """Write a study file for a folder of checkpoints, or for one checkpoint.

    Parameters
    ----------
    source
        The folder, or the file.
    to
        The study file; without it, ``study.toml`` beside the checkpoints.
    force
        Overwrite a study file that is there.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, naming what is there instead, or if the first one cannot be read.
    StudyError
        If the study file is there already, or cannot be written.
    """
    source = Path(source)
    folder, pattern = (source, _pattern(source)) if source.is_dir() else (existing(source).parent, _escaped(source))
    run = open_run(folder, pattern)
    target = folder / "study.toml" if to is None else Path(to)
    # an answer to a question is not to be read from the whole file: a run may be large
    text = _text(run, pattern, os.path.relpath(folder, target.parent), _shapes(run.paths[0]), *_logs(folder))
    _write(target, text, force)
    name = target.resolve().parent.name if target.name == "study.toml" else target.stem
    return Written(target, name, _found(run, pattern))


def _escaped(file: Path) -> str:
    """The pattern of this file alone; bytes that are not UTF-8, which TOML cannot hold, match any character."""
    return re.sub("[\udc80-\udcff]", "?", glob.escape(file.name))


# ---- guesses ----------------------------------------------------------------------------------------------------


def _pattern(folder: Path) -> str:
    """The pattern of the largest family of files that differ in their numbers alone."""
    names = recognised(folder)
    if not names:
        raise _no_checkpoints(folder)
    indices = [n for n in names if n.endswith(".index.json")]  # of shards, which are no checkpoints by themselves
    families = Counter(_family(folder / n) for n in indices or names)
    most = max(families.values())
    if most == 1:  # no series: all files of the most frequent suffix
        suffixes = Counter(_suffix(n) for n in indices or names)
        return f"*{max(suffixes, key=lambda s: (suffixes[s], s == '.safetensors'))}"
    return min((f for f, count in families.items() if count == most), key=lambda f: ("safetensors" not in f, f))


def _family(file: Path) -> str:
    return re.sub(r"\d+", "*", _escaped(file))


def _is_stranger(file: Path, pattern: str) -> bool:
    """Whether a file matches the pattern of a family that is not its own."""
    return not pattern.startswith("*.") and _family(file) != pattern


def _suffix(name: str) -> str:
    return ".index.json" if name.endswith(".index.json") else Path(name).suffix


def _no_checkpoints(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError("there is no such folder", where=shown(folder), do=neighbours(folder))
    names = sorted(shown(p.name) for p in folder.iterdir())
    inside = [shown(p.name) for p in sorted(folder.iterdir()) if p.is_dir() and _readable_folder(p) and recognised(p)]
    return CheckpointError(
        "the folder holds no checkpoint",
        where=shown(folder),
        why=f"it has {listed(names)}" if names else "it is empty",
        do=f"name one of its folders that do: {listed(inside)}" if inside else "give the folder of the checkpoints",
        kept="nothing was written",
    )


def _readable_folder(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def _logs(folder: Path) -> tuple[str | None, list[str]]:
    """The training log, and the other tables with what they lack."""
    log, others = None, []
    for file in sorted(folder.glob("*.csv")):
        try:
            with file.open(encoding="utf-8", newline="") as f:
                columns = next(csv.reader(f), [])
            file.name.encode()
        except (OSError, UnicodeError, csv.Error):
            continue
        lacking = [c for c in ("step", "loss") if c not in columns]
        if log is None and not lacking:
            log = file.name
        else:
            others.append(f"{file.name} lacks {' and '.join(lacking)}" if lacking else f"{file.name} would do too")
    return log, others


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint; of safetensors, from the header alone."""
    with file.open("rb") as f:
        if sniff(file, f.read(512)) == "safetensors":
            header = read_header(f, file, os.fstat(f.fileno()).st_size)
            return {name: tuple(entry.shape) for name, entry in header.entries.items()}
    return {name: tuple(t.shape) for name, t in load_checkpoint(file).state_dict.items()}


#: Names of tensors, with * for numbers, of the models that come with this library.
_MODELS = {
    "LeNet5": {f"{layer}.{kind}" for layer in ("conv*", "fc*") for kind in ("weight", "bias")},
    "VGG11Prime": {"convs.*.weight", "convs.*.bias", "fc.weight", "fc.bias"},
    "MLP": {"layers.*.weight", "layers.*.bias"},
}


def _model_hint(shapes: Shapes) -> str:
    names = {re.sub(r"\d+", "*", n) for n in shapes}
    fits = [model for model, held in _MODELS.items() if names == held]
    if {"token_embedding.weight", "position_embedding.weight", "blocks.*.attention.qkv.weight"} <= names:
        fits = ["GPT"]
    return f"These names are those of hoanalysis.models:{fits[0]}, if it was that." if fits else ""


# ---- the text ---------------------------------------------------------------------------------------------------


def _found(run: Run, pattern: str) -> str:
    if len(run) == 1:
        return f"one checkpoint, {shown(run.paths[0].name)}"
    return f"{len(run)} checkpoints match {pattern!r}, steps {run.steps[0]} to {run.steps[-1]}"


def _text(run: Run, pattern: str, folder: str, shapes: Shapes, log: str | None, others: Sequence[str]) -> str:
    tensors = [f"#   {_inert(n)}  {' x '.join(map(str, s)) or 'a number'}" for n, s in list(shapes.items())[:SHOWN]]
    if len(shapes) > SHOWN:
        tensors.append(f"#   and {len(shapes) - SHOWN} more")
    hint = _model_hint(shapes)
    folder_of, matched = run.paths[0].parent, {p.name for p in run.paths}
    left = [n for n in recognised(folder_of) if n not in matched and len(run) > 1]
    more = [n for n in sorted(matched) if len(run) > 1 and _is_stranger(folder_of / n, pattern)]
    return _TEMPLATE.format(
        first=_inert(run.paths[0].name),
        tensors="\n".join(tensors),
        hint=f"\n# {hint}" if hint else "",
        found=_inert(_found(run, pattern)),
        left="".join(
            f"\n# {text}: {_inert(listed(names))}."
            for text, names in (("CHECK, matched too", more), ("Not matched", left))
            if names
        ),
        folder=_quoted(folder),
        pattern=_quoted(pattern),
        log=f"log = {_quoted(log)}" if log else '# log = "log.csv"',
        others="".join(f"\n# {_inert(o)}." for o in others),
    )


def _quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text.encode("utf-8", "replace").decode(), ensure_ascii=False).replace("\x7f", "\\u007f")


def _inert(text: str) -> str:
    """Text that stays in its comment: a name may hold the end of a line."""
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return seen if len(seen) <= 300 else seen[:200] + "…" + seen[-99:]


def _write(target: Path, text: str, force: bool) -> None:
    if target.exists() and not target.is_file():  # a rename would put a file in the place of a device
        raise StudyError(
            "a study file cannot be written here: this is a folder, a pipe or a device",
            where=shown(target),
            do="name a file with --to",
            kept="nothing was written",
        )
    data, temporary = text.encode(), target.parent / (files.HALF_MADE + files.token())
    try:
        if force:
            try:
                files.write_durably(temporary, data)
                os.rename(temporary, target)
            finally:
                files.remove_quietly(temporary)
        elif not files.publish_file(target, data, temporary):
            raise StudyError(
                "there is a study file already",
                where=shown(target),
                do="use it, overwrite it with --force, or name another one with --to",
                kept="it was not changed",
            )
    except OSError as error:
        told = files.told(error, "write the study file", target, "nothing was written")
        raise StudyError(told.what, where=told.where, why=told.why, do="name a file elsewhere with --to") from error


_TEMPLATE = """\
# A study for hoanalysis: what to analyse, and how. Fill in the two lines marked TO FILL IN, then
#
#     hoanalysis report THIS_FILE --out reports/NAME
#
# A factory is "package.module:name" of a function or a class; a module beside this file can be named: "mymodel:build".
# Lines that begin with # show the defaults, or what could stand there.

[model]
# TO FILL IN: what builds the network that was trained. Its weights, in {first}:
{tensors}{hint}
factory = ""
# args = {{}}              # keyword arguments of the factory: {{ width = 128 }}
# mode = "eval"          # or "train"; dropout must be off in either

[data]
# TO FILL IN: what gives the batches (x, y), the same ones in the same order each time: a list, a re-iterable, a
# DataLoader without shuffling. hoanalysis.data has mnist5k, cifar10 and text.
factory = ""
# args = {{}}              # keyword arguments; batch_size and max_samples below are added to them where they are set
# batch_size = 128
# max_samples = 1000     # fewer samples are faster, and the standard errors say what that costs

[loss]
# CHECK: loss(model(x), y), a mean over the batch; the loss of the training run.
factory = "torch.nn.functional:cross_entropy"
# args = {{}}

[checkpoints]
# {found}.{left}
folder = {folder}
pattern = {pattern}
# The training log, a CSV with the columns step and loss, and learning_rate where it is known.{others}
{log}

[summaries]
# order = 2 is H-bar, the Hessian seen by pairs of groups. diagonal = 3 adds what the regularizer r needs.
order = 2
diagonal = 3
# directions = ["gradient"]      # "weights", "random", "to:init", "to:next", "momentum", "adam"
# partitions = ["canonical"]     # one group a tensor; "layer", "kind", "trivial"
# keep_batches = 20              # blocks of batches that are kept, for the errors of what is derived
# shards = 8                     # units that the data of a checkpoint are cut into, for more workers than checkpoints
# measure = ["along", "removed"] # the loss measured along the direction, and with each group moved; "pairs", "path"
# errors = "unconditional"       # with what the data do through the gradient; several times slower
# curvature = {{ max_batches = 4 }} # the full Hessian's extreme eigenvalues and trace, beside 2 / learning rate
# dtype = "float64"              # the model's own by default
# memory = "2GiB"

[report]
# notebook = "mine.ipynb"        # instead of the built-in; it needs a cell tagged "parameters"
# parameters = {{}}
"""
