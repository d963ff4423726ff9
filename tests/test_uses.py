"""What a weight is multiplied with: columns that, times the weight, give the layer's very outputs."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from cbpq.uses import Use, watching


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ready(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with random biases (attention's are zero at first)."""
    for seed, parameter in enumerate(model.double().eval().parameters()):
        parameter.data = 0.3 * random(*parameter.shape, seed=seed)
    return model


@torch.no_grad()
def watched(model: nn.Module, *names: str, inputs: Any) -> tuple[dict[str, list[Use]], Any]:
    """All uses by name, and the output."""
    uses: dict[str, list[Use]] = {name: [] for name in names}
    with watching(model, names, lambda name, use: uses[name].append(use)):
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return uses, output


def product(weight: Tensor, columns: Tensor) -> Tensor:
    """Weight times columns (G, R, N)."""
    return weight.detach().reshape(len(columns), len(weight) // len(columns), -1) @ columns


def convolved(layer: Any, use: Use, positions: Tensor | None = None) -> Tensor:
    """The convolution's output (B, C, P), made of the columns."""
    batch = len(use.input)
    rows = product(layer.weight, use.columns(positions))  # (G, R, B · P)
    out = rows.flatten(0, 1).reshape(layer.out_channels, batch, -1).transpose(0, 1)
    return out if layer.bias is None else out + layer.bias.detach()[:, None]


CONVOLUTIONS = [
    nn.Conv1d(4, 6, 3),
    nn.Conv1d(4, 6, 4, padding="same", dilation=3),
    nn.Conv1d(4, 6, 3, padding="valid"),
    nn.Conv1d(4, 4, 3, stride=2, padding=2, groups=4),
    nn.Conv1d(4, 8, 5, padding=2, padding_mode="circular", groups=2),
    nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(4, 6, 1),
    nn.Conv2d(4, 6, 1, stride=2),
    nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
    nn.Conv2d(4, 6, (4, 2), padding="same"),
    nn.Conv2d(4, 6, (2, 5), padding="same", dilation=(3, 1), padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"),
    nn.Conv2d(4, 6, 3, padding=1, groups=2),
    nn.Conv2d(4, 12, 3, padding=1, groups=4),  # depthwise, three filters each
    nn.Conv2d(4, 6, (7, 9)),  # one output position
    nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2)),
    nn.Conv3d(4, 4, 2, padding="same", groups=4),
    nn.Conv3d(4, 4, 3, padding=1, dilation=(1, 2, 1), groups=2),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_columns_of_convolutions(layer: Any) -> None:
    ready(layer)
    sizes = {3: (11,), 4: (7, 9), 5: (4, 5, 6)}[layer.weight.dim()]
    uses, output = watched(layer, "weight", inputs=random(3, 4, *sizes))
    (use,) = uses["weight"]
    assert use.positions == output[0, 0].numel()
    assert use.columns().shape == (layer.groups, layer.weight[0].numel(), output[:, 0].numel())
    torch.testing.assert_close(convolved(layer, use), output.flatten(2))
    some = torch.tensor([use.positions - 1, 0, use.positions // 2])
    torch.testing.assert_close(convolved(layer, use, some), output.flatten(2)[:, :, some])


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 2, 2)], ids=str)
def test_a_picture_without_a_batch(layer: Any) -> None:
    ready(layer)
    uses, output = watched(layer, "weight", inputs=random(4, *(5,) * (layer.weight.dim() - 2)))
    (use,) = uses["weight"]
    assert len(use.input) == 1
    torch.testing.assert_close(convolved(layer, use)[0], output.flatten(1))


@pytest.mark.parametrize("shape", [(5, 4), (5, 7, 4), (5, 2, 3, 4), (1, 4), (4,)])
@pytest.mark.parametrize("bias", [True, False])
def test_columns_of_linear_maps(shape: tuple[int, ...], bias: bool) -> None:
    layer: Any = ready(nn.Linear(4, 6, bias=bias))
    uses, output = watched(layer, "weight", inputs=random(*shape))
    (use,) = uses["weight"]
    added = 0 if layer.bias is None else layer.bias.detach()
    torch.testing.assert_close(product(layer.weight, use.columns())[0].T + added, output.reshape(-1, 6))
    batch = shape[0] if len(shape) > 1 else 1
    assert use.positions == output.numel() // 6 // batch
    some = torch.tensor([use.positions - 1, 0])
    expected = output.reshape(batch, -1, 6)[:, some].reshape(-1, 6)
    torch.testing.assert_close(product(layer.weight, use.columns(some))[0].T + added, expected)


