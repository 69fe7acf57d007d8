"""Does attention that keeps space and channel help? CamVid, one recipe, the attention exchanged.

    python benchmarks/camvid.py features DATA WEIGHTS   # once: the frozen backbone's features
    python benchmarks/camvid.py settings                # on val: what was tried beforehand
    python benchmarks/camvid.py compare                 # train on train+val, score on test
    python benchmarks/camvid.py cost                    # parameters, FLOPs, time per image
    python benchmarks/camvid.py report                  # table.md and camvid.png

DATA is CamVid with the layout images/{train,val,test}, labels/{...}; WEIGHTS the MobileNetV2 .npz.

A MobileNetV2 with ImageNet weights stays as it is; its stages of 24, 32 and 96 channels, at an
eighth of the image and concatenated, are computed once for every image and its mirror image. What
is trained is `SegmentationHead`, for every attention and seed. With one seed all of them start from
the same numbers outside the attention and see the same images in the same order.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mobilenetv2
from fullattn.plot.style import BLUE, GRID, ORANGE, QUIET, styled
from fullattn.segmentation.data import open_dataset
from fullattn.segmentation.evaluation.scores import Scores, confusion_matrix
from fullattn.segmentation.models import SegmentationHead, attentions, backbone

RESULTS = Path(__file__).parent / "results" / "camvid"
CACHE = Path("out/camvid")
IGNORE = 255
STAGES = (24, 32, 96)
# The rows of the table, the controls first: attention and its options. The last one is what did
# best on val; all others are as published.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {})
        for name in ("none", "convolution", "channel", "spatial", "dual", "channel_spatial")
    },
    "fully": ("fully", {}),
    "fully_scaled": ("fully", {"scale": None}),
}
NAMES = tuple(VARIANTS)


@dataclass(frozen=True)
class Recipe:
    """What is the same for every attention. Fixed on val before test was looked at."""

    epochs: int = 6
    batch: int = 8
    learning_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    channels: int = 64
    out_channels: int = 32
    dropout: float = 0.1
    # Every class counts by its frequency in the training labels to this power.
    class_power: float = -0.5
    # The loss is computed at half the image's size, which takes a quarter of the time.
    loss_size: tuple[int, int] = (180, 240)


class Backbone(nn.Module):
    """MobileNetV2 up to its 96 channels: images in, three stages at an eighth of their size."""

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        self.net: Any = backbone.build(
            "mobilenetv2_100",
            output_stride=8,
            uniform_dilation=False,
            pretrained=False,
            options={"pad_type": "same", "out_indices": (1, 2, 3)},
        )
        if weights is not None:
            mobilenetv2.load_into(self.net, weights)
        self.net.blocks = self.net.blocks[:5]  # timm computes the others too
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0 to 255, to (B, 152, H/8, W/8)."""
        early, middle, late = self.net(images.float() / 127.5 - 1)
        return torch.cat([F.adaptive_avg_pool2d(early, late.shape[-2:]), middle, late], dim=1)


@torch.inference_mode()
def features(data: Path, weights: Path) -> None:
    """Write the features, mirrored features and labels of every split, in half precision."""
    net = Backbone(weights)
    CACHE.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        dataset = open_dataset("camvid", data, split)
        found: dict[str, list[Any]] = {"features": [], "mirrored": [], "labels": []}
        for index in range(len(dataset)):
            image, labels = dataset.read(index)
            found["features"].append(net(image[None]).half())
            if split != "test":
                found["mirrored"].append(net(image[None].flip(-1)).half())
            found["labels"].append(labels[None])
        tensors: dict[str, Any] = {name: torch.cat(x) for name, x in found.items() if x}
        tensors["names"] = [sample.image.stem for sample in dataset.samples]
        tensors["classes"] = list(dataset.classes)
        tensors["groups"] = {name: list(group) for name, group in dataset.groups.items()}
        torch.save(tensors, CACHE / f"{split}.pt")
        print(f"{split}: {len(dataset)} images, features {tuple(tensors['features'].shape)}")


def cached(split: str) -> dict[str, Any]:
    """Map the features of a split, left on disk until they are used."""
    path = CACHE / f"{split}.pt"
    if not path.exists():
        raise SystemExit(f"no {path}: run `python benchmarks/camvid.py features DATA WEIGHTS`")
    found: dict[str, Any] = torch.load(path, mmap=True)
    return found


