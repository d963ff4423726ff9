"""Evaluation: exact counts, intervals and tests against slow references, and what is refused."""

import copy
import itertools
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cbpq.data import Batch
from cbpq.errors import CbpqError, DataError, UsageError
from cbpq.evaluation import (
    Evaluation,
    Predictions,
    Z,
    compare,
    evaluate,
    mcnemar,
    mean_interval,
    predict,
    rank,
    summarize,
    wilson_interval,
)
from cbpq.tracing import image_format


class Batches:
    """An evaluation loader over tensors."""

    def __init__(self, images: Tensor, labels: Tensor, size: int = 4) -> None:
        self._pairs = list(zip(images.split(size), labels.split(size), strict=True))
        self.images = len(labels)

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Batch]:
        return (Batch(images, labels) for images, labels in self._pairs)


class Scores(nn.Module):
    """Says what the images say: they are the scores."""

    def forward(self, images: Tensor) -> Tensor:
        return images


def loader(scores: Any, labels: list[int], size: int = 4) -> Batches:
    return Batches(torch.as_tensor(scores, dtype=torch.float32), torch.tensor(labels), size)


def random_loader(seed: int, count: int = 50, classes: int = 7) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Batches(scores, labels)


def predictions(classes: list[int], labels: list[int]) -> Predictions:
    return Predictions(torch.tensor(labels), torch.tensor(classes), None, torch.zeros(len(labels)), 1.0)


def test_accuracies_and_loss_by_hand() -> None:
    # six classes; the label's score is the highest, second, fifth and sixth of its row
    scores = [[9, 5, 4, 3, 2, 1], [9, 5, 4, 3, 2, 1], [9, 5, 4, 3, 2, 1], [9, 5, 4, 3, 2, 1]]
    labels = [0, 1, 4, 5]
    result = evaluate(Scores(), loader(scores, labels, 3), "cpu")
    assert (result.images, result.top1, result.top5) == (4, 25.0, 75.0)
    total = math.log(sum(math.exp(s) for s in scores[0]))
    assert result.loss == pytest.approx(sum(total - scores[0][label] for label in labels) / 4, abs=1e-12)
    assert result.top1_interval == wilson_interval(1, 4)
    assert result.top5_interval == wilson_interval(3, 4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.integers(5, 9), st.integers(1, 5))
def test_accuracies_against_sorting(seed: int, count: int, classes: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-2, 3, (count, classes), generator=generator).float()  # many ties
    labels = torch.randint(0, classes, (count,), generator=generator)
    result = evaluate(Scores(), Batches(scores, labels, size), "cpu")
    # of equal scores the first comes first, which is what a stable sort does
    orders = [sorted(range(classes), key=lambda c, row=row: -row[c]) for row in scores.tolist()]  # type: ignore[misc]  # a default binds the loop variable
    places = [order.index(int(label)) for order, label in zip(orders, labels, strict=True)]
    assert rank(scores.double(), labels).tolist() == places
    assert result.top1 == 100 * sum(place < 1 for place in places) / count
    assert result.top5 == 100 * sum(place < 5 for place in places) / count


def test_top5_needs_five_classes() -> None:
    assert evaluate(Scores(), random_loader(1, classes=5), "cpu").top5 == 100
    result = evaluate(Scores(), random_loader(1, classes=4), "cpu")
    assert result.top5 is None
    assert result.top5_interval is None
    assert result.to_dict()["top5"] is None


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        # 95 % Wilson intervals as in Newcombe (1998), table I, to four digits
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((100 * low, 100 * high), abs=0.005)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@example((0, 1))
@example((60_000, 60_000))
def test_wilson_interval_solves_its_equation(counts: tuple[int, int]) -> None:
    successes, n = counts
    low, high = (bound / 100 for bound in wilson_interval(successes, n))
    share = successes / n
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):  # where the distance to the share is z standard errors of the bound
        assert (share - bound) ** 2 == pytest.approx(Z * Z * bound * (1 - bound) / n, abs=1e-12)
    assert wilson_interval(n - successes, n) == pytest.approx((100 - 100 * high, 100 - 100 * low), abs=1e-9)


def test_wilson_interval_is_exact_at_the_ends() -> None:
    assert all(wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 100 for n in range(1, 200))


@pytest.mark.parametrize("successes, n", [(0, 0), (-1, 5), (6, 5)])
def test_wilson_interval_of_nonsense(successes: int, n: int) -> None:
    with pytest.raises(DataError):
        wilson_interval(successes, n)


