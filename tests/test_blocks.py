"""The blocks of real networks, and what flows between them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from cbpq.blocks import MOST_WEIGHTS, Block, find_blocks, inputs_of
from cbpq.compensation import run_block
from cbpq.layers import choose_layers


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(source: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module
    if source.startswith("timm:"):
        model = timm.create_model(source.removeprefix("timm:"), num_classes=5, **options)
    elif source == "vit":
        model = torchvision.models.VisionTransformer(16, 4, 3, 2, 16, 24, num_classes=5, **options)
    else:
        model = torchvision.models.get_model(source, weights=None, num_classes=5, **options)
    return model.eval()


def names_of(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    return choose_layers(model, example_input=x[:1]).constrained


def check(model: nn.Module, x: Tensor) -> list[Block]:
    """What must be true of the blocks of every network; returns them."""
    names = names_of(model, x)
    blocks = find_blocks(model, names, x)
    divided = [name for block in blocks for name in block.weights]
    assert sorted(divided) == sorted(names)
    position = {name: number for number, name in enumerate(names)}
    firsts = [position[block.weights[0]] for block in blocks]
    assert firsts == sorted(firsts)
    for block in (block for block in blocks if block.path):
        assert 1 <= len(block.weights) <= MOST_WEIGHTS
        assert all(name.startswith(f"{block.path}.") for name in block.weights)
    check_flow(model, blocks, [x, 0.5 * x.flip(0)])
    return blocks


def check_flow(model: nn.Module, blocks: list[Block], batches: list[Tensor]) -> None:
    """Where a block follows, the one before gives its very inputs, and these are what its module is given."""
    given: dict[str, list[Tensor]] = {block.path: [] for block in blocks}

    def note(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: given[path].append(inputs[0].clone())

    handles = [model.get_submodule(block.path).register_forward_pre_hook(note(block.path)) for block in blocks]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    before: Block | None = None
    for block in blocks:
        reached = list(inputs_of(model, block, batches))
        assert len(reached) == len(batches)
        assert all(torch.equal(ours, real) for ours, real in zip(reached, given[block.path], strict=True))
        assert not block.follows or before is not None
        if block.follows and before is not None:
            for source, arrived in zip(given[before.path], reached, strict=True):
                with torch.no_grad():
                    assert torch.equal(run_block(model, before, source), arrived)
        before = block


@pytest.mark.parametrize(
    "source, size, options",
    [
        ("mobilenet_v2", 32, {"width_mult": 0.25}),
        ("squeezenet1_1", 32, {}),
        ("googlenet", 32, {"init_weights": False, "aux_logits": False}),
        ("vit", 16, {}),
        ("timm:test_resnet", 32, {}),
        ("timm:test_vit", 160, {}),
        ("timm:test_efficientnet", 32, {}),
        ("timm:convnext_atto", 32, {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}),
        ("timm:vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 3, "embed_dim": 24}),
    ],
)
def test_blocks_of_real_networks(source: str, size: int, options: dict[str, Any]) -> None:
    blocks = check(made(source, **options), images(2, 3, size, size))
    assert all(block.path for block in blocks)
    assert len(blocks) > 1


def test_a_resnets_blocks_are_its_residual_blocks() -> None:
    blocks = check(made("resnet18"), images(1, 3, 32, 32))
    assert [block.path for block in blocks] == [f"layer{stage}.{number}" for stage in (1, 2, 3, 4) for number in (0, 1)]
    assert [len(block.weights) for block in blocks] == [2, 2, 3, 2, 3, 2, 3, 2]
    assert [block.follows for block in blocks] == [False, *[True] * 7]


def test_a_vision_transformers_blocks_hold_attention_and_its_feedforward_part() -> None:
    blocks = check(made("vit"), images(2, 3, 16, 16))
    assert [block.path.rpartition(".")[2] for block in blocks] == [f"encoder_layer_{n}" for n in range(3)]
    assert [len(block.weights) for block in blocks] == [4, 4, 4]
    assert [block.follows for block in blocks] == [False, True, True]


def test_a_small_chain_of_layers_stays_whole() -> None:
    blocks = check(made("alexnet"), images(1, 3, 64, 64))
    assert [(block.path, len(block.weights)) for block in blocks] == [("features", 4), ("classifier", 2)]
    assert not blocks[1].follows  # there is pooling between


def test_layers_with_several_inputs_are_divided() -> None:
    model = torchvision.models.DenseNet(4, (2, 6), 8, num_classes=5).eval()
    blocks = check(model, images(2, 3, 32, 32))
    # a dense layer takes a list of tensors, and a large dense block is divided into single convolutions
    assert {"features.transition1", "features.denseblock2.denselayer6.conv2"} <= {block.path for block in blocks}


def test_heads_that_only_training_runs_come_last() -> None:
    model = made("googlenet", init_weights=False, aux_logits=True)
    x = images(1, 3, 32, 32)
    blocks = check(model, x)
    assert blocks[-1].path == ""
    assert {name.partition(".")[0] for name in blocks[-1].weights} == {"aux1", "aux2"}


def chain(*layers: nn.Module) -> nn.Module:
    """A chain of more layers than one block holds, between a stem and a classifier."""
    torch.manual_seed(0)
    stem, pool, head = nn.Conv2d(3, 4, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 2)
    return nn.Sequential(stem, nn.Sequential(*layers), pool, head).eval()


def test_layers_that_work_in_place_between_blocks() -> None:
    inplace = [layer for _ in range(MOST_WEIGHTS + 1) for layer in (nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))]
    assert not any(block.follows for block in check(chain(*inplace), images(2, 3, 6, 6)))
    bare = [nn.Conv2d(4, 4, 1) for _ in range(MOST_WEIGHTS + 1)]
    blocks = check(chain(*bare), images(2, 3, 6, 6))
    assert [block.follows for block in blocks] == [False, *[True] * MOST_WEIGHTS]


def test_a_block_that_changes_its_input_in_place() -> None:
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x.relu_()).relu_()) + x
            return out

    blocks = check(chain(*(Greedy() for _ in range(5))), images(2, 3, 6, 6))
    assert [block.follows for block in blocks] == [False, *[True] * 4]


def test_one_activation_under_many_names() -> None:
    relu = nn.ReLU()
    layers = [layer for _ in range(MOST_WEIGHTS + 1) for layer in (nn.Conv2d(4, 4, 1), relu)]
    blocks = check(nn.Sequential(relu, chain(*layers)), images(2, 3, 6, 6))
    assert len(blocks) == MOST_WEIGHTS + 1


def test_one_convolution_under_two_names() -> None:
    shared = nn.Conv2d(4, 4, 1)
    layers = [shared, *(nn.Conv2d(4, 4, 1) for _ in range(MOST_WEIGHTS)), shared]
    blocks = check(chain(*layers), images(2, 3, 6, 6))
    assert blocks[0] == Block("", ("1.0.weight",))
    assert len(blocks) == 1 + MOST_WEIGHTS


class Around(nn.Module):
    """Calls its inner module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.body = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(MOST_WEIGHTS))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.inner(self.stem(x)))
        for layer in self.body:
            x = layer(x)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def test_a_module_that_runs_twice_belongs_to_the_whole_network() -> None:
    model = Around().eval()
    blocks = check(model, x := images(2, 3, 6, 6))
    assert blocks[0] == Block("", ("inner.0.weight",))
    assert [batch.shape for batch in inputs_of(model, blocks[0], [x, x])] == [x.shape, x.shape]