def batches(
    splits: list[dict[str, Any]], recipe: Recipe, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of every step, mirrored by chance: a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    items = [(split, index) for split in splits for index in range(len(split["names"]))]
    height, width = splits[0]["labels"].shape[-2:]
    rows, columns = (
        torch.linspace(0, size - 1, steps).round().long()
        for size, steps in zip((height, width), recipe.loss_size, strict=True)
    )
    for _ in range(recipe.epochs):
        order = torch.randperm(len(items), generator=generator).tolist()
        for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
            x, y = [], []
            for position in order[start : start + recipe.batch]:
                split, index = items[position]
                mirrored = bool(torch.rand((), generator=generator) < 0.5)
                labels = split["labels"][index][rows][:, columns].long()
                x.append(split["mirrored" if mirrored else "features"][index].float())
                y.append(labels.flip(-1) if mirrored else labels)
            yield torch.stack(x), torch.stack(y)


def class_weights(splits: list[dict[str, Any]], classes: int, power: float) -> Tensor:
    """Frequency to a power for each class, 1 on average over the labelled pixels."""
    counts = sum(torch.bincount(split["labels"].flatten(), minlength=256) for split in splits)
    assert isinstance(counts, Tensor)
    share = counts[:classes] / counts[:classes].sum()
    weights = share**power
    return weights / (weights * share).sum()


def train(
    attention: str, options: dict[str, Any], recipe: Recipe, seed: int, names: tuple[str, ...]
) -> tuple[nn.Module, float]:
    """Train a head; return it and its loss over the last 20 steps."""
    splits = [cached(name) for name in names]
    classes = len(splits[0]["classes"])
    torch.manual_seed(seed)
    head = SegmentationHead(
        sum(STAGES),
        classes,
        attention=attention,
        attention_options=options,
        channels=recipe.channels,
        out_channels=recipe.out_channels,
        dropout=recipe.dropout,
    ).to(memory_format=torch.channels_last)
    weights = class_weights(splits, classes, recipe.class_power)
    steps = recipe.epochs * (sum(len(split["names"]) for split in splits) // recipe.batch)
    optimizer = torch.optim.SGD(
        head.parameters(),
        recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, recipe.power)
    torch.manual_seed(seed)  # the dropout's, whatever the attention drew
    losses = []
    for x, y in batches(splits, recipe, seed):
        logits = head(x.contiguous(memory_format=torch.channels_last))
        logits = F.interpolate(logits, recipe.loss_size, mode="bilinear", align_corners=True)
        loss = F.cross_entropy(logits, y, weights, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return head.eval(), statistics.fmean(losses[-20:])


@torch.inference_mode()
def score(head: nn.Module, split: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Confusion matrices at full size: of all images, and of each sequence."""
    sequences = sorted({name.partition("_")[0] for name in split["names"]})
    matrices = {name: confusion_matrix(len(split["classes"]), IGNORE) for name in sequences}
    for index, name in enumerate(split["names"]):
        labels = split["labels"][index]
        logits = head(split["features"][index][None].float())
        logits = F.interpolate(logits, labels.shape, mode="bilinear", align_corners=True)
        matrices[name.partition("_")[0]].update(logits.argmax(1), labels[None].long())
    found = {name: matrix.compute() for name, matrix in matrices.items()}
    return {
        "all": sum(found.values()).tolist(),  # type: ignore[union-attr]
        **{name: matrix.tolist() for name, matrix in found.items()},
    }


def run(task: dict[str, Any]) -> None:
    """Train and score one network and write what came out; nothing where that is done already."""
    path = Path(task["path"])
    described = {key: task[key] for key in ("attention", "options", "seed", "train", "score")}
    described["recipe"] = asdict(task["recipe"])
    described = json.loads(json.dumps(described))
    if path.exists():
        old = json.loads(path.read_text())
        if all(old.get(key) == value for key, value in described.items()):
            return
    torch.set_num_threads(1)
    start = time.perf_counter()
    head, loss = train(
        task["attention"], task["options"], task["recipe"], task["seed"], tuple(task["train"])
    )
    split = cached(task["score"])
    result = {
        **described,
        "classes": split["classes"],
        "groups": split["groups"],
        "loss": loss,
        "gammas": {
            name: parameter.item()
            for name, parameter in head.named_parameters()
            if name.endswith("gamma")
        },
        "confusion": score(head, split),
        "seconds": round(time.perf_counter() - start),
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    found = scores(result)
    print(
        f"{path.stem:<28} mIoU {100 * found.mean_iou:.2f}, "
        + ", ".join(f"{name} {100 * mean:.2f}" for name, mean in found.group_means.items())
        + f", {result['seconds']} s",
        flush=True,
    )


def scores(result: dict[str, Any], part: str = "all") -> Scores:
    """Score a run over all images or over a sequence."""
    matrix = torch.tensor(result["confusion"][part])
    return Scores(matrix, result["classes"], result["groups"])


def run_all(tasks: list[dict[str, Any]], jobs: int) -> None:
    """Run tasks, some at a time, one thread each."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for _ in pool.imap_unordered(run, tasks, chunksize=1):
            pass


def compare(seeds: list[int], jobs: int) -> None:
    """Every attention with every seed, train+val to test; all attentions of a seed first."""
    run_all(
        [
            {
                "path": str(RESULTS / "test" / f"{name}-{seed}.json"),
                "attention": attention,
                "options": options,
                "seed": seed,
                "train": ["train", "val"],
                "score": "test",
                "recipe": Recipe(),
            }
            for seed in seeds
            for name, (attention, options) in VARIANTS.items()
        ],
        jobs,
    )


# What was tried on val, with seed 100: name, attention, its options, changes of the recipe.
SETTINGS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("none", "none", {}, {}),
    ("fully", "fully", {}, {}),
    ("fully, scale 1/sqrt(d)", "fully", {"scale": None}, {}),
    ("fully, gamma from 1", "fully", {"gamma_init": 1.0}, {}),
    ("fully, scale 1/sqrt(d), gamma from 1", "fully", {"scale": None, "gamma_init": 1.0}, {}),
    ("none, 32 wide", "none", {}, {"channels": 32}),
    ("fully, 32 wide", "fully", {}, {"channels": 32}),
)


def settings(jobs: int) -> None:
    """Gamma, scale and width, train to val."""
    run_all(
        [
            {
                "path": str(RESULTS / "val" / f"{index}.json"),
                "attention": attention,
                "options": options,
                "seed": 100,
                "train": ["train"],
                "score": "val",
                "recipe": replace(Recipe(), **changes),
            }
            for index, (_, attention, options, changes) in enumerate(SETTINGS)
        ],
        jobs,
    )


@torch.inference_mode()
def cost(repeats: int) -> None:
    """Parameters, FLOPs and time of backbone and head for one 480x360 image, interleaved."""
    recipe = Recipe()
    images = torch.randint(0, 256, (1, 3, 360, 480), dtype=torch.uint8)
    frozen = Backbone(None)
    heads = {}
    for name, (attention, layer_options) in VARIANTS.items():
        head = SegmentationHead(
            sum(STAGES),
            11,
            attention=attention,
            attention_options=layer_options,
            channels=recipe.channels,
            out_channels=recipe.out_channels,
        )
        heads[name] = nn.Sequential(frozen, head).eval()
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(repeats + 1):
        for name, net in heads.items():
            start = time.perf_counter()
            net(images)
            times[name].append(1e3 * (time.perf_counter() - start))
    found = {}
    for name, net in heads.items():
        with FlopCounterMode(display=False) as counter:
            net(images)
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "trained": sum(p.numel() for p in net.parameters() if p.requires_grad),
            "flops": counter.get_total_flops(),
            "milliseconds": statistics.median(times[name][1:]),
            "spread": statistics.quantiles(times[name][1:], n=4)[::2],
        }
    conditions = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"conditions": conditions, "image": "1x3x360x480", "cost": found}, indent=1)
    (RESULTS / "cost.json").write_text(text + "\n")
    print(text)


