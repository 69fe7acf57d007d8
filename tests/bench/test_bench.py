from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch import nn

from fullattn import FullyAttentional
from fullattn._cli.conditions import Conditions, Environment, Mode, parse_device
from fullattn._cli.errors import UsageError
from fullattn._cli.inputs import check_image, feature_map
from fullattn._cli.loading import load_class
from fullattn._cli.output import output_folder, written_together
from fullattn._cli.shapes import DEFAULT_SHAPES, NAMED, Shape, parse_shape, sweep_shapes
from fullattn.attention.dispatch import BACKENDS
from fullattn.bench import chart, compare
from fullattn.bench.implementations import (
    OFFICIAL,
    Formula,
    Implementation,
    implementations_at,
    inputs_of,
)
from fullattn.bench.measure import Plan, interleave, warm_up
from fullattn.bench.memory import Probe, cpu_peak
from fullattn.bench.official import OfficialFLANetBlock
from fullattn.bench.results import Failure, Measurement, Results, Row, read_results
from fullattn.bench.run import Options, measure_all
from fullattn.bench.table import print_results
from fullattn.bench.verdict import headline
from fullattn.bench.workload import LayerRecipe, ShapeError, Workload
from fullattn.layers import LAYERS
from helpers import ROOT
from helpers.terminal import each_width, fitting, printed

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

SMALL = Shape(1, 8, 6, 5)
CONDITIONS = Conditions(threads=1)


# The official implementation


@pytest.mark.parametrize("project", [False, True])
def test_public_form_equals_our_layer_on_batches(project: bool) -> None:
    torch.manual_seed(0)
    ours = FullyAttentional(6, project=project, gamma_init=0.7, backend="reference").double()
    public = OfficialFLANetBlock(6, project=project).double()
    public.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    ours_x, public_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours_y, public_y = ours(ours_x), public(public_x)
    torch.testing.assert_close(public_y, ours_y)
    grad = torch.randn_like(x)
    ours_y.backward(grad)
    public_y.backward(grad)
    torch.testing.assert_close(public_x.grad, ours_x.grad)
    for (name, a), (_, b) in zip(public.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=f"gradient of {name}")


def test_benchmarks_folder_hands_out_the_one_definition() -> None:
    path = ROOT / "benchmarks" / "official.py"
    assert runpy.run_path(str(path))["OfficialFLANetBlock"] is OfficialFLANetBlock
    assert load_class(f"{path}:OfficialFLANetBlock") is OfficialFLANetBlock


# Shapes


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("512x97x97", (1, 512, 97, 97)),
        ("8x512x96x96", (8, 512, 96, 96)),
        ("1X2X3", (1, 1, 2, 3)),
        ("cityscapes", (1, 512, 128, 256)),
        ("voc-769", (1, 512, 97, 97)),
        ("65", (1, 512, 65, 65)),
    ],
)
def test_shapes_are_read(text: str, shape: tuple[int, ...]) -> None:
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "x", "512", "4x5", "1x2x3x4x5", "0x5x5", "-1x5x5", "5x5xa"])
def test_shapes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a shape CxHxW"):
        parse_shape(text)


def test_shapes_are_written_as_they_are_read() -> None:
    for shape, sentence in NAMED.values():
        assert parse_shape(str(shape)) == shape
        assert sentence.endswith(".")


def test_default_shapes_hold_the_papers_size_and_both_modes() -> None:
    assert dict(DEFAULT_SHAPES)["512x97x97"] == ("inference",)
    assert {mode for _, modes in DEFAULT_SHAPES for mode in modes} == {"inference", "training"}


def test_sweeps_grow_to_the_shape_given_and_repeat_none() -> None:
    largest = Shape(2, 64, 48, 32)
    for axis, changed in (("resolution", (2, 3)), ("channels", (1,))):
        shapes = sweep_shapes(largest, axis)
        assert shapes[-1] == largest
        assert len(shapes) == 5
        for n in range(4):
            sizes = [shape[n] for shape in shapes]
            assert sizes == sorted(set(sizes)) if n in changed else len(set(sizes)) == 1
    assert sweep_shapes(Shape(1, 1, 1, 1), "resolution") == [Shape(1, 1, 1, 1)]


