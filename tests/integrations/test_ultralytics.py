"""Layers in Ultralytics' networks: in YAML, inserted, trained, resumed, loaded and exported."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fullattn
from fullattn import costs
from helpers import yolo
from helpers.networks import load

pytestmark = [
    pytest.mark.isolated,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(240),
]

IDENTITY: dict[type[nn.Module], dict[str, Any]] = {
    fullattn.FullyAttentional: {"project": False},
    fullattn.ChannelNonLocal: {},
    fullattn.SpatialNonLocal: {},
}
ACTIVE: dict[type[nn.Module], dict[str, Any]] = {
    fullattn.FullyAttentional: {"project": False, "gamma_init": 0.7},
    fullattn.ChannelNonLocal: {"gamma_init": 0.7},
    fullattn.SpatialNonLocal: {"zero_init": False},
}
each_layer = pytest.mark.parametrize("layer", IDENTITY)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    load("ultralytics")
    from fullattn.integrations import ultralytics

    ultralytics.register()
    ultralytics.register()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def described(name: str = "yolo11n.yaml") -> dict[str, Any]:
    """Return the content of one of Ultralytics' YAML files, at the scale of its name."""
    from ultralytics.nn.tasks import yaml_model_load

    return yaml_model_load(name)


def built(description: dict[str, Any] | str, **options: Any) -> Any:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(description, verbose=False, **options)


def with_row(row: list[Any], scale: str = "n") -> dict[str, Any]:
    """Put a row behind the backbone's SPPF, and count on the rows after it."""
    description = copy.deepcopy(described(f"yolo11{scale}.yaml"))
    description["backbone"].insert(10, row)
    for later in (*description["backbone"][11:], *description["head"]):
        sources = later[0] if isinstance(later[0], list) else [later[0]]
        sources = [source + (source >= 10) for source in sources]
        later[0] = sources if isinstance(later[0], list) else sources[0]
    return description