def _mean_and_deviation(values: list[float]) -> str:
    values = [100 * value for value in values]
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


def report() -> None:
    """Write table.md and camvid.png from the JSON files."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for path in sorted((RESULTS / "test").glob("*.json")):
        result = json.loads(path.read_text())
        runs[path.stem.rpartition("-")[0]].append(result)
    seeds = sorted({result["seed"] for results in runs.values() for result in results})
    for results in runs.values():
        results.sort(key=lambda result: result["seed"])
    whole = {name: [scores(result) for result in results] for name, results in runs.items()}
    unseen = {
        name: [scores(result, "Seq05VD") for result in results] for name, results in runs.items()
    }
    costs = json.loads((RESULTS / "cost.json").read_text())["cost"]
    classes = next(iter(whole.values()))[0].classes
    lines = [
        f"Seeds: {', '.join(map(str, seeds))}. IoU in percent, mean ± standard deviation over the "
        "seeds.",
        "",
        "| attention | mIoU | thin | large | mIoU, Seq05VD | thin, Seq05VD | large, Seq05VD "
        "| parameters trained | GFLOPs | ms an image |",
        "| --- |" + " ---: |" * 9,
    ]
    for name in NAMES:
        cells = [
            _mean_and_deviation([read(entry) for entry in of[name]])
            for of in (whole, unseen)
            for read in (
                lambda entry: entry.mean_iou,
                lambda entry: entry.group_means["thin"],
                lambda entry: entry.group_means["large"],
            )
        ]
        cells += [
            f"{costs[name]['trained']:,}",
            f"{costs[name]['flops'] / 1e9:.2f}",
            f"{costs[name]['milliseconds']:.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Against the same seed without attention (`none`) and with the control of equal parameters "
        "(`convolution`): mean difference ± half of its 95 % interval (Student's t over the "
        "seeds).",
        "",
        "| attention | mIoU − none | thin − none | large − none | mIoU − convolution "
        "| thin − convolution | large − convolution |",
        "| --- |" + " ---: |" * 6,
    ]
    for name in NAMES[2:]:
        cells = [
            _difference([read(entry) for entry in whole[name]], [read(e) for e in whole[other]])
            for other in ("none", "convolution")
            for read in (
                lambda entry: entry.mean_iou,
                lambda entry: entry.group_means["thin"],
                lambda entry: entry.group_means["large"],
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"| attention | {' | '.join(classes)} |", "| --- |" + " ---: |" * len(classes)]
    for name in NAMES:
        cells = [
            _mean_and_deviation([float(entry.iou[index]) for entry in whole[name]])
            for index in range(len(classes))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "gamma after training, seed by seed:", ""]
    for name in NAMES:
        found = [", ".join(f"{g:.3f}" for g in result["gammas"].values()) for result in runs[name]]
        if any(found):
            lines.append(f"- {name}: {'; '.join(found)}")
    lines += [
        "",
        "Tried beforehand, trained on train and scored on val (one clip of near-duplicates), one "
        "seed:",
        "",
        "| | mIoU | thin | large | gamma |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for index, (title, *_) in enumerate(SETTINGS):
        path = RESULTS / "val" / f"{index}.json"
        if path.exists():
            result = json.loads(path.read_text())
            entry = scores(result)
            gamma = ", ".join(f"{value:.3f}" for value in result["gammas"].values())
            cells = [entry.mean_iou, entry.group_means["thin"], entry.group_means["large"]]
            shown = " | ".join(f"{100 * value:.2f}" for value in cells)
            lines.append(f"| {title} | {shown} | {gamma or '–'} |")
    (RESULTS / "table.md").write_text("\n".join(lines) + "\n")
    plot(whole, unseen)
    print("\n".join(lines))


def _difference(values: list[float], others: list[float]) -> str:
    differences = [100 * (a - b) for a, b in zip(values, others, strict=True)]
    if len(differences) < 2:
        return f"{differences[0]:+.2f}"
    # Student's t for 97.5 %, by degrees of freedom.
    t = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}[len(differences) - 1]
    half = t * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.fmean(differences):+.2f} ± {half:.2f}"


@styled
def plot(whole: dict[str, list[Scores]], unseen: dict[str, list[Scores]]) -> None:
    """One panel for each mean: a point for every seed, a bar at their mean."""
    from matplotlib.figure import Figure

    panels = (
        ("mean IoU, test", [[100 * e.mean_iou for e in whole[n]] for n in NAMES]),
        (
            "thin: Pole, SignSymbol, Pedestrian",
            [[100 * e.group_means["thin"] for e in whole[n]] for n in NAMES],
        ),
        (
            "large: Road, Building, Sky, Tree, Pavement",
            [[100 * e.group_means["large"] for e in whole[n]] for n in NAMES],
        ),
        ("mean IoU, Seq05VD alone", [[100 * e.mean_iou for e in unseen[n]] for n in NAMES]),
    )
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for place, (name, points) in enumerate(zip(NAMES, values, strict=True)):
            colour = BLUE if name.startswith("fully") else QUIET if place < 2 else ORANGE
            axes.scatter([place] * len(points), points, s=22, color=colour, alpha=0.7, zorder=3)
            mean = statistics.fmean(points)
            axes.hlines(mean, place - 0.3, place + 0.3, color=colour, linewidth=2.5)
        labels = [
            name.replace("_", "\n").replace("convolution", "con-\nvolution") for name in NAMES
        ]
        axes.set_xticks(range(len(NAMES)), labels, fontsize=8)
        axes.set_title(title)
        axes.set_ylabel("IoU, %")
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "CamVid test, heads on a frozen MobileNetV2, attention exchanged: every seed and the mean",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    figure.savefig(RESULTS / "camvid.png", dpi=110)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cache = commands.add_parser("features")
    cache.add_argument("data", type=Path)
    cache.add_argument("weights", type=Path)
    for name in ("settings", "compare"):
        command = commands.add_parser(name)
        command.add_argument("--jobs", type=int, default=2, help="at a time, one thread each")
        if name == "compare":
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    commands.add_parser("cost").add_argument("--repeats", type=int, default=15)
    commands.add_parser("report")
    args = parser.parse_args()
    assert {attention for attention, _ in VARIANTS.values()} == set(attentions())
    match args.command:
        case "features":
            features(args.data, args.weights)
        case "settings":
            settings(args.jobs)
        case "compare":
            compare(args.seeds, args.jobs)
        case "cost":
            cost(args.repeats)
        case "report":
            report()


if __name__ == "__main__":
    main()
