"""Which weights are constrained: the expected first layers and classifiers of the networks people use, by name."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from cbpq.errors import UsageError
from cbpq.inputs import InputSpec
from cbpq.layers import LayerChoice, choose_layers, end_layers


def on_meta(source: str) -> nn.Module:
    with torch.device("meta"):
        if source.startswith("timm:"):
            return timm.create_model(source.removeprefix("timm:"))
        options = {"init_weights": False} if source in ("googlenet", "inception_v3") else {}
        model: nn.Module = torchvision.models.get_model(source, weights=None, **options)
        return model


def check_complete(model: nn.Module, choice: LayerChoice) -> None:
    """Every parameter is named exactly once."""
    names = [name for name, _ in model.named_parameters()]
    assert sorted([*choice.constrained, *choice.skipped]) == sorted(names)
    assert choice.after[0] == choice.constrained[0]
    assert tuple(name for name in choice.after if name in choice.constrained) == choice.constrained
    assert {*choice.after} <= {*names}


# source, first convolution, classifiers, number of constrained weights
NETWORKS = [
    ("alexnet", "features.0", ["classifier.6"], 6),
    ("resnet18", "conv1", ["fc"], 19),
    ("resnet50", "conv1", ["fc"], 52),
    ("mobilenet_v2", "features.0.0", ["classifier.1"], 51),
    ("mobilenet_v3_small", "features.0.0", ["classifier.3"], 52),
    ("efficientnet_b0", "features.0.0", ["classifier.1"], 80),
    ("convnext_tiny", "features.0.0", ["classifier.2"], 57),
    ("densenet121", "features.conv0", ["classifier"], 119),
    ("vit_b_16", "conv_proj", ["heads.head"], 48),
    ("swin_t", "features.0.0", ["head"], 51),
    ("squeezenet1_1", "features.0", ["classifier.1"], 24),
    ("timm:resnet18", "conv1", ["fc"], 19),
    ("timm:resnet50", "conv1", ["fc"], 52),
    ("timm:mobilenetv2_050", "conv_stem", ["classifier"], 51),
    ("timm:mobilenetv3_small_050", "conv_stem", ["classifier"], 52),
    ("timm:efficientnet_b0", "conv_stem", ["classifier"], 80),
    ("timm:convnext_atto", "stem.0", ["head.fc"], 39),
    ("timm:densenet121", "features.conv0", ["classifier"], 119),
    ("timm:vit_tiny_patch16_224", "patch_embed.proj", ["head"], 48),
    ("timm:deit_tiny_patch16_224", "patch_embed.proj", ["head"], 48),
    ("timm:deit_tiny_distilled_patch16_224", "patch_embed.proj", ["head", "head_dist"], 48),
    ("timm:swin_tiny_patch4_window7_224", "patch_embed.proj", ["head.fc"], 51),
    ("timm:levit_128s", "stem.conv1.linear", ["head.linear", "head_dist.linear"], None),
    ("timm:test_resnet", "conv1.0", ["fc"], None),
]


@pytest.mark.parametrize("source, first, classifiers, count", NETWORKS)
def test_first_convolution_and_classifier_stay_float(
    source: str, first: str, classifiers: list[str], count: int | None
) -> None:
    model = on_meta(source)
    choice = choose_layers(model)
    check_complete(model, choice)
    assert [name for name, reason in choice.skipped.items() if reason == "first convolution"] == [f"{first}.weight"]
    assert sorted(name for name, reason in choice.skipped.items() if reason == "classifier") == sorted(
        f"{name}.weight" for name in classifiers
    )
    assert count is None or len(choice.constrained) == count
    # every weight of two or more dimensions in a convolution, linear layer or attention is in one of the two lists
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    weights = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layers)}
    weights |= {name for name, _ in model.named_parameters() if name.endswith("in_proj_weight")}
    assert weights == {*choice.constrained, f"{first}.weight", *(f"{name}.weight" for name in classifiers)}


@pytest.mark.parametrize(
    "source, first, last, auxiliary",
    [
        ("googlenet", "conv1.conv.weight", "fc.weight", ["aux1.fc2.weight", "aux2.fc2.weight"]),
        ("inception_v3", "Conv2d_1a_3x3.conv.weight", "fc.weight", ["AuxLogits.fc.weight"]),
    ],
)
def test_auxiliary_heads_are_constrained_but_for_their_classifiers(
    source: str, first: str, last: str, auxiliary: list[str]
) -> None:
    model = on_meta(source)
    choice = choose_layers(model)
    check_complete(model, choice)
    assert choice.skipped[first] == "first convolution"
    assert choice.skipped[last] == "classifier"
    assert sorted(name for name, reason in choice.skipped.items() if reason == "auxiliary classifier") == auxiliary
    assert any(name.lower().startswith("aux") for name in choice.constrained)
    everything = choose_layers(model, quantize_first=True, quantize_last=True)
    assert {first, last, *auxiliary} <= set(everything.constrained)


def test_execution_order_not_order_of_registration() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.middle = nn.Conv2d(4, 4, 3, padding=1)
            self.early = nn.Conv2d(4, 4, 1)
            self.stem = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.middle(self.early(self.stem(x)))
            x = self.early(x)  # used twice
            scores: Tensor = self.head(x.mean((2, 3)))
            return scores

    choice = choose_layers(Backwards(), example_input=torch.zeros(1, 1, 8, 8))
    assert choice.constrained == ("early.weight", "middle.weight")
    assert choice.skipped["stem.weight"] == "first convolution"
    assert choice.skipped["head.weight"] == "classifier"


def test_weights_used_without_their_modules_are_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)
            self.inner = nn.Linear(8, 8)
            self.stem = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.head.weight.dtype)  # looking at a weight is no use of it
            x = F.linear(F.linear(x, self.stem.weight), weight=self.inner.weight)
            return x @ self.head.weight.T

    choice = choose_layers(Functional())
    assert choice.constrained == ("inner.weight",)
    assert choice.skipped["stem.weight"] == "first layer"
    assert choice.skipped["head.weight"] == "classifier"


@pytest.mark.parametrize("need_own_sizes", [False, True])
def test_attention_projections(need_own_sizes: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)
            sizes = {"kdim": 6, "vdim": 5} if need_own_sizes else {}
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            key, value = (x[..., :6], x[..., :5]) if need_own_sizes else (x, x)
            scores: Tensor = self.head(self.attention(x, key, value)[0].mean(1))
            return scores

    model = Attention()
    choice = choose_layers(model)
    own = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if need_own_sizes else ["in_proj_weight"]
    assert sorted(choice.constrained) == sorted(f"attention.{name}" for name in [*own, "out_proj.weight"])
    assert choice.skipped["attention.in_proj_bias"] == "bias"
    check_complete(model, choice)


def test_fused_transformer_layers_of_torch_are_seen() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Flatten(), nn.Linear(32, 3))
    choice = choose_layers(model, example_input=torch.zeros(1, 4, 8))
    assert set(choice.constrained) == {
        *("1.self_attn.in_proj_weight", "1.self_attn.out_proj.weight", "1.linear1.weight", "1.linear2.weight")
    }


def test_subclasses_count_and_transposed_convolutions_do_not() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight * 2)

    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        Scaled(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.PReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    choice = choose_layers(model)
    assert choice.constrained == ("1.weight",)
    assert choice.skipped["2.weight"] == "not a convolution or linear weight"
    assert choice.skipped["3.weight"] == "normalization"
    assert choice.skipped["4.weight"] == "vector or scalar"
    assert choice.skipped["1.bias"] == "bias"


def test_one_and_three_dimensional_convolutions() -> None:
    for convolution, norm_shape in ((nn.Conv1d, 1), (nn.Conv3d, 3)):
        model = nn.Sequential(convolution(2, 3, 3), convolution(3, 3, 3), nn.Flatten(), nn.LazyLinear(2))
        model(torch.zeros(1, 2, *(8,) * norm_shape))
        spec = torch.zeros(1, 2, *(8,) * norm_shape)
        assert choose_layers(model, example_input=spec).constrained == ("1.weight",)


def test_a_shared_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.head = (nn.Linear(6, 6) for _ in range(4))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.b(self.a(self.stem(x))))
            return scores

    model = Tied()
    choice = choose_layers(model)
    assert choice.constrained == ("a.weight",)
    check_complete(model, choice)


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 5), nn.Linear(5, 5), nn.Linear(5, 2)), None),
        (nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, 2)), None),
        # only 28×28 fits
        (nn.Sequential(nn.Conv2d(1, 2, 5), nn.Conv2d(2, 2, 5), nn.Flatten(), nn.Linear(800, 4)), None),
        # only pictures larger than 63×63 survive
        (nn.Sequential(nn.Conv2d(3, 2, 9, 8), nn.Conv2d(2, 2, 7), nn.Flatten(), nn.LazyLinear(4)), (1, 3, 64, 64)),
    ],
)
def test_usual_input_sizes_are_tried(model: nn.Module, shape: tuple[int, ...] | None) -> None:
    if shape is not None:
        model(torch.zeros(shape))
    choice = choose_layers(model)
    assert len(choice.constrained) == 1
    assert sorted(set(choice.skipped.values())) in (
        ["bias", "classifier", "first convolution"],
        ["bias", "classifier", "first layer"],
    )


class Picky(nn.Module):
    """Takes pictures of 2×19×23 only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (2, 19, 23):
            raise ValueError("only 2×19×23\nand nothing else")
        scores: Tensor = self.c(self.b(self.a(x)).mean((2, 3)))
        return scores


