"""Settings: every value of every preset, where values come from, and what is refused."""

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cbpq.configuration import CHOICES, combine, from_environment, parse_assignments, read_config
from cbpq.errors import UsageError
from cbpq.levels import CONSTRAINTS, level_set
from cbpq.methods import METHODS
from cbpq.methods.cbp import CBP
from cbpq.planning import Plan
from cbpq.presets import (
    COMMAND_LINE,
    PAPER_MODELS,
    PRESETS,
    SETTINGS,
    SHARED,
    Resolved,
    Settings,
    paper_model,
    parse_setting,
    resolve,
    without_effect,
)
from cbpq.settings import settings_of
from cbpq.summary import settings_toml

EVERY_PRESET = pytest.mark.parametrize("preset", PRESETS)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_stands_in_the_table_whole(name: str) -> None:
    entry = SETTINGS[name]
    assert len(entry.metadata["help"]) > 5
    for value in entry.metadata["values"].values():
        assert type(value) is entry.type
        assert parse_setting(name, value, "the table") == value
        # as text, too: this is how variables and --set bring it
        assert parse_setting(name, str(value), "the table") == value
    choices = entry.metadata["choices"]
    assert (entry.type is str) == bool(choices)
    for choice in choices:
        assert choice in entry.metadata["help"] or name.startswith(("scale", "lr", "multiplier"))


@pytest.mark.parametrize("name", SETTINGS)
def test_what_makes_a_setting_idle_is_another_settings_value(name: str) -> None:
    for other, value in SETTINGS[name].metadata["idle"].items():
        assert other != name
        assert value == (CHOICES[other] if other in CHOICES else parse_setting(other, value, "the table"))


@pytest.mark.parametrize(
    ("given", "method", "reasons"),
    [
        ({"temperature": 2}, "cbp", {"temperature": "distillation_loss is features"}),
        ({"temperature": 2, "distillation_loss": "kl"}, "cbp", {}),
        ({"blocks_fade": True, "distillation_loss": "kl"}, "cbp", {"blocks_fade": "distillation_loss is kl"}),
        (
            {"blocks_fade": True, "distillation_loss": "kl", "distillation": 0},
            "cbp",
            {
                "blocks_fade": "distillation is 0.0 and distillation_loss is kl",
                "distillation_loss": "distillation is 0.0",
            },
        ),
        ({"scale_rule": "mean-abs"}, "cbp", {"scale_rule": "rounding is compensated"}),
        ({"scale_rule": "mean-abs", "rounding": "nearest"}, "cbp", {}),
        ({"momentum": 0.8, "epochs": 3}, "cbp", {"momentum": "optimizer is adamw"}),
        ({"momentum": 0.8, "optimizer": "sgd"}, "cbp", {}),
        ({"scale_lr": 0.5, "learn_scales": False}, "cbp", {"scale_lr": "learn_scales is false"}),
        ({"reconstruction_images": 9}, "cbp", {"reconstruction_images": "reconstruction_steps is 0"}),
        ({"patience": 3}, "cbp", {"patience": "multiplier_schedule is progress"}),
        ({"patience": 3}, "proxquant", {"patience": "method proxquant does not have it"}),
        ({"multiplier_updates": 3}, "cbp", {}),
        ({"adaste_full": 0.5, "lr": 0.1}, "cbp", {"adaste_full": "method cbp does not have it"}),
        ({"amp_dtype": "float16"}, "cbp", {"amp_dtype": "amp is false"}),
    ],
)
def test_settings_that_were_given_and_change_nothing(
    given: dict[str, Any], method: str, reasons: dict[str, str]
) -> None:
    resolved = resolve(method=method, layers=[(COMMAND_LINE, given)])
    assert without_effect(resolved, method) == reasons
    assert "amp_dtype" not in without_effect(resolved, method, amp=True)
    # a file or a variable holds what many runs may need
    assert not without_effect(resolve(method=method, layers=[("a.toml", given), ("environment", given)]), method)


