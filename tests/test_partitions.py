"""Partitions against assignments written out by hand and against the model's own ``named_parameters()``."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import hoanalysis as ho
from hoanalysis.errors import PartitionError
from hoanalysis.partitions import NAMED, ParameterInfo, Partition, describe_parameters, resolve


class Net(nn.Module):
    """Two linear layers in a submodule, a norm, and a parameter of the root's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))

    def forward(self, x):
        return self.scale * self.body(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.bias = nn.Parameter(torch.zeros(4))


def owner_of_entries(p: Partition) -> dict[str, list]:
    """Parameter -> the label of each of its entries, flat."""
    return {
        n: [p.labels[i] for i in np.broadcast_to(p.assignment[n], info.shape).ravel()]
        for n, info in p.parameters.items()
    }


def check_partition(p: Partition, shapes: dict[str, tuple[int, ...]]) -> None:
    """Disjoint and complete: every entry of every tensor has one group, counted entry by entry."""
    assert list(p.parameters) == list(shapes)
    counts = dict.fromkeys(p.labels, 0)
    for name, owners in owner_of_entries(p).items():
        assert len(owners) == int(np.prod(shapes[name]))
        for label in owners:
            counts[label] += 1
    assert p.numel.tolist() == list(counts.values())
    assert len(p) == len(p.labels) == len(set(p.labels))
    coords = p.coords()
    assert {len(v) for v in coords.values()} == {len(p)}


SHAPES = {n: tuple(p.shape) for n, p in Net().named_parameters()}


# ---- order, ties, frozen ----------------------------------------------------------------------------------------


def test_canonical_is_named_parameters_in_order():
    model = Net()
    p = Partition.canonical(model)
    assert list(p.labels) == [n for n, _ in model.named_parameters()]
    assert p.labels[0] == "scale"
    assert p.numel.tolist() == [t.numel() for t in model.parameters()]
    assert p.coords()["shape"] == ["", "4x3", "4", "4", "4", "2x4", "2"]
    assert p.is_whole()
    check_partition(p, SHAPES)


@pytest.mark.row("M12")
def test_a_tied_tensor_appears_once_with_its_other_names():
    p = Partition.canonical(Tied())
    assert p.labels == ("embedding.weight", "mix.weight", "mix.bias", "head.bias")
    assert p.coords()["aliases"] == ["head.weight", "", "", ""]
    assert p.parameters["embedding.weight"].kind == "embedding"
    assert p.numel.sum() == sum(t.numel() for t in Tied().parameters())


def test_three_names_of_one_tensor_are_all_aliases():
    model = Tied()
    model.third = nn.Linear(3, 5)
    model.third.weight = model.embedding.weight
    assert Partition.canonical(model).coords()["aliases"][0] == "head.weight;third.weight"


@pytest.mark.parametrize("name", sorted(NAMED))
@pytest.mark.row("P3")
def test_frozen_parameters_are_left_out_and_listed_or_taken_in(name):
    model = Net()
    model.body[0].weight.requires_grad_(False)
    p = resolve(name, model)
    assert p.frozen == ("body.0.weight",)
    check_partition(p, {n: s for n, s in SHAPES.items() if n != "body.0.weight"})
    q = resolve(name, model, include_frozen=True)
    assert q.frozen == ()
    check_partition(q, SHAPES)


def test_a_model_without_free_parameters_says_whether_it_is_frozen():
    with pytest.raises(PartitionError, match=r"(?s)7 are frozen.*include_frozen=True"):
        Partition.canonical(Net().requires_grad_(False))
    with pytest.raises(PartitionError, match="none at all"):
        Partition.canonical(nn.ReLU())


# ---- constructors -----------------------------------------------------------------------------------------------


def test_by_layer_groups_weight_and_bias_of_a_module():
    p = Partition.by_layer(Net())
    assert p.labels == ("scale", "body.0", "body.1", "body.2")
    assert p.numel.tolist() == [1, 16, 8, 10]
    assert p.coords()["layer"] == list(p.labels)
    assert p.coords()["kind"] == ["other", "other", "norm", "other"]
    assert p.name == "layer"


def test_by_kind_stands_in_the_order_of_first_members():
    p = Partition.by_kind(Net())
    assert p.labels == ("other", "weight", "bias", "norm")
    assert p.numel.tolist() == [1, 20, 6, 8]


def test_trivial_is_one_group_of_all():
    p = Partition.trivial(Net())
    assert p.labels == ("all",)
    assert p.numel.tolist() == [sum(t.numel() for t in Net().parameters())]
    assert len(p) == 1


def test_discrete_labels_are_row_major():
    p = Partition.discrete(nn.Linear(3, 2))
    assert p.labels == (*(f"weight[{i},{j}]" for i in range(2) for j in range(3)), "bias[0]", "bias[1]")
    np.testing.assert_array_equal(p.assignment["weight"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(p.assignment["bias"], [6, 7])
    assert p.numel.tolist() == [1] * 8
    assert set(p.coords()["shape"]) == {""}
    assert p.coords()["kind"] == ["weight"] * 6 + ["bias"] * 2
    assert not p.is_whole()


def test_discrete_of_a_convolution_follows_the_flattened_tensor():
    conv = nn.Conv2d(2, 3, 2)
    p = Partition.discrete(conv)
    flat = torch.arange(conv.weight.numel()).reshape(conv.weight.shape)
    for label, group in zip(p.labels[: conv.weight.numel()], range(conv.weight.numel()), strict=True):
        index = tuple(int(i) for i in label.removeprefix("weight[").removesuffix("]").split(","))
        assert int(flat[index]) == group == int(p.assignment["weight"][index])


def test_split_cuts_along_an_axis_into_equal_parts():
    p = Partition.split(nn.MultiheadAttention(2, 1), {"in_proj_*": (0, 3)})
    assert p.labels[:6] == tuple(f"in_proj_{x}[{k}]" for x in ("weight", "bias") for k in range(3))
    np.testing.assert_array_equal(p.assignment["in_proj_weight"], np.repeat([0, 1, 2], 2)[:, None].repeat(2, 1))
    assert p.assignment["out_proj.weight"] == 6
    check_partition(p, {n: tuple(t.shape) for n, t in nn.MultiheadAttention(2, 1).named_parameters()})


def test_split_along_the_last_axis():
    model = nn.Linear(4, 3)
    for axis in (1, -1):
        p = Partition.split(model, {"weight": (axis, 2)})
        np.testing.assert_array_equal(p.assignment["weight"], [[0, 0, 1, 1]] * 3)
        assert p.numel.tolist() == [6, 6, 3]


@pytest.mark.parametrize("spec", [(0, 2), (2, 1), (-3, 1), (0, 0), (0, -1)])
def test_split_that_does_not_divide_names_tensor_and_shape(spec):
    with pytest.raises(PartitionError, match=r"'weight' of shape \(3, 4\) cannot be cut into"):
        Partition.split(nn.Linear(4, 3), {"weight": spec})


def test_split_into_parts_with_names_sizes_and_repeats():
    model = nn.Linear(2, 12)
    named = Partition.split(model, {"*": (0, ["q", "k", "v"])})
    assert named.labels == tuple(f"{n}[{x}]" for n in ("weight", "bias") for x in "qkv")
    np.testing.assert_array_equal(named.assignment["bias"], np.repeat([3, 4, 5], 4))
    sized = Partition.split(model, {"bias": (0, {"q": 6, "k": 2, "v": 4})})
    np.testing.assert_array_equal(sized.assignment["bias"], [1] * 6 + [2] * 2 + [3] * 4)
    by_head = Partition.split(model, {"bias": (0, "qkv", 2)})
    np.testing.assert_array_equal(by_head.assignment["bias"], [1, 1, 2, 2, 3, 3] * 2)
    grouped = Partition.split(model, {"bias": (0, {"q": 4, "k": 1, "v": 1}, 2)})
    np.testing.assert_array_equal(grouped.assignment["bias"], [1, 1, 1, 1, 2, 3] * 2)
    for p in (named, sized, by_head, grouped):
        check_partition(p, {n: tuple(t.shape) for n, t in model.named_parameters()})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ((0, {"q": 6, "k": 5}), "sizes 6, 5 do not fill its length of 12"),
        ((0, {"q": 6, "k": 0}), "sizes 6, 0 do not fill"),
        ((0, ["q", "k", "q"]), "same name"),
        ((0, ["q", "k", "v"], 5), "length 12 does not divide"),
        ((0, 3, 0), "at least one part"),
        ((3, 1), "an axis of its 2"),
    ],
)
def test_split_into_impossible_parts_says_why(spec, words):
    with pytest.raises(PartitionError, match=rf"(?s)'weight' of shape \(12, 2\) cannot be cut.*{words}"):
        Partition.split(nn.Linear(2, 12), {"weight": spec})


class Fused(nn.Module):
    """Attention with a projection that is laid out as the Hugging Face model of ``kind`` does it."""

    def __init__(self, kind: str, name: str, heads: int, groups: int, size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type=kind,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            multi_query=kind in ("falcon 7b", "bigcode"),
            new_decoder_architecture=kind == "falcon 40b",
        )
        self.kind, self.name, self.heads, self.groups, self.size = kind, name, heads, groups, size
        self.attn = nn.Module()
        self.attn.add_module(name, nn.Linear(5, (heads + 2 * groups) * size))
        self.out = nn.Linear(heads * size, 3)

    def parts(self, y):
        h, g, d = self.heads, self.groups, self.size
        if self.kind in ("gpt_neox", "falcon 40b"):
            y = y.unflatten(-1, (g, h // g + 2, d))
            return y[..., :-2, :].flatten(-3, -2), y[..., -2, :], y[..., -1, :]
        if self.kind == "codegen":
            q, v, k = y.unflatten(-1, (4, 3 * h * d // 4)).split(h * d // 4, -1)
            return (t.flatten(-2).unflatten(-1, (h, d)) for t in (q, k, v))
        return (t.unflatten(-1, (-1, d)) for t in y.split([h * d, g * d, g * d], -1))

    def forward(self, x):
        q, k, v = self.parts(self.attn.get_submodule(self.name)(x))
        k, v = (t.repeat_interleave(self.heads // self.groups, -2) for t in (k, v))
        p = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2)).mean(1)


@pytest.mark.parametrize(
    ("kind", "name", "heads", "groups"),
    [
        ("gpt2", "c_attn", 2, 2),
        ("bigcode", "c_attn", 4, 1),
        ("gpt_neox", "query_key_value", 4, 4),
        ("falcon 7b", "query_key_value", 4, 1),
        ("falcon 40b", "query_key_value", 4, 2),
        ("phi3", "qkv_proj", 4, 2),
        ("codegen", "qkv_proj", 8, 8),
        ("mpt", "Wqkv", 2, 2),
        ("vit", "qkv", 2, 2),
    ],
)
def test_attention_tells_q_k_and_v_apart(kind, name, heads, groups):
    """Scores are bilinear in q and k: scaling either changes the loss alike, D1 along the weights is the same."""
    torch.manual_seed(0)
    model = Fused(kind, name, heads, groups, size=4).double()
    cut = [f"attn.{name}.{t}[{x}]" for t in ("weight", "bias") for x in "qkv"]
    p = Partition.attention(model)
    assert set(cut) < set(p.labels)
    assert p.name == "attention"
    p = p.merge({x: [g for g in cut if g.endswith(f"[{x}]")] for x in "qkv"})
    problem = ho.Problem(model, [(torch.randn(6, 7, 5).double(), torch.randint(0, 3, (6,)))], F.cross_entropy)
    ds = ho.summarize(problem, 1, direction="weights", partition=p, engine="nested", progress=False)
    q, k, v = (float(ds.D1.sel(group=x)) for x in "qkv")
    np.testing.assert_allclose(q, k, rtol=1e-10)
    assert abs(v - q) > 1e-3 * abs(q)


def test_attention_knows_torchs_own_and_transposed_weights():
    p = Partition.attention(nn.MultiheadAttention(2, 1))
    assert p.labels[:3] == ("in_proj_weight[q]", "in_proj_weight[k]", "in_proj_weight[v]")
    model = nn.Module()
    model.c_attn = nn.Module()
    model.c_attn.weight = nn.Parameter(torch.zeros(2, 6))  # as GPT-2 keeps it: inputs, outputs
    np.testing.assert_array_equal(Partition.attention(model).assignment["c_attn.weight"], [[0, 0, 1, 1, 2, 2]] * 2)
    assert Partition.attention(Net()).labels == Partition.canonical(Net()).labels


def test_split_and_merged_again_is_the_whole_tensors_summary():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 6), nn.GELU(), nn.Linear(6, 3))
    model.double()
    data = [(torch.randn(5, 2, 5, 5).double(), torch.randint(0, 3, (5,))) for _ in range(2)]
    problem = ho.Problem(model, data, F.cross_entropy)
    options = {"direction": "gradient", "keep_batches": 2, "progress": False}
    whole = ho.summarize(problem, 3, **options)
    p = Partition.split(model, {"0.weight": (0, 4), "3.weight": (1, ["q", "k", "v"], 2), "5.bias": (0, 3)})
    fine = ho.summarize(problem, 3, partition=p, **options)
    back = fine.ho.merge(
        {n: [g for g in p.labels if g.startswith(f"{n}[")] for n in ("0.weight", "3.weight", "5.bias")}
    )
    for name in ("D1", "D2", "D3", "D1_se", "D2_se", "D3_se"):
        scale = float(abs(whole[name]).max())
        np.testing.assert_allclose(back[name], whole[name], rtol=1e-12, atol=1e-12 * scale, err_msg=name)


def test_split_patterns_that_disagree_name_the_tensor():
    with pytest.raises(PartitionError, match="'weight'"):
        Partition.split(nn.Linear(4, 2), {"w*": (0, 2), "weight": (1, 2)})


def test_split_pattern_without_a_match():
    with pytest.raises(PartitionError, match=r"(?s)'wieght' matches no parameter.*did you mean 'weight'"):
        Partition.split(nn.Linear(4, 2), {"wieght": (0, 2)})


def test_blocks_are_consecutive_and_even():
    p = Partition.blocks(Net(), 3)
    assert [len(m) for m in p.members()] == [3, 2, 2]
    assert [n for m in p.members() for n in m] == list(SHAPES)
    assert p.labels == ("scale..body.0.bias", "body.1.weight..body.1.bias", "body.2.weight..body.2.bias")
    check_partition(p, SHAPES)


def test_patterns_assign_parameters_to_groups():
    p = Partition.by_pattern(Net(), {"last": ["body.2.weight", "body.2.bias"], "first": "body.0.*"}, rest="others")
    assert p.labels == ("others", "first", "last")  # by their first parameters
    assert dict(zip(p.labels, p.members(), strict=True)) == {
        "first": ["body.0.weight", "body.0.bias"],
        "last": ["body.2.weight", "body.2.bias"],
        "others": ["scale", "body.1.weight", "body.1.bias"],
    }
    check_partition(p, SHAPES)


def test_patterns_that_cover_everything_leave_rest_out():
    assert Partition.by_pattern(Net(), {"a": "s*", "b": "b*"}, rest="others").labels == ("a", "b")


def test_rest_may_be_a_group_that_has_a_pattern():
    p = Partition.by_pattern(Net(), {"first": "scale", "second": "body.0.*"}, rest="first")
    assert p.labels == ("first", "second")
    assert p.members()[1] == ["body.0.weight", "body.0.bias"]
    check_partition(p, SHAPES)


# ---- P1, P2, P5, P6 ---------------------------------------------------------------------------------------------


@pytest.mark.row("P1")
def test_a_pattern_without_a_match_names_it_the_group_and_the_parameters():
    with pytest.raises(PartitionError, match=r"(?s)'bdy\.\*' of group 'a'.*'scale', 'body\.0\.weight'"):
        Partition.by_pattern(Net(), {"a": "bdy.*"}, rest="b")


@pytest.mark.row("P1")
def test_a_group_without_patterns_is_empty():
    with pytest.raises(PartitionError, match="without parameters: 'a'"):
        Partition.by_pattern(Net(), {"a": [], "b": "*"})


@pytest.mark.row("P2")
def test_overlapping_patterns_name_parameter_and_both_groups():
    with pytest.raises(PartitionError, match=r"'body\.0\.weight' is in two groups: 'a' and 'b'"):
        Partition.by_pattern(Net(), {"a": "body.*", "b": "*.weight"}, rest="c")


@pytest.mark.row("P2")
def test_parameters_that_no_pattern_matches_are_named_with_the_way_out():
    with pytest.raises(PartitionError, match=r"(?s)'scale'.*rest='label'"):
        Partition.by_pattern(Net(), {"a": "body.*"})


INFO = {"w": ParameterInfo((2, 2), "w", "weight"), "b": ParameterInfo((2,), "b", "bias")}


@pytest.mark.parametrize(
    ("labels", "assignment", "words"),
    [
        (("a", "a"), {"w": 0, "b": 1}, "labels repeat: 'a'"),
        (("a", "b"), {"w": 0}, "without a group: 'b'"),
        (("a",), {"w": 0, "b": 0, "c": 0}, "do not exist: 'c'"),
        (("a", "z"), {"w": 0, "b": 0}, "without parameters: 'z'"),
        (("a", "b"), {"w": np.zeros((2, 3), int), "b": 1}, r"'w' has shape \(2, 3\), the tensor \(2, 2\)"),
        (("a",), {"w": 0, "b": 1}, "'b'.*group 1"),
        (("a", "b"), {"w": -1, "b": 0}, "'w'.*group -1"),
        (("a", "b"), {"w": np.array([[0, 1], [1, 2]]), "b": 0}, "'w'.*group 2"),
        (("a", "b"), {"w": np.array([[0, 1], [1, -1]]), "b": 0}, "'w'.*group -1"),
    ],
)
def test_what_is_no_partition_is_refused_with_the_culprit(labels, assignment, words):
    with pytest.raises(PartitionError, match=words):
        Partition(labels, INFO, assignment)


@pytest.mark.row("P5")
def test_repeated_labels_are_named_however_many_there_are():
    info = {"w": ParameterInfo((5000,), "w", "weight")}
    with pytest.raises(PartitionError, match="repeat: 'x7'"):
        Partition(("x7", *(f"x{i}" for i in range(4999))), info, {"w": np.arange(5000)})


@pytest.mark.row("P5")
def test_strange_labels_are_data():
    labels = ('a/b.c$d<e>"f{{g}}', "\u202eé")
    assert Partition(labels, INFO, {"w": 0, "b": 1}).coords()["kind"] == ["weight", "bias"]


@pytest.mark.row("P6")
def test_a_partition_of_another_model_names_the_differences():
    p = Partition.canonical(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    with pytest.raises(PartitionError, match=r"(?s)'0\.weight' has shape \(4, 5\) in the model and \(4, 3\)"):
        resolve(p, nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)))
    with pytest.raises(PartitionError, match=r"(?s)not in the model: '1\.weight', '1\.bias'.*not in the partition: '2"):
        resolve(p, nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))


def test_a_partition_with_frozen_parameters_asks_for_the_same_flag():
    model = Net()
    model.scale.requires_grad_(False)
    p = Partition.canonical(model, include_frozen=True)
    assert resolve(p, model, include_frozen=True) is p
    with pytest.raises(PartitionError, match=r"(?s)not in the model: 'scale'.*include_frozen"):
        resolve(p, model)


def test_a_partition_serves_another_instance_of_the_model():
    p = Partition.by_layer(Net())
    other = Net()
    assert resolve(p, other) is p
    assert p == Partition.by_layer(other)
    assert hash(p) == hash(Partition.by_layer(other))


def test_wrong_names_and_types_of_a_partition():
    with pytest.raises(PartitionError, match="did you mean 'canonical'"):
        resolve("cannonical", Net())
    with pytest.raises(PartitionError, match="not list"):
        resolve([["scale"]], Net())


# ---- merge ------------------------------------------------------------------------------------------------------


def test_merge_by_layer_and_kind_equal_the_constructors():
    p = Partition.canonical(Net())
    assert p.merge("layer") == Partition.by_layer(Net())
    assert p.merge("kind") == Partition.by_kind(Net())
    assert p.merge(3) == Partition.blocks(Net(), 3)
    assert p.merge({"all": p.labels}) == Partition.trivial(Net())


def test_merging_the_discrete_partition_gives_whole_tensors_back():
    model = nn.Linear(3, 2)
    p = Partition.discrete(model)
    names = {n: [x for x in p.labels if x.startswith(n + "[")] for n in ("weight", "bias")}
    merged = p.merge(names)
    assert merged.labels == ("weight", "bias")
    assert owner_of_entries(merged) == owner_of_entries(Partition.canonical(model))
    assert merged.coords() == Partition.canonical(model).coords()
    assert p.merge("layer").labels == Partition.by_layer(model).labels


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=7, max_size=7), st.sampled_from(["canonical", "split"]))
def test_any_merge_moves_every_entry_to_its_new_group(owner, start):
    p = Partition.canonical(Net()) if start == "canonical" else Partition.split(Net(), {"body.2.weight": (1, 2)})
    owner = [*owner, 0][: len(p)]
    mapping = {f"new{k}": [x for x, o in zip(p.labels, owner, strict=True) if o == k] for k in dict.fromkeys(owner)}
    merged = p.merge(mapping)
    assert list(merged.labels) == [f"new{k}" for k in dict.fromkeys(owner)]  # where the first member stood
    new = {old: label for label, olds in mapping.items() for old in olds}
    expected = {n: [new[x] for x in owners] for n, owners in owner_of_entries(p).items()}
    assert owner_of_entries(merged) == expected
    check_partition(merged, SHAPES)


