"""Configurations are strict: an unknown key or invalid value is an error that names it."""

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


def test_shipped_configurations_are_listed() -> None:
    assert names() == ["ade20k", "camvid", "camvid_small", "cityscapes", "voc"]


@pytest.mark.parametrize("name", names())
def test_shipped_configurations_can_be_read(name: str) -> None:
    config = read(name)
    assert config.data.name == name.removesuffix("_small")
    assert (config.training.momentum, config.training.power) == (0.9, 0.9)
    assert config.data.scale[1] / config.data.scale[0] in (2, 4)


def test_text_is_read_back_as_the_same_configuration(tmp_path: Path) -> None:
    config = read("cityscapes", ["model.backbone_options={a: [1, x]}", "data.val=null"])
    assert read(written(tmp_path, config.text())) == config


def test_missing_keys_have_defaults_and_integers_become_floats(tmp_path: Path) -> None:
    config = read(written(tmp_path, SMALL))
    assert config.data.crop == (64, 96)
    assert config.training.learning_rate == 0.01  # PyYAML reads 1e-2 as text
    assert config.model.channels == 512
    assert isinstance(config, Config)


def test_overrides_replace_values_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, SMALL)
    config = read(path, ["training.steps=3", "training.steps=4", "data.crop=[8,8]", "data.val="])
    assert config.training.steps == 4
    assert config.data.crop == (8, 8)
    assert config.data.val is None
    assert config.training.batch_size == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=3", "unknown key 'training.step'; did you mean 'training.steps'?"),
        ("training.xyz=3", "unknown key 'training.xyz'; expected one of steps, batch_size, "),
        ("trainings.steps=3", "unknown key 'trainings'; did you mean 'training'?"),
        ("training.steps=0", "training.steps should be greater than 0, got 0"),
        ("training.steps=1.0", "training.steps should be a valid integer, got 1.0"),
        ("training.steps='3'", "training.steps should be a valid integer, got '3'"),
        ("training.steps=yes", "training.steps should be a valid integer, got True"),
        ("training.steps=null", "training.steps should be a valid integer, got None"),
        ("training.learning_rate=.inf", "learning_rate should be a finite number, got inf"),
        ("training.learning_rate=fast", "learning_rate should be a valid number, got 'fast'"),
        ("training.learning_rate=yes", "learning_rate should be a valid number, got True"),
        ("training.clip_gradient_norm=0", "clip_gradient_norm should be greater than 0, got 0"),
        (
            "training.precision=16",
            "should be '32-true', '64-true', '16-mixed' or 'bf16-mixed', got",
        ),
        ("training.momentum=1", "training.momentum should be less than 1, got 1"),
        ("training.average_decay=-1", "should be greater than or equal to 0, got -1"),
        ("training.seed=-1", "training.seed should be greater than or equal to 0, got -1"),
        ("data.crop=[3]", "data.crop.1 is missing"),
        ("data.crop=[3, 4, 5]", "data.crop should have at most 2 items"),
        ("data.crop=3", "data.crop should be a valid tuple, got 3"),
        ("data.crop=[3, 2.0]", "data.crop.1 should be a valid integer, got 2.0"),
        ("data.scale=[2, 1]", "data.scale should be in ascending order, got [2, 1]"),
        ("data.scale=[0, 1]", "data.scale.0 should be greater than 0, got 0"),
        ("data.flip=1.5", "data.flip should be less than or equal to 1, got 1.5"),
        ("data.std=[1, 1, 0]", "data.std.2 should be greater than 0, got 0"),
        ("data.name=3", "data.name should be a valid string, got 3"),
        ("data.pad=1", "data.pad should be a valid boolean, got 1"),
        ("model.backbone_options=[1]", "backbone_options should be a valid dictionary, got [1]"),
        ("model.output_stride=4", "model.output_stride should be 8, 16 or 32, got 4"),
        ("training.steps", "expected --set section.key=value, got 'training.steps'"),
        ("steps=3", "expected --set section.key=value, got 'steps=3'"),
        ("training.steps=[", "--set training.steps=[: invalid YAML: "),
    ],
)
def test_an_invalid_override_is_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(written(tmp_path, SMALL), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if "section" not in message:
        assert str(caught.value).startswith(f"--set {override}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL.replace("steps: 10, ", ""), "training.steps is missing"),
        (SMALL.replace("backbone: resnet18", ""), "model.backbone is missing"),
        (SMALL.replace("data:", "dat:"), "unknown key 'dat'; did you mean 'data'?"),
        (SMALL.replace("crop", "crops"), "unknown key 'data.crops'; did you mean 'data.crop'?"),
        (SMALL.replace("size: 2", "size: two"), "batch_size should be a valid integer, got 'two'"),
        (SMALL + "training: {steps: 20}\n", "invalid YAML: duplicate key 'training'"),
        (SMALL.replace("steps: 10", "steps: 10, steps: 20"), "duplicate key 'steps'"),
        (SMALL.replace("{backbone: resnet18}", "3"), "model should be a valid dictionary or"),
        ("- 1\n", "expected sections model, data, training, got [1]"),
        ("", "expected sections model, data, training, got None"),
        ("a: [\n", "invalid YAML: "),
    ],
)
def test_an_invalid_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of ade20k, camvid, .* got 'citiscapes'"):
        read("citiscapes")
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.yaml: no such file"):
        read(tmp_path / "gone.yaml")


def test_only_settings_that_change_the_result_are_differences() -> None:
    before = read("camvid_small")
    free = ["data.workers=7", "training.accumulate=2", "training.log_every=3", "data.val=null"]
    assert list(differences(before.plain(), read("camvid_small", free))) == []
    for override in ("training.steps=7", "training.seed=7", "model.attention=none"):
        key, value = override.split("=")
        ((found, _, now),) = differences(before.plain(), read("camvid_small", [override]))
        assert (found, str(now)) == (key, value)