def test_every_name_means_one_thing() -> None:
    names = [*SHARED, *CHOICES, *(name for method in METHODS.values() for name in settings_of(method))]
    assert len(set(names)) == len(names)
    assert set(names) == SETTINGS.keys() | CHOICES.keys()


# The published recipe: rates for binary and ternary | for the shift constraints, batch size, decay, multipliers
PAPER = {
    ("alexnet", 224): ((1e-3, 1e-4), 256, 5e-4, 1e-4),
    ("resnet18", 224): ((1e-3, 1e-3), 256, 1e-4, 1e-4),
    ("resnet18.a1_in1k", 224): ((1e-3, 1e-3), 256, 1e-4, 1e-4),
    ("resnet50", 224): ((1e-3, 1e-4), 128, 1e-4, 1e-4),
    ("resnet50", 65): ((1e-3, 1e-4), 128, 1e-4, 1e-4),
    ("resnet50", 32): ((1e-2, 1e-2), 128, 1e-4, 1e-3),
    ("resnet20", 32): ((1e-2, 1e-2), 128, 1e-4, 1e-3),
    ("test_resnet", 64): ((1e-2, 1e-2), 128, 1e-4, 1e-3),
    ("convnext_tiny", 224): ((1e-3, 1e-3), 256, 1e-4, 1e-4),
    ("", 224): ((1e-3, 1e-3), 256, 1e-4, 1e-4),
}


@pytest.mark.parametrize("constraint", [*CONSTRAINTS, "shift:3"])
@pytest.mark.parametrize("architecture, size", PAPER)
def test_paper_preset_per_model(architecture: str, size: int, constraint: str) -> None:
    rates, batch_size, weight_decay, multiplier_lr = PAPER[architecture, size]
    resolved = resolve("paper", architecture=architecture, input_size=size, constraint=constraint)
    settings = resolved.settings
    assert settings.lr == rates["shift" in constraint]
    assert (settings.batch_size, settings.weight_decay, settings.of_methods["multiplier_lr"]) == (
        batch_size,
        weight_decay,
        multiplier_lr,
    )
    model = paper_model(architecture, size)
    assert resolved.origins["weight_decay"] == f"preset paper, model {model}"
    shifted = "shift" in constraint and rates[0] != rates[1]
    assert resolved.origins["lr"] == f"preset paper, model {model}" + (", shift constraints" if shifted else "")
    assert resolved.origins["momentum"] == "preset paper"


def test_paper_preset_is_the_published_recipe() -> None:
    settings = resolve("paper").settings.to_dict()
    assert (
        settings
        | {
            "optimizer": "sgd",
            "lr_schedule": "constant",
            "warmup": 0.0,
            "momentum": 0.9,
            "distillation": 0.0,
            "scale_rule": "mean-abs",
            "scale_granularity": "layer",
            "learn_scales": False,
            "multiplier_schedule": "lagrangian",
            "patience": 20,
            "gradient_clip": 1.0,
            "clamp": 1.0,
            "lr_drop": 0.1,
            "batchnorm_batches": 0,
        }
        == settings
    )
    assert set(PAPER_MODELS) == {"alexnet", "resnet18", "resnet50", "cifar"}


def changed(one: Resolved, other: Resolved) -> set[str]:
    """Settings whose values differ."""
    values = other.settings.to_dict()
    return {name for name, value in one.settings.to_dict().items() if value != values[name]}


def test_every_method_has_its_papers_settings() -> None:
    for method, kind in METHODS.items():
        values = kind.paper
        assert bool(values) == (method != "cbp")  # which has PAPER_MODELS
        assert values.keys() <= SHARED.keys()
        resolved = resolve("paper", method=method, layers=[("you", {"seed": 3})])
        assert all(resolved.origins[name] == f"preset paper, method {method}" for name in values)
        for preset in ("default", "little-data"):
            assert resolve(preset, method=method) == resolve(preset)
        binary, short = (resolve(method=method, constraint="binary", images=images) for images in (50_000, 0))
        assert (changed(short, binary) == {"lr"}) == (method != "cbp")
    assert resolve("paper", method="cbp") == resolve("paper")