# Implementations


MIDDLE = Shape(1, 64, 32, 32)


def _names(backends: list[str]) -> dict[str, Implementation]:
    found = implementations_at(MIDDLE, CONDITIONS, layers=list(LAYERS), backends=backends)
    return {implementation.name: implementation for implementation in found}


def test_default_runs_each_layer_automatically_and_built_and_fused() -> None:
    found = _names(["default"])
    builds = {backend.name: backend.builds_map for backend in BACKENDS}
    assert OFFICIAL in found
    for layer in LAYERS:
        mine = [c for c in found.values() if c.layer == layer]
        assert sum(c.automatic for c in mine) == 1
        assert {builds[c.backend or ""] for c in mine} == {True, False}


def test_auto_still_runs_compression_layers_built_and_fused() -> None:
    found = _names(["auto"])
    assert [c.automatic for c in found.values() if c.layer == "fully"] == [True]
    for layer in ("channel", "spatial"):
        assert sum(c.layer == layer for c in found.values()) == 2


def test_all_runs_every_backend_that_can() -> None:
    found = _names(["all"])
    for layer in LAYERS:
        inputs = inputs_of(layer, MIDDLE, CONDITIONS)
        able = {b.name for b in BACKENDS if not b.reasons_against(inputs)}
        assert {c.backend for c in found.values() if c.layer == layer} == able


def test_backends_named_are_the_ones_that_run() -> None:
    found = _names(["sdpa", "reference"])
    assert [c.backend for c in found.values() if c.layer == "spatial"] == ["sdpa", "reference"]


def test_baseline_names_a_backend_or_the_automatic_one() -> None:
    assert Implementation("fully", "sdpa", automatic=True).matches("fully")
    assert Implementation("fully", "sdpa").matches("fully:sdpa")
    assert not Implementation("fully", "sdpa").matches("fully")
    assert Implementation("some/where/mine.py:Block").matches("mine:Block")
    assert Implementation("package.mine:Block").name == "mine:Block"


def test_implementations_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="distinct names, got 'a:Block' twice"):
        implementations_at(
            SMALL, CONDITIONS, layers=[], backends=[], modules=["a.py:Block", "other/a.py:Block"]
        )