def test_groups_that_a_mapping_does_not_name_stay():
    p = Partition.canonical(Net()).merge({"ends": ["body.2.bias", "scale"]})
    assert p.labels == ("ends", *list(SHAPES)[1:-1])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (0, "7 groups into 0"),
        (8, "7 groups into 8"),
        (True, "cannot merge by True"),
        (2.0, "cannot merge by 2.0"),
        ("size", "cannot merge by 'size'"),
        ({"a": ["body.0.weigth"]}, "did you mean 'body.0.weight'"),
        ({"a": ["scale"], "b": ["scale"]}, "'scale' goes to two: 'a' and 'b'"),
        ({"scale": ["scale"], "b": ["scale"]}, "'scale' goes to two: 'scale' and 'b'"),
        ({"a": []}, "'a'"),
        ({"a": "scale"}, "'a'.*list"),
        ({"scale": ["body.0.weight"]}, "'scale'"),
    ],
)
def test_merges_that_cannot_be(how, words):
    with pytest.raises(PartitionError, match=words):
        Partition.canonical(Net()).merge(how)


# ---- kinds ------------------------------------------------------------------------------------------------------

KINDS = {
    "linear": (nn.Linear(2, 2), {"weight": "weight", "bias": "bias"}),
    "conv": (nn.ConvTranspose1d(2, 2, 3), {"weight": "weight", "bias": "bias"}),
    "layer norm": (nn.LayerNorm(2), {"weight": "norm", "bias": "norm"}),
    "batch norm": (nn.BatchNorm2d(2), {"weight": "norm", "bias": "norm"}),
    "group norm": (nn.GroupNorm(1, 2), {"weight": "norm", "bias": "norm"}),
    "torch rms norm": (nn.RMSNorm(2), {"weight": "norm"}),
    "user rms norm": (RMSNorm(), {"weight": "norm", "bias": "norm"}),
    "embedding": (nn.Embedding(3, 2), {"weight": "embedding"}),
    "embedding bag": (nn.EmbeddingBag(3, 2), {"weight": "embedding"}),
    "lstm": (
        nn.LSTM(2, 3),
        {"weight_ih_l0": "weight", "weight_hh_l0": "weight", "bias_ih_l0": "bias", "bias_hh_l0": "bias"},
    ),
    "attention": (
        nn.MultiheadAttention(2, 1, add_bias_kv=True),
        {
            "in_proj_weight": "weight",
            "in_proj_bias": "bias",
            "bias_k": "bias",
            "bias_v": "bias",
            "out_proj.weight": "weight",
            "out_proj.bias": "bias",
        },
    ),
    "weight norm": (
        parametrizations.weight_norm(nn.Linear(2, 2)),
        {
            "bias": "bias",
            "parametrizations.weight.original0": "weight",
            "parametrizations.weight.original1": "weight",
        },
    ),
    "parametrized bias": (
        nn.utils.parametrize.register_parametrization(nn.Linear(2, 2), "bias", nn.Identity()),
        {"weight": "weight", "parametrizations.bias.original": "bias"},
    ),
    "parametrized embedding": (
        nn.utils.parametrize.register_parametrization(nn.Embedding(3, 2), "weight", nn.Identity()),
        {"parametrizations.weight.original": "embedding"},
    ),
    "parametrized norm": (
        nn.utils.parametrize.register_parametrization(nn.LayerNorm(2), "weight", nn.Identity()),
        {"bias": "norm", "parametrizations.weight.original": "norm"},
    ),
    "bare": (nn.ParameterList([torch.zeros(2)]), {"0": "other"}),
}


