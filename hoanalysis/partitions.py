"""Partitions: ordered, named, disjoint, complete groups T_1..T_S of a model's parameters.

A partition is plain data. It knows parameters by name and shape, never by identity, so that one partition serves every
checkpoint of a run, and a stored one can be compared with a model years later. Each parameter is assigned either as a
whole to one group, or entry by entry through an integer array of its own shape:

    eta_of(W) = eta[assignment[W]]        a number, or an array shaped like W

which covers whole tensors, merged tensors, slices along an axis and single entries with one rule.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from hoanalysis.errors import PartitionError, listed, nearest

if TYPE_CHECKING:
    from torch import nn

Assignment = int | np.ndarray
Parts = int | Sequence[str] | Mapping[str, int]
Split = tuple[int, Parts] | tuple[int, Parts, int]


@dataclass(frozen=True)
class ParameterInfo:
    """What a partition knows of one parameter tensor."""

    shape: tuple[int, ...]
    layer: str
    kind: str
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Partition:
    """Ordered, named, disjoint, complete groups of parameters.

    Parameters
    ----------
    labels
        The S group names, in order.
    parameters
        Parameter name -> `ParameterInfo`, in the order of ``model.named_parameters()``.
    assignment
        Parameter name -> the group of the whole tensor, or an int64 array of the tensor's shape.
    name
        How the partition was asked for; stored in the attribute ``partition`` of results.
    frozen
        Names of parameters that were left out because they do not require a gradient.

    Raises
    ------
    PartitionError
        Where a group is empty, a label repeats, or a parameter has no group.
    """

    labels: tuple[str, ...]
    parameters: Mapping[str, ParameterInfo]
    assignment: Mapping[str, Assignment]
    name: str = "custom"
    frozen: tuple[str, ...] = ()
    _numel: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if repeated := [x for x, count in Counter(self.labels).items() if count > 1]:
            raise PartitionError(f"group labels repeat: {listed(repeated)}", do="give every group a name of its own")
        if missing := [p for p in self.parameters if p not in self.assignment]:
            raise PartitionError(f"parameters without a group: {listed(missing)}", do="name them, or pass rest='label'")
        if unknown := [p for p in self.assignment if p not in self.parameters]:
            raise PartitionError(f"assigned parameters that do not exist: {listed(unknown)}")
        plain = {n: a if isinstance(a, np.ndarray) else int(a) for n, a in self.assignment.items()}
        object.__setattr__(self, "assignment", plain)
        numel = np.zeros(len(self.labels), dtype=np.int64)
        for name, info in self.parameters.items():
            a = self.assignment[name]
            if outside := [i for i in np.unique(a).tolist() if not 0 <= i < len(self.labels)]:
                raise PartitionError(f"{name!r} is assigned to group {outside[0]} of {len(self.labels)}")
            if isinstance(a, np.ndarray):
                if a.shape != info.shape:
                    raise PartitionError(f"the assignment of {name!r} has shape {a.shape}, the tensor {info.shape}")
                numel += np.bincount(a.ravel(), minlength=len(self.labels))
            else:
                numel[a] += info.numel
        # A tensor of no entries makes a group of no entries: kept, its derivatives are exact zeros.
        used: set[int] = set()
        for a in self.assignment.values():
            used.update(np.unique(a).tolist() if isinstance(a, np.ndarray) else [a])
        if empty := [x for i, x in enumerate(self.labels) if i not in used]:
            raise PartitionError(f"groups without parameters: {listed(empty)}", do="drop them or correct their pattern")
        object.__setattr__(self, "_numel", numel)

    def __len__(self) -> int:
        return len(self.labels)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Partition) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    # ---- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def canonical(cls, model: nn.Module, include_frozen: bool = False) -> Partition:
        """One group per parameter tensor, in the order of ``named_parameters()``. A tied tensor appears once."""
        known = _known(model, include_frozen)
        if known.canonical is None:
            known.canonical = cls._canonical(model, include_frozen)
        return known.canonical

    @classmethod
    def _canonical(cls, model: nn.Module, include_frozen: bool) -> Partition:
        parameters, frozen = describe_parameters(model, include_frozen)
        if not parameters:
            raise PartitionError(
                "the model has no parameters to differentiate",
                why=f"{len(frozen)} are frozen (requires_grad is False)" if frozen else "it has none at all",
                do="pass include_frozen=True" if frozen else "check the model",
            )
        assignment = {name: i for i, name in enumerate(parameters)}
        return cls(tuple(parameters), parameters, assignment, "canonical", frozen)

    @classmethod
    def by_layer(cls, model: nn.Module, include_frozen: bool = False) -> Partition:
        """One group per module that owns parameters: weight and bias together."""
        p = cls.canonical(model, include_frozen)
        return p._grouped_by(lambda name: p.parameters[name].layer, "layer")

    @classmethod
    def by_kind(cls, model: nn.Module, include_frozen: bool = False) -> Partition:
        """One group per kind of parameter: weight, bias, norm, embedding, other."""
        p = cls.canonical(model, include_frozen)
        return p._grouped_by(lambda name: p.parameters[name].kind, "kind")

    @classmethod
    def trivial(cls, model: nn.Module, include_frozen: bool = False) -> Partition:
        """S = 1: the whole parameter vector; the training step is then Cauchy's steepest descent."""
        return cls.canonical(model, include_frozen)._grouped_by(lambda _: "all", "trivial")

    @classmethod
    def discrete(cls, model: nn.Module, include_frozen: bool = False) -> Partition:
        """S = P: one group per entry, labelled ``name[i,j]``; the training step is then Newton's method."""
        p = cls.canonical(model, include_frozen)
        labels: list[str] = []
        assignment: dict[str, Assignment] = {}
        for name, info in p.parameters.items():
            assignment[name] = np.arange(len(labels), len(labels) + info.numel, dtype=np.int64).reshape(info.shape)
            labels += [f"{name}[{','.join(map(str, i))}]" for i in np.ndindex(info.shape)]
        return cls(tuple(labels), p.parameters, assignment, "discrete", p.frozen)

    @classmethod
    def by_pattern(
        cls,
        model: nn.Module,
        patterns: Mapping[str, str | Sequence[str]],
        *,
        rest: str | None = None,
        include_frozen: bool = False,
    ) -> Partition:
        """Groups given by glob patterns on parameter names: ``{"convs": "conv*", "head": ["fc3.*"]}``.

        The groups are in the order of their first parameters, whatever the order of the patterns.

        Parameters
        ----------
        rest
            The group of every parameter that no pattern matches; without it such parameters are an error.

        Raises
        ------
        PartitionError
            Where a pattern matches nothing, a parameter is matched twice, or one by none.
        """
        p = cls.canonical(model, include_frozen)
        owner: dict[str, str] = {}
        for label, globs in patterns.items():
            for glob in [globs] if isinstance(globs, str) else globs:
                hits = [n for n in p.parameters if fnmatch.fnmatchcase(n, glob)]
                if not hits:
                    raise PartitionError(
                        f"the pattern {glob!r} of group {label!r} matches no parameter",
                        why=f"the parameters are {listed(p.parameters)}",
                        do=nearest(glob, p.parameters),
                    )
                for n in hits:
                    if owner.setdefault(n, label) != label:
                        raise PartitionError(f"parameter {n!r} is in two groups: {owner[n]!r} and {label!r}")
        if missing := [n for n in p.parameters if n not in owner]:
            if rest is None:
                raise PartitionError(
                    f"parameters that no pattern matches: {listed(missing)}",
                    do="add a pattern, or pass rest='label' to gather them in one group",
                )
            owner.update(dict.fromkeys(missing, rest))
        first_use = [owner[n] for n in p.parameters]
        order = {label: i for i, label in enumerate(dict.fromkeys([*first_use, *patterns]))}
        assignment: dict[str, Assignment] = {n: order[owner[n]] for n in p.parameters}
        return cls(tuple(order), p.parameters, assignment, "pattern", p.frozen)

    @classmethod
    def blocks(cls, model: nn.Module, n: int, include_frozen: bool = False) -> Partition:
        """``n`` groups of consecutive tensors with about equal numbers of tensors."""
        return cls.canonical(model, include_frozen).merge(n)

    @classmethod
    def split(cls, model: nn.Module, splits: Mapping[str, Split], include_frozen: bool = False) -> Partition:
        """Canonical, but each tensor that a pattern matches is cut along an axis.

        Parameters
        ----------
        splits
            ``{pattern: (axis, parts)}`` or ``{pattern: (axis, parts, repeats)}``. ``parts`` is a number of equal parts
            (labelled ``name[0]``, ..), the names of equal parts (``name[q]``, ..), or names with sizes. With
            ``repeats`` all parts occur so many times along the axis, one after the other, and those of one name are one
            group: ``(0, ["q", "k", "v"], heads)`` for a projection whose rows are sorted by head.

        ``{"*.qkv.weight": (0, ["q", "k", "v"])}`` tells Q, K and V apart, ``{"*.o_proj.weight": (1, heads)}`` the heads
        of an output projection, ``{"conv1.weight": (0, channels)}`` output channels.
        """
        p = cls.canonical(model, include_frozen)
        rule: dict[str, Split] = {}
        for pattern, spec in splits.items():
            hits = [n for n in p.parameters if fnmatch.fnmatchcase(n, pattern)]
            if not hits:
                raise PartitionError(f"the pattern {pattern!r} matches no parameter", do=nearest(pattern, p.parameters))
            for n in hits:
                if rule.setdefault(n, spec) != spec:
                    raise PartitionError(f"{n!r} is cut in two ways: {rule[n]} and {spec}", do="narrow the patterns")
        labels: list[str] = []
        assignment: dict[str, Assignment] = {}
        for name, info in p.parameters.items():
            if name not in rule:
                assignment[name] = len(labels)
                labels.append(name)
                continue
            axis, names, along = _cut(name, info.shape, *rule[name])
            view = (along + len(labels)).reshape([-1 if i == axis else 1 for i in range(len(info.shape))])
            assignment[name] = np.ascontiguousarray(np.broadcast_to(view, info.shape)).astype(np.int64)
            labels += [f"{name}[{k}]" for k in names]
        return cls(tuple(labels), p.parameters, assignment, "split", p.frozen)

    @classmethod
    def attention(cls, model: nn.Module, include_frozen: bool = False) -> Partition:
        """Canonical, but projections that give Q, K and V at once are cut into ``name[q]``, ``name[k]``, ``name[v]``.

        Knows `torch.nn.MultiheadAttention` and the fused projections of Hugging Face models (GPT-2, GPT-NeoX, BLOOM,
        Falcon, Phi-3, MPT, DBRX, CodeGen, and every ``qkv`` of three equal parts) by their layer's name and the model's
        ``config``; see `hoanalysis.projections`. A model without any gives the canonical partition.
        """
        from hoanalysis.projections import fused

        p = cls.canonical(model, include_frozen)
        found = cls.split(model, {_literal(n): s for n, s in fused(model, p.parameters).items()}, include_frozen)
        return replace(found, name="attention")

    # ---- derived ------------------------------------------------------------------------------------------------

    def merge(self, how: str | int | Mapping[str, Sequence[str]]) -> Partition:
        """Coarser groups: ``"layer"``, ``"kind"``, ``n`` blocks of consecutive groups, or ``{new: [old, ..]}``.

        Old groups that a mapping does not name stay as they are. A merged group stands where its first member stood.
        """
        if how == "layer" or how == "kind":
            owner = dict(zip(self.labels, self._group_values(str(how)), strict=True))
        elif isinstance(how, int) and not isinstance(how, bool):
            if not 1 <= how <= len(self):
                raise PartitionError(f"cannot merge {len(self)} groups into {how}", do=f"ask for 1 to {len(self)}")
            chunks = np.array_split(np.arange(len(self)), how)
            owner = {self.labels[i]: _span(self.labels[c[0]], self.labels[c[-1]]) for c in chunks for i in c}
        elif isinstance(how, Mapping):
            known = set(self.labels)
            moved: dict[str, str] = {}
            for new, olds in how.items():
                if isinstance(olds, str) or not len(olds):
                    raise PartitionError(f"the merged group {new!r} needs a list of old groups, not {olds!r}")
                for old in olds:
                    if old not in known:
                        raise PartitionError(f"there is no group {old!r}", do=nearest(old, self.labels))
                    if moved.setdefault(old, new) != new:
                        raise PartitionError(f"group {old!r} goes to two: {moved[old]!r} and {new!r}")
            if clash := [x for x in self.labels if x not in moved and x in how]:
                raise PartitionError(
                    f"the new names {listed(clash)} belong to groups that are not merged", do="use other names"
                )
            owner = {x: moved.get(x, x) for x in self.labels}
        else:
            raise PartitionError(f"cannot merge by {how!r}", do="use 'layer', 'kind', a number or {new: [old, ..]}")
        new_labels = list(dict.fromkeys(owner[x] for x in self.labels))
        position = {label: i for i, label in enumerate(new_labels)}
        table = np.array([position[owner[x]] for x in self.labels], dtype=np.int64)
        assignment: dict[str, Assignment] = {
            n: table[a] if isinstance(a, np.ndarray) else int(table[a]) for n, a in self.assignment.items()
        }
        name = f"{self.name}|merge({how if not isinstance(how, Mapping) else 'mapping'})"
        return replace(self, labels=tuple(new_labels), assignment=assignment, name=name)

    def _grouped_by(self, key: Callable[[str], str], name: str) -> Partition:
        owner = {n: key(n) for n in self.parameters}
        order = {label: i for i, label in enumerate(dict.fromkeys(owner.values()))}
        assignment: dict[str, Assignment] = {n: order[owner[n]] for n in self.parameters}
        return replace(self, labels=tuple(order), assignment=assignment, name=name)

    def members(self) -> list[list[str]]:
        """For each group the parameters that it touches, in order."""
        out: list[list[str]] = [[] for _ in self.labels]
        for name, a in self.assignment.items():
            for s in np.unique(a).tolist() if isinstance(a, np.ndarray) else [a]:
                out[s].append(name)
        return out

    def is_whole(self) -> bool:
        """Whether every tensor belongs to one group as a whole."""
        return not any(isinstance(a, np.ndarray) for a in self.assignment.values())

    @property
    def numel(self) -> np.ndarray:
        """Number of parameters of each group, shape (S,)."""
        return self._numel

    def _group_values(self, attribute: str) -> list[str]:
        values = []
        for names in self.members():
            found = list(dict.fromkeys(getattr(self.parameters[n], attribute) for n in names))
            values.append(found[0] if len(found) == 1 else _common(found, attribute))
        return values

    def coords(self) -> dict[str, list]:
        """The group coordinates of the schema: layer, kind, numel, shape, aliases."""
        return {name: list(values) for name, values in self._coords.items()}

    @functools.cached_property
    def _coords(self) -> dict[str, list]:
        members = self.members()
        shapes, aliases = [], []
        for s, names in enumerate(members):
            whole = len(names) == 1 and self._numel[s] == self.parameters[names[0]].numel
            shapes.append("x".join(map(str, self.parameters[names[0]].shape)) if whole else "")
            aliases.append(";".join(a for n in names for a in self.parameters[n].aliases))
        return {
            "layer": self._group_values("layer"),
            "kind": self._group_values("kind"),
            "numel": self._numel.tolist(),
            "shape": shapes,
            "aliases": aliases,
        }

    def fingerprint(self) -> str:
        """SHA-256 over labels, parameter names, shapes and assignment."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        h = hashlib.sha256(json.dumps(self.labels).encode())
        for name, info in self.parameters.items():
            a = self.assignment[name]
            h.update(json.dumps([name, info.shape, a if isinstance(a, int) else "by entry"]).encode())
            if isinstance(a, np.ndarray):
                h.update(np.ascontiguousarray(a, dtype="<i8").tobytes())
        return h.hexdigest()

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `PartitionError` naming the differences where the partition was built for other parameters."""
        problems = []
        if missing := [n for n in self.parameters if n not in shapes]:
            problems.append(f"not in the model: {listed(missing)}")
        if extra := [n for n in shapes if n not in self.parameters]:
            problems.append(f"not in the partition: {listed(extra)}")
        problems += [
            f"{n!r} has shape {tuple(shapes[n])} in the model and {info.shape} in the partition"
            for n, info in self.parameters.items()
            if n in shapes and tuple(shapes[n]) != info.shape
        ][:10]
        if problems:
            raise PartitionError(
                "the partition was built for other parameters than this model's",
                why="; ".join(problems),
                do="build it from this model, with the same include_frozen",
            )