def conditioned(net: Any) -> Any:
    """Give batch normalisations the statistics of images, so that features reach the result."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


def result(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval().float()(x)[0]


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def error(got: Any, expected: Tensor) -> float:
    return float((torch.as_tensor(got) - expected).abs().max() / expected.abs().max())


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """What Ultralytics has logged that contains a word."""
    logging.getLogger("ultralytics").addHandler(caplog.handler)
    return lambda word: [line for line in caplog.messages if word in line]


def fresh_process(program: str, *arguments: str, **environment: str) -> str:
    """Run a program in a new process, with Ultralytics ready and nothing of ours registered."""
    prologue = "import sys\nfrom helpers import yolo\nyolo.ready()\nimport torch, ultralytics\n"
    done = subprocess.run(
        [sys.executable, "-c", prologue + textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# Rows of a YAML


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [
        *itertools.product([[], [1024], [{"scale": None}], [1024, {"scale": None}]], "ns"),
        ([1024], "x"),  # where at most 512 channels remain
    ],
)
@each_layer
def test_a_row_takes_the_channels_of_the_row_before_it(
    layer: Any, arguments: list[Any], scale: str
) -> None:
    net = built(with_row([-1, 1, layer.__name__, arguments], scale))
    made = net.model[10]
    assert type(made) is layer
    assert made.channels == net.model[9].cv2.conv.out_channels
    assert made.scale is None or not any(isinstance(each, dict) for each in arguments)
    assert (made.i, made.f, made.np) == (10, -1, sum(p.numel() for p in made.parameters()))
    assert made.type == f"fullattn.{layer.__name__}"


def test_a_row_may_be_repeated_and_name_its_input() -> None:
    # Four times at depth 1, twice at the depth of this scale.
    net = built(with_row([9, 4, "FullyAttentional", [{"project": False}]]))
    assert [type(each) for each in net.model[10]] == [fullattn.FullyAttentional] * 2
    assert net.model[10][0].project is None


def test_options_of_a_row_may_name_classes() -> None:
    options = {"norm_layer": {"class": "torch.nn.InstanceNorm2d"}, "backend": "reference"}
    net = built(with_row([-1, 1, "FullyAttentional", [options]]))
    assert isinstance(net.model[10].project.norm, nn.InstanceNorm2d)
    assert net.model[10].backend == "reference"


def test_the_printed_row_shows_channels_and_options(lines: Any) -> None:
    from ultralytics.nn.tasks import DetectionModel

    DetectionModel(with_row([-1, 1, "FullyAttentional", [{"project": False}]]), verbose=True)
    (line,) = lines("FullyAttentional")
    assert line.split()[-3:] == ["[256,", "{'project':", "False}]"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [-1, 1, "FullyAttentional", [512]],
            r"row 10 \(FullyAttentional\): expected 256 channels, .* got 512 \(128 at this scale\)",
        ),
        ([-1, 1, "FullyAttentional", [{"gama": 1}]], "FullyAttentional in the YAML: .*gama"),
        ([-1, 1, "ChannelNonLocal", [{"scale": "x"}]], "ChannelNonLocal in the YAML: scale must"),
        (
            [-1, 1, "FullyAttentional", ["x"]],
            r"row 10 \(FullyAttentional\): expected \[\], \[channels\]",
        ),
        ([-1, 1, "FullyAttentional", [1024, 3]], r"row 10 .*got \[1024, 3\]"),
        ([[-1, 6], 1, "FullyAttentional", []], r"row 10 .*: expected one input row, got \[-1, 6\]"),
    ],
)
def test_a_bad_row_is_one_sentence(row: list[Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        built(with_row(row))


# Layers behind rows


def with_key(*changes: Any, name: str = "yolo11n.yaml") -> dict[str, Any]:
    return {**copy.deepcopy(described(name)), "fullattn": list(changes)}


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("yolov8n.yaml", 9),
        ("yolo11n.yaml", 10),
        ("yolo11n.yaml", 12),  # a Concat, which takes a list
        ("yolo11n.yaml", 16),  # which Detect reads
        ("yolo11n.yaml", "10.cv1"),
        ("yolo12n.yaml", 8),
        ("yolo26n.yaml", 9),
        ("yolo11n-seg.yaml", 10),
        ("yolo11n-pose.yaml", 10),
        ("yolo11n-cls.yaml", 8),
        ("yolo11n-obb.yaml", 10),
    ],
)
@each_layer
def test_the_key_inserts_behind_a_row_and_all_old_weights_transfer(
    layer: Any, name: str, after: Any, lines: Any
) -> None:
    from ultralytics import YOLO

    old = YOLO(name).model
    names = set(old.state_dict())
    change = {"layer": layer.__name__, "after": after, "options": IDENTITY[layer]}
    new = type(old)(with_key(change, name=name), verbose=False)
    added = set(new.state_dict()) - names
    assert names <= set(new.state_dict())
    (made,) = (m for m in new.modules() if isinstance(m, layer))
    assert len(added) == len(made.state_dict())
    new.load(old)
    assert lines("Transferred")[-1].startswith(
        f"Transferred {len(names)}/{len(names) + len(added)} items"
    )
    conditioned(old)
    new.load(old, verbose=False)
    x = images(1, 3, 64, 96)
    expected, got = old.eval()(x), new.eval()(x)
    pairs = zip(_tensors(got), _tensors(expected), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)  # the layers start as the identity
    assert new.yaml["fullattn"] == [change]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("FullyAttentional", r"entry 1: expected \{layer: NAME, after: ROW\}"),
        ({"layer": "FullyAttentional"}, "entry 1: expected {layer: NAME, after: ROW}"),
        ({"layer": "FullyAttentional", "after": 9, "project": False}, "entry 1: expected"),
        ({"layer": "Fully", "after": 9}, "entry 1: expected a subclass of torch.nn.Module"),
        ({"layer": "os.system", "after": 9}, "entry 1: expected a subclass of torch.nn.Module"),
        ({"layer": "FullyAttentional", "after": 99}, "entry 1: no module matches the name '99'"),
        (
            {"layer": "FullyAttentional", "after": 9, "options": {"gama": 1}},
            "entry 1: .*unexpected keyword argument 'gama'",
        ),
        (
            {"layer": "FullyAttentional", "after": 23},
            "entry 1: cannot insert after '23': Detect reads the modules inside it by index",
        ),
        (
            {"layer": "FullyAttentional", "after": "0.conv"},
            "entry 1: cannot insert after '0.conv': Conv is fused into one convolution; choose '0'",
        ),
    ],
)
def test_a_bad_entry_of_the_key_is_one_sentence(change: Any, message: str) -> None:
    good = {"layer": "ChannelNonLocal", "after": 9}
    with pytest.raises((ValueError, TypeError), match=message):
        built(with_key(good, change))
    with pytest.raises(ValueError, match="key 'fullattn' in the YAML: expected a list"):
        built({**described(), "fullattn": change if isinstance(change, dict) else 3})


# Inserted layers


@pytest.mark.parametrize(
    "after", ["model.23.cv2.0", "model.23.cv3.1.2", "model.23", "model.0.conv"]
)
def test_a_module_that_ultralytics_takes_apart_is_refused(after: str) -> None:
    net = built("yolo11n.yaml")
    names = list(net.state_dict())
    with pytest.raises(ValueError, match=f"cannot insert after '{after}': (Detect|Conv) "):
        fullattn.insert(
            net, fullattn.ChannelNonLocal, after=after, sample_input=images(1, 3, 64, 64)
        )
    with pytest.raises(ValueError, match=f"cannot replace '{after}': (Detect|Conv) "):
        fullattn.swap(net, after, fullattn.ChannelNonLocal)
    assert list(net.state_dict()) == names
    assert not net.yaml.get("fullattn")


def test_an_insertion_is_noted_in_the_yaml_and_taken_out_with_the_layer() -> None:
    from ultralytics import YOLO

    network = YOLO("yolo11n.yaml")
    first = fullattn.insert(network, fullattn.ChannelNonLocal, after="model.model.9")
    second = fullattn.insert(network.model, fullattn.FullyAttentional, after="model.10")
    third = fullattn.swap(network.model, "model.8", fullattn.SpatialNonLocal)
    copies = [built(network.model.yaml), copy.deepcopy(network.model)]
    for made in copies:
        assert list(made.state_dict()) == list(network.model.state_dict())
        assert isinstance(made.model[8], fullattn.SpatialNonLocal)
    for report in (second, third, first):
        fullattn.remove(report)
    assert network.model.yaml["fullattn"] == []
    assert list(built(network.model.yaml).state_dict()) == list(built("yolo11n.yaml").state_dict())


def test_a_change_of_the_rows_alone_warns() -> None:
    net = built("yolo11n.yaml")
    with pytest.warns(
        UserWarning, match=r"rows alone have no YAML: change the YOLO or its \.model"
    ):
        fullattn.insert(net.model, fullattn.ChannelNonLocal, after="9")


def test_a_layer_that_cannot_be_written_down_warns() -> None:
    net = built("yolo11n.yaml")
    with pytest.warns(UserWarning, match=r"cannot save this insert: .* the change is lost when"):
        fullattn.insert(net, lambda channels: fullattn.ChannelNonLocal(channels), after="model.9")
    assert net.yaml["fullattn"] == []


def test_without_the_integration_an_insertion_warns() -> None:
    printed = fresh_process("""
        import warnings, fullattn
        net = ultralytics.YOLO("yolo11n.yaml")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fullattn.insert(net, fullattn.ChannelNonLocal, after="model.model.9")
        print([str(each.message) for each in seen if "fullattn" in str(each.message)])
        print([each.filename for each in seen if "fullattn" in str(each.message)])
    """)
    assert printed.splitlines()[-2:] == [
        "['training will build DetectionModel again from its YAML, without this change; call "
        "fullattn.integrations.ultralytics.register() first']",
        "['<string>']",
    ]


@each_layer
def test_info_counts_the_layer(layer: Any) -> None:
    for size in (64, 320):
        net = built("yolov8n.yaml")
        before = net.info(verbose=True, imgsz=size)
        report = fullattn.insert(net, layer, after="model.9", **IDENTITY[layer])
        after = net.info(verbose=True, imgsz=size)
        cost = costs.cost(report.layers[0], (1, 256, size // 32, size // 32))
        assert after[1] - before[1] == cost.parameters
        assert (after[3] - before[3]) * 1e9 == pytest.approx(cost.flops, rel=1e-6)


# Training


def test_an_inserted_layer_survives_training_and_everything_after_it(
    tmp_path: Path, lines: Any
) -> None:
    from ultralytics import YOLO

    data = yolo.draw(tmp_path / "data")
    network = YOLO("yolo11n.yaml")
    fullattn.insert(
        network, fullattn.FullyAttentional, after="model.model.10", project=False, gamma_init=0.5
    )
    names = list(network.model.state_dict())
    before = network.model.model[10].fully_attentional.column_key.weight.detach().clone()
    speed = {"optimizer": "AdamW", "lr0": 0.01, "warmup_epochs": 0}
    network.train(
        data=str(data), epochs=2, project=str(tmp_path), name="run", **yolo.BATCH, **speed
    )
    # 6 of the head's tensors are of another number of classes.
    assert lines("Transferred")[-1].startswith(f"Transferred {len(names) - 6}/{len(names)} items")
    layer = network.model.model[10].fully_attentional
    assert list(network.model.state_dict()) == names
    assert layer.gamma.item() == pytest.approx(0.5, abs=0.1)
    assert layer.gamma.item() != 0.5
    assert 0 < (layer.column_key.weight.float() - before).abs().max() < 0.1

    x = images(2, 3, 96, 64)
    best = tmp_path / "run" / "weights" / "best.pt"
    expected = result(YOLO(best).model, x)
    fused = YOLO(best).model.float().fuse(verbose=False)
    assert fused.is_fused()
    assert error(result(fused, x), expected) < 1e-4
    dull = YOLO(best).model.float()
    nn.init.zeros_(dull.model[10].fully_attentional.gamma)
    assert error(result(dull, x), expected) > 0
    assert network.val(data=str(data), **yolo.BATCH, project=str(tmp_path)).box is not None
    assert len(network.predict(torch.rand(2, 3, 96, 160), verbose=False)) == 2

    # A new process knows nothing of the integration.
    torch.save((x, expected), tmp_path / "expected.pt")
    fresh_process(
        """
        best, expected = sys.argv[1:]
        net = ultralytics.YOLO(best).model.float().eval()
        x, y = torch.load(expected)
        assert "fullattn.integrations.ultralytics" in sys.modules
        with torch.no_grad():
            assert torch.allclose(net(x)[0], y, rtol=1e-4, atol=1e-4 * y.abs().max())
        """,
        str(best),
        str(tmp_path / "expected.pt"),
    )


def test_training_resumes_in_a_new_process(tmp_path: Path) -> None:
    from ultralytics import YOLO

    data = yolo.draw(tmp_path / "data")
    network = YOLO("yolo11n.yaml")
    fullattn.insert(network.model, fullattn.FullyAttentional, after="model.10", project=False)

    class EnoughError(Exception):
        pass

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1:
            raise EnoughError

    network.add_callback("on_train_epoch_start", stop)
    with pytest.raises(EnoughError):
        network.train(data=str(data), epochs=2, project=str(tmp_path), name="run", **yolo.BATCH)
    last = tmp_path / "run" / "weights" / "last.pt"
    printed = fresh_process(
        """
        net = ultralytics.YOLO(sys.argv[1])
        net.train(resume=True, workers=0)
        print("epochs", net.trainer.epoch, len(net.model.state_dict()))
        print(type(net.model.model[10].fully_attentional).__name__)
        """,
        str(last),
    )
    assert "Transferred 504/504 items" in printed
    assert "epochs 1 504" in printed
    assert "FullyAttentional" in printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("task", "name"),
    [(task, name) for task, names in yolo.NETWORKS.items() for name in names],
)
def test_a_yaml_trains_in_every_task(task: str, name: str, tmp_path: Path, lines: Any) -> None:
    from ultralytics import YOLO
    from ultralytics.utils import YAML

    description = with_key(
        {"layer": "FullyAttentional", "after": 6, "options": {"project": False}},
        {"layer": "SpatialNonLocal", "after": 9},
        name=name,
    )
    # As a user's file: the scale is in its name.
    path = tmp_path / name.replace("n-", "n-ours-").replace("n.yaml", "n-ours.yaml")
    YAML.save(path, {k: v for k, v in description.items() if k not in ("scale", "yaml_file")})
    data = yolo.draw(tmp_path / "data", task, train=4, val=2)
    network = YOLO(path, task=task)
    network.train(data=str(data), epochs=1, project=str(tmp_path), name="run", **yolo.BATCH)
    again = YOLO(tmp_path / "run" / "weights" / "best.pt")
    assert again.task == task
    kinds = {type(m) for m in again.model.modules()}
    assert {fullattn.FullyAttentional, fullattn.SpatialNonLocal} <= kinds
    assert again.model.yaml["fullattn"] == description["fullattn"]


def test_workers_of_distributed_training_know_the_layers(tmp_path: Path) -> None:
    # With one device there are no workers: run the file that is written for them.
    pytest.importorskip("cloudpickle", reason="cloudpickle is not installed")
    from types import SimpleNamespace

    from ultralytics.utils import dist

    trainer = SimpleNamespace(args=SimpleNamespace(model="x.yaml"), model="x.yaml", callbacks={})
    name = dist.generate_ddp_file(trainer)
    text = Path(name).read_text().replace('if __name__ == "__main__":', "if False:")
    printed = fresh_process(
        "exec(sys.argv[1])\n"
        "from ultralytics.nn.tasks import FullyAttentional, parse_model\n"
        "print(FullyAttentional, hasattr(parse_model, '__wrapped__'))",
        text,
    )
    assert printed.splitlines()[-1] == "<class 'fullattn.FullyAttentional'> True"
    dist.ddp_cleanup(trainer, name)


def test_safe_loading_accepts_the_layers(tmp_path: Path) -> None:
    from ultralytics import YOLO

    network = YOLO("yolo11n.yaml")
    for layer, after in zip(IDENTITY, ("model.10", "model.9.cv1", "model.16"), strict=True):
        fullattn.insert(network.model, layer, after=after)
    network.save(tmp_path / "net.pt")
    program = """
        from fullattn.integrations import ultralytics as integration
        if sys.argv[2] == "registered":
            integration.register()
        from ultralytics.nn.tasks import torch_safe_load
        try:
            loaded, _ = torch_safe_load(sys.argv[1], safe_only=True)
            print(len(loaded["model"].state_dict()))
        except Exception as error:
            print("refused", error)
    """
    path = str(tmp_path / "net.pt")
    assert fresh_process(program, path, "registered").splitlines()[-1] == str(
        len(network.model.state_dict())
    )
    assert fresh_process(program, path, "not").splitlines()[-1].startswith("refused")


def test_the_command_builds_a_yaml_with_the_layers(tmp_path: Path) -> None:
    from ultralytics.utils import YAML

    path = tmp_path / "yolo11n-fully.yaml"
    row = with_row([-1, 1, "FullyAttentional", [1024, {"project": False}]])
    YAML.save(path, {k: v for k, v in row.items() if k not in ("scale", "yaml_file")})
    data = yolo.draw(tmp_path / "data", train=4, val=2)
    settings = " ".join(f"{name}={value}" for name, value in yolo.BATCH.items())
    program = "from fullattn._cli.main import main\nsys.exit(main(sys.argv[1:]))"
    printed = fresh_process(
        program,
        *f"yolo train model={path} data={data} epochs=1 project={tmp_path} name=run "
        f"{settings}".split(),
    )
    assert "fullattn.FullyAttentional" in printed
    assert (tmp_path / "run" / "weights" / "best.pt").exists()


# Exports


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[type[nn.Module], Path]:
    """A network with each layer, saved; the layer changes the result."""
    from ultralytics import YOLO

    folder, found = tmp_path_factory.mktemp("saved"), {}
    for layer, options in ACTIVE.items():
        torch.manual_seed(0)
        network = YOLO("yolo11n.yaml")
        report = fullattn.insert(network.model, layer, after="model.10", **options)
        conditioned(network.model)
        x = images(2, 3, 96, 64)
        expected = result(network.model, x)
        fullattn.remove(report)
        assert error(result(network.model, x), expected) > 0.05
        again = fullattn.replay(network.model, report.to_dict())
        again.layers[0].load_state_dict(report.layers[0].state_dict())
        found[layer] = folder / f"{layer.__name__}.pt"
        network.save(found[layer])
    return found


FORMATS = {
    "torchscript": {"format": "torchscript", "dynamic": True},
    "onnx": {"format": "onnx", "simplify": False},
    "onnx simplified": {"format": "onnx", "simplify": True},
    "onnx dynamic": {"format": "onnx", "dynamic": True, "simplify": False},
    "onnx dynamic simplified": {"format": "onnx", "dynamic": True, "simplify": True},
    "openvino": {"format": "openvino"},
    "openvino dynamic": {"format": "openvino", "dynamic": True},
}


def _runner(path: Path) -> Callable[[Tensor], Any]:
    if path.suffix == ".torchscript":
        program = torch.jit.load(str(path))
        return lambda x: next(_tensors(program(x)))
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        return lambda x: session.run(None, {"images": x.numpy()})[0]
    core = pytest.importorskip("openvino").Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(next(path.glob("*.xml")), "CPU", options)
    return lambda x: compiled([x.numpy()])[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", FORMATS)
@each_layer
def test_an_export_equals_the_network_at_unseen_sizes(
    layer: Any, how: str, saved: dict[type[nn.Module], Path]
) -> None:
    from ultralytics import YOLO

    pytest.importorskip({"torchscript": "torch"}.get(how, how.split()[0]))
    net = YOLO(saved[layer]).model.float()
    path = Path(YOLO(saved[layer]).export(imgsz=64, verbose=False, **FORMATS[how]))
    run = _runner(path)
    shapes = [(1, 3, 64, 64), (2, 3, 96, 64), (1, 3, 64, 160)]
    for shape in shapes if FORMATS[how].get("dynamic") else shapes[:1]:
        x = images(*shape)
        assert error(run(x), result(net, x)) < 5e-3, shape