@pytest.mark.parametrize("case", KINDS)
def test_kinds(case):
    module, expected = KINDS[case]
    for prefix, model in (("", module), ("block.inner.", nn.ModuleDict({"block": nn.ModuleDict({"inner": module})}))):
        parameters, _ = describe_parameters(model)
        assert {n: i.kind for n, i in parameters.items()} == {prefix + n: k for n, k in expected.items()}


def test_a_reparameterized_weight_belongs_to_its_module():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 3)), nn.ReLU(), nn.Linear(3, 1))
    p = Partition.by_layer(model)
    assert p.labels == ("0", "2")
    assert p.numel.tolist() == [3 + 3 + 6, 4]


# ---- fingerprints -----------------------------------------------------------------------------------------------


def test_fingerprints_tell_partitions_apart():
    model, names = Net(), sorted(set(NAMED) - {"attention"})  # without attention it is the canonical one
    made = [NAMED[n](model) for n in names]
    made += [Partition.blocks(model, 2), Partition.blocks(model, 3)]
    made += [Partition.split(model, {"body.0.weight": (axis, 1)}) for axis in (0,)]
    made += [Partition.split(model, {"body.2.weight": (axis, 2)}) for axis in (0, 1)]
    made += [Partition.canonical(Tied())]
    prints = [p.fingerprint() for p in made]
    assert len(set(prints)) == len(prints)
    assert [NAMED[n](Net()).fingerprint() for n in names] == prints[: len(names)]


