"""Several processes: the steps, the measurements and the files of one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from processes import free_port, in_processes, variables
from small_job import (
    PLAIN_NETWORK,
    RESULTS,
    SIDE,
    Outcome,
    command,
    contents,
    one_line,
    refused,
    write_arrays,
    write_folder,
    write_network,
)
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import cbpq
from cbpq import distributed, pipeline, training
from cbpq.agreement import digests
from cbpq.data import Batch, load_data
from cbpq.distributed import ALL, Turn
from cbpq.errors import CbpqError, TrainingError, UsageError
from cbpq.evaluation import predict
from cbpq.events import Event, Interrupted
from cbpq.fileformat import read
from cbpq.inputs import InputSpec
from cbpq.loaders import EvalBatches, TensorSource, dealt
from cbpq.pipeline import execute
from cbpq.planning import plan
from cbpq.training import EpochEnd, Run, Step
from cbpq.transforms import Normalize

pytestmark = [
    pytest.mark.medium,  # several processes
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

SETTINGS = {"epochs": 2, "batch_size": 24, "rounding": "nearest", "checkpoint_minutes": 60.0, "evaluate_every": 0}
FLAGS = ("-b", "24", "--epochs", "2", "--rounding", "nearest", "--device", "cpu", "-j", "0")
# and one with a layer that never runs
MORE = """

class More(nn.Sequential):
    def forward(self, images):
        for layer in list(self)[:-1]:
            images = layer(images)
        return images


def make_more():
    network = More(*make(), nn.Linear(3, 3))
    nn.init.ones_(network[-1].bias)
    network.input_spec = make.input_spec
    return network