def test_weights_beside_the_modules_of_a_divided_one() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(MOST_WEIGHTS)))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(self.attention(x, x, x)[0])
            return y

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mixed, self.head = nn.Linear(3, 4), Mixed(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.mixed(self.stem(x)).mean(1))
            return scores

    blocks = check(Tokens().eval(), images(2, 5, 3))
    assert [(block.path, len(block.weights)) for block in blocks] == [("", 2), ("mixed.layers", MOST_WEIGHTS)]


def test_inference_mode_inside_the_network() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = chain(*(nn.Conv2d(4, 4, 1) for _ in range(MOST_WEIGHTS + 1)))

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                scores: Tensor = self.inner(x)
            return scores

    assert not any(block.follows for block in check(Strict().eval(), images(2, 3, 6, 6)))


class Restless(nn.Module):
    """Changes a buffer and draws random numbers even in evaluation mode."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = Around()
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        scores: Tensor = self.net(x + torch.rand_like(x))
        return scores


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("stop", [None, 1])
def test_the_model_is_left_untouched(stop: int | None) -> None:
    model = Restless().train()
    next(model.modules()).training = False  # a mixture, as with frozen normalization
    x = images(2, 3, 6, 6)
    names = names_of(model, x)
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for block in find_blocks(model, names, x):
        for number, _ in enumerate(given := inputs_of(model, block, [x, x, x])):
            assert hooks(model) == 0
            assert [module.training for module in model.modules()] == flags
            if number == stop:
                break
        given.close()  # type: ignore[attr-defined]  # it is a generator
    assert torch.equal(torch.rand(3), expected)
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_failing_forward_pass_also_leaves_the_model_untouched() -> None:
    model = Around().train()
    with pytest.raises(RuntimeError):
        find_blocks(model, ["inner.0.weight"], images(2, 5, 6, 6))
    with pytest.raises(RuntimeError):
        list(inputs_of(model, Block("inner", ("inner.0.weight",)), [images(2, 5, 6, 6)]))
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())


def test_batches_are_asked_for_one_by_one() -> None:
    asked: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number in range(5):
            asked.append(number)
            yield images(1, 3, 6, 6)

    model = Around().eval()
    given = inputs_of(model, Block("body.0", ("body.0.weight",)), batches())
    next(given), next(given)
    assert asked == [0, 1]