def test_calls_of_functions_count_like_modules() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(random(6, 4, 3, 3))
            self.b = nn.Parameter(random(2, 6))
            self.c = nn.Parameter(random(3, 4, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = functional.conv2d(weight=self.a, input=x, padding=[1], stride=[2])
            z = functional.linear(y.mean((2, 3)), weight=self.b)
            return y, z, torch.conv1d(x.flatten(2), self.c, None, 1, 0)

    model = Functional()
    uses, (y, z, c) = watched(model, "a", "b", "c", inputs=random(2, 4, 5, 5))
    ours = [product(weight, uses[name][0].columns())[0] for name, weight in model.named_parameters()]
    torch.testing.assert_close(ours[0].reshape(6, 2, -1).transpose(0, 1), y.flatten(2))
    torch.testing.assert_close(ours[1].T, z)
    torch.testing.assert_close(ours[2].reshape(3, 2, -1).transpose(0, 1), c)


def test_only_the_named_weights_are_noted_each_time_they_are_used() -> None:
    shared = nn.Linear(4, 4)
    model = ready(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2)))
    assert [len(found) for found in watched(model, "0.weight", inputs=random(3, 4))[0].values()] == [2]
    assert watched(model, inputs=random(3, 4))[0] == {}


def test_a_weight_that_is_not_used_as_it_is_is_not_noted() -> None:
    class Made(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return functional.linear(input, self.weight * 2) + torch.matmul(input, self.weight.T)

    assert watched(ready(Made(4, 3)), "weight", inputs=random(2, 4))[0] == {"weight": []}


def check_attention(attention: Any, uses: dict[str, list[Use]], inputs: Tensor, prefix: str = "") -> Tensor:
    """Redo attention with the columns alone, in (B, T, K); returns its output."""
    (entering,), (leaving,) = uses[f"{prefix}in_proj_weight"], uses[f"{prefix}out_proj.weight"]
    batch, tokens, size = inputs.shape
    heads = attention.num_heads
    torch.testing.assert_close(entering.columns()[0].T.reshape(inputs.shape), inputs)
    assert entering.positions == leaving.positions == tokens
    projected = product(attention.in_proj_weight, entering.columns())[0].T
    if attention.in_proj_bias is not None:
        projected = projected + attention.in_proj_bias.detach()
    q, k, v = projected.reshape(batch, tokens, 3, heads, size // heads).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(leaving.columns()[0].T.reshape(inputs.shape), mixed)
    out = product(attention.out_proj.weight, leaving.columns())[0].T.reshape(inputs.shape)
    return out if attention.out_proj.bias is None else out + attention.out_proj.bias.detach()


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_both_projections_of_attention(batch_first: bool, bias: bool, need_weights: bool) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first, dropout=0.5)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x, x, x, need_weights=need_weights)

    model: Any = ready(Alone())
    inputs = random(3, 5, 8)
    given = inputs if batch_first else inputs.transpose(0, 1)
    names = ("inner.in_proj_weight", "inner.out_proj.weight")
    uses, (output, attention) = watched(model, *names, inputs=given)
    ours = check_attention(model.inner, uses, inputs, "inner.")
    torch.testing.assert_close(ours if batch_first else ours.transpose(0, 1), output)
    with torch.no_grad():
        expected, expected_attention = model(given)
    torch.testing.assert_close(output, expected)
    assert (attention is None) == (expected_attention is None) == (not need_weights)
    torch.testing.assert_close(attention, expected_attention)