def test_the_input_spec_is_used() -> None:
    spec = InputSpec(2, 19, 23, (0.5, 0.5), (1.0, 1.0))
    assert choose_layers(Picky(), input_spec=spec).constrained == ("b.weight",)
    assert choose_layers(Picky(), example_input=torch.zeros(3, 2, 19, 23)).constrained == ("b.weight",)


def test_a_network_that_cannot_be_traced() -> None:
    with pytest.raises(UsageError, match="example_input") as caught:
        choose_layers(Picky())
    assert "only 2×19×23" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="only 2×19×23"):
        choose_layers(Picky(), exclude=["a"])
    choice = choose_layers(Picky(), quantize_first=True, quantize_last=True, exclude=["a", "c"])
    assert choice.constrained == ("b.weight",)
    assert choice.skipped["a.weight"] == choice.skipped["c.weight"] == "excluded by --exclude"


def test_timm_configuration_serves_where_tracing_fails() -> None:
    model = Picky()
    model.pretrained_cfg = {"first_conv": "a", "classifier": "c"}  # type: ignore[assignment] # as timm does
    assert choose_layers(model).constrained == ("b.weight",)
    model.pretrained_cfg = {"first_conv": "gone", "classifier": "c"}  # type: ignore[assignment] # as timm does
    with pytest.raises(UsageError, match="cannot be told"):
        choose_layers(model)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)),
        *(nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


def test_globs_on_parameters_layers_and_blocks() -> None:
    assert choose_layers(net()).constrained == ("3.0.weight", "3.1.weight", "4.weight")
    assert choose_layers(net(), include=["3"]).constrained == ("3.0.weight", "3.1.weight")
    assert choose_layers(net(), include=["3.*"]).constrained == ("3.0.weight", "3.1.weight")
    assert choose_layers(net(), include=["3.1", "4.weight"]).constrained == ("3.1.weight", "4.weight")
    choice = choose_layers(net(), exclude=["3.0"])
    assert choice.constrained == ("3.1.weight", "4.weight")
    assert choice.skipped["3.0.weight"] == "excluded by --exclude"
    choice = choose_layers(net(), include=["3"], exclude=["*.1"])
    assert choice.constrained == ("3.0.weight",)
    assert choice.skipped["4.weight"] == "not matched by --include"
    check_complete(net(), choice)


def test_first_and_last_only_on_request() -> None:
    assert choose_layers(net(), include=["*"]).constrained == ("3.0.weight", "3.1.weight", "4.weight")
    assert choose_layers(net(), quantize_first=True).constrained[0] == "0.weight"
    assert choose_layers(net(), quantize_last=True).constrained[-1] == "7.weight"
    choice = choose_layers(net(), quantize_first=True, quantize_last=True, include=["0", "7"])
    assert choice.constrained == ("0.weight", "7.weight")
    assert choose_layers(net(), quantize_first=True, exclude=["0"]).skipped["0.weight"] == "excluded by --exclude"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_without_a_match_names_the_nearest(option: str) -> None:
    arguments: dict[str, Any] = {option: ["layer4.1.conv3"]}
    with pytest.raises(UsageError, match=f"--{option} 'layer4.1.conv3' matches no .* 'layer4.1.conv2'"):
        choose_layers(on_meta("resnet18"), **arguments)
    with pytest.raises(UsageError, match="'bn1' matches no convolution or linear weight"):
        choose_layers(on_meta("resnet18"), **{option: ["bn1"]})  # type: ignore[arg-type] # the option is a variable


def test_nothing_to_constrain() -> None:
    with pytest.raises(UsageError, match="has no convolution or linear weight"):
        choose_layers(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    with pytest.raises(UsageError, match=r"no weight is left to constrain: .*0.weight \(first convolution\)"):
        choose_layers(net(), include=["0"])
    with pytest.raises(UsageError, match="no weight is left"):
        choose_layers(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)))
    with pytest.raises(UsageError, match="no weight is left"):
        choose_layers(net(), exclude=["*"])