NAMED: dict[str, Callable[..., Partition]] = {
    "canonical": Partition.canonical,
    "layer": Partition.by_layer,
    "kind": Partition.by_kind,
    "attention": Partition.attention,
    "trivial": Partition.trivial,
    "discrete": Partition.discrete,
}


def _cut(
    name: str, shape: tuple[int, ...], axis: int, parts: Parts, repeats: int = 1
) -> tuple[int, list[str], np.ndarray]:
    """The axis, the names of the parts, and the part of each place along the axis."""
    names = [str(k) for k in (range(parts) if isinstance(parts, int) else parts)]
    times = f" {repeats} times" if repeats != 1 else ""
    refusal = f"{name!r} of shape {shape} cannot be cut into {len(names)} parts{times} along axis {axis}"
    if not -len(shape) <= axis < len(shape) or not names or repeats < 1:
        raise PartitionError(refusal, do=f"give an axis of its {len(shape)}, and at least one part")
    if len(set(names)) < len(names):
        raise PartitionError(refusal, why=f"two of {listed(names)} have the same name")
    if isinstance(parts, Mapping):
        sizes = [int(n) for n in parts.values()]
        if min(sizes) < 1 or sum(sizes) * repeats != shape[axis]:
            raise PartitionError(
                refusal, why=f"the sizes {', '.join(map(str, sizes))} do not fill its length of {shape[axis]}"
            )
    else:
        if shape[axis] % (len(names) * repeats):
            raise PartitionError(refusal, why=f"its length {shape[axis]} does not divide into equal parts")
        sizes = [shape[axis] // (len(names) * repeats)] * len(names)
    return axis % len(shape), names, np.tile(np.repeat(np.arange(len(names)), sizes), repeats)


def _literal(name: str) -> str:
    """A pattern that matches a name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def resolve(partition: str | Partition, model: nn.Module, include_frozen: bool = False) -> Partition:
    """A `Partition` from one of the names of `NAMED`, or the given one checked against the model."""
    if isinstance(partition, str):
        if partition not in NAMED:
            raise PartitionError(f"there is no partition named {partition!r}", do=nearest(partition, NAMED))
        return NAMED[partition](model, include_frozen)
    if not isinstance(partition, Partition):
        raise PartitionError(
            f"a partition is a name or an ho.Partition, not {type(partition).__name__}", do=f"use {listed(NAMED)}"
        )
    parameters, _ = describe_parameters(model, include_frozen)
    partition.check_fits({n: info.shape for n, info in parameters.items()})
    return partition


def describe_parameters(
    model: nn.Module, include_frozen: bool = False
) -> tuple[dict[str, ParameterInfo], tuple[str, ...]]:
    """The parameters of a model in order, tied ones once with their aliases; and the names of the frozen ones."""
    found = _known(model, include_frozen)
    if found.description is None:
        found.description = _describe(model, include_frozen)
    parameters, frozen = found.description
    return dict(parameters), frozen


@dataclass
class _Known:
    """What was found out about a model whose parameters were these."""

    signature: tuple
    description: tuple[dict[str, ParameterInfo], tuple[str, ...]] | None = None
    canonical: Partition | None = None


_MODELS: weakref.WeakKeyDictionary[nn.Module, dict[bool, _Known]] = weakref.WeakKeyDictionary()


def _known(model: nn.Module, include_frozen: bool) -> _Known:
    """Kept as long as the model has the same parameters under the same names: small models are summarized in 10 ms."""
    parameters = model.named_parameters(remove_duplicate=False)
    kinds = tuple(type(m) for m in model.modules())
    signature = kinds, tuple((n, id(p), p.shape, p.requires_grad) for n, p in parameters)
    mine = _MODELS.setdefault(model, {})
    if include_frozen not in mine or mine[include_frozen].signature != signature:
        mine[include_frozen] = _Known(signature)
    return mine[include_frozen]


def _describe(model: nn.Module, include_frozen: bool) -> tuple[dict[str, ParameterInfo], tuple[str, ...]]:
    names_of: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(p), []).append(name)
    parameters, frozen = {}, []
    for name, p in model.named_parameters():
        if not (p.requires_grad or include_frozen):
            frozen.append(name)
            continue
        owner, leaf = _owner(name)
        aliases = tuple(a for a in names_of[id(p)] if a != name)
        kind = _kind(model.get_submodule(owner), leaf)
        parameters[name] = ParameterInfo(tuple(p.shape), owner or leaf, kind, aliases)
    return parameters, tuple(frozen)


def _owner(name: str) -> tuple[str, str]:
    """The module that a parameter serves, and its name there.

    torch moves a re-parameterized tensor ``fc.weight`` to ``fc.parametrizations.weight.original``.
    """
    *path, leaf = name.split(".")
    if "parametrizations" in path[:-1]:
        at = path.index("parametrizations")
        path, leaf = path[:at], path[at + 1]
    return ".".join(path), leaf


def _kind(owner: nn.Module, leaf: str) -> str:
    """The kind of a parameter, from the class of the module that owns it and its own name.

    The class name decides for norms and embeddings, so that a user's or a library's RMSNorm counts as one.
    """
    owner_class = type(owner).__name__
    if re.search(r"norm", owner_class, re.IGNORECASE):
        return "norm"
    if re.search(r"embedding", owner_class, re.IGNORECASE) and re.search(r"weight|embed", leaf):
        return "embedding"
    if re.search(r"bias|(^|_)b(_|$)", leaf):
        return "bias"
    if re.search(r"weight|(^|_)[wW](_|$)|kernel", leaf):
        return "weight"
    return "other"


def _common(values: Iterable[str], attribute: str) -> str:
    """The coordinate of a merged group: the common module path of layers, ``other`` for mixed kinds."""
    if attribute == "kind":
        return "other"
    parts = [v.split(".") for v in values]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}..{last}"