@pytest.mark.parametrize("layer", LAYERS)
def test_inputs_are_those_of_the_layer(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fullattn import attention

    asked = []
    choose = attention.choose
    monkeypatch.setattr(attention, "choose", lambda *args: asked.append(args[0]) or choose(*args))
    shape = Shape(2, 6, 5, 7)
    Implementation(layer).build(6, CONDITIONS)(torch.randn(shape))
    assert asked == [inputs_of(layer, shape, CONDITIONS)]


def test_gamma_is_the_same_everywhere_and_no_output_is_the_input() -> None:
    x = torch.randn(SMALL)
    for implementation in implementations_at(
        SMALL, CONDITIONS, layers=list(LAYERS), backends=["default"]
    ):
        module = implementation.build(SMALL.channels, CONDITIONS)
        assert not torch.allclose(module(x), x), implementation.name
        if getattr(module, "gamma", None) is not None:
            assert module.gamma.item() == CONDITIONS.gamma


def test_projection_is_in_both_forms_or_in_neither() -> None:
    for project in (False, True):
        conditions = dataclasses.replace(CONDITIONS, project=project)
        for implementation in (Implementation("fully"), Implementation(OFFICIAL)):
            names = [name for name, _ in implementation.build(4, conditions).named_parameters()]
            assert any(name.startswith("project") for name in names) == project


# Formula


def test_formulas_agree_with_pytorchs_counter() -> None:
    shape = Shape(2, 8, 6, 5)
    for implementation in implementations_at(
        shape, CONDITIONS, layers=list(LAYERS), backends=["all"]
    ):
        found = implementation.formula(implementation.build(8, CONDITIONS), shape, CONDITIONS)
        assert found.flops == found.counted_flops, implementation.name
        assert found.map_numel
        assert found.map_bytes == 4 * found.map_numel
        assert found.parameters > 0


def test_a_users_module_has_counted_flops_alone(tmp_path: Path) -> None:
    target = _module_file(tmp_path, "self.conv = nn.Conv2d(channels, channels, 1)", "self.conv(x)")
    implementation = Implementation(target)
    found = implementation.formula(implementation.build(8, CONDITIONS), SMALL, CONDITIONS)
    assert found == Formula(parameters=72, counted_flops=2 * 8 * 8 * 30)


# Inputs


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    pixels = torch.randint(0, 256, (37, 53, 3), generator=torch.Generator().manual_seed(1))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return str(path)


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("with_image", [False, True])
def test_feature_maps_have_the_shape_asked_for(
    photo: str, memory_format: str, with_image: bool
) -> None:
    conditions = Conditions(
        memory_format=memory_format, dtype="float64", image=photo if with_image else None
    )
    shape = Shape(2, 9, 5, 7)
    x = feature_map(shape, conditions)
    assert x.shape == shape
    assert x.dtype == torch.float64
    assert x.is_contiguous(
        memory_format=getattr(
            torch, {"contiguous": "contiguous_format"}.get(memory_format, memory_format)
        )
    )
    assert torch.equal(x, feature_map(shape, conditions))
    assert not torch.allclose(x[0], x[1])
    assert x.std() > 0.01


def test_photographs_make_another_input_than_noise(photo: str) -> None:
    noise = feature_map(SMALL, CONDITIONS)
    image = feature_map(SMALL, dataclasses.replace(CONDITIONS, image=photo))
    assert not torch.allclose(noise, image)


def test_unreadable_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no image")
    for name in (path, tmp_path / "missing.png", tmp_path):
        with pytest.raises(UsageError, match="expected an image that can be read"):
            check_image(str(name))


# Time


class _Stepping(Workload):
    """The nth call of all takes n milliseconds."""

    count = 0

    def milliseconds(self, mode: Mode) -> float:
        super().milliseconds(mode)
        _Stepping.count += 1
        return float(_Stepping.count)


class _Named(nn.Module):
    def __init__(self, name: str, calls: list[str], fails_at: int | None = None) -> None:
        super().__init__()
        self.name, self.calls, self.fails_at = name, calls, fails_at
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(self.name)
        if self.calls.count(self.name) == self.fails_at:
            raise MemoryError("no more")
        return x * self.weight


def _workloads(calls: list[str], **fails_at: int | None) -> dict[str, Workload]:
    x = torch.randn(1, 2, 3, 3)
    _Stepping.count = 0
    return {
        name: _Stepping(_Named(name, calls, n), x, torch.ones_like(x))
        for name, n in fails_at.items()
    }


def test_implementations_interleave() -> None:
    calls: list[str] = []
    workloads = _workloads(calls, a=None, b=None, c=None)
    times, failures = interleave(workloads, {"a": 4, "b": 2, "c": 4}, "training")
    assert "".join(calls) == "acabcacabc"
    assert times == {"a": [1, 3, 6, 8], "b": [4, 9], "c": [2, 5, 7, 10]}
    assert not failures


def test_a_implementation_that_fails_leaves_and_the_others_go_on() -> None:
    calls: list[str] = []
    workloads = _workloads(calls, a=None, b=2, c=None)
    times, failures = interleave(workloads, dict.fromkeys("abc", 3), "inference")
    assert "".join(calls) == "abcabcac"
    assert set(times) == {"a", "c"}
    assert failures == {"b": Failure("out of memory", "MemoryError: no more")}


def test_a_implementation_that_has_had_enough_is_timed_no_more() -> None:
    workloads = _workloads([], a=None, b=None)
    times, _ = interleave(
        workloads, {"a": 5, "b": 5}, "inference", enough=lambda times: sum(times) > 3
    )
    assert times == {"a": [1, 3], "b": [2, 4]}


def test_calls_fit_the_time_within_bounds() -> None:
    plan = Plan(seconds=2.0)
    assert [plan.calls(t) for t in (1e-6, 0.25, 5.0)] == [20, 8, 3]
    assert Plan(repeats=7).calls(100.0) == 7


def test_training_leaves_fresh_gradients_each_call() -> None:
    (workload,) = _workloads([], a=None).values()
    for _ in range(2):
        workload.prepare("training")
        workload.run("training")
        assert torch.equal(workload.x.grad, torch.ones_like(workload.x))
        torch.testing.assert_close(workload.module.weight.grad, workload.x.detach().sum())
    workload.prepare("inference")
    workload.run("inference")
    assert workload.x.grad is None


def test_warm_up_calls_before_anything_is_timed() -> None:
    calls: list[str] = []
    (workload,) = _workloads(calls, a=None).values()
    assert warm_up(workload, "inference") == 2e-3
    assert len(calls) == 2
    assert warm_up(workload, "inference", 30.0) == 30.0
    assert len(calls) == 3


@pytest.mark.parametrize("result", [torch.zeros(1, 2, 3, 4), None, (torch.zeros(1, 2, 3, 3),)])
def test_another_output_than_the_inputs_shape_is_an_error(result: object) -> None:
    module = nn.Identity()
    module.forward = lambda x: result  # type: ignore[method-assign]
    workload = Workload(module, torch.zeros(1, 2, 3, 3), None)
    with pytest.raises(ShapeError, match=r"expected an output of shape \(1, 2, 3, 3\), got"):
        workload.run("inference")


# Memory


@pytest.fixture(autouse=True, scope="module")
def _forkserver_of_its_own() -> Iterator[None]:
    forkserver._forkserver._stop()  # it may have been started for something else
    yield
    forkserver._forkserver._stop()


def _module_file(folder: Path, init: str = "pass", forward: str = "x", name: str = "mine") -> str:
    path = folder / f"{name}.py"
    path.write_text(
        "import ctypes, os, signal, time\nimport torch\nfrom torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self, channels):\n"
        f"        super().__init__()\n        {init}\n"
        "    def forward(self, x):\n"
        f"        return {forward}\n"
    )
    return f"{path}:Block"


LARGE = Shape(1, 2, 20, 20)  # larger than what the probe warms up with


def _probe(target: str, mode: Mode = "inference", limit: float = 60.0) -> Probe | Failure | None:
    return cpu_peak(LayerRecipe(Implementation(target), LARGE, CONDITIONS), mode, limit)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_probe_measures_a_known_allocation(tmp_path: Path, mode: Mode) -> None:
    target = _module_file(tmp_path, forward="x + torch.zeros(2**24).add_(1)[0]")  # 64 MiB
    probe = _probe(target, mode)
    assert isinstance(probe, Probe)
    assert probe.peak_bytes == pytest.approx(2**26, rel=0.15)


def test_probe_starts_from_nothing_each_time(tmp_path: Path) -> None:
    large = _module_file(tmp_path, forward="x + torch.zeros(2**24).add_(1)[0]", name="large")
    assert isinstance(_probe(large), Probe)
    small = _probe(_module_file(tmp_path, name="small"))
    assert isinstance(small, Probe)
    assert small.peak_bytes < 2**22


def test_probe_does_not_count_parameters_and_inputs(tmp_path: Path) -> None:
    held = _module_file(tmp_path, init="self.big = nn.Parameter(torch.ones(2**24))")
    probe = _probe(held)
    assert isinstance(probe, Probe)
    assert probe.peak_bytes < 2**22


def test_probe_forgets_the_peak_of_building(tmp_path: Path) -> None:
    probe = _probe(_module_file(tmp_path, init="torch.zeros(2**24).add_(1)"))
    assert isinstance(probe, Probe)
    assert probe.peak_bytes < 2**22


LARGE_ONLY = "x if x.shape[-1] < 20 else "


@pytest.mark.parametrize(
    ("forward", "kind", "reason"),
    [
        ("torch.zeros(2**45)", "out of memory", "RuntimeError"),
        ("1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "out of memory", "the system ended the process"),
        ("ctypes.string_at(0)", "failed", "SIGSEGV"),
        ("os._exit(3)", "failed", "exit status 3"),
        ("time.sleep(60)", "too slow", "did not end within 0.5 s"),
        ("x[..., 1:]", "failed", "expected an output of shape"),
    ],
)
def test_probe_says_why_there_is_no_figure(
    tmp_path: Path, forward: str, kind: str, reason: str
) -> None:
    target = _module_file(tmp_path, forward=LARGE_ONLY + forward)
    failure = _probe(target, limit=0.5)
    assert isinstance(failure, Failure)
    assert failure.kind == kind
    assert reason in failure.reason


def test_probes_go_on_after_the_process_they_are_forked_from_has_ended(tmp_path: Path) -> None:
    target = _module_file(tmp_path)
    assert isinstance(_probe(target), Probe)
    pid = forkserver._forkserver._forkserver_pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert isinstance(_probe(target), Probe)


# Report


ENVIRONMENT = Environment("2026-01-01", "a CPU", "Linux", "3.11", "2.6", "0.8", "0.1", 0.5)


def _row(implementation: Implementation, *times: float, peak: int | None = 2**24) -> Row:
    measured: dict[Mode, Measurement] = {"inference": Measurement(list(times), peak)}
    return Row(SMALL, implementation, Formula(5), measured)


def _report(*rows: Row, baseline: str = OFFICIAL, sweep: str | None = None) -> Results:
    return Results(ENVIRONMENT, CONDITIONS, baseline, sweep, list(rows))


BASE, OURS = Implementation(OFFICIAL), Implementation("fully", "sdpa", automatic=True)


def test_median_and_spread() -> None:
    measurement = Measurement([1.0, 2.0, 3.0, 4.0, 100.0])
    assert measurement.median_ms == 3.0
    assert measurement.spread_ms == 2.0
    assert Measurement([1.0]).spread_ms is None
    assert Measurement().median_ms is None


def test_ratios_refer_to_the_baseline_of_the_same_shape() -> None:
    other = dataclasses.replace(_row(BASE, 1000.0), shape=LARGE)
    report = _report(other, _row(BASE, 10.0, peak=100), _row(OURS, 4.0, peak=50))
    assert report.ratio(report.rows[2], "time", "inference") == 0.4
    assert report.ratio(report.rows[2], "memory", "inference") == 0.5
    assert report.ratio(report.rows[2], "time", "training") is None


def test_json_round_trip() -> None:
    failed = Row(
        SMALL,
        OURS,
        Formula(5, 7, 7),
        {
            "inference": Measurement([1.5, 2.5], 100),
            "training": Measurement(failure=Failure("out of memory", "too large")),
        },
    )
    report = _report(_row(BASE, 2.0, 3.0), failed, sweep="channels")
    assert Results.from_json(report.to_json()) == report


def test_json_says_its_schema_units_and_conditions() -> None:
    data = json.loads(_report(_row(BASE, 2.0, 3.0, 4.0), _row(OURS, 1.0)).to_json())
    assert data["schema"] == 2
    assert "FLOPs are 2 x multiply-accumulate" in data["units"]
    assert set(data["environment"]) >= {"device_name", "torch", "einops", "python", "fullattn"}
    assert set(data["conditions"]) >= {"dtype", "memory_format", "threads", "project", "input"}
    assert data["rows"][0]["inference"]["times_ms"] == [2.0, 3.0, 4.0]
    assert data["rows"][0]["inference"]["median_ms"] == 3.0
    assert data["rows"][1]["inference"]["time_over_baseline"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"kind": "fullattn bench", "schema": 99}',
        '{"kind": "fullattn bench", "schema": 2}',
    ],
)
def test_files_that_are_no_reports_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"expected a bench\.json of `fullattn bench` at"):
        read_results(str(path))
    with pytest.raises(UsageError, match="no such file"):
        read_results(str(tmp_path / "missing.json"))