make_more.input_spec = make.input_spec
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with BatchNorm and dropout, one without either, and pictures that four do not divide."""
    folder = tmp_path_factory.mktemp("job")
    write_network(folder / "net.safetensors", steps=20, drop_rate=0.2)
    write_arrays(folder / "data.npz", train=99, val=50)
    (folder / "nets_of_mine.py").write_text(PLAIN_NETWORK + MORE)
    scope: dict[str, Any] = {}
    exec(PLAIN_NETWORK + MORE, scope)
    for name in ("make", "make_more"):
        torch.manual_seed(0)
        torch.save(scope[name]().state_dict(), folder / f"{name}.pth")
    return folder


class Made(NamedTuple):
    """What a run of one process has seen and made."""

    steps: list[Step]
    epochs: list[EpochEnd]
    digests: Mapping[str, bytes]
    kept: dict[str, Tensor]
    statistics: dict[str, Tensor]


def run(
    rank: int,
    job: Path,
    output: Path,
    source: str = "nets_of_mine:make",
    changes: Mapping[str, Any] = MappingProxyType({}),
    stop: int | None = None,
    resume: bool = False,
    **choices: Any,
) -> Made:
    """A whole run of the pipeline, or one that is stopped at step ``stop``."""
    os.chdir(job)
    distributed.join(os.environ)
    runs: list[Run] = []
    events: list[Event] = []
    real = training.prepare

    def prepare(*arguments: Any, **keywords: Any) -> Run:
        runs.append(real(*arguments, **keywords))
        return runs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prepare", prepare)
        weights = job / f"{source.partition(':')[2]}.pth" if ":" in source else None
        settings = [("the test", {**SETTINGS, **changes})]
        made = plan(source, data="data.npz", weights=weights, settings=settings, device="cpu", **choices)

        def should_stop() -> bool:  # one process is asked, and all stop
            return rank == distributed.world_size() - 1 and sum(isinstance(e, Step) for e in events) == stop

        try:
            execute(made, output, resume=resume, listener=events.append, should_stop=should_stop)
        except Interrupted:
            assert stop is not None
    distributed.leave()
    constrained = runs[0].constrained
    kept = {
        f"{name} {part}": tensor
        for name in constrained.names
        for part, tensor in {"latent": constrained.latent(name), **constrained.state(name)}.items()
    }
    return Made(
        [event for event in events if isinstance(event, Step)],
        [event for event in events if isinstance(event, EpochEnd)],
        digests(runs[0]),
        {name: tensor.detach() for name, tensor in kept.items()},
        {name: buffer for name, buffer in runs[0].model.named_buffers() if "running" in name},
    )


# The trajectory


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "source, preset, changes",
    [
        ("nets_of_mine:make", "default", {}),
        ("nets_of_mine:make", "paper", {"patience": 1, "multiplier_lr": 1e-2}),
        ("net.safetensors", "default", {"batchnorm": "frozen", "distillation_loss": "kl"}),
    ],
)
def test_the_steps_of_one_process(
    job: Path, tmp_path: Path, count: int, source: str, preset: str, changes: dict[str, Any]
) -> None:
    if source == "net.safetensors":  # without its dropout, which would draw other numbers in each process
        write_network(tmp_path / source, steps=20)
        source = str(tmp_path / source)
    arguments = (source, changes)
    here = os.getcwd()
    alone = run(0, job, tmp_path / "alone", *arguments, preset=preset)
    os.chdir(here)
    made = in_processes(count, run, job, tmp_path / "out", *arguments, more={"preset": preset})
    first = made[0]
    assert len(alone.steps) == len(first.steps) == 2 * 4
    for ours, theirs in zip(first.steps[:4], alone.steps[:4], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
    for ours, theirs in zip(first.steps, alone.steps, strict=True):
        assert (ours.window, ours.lr, ours.progress) == (theirs.window, theirs.lr, theirs.progress)
    assert [(e.multipliers_updated, e.window, e.lr) for e in first.epochs] == [
        (e.multipliers_updated, e.window, e.lr) for e in alone.epochs
    ]
    for name, tensor in alone.kept.items():
        torch.testing.assert_close(first.kept[name], tensor, rtol=1e-2, atol=1e-4)
    for other in made[1:]:
        assert other.digests == first.digests
        assert [step.loss for step in other.steps] == [step.loss for step in first.steps]


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def file_of(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def stopped_and_resumed(rank: int, job: Path, output: Path, second_port: int) -> Made:
    """A run that is stopped in its second epoch, and goes on."""
    run(rank, job, output, "net.safetensors", stop=6)
    os.environ["MASTER_PORT"] = str(second_port)  # the next group meets elsewhere
    return run(rank, job, output, "net.safetensors", resume=True)


def test_a_resumed_run_is_an_unbroken_one_to_the_bit(job: Path, tmp_path: Path) -> None:
    """With dropout and BatchNorm: each process goes on with random numbers of its own."""
    unbroken = in_processes(2, run, job, tmp_path / "unbroken", "net.safetensors")
    made = in_processes(2, stopped_and_resumed, job, tmp_path / "out", free_port())
    assert file_of(tmp_path / "out") == file_of(tmp_path / "unbroken")
    for ours, theirs in zip(made, unbroken, strict=True):
        assert ours.digests == theirs.digests
        assert same(ours.statistics, theirs.statistics)
    assert same(made[0].statistics, made[1].statistics)  # averaged


def test_a_run_goes_on_with_fewer_processes(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_processes(2, run, job, tmp_path / "out", "net.safetensors", more={"stop": 6})
    monkeypatch.chdir(job)
    made = run(0, job, tmp_path / "out", "net.safetensors", resume=True)
    assert [step.step for step in made.steps] == [3, 4]
    assert read(tmp_path / "out" / "model.safetensors").constrained


def test_unused_parameters_are_left_alone(job: Path, tmp_path: Path) -> None:
    """A layer that never runs gets no gradient, and so no weight decay either."""
    made = in_processes(2, run, job, tmp_path / "out", "nets_of_mine:make_more", {"weight_decay": 0.5})
    assert made[0].steps[-1].loss == made[1].steps[-1].loss
    spare = read(tmp_path / "out" / "model.safetensors").others["10.bias"]
    assert np.array_equal(spare, np.ones(3, dtype=np.float32))


class Mixed(nn.Module):
    """BatchNorm layers of several libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.act = BatchNormAct2d(4, act_layer=nn.ReLU)
        self.fixed = FrozenBatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.fixed(self.act(self.norm(self.conv(images))))
        return result