def test_default_preset_is_the_short_recipe() -> None:
    resolved = resolve("default", architecture="alexnet", input_size=32, constraint="ternary")
    assert resolved.settings == Settings() == resolve().settings
    assert set(resolved.origins.values()) == {"preset default"}
    settings = resolved.settings
    assert settings.epochs == 10
    assert settings.learn_scales
    assert settings.distillation > 0
    assert 0 < settings.warmup < 1
    assert (settings.scale_rule, settings.scale_granularity, settings.lr_schedule) == (
        "least-squares",
        "channel",
        "cosine",
    )
    assert settings.of(CBP)["multiplier_schedule"] == "progress"


def test_default_preset_leads_weights_gradually_to_two_levels_where_there_is_time() -> None:
    own = {"soft_window", "window_close", "window_power", "multiplier_lr", "latent_weights"}
    plain, binary = (resolve(constraint="binary", images=images) for images in (0, 50_000))
    assert {name for name, origin in binary.origins.items() if origin == "preset default, long budget"} == own | {"lr"}
    assert binary.settings.of(CBP)["soft_window"]
    assert not plain.settings.of(CBP)["soft_window"]
    values = plain.settings.to_dict()
    hard = resolve(constraint="binary", images=50_000, layers=[("you", {name: values[name] for name in own})])
    assert changed(plain, hard) == {"lr"}
    assert changed(*(resolve(constraint="ternary", images=images) for images in (0, 50_000))) == {"lr"}
    layers = [("you", {"epochs": 1})]
    for images, gradually in ((61_440, False), (61_441, True)):  # 480 steps, and more
        resolved = resolve(constraint="binary", images=images, layers=layers)
        assert resolved.settings.of(CBP)["soft_window"] == gradually
        assert (changed(resolved, resolve(layers=layers)) == {"lr"}) != gradually


def test_default_preset_takes_smaller_steps_for_finer_levels() -> None:
    rates = [resolve("default", constraint=name).settings.lr for name in CONSTRAINTS]
    assert list(CONSTRAINTS) == ["binary", "ternary", "one-bit-shift", "two-bit-shift"]
    assert rates == [2e-3, 1e-3, 1e-3, 5e-4]
    resolved = resolve("default", constraint="two-bit-shift")
    assert resolved.to_dict()["lr"] == {"value": 5e-4, "from": "preset default, two-bit-shift"}
    assert resolve("default", constraint="two-bit-shift", layers=[("you", {"lr": 0.1})]).settings.lr == 0.1


@pytest.mark.parametrize(
    ("epochs", "images", "given", "lr"),
    [
        (10, 0, {}, 1e-3),  # how many pictures there are is not known
        (20, 1438, {}, 1e-3),  # 225 steps
        (1, 61_440, {}, 1e-3),  # 480 steps, the most for which it is whole
        (2, 50_000, {}, 7.8e-4),  # 781 steps
        (10, 50_000, {}, 3.5e-4),
        (10, 50_000, {"batch_size": 256}, 5e-4),
        (10, 10, {"epoch_images": 50_000}, 3.5e-4),
        (10, 50_000, {"lr": 3e-3}, 3e-3),  # whoever gives one gets it
        (10, 50_000, {"lr": 1e-3}, 1e-3),
    ],
)
def test_default_preset_takes_smaller_steps_where_there_are_many(
    epochs: int, images: int, given: dict[str, float], lr: float
) -> None:
    resolved = resolve("default", images=images, layers=[("preset.toml", {"epochs": epochs, **given})])
    assert resolved.settings.lr == lr
    origin = "preset.toml" if "lr" in given else "preset default, long budget" if lr < 1e-3 else "preset default"
    assert resolved.origins["lr"] == origin
    finer = resolve("default", constraint="two-bit-shift", images=images, layers=[("you", {"epochs": epochs, **given})])
    assert finer.settings.lr == pytest.approx(lr if "lr" in given else lr / 2, rel=0.05)
    for preset in ("paper", "little-data"):
        settings = resolve(preset, images=images).settings
        assert settings.lr == resolve(preset).settings.lr


