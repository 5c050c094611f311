"""Recipes: what is read, what is refused and in which words."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from starfire_prune.engine.settings import Fc, Pruning, parse_pruning
from starfire_prune.recipe.compare import differing_keys
from starfire_prune.recipe.load import dump_recipe, load_recipe, main, recipe_schema, write_schema
from starfire_prune.recipe.sections import Ema, Recipe
from starfire_prune.recipe.yaml import dump_yaml, parse_yaml
from starfire_prune.utils.settings import RecipeError
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
SCHEMA = RECIPES / "recipe.schema.json"
SHIPPED = sorted(RECIPES.glob("*.yaml"))

RECIPE = """\
model: {name: resnet18, num_classes: 10}
data: {name: digits, batch_size: 64}
optimizer: {name: sgd, lr: 0.05}
lr_schedule: {milestones: [6, 8]}
epochs: 10
pruning: {method: ck, amount: 0.6, era: [3, 6]}
"""
CK = {"method": "ck", "amount": 0.6, "era": [3, 6]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture
def data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR10", "/data/cifar-10")
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    monkeypatch.setenv("TINY_IMAGENET", "/data/tiny-imagenet-200")
    monkeypatch.setenv("TINY_IMAGENET20", "/data/tiny-imagenet-20")


def refusal_of(call: Callable[..., object], *arguments: object) -> list[str]:
    """The lines of the RecipeError, which must not drag another exception along."""
    with pytest.raises(RecipeError) as caught:
        call(*arguments)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return str(caught.value).splitlines()


def refusal_of_pruning(**settings: object) -> list[str]:
    return refusal_of(parse_pruning, {**CK, **settings})


# Reading


def test_values_of_the_file_are_read(file):
    recipe = load_recipe(file)
    assert isinstance(recipe.pruning, Pruning)
    assert (recipe.model.name, recipe.optimizer.lr, recipe.epochs) == ("resnet18", 0.05, 10)
    assert (recipe.pruning.amount, recipe.pruning.era) == (0.6, (3, 6))


def test_defaults(file):
    recipe = load_recipe(file)
    assert isinstance(recipe.pruning, Pruning)
    assert recipe.pruning.fc == Fc(method="fine", amount=None)
    assert (recipe.pruning.schedule, recipe.pruning.include) == ("linear", ("*",))
    assert (recipe.training.mixed_precision, recipe.lr_schedule.gamma) == ("no", 0.1)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.usefixtures("data_sets")
def test_shipped_recipe_loads(path):
    assert load_recipe(path).pruning != "none"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_names_its_schema_for_editors(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"


@pytest.mark.usefixtures("data_sets")
def test_table_1_recipe_is_the_papers():
    recipe = load_recipe(RECIPES / "resnet50_v15.yaml")
    assert isinstance(recipe.pruning, Pruning)
    assert (recipe.epochs, recipe.data.batch_size, recipe.optimizer.lr) == (100, 64, 0.05)
    assert (recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.9, 1e-4)
    assert recipe.lr_schedule.milestones == (30, 60, 90)
    assert (recipe.pruning.amount, recipe.pruning.era) == (0.6, (40, 60))


def test_none_is_dense_training(file):
    assert load_recipe(file, ["pruning=none"]).pruning == "none"


def test_fc_none_leaves_linear_layers_dense(file):
    recipe = load_recipe(file, ["pruning.fc=none"])
    assert isinstance(recipe.pruning, Pruning)
    assert recipe.pruning.fc == "none"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("1e-4", 1e-4),
        ("-.5", -0.5),
        ("010", 10),
        ("0o10", 8),
        ("-0o10", "-0o10"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("'1e-4'", "1e-4"),
        ("~", None),
    ],
)
def test_yaml_is_read_as_version_1_2(file, text, value):
    options = load_recipe(file, [f"model.options.x={text}"]).model.options
    assert options == {"x": value}
    assert type(options["x"]) is type(value)


@pytest.mark.parametrize(
    "text", ["a:\t4", "a: \t 4\t# four\t\n", "a:\t\n  4", "{a:\t4\t}", "a\t: 4"]
)
def test_a_tab_between_the_words_of_a_line_is_read(text):
    assert parse_yaml(text) == {"a": 4}


@pytest.mark.parametrize("text", ["\ta: 4", "a:\n\tb: 4", "a:\n \tb: 4", "{\n\ta: 4}"])
def test_a_tab_as_indentation_is_refused(text):
    with pytest.raises(
        ValueError, match=r"^line \d, column \d: not valid YAML: .* character '\\t'"
    ):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["*.conv1", "*", "*conv", "[fc, *.conv1]", "[ab]*.conv", "!conv"])
def test_a_pattern_that_needs_quotes_asks_for_them(file, text):
    (line,) = refusal_of(load_recipe, file, [f"pruning.exclude={text}"])
    column = re.search(r"[*!]", text).start() + 1  # type: ignore[union-attr]
    assert line == (
        f"--set: pruning.exclude: line 1, column {column}: not valid YAML: a recipe has no aliases "
        "or tags: quote text that begins with * or !, as in '*.conv'"
    )


@pytest.mark.parametrize(
    "text",
    ["010", "08", "0o10", "0x10", "1e-4", ".5", "~", "null", "no", "true", ".inf", "1:30", "*a"],
)
def test_text_that_looks_like_something_else_is_read_back_as_text(text):
    assert parse_yaml(dump_yaml({"a": text})) == {"a": text}


def test_one_pattern_is_a_list_of_one(file):
    recipe = load_recipe(file, ["pruning.exclude=fc"])
    assert isinstance(recipe.pruning, Pruning)
    assert recipe.pruning.exclude == ("fc",)


def test_one_tracker_is_a_list_of_one(file):
    assert load_recipe(file, ["training.trackers=wandb"]).training.trackers == ("wandb",)


def test_an_unknown_tracker_names_the_nearest(file):
    (line,) = refusal_of(load_recipe, file, ["training.trackers=tensorbord"])
    assert line.startswith("--set: training.trackers.0: must be one of tensorboard, wandb, ")
    assert line.endswith("(got 'tensorbord'); did you mean tensorboard?")


def test_root_expands_variables_and_home(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SET", "imagenet")
    recipe = load_recipe(file, ["data={name: folder, batch_size: 1, root: '~/${SET}/x'}"])
    assert recipe.data.root == "/home/ada/imagenet/x"


def test_pretrained_is_a_switch_or_a_file(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("RUN", "first")
    settings = ("false", "true", "a.safetensors", "'~/${RUN}/model.safetensors'")
    read = [load_recipe(file, [f"model.pretrained={value}"]).model.pretrained for value in settings]
    assert read == [False, True, "a.safetensors", "/home/ada/first/model.safetensors"]
    assert load_recipe(file).model.pretrained is False


def test_an_average_has_timms_decay_unless_told_otherwise(file):
    assert load_recipe(file).training.ema is None
    assert load_recipe(file, ["training.ema={}"]).training.ema == Ema(decay=0.9999, warmup=False)


def test_recipe_is_frozen(file):
    recipe = load_recipe(file)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optimizer.lr = 1.0  # type: ignore[misc]


# Files that are no recipe


def test_missing_file_names_near_ones(file):
    path = file.with_name("recipes.yml")
    assert refusal_of(load_recipe, path) == [f"{path}: no such file; in that folder: recipe.yaml"]


def test_missing_folder(tmp_path):
    path = tmp_path / "absent" / "recipe.yaml"
    expected = f"{path}: no such file; there is no folder {path.parent}"
    assert refusal_of(load_recipe, path) == [expected]


def test_folder_names_the_recipes_in_it(file):
    folder = file.parent
    expected = f"{folder}: is a folder, not a recipe; in that folder: recipe.yaml"
    assert refusal_of(load_recipe, folder) == [expected]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty; a recipe has the keys model, data, optimizer, lr_schedule, epochs, "),
        (b"# nothing\n", "is empty; a recipe has the keys model"),
        (b"- 1\n", "must be a mapping (got [1], a list); a recipe has the keys model"),
        (b"ck", "must be a mapping (got 'ck', a str); a recipe has the keys model"),
        (b"model: \xff\xfe", "is not UTF-8 text (byte 7); save it as UTF-8"),
        (b"epochs: 1\nera: [2,\nseed: }", "line 3, column 7: not valid YAML: "),
        (b"a: 1\n\tb: 2", "line 2, column 1: not valid YAML: found character '\\t'"),
        (b"a: 1\nb: {c: 1, c: 2}", "line 2, column 11: not valid YAML: duplicate key c"),
        (b"a: &x 1\nb: *x", "line 2, column 4: not valid YAML: a recipe has no aliases or tags"),
        (b"a: !!python/tuple [1]", "line 1, column 4: not valid YAML: a recipe has no aliases or"),
        (b"a: !!str 1", "line 1, column 4: not valid YAML: a recipe has no aliases or tags"),
        (b"? [a]\n: 1", "line 1, column 3: not valid YAML: a key must be a single word"),
        (b"a: 1\n---\nb: 2", "line 2, column 1: not valid YAML: but found another document"),
        (b"a: \x00", "not valid YAML: unacceptable character #x0000"),
        (b"a: " + b"[" * 600 + b"]" * 600, "not valid YAML: nested too deeply"),
    ],
)
def test_file_that_is_no_recipe(file, content, fault):
    file.write_bytes(content)
    (line,) = refusal_of(load_recipe, file)
    assert line.startswith(f"{file}: {fault}")


# Values that are refused, each with the file and its key


def test_unknown_key_names_the_nearest(file):
    file.write_text(RECIPE.replace("lr:", "lr: 0.1, momentun:"), encoding="utf-8")
    expected = f"{file}: optimizer.momentun: unknown key (got 0.05); did you mean momentum?"
    assert refusal_of(load_recipe, file) == [expected]


@pytest.mark.parametrize(
    ("wrong", "right"), [("modle", "model"), ("optimiser", "optimizer"), ("epoch", "epochs")]
)
def test_a_misspelt_key_that_is_required_is_one_error(wrong, right, file):
    file.write_text(re.sub(f"(?m)^{right}:", f"{wrong}:", RECIPE), encoding="utf-8")
    (line,) = refusal_of(load_recipe, file)
    assert line.startswith(f"{file}: {wrong}: unknown key (got ")
    assert line.endswith(f"; did you mean {right}?")


@pytest.mark.parametrize(
    ("wrong", "right"), [("methd", "method"), ("amuont", "amount"), ("eraa", "era")]
)
def test_a_misspelt_key_of_a_section_is_one_error(wrong, right, file):
    file.write_text(RECIPE.replace(f"{right}:", f"{wrong}:"), encoding="utf-8")
    (line,) = refusal_of(load_recipe, file)
    assert line.startswith(f"{file}: pruning.{wrong}: unknown key (got ")
    assert line.endswith(f"; did you mean {right}?")


def test_a_misspelt_key_beside_the_right_one_hides_no_error(file):
    file.write_text(RECIPE.replace("epochs: 10", "epochs: 0\nepoch: 10"), encoding="utf-8")
    first, second = refusal_of(load_recipe, file)
    assert first == f"{file}: epochs: must be at least 1 (got 0)"
    assert second == f"{file}: epoch: unknown key (got 10); did you mean epochs?"


def test_an_unknown_key_hides_no_other_missing_key(file):
    file.write_text(
        RECIPE.replace("model:", "modle:").replace("epochs: 10\n", ""), encoding="utf-8"
    )
    first, second = refusal_of(load_recipe, file)
    assert "modle" in first + second
    assert "epochs: is required" in first + second


def test_unknown_key_without_a_near_one_lists_the_keys(file):
    file.write_text(RECIPE + "training: {speed: 3}", encoding="utf-8")
    (line,) = refusal_of(load_recipe, file)
    assert line == (
        f"{file}: training.speed: unknown key (got 3); the keys here are mixed_precision, "
        "gradient_accumulation, clip_grad_norm, label_smoothing, mixup, cutmix, ema, "
        "channels_last, compile, compress_gradients, keep_checkpoints, trackers, threads"
    )


def test_the_largest_seed_is_numpys(file):
    seed = load_recipe(file, ["seed=4294967295"]).seed
    np.random.RandomState(seed)
    with pytest.raises(ValueError, match="between 0 and"):
        np.random.RandomState(seed + 1)


def test_missing_key_says_what_it_is(file):
    file.write_text(RECIPE.replace("epochs: 10\n", ""), encoding="utf-8")
    meant = "epochs to train, from 1 to 100000; those of quantization follow"
    assert refusal_of(load_recipe, file) == [f"{file}: epochs: is required ({meant})"]


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("epochs='10'", "must be a whole number (got '10', a str); without quotes: 10"),
        ("epochs=1.5", "must be a whole number (got 1.5, a float)"),
        ("epochs=true", "must be a whole number (got True, a bool)"),
        ("epochs=0", "must be at least 1 (got 0)"),
        ("epochs=100001", "must be at most 100000 (got 100001)"),
        ("seed=-1", "must be at least 0 (got -1)"),
        ("seed=4294967296", "must be at most 4294967295 (got 4294967296)"),
        ("epochs=", "must be a whole number (got nothing)"),
        ("model=resnet18", "must be a mapping (got 'resnet18', a str)"),
        ("model.name=18", "must be text (got 18, an int)"),
        ("model.name=''", "must be at least a character long (got '')"),
        ("model.options={a: .nan}", "must be a finite number (got nan)"),
        ("data.image_size=4", "must be at least 8 (got 4)"),
        ("data.image_size=4097", "must be at most 4096 (got 4097)"),
        ("data.workers=1025", "must be at most 1024 (got 1025)"),
        ("data.crop_pct=1.5", "must be at most 1 (got 1.5)"),
        (
            "data.crop_scale=[0.5, 1.0]",
            "has no effect with data digits (got [0.5, 1.0]); remove it",
        ),
        ("optimizer.lr=fast", "must be a number (got 'fast', a str)"),
        ("optimizer.lr=0", "must be above 0 (got 0)"),
        ("optimizer.momentum=1.0", "must be below 1 (got 1.0)"),
        ("training.channels_last=yes", "must be true or false (got 'yes', a str)"),
        ("training.clip_grad_norm=.inf", "must be a finite number (got inf)"),
        (
            "training.mixed_precision=fp61",
            "must be one of no, fp16, bf16 (got 'fp61'); did you mean fp16?",
        ),
        ("lr_schedule.milestones=6", "must be a list (got 6, an int)"),
        ("lr_schedule.milestones=[8, 6]", "must rise (got [8, 6]); in order: [6, 8]"),
        ("lr_schedule.warmup_epochs=10", "must be below epochs = 10 (got 10)"),
        ("pruning=ck", "must be a mapping of settings, or none (got 'ck', a str)"),
        ("pruning.fc=", "must be a mapping of settings, or none (got nothing)"),
        (
            "pruning.method=windows",
            "must be one of window, ck, intra, inter, magnitude, random, filter (got 'windows'); "
            "did you mean window?",
        ),
        (
            "pruning.method=block",
            "must be one of window, ck, intra, inter, magnitude, random, filter (got 'block'); "
            "block is for linear layers: give it as fc.method",
        ),
        ("pruning.include=[]", "must be a list of at least one (got [])"),
        ("data.root=/data", "has no effect with data digits (got '/data'); remove it"),
        ("data.hflip=0.5", "has no effect with data digits (got 0.5); remove it"),
        ("data.train_split=train", "has no effect with data digits (got 'train'); remove it"),
        (
            "data.name=digit",
            "must be one of digits, folder, tiny_imagenet, hfds/…, wds/…, torch/… "
            "(got 'digit'); did you mean digits?",
        ),
        ("model.pretrained=3", "must be true, false or a safetensors file (got 3, an int)"),
        ("model.pretrained=''", "must be true, false or a safetensors file (got '', a str)"),
        ("training.compile=1", "must be true or false (got 1, an int)"),
        ("training.mixup=-0.1", "must be at least 0 (got -0.1)"),
        ("training.cutmix=big", "must be a number (got 'big', a str)"),
        ("training.ema=true", "must be a mapping (got True, a bool)"),
        ("training.ema.decay=1.0", "must be below 1 (got 1.0)"),
        ("training.ema.dekay=0.9", "unknown key (got 0.9); did you mean decay?"),
        ("quantization=true", "must be a mapping (got True, a bool)"),
        ("quantization.epochs=0", "must be at least 1 (got 0)"),
        ("training.threads=1025", "must be at most 1024 (got 1025)"),
        ("training.trackers=3", "must be a list (got 3, an int)"),
    ],
)
def test_refused_value(file, setting, fault):
    key = setting.split("=")[0]
    key += ".a" if key == "model.options" else ""
    assert refusal_of(load_recipe, file, [setting]) == [f"--set: {key}: {fault}"]


@pytest.mark.parametrize("scale", ["[0.5, 1.5]", "[0.9, 0.5]", "[0, 0.5]", "[0.5]", "0.5"])
def test_crop_scale_is_a_range_of_shares(file, scale):
    settings = ["data={name: folder, root: images, batch_size: 1}", f"data.crop_scale={scale}"]
    assert refusal_of(load_recipe, file, settings) == [
        f"--set: data.crop_scale: must be two numbers, 0 < low <= high <= 1 (got {scale})"
    ]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            ["quantization={epochs: 1, lr: 0.0}"],
            "quantization.lr: must be above 0 (got 0.0)",
        ),
        (
            ["quantization={epochs: 2, frozen_epochs: 3}"],
            "quantization.frozen_epochs: must be at most quantization.epochs = 2 (got 3)",
        ),
        (
            ["quantization.epochs=2", "training.ema={}"],
            "training.ema: can't be combined with quantization, which trains the weights "
            "themselves; remove one of them",
        ),
    ],
)
def test_quantization_is_checked_with_the_keys_around_it(file, settings, error):
    assert refusal_of(load_recipe, file, settings) == [f"--set: {error}"]


def test_the_epochs_of_quantization_follow_the_others(file):
    assert load_recipe(file).total_epochs == 10
    assert load_recipe(file, ["quantization.epochs=2"]).total_epochs == 12


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ("model.options.pretrained", "has a key of its own (got 1); use model.pretrained"),
        ("model.options.checkpoint_path", "has a key of its own (got 1); use model.pretrained"),
        ("model.options.pretrained_cfg", "has a key of its own (got 1); use model.pretrained"),
        (
            "model.options.pretrained_cfg_overlay",
            "has a key of its own (got 1); use model.pretrained",
        ),
        ("model.options.num_classes", "has a key of its own (got 1); use model.num_classes"),
        ("model.options.features_only", "leaves no classifier to train (got 1); remove it"),
        ("optimizer.options.lr", "has a key of its own (got 1); use optimizer.lr"),
        ("optimizer.options.momentum", "has a key of its own (got 1); use optimizer.momentum"),
        (
            "optimizer.options.weight_decay",
            "has a key of its own (got 1); use optimizer.weight_decay",
        ),
        (
            "optimizer.options.filter_bias_and_bn",
            "has a key of its own (got 1); use optimizer.filter_bias_and_bn",
        ),
        ("optimizer.options.opt", "has a key of its own (got 1); use optimizer.name"),
        (
            "optimizer.options.model_or_params",
            "is the network that is trained (got 1); remove it",
        ),
    ],
)
def test_options_may_not_hold_what_has_a_key(file, option, fault):
    assert refusal_of(load_recipe, file, [f"{option}=1"]) == [f"--set: {option}: {fault}"]


def test_options_are_checked_beside_other_faults(file):
    settings = ["optimizer.lr=0", "optimizer.options.lr=1"]
    assert refusal_of(load_recipe, file, settings) == [
        "--set: optimizer.lr: must be above 0 (got 0)",
        "--set: optimizer.options.lr: has a key of its own (got 1); use optimizer.lr",
    ]


@pytest.mark.parametrize(
    ("amount", "fault"),
    [
        (60, "(got 60, an int); 60 % is 0.6"),
        (62.5, "(got 62.5, a float); 62.5 % is 0.625"),
        (1, "(got 1, an int); 100 % is 1.0, 1 % is 0.01"),
        ("0.6", "(got '0.6', a str); 60 % is 0.6"),
        (True, "(got True, a bool); 60 % is 0.6"),
        (-0.5, "(got -0.5, a float); 60 % is 0.6"),
        (float("nan"), "(got nan, a float); 60 % is 0.6"),
        (0.0, "(got 0.0, a float); exclude leaves layers dense, pruning: none all of them"),
    ],
)
def test_amount_is_a_share(amount, fault):
    expected = f"pruning: amount: must be a float above 0 and at most 1 {fault}"
    assert refusal_of_pruning(amount=amount) == [expected]


@pytest.mark.parametrize("era", [[6, 3], [3, 3], [-1, 3], [3], [1, 2, 3], [1.0, 2], "40-60", 40])
def test_era_is_two_rising_epochs(era):
    (line,) = refusal_of_pruning(era=era)
    assert line == (
        "pruning: era: must be two epochs [first, end] with 0 <= first < end "
        f"(got {era!r}); [40, 60] prunes in the epochs 40 to 59"
    )


def test_seed_of_random_masks_is_as_large_as_a_runs():
    expected = "pruning: seed: must be at most 4294967295 (got 4294967296)"
    assert refusal_of_pruning(method="random", seed=2**32) == [expected]


def test_era_outside_the_run(file):
    file.write_text(RECIPE.replace("[3, 6]", "[3, 11]"), encoding="utf-8")
    expected = "pruning.era: ends after the run (got [3, 11]); its end is at most epochs = 10"
    assert refusal_of(load_recipe, file) == [f"{file}: {expected}"]


def test_era_may_end_with_the_run(file):
    assert load_recipe(file, ["pruning.era=[0, 10]"]).epochs == 10


def test_milestone_outside_the_run(file):
    file.write_text(RECIPE.replace("[6, 8]", "[6, 10]"), encoding="utf-8")
    expected = f"{file}: lr_schedule.milestones.1: must be below epochs = 10 (got 10)"
    assert refusal_of(load_recipe, file) == [expected]


def test_milestones_have_no_effect_on_a_cosine(file):
    expected = (
        "lr_schedule.milestones: has no effect with lr_schedule cosine (got [6, 8]); remove it"
    )
    assert refusal_of(load_recipe, file, ["lr_schedule.name=cosine"]) == [f"{file}: {expected}"]


def test_folder_data_need_a_root(file):
    file.write_text(RECIPE.replace("digits", "folder"), encoding="utf-8")
    expected = f"{file}: data.root: is required with data folder (the folder of the images)"
    assert refusal_of(load_recipe, file) == [expected]


def test_unset_variable(monkeypatch):
    monkeypatch.delenv("IMAGENET", raising=False)
    path = RECIPES / "resnet50_v15.yaml"
    assert refusal_of(load_recipe, path) == [
        f"{path}: data.root: the environment variable IMAGENET is not set (got '${{IMAGENET}}'); "
        "export IMAGENET=/path/to/the/data, or name the folder itself"
    ]


def test_malformed_variable(file):
    (line,) = refusal_of(load_recipe, file, ["data={name: folder, root: '${A', batch_size: 1}"])
    assert line == "--set: data.root: has a ${ without a name and } (got '${A'); write ${NAME}"


def test_all_errors_are_reported_together(file):
    file.write_text(
        RECIPE.replace("epochs: 10", "epochs: 5\nsead: 1")
        .replace("resnet18", "18")
        .replace("amount: 0.6", "amount: 60, window_fraction: 0.5"),
        encoding="utf-8",
    )
    lines = refusal_of(load_recipe, file, ["optimizer.lr=-1", "epoch"])
    assert [line.rsplit(" (", 1)[0] for line in lines] == [
        "--set: must be KEY=VALUE",
        f"{file}: model.name: must be text",
        "--set: optimizer.lr: must be above 0",
        f"{file}: pruning.amount: must be a float above 0 and at most 1",
        f"{file}: pruning.window_fraction: unknown key",
        f"{file}: sead: unknown key",
        f"{file}: pruning.era: ends after the run",
        f"{file}: lr_schedule.milestones.0: must be below epochs = 5",
        f"{file}: lr_schedule.milestones.1: must be below epochs = 5",
    ]


def test_messages_are_free_of_pydantics_words(file):
    file.write_text("model: 3\npruning: {fc: [1], overrides: {}}\nepochs: x", encoding="utf-8")
    text = "\n".join(refusal_of(load_recipe, file))
    assert not re.search(r"pydantic|Input should|Value error|Field required|https?:", text)


# Options of other methods, and options without effect


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"window_fraction": 0.5},
            "window_fraction: unknown key (got 0.5); it is an option of intra, inter",
        ),
        (
            {"exact_layer_sparsity": True},
            "exact_layer_sparsity: unknown key (got True); it is an option of window",
        ),
        ({"seed": 3}, "seed: unknown key (got 3); it is an option of random"),
        (
            {"method": "intra", "ck_fraction_of_era": 0.5},
            "ck_fraction_of_era: unknown key (got 0.5); it is an option of inter",
        ),
        (
            {"method": "filter", "max_nonzero": 1},
            "max_nonzero: unknown key (got 1); it is an option of window, ck",
        ),
        (
            {"method": "window", "pointwise": "none", "block_size": [2, 1]},
            "block_size: has no effect with pointwise none (got [2, 1]); remove it",
        ),
        (
            {"fc": {"block_size": [2, 2]}},
            "fc.block_size: unknown key (got [2, 2]); it is an option of window, ck, block, "
            "dead_inputs",
        ),
        (
            {"overrides": [{"layers": "a", "window_fraction": 0.5}]},
            "overrides.0.window_fraction: unknown key (got 0.5); it is an option of intra, inter",
        ),
        (
            {"overrides": [{"layers": "a", "method": "intra", "block_size": [2, 1]}]},
            "overrides.0.block_size: unknown key (got [2, 1]); it is an option of window, ck, "
            "block, dead_inputs",
        ),
        (
            {"overrides": [{"layers": "a"}]},
            "overrides.0: changes nothing; give it a method, an amount or an option",
        ),
    ],
)
def test_an_option_that_does_not_belong_is_refused(settings, fault):
    assert refusal_of_pruning(**settings) == [f"pruning: {fault}"]


@pytest.mark.parametrize(
    "settings",
    [
        {
            "method": "window",
            "exact_layer_sparsity": True,
            "scope": "layer",
            "block_size": [2, 1],
            "max_nonzero": 4,
        },
        {"method": "inter", "window_fraction": 0.25, "ck_fraction_of_era": 0.75},
        {"overrides": [{"layers": "a", "method": "intra", "window_fraction": 0.25}]},
        {"fc": {"method": "random", "seed": 3}},
        {"overrides": [{"layers": "head", "method": "block", "block_size": [2, 2]}]},
        {"fc": {"method": "block"}, "overrides": [{"layers": "head", "block_size": [2, 2]}]},
        {"max_nonzero": None},
    ],
)
def test_an_option_that_belongs_is_accepted(settings):
    parse_pruning({**CK, **settings})


def test_override_needs_layers():
    assert refusal_of_pruning(overrides=[{"amount": 0.5}, {"layers": [], "amount": 0.5}]) == [
        "pruning: overrides.0.layers: is required (module names or globs: one, or a list)",
        "pruning: overrides.1.layers: must be a list of at least one (got [])",
    ]


def test_models_made_in_python_are_checked_too():
    with pytest.raises(ValidationError, match="window_fraction"):
        Pruning(method="ck", amount=0.6, era=(3, 6), window_fraction=0.5)  # type: ignore[call-arg]


# Pruning settings from Python


def test_parse_pruning_takes_a_mapping():
    assert parse_pruning({**CK, "era": (3, 6)}) == Pruning(method="ck", amount=0.6, era=(3, 6))


def test_parse_pruning_returns_a_pruning_as_it_is():
    pruning = parse_pruning(CK)
    assert parse_pruning(pruning) is pruning


@pytest.mark.parametrize(
    ("settings", "value"), [([], "[], a list"), ("none", "'none', a str"), (None, "nothing")]
)
def test_parse_pruning_refuses_other_types(settings, value):
    assert refusal_of(parse_pruning, settings) == [f"pruning: must be a mapping (got {value})"]


# --set


def test_set_replaces_and_adds(file):
    settings = ["pruning.amount=0.7", "pruning.era=[2,4]", "training.mixed_precision=no", "seed=7"]
    recipe = load_recipe(file, [*settings, "pruning.amount=0.8", "lr_schedule.milestones.1=7"])
    assert isinstance(recipe.pruning, Pruning)
    assert (recipe.pruning.amount, recipe.pruning.era, recipe.seed) == (0.8, (2, 4), 7)
    assert recipe.lr_schedule.milestones == (6, 7)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("epochs", "must be KEY=VALUE (got 'epochs'), such as pruning.amount=0.7"),
        ("=3", "must be KEY=VALUE (got '=3'), such as pruning.amount=0.7"),
        ("a..b=3", "must be KEY=VALUE (got 'a..b=3'), such as pruning.amount=0.7"),
        ("pruning.amuont=0.7", "pruning.amuont: unknown key (got 0.7); did you mean amount?"),
        ("trainig.seed=1", "trainig: unknown key (got {'seed': 1}); did you mean training?"),
        ("epochs.x=3", "epochs.x: has no key x to set (got 10); set the whole value instead"),
        (
            "lr_schedule.milestones.2=9",
            "lr_schedule.milestones.2: no item 2 in a list of 2; the first is 0",
        ),
    ],
)
def test_set_refused(file, setting, line):
    assert refusal_of(load_recipe, file, [setting]) == [f"--set: {line}"]


def test_set_of_broken_yaml(file):
    (line,) = refusal_of(load_recipe, file, ["pruning.era=[2,"])
    assert line.startswith("--set: pruning.era: line 1, column 4: not valid YAML: ")


# Writing


SETTINGS: list[list[str]] = [
    [],
    ["pruning=none", "model.options={a: [1, {b: ~}], c: '1e-4', d: 'no', e: 1e-9, f: é}"],
    ["training={clip_grad_norm: 1.0, mixed_precision: bf16}", "data.eval_batch_size=1"],
    [
        "training={ema: {decay: 0.9, warmup: true}, mixup: 0.2, cutmix: 1.0, compile: true, "
        "trackers: [tensorboard, wandb]}",
        "model.pretrained=a.safetensors",
        "lr_schedule={name: cosine, warmup_epochs: 2}",
    ],
    [
        "data={name: hfds/some/set, batch_size: 1, train_split: 'train[:10%]', mean: [0, 0.5, 1], "
        "std: [1, 1, 1], crop_scale: [0.5, 1], auto_augment: rand-m9-mstd0.5, "
        "random_erasing: 0.1, hflip: 0.0, options: {input_key: img}}",
        "model.pretrained=true",
    ],
    ["pruning={method: window, amount: 0.5, era: [0, 1], pointwise: none, fc: none}"],
    [
        "pruning={method: window, amount: 0.5, era: [0, 1], exact_layer_sparsity: true, "
        "block_size: [2, 1]}"
    ],
    ["pruning={method: inter, amount: 1.0, era: [0, 1], fc: {method: random, seed: 3}}"],
    [
        "pruning.overrides=[{layers: a, method: intra, window_fraction: 1}, "
        "{layers: [b, c], amount: 0.1}]"
    ],
    ["pruning.fc={method: block, amount: 0.1, block_size: [2, 2]}", "pruning.exclude=[a, 'b*']"],
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_dumped_recipe_reads_back_equal(file, settings):
    recipe = load_recipe(file, settings)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_dumped_recipe_needs_no_environment(path, file, data_sets, monkeypatch):
    recipe = load_recipe(path)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    monkeypatch.delenv("IMAGENET")
    monkeypatch.delenv("TINY_IMAGENET")
    assert load_recipe(file) == recipe


def test_dumped_recipe_holds_the_defaults_that_matter(file):
    tree = yaml.safe_load(dump_recipe(load_recipe(file)))
    assert tree["seed"] == 0
    assert tree["pruning"]["scope"] == "channel"
    assert tree["pruning"]["fc"] == {"method": "fine"}
    assert "window_fraction" not in tree["pruning"]


def test_equal_recipes_differ_nowhere(file):
    assert differing_keys(load_recipe(file), load_recipe(file)) == {}


def test_differing_keys_give_both_values(file):
    settings = ["pruning.era=[3,7]", "pruning.fc=none", "model.options.drop=0.1"]
    assert differing_keys(load_recipe(file), load_recipe(file, settings)) == {
        "model.options.drop": (None, 0.1),
        "pruning.era": ((3, 6), (3, 7)),
        "pruning.fc": ({"method": "fine", "amount": None}, "none"),
    }


# The schema


def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(recipe_schema())


def test_committed_schema_is_in_step():
    refresh = (
        'python -c "from starfire_prune.recipe import write_schema; '
        "write_schema('recipes/recipe.schema.json')\""
    )
    committed = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert committed == recipe_schema(), f"out of date; refresh it with: {refresh}"


def test_write_schema_and_main_give_the_committed_file(tmp_path, capsys):
    write_schema(tmp_path / "schema.json")
    main()
    text = SCHEMA.read_text(encoding="utf-8")
    assert (tmp_path / "schema.json").read_text(encoding="utf-8") == text
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_schema_accepts_the_shipped_recipes(path):
    validator().validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("settings", SETTINGS)
def test_schema_accepts_dumped_recipes(file, settings):
    validator().validate(yaml.safe_load(dump_recipe(load_recipe(file, settings))))


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"sead": 1}, {"pruning": "ck"}, {"pruning": {**CK, "era": [1]}}]
)
def test_schema_refuses(change):
    assert not validator().is_valid({**yaml.safe_load(RECIPE), **change})


def test_schema_describes_every_field():
    schema = recipe_schema()
    sections = [schema, *(part for part in schema["$defs"].values() if "properties" in part)]
    assert len(sections) >= 10
    assert all(field["description"] for part in sections for field in part["properties"].values())


def test_recipe_and_schema_have_the_same_keys():
    assert list(recipe_schema()["properties"]) == list(Recipe.model_fields)


def test_settings_can_be_pickled():
    settings = {**CK, "fc": {"method": "block"}, "overrides": [{"layers": "a", "scope": "layer"}]}
    pruning = parse_pruning(settings)
    assert pickle.loads(pickle.dumps(pruning)) == pruning
