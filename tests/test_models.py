import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hoanalysis.errors import ModelError
from hoanalysis.models import GPT, MLP, LeNet5, VGG11Prime, cross_entropy_tokens

BUILDERS = {
    "mlp-tanh": (lambda p: MLP((12, 9, 7, 3), "tanh", p), (5, 12)),
    "mlp-relu": (lambda p: MLP((12, 9, 7, 3), "relu", p), (5, 12)),
    "lenet-relu": (lambda p: LeNet5(3, 10, "relu", p), (2, 3, 32, 32)),
    "lenet-tanh": (lambda p: LeNet5(3, 10, "tanh", p), (2, 3, 32, 32)),
    "vgg": (lambda p: VGG11Prime(width=1 / 16, parameterization=p), (2, 3, 32, 32)),
}


def count(model):
    return len(list(model.parameters())), sum(p.numel() for p in model.parameters())


def test_numbers_of_tensors_and_parameters():
    # 5*5*6+6, 25*6*16+16, 400*120+120, 120*84+84, 84*10+10
    assert count(LeNet5()) == (10, 156 + 2416 + 48120 + 10164 + 850)
    channels = [3, 2, 4, 8, 8, 16, 16, 16, 16]
    expected = sum(9 * a * b + b for a, b in itertools.pairwise(channels)) + 16 * 10 + 10
    assert count(VGG11Prime(width=1 / 32)) == (18, expected)
    gpt = GPT(vocab_size=64, context=128, n_layer=6, n_head=8, width=256)
    assert count(gpt)[0] == 77
    assert count(GPT(64, 16, 2, 2, 8))[0] == 29
    assert count(GPT(64, 16, 2, 2, 8, tie=True))[0] == 28


def test_vgg11_at_full_width_has_the_channels_of_the_paper():
    with torch.device("meta"):
        model = VGG11Prime()
    assert [c.out_channels for c in model.convs] == [64, 128, 256, 256, 512, 512, 512, 512]
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert model.fc.weight.shape == (10, 512)


@pytest.mark.parametrize("name", BUILDERS)
def test_both_parameterizations_start_as_one_function(name):
    build, shape = BUILDERS[name]
    models = {}
    for parameterization in ("standard", "ntk"):
        torch.manual_seed(3)
        models[parameterization] = build(parameterization).double()
    x = torch.randn(shape, dtype=torch.float64)
    assert [n for n, _ in models["ntk"].named_parameters()] == [n for n, _ in models["standard"].named_parameters()]
    # the weights were drawn in float32, hence not 1e-15
    assert_close(models["ntk"](x), models["standard"](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_standard_layer_with_scaled_weights_is_the_ntk_layer(name):
    """W_standard = gain / sqrt(fan-in) W_ntk, and the gradients differ by that factor; random biases are not scaled."""
    build, shape = BUILDERS[name]
    torch.manual_seed(4)
    ntk, standard = build("ntk").double(), build("standard").double()
    gain = 1.0 if "tanh" in name else math.sqrt(2)
    parameters = dict(ntk.named_parameters())
    last = list(parameters)[-2]
    factors = {}
    with torch.no_grad():
        for n, q in standard.named_parameters():
            parameters[n].normal_()
            weight = n.endswith("weight")
            factors[n] = (1.0 if n == last else gain) / math.sqrt(q[0].numel()) if weight else 1.0
            q.copy_(factors[n] * parameters[n])
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(ntk(x), standard(x))
    ntk(x).square().sum().backward()
    standard(x).square().sum().backward()
    for n, q in standard.named_parameters():
        assert_close(parameters[n].grad, factors[n] * q.grad)


def test_initialisation_has_the_documented_moments():
    torch.manual_seed(0)
    standard, ntk = MLP((400, 300, 10), "relu"), MLP((400, 300, 10), "relu", "ntk")
    assert_close(standard.layers[0].weight.std(), torch.tensor(math.sqrt(2 / 400)), rtol=0.02, atol=0.0)
    assert_close(standard.layers[1].weight.std(), torch.tensor(math.sqrt(1 / 300)), rtol=0.05, atol=0.0)
    assert_close(ntk.layers[0].weight.std(), torch.tensor(1.0), rtol=0.02, atol=0.0)
    assert not standard.layers[0].bias.any()


def test_lenet_is_the_composition_of_its_layers():
    torch.manual_seed(0)
    model, x = LeNet5(activation="tanh"), torch.randn(3, 1, 32, 32)
    chain = torch.nn.Sequential(
        model.conv1, torch.nn.Tanh(), torch.nn.MaxPool2d(2), model.conv2, torch.nn.Tanh(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), model.fc1, torch.nn.Tanh(), model.fc2, torch.nn.Tanh(), model.fc3,
    )  # fmt: skip
    assert_close(model(x), chain(x))


def reference_gpt(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The forward pass of one head at a time, with an explicit mask and norms written out."""

    def norm(x, layer):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    T = tokens.shape[1]
    x = model.token_embedding.weight[tokens] + model.position_embedding.weight[:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for block in model.blocks:
        h = norm(x, block.norm1)
        C, n = h.shape[-1], block.attention.n_head
        q, k, v = (h @ block.attention.qkv.weight.T + block.attention.qkv.bias).split(C, dim=-1)
        heads = []
        for i in range(n):
            part = slice(i * C // n, (i + 1) * C // n)
            score = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(C // n)
            heads.append(score.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
        x = x + block.attention.projection(torch.cat(heads, -1))
        h = block.expand(norm(x, block.norm2))
        x = x + block.contract(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    return norm(x, model.norm) @ model.head.weight.T


@pytest.mark.parametrize("tie", [False, True])
def test_gpt_equals_a_forward_pass_written_out(tie):
    torch.manual_seed(0)
    model = GPT(vocab_size=11, context=9, n_layer=2, n_head=3, width=12, tie=tie).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(0, 11, (4, 7))
    assert_close(model(tokens), reference_gpt(model, tokens))
    assert (model.head.weight is model.token_embedding.weight) == tie


def test_gpt_does_not_see_the_future():
    torch.manual_seed(0)
    model = GPT(vocab_size=11, context=9, n_layer=2, n_head=2, width=8).double()
    tokens = torch.randint(0, 11, (1, 9))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amin(-1).max() > 0


def test_cross_entropy_tokens_is_the_mean_over_tokens():
    logits, targets = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(0, 7, (3, 5))
    expected = -logits.log_softmax(-1).gather(2, targets[..., None]).mean()
    assert_close(cross_entropy_tokens(logits, targets), expected)
    by_window = torch.stack([F.cross_entropy(a, b) for a, b in zip(logits, targets, strict=True)])
    assert_close(by_window.mean(), expected)


def test_errors_name_the_argument():
    with pytest.raises(ModelError, match="did you mean 'relu'"):
        LeNet5(activation="relus")
    with pytest.raises(ModelError, match="parameterization 'mup'"):
        MLP((3, 2), parameterization="mup")
    with pytest.raises(ModelError, match="two sizes"):
        MLP((3,))
    with pytest.raises(ModelError, match="multiple of the 3 heads"):
        GPT(5, 4, 1, 3, 8)
    with pytest.raises(ModelError, match=r"9 tokens.*context=4"):
        GPT(5, 4, 1, 2, 8)(torch.zeros(1, 9, dtype=torch.int64))