@EVERY_PRESET
def test_resolved_says_where_everything_comes_from(preset: str) -> None:
    resolved = resolve(
        preset, architecture="alexnet", layers=[("file", {"lr": 0.5, "seed": 3}), ("you", {"lr": "0.25"})]
    )
    table = resolved.to_dict()
    assert list(table) == list(SETTINGS)
    assert table["lr"] == {"value": 0.25, "from": "you"}
    assert table["seed"] == {"value": 3, "from": "file"}
    assert table["momentum"] == {"value": 0.9, "from": f"preset {preset}"}
    assert resolved.settings.to_dict() == {name: entry["value"] for name, entry in table.items()}
    assert resolved.preset == preset


def test_values_find_their_type() -> None:
    for name, given, expected in (
        ("epochs", "3", 3),
        ("epochs", 3.0, 3),
        ("epochs", 0, 0),
        ("lr", "1e-3", 1e-3),
        ("lr", 1, 1.0),
        ("learn_scales", "yes", True),
        ("learn_scales", "TRUE", True),
        ("learn_scales", "0", False),
        ("learn_scales", "off", False),
        ("learn_scales", False, False),
        ("optimizer", "adamw", "adamw"),
        ("momentum", 1, 1.0),
        ("seed", 2**63 - 1, 2**63 - 1),
    ):
        value = parse_setting(name, given, "here")
        assert value == expected
        assert type(value) is type(expected)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("epoch", 1, "unknown setting 'epoch' from here; did you mean 'epochs'"),
        ("weight-decay", 1, "did you mean 'weight_decay'"),
        ("zzz", 1, "unknown setting 'zzz' from here$"),
        ("epochs", "three", "setting epochs: 'three' from here is no whole number"),
        ("epochs", "1.5", "is no whole number"),
        ("epochs", 1.5, "is no whole number"),
        ("epochs", True, "is no whole number"),
        ("epochs", None, "is no whole number"),
        ("epochs", [1], "is no whole number"),
        ("epochs", "", "is no whole number"),
        ("epochs", float("inf"), "is no whole number"),
        ("epochs", float("nan"), "is no whole number"),
        ("epochs", "9" * 5000, "is no whole number"),
        ("epochs", -1, "setting epochs: -1 from here must be at least 0"),
        ("batch_size", 0, "must be at least 1"),
        ("seed", 2**63, "must be between 0 and 9.2"),
        ("seed", 10**400, "must be between 0 and 9.2"),
        ("lr", "fast", "is no number"),
        ("lr", False, "is no number"),
        ("lr", 10**400, "is no number"),
        ("lr", -1e-9, "must be at least 0"),
        ("lr", "nan", "must be at least 0"),
        ("lr", "inf", "must be at least 0"),
        ("momentum", 1.01, "must be between 0 and 1"),
        ("distillation", -0.1, "must be between 0 and 1"),
        ("temperature", 0, "must be at least 0.001"),
        ("window_close", 0, "must be at least 1e-06"),
        ("learn_scales", "maybe", "is no truth value"),
        ("learn_scales", 1, "is no truth value"),
        ("learn_scales", None, "is no truth value"),
        ("optimizer", "adam", "'adam' from here is none of sgd, adamw"),
        ("optimizer", 3, "is no text"),
        ("scale_rule", "", "is none of mean-abs, least-squares"),
    ],
)
def test_values_that_do_not_fit(name: str, value: Any, message: str) -> None:
    for call in (lambda: parse_setting(name, value, "here"), lambda: resolve(layers=[("here", {name: value})])):
        with pytest.raises(UsageError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match=r"unknown preset 'papre'; did you mean 'paper'.*known are default, paper"):
        resolve("papre")


# where values come from


