"""Changes saved to a file and made again in a newly built network."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fullattn
from fullattn import ChannelNonLocal, FullyAttentional, SpatialNonLocal, insert, replay, swap
from fullattn.swap import Report
from helpers.processes import run_program


class Block(nn.Module):
    """Has a parameterless child, and a list of convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)])
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.act(conv(x))
        return x


class Net(nn.Module):
    """A network that may be deeper, wider or have another head."""

    def __init__(self, channels: int = 8, depth: int = 2, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(Block(channels) for _ in range(depth)))
        self.reduce = nn.Conv2d(channels, channels // 2, 1)
        self.head = nn.Conv2d(channels // 2, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reduce(self.body(self.stem(x))))


class Other(Net):
    """The same modules under the same names."""


X = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
CHANGES: dict[str, Callable[[nn.Module], Report]] = {
    "sequential": lambda net: insert(net, FullyAttentional, after="body", project=False),
    "module": lambda net: insert(net, ChannelNonLocal, after="body.0", gamma_init=0.5),
    "convolution": lambda net: insert(net, SpatialNonLocal, after="stem", inner_channels=3),
    "without parameters": lambda net: insert(
        net, ChannelNonLocal, after="body.1.act", sample_input=X
    ),
    "several": lambda net: insert(net, ChannelNonLocal, after="body.[01]"),
    "swapped": lambda net: swap(net, "body.1", FullyAttentional, gamma_init=0.5),
    "with an adapter": lambda net: swap(net, "reduce", FullyAttentional),
    "class options": lambda net: insert(
        net,
        FullyAttentional,
        after="body",
        norm_layer=partial(nn.GroupNorm, 2),
        act_layer=nn.SiLU,
        scale=None,
    ),
    "a partial": lambda net: swap(net, "body.0", partial(ChannelNonLocal, gamma_init=0.25)),
    "another class": lambda net: insert(net, nn.BatchNorm2d, after="stem"),
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def seeded(seed: int, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


@each_change
@pytest.mark.parametrize("through_a_file", [True, False], ids=["file", "dict"])
def test_a_replayed_change_takes_the_weights_that_were_saved_after_it(
    change: Any, through_a_file: bool, tmp_path: Path
) -> None:
    first, second = seeded(0), seeded(1)
    report = change(first)
    for layer in report.layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    source: Any = report.to_dict()
    if through_a_file:
        report.save(tmp_path / "change.json")
        assert json.loads((tmp_path / "change.json").read_text()) == source
        assert [path.name for path in tmp_path.iterdir()] == ["change.json"]
        source = tmp_path / "change.json"
    again = replay(second, source)
    assert [(n, type(m)) for n, m in second.named_modules()] == [
        (n, type(m)) for n, m in first.named_modules()
    ]
    assert second.load_state_dict(first.state_dict())
    first.eval(), second.eval()
    assert torch.equal(second(X), first(X))
    assert again.to_dict() == report.to_dict()
    assert repr(again) == repr(report)
    fullattn.remove(again)
    assert list(second.state_dict()) == list(seeded(0).state_dict())


def test_changes_replay_in_the_order_in_which_they_were_made() -> None:
    first, second = seeded(0), seeded(1)
    records = [change(first).to_dict() for name, change in CHANGES.items() if name != "swapped"]
    with pytest.raises(ValueError, match="expected the architecture that it was saved from"):
        replay(second, records[1])
    for record in records:
        replay(second, record)
    assert second.load_state_dict(first.state_dict())
    assert torch.equal(second.eval()(X), first.eval()(X))


def test_a_replay_matches_device_dtype_and_mode() -> None:
    record = CHANGES["sequential"](seeded(0)).to_dict()
    with torch.device("meta"):
        meta = Net()
    replay(meta, record)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    half = seeded(0).to(torch.bfloat16).eval()
    (layer,) = replay(half, record).layers
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert not layer.training


def test_another_number_of_classes_is_the_same_architecture() -> None:
    record = CHANGES["sequential"](seeded(0)).to_dict()
    replay(seeded(0, classes=19), record)


def test_strict_false_compares_the_changed_modules_alone() -> None:
    record = CHANGES["module"](seeded(0)).to_dict()
    replay(Other(), record, strict=False)
    replay(seeded(0, depth=3), record, strict=False)


def renamed(record: dict[str, Any]) -> Net:
    net = seeded(0)
    net.trunk = net.body
    del net.body
    return net


def altered(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {**record, **values}


def same(record: dict[str, Any]) -> dict[str, Any]:
    return record


REFUSED: dict[str, tuple[Any, Callable[[dict[str, Any]], Any], bool, str]] = {
    "another class": (
        Other,
        same,
        True,
        r"expected the architecture .* Net of 15 modules .* got Other of",
    ),
    "deeper": (lambda: seeded(0, depth=3), same, True, r"Net of 15 modules \(\w+\), got Net of 20"),
    "a moved name": (lambda: renamed({}), same, True, "expected the architecture"),
    "a moved name, not strict": (
        lambda: renamed({}),
        same,
        False,
        "cannot replay this insert: no module matches the name 'body.0'; known are stem",
    ),
    "other channels": (
        lambda: seeded(0, channels=16),
        same,
        True,
        "expected 'body.0' to have 8 channels and the saved shapes of parameters, got 16 channels",
    ),
    "another module": (
        Net,
        lambda record: {**record, "at": [{**record["at"][0], "module": "Y"}]},
        True,
        r"expected a Y at 'body\.0', got a Block",
    ),
    "another home": (
        Net,
        lambda record: {**record, "at": [{**record["at"][0], "home": ["nowhere"]}]},
        True,
        "cannot replay this insert: .*nowhere",
    ),
    "a newer format": (Net, altered(format=2), True, r"\(format 2\), and this is fullattn .* 1\)"),
    "a newer version": (Net, altered(fullattn="99.0.1"), True, "saved by fullattn 99.0.1"),
    "no record": (Net, lambda record: {"a": 1}, True, "expected a change saved by Report.save"),
    "no change": (Net, altered(at=[]), True, "expected a change saved by Report.save"),
    "no class": (Net, altered(insert="fullattn.Nothing"), True, "got 'fullattn.Nothing'"),
    "no module class": (Net, altered(insert="os.system"), True, "got 'os.system'"),
    "no such option": (Net, altered(options={"gama": 1}), True, "unexpected keyword .*gama"),
    "an option of no class": (
        Net,
        altered(options={"scale": {"class": "subprocess.Popen"}}),
        True,
        "got 'subprocess.Popen'",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_change_that_does_not_fit_leaves_the_model_unchanged(case: Any) -> None:
    build, alter, strict, message = case
    record = alter(CHANGES["module"](seeded(0)).to_dict())
    model = build()
    before = copy.deepcopy(model)
    with pytest.raises((ValueError, TypeError), match=message):
        replay(model, record, strict=strict)
    assert repr(model) == repr(before)
    assert list(model.state_dict()) == list(before.state_dict())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_damaged_record_is_one_sentence() -> None:
    record = CHANGES["module"](seeded(0)).to_dict()

    def damaged(value: Any) -> Iterator[Any]:
        """Yield the value with one part at a time missing, or of another type."""
        yield from (None, 3, "x", [], {})
        if isinstance(value, dict):
            for key in value:
                yield {k: v for k, v in value.items() if k != key}
                yield from ({**value, key: part} for part in damaged(value[key]))
        elif isinstance(value, list) and value:
            yield from ([part, *value[1:]] for part in damaged(value[0]))

    refused = 0
    for part in damaged(record):
        model = seeded(0)
        try:
            replay(model, part if isinstance(part, dict) else {"x": part})
        except (TypeError, ValueError):
            refused += 1
            assert list(model.state_dict()) == list(seeded(0).state_dict())
    assert refused > 80


def test_channels_of_a_module_without_parameters_are_compared_around_it() -> None:
    record = CHANGES["without parameters"](seeded(0)).to_dict()
    with pytest.raises(ValueError, match=r"expected 'body\.1\.act' to have 8 channels"):
        replay(seeded(0, channels=16), record)


def test_a_file_that_is_no_saved_change(tmp_path: Path) -> None:
    path = tmp_path / "change.json"
    with pytest.raises(FileNotFoundError):
        replay(Net(), path)
    for content in ("", "{", "[1]", '"x"', "\x00\xff"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"cannot replay '.*change\.json': "):
            replay(Net(), path)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module as model, got dict"):
        replay({}, path)  # type: ignore[arg-type]


class Local(ChannelNonLocal):
    """Importable, as a user's own layer."""


def test_what_cannot_be_written_down_cannot_be_saved(tmp_path: Path) -> None:
    class Hidden(ChannelNonLocal):
        pass

    for replacement in (Hidden, lambda channels: ChannelNonLocal(channels)):
        report = insert(Net(), replacement, after="body")
        with pytest.raises(ValueError, match="cannot save this insert: expected a"):
            report.save(tmp_path / "change.json")
    report = insert(Net(), FullyAttentional, after="body", act_layer=lambda: nn.ReLU())
    with pytest.raises(ValueError, match="cannot save this insert: expected options of JSON"):
        report.save(tmp_path / "change.json")
    assert not list(tmp_path.iterdir())
    record = insert(Net(), Local, after="body").to_dict()
    assert isinstance(replay(Net(), record).layers[0], Local)


def test_a_file_saved_in_one_process_is_replayed_in_another(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))\n"
    )
    save = """
import torch, fullattn, net
model = net.build()
report = fullattn.insert(model, fullattn.FullyAttentional, after="0", gamma_init=0.5)
report.save("change.json")
x = torch.randn(2, 3, 5, 7)
torch.save((model.state_dict(), x, model.eval()(x)), "model.pt")
"""
    load = """
import torch, fullattn, net
model = net.build()
fullattn.replay(model, "change.json")
weights, x, y = torch.load("model.pt")
model.load_state_dict(weights)
assert torch.equal(model.eval()(x), y)
"""
    for program in (save, load):
        run_program(program, cwd=tmp_path).check_returncode()