def _printed(report: Results, width: int = 120) -> str:
    return printed(partial(print_results, report), width)


@each_width
def test_table_shows_every_row_with_its_conditions_in_the_width_of_the_terminal(
    width: int,
) -> None:
    slow = Row(
        SMALL,
        Implementation("spatial", "linear", True),
        Formula(10**9, 10**15, 0),
        {
            "inference": Measurement([123456.0, 133456.0, 143456.0], 2**40),
            "training": Measurement(failure=Failure("out of memory", "asked for 4 TiB")),
        },
    )
    report = _report(_row(BASE, 1.0, 2.0), slow)
    titles = ("formula: parameters and FLOPs memory", "Measured: inference training")
    text = fitting(partial(print_results, report), width, *titles)
    text = " ".join(text.split())
    for expected in (
        "official implementation",
        "SpatialNonLocal linear*",
        "133456 ±",
        "out of memory",
        "8x6x5, training, spatial:linear: asked for 4 TiB",
        "a CPU",
        "float32",
        "contiguous",
        "1 thread",
        "load 0.5 before",
        "torch 2.6",
        "normal noise",
        "without their 3x3 projection",
        "2 × multiply-accumulate",
    ):
        assert expected in text


def test_a_narrow_table_of_a_mode_has_the_shapes_that_were_run_in_it() -> None:
    trained = Row(LARGE, BASE, Formula(5), {"training": Measurement([1.0, 1.0])})
    text = _printed(_report(_row(BASE, 1.0), trained), 80)
    inference, training = text.split("Measured: inference")[1].split("Measured: training")
    assert "8x6x5" in inference
    assert str(LARGE) not in inference
    assert "8x6x5" not in training
    assert str(LARGE) in training