def test_fingerprints_see_assignments_of_any_integer_type():
    plain = Partition(("a", "b"), INFO, {"w": 0, "b": 1})
    assert Partition(("a", "b"), INFO, {"w": np.int64(0), "b": np.int64(1)}) == plain
    assert Partition(("a", "b"), INFO, {"w": np.int64(1), "b": np.int64(0)}) != plain
    by_entry = np.array([[0, 1], [1, 0]])
    assert Partition(("a", "b"), INFO, {"w": by_entry.astype(np.int32), "b": 1}) == Partition(
        ("a", "b"), INFO, {"w": by_entry, "b": 1}
    )


def test_a_tensor_without_entries_is_a_group_of_none():
    p = Partition.canonical(nn.Sequential(nn.Linear(2, 1), nn.ParameterList([torch.zeros(0, 3)])))
    assert p.numel.tolist() == [2, 1, 0]


def test_what_is_kept_of_a_model_follows_its_changes():
    """Frozen, tied, replaced and exchanged parts are seen; a description that is changed by its reader is not kept."""
    model = Net()
    first = Partition.canonical(model)
    assert Partition.canonical(model).labels == first.labels
    describe_parameters(model)[0].clear()
    assert len(describe_parameters(model)[0]) == len(first)
    model.body[0].bias.requires_grad_(False)
    assert Partition.canonical(model).frozen == ("body.0.bias",)
    assert "body.0.bias" in Partition.canonical(model, include_frozen=True).labels
    model.body[0].bias = model.body[1].bias  # both of shape (4,)
    assert describe_parameters(model)[0]["body.0.bias"].aliases == ("body.1.bias",)
    model.body[1] = nn.GroupNorm(2, 4)
    assert describe_parameters(model)[0]["body.1.weight"].kind == "norm"
    model.body[1] = RMSNorm()
    assert describe_parameters(model)[0]["body.1.bias"].shape == (4,)
    model.body[2] = nn.Linear(4, 7)
    assert describe_parameters(model)[0]["body.2.weight"].shape == (7, 4)