def test_lazy_layers_have_no_shape_yet() -> None:
    with pytest.raises(UsageError, match="run one forward pass"):
        choose_layers(nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Linear(4, 4), nn.Linear(4, 2)))


class Restless(nn.Module):
    """Changes a buffer and draws random numbers even in evaluation mode."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        scores: Tensor = self.net(x + torch.rand_like(x))
        return scores


@pytest.mark.parametrize("make", [net, Restless])
def test_the_model_is_left_untouched(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    next(model.modules()).training = False  # a mixture, as with frozen normalization
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    choose_layers(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_failing_forward_pass_also_leaves_the_model_untouched() -> None:
    class Failing(Restless):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("no")

    model = Failing().train()
    with pytest.raises(UsageError):
        choose_layers(model)
    assert all(module.training for module in model.modules())
    assert model.counter == 0


def test_wrapped_networks_keep_their_own_names() -> None:
    choice = choose_layers(nn.DataParallel(net()))
    assert choice.constrained == ("module.3.0.weight", "module.3.1.weight", "module.4.weight")

    class Compiled(nn.Module):  # what torch.compile returns, as far as it matters here
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = timm.create_model("test_vit")

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("compiling is not wanted here")

    choice = choose_layers(Compiled())
    assert choice.skipped["_orig_mod.patch_embed.proj.weight"] == "first convolution"
    assert choice.skipped["_orig_mod.head.weight"] == "classifier"


def test_the_choice_does_not_depend_on_type_or_mode() -> None:
    expected = choose_layers(net())
    assert choose_layers(net().double().train()) == expected
    assert choose_layers(net().requires_grad_(False)) == expected
    assert choose_layers(net().to("meta")) == expected


def test_end_layers() -> None:
    assert end_layers(on_meta("resnet18")) == (["conv1.weight"], ["fc.weight"])
    assert end_layers(on_meta("timm:test_resnet")) == (["conv1.0.weight"], ["fc.weight"])
    assert end_layers(Picky()) == ([], [])
    assert end_layers(nn.ReLU()) == ([], [])