def test_table_says_why_there_are_no_ratios() -> None:
    failed = Row(
        SMALL, BASE, Formula(5), {"inference": Measurement(failure=Failure("failed", "it broke"))}
    )
    text = _printed(_report(failed, _row(OURS, 1.0)))
    assert "8x6x5, inference: no ratios, because the baseline has no time." in text
    assert "no ratios, because the baseline official was not measured" in _printed(
        _report(_row(OURS, 1))
    )


def test_picture_and_table_show_the_same_ratios() -> None:
    """Of time the speed, above 1 if faster; of memory the peak, below 1 if smaller."""
    report = _report(_row(BASE, 10.0, peak=100), _row(OURS, 4.0, peak=5))
    in_table = [re.findall(r"[\d.]+×", line) for line in _printed(report).splitlines()]
    assert ["2.50×", "0.05×"] in in_table
    panels = chart._ratios(report).axes
    assert [panel.texts[1].get_text() for panel in panels] == ["2.50×", "0.05×"]
    labels = [panel.get_xlabel() for panel in panels]
    assert ["right is better" in labels[0], "left is better" in labels[1]] == [True, True]


@pytest.mark.parametrize("sweep", [None, "resolution", "channels"])
def test_pictures_are_drawn_with_rows_missing(tmp_path: Path, sweep: str | None) -> None:
    failed = Row(
        SMALL,
        Implementation("spatial", "sdpa"),
        Formula(5),
        {"inference": Measurement(failure=Failure("failed", "it broke"))},
    )
    larger = dataclasses.replace(_row(BASE, 9.0), shape=LARGE)
    report = _report(_row(BASE, 1.0), _row(OURS, 2.0, peak=None), failed, larger, sweep=sweep)
    path = tmp_path / "picture.part"
    chart.draw(report, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000


# Comparison with an earlier run


NOISE = [0.98, 1.0, 1.02, 1.01, 0.99]


def _run(ours: float, base: float = 10.0, spread: float = 1.0, peak: int = 2**24) -> Results:
    noise = [1 + (n - 1) * spread for n in NOISE]
    return _report(
        _row(BASE, *(base * n for n in noise)), _row(OURS, *(ours * n for n in noise), peak=peak)
    )


def test_a_slowed_row_is_found() -> None:
    (change,) = compare.differences(_run(4.0), _run(5.0))
    assert change.slower
    assert change.time == pytest.approx(1.25)
    (change,) = compare.differences(_run(5.0), _run(4.0))
    assert change.faster
    assert not change.slower


def test_noise_raises_no_alarm() -> None:
    for ours, spread in ((4.15, 1.0), (5.0, 6.0)):
        (change,) = compare.differences(_run(4.0, spread=spread), _run(ours, spread=spread))
        assert not change.slower
        assert not change.faster


def test_a_slower_machine_raises_no_alarm() -> None:
    (change,) = compare.differences(_run(4.0), _run(8.0, base=20.0))
    assert not change.slower
    assert change.machine == pytest.approx(2.0)


def test_without_a_common_baseline_milliseconds_are_compared() -> None:
    (change,) = compare.differences(_report(_run(4.0).rows[1]), _run(8.0, base=20.0))
    assert change.machine == 1.0
    assert change.slower


def test_single_calls_are_not_judged() -> None:
    single = _report(_row(BASE, 10.0), _row(OURS, 40.0))
    (change,) = compare.differences(_run(4.0), single)
    assert not change.slower
    text = printed(partial(compare.print_differences, _run(4.0), single), 120)
    assert "1 cannot be judged" in text


def test_memory_that_grew_is_found() -> None:
    (change,) = compare.differences(_run(4.0), _run(4.0, peak=2**25))
    assert change.memory_grew
    (change,) = compare.differences(_run(4.0), _run(4.0, peak=2**24 + 4096))
    assert not change.memory_grew


@each_width
def test_comparison_is_printed(width: int) -> None:
    new = _run(50000.0, peak=2**30)
    text = fitting(partial(compare.print_differences, _run(4.0), new), width)
    assert "fully:sdpa" in text
    assert "slower" in text
    assert "1 of 1 times slower beyond the noise" in text


# The verdict


@pytest.mark.parametrize(
    ("times", "peak", "said"),
    [
        ([4.0, 4.0, 4.1], 2**20, "2.50× as fast, 1/17 of the memory of"),
        ([20.0, 20.0, 20.1], 30 * 2**20, "2.00× the time, 1.76× the memory of"),
        ([9.5, 6.0, 16.0], 7 * 2**20, "the spread of the timings (1.05 ± 0.55 times as fast), "
         "1/2.4 of the memory of"),
        ([10.0, 10.0, 10.0], None, "no difference in time beyond the spread of the timings "
         "(1.00 ± 0.01 times as fast) from"),
        ([4.0], None, "2.50× as fast (timed once, so with an unknown spread) as"),
    ],
)  # fmt: skip
def test_the_verdict_claims_no_more_than_the_spread_allows(
    times: list[float], peak: int | None, said: str
) -> None:
    base = _row(BASE, 10.0, 10.1, 9.9, peak=17 * 2**20)
    text = headline(_report(base, _row(OURS, *times, peak=peak)), "inference")
    assert text is not None
    assert text.startswith("FullyAttentional, inference at 8x6x5: ")
    assert text.endswith(f"{said} the official implementation here.")


def test_there_is_no_verdict_on_a_row_without_a_time() -> None:
    failed = Measurement(failure=Failure("failed", "it broke"))
    report = _report(_row(BASE, 1.0), Row(SMALL, OURS, Formula(5), {"inference": failed}))
    assert headline(report, "inference") is None


def test_rows_that_lost_their_time_are_named() -> None:
    failed = Row(
        SMALL, OURS, Formula(5), {"inference": Measurement(failure=Failure("failed", "it broke"))}
    )
    new = _report(_row(BASE, 10.0), failed)
    assert compare.lost(_run(4.0), new) == [(failed, "inference")]
    assert compare.lost(new, new) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "float64"},
        {"memory_format": "channels_last"},
        {"project": True},
        {"device": "cuda"},
        {"image": "a.png"},
    ],
)
def test_runs_under_other_conditions_are_not_compared(changed: dict[str, object]) -> None:
    other = dataclasses.replace(_run(4.0), conditions=dataclasses.replace(CONDITIONS, **changed))
    with pytest.raises(UsageError, match="expected an old run with"):
        compare.check_comparable(_run(4.0).conditions, other.conditions)