def test_wilson_interval_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for successes, n in ((0, 7), (3, 7), (7, 7), (9173, 10_000), (1, 50_000)):
        theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson_interval(successes, n) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-9)


def test_mean_interval() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    half = 1.959963984540054 * math.sqrt(14 / 3) / 2
    assert mean_interval(values) == pytest.approx((3 - half, 3 + half))
    assert mean_interval(torch.tensor([0.0, 0.0, 9.0]))[0] == 0  # type: ignore[index]  # three values have an interval
    assert mean_interval(values[:1]) is None


def test_mcnemar_against_all_outcomes() -> None:
    for n in range(11):
        for first in range(n + 1):
            uneven = abs(first - (n - first))
            outcomes = list(itertools.product((0, 1), repeat=n))
            as_uneven = sum(abs(2 * sum(outcome) - n) >= uneven for outcome in outcomes)
            assert mcnemar(first, n - first) == float(Fraction(as_uneven, len(outcomes)))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_against_whole_numbers(first: int, second: int) -> None:
    n, k = first + second, min(first, second)
    exact = Fraction(2 * sum(math.comb(n, i) for i in range(k + 1)), 2**n) if n < 400 else None
    p = mcnemar(first, second)
    assert 0 <= p <= 1
    assert p == mcnemar(second, first)
    if exact is not None:
        assert p == min(1.0, float(exact))
    if first == second:
        assert p == 1


def test_mcnemar_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for first, second in ((0, 0), (5, 0), (10, 25), (400, 480), (5000, 5200), (0, 3000), (21_000, 20_500)):
        theirs = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(theirs, rel=1e-6)


def test_comparison_by_hand() -> None:
    labels = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    model = predictions([0, 0, 0, 0, 0, 0, 1, 1, 2, 2], labels)
    reference = predictions([0, 0, 0, 0, 1, 1, 0, 1, 1, 2], labels)
    result = compare(model, reference)
    assert (result.only_model_right, result.only_reference_right) == (2, 1)
    assert result.agreement == 60  # also where both are wrong in the same way
    assert result.agreement_interval == wilson_interval(6, 10)
    assert result.mcnemar_p == 1.0
    assert result.drop == -10
    evaluation = summarize(model, reference)
    assert evaluation.comparison == result
    assert evaluation.reference is not None
    assert evaluation.reference.top1 is not None
    assert evaluation.top1 is not None
    assert evaluation.reference.top1 - evaluation.top1 == pytest.approx(result.drop)


def test_only_the_same_images_can_be_compared() -> None:
    for other in ([0, 1, 1], [0, 1]):
        with pytest.raises(UsageError, match="same images"):
            compare(predictions([0, 0, 0], [0, 1, 2]), predictions([0] * len(other), other))


def test_a_reference_is_measured_on_every_image_too() -> None:
    model, reference = nn.Linear(7, 7), nn.Linear(7, 7)
    calls: list[int] = []
    result = evaluate(model, random_loader(1), "cpu", reference=reference, on_batch=lambda: calls.append(1))
    assert len(calls) == 2 * 13
    alone = evaluate(reference, random_loader(1), "cpu")
    assert result.reference is not None
    assert result.reference.to_dict(timing=False) == alone.to_dict(timing=False)
    same = evaluate(model, random_loader(1), "cpu", reference=model).comparison
    assert same is not None
    assert (same.agreement, same.mcnemar_p, same.drop) == (100, 1, 0)


def without_none(value: Any) -> bool:
    return value is not None and all(map(without_none, value.values() if isinstance(value, dict) else []))


def test_as_json() -> None:
    result = evaluate(nn.Linear(7, 7), random_loader(1), "cpu", reference=nn.Linear(7, 7))
    assert without_none(result.to_dict())
    assert list(result.to_dict()) == [
        "images",
        "top1",
        "top1_interval",
        "top5",
        "top5_interval",
        "loss",
        "loss_interval",
        "images_per_second",
        "reference",
        "comparison",
    ]
    text = json.dumps(result.to_dict(timing=False), allow_nan=False)
    assert "per_second" not in text
    assert json.loads(text) == result.to_dict(timing=False)
    assert result.images_per_second > 0