def config_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flag_before_variable_before_file_before_preset(tmp_path: Path) -> None:
    config = config_file(tmp_path, 'epochs = 1\nlr = 1.0\nseed = 1\npreset = "paper"\nmethod = "m1"\ndevice = "d1"\n')
    environment = {
        "CBPQ_LR": "2",
        "CBPQ_SEED": "2",
        "CBPQ_DEVICE": "d2",
        "CBPQ_METHOD": "m2",
        "HOME": "/",
        "CBPQ_X": "1",
    }
    flags = {"seed": 3, "device": "d3", "epochs": None, "lr": None, "include": []}
    choices, origins, layers = combine(flags, ["momentum=0.5"], environment, config)
    assert (choices["preset"], choices["method"], choices["device"]) == ("paper", "m2", "d3")
    assert choices["constraint"] == CHOICES["constraint"]
    named = {name: origins[name] for name in ("preset", "method", "device", "constraint")}
    assert named == {"preset": str(config), "method": "environment", "device": "command line", "constraint": "default"}
    resolved = resolve(choices["preset"], layers=layers)
    settings = resolved.settings
    assert (settings.epochs, settings.lr, settings.seed, settings.momentum) == (1, 2.0, 3, 0.5)
    names = ("epochs", "lr", "seed", "momentum", "clamp")
    assert [resolved.origins[name] for name in names] == [
        str(config),
        "environment",
        "command line",
        "command line",
        "preset paper",
    ]


def test_nothing_said() -> None:
    choices, origins, layers = combine({"epochs": None, "include": [], "amp": None}, [], {}, None)
    assert choices == CHOICES
    assert set(origins.values()) == {"default"}
    assert resolve(layers=layers) == resolve()


@pytest.mark.parametrize("constraint", [*CONSTRAINTS, "levels:-1,-0.3,0.5"])
@EVERY_PRESET
def test_settings_file_of_a_run_makes_the_same_run(preset: str, constraint: str, tmp_path: Path) -> None:
    given = {"epochs": 3, "lr": 1.5e-05, "learn_scales": False, "optimizer": "adamw", "seed": 12345}
    resolved = resolve(preset, architecture="alexnet", constraint=constraint, layers=[("command line", given)])
    wanted = {
        "include": ["layer*", 'a"b\\c'],
        "exclude": [],
        "quantize_first": True,
        "quantize_last": False,
        "augment": "none",
        "amp": True,
    }
    job = SimpleNamespace(levels=level_set(constraint), method="cbp", resolved=resolved, choices=wanted)
    config = config_file(tmp_path, settings_toml(cast(Plan, job)))
    choices, _, layers = combine({}, [], {}, config)
    assert choices == CHOICES | wanted | {"constraint": constraint, "method": "cbp", "preset": preset}
    # another network, whose line of the preset would be another, changes nothing
    again = resolve(choices["preset"], architecture="resnet18", constraint=constraint, layers=layers)
    assert again.settings == resolved.settings
    assert set(again.origins.values()) == {str(config)}


@pytest.mark.parametrize(
    "text, message",
    [
        ("epocs = 3", "unknown key 'epocs'; did you mean 'epochs'"),
        ("constrain = 'binary'", "unknown key 'constrain'; did you mean 'constraint'"),
        ("[run]\nepochs = 3", "unknown key 'run'"),
        ("epochs = ", "is no valid TOML"),
        ("epochs = 3\nepochs = 4", "is no valid TOML"),
        ("seed = " + "9" * 5000, "is no valid TOML"),
        ("include = " + "[" * 20000, "is no valid TOML"),
    ],
)
def test_files_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    config = config_file(tmp_path, text)
    with pytest.raises(UsageError, match=message) as caught:
        combine({}, [], {}, config)
    assert str(config) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (tmp_path / "none.toml", "cannot read the configuration .*No such file"),
        (tmp_path, "cannot read the configuration .*directory"),
        (binary, "is no valid TOML"),
    ):
        with pytest.raises(UsageError, match=message):
            read_config(path)