def test_attention_without_a_batch() -> None:
    attention: Any = ready(nn.MultiheadAttention(8, 2, batch_first=True))
    tokens = random(5, 8)
    uses, (output, _) = watched(attention, "in_proj_weight", "out_proj.weight", inputs=(tokens, tokens, tokens))
    assert output.shape == (5, 8)
    torch.testing.assert_close(check_attention(attention, uses, tokens.unsqueeze(0))[0], output)


def test_attention_to_something_else_has_no_single_input() -> None:
    attention: Any = ready(nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True))
    query, key = random(2, 5, 8), random(2, 7, 6)
    uses, (output, _) = watched(attention, "q_proj_weight", "out_proj.weight", inputs=(query, key, key))
    assert uses["q_proj_weight"] == []
    (leaving,) = uses["out_proj.weight"]
    ours = product(attention.out_proj.weight, leaving.columns())[0].T + attention.out_proj.bias.detach()
    torch.testing.assert_close(ours.reshape(2, 5, 8), output)
    same: Any = ready(nn.MultiheadAttention(8, 2))
    assert watched(same, "in_proj_weight", inputs=(query, query + 1, query))[0] == {"in_proj_weight": []}


def test_masks_and_their_kin_reach_attention() -> None:
    attention: Any = ready(nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True))

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attention

        def forward(self, x: Tensor) -> Any:
            hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
            hidden[:, -1] = True
            causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
            return self.inner(x, x, x, key_padding_mask=hidden, attn_mask=causal, average_attn_weights=False)

    model = Masked().eval()
    _, output = watched(model, "inner.in_proj_weight", "inner.out_proj.weight", inputs=(inputs := random(2, 5, 8)))
    with torch.no_grad():
        torch.testing.assert_close(output, model(inputs))


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_fused_encoder_layer(norm_first: bool) -> None:
    layer: Any = ready(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first))
    inputs = random(3, 5, 8)
    with torch.no_grad():
        expected = layer(inputs)
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    uses, output = watched(layer, *names, inputs=inputs)
    torch.testing.assert_close(output, expected)
    assert [len(found) for found in uses.values()] == [1, 1, 1, 1]
    with torch.no_grad():
        check_attention(layer.self_attn, uses, layer.norm1(inputs) if norm_first else inputs, "self_attn.")
    hidden = product(layer.linear1.weight, uses["linear1.weight"][0].columns())[0].T + layer.linear1.bias.detach()
    torch.testing.assert_close(uses["linear2.weight"][0].columns()[0].T, hidden.relu())


def test_a_vision_transformers_block() -> None:
    model: Any = ready(timm.create_model("test_vit", num_classes=3))
    side = model.patch_embed.img_size[0]
    outputs: dict[str, Tensor] = {}
    block = model.blocks[0]
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, output, name=name: outputs.update({name: output}))
    names = [f"blocks.0.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    uses, output = watched(model, *names, inputs=(images := random(2, 3, side, side)))
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        (use,) = uses[name]
        real = outputs[name.removeprefix("blocks.0.").removesuffix(".weight")]
        ours = product(module.weight, use.columns())[0].T.reshape(real.shape) + module.bias.detach()
        torch.testing.assert_close(ours, real)
        assert use.positions == real.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(output, model(images))


def test_inputs_are_seen_without_a_gradient() -> None:
    layer = ready(nn.Conv2d(3, 4, 3))
    found: list[Use] = []
    with watching(layer, ["weight"], lambda _, use: found.append(use)):
        layer(random(1, 3, 5, 5).requires_grad_())
    assert not found[0].columns().requires_grad


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fused_path_is_as_before_afterwards(enabled: bool) -> None:
    layer = ready(nn.Linear(3, 2))
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with watching(layer, ["weight"], lambda *_: None):
            assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mha.get_fastpath_enabled() == enabled
        with pytest.raises(RuntimeError), watching(layer, ["weight"], lambda *_: None):
            layer(random(2, 5))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
        with pytest.raises(KeyError), watching(layer, ["no such weight"], lambda *_: None):
            pass
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_nothing_is_noted_afterwards() -> None:
    layer = ready(nn.Linear(3, 2))
    found: list[Use] = []
    with watching(layer, ["weight"], lambda _, use: found.append(use)):
        layer(random(2, 3))
    layer(random(2, 3))
    assert len(found) == 1