def test_batchnorm_of_all_processes_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange of layers; what they do on GPUs is PyTorch's."""
    monkeypatch.setattr(distributed, "_group", object())
    model = Mixed()
    model(torch.randn(8, 1, 6, 6))  # statistics
    model.eval()
    images = torch.randn(2, 1, 6, 6)
    before, parameters, state = model(images), list(model.parameters()), dict(model.state_dict())
    assert distributed.with_shared_statistics(model, torch.device("cpu")) is model
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    shared = distributed.with_shared_statistics(model, torch.device("cuda"))
    assert [name for name, module in shared.named_modules() if isinstance(module, nn.SyncBatchNorm)] == ["norm", "act"]
    assert all(ours is theirs for ours, theirs in zip(shared.parameters(), parameters, strict=True))
    assert same(shared.state_dict(), state)
    assert torch.equal(shared(images), before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("amp", [False, True])
def test_two_gpus(job: Path, tmp_path: Path, amp: bool) -> None:
    """With BatchNorm in training, which there has the statistics of the whole batch."""
    write_network(tmp_path / "net.safetensors", steps=20)
    more = {"device": "cuda", "amp": amp}
    alone = in_processes(1, run, job, tmp_path / "alone", str(tmp_path / "net.safetensors"), more=more)[0]
    first, second = in_processes(2, run, job, tmp_path / "out", str(tmp_path / "net.safetensors"), more=more)
    assert first.digests == second.digests
    for ours, theirs in zip(first.steps[:4], alone.steps[:4], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=5e-2 if amp else 1e-3)


def plain_loop(rank: int, count: int) -> list[Tensor]:
    """The two lines of the library in a loop of one's own, on the process's share of one batch."""
    if count > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    wrapped = nn.parallel.DistributedDataParallel(model) if count > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(24, 1, 8, 8), torch.arange(24) % 4
    constrained = cbpq.constrain(wrapped, optimizer, "ternary", epochs=3, example_input=images)
    mine = slice(rank * 24 // count, (rank + 1) * 24 // count)
    for _ in range(3):
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(images[mine]), labels[mine]).backward()
            optimizer.step()
        constrained.end_epoch()
    if count > 1:
        torch.distributed.destroy_process_group()
    names = constrained.names
    kept = [tensor for name in names for tensor in (constrained.latent(name), *constrained.state(name).values())]
    return [tensor.detach() for tensor in kept]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_loop_of_ones_own(count: int) -> None:
    alone = plain_loop(0, 1)
    first, *others = in_processes(count, plain_loop, count)
    for other in others:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(other, first, strict=True))
    for ours, theirs in zip(first, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# What the processes check


def with_a_fault(rank: int, job: Path, output: Path, part: str) -> str:
    """A run in which a bit of process 1 falls over in the second step."""
    os.chdir(job)
    distributed.join(os.environ)
    runs: list[Run] = []
    real = training.prepare

    def prepare(*arguments: Any, **keywords: Any) -> Run:
        runs.append(real(*arguments, **keywords))
        return runs[-1]

    def listener(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2 and rank == 1:
            constrained = runs[0].constrained
            name = constrained.names[1]
            with torch.no_grad():
                if part == "codes":
                    constrained.latent(name).view(-1)[0].neg_()
                else:
                    constrained.state(name)[part].view(-1)[0] += 1e-9

    settings = [("the test", {**SETTINGS, "checkpoint_minutes": 0.0, "learn_scales": False})]
    made = plan("net.safetensors", data="data.npz", constraint="binary", settings=settings, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prepare", prepare)
        try:
            execute(made, output, listener=listener)
        except TrainingError as error:
            return str(error)
    return "nothing was noticed"


@pytest.mark.parametrize("part", ["codes", "multiplier"])
def test_weights_that_differ_are_noticed(job: Path, tmp_path: Path, part: str) -> None:
    for message in in_processes(2, with_a_fault, job, tmp_path / "out", part):
        assert f"process 1 no longer has the {part} of conv1.6.weight of process 0 after step 2" in message
        assert "--resume" in message


def test_processes_with_other_data(job: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_arrays(other / "data.npz", train=98, val=50)
    write_network(other / "net.safetensors", steps=20, drop_rate=0.2)
    outcomes = in_processes(2, quantize_in, [job, other], tmp_path / "out")
    said = [outcome for outcome in outcomes if outcome.err]
    assert len(said) == 1
    one_line(said[0], 2, "process 1 would not do what process 0 does", "training images was 99, now 98")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert not (tmp_path / "out").exists()


# The command line


def cli(rank: int, *arguments: object) -> Outcome:
    return command(*arguments)


def quantize_in(rank: int, folders: Sequence[Path], output: Path, *flags: object) -> Outcome:
    """The command, in a folder of this process."""
    os.chdir(folders[rank])
    return command("quantize", "net.safetensors", "--data", "data.npz", *FLAGS, "-o", output, *flags)


def test_one_process_writes_and_speaks(job: Path, tmp_path: Path) -> None:
    """Each process has a folder of its own, as on machines that share none."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        for name in ("net.safetensors", "data.npz"):
            (folder / name).write_bytes((job / name).read_bytes())
    before = contents(folders[1])
    first, second = in_processes(2, quantize_in, folders, Path("out"), "--json")
    assert first.code == 0, first.err
    assert set(contents(folders[0] / "out")) == RESULTS
    assert first.document()["training"]["images_per_second"] > 0
    assert (second.code, second.out, second.err) == (0, "", "")
    assert contents(folders[1]) == before


def test_a_process_that_fails_ends_all_with_one_message(job: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "pictures", train=96, val=48)
    order = np.random.default_rng([0, 0, 1]).permutation(96)
    names = sorted((tmp_path / "pictures" / "train").rglob("*.png"))
    names[order[13]].write_bytes(b"no picture")  # in the second half of the first batch
    outcomes = in_processes(
        *(2, cli, "quantize", job / "net.safetensors", "--data", tmp_path / "pictures", *FLAGS),
        *("-o", tmp_path / "out"),
    )
    assert [outcome.code for outcome in outcomes] == [1, 1]
    assert [outcome.err.count("error: ") for outcome in outcomes] == [0, 1]
    refused(outcomes[1], 1, names[order[13]].name, "--skip-bad-images")


def test_what_all_refuse_is_said_once(job: Path, tmp_path: Path) -> None:
    for flags, parts in (
        (("-b", "22", "-o", tmp_path / "out"), ("batches of 22 pictures", "3 processes", "--batch-size 21")),
        (("-o", tmp_path / "out", "--device", "mps"), ("mps", "one device for all")),
        (("-o", tmp_path / "out", "--min-top1", "101"), ("min-top1",)),
        (("-o", job / "data.npz"), ("is a file",)),
    ):
        outcomes = in_processes(3, cli, "quantize", job / "net.safetensors", "--data", job / "data.npz", *FLAGS, *flags)
        said = [outcome for outcome in outcomes if "error: " in outcome.err]
        assert len(said) == 1, outcomes
        refused(said[0], 2, *parts)
        assert not (tmp_path / "out").exists()


def test_gates_hold_for_all(job: Path, tmp_path: Path) -> None:
    outcomes = in_processes(2, quantize_in, [job, job], tmp_path / "out", "--min-top1", "100", "--epochs", "0")
    assert [outcome.code for outcome in outcomes] == [3, 3]
    assert sum(outcome.err.count("error: ") for outcome in outcomes) == 1


def test_evaluate_counts_every_picture_once(job: Path) -> None:
    """50 pictures in batches of 16 among 4 processes; then more processes than batches."""
    arguments = ("evaluate", job / "net.safetensors", "--data", job / "data.npz", "--device", "cpu", "--json")
    for size, count in ((16, 4), (32, 3)):
        alone = command(*arguments, "-b", size).document()
        first, *others = in_processes(count, cli, *arguments, "-b", size)
        assert first.code == 0, first.err
        found = first.document()
        assert found["images"] == 50
        for each in (alone, found):
            del each["images_per_second"]
        assert found == alone  # to the last digit: every batch is one of those of one process
        assert all((other.code, other.out, other.err) == (0, "", "") for other in others)


def test_other_commands_run_once(job: Path) -> None:
    outcomes = in_processes(2, cli, "inspect", job / "net.safetensors")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    one_line(outcomes[0], 2, "only quantize and evaluate run in several processes")
    assert outcomes[1].err == ""


def test_without_data_in_two_processes(job: Path, tmp_path: Path) -> None:
    """Synthesis, rounding, reconstruction and training."""
    flags = (*("--calibration", "16", "-c", "binary", "-b", "8", "--epochs", "1"), "--device", "cpu")
    short = ("--set", "reconstruction_steps=2", "--set", "epoch_images=16", "--set", "reconstruction_images=16")
    kept = ("--save-synthetic", tmp_path / "pictures")
    first, second = in_processes(
        2, cli, "quantize", job / "net.safetensors", *flags, *short, *kept, "-o", tmp_path / "out"
    )
    assert first.code == 0, first.err
    assert second == Outcome(0, "", "")
    assert set(contents(tmp_path / "out")) == RESULTS
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 17


# Variables


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"MASTER_ADDR": ""}, ("WORLD_SIZE is 2", "MASTER_ADDR is not set", "torchrun")),
        ({"RANK": "", "LOCAL_RANK": ""}, ("RANK, LOCAL_RANK is not set",)),
        ({"RANK": "2"}, ("RANK is 2", "2 processes")),
        ({"RANK": "-1"}, ("RANK is -1",)),
        ({"WORLD_SIZE": "two"}, ("whole numbers",)),
        ({"WORLD_SIZE": "-2"}, ("RANK is 0",)),
    ],
)
def test_variables_that_make_no_sense(change: dict[str, str], parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        distributed.join({**variables(0, 2, 1), **change})
    for part in parts:
        assert part in str(caught.value)
    assert distributed.world_size() == 1


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, variables(0, 1, 1)])
def test_one_process_needs_no_others(environment: dict[str, str]) -> None:
    distributed.join(environment)
    assert distributed.turn() == ALL
    assert not torch.distributed.is_initialized()


def test_the_others_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=0.5))
    port = free_port()
    with pytest.raises(CbpqError, match=rf"process 1 cannot reach the others at 127.0.0.1:{port} \("):
        distributed.join(variables(1, 2, port))


# Loaders


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("mirrored", [False, True])
def test_batches_are_dealt_out(count: int, mirrored: bool) -> None:
    images = torch.arange(23, dtype=torch.uint8)[:, None, None, None].expand(23, 1, 2, 2)
    spec = InputSpec(channels=1, height=2, width=2, mean=(0.0,), std=(1.0,))
    source = TensorSource(images, np.arange(23, dtype=np.int64))
    loader = EvalBatches(source, Normalize(spec), batch_size=5, mirrored=mirrored)
    whole = list(loader)
    for each in (loader, Plain(whole)):
        shares = [list(dealt(each, Turn(number, count))) for number in range(count)]
        assert [len(share) for share in shares] == [len(whole[number::count]) for number in range(count)]
        for number, share in enumerate(shares):
            for ours, theirs in zip(share, whole[number::count], strict=True):
                assert torch.equal(ours.images, theirs.images)
                assert torch.equal(ours.labels, theirs.labels)


class Plain:
    """An evaluation loader of someone else's, that can only be read from front to back."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    @property
    def images(self) -> int:
        return sum(len(batch.labels) for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


@pytest.mark.parametrize("kind", ["arrays", "folder"])
@pytest.mark.parametrize("count", [2, 4])
def test_slices_make_up_the_batch(job: Path, tmp_path: Path, kind: str, count: int) -> None:
    """The same pictures, augmented alike."""
    path = job / "data.npz" if kind == "arrays" else write_folder(tmp_path / "pictures", train=50, val=12)
    spec = InputSpec(channels=1, height=SIDE, width=SIDE, mean=(0.5,), std=(0.25,))
    data = load_data(str(path), spec, 6, batch_size=24, seed=3)
    assert data.train is not None
    slices = [list(data.train.sliced(Turn(number, count)).epoch(1, 1)) for number in range(count)]
    for index, batch in enumerate(data.train.epoch(1, 1)):
        assert torch.equal(batch.images, torch.cat([part[index].images for part in slices]))
        assert torch.equal(batch.labels, torch.cat([part[index].labels for part in slices]))
    with pytest.raises(UsageError, match="batches of 24 pictures cannot be divided evenly among 5 processes"):
        data.train.sliced(Turn(0, 5))


class Unsure(nn.Module):
    """Outputs that are not finite for one image."""

    def forward(self, images: Tensor) -> Tensor:
        scores = images.flatten(1)[:, :1].expand(-1, 3)
        return torch.where(scores * 255 > 21.5, torch.inf, scores)


@pytest.mark.parametrize("size", [5, 11, 22, 23, 40])
def test_the_image_is_named(size: int) -> None:
    images = torch.arange(23, dtype=torch.uint8)[:, None, None, None].expand(23, 1, 2, 2)
    spec = InputSpec(channels=1, height=2, width=2, mean=(0.0,), std=(1.0,))
    loader = EvalBatches(TensorSource(images, np.arange(23) % 3), Normalize(spec), batch_size=size)
    with pytest.raises(CbpqError, match="image 22 of the evaluation"):
        predict(Unsure(), loader, "cpu")
