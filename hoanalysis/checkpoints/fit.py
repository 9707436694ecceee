"""Match a checkpoint to the parameters of a model: by names and shapes, never by guessing."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from hoanalysis.checkpoints.load import Checkpoint
from hoanalysis.checkpoints.unpack import OptimizerState
from hoanalysis.errors import CheckpointError, NonFiniteWeights, listed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = Sequence[int]

#: What wrappers put in front of names: DataParallel and DDP, torch.compile, Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")


def fit(
    checkpoint: "Checkpoint | Mapping[str, Tensor]",
    parameters: Mapping[str, Shape],
    buffers: Mapping[str, Shape] | Collection[str] = (),
    *,
    strip_prefix: str | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    dtypes: "Mapping[str, torch.dtype] | None" = None,
    allow_nonfinite: bool = False,
) -> "dict[str, Tensor]":
    """The tensors of a checkpoint under the names of a model, each exactly once.

    Prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.`` and their combinations) are stripped only where every
    name then matches; a note is added to the checkpoint.

    Parameters
    ----------
    parameters, buffers
        Name -> shape, of what ``model.state_dict()`` holds; for buffers the names alone will do.
    strip_prefix
        Take the tensors under this prefix, without it, and leave the others.
    aliases
        Parameter name -> other names of the same tied parameter, which a file may hold instead or besides.
    dtypes
        Parameter name -> dtype of the model: real numbers are asked for where it has them.
    allow_nonfinite
        Accept NaN and infinite values.

    Raises
    ------
    CheckpointError
        For names that are missing or unexpected (a diff of at most ten each), another shape, complex numbers or whole
        ones in the place of real ones, or values that are not finite. Nothing is ever left out silently.
    """
    tensors, where, notes = _parts(checkpoint)
    wanted: dict[str, Shape | None] = {n: tuple(s) for n, s in parameters.items()}
    wanted |= {n: tuple(buffers[n]) if isinstance(buffers, Mapping) else None for n in buffers}
    aliases = aliases or {}
    renaming = _renaming(tensors, wanted, aliases, strip_prefix, where, notes)
    fitted = {name: tensors[renaming[name]] for name in wanted}
    _check_shapes(fitted, wanted, where)
    _check_kinds(fitted, dtypes or {}, where)
    if not allow_nonfinite:
        _check_finite(fitted, where)
    return fitted


def fit_optimizer_state(
    checkpoint: Checkpoint, parameters: Mapping[str, Shape], *, strip_prefix: str | None = None
) -> OptimizerState:
    """The optimizer's state of a checkpoint under the names of a model, with the prefixes of `fit` stripped.

    Parameters that the optimizer did not hold (frozen ones) are absent. {} where the checkpoint keeps no state.
    """
    fitted: OptimizerState = {}
    for state, tensors in (checkpoint.optimizer_state or {}).items():
        for candidate in _candidates(list(tensors), strip_prefix):
            if set(candidate) <= set(parameters):
                fitted[state] = {name: tensors[old] for name, old in candidate.items()}
                break
        else:
            raise CheckpointError(
                f"the optimizer state {state!r} names parameters that the model does not have",
                where=str(checkpoint.path),
                why=f"unexpected: {listed(n for n in tensors if n not in parameters)}",
                do="strip_prefix=... where the names differ by a prefix",
            )
    return fitted


def _parts(checkpoint: "Checkpoint | Mapping[str, Tensor]") -> "tuple[Mapping[str, Tensor], str, list[str]]":
    if isinstance(checkpoint, Checkpoint):
        return checkpoint.state_dict, str(checkpoint.path), checkpoint.notes
    from torch import Tensor

    strange = (
        {str(n): type(t).__name__ for n, t in checkpoint.items() if not isinstance(t, Tensor)}
        if isinstance(checkpoint, Mapping)
        else {"it": type(checkpoint).__name__}
    )
    if strange:
        raise CheckpointError(
            "this is not a state_dict, which is a mapping of names to tensors",
            where=listed(f"{n} is {'an' if kind[0] in 'aeiou' else 'a'} {kind}" for n, kind in strange.items()),
            do="pass model.state_dict(), a Checkpoint, or the path of one",
        )
    return checkpoint, "the state_dict", []


def _candidates(names: list[str], strip_prefix: str | None) -> list[dict[str, str]]:
    """New name -> name in the file: as it is, then with ever more prefixes of wrappers stripped."""
    if strip_prefix is not None:
        return [{n.removeprefix(strip_prefix): n for n in names if n.startswith(strip_prefix)}]
    candidates = [{n: n for n in names}]
    compiled = {n.replace("_orig_mod.", ""): n for n in names}  # a compiled submodule has it in the middle
    for candidate in (candidates[0], compiled):
        while candidate and len(candidate) == len(names):
            candidates.append(candidate)
            prefix = next((p for p in PREFIXES if all(n.startswith(p) for n in candidate)), None)
            if prefix is None:
                break
            candidate = {n.removeprefix(prefix): old for n, old in candidate.items()}
    return candidates


def _renaming(tensors, wanted, aliases, strip_prefix, where, notes) -> dict[str, str]:
    """Model name -> name in the file, or an error with a diff."""
    differences = []
    for candidate in _candidates(list(tensors), strip_prefix):
        renaming, missing, unexpected = _match(candidate, tensors, wanted, aliases)
        if not missing and not unexpected:
            changed = next(((new, old) for new, old in candidate.items() if new != old), None)
            if changed is not None:
                _note(notes, f"names were stripped: {changed[1]!r} is read as {changed[0]!r}")
            if strip_prefix is not None and len(candidate) < len(tensors):
                left = [n for n in tensors if not n.startswith(strip_prefix)]
                _note(notes, f"tensors outside of {strip_prefix!r} were left: {listed(left)}")
            return renaming
        differences.append((missing, unexpected))
    missing, unexpected = differences[0]
    why = [f"missing from the file: {listed(missing)}"] * bool(missing)
    why += [f"unexpected in the file: {listed(unexpected)}"] * bool(unexpected)
    raise CheckpointError(
        f"the checkpoint does not fit the model: {len(missing)} names are missing and {len(unexpected)} are unexpected",
        where=where,
        why="; ".join(why),
        do=_advice(missing, unexpected),
    )


def _match(candidate, tensors, wanted, aliases) -> tuple[dict[str, str], list[str], list[str]]:
    renaming, missing = {}, []
    for name in wanted:
        held = next((n for n in (name, *aliases.get(name, ())) if n in candidate), None)
        if held is None:
            missing.append(name)
        else:
            renaming[name] = candidate[held]
    twins = {other: name for name, others in aliases.items() for other in (name, *others)}
    unexpected, taken = [], set(renaming.values())
    for name, old in candidate.items():
        if name in wanted or old in taken:
            continue
        twin = renaming.get(twins.get(name, ""))
        if not (_same(tensors[old], tensors[twin]) if twin else _tied(tensors[old], tensors, renaming)):
            unexpected.append(name)
    return renaming, missing, unexpected


def _same(a: "Tensor", b: "Tensor") -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _tied(tensor: "Tensor", tensors: "Mapping[str, Tensor]", renaming: Mapping[str, str]) -> bool:
    """Whether an unexpected matrix is the very values of one that the model takes: a tied weight's second name.

    Not so for vectors, whose values are often all zeros or ones.
    """
    return tensor.dim() >= 2 and any(_same(tensor, tensors[old]) for old in renaming.values())


def _advice(missing: list[str], unexpected: list[str]) -> str:
    """A prefix that would turn unexpected names into the missing ones, or what else may be wrong."""
    for name in missing:
        for other in unexpected:
            if other.endswith("." + name):
                return f"strip_prefix={other.removesuffix(name)!r} takes the tensors under that prefix"
    return "give the model the arguments it was trained with; strip_prefix=... where the names differ by a prefix"


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _check_shapes(fitted: "Mapping[str, Tensor]", wanted: Mapping[str, Shape | None], where: str) -> None:
    wrong = [n for n, shape in wanted.items() if shape is not None and tuple(fitted[n].shape) != tuple(shape)]
    if wrong:
        first = [f"{n!r}: {tuple(fitted[n].shape)} in the file, {wanted[n]} in the model" for n in wrong[:10]]
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise CheckpointError(
            f"the shape of {wrong[0]!r} is {tuple(fitted[wrong[0]].shape)} in the checkpoint "
            f"and {wanted[wrong[0]]} in the model",
            where=where,
            why="; ".join(first) + more,
            do="give the model the arguments it was trained with",
        )


def _check_kinds(fitted: "Mapping[str, Tensor]", dtypes: "Mapping[str, torch.dtype]", where: str) -> None:
    """A cast would drop the imaginary part of complex numbers, and take quantised weights for real ones."""
    wrong = {
        n: t.dtype
        for n, t in fitted.items()
        if n in dtypes and dtypes[n].is_floating_point and not t.dtype.is_floating_point
    }
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise CheckpointError(
            f"tensor {name!r} is {dtype} in the checkpoint and {dtypes[name]} in the model",
            where=where,
            why=f"{len(wrong)} tensors are not of real numbers: {listed(f'{n}: {d}' for n, d in wrong.items())}",
            do="save the state_dict of the full-precision model; quantised weights have no derivatives",
        )


def _check_finite(fitted: "Mapping[str, Tensor]", where: str) -> None:
    counts = {n: int((~t.isfinite()).sum()) for n, t in fitted.items() if t.is_floating_point() or t.is_complex()}
    bad = {n: c for n, c in counts.items() if c}
    if bad:
        raise NonFiniteWeights(
            f"{len(bad)} tensors of the checkpoint hold NaN or infinite values",
            where=where,
            why=listed(f"{n}: {c} of {fitted[n].numel()}" for n, c in bad.items()),
            do="take an earlier checkpoint: derivatives at such weights are no numbers",
        )
