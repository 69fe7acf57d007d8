"""Configurations are strict: what is not exactly right is an error that names key and file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fullattn.segmentation.training.config import Config, ConfigError, differences, names, read

SMALL = """\
model: {backbone: resnet18}
data: {name: camvid, crop: [64, 96]}
training: {steps: 10, batch_size: 2, learning_rate: 1e-2}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def test_shipped_configurations_are_those_of_the_data_sets() -> None:
    assert names() == ["ade20k", "camvid", "camvid_small", "cityscapes", "voc"]


@pytest.mark.parametrize("name", names())
def test_shipped_configurations_can_be_read(name: str) -> None:
    config = read(name)
    assert config.data.name == name.removesuffix("_small")
    assert (config.training.momentum, config.training.power) == (0.9, 0.9)
    assert config.data.scale[1] / config.data.scale[0] in (2, 4)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    config = read("cityscapes", ["model.backbone_options={a: [1, x]}", "data.val=null"])
    assert read(written(tmp_path, config.text())) == config


def test_missing_keys_have_their_defaults_and_numbers_their_types(tmp_path: Path) -> None:
    config = read(written(tmp_path, SMALL))
    assert config.data.crop == (64, 96)
    assert config.training.learning_rate == 0.01  # text for YAML, a number for everyone else
    assert config.model.channels == 512
    assert isinstance(config, Config)


def test_overrides_replace_what_the_file_says(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    config = read(path, ["training.steps=3", "training.steps=4", "data.crop=[8,8]", "data.val="])
    assert config.training.steps == 4
    assert config.data.crop == (8, 8)
    assert config.data.val is None
    assert config.training.batch_size == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", "unknown key 'training.step'; did you mean 'steps'"),
        ("trainings.steps=3", "unknown section 'trainings'; did you mean 'training'"),
        ("training.steps=0", "training.steps must be a whole number of at least 1, got 0"),
        ("training.steps=1.5", "training.steps must be a whole number of at least 1, got 1.5"),
        ("training.steps=yes", "training.steps must be a whole number of at least 1, got True"),
        ("training.steps=null", "training.steps must be a whole number of at least 1, got None"),
        ("training.learning_rate=.inf", "must be a number above 0, got inf"),
        ("training.learning_rate=fast", "must be a number above 0, got 'fast'"),
        ("training.clip_gradient_norm=0", "must be a number above 0 or null, got 0"),
        ("training.precision=16", "must be one of 32-true, 64-true, 16-mixed, bf16-mixed, got 16"),
        ("training.momentum=1", "must be a number from 0 to below 1, got 1"),
        ("training.seed=-1", "training.seed must be a number of at least 0, got -1"),
        ("data.crop=[3]", "data.crop must be two whole numbers of at least 1, got [3]"),
        ("data.crop=[3, 2.5]", "data.crop must be two whole numbers"),
        ("data.scale=[2, 1]", "data.scale must be two numbers above 0 in order, got [2, 1]"),
        ("data.mean=[0, 0]", "data.mean must be a list of 3 values, each a number, got [0, 0]"),
        ("data.std=[0, 1, 1]", "data.std must be three numbers above 0"),
        ("data.name=3", "data.name must be text, got 3"),
        ("data.pad=1", "data.pad must be true or false, got 1"),
        ("model.backbone_options=[1]", "model.backbone_options must be keys and values, got [1]"),
        ("model.output_stride=4", "model.output_stride must be one of 8, 16, 32, got 4"),
        ("training.steps", "expected --set section.key=value, got 'training.steps'"),
        ("steps=3", "expected --set section.key=value, got 'steps=3'"),
        ("training.steps=[", "--set training.steps=[: the value is not YAML"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(written(tmp_path, SMALL), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if "section" not in message:
        assert f"--set {override}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL.replace("steps: 10, ", ""), "training.steps is missing"),
        (SMALL.replace("backbone: resnet18", ""), "model.backbone is missing"),
        (SMALL.replace("data:", "dat:"), "unknown section 'dat'; did you mean 'data'"),
        (SMALL.replace("crop", "crops"), "unknown key 'data.crops'; did you mean 'crop'"),
        (SMALL.replace("batch_size: 2", "batch_size: two"), "training.batch_size must be a whole"),
        (SMALL + "training: {steps: 20}\n", "'training' is there twice"),
        (SMALL.replace("steps: 10", "steps: 10, steps: 20"), "'steps' is there twice"),
        ("model: 3\n", "expected keys below 'model', got 3"),
        ("- 1\n", "expected sections model, data, training, got [1]"),
        ("", "expected sections model, data, training, got None"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of ade20k, camvid, .* got 'citiscapes'"):
        read("citiscapes")
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.yaml: no such file"):
        read(tmp_path / "gone.yaml")


def test_only_what_changes_the_result_counts_as_a_difference() -> None:
    before = read("camvid_small")
    free = ["data.workers=7", "training.accumulate=2", "training.log_every=3", "data.val=null"]
    assert list(differences(before.plain(), read("camvid_small", free))) == []
    for override in ("training.steps=7", "training.seed=7", "model.attention=none"):
        key, value = override.split("=")
        ((found, _, now),) = differences(before.plain(), read("camvid_small", [override]))
        assert (found, str(now)) == (key, value)
