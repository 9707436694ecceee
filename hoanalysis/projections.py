"""How attention layers lay out Q, K and V where one projection computes all three.

A tensor is told by the name of its layer, and where that is not enough by the model's ``config``. What is found here is
for `Partition.split`: the axis, the parts in their order, and how often they repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from hoanalysis.partitions import ParameterInfo, Split

QKV = ("q", "k", "v")
Layout = tuple[Any, int]  # the parts and how often they repeat


def fused(model: nn.Module, parameters: Mapping[str, ParameterInfo]) -> dict[str, Split]:
    """Parameter name -> (axis, parts, repeats) of every fused projection."""
    config = getattr(model, "config", None)
    found: dict[str, Split] = {}
    for name, info in parameters.items():
        owner, _, leaf = name.rpartition(".")
        layer = owner.rpartition(".")[2]
        if leaf in ("in_proj_weight", "in_proj_bias"):
            found[name] = (0, QKV, 1)
        elif layer in LAYOUTS and leaf in ("weight", "bias"):
            axis = _output_axis(layer, info.shape)
            parts, repeats = LAYOUTS[layer](_Sizes(config), info.shape[axis])
            if parts is not None:
                found[name] = (axis, parts, repeats)
    return found


def _output_axis(layer: str, shape: tuple[int, ...]) -> int:
    """GPT-2's layers keep their weights transposed: (inputs, outputs)."""
    transposed = layer == "c_attn" and len(shape) == 2 and shape[1] > shape[0]
    return 1 if transposed else 0


class _Sizes:
    """Numbers of a configuration under any of their names; 0 where it does not tell."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __call__(self, *names: str) -> int:
        for place in (self._config, getattr(self._config, "attn_config", None)):
            for name in names:
                value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
                if isinstance(value, int):
                    return int(value)
        return 0

    @property
    def heads(self) -> int:
        return self("num_attention_heads", "n_head", "n_heads", "num_heads")

    @property
    def groups(self) -> int:
        """Heads of K and V."""
        return self("num_key_value_heads", "num_kv_heads", "kv_n_heads") or self.heads


def _thirds(sizes: _Sizes, length: int) -> Layout:
    """Q, then K, then V, of the same size; fewer heads for K and V where the configuration says so."""
    heads, groups = sizes.heads, sizes.groups
    if heads and groups != heads and length % (heads + 2 * groups) == 0:
        size = length // (heads + 2 * groups)
        return {"q": heads * size, "k": groups * size, "v": groups * size}, 1
    return (QKV, 1) if length % 3 == 0 else (None, 1)


def _by_head(sizes: _Sizes, length: int) -> Layout:
    """The rows of one head after those of another, each with its Q, K and V (GPT-NeoX, BLOOM, Falcon)."""
    heads = sizes.heads
    if sizes("new_decoder_architecture"):
        groups = sizes.groups
        size = length // (heads + 2 * groups)
        return {"q": heads // groups * size, "k": size, "v": size}, groups
    if sizes("multi_query"):
        size = length // (heads + 2)
        return {"q": heads * size, "k": size, "v": size}, 1
    return (QKV, heads) if heads and length % (3 * heads) == 0 else (None, 1)


def _multi_query(sizes: _Sizes, length: int) -> Layout:
    """GPT-2; in GPT-BigCode one head of K and V serves all of Q."""
    if sizes("multi_query"):
        size = length // (sizes.heads + 2)
        return {"q": length - 2 * size, "k": size, "v": size}, 1
    return _thirds(sizes, length)


def _phi_or_codegen(sizes: _Sizes, length: int) -> Layout:
    """CodeGen sorts by four processors that it was trained on, and within each Q, V, K."""
    if getattr(sizes._config, "model_type", "") == "codegen":
        return ("q", "v", "k"), 4
    return _thirds(sizes, length)


LAYOUTS: dict[str, Callable[[_Sizes, int], Layout]] = {
    "c_attn": _multi_query,
    "query_key_value": _by_head,
    "qkv": _thirds,
    "Wqkv": _thirds,
    "qkv_proj": _phi_or_codegen,
    "in_proj_qkv": _thirds,
}