# Output


def test_folders_made_for_nothing_are_taken_away(tmp_path: Path) -> None:
    def fail() -> None:
        with output_folder(tmp_path / "a" / "b"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("before")

    def fail() -> None:
        with written_together(tmp_path) as folder:
            (folder / "first").write_text("after")
            (folder / "second").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["first"]
    assert (tmp_path / "first").read_text() == "before"


# The whole run


def _options(target: str | None = None, **changed: object) -> Options:
    options = Options(
        shapes=[(LARGE, ("inference", "training"))],
        conditions=CONDITIONS,
        layers=["channel"],
        modules=[target] if target else [],
        plan=Plan(repeats=2, limit=60.0, memory=False),
    )
    return dataclasses.replace(options, **changed)


@pytest.mark.parametrize("with_memory", [False, True])
def test_out_of_memory_marks_its_row_and_the_run_goes_on(tmp_path: Path, with_memory: bool) -> None:
    target = _module_file(tmp_path, forward=LARGE_ONLY + "torch.zeros(2**45)")
    report = measure_all(_options(target, plan=Plan(repeats=2, limit=60.0, memory=with_memory)))
    for row in report.rows:
        for mode in ("inference", "training"):
            measurement = row.measured[mode]
            if row.implementation.name == "mine:Block":
                assert measurement.failure is not None
                assert measurement.failure.kind == "out of memory"
                assert measurement.times_ms == []
            else:
                assert len(measurement.times_ms) == 2
                assert (measurement.peak_bytes is not None) == with_memory


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_call_above_the_limit_is_left_out(tmp_path: Path, with_memory: bool) -> None:
    target = _module_file(tmp_path, forward=LARGE_ONLY + "time.sleep(1) or x")
    plan = Plan(repeats=2, limit=0.5, memory=with_memory)
    report = measure_all(_options(target, plan=plan))
    kinds = {row.implementation.name: row.measured["inference"].failure for row in report.rows}
    assert kinds["mine:Block"] == Failure.too_slow(0.5)
    assert kinds["channel:reference"] is None


def test_a_module_is_built_once(tmp_path: Path) -> None:
    target = _module_file(tmp_path, init="open(__file__ + '.built', 'x').close()")
    both: tuple[Mode, ...] = ("inference", "training")
    measure_all(_options(target, shapes=[(LARGE, both), (LARGE._replace(height=30), both)]))
    assert (tmp_path / "mine.py.built").exists()


def test_a_budget_used_up_leaves_out_all_but_the_first_layer_and_the_baseline() -> None:
    options = _options(
        plan=Plan(budget=1e-9, memory=False),
        backends=["reference", "sdpa", "chunked"],
        baseline="channel:sdpa",
    )
    report = measure_all(options)
    for mode in ("inference", "training"):
        measured = {row.implementation.name: row.measured[mode] for row in report.rows}
        left_out = measured.pop("channel:chunked")
        assert left_out.failure is not None
        assert left_out.failure.kind == "no time left"
        assert {name: len(m.times_ms) for name, m in measured.items()} == {
            "official": 1,
            "channel:reference": 1,
            "channel:sdpa": 1,
        }
    assert all(row.formula.flops for row in report.rows)


def test_a_backend_that_cannot_run_marks_its_row() -> None:
    report = measure_all(_options(backends=["linear", "reference"]))
    kinds = {row.implementation.name: row.measured["inference"].failure for row in report.rows}
    assert kinds["channel:linear"] is not None
    assert kinds["channel:linear"].kind == "cannot run"
    assert kinds["channel:reference"] is None


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    measure_all(_options(conditions=dataclasses.replace(CONDITIONS, threads=before + 1)))
    assert torch.get_num_threads() == before


def test_devices_that_are_not_there_are_refused() -> None:
    for text in ("nowhere", "meta", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(UsageError, match="expected a"):
            parse_device(text)


def test_a_implementation_that_cannot_be_built_at_one_width_is_refused_before_measuring(
    tmp_path: Path,
) -> None:
    target = _module_file(tmp_path, init="assert channels != 4")
    shapes = [(SMALL, ("inference",)), (Shape(1, 4, 5, 5), ("inference",))]
    with pytest.raises(UsageError, match="callable with the number of channels"):
        measure_all(_options(target, shapes=shapes))


def test_a_shape_that_fits_no_memory_is_refused() -> None:
    with pytest.raises(UsageError, match=r"free memory, got 1000000x10000x10000, which needs"):
        measure_all(_options(shapes=[(Shape(1, 10**6, 10**4, 10**4), ("inference",))]))


def test_the_cheapest_is_measured_first_and_reported_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fullattn.bench import run

    seen: list[tuple[Shape, Mode]] = []
    measure = run._measure

    def noting(options: Options, shape: Shape, mode: Mode, *rest: object) -> object:
        seen.append((shape, mode))
        return measure(options, shape, mode, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "_measure", noting)
    both: tuple[Mode, ...] = ("inference", "training")
    report = measure_all(_options(shapes=[(LARGE, both), (SMALL, both)]))
    assert seen == [
        (SMALL, "inference"),
        (LARGE, "inference"),
        (SMALL, "training"),
        (LARGE, "training"),
    ]
    assert report.shapes == [LARGE, SMALL]
    assert all(set(row.measured) == set(both) for row in report.rows)
