"""From the object in a file to a flat state_dict and the optimizer's state, both keyed by parameter names."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hoanalysis.errors import CheckpointError, listed

if TYPE_CHECKING:
    from torch import Tensor

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "params")
OPTIMIZER_KEYS = ("optimizer_state_dict", "optimizer", "optimizer_states")
OPTIMIZER_PREFIX = "optimizer."
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

OptimizerState = dict[str, dict[str, "Tensor"]]


def split_optimizer(tensors: "dict[str, Tensor]") -> "tuple[dict[str, Tensor], OptimizerState | None]":
    """Split tensors named ``optimizer.<state>.<parameter>`` off, where the file has a tensor ``<parameter>``."""
    weights: dict[str, Tensor] = {}
    state: OptimizerState = {}
    for name, tensor in tensors.items():
        kind, _, parameter = name.removeprefix(OPTIMIZER_PREFIX).partition(".")
        if name.startswith(OPTIMIZER_PREFIX) and parameter in tensors:
            state.setdefault(kind, {})[parameter] = tensor
        else:
            weights[name] = tensor
    return weights, state or None


def find_state_dict(content: Any, where: str, key: str | None, notes: list[str]) -> "dict[str, Tensor]":
    """The state_dict in the object that a file of torch.save held; ``key`` is a dotted path to it.

    Raises
    ------
    CheckpointError
        If there is none, naming the keys that the file has.
    """
    if key is not None:
        for part in key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                raise CheckpointError(
                    f"the file has no key {key!r}", where=where, why=_inventory(content), do="give another key, or none"
                )
            content = content[part]
    found = _search(content, notes, path="")
    if found is None:
        raise CheckpointError(
            "the file holds no state_dict",
            where=where + (f", key {key!r}" if key else ""),
            why=_inventory(content),
            do="a state_dict is a mapping of names to tensors; name its key: load_checkpoint(path, key=...)",
        )
    return found


def _search(content: Any, notes: list[str], path: str) -> "dict[str, Tensor] | None":
    from torch import Tensor

    if not isinstance(content, Mapping) or path.count(".") > 4:
        return None
    nested = [k for k in STATE_KEYS if isinstance(content.get(k), Mapping)]
    for key in nested:
        found = _search(content[key], notes, f"{path}{key}.")
        if found is not None:
            notes.append(f"the state_dict is under the key {(path + key)!r} of the file")
            others = [k for k in nested if k != key]
            if others:
                notes.append(f"the file has other candidates, left aside: {listed(others)}")
            return found
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        return None
    ignored = [k for k in content if str(k) not in tensors and k not in OPTIMIZER_KEYS]
    if ignored:
        notes.append(f"entries beside the tensors were ignored: {listed(ignored)}")
    return tensors


def _inventory(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"it holds an object of type {type(content).__name__}"
    return "its keys are " + (listed(f"{k}: {type(v).__name__}" for k, v in content.items()) or "none")


def inert_code(content: Any, path: str = "", depth: int = 0) -> list[str]:
    """Entries that tell another loader which code to run (Lightning's ``_instantiator``), as inert text."""
    if not isinstance(content, Mapping) or depth > 4:
        return []
    found = [f"{path}{k} = {str(v)[:100]!r}" for k, v in content.items() if k == "_instantiator"]
    for k, v in content.items():
        found += inert_code(v, f"{path}{k}.", depth + 1)
    return found


def find_optimizer(content: Any, weights: "Mapping[str, Tensor]", notes: list[str]) -> OptimizerState | None:
    """The optimizer's state in the object that a file of torch.save held, keyed by parameter names.

    torch numbers the parameters. The names are those that the optimizer kept (``param_names``), or else the tensors of
    the state_dict in order, where count and shapes agree; otherwise the state is left out, and a note says so.
    """
    key, optimizers = _optimizers(content)
    if len(optimizers) > 1:
        notes.append(f"the file has {len(optimizers)} optimizers under {key!r}; their state was left out")
    if len(optimizers) != 1:
        return None
    (raw,) = optimizers
    state = raw.get("state") if isinstance(raw, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        return None
    names = _names(raw, state, weights)
    if names is None:
        notes.append(f"the optimizer's state under {key!r} could not be matched to the tensors and was left out")
        return None
    return _by_name(state, names)


def _optimizers(content: Any) -> tuple[str, list[Any]]:
    key = next((k for k in OPTIMIZER_KEYS if isinstance(content, Mapping) and k in content), None)
    if key is None:
        return "", []
    return key, list(content[key]) if isinstance(content[key], list | tuple) else [content[key]]


def optimizer_settings(content: Any) -> dict[str, str]:
    """The numbers that the optimizer's parameter groups agree on (lr, betas, eps, ..), as `Checkpoint.metadata`."""
    _, optimizers = _optimizers(content)
    groups = optimizers[0].get("param_groups") if len(optimizers) == 1 and isinstance(optimizers[0], Mapping) else None
    if not isinstance(groups, list | tuple) or not groups or not all(isinstance(g, Mapping) for g in groups):
        return {}
    common = {str(k): v for k, v in groups[0].items() if _number(v) and all(g.get(k) == v for g in groups)}
    return {"training": json.dumps({"optimizer": common})} if common else {}


def _number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_number, value))
    return isinstance(value, int | float)


def _names(raw: Mapping, state: Mapping, weights: "Mapping[str, Tensor]") -> dict[Any, str] | None:
    groups = raw.get("param_groups", [])
    indices = [i for g in groups for i in g.get("params", [])]
    recorded = [n for g in groups for n in g.get("param_names", [])]
    if recorded and len(recorded) == len(indices):
        names = dict(zip(indices, recorded, strict=True))
    elif all(i in weights for i in state):
        names = {i: i for i in state}
    else:
        storages: dict[int, str] = {}  # tied tensors share a storage, and the optimizer counts them once
        for name, tensor in weights.items():
            if name.rpartition(".")[2] not in BUFFERS:
                storages.setdefault(tensor.data_ptr(), name)
        if len(storages) != len(indices):
            return None
        names = dict(zip(sorted(indices), storages.values(), strict=True))
    fits = all(
        names.get(i) in weights and all(_like(v, weights[names[i]]) for v in slots.values())
        for i, slots in state.items()
    )
    return names if fits else None


def _like(value: Any, weight: "Tensor") -> bool:
    """A slot is a number, or a tensor of the parameter's shape."""
    shape = getattr(value, "shape", ())
    return len(shape) == 0 or shape == weight.shape


def _by_name(state: Mapping, names: Mapping[Any, str]) -> OptimizerState:
    import torch

    by_name: OptimizerState = {}
    for index, slots in state.items():
        for slot, value in slots.items():
            if isinstance(value, torch.Tensor | int | float):
                by_name.setdefault(slot, {})[names[index]] = torch.as_tensor(value).detach()
    return by_name