def test_a_single_image_has_no_loss_interval() -> None:
    result = evaluate(Scores(), loader([[1, 0]], [0]), "cpu")
    assert result.loss_interval is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_network_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Dropout(0.9), nn.Linear(7, 7))
    model.train()
    model[1].eval()  # a frozen BatchNorm
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first = evaluate(model, random_loader(3), "cpu")
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.is_grad_enabled()
    model.eval()
    assert evaluate(model, random_loader(3), "cpu").to_dict(timing=False) == first.to_dict(timing=False)
    assert not any(module.training for module in model.modules())


def test_training_flags_come_back_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(3, 7))
    model.train()
    with pytest.raises(RuntimeError):
        evaluate(model, random_loader(3), "cpu")
    assert model.training
    assert model[0].training


class Keeper(nn.Module):
    """Keeps a tensor it made while it was evaluated, as networks with position tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)
        self.kept: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.ones(7)
        output: Tensor = self.layer(images * self.kept)
        return output


def test_a_network_can_be_trained_on_after_its_evaluation() -> None:
    model = Keeper()
    evaluate(model, random_loader(1), "cpu")
    torch.autograd.backward(model(torch.randn(2, 7, requires_grad=True)).sum())
    assert model.layer.weight.grad is not None


class Wrapped(nn.Module):
    """Gives its scores among other things, as networks with several heads do."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, -images


def test_several_heads() -> None:
    plain = evaluate(Scores(), random_loader(1), "cpu").to_dict(timing=False)
    assert evaluate(Wrapped(), random_loader(1), "cpu").to_dict(timing=False) == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []
    model = nn.Linear(7, 7)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = evaluate(model, random_loader(1), "cpu", autocast=dtype)
    assert set(seen) == {dtype}
    assert result.loss == pytest.approx(evaluate(model, random_loader(1), "cpu").loss, rel=0.02)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite(value: float) -> None:
    scores = torch.zeros(9, 6)
    scores[6, 2] = value
    with pytest.raises(CbpqError, match=r"image 6 .* not finite") as caught:
        evaluate(Scores(), loader(scores, [0] * 9), "cpu")
    assert "\n" not in str(caught.value)


def test_huge_scores_give_a_finite_loss() -> None:
    result = evaluate(Scores(), loader([[3e38, -3e38], [-3e38, 3e38]], [0, 0]), "cpu")
    assert result.loss == pytest.approx(3e38)
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.parametrize("label", [6, -1])
def test_labels_beyond_the_network(label: int) -> None:
    with pytest.raises(DataError, match=f"label {label} does not fit the network's 6 classes"):
        evaluate(Scores(), loader(torch.zeros(3, 6), [0, label, 1]), "cpu")


def test_outputs_of_another_shape() -> None:
    with pytest.raises(CbpqError, match="shape"):
        evaluate(Scores(), loader(torch.zeros(3, 6, 2), [0, 0, 1]), "cpu")
    with pytest.raises(CbpqError, match="shape"):
        evaluate(nn.Flatten(0), loader(torch.zeros(3, 6), [0, 0, 1]), "cpu")


def test_no_images() -> None:
    class Nothing(Batches):
        def __iter__(self) -> Iterator[Batch]:
            return iter(())

    with pytest.raises(DataError, match="no images"):
        evaluate(Scores(), Nothing(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)), "cpu")


def test_predictions_survive_a_checkpoint(tmp_path: Any) -> None:
    before = predict(nn.Linear(7, 7), random_loader(1), "cpu")
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after = Predictions.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert summarize(after).to_dict() == summarize(before).to_dict()
    assert isinstance(summarize(after), Evaluation)
    assert compare(after, before).agreement == 100


class Flattened(nn.Module):
    """A convolution and, with ``view``, a classifier: what cannot take images in channels-last order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Linear(4 * 6 * 6, 7)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(images)
        output: Tensor = self.classifier(features.view(len(images), -1))
        return output


def test_images_lie_in_memory_as_the_network_can_take_them() -> None:
    images = torch.randn(5, 3, 6, 6)
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    before = copy.deepcopy(conv.state_dict())
    assert image_format(conv, images) is torch.channels_last
    assert conv.training
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())
    assert image_format(Flattened(), images) is torch.contiguous_format
    assert image_format(nn.Linear(6, 2), images) is torch.contiguous_format


def test_a_network_that_calls_view_is_measured_all_the_same() -> None:
    torch.manual_seed(0)
    images, model = torch.randn(5, 3, 6, 6), Flattened()
    found = predict(model, Batches(images, torch.arange(5)), "cpu")
    assert torch.equal(found.classes, model(images).argmax(1))