def test_values_in_files_have_types(tmp_path: Path) -> None:
    for text, message in (
        ("epochs = 'x'", "setting epochs: 'x' from .*settings.toml is no whole number"),
        ("epochs = inf", "is no whole number"),
        ("lr = true", "is no number"),
        ("lr = [1]", "is no number"),
        ("lr = 1979-05-27", "is no number"),
    ):
        _, _, layers = combine({}, [], {}, config_file(tmp_path, text))
        with pytest.raises(UsageError, match=message):
            resolve(layers=layers)
    for text, message in (
        ("constraint = 3", "constraint: 3 from .*settings.toml does not fit"),
        ("amp = 'perhaps'", "amp: 'perhaps' from .* does not fit"),
        ("include = [1, 2]", r"include: \[1, 2\] from .* does not fit"),
        ("exclude = {a = 1}", "exclude: .* does not fit"),
    ):
        with pytest.raises(UsageError, match=message):
            combine({}, [], {}, config_file(tmp_path, text))


def test_environment() -> None:
    environment = {
        "CBPQ_EPOCHS": "7",
        "CBPQ_INCLUDE": "layer1,layer2",
        "CBPQ_AMP": "true",
        "CBPQ_NOTHING": "1",
        "EPOCHS": "9",
    }
    assert from_environment(environment) == {"epochs": "7", "include": "layer1,layer2", "amp": "true"}
    choices, origins, layers = combine({}, [], environment, None)
    assert choices["include"] == ["layer1", "layer2"]
    assert choices["amp"] is True
    assert origins["include"] == "environment"
    assert resolve(layers=layers).settings.epochs == 7
    assert set(from_environment({f"CBPQ_{name.upper()}": "x" for name in SETTINGS})) == set(SETTINGS)
    with pytest.raises(UsageError, match="setting epochs: 'many' from environment is no whole number"):
        resolve(layers=combine({}, [], {"CBPQ_EPOCHS": "many"}, None)[2])


@pytest.mark.parametrize("value", ["on", "off", "yes", "no", "1", "0", "True", "FALSE"])
def test_truth_is_spelt_the_same_for_choices_and_settings(value: str) -> None:
    choices, _, layers = combine({}, [], {"CBPQ_AMP": value, "CBPQ_LEARN_SCALES": value}, None)
    assert choices["amp"] is resolve(layers=layers).settings.learn_scales


def test_assignments() -> None:
    assert parse_assignments(["lr=0.5", " temperature = 2 ", "scale-lr=3"]) == {
        "lr": "0.5",
        "temperature": "2",
        "scale_lr": "3",
    }
    assert parse_assignments([]) == {}
    assert parse_assignments(["lr=0.5", "lr=5e-1"]) == {"lr": "5e-1"}
    for assignments, message in (
        (["lr"], "--set 'lr': write key=value"),
        (["=1"], "unknown setting '' from --set"),
        (["lrr=1"], "unknown setting 'lrr' from --set; did you mean 'lr'"),
        (["constraint=binary"], "unknown setting 'constraint'"),
        (["lr="], "setting lr: '' from --set is no number"),
        (["lr=a=b"], "'a=b' from --set is no number"),
        (["lr=1", "lr=2"], "--set lr=1 and --set lr=2 contradict each other"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_assignments(assignments)


def test_flags_that_contradict() -> None:
    with pytest.raises(UsageError, match="--batch-size and --set batch_size=… contradict each other"):
        combine({"batch_size": 3}, ["batch-size=4"], {}, None)
    _, _, layers = combine({"batch_size": 3, "lr": 0.5}, ["batch-size=3", "lr=5e-1"], {}, None)
    assert resolve(layers=layers).settings.batch_size == 3


def test_zero_is_something_said() -> None:
    _, _, layers = combine({"epochs": 0, "seed": 0}, [], {"CBPQ_EPOCHS": "5", "CBPQ_SEED": "5"}, None)
    assert (resolve(layers=layers).settings.epochs, resolve(layers=layers).settings.seed) == (0, 0)


def test_defaults_are_not_shared() -> None:
    first, _, _ = combine({}, [], {}, None)
    first["include"].append("layer1")
    assert combine({}, [], {}, None)[0]["include"] == []


def test_settings_are_plain_values() -> None:
    for preset in PRESETS:
        values = resolve(preset).settings.to_dict()
        assert json.loads(json.dumps(values)) == values
        assert tomllib.loads("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())) == values
