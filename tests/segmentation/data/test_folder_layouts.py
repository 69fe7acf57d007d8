"""The layouts of datasets: their samples, labels, classes and errors."""

from __future__ import annotations

import ast
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fullattn.segmentation.data import DATASETS, DataError, SegmentationDataset, open_dataset
from fullattn.segmentation.data.classes import colour, known
from fullattn.segmentation.data.files import pair
from fullattn.segmentation.data.folder_layouts import LAYOUTS
from helpers import SHARED_DATA, tiny_data

MAKERS: dict[str, Callable[[Path], Path]] = {
    "cityscapes": tiny_data.cityscapes,
    "ade20k": tiny_data.ade20k,
    "voc": tiny_data.voc,
    "camvid": tiny_data.camvid,
    "folder": tiny_data.folder,
}
CAMVID = SHARED_DATA / "camvid"

needs_camvid = pytest.mark.skipif(not CAMVID.is_dir(), reason="../shared/data/camvid is absent")


def raw(dataset: SegmentationDataset, index: int) -> np.ndarray:
    mask = dataset.samples[index].mask
    assert mask is not None
    return np.array(Image.open(mask))


def names(dataset: SegmentationDataset) -> list[str]:
    return [sample.name for sample in dataset.samples]


# What is found


def test_every_layout_is_tested_with_a_tiny_dataset() -> None:
    assert set(MAKERS) == set(DATASETS)


@pytest.mark.parametrize(
    ("name", "split", "count"),
    [
        ("cityscapes", "train", 4),
        ("cityscapes", "val", 2),
        ("cityscapes", "test", 2),
        ("ade20k", "train", 3),
        ("ade20k", "val", 3),
        ("voc", "train", 3),
        ("voc", "val", 3),
        ("voc", "trainval", 6),
        ("voc", "trainaug", 6),
        ("camvid", "train", 6),
        ("camvid", "test", 6),
        ("folder", "train", 3),
        ("folder", "all", 6),
        ("cityscapes", "train+val", 6),
        ("voc", "trainaug+val", 9),
        ("camvid", "train+val", 12),
        ("folder", "train+val", 6),
    ],
)
def test_every_pair_of_a_split_is_found_and_readable(
    name: str, split: str, count: int, tmp_path: Path
) -> None:
    dataset = open_dataset(name, MAKERS[name](tmp_path), split)
    assert (len(dataset), dataset.name, dataset.split) == (count, name, split)
    for index, sample in enumerate(dataset.samples):
        image, mask = dataset.read(index)
        assert image.dtype == mask.dtype == torch.uint8
        assert image.shape == (3, *mask.shape)
        assert sample.mask is not None
        assert sample.mask.name.startswith(sample.name.removesuffix("_leftImg8bit"))
        labelled = mask[mask != 255]
        assert labelled.numel() > 0
        assert labelled.max() < len(dataset.classes)


@pytest.mark.parametrize("name", DATASETS)
def test_pairs_are_sorted_by_name_on_every_file_system(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = MAKERS[name](tmp_path)
    expected = open_dataset(name, root, "train").samples
    assert list(expected) == sorted(expected)

    walk = os.walk

    def backwards(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        for place, folders, files in walk(*arguments, **options):  # type: ignore[call-overload]
            folders.reverse()
            yield place, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert open_dataset(name, root, "train").samples == expected


def test_files_beside_folders_are_in_the_order_of_their_paths(tmp_path: Path) -> None:
    root = tiny_data.folder(tmp_path, images=4)
    for place, ending in (("images", "jpg"), ("masks", "png")):
        folder = root / place / "train"
        (folder / "day1" / f"1.{ending}").rename(folder / f"a.{ending}")
        (folder / "day1" / f"3.{ending}").rename(folder / f"e.{ending}")
    assert names(open_dataset("folder", root, "train")) == ["a", "0", "2", "e"]


@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_is_found_from_each_of_its_folders(inner: str, tmp_path: Path) -> None:
    root = tiny_data.voc(tmp_path)
    assert len(open_dataset("voc", root / inner, "train")) == 3


@pytest.mark.parametrize("inner", ["", "ADEChallengeData2016"])
def test_ade20k_is_found_from_both_of_its_folders(inner: str, tmp_path: Path) -> None:
    root = tiny_data.ade20k(tmp_path)
    assert len(open_dataset("ade20k", root / inner, "val")) == 3


def test_voc_lists_may_name_the_paths_of_image_and_mask(tmp_path: Path) -> None:
    root = tiny_data.voc(tmp_path)
    listed = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"
    stems = listed.read_text().split()
    listed.write_text(
        "".join(f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png\n" for stem in stems)
    )
    assert names(open_dataset("voc", root, "trainaug")) == stems


def test_camvid_is_read_in_segnets_layout_too(tmp_path: Path) -> None:
    ours = tiny_data.camvid(tmp_path / "ours")
    theirs = tmp_path / "SegNet"
    for split in ("train", "val", "test"):
        shutil.copytree(ours / "images" / split, theirs / split)
        for path in (ours / "labels" / split).iterdir():
            labels = np.array(Image.open(path))
            labels[labels == 255] = 11
            tiny_data.save(theirs / f"{split}annot" / path.name, labels)
    a, b = open_dataset("camvid", ours, "val"), open_dataset("camvid", theirs, "val")
    assert names(a) == names(b)
    assert all(torch.equal(a.read(i)[1], b.read(i)[1]) for i in range(len(a)))


@pytest.mark.parametrize("masks", ["masks", "labels"])
@pytest.mark.parametrize("splits", [("train", "val"), ()])
def test_a_folder_may_have_splits_or_none_and_call_its_masks_labels(
    masks: str, splits: tuple[str, ...], tmp_path: Path
) -> None:
    root = tiny_data.folder(tmp_path, masks=masks, splits=splits)
    assert len(open_dataset("folder", root, "all")) == 3 * len(splits or (".",))


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    root = tiny_data.camvid(tmp_path)
    (root / "images/train/._0016E5_00390.jpg").write_bytes(b"\0")
    (root / "images/train/.cache").mkdir()
    (root / "images/train/.cache/a.jpg").write_bytes(b"\0")
    assert len(open_dataset("camvid", root, "train")) == 6


def test_pairing_takes_time_in_proportion_to_the_number_of_files() -> None:
    names = [f"{i}" for i in range(30_000)]
    start = time.process_time()
    found, issues = pair(
        {name: [Path(name)] for name in names}, {name: [Path(name)] for name in names}
    )
    assert (len(found), issues) == (30_000, [])
    assert time.process_time() - start < 5  # comparing each with each takes minutes


# Labels


def test_cityscapes_ids_become_the_19_train_ids(tmp_path: Path) -> None:
    # The table of cityscapesScripts, written out by hand.
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10}
    train_ids |= {24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    dataset = open_dataset("cityscapes", tiny_data.cityscapes(tmp_path), "val")
    path = dataset.samples[0].mask
    assert path is not None
    ids = np.arange(32 * 64, dtype=np.uint8).reshape(32, 64) % 34
    tiny_data.save(path, ids)
    expected = np.vectorize(lambda value: train_ids.get(value, 255))(ids)
    assert np.array_equal(dataset.read(0)[1].numpy(), expected)


def test_ade20k_labels_move_down_by_one_and_0_is_ignored(tmp_path: Path) -> None:
    dataset = open_dataset("ade20k", tiny_data.ade20k(tmp_path), "train")
    for index in range(len(dataset)):
        labels = raw(dataset, index).astype(int)
        assert {0, 150} <= set(np.unique(labels))
        expected = np.where(labels == 0, 255, labels - 1)
        assert np.array_equal(dataset.read(index)[1].numpy(), expected)


@pytest.mark.parametrize("split", ["val", "trainaug"])
def test_voc_labels_are_the_indices_of_the_palette(split: str, tmp_path: Path) -> None:
    dataset = open_dataset("voc", tiny_data.voc(tmp_path), split)
    for index in range(len(dataset)):
        assert np.array_equal(dataset.read(index)[1].numpy(), raw(dataset, index))


@pytest.mark.parametrize("name", ["camvid", "folder"])
def test_labels_that_are_indices_stay_as_they_are(name: str, tmp_path: Path) -> None:
    dataset = open_dataset(name, MAKERS[name](tmp_path), "train")
    for index in range(len(dataset)):
        assert {0, 255} <= set(np.unique(raw(dataset, index)))
        assert np.array_equal(dataset.read(index)[1].numpy(), raw(dataset, index))


@pytest.mark.parametrize("name", DATASETS)
def test_invalid_labels_raise_an_error_that_names_them(name: str, tmp_path: Path) -> None:
    root = MAKERS[name](tmp_path)
    (root / "classes.txt").write_text("a\nb\nc\nd\n")  # for the folder
    dataset = open_dataset(name, root, "train")
    path = dataset.samples[1].mask
    assert path is not None
    labels = raw(dataset, 1)
    stray = {"cityscapes": 34, "ade20k": 151, "voc": 21, "camvid": 11, "folder": 4}[name]
    labels[2, 3:5] = stray
    tiny_data.save(path, labels)
    with pytest.raises(
        DataError, match=rf"{path.name} has invalid labels .* got {stray} \(pixels: 2\)"
    ) as raised:
        dataset.read(1)
    assert raised.value.paths == (path,)
    dataset.read(0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cityscapes", "0 to 33"),
        ("ade20k", "0 to 150"),
        ("voc", "0 to 20 and 255"),
        ("camvid", "0 to 10 and 255"),
        ("folder", "0 to 3 and 255"),
    ],
)
def test_the_error_names_the_valid_labels(name: str, expected: str, tmp_path: Path) -> None:
    dataset = open_dataset(name, MAKERS[name](tmp_path), "train")
    path = dataset.samples[0].mask
    assert path is not None
    tiny_data.save(path, np.full_like(raw(dataset, 0), 200))
    with pytest.raises(DataError, match=f": expected {expected}, got 200 "):
        dataset.read(0)


# Classes


def test_known_classes_have_names_colours_and_groups() -> None:
    for name, count in {"cityscapes": 19, "ade20k": 150, "voc": 21, "camvid": 11}.items():
        classes = known(name)
        assert len(classes.names) == len(classes.palette) == count
        assert set(classes.groups) == {"thin", "large"}
        assert not set(classes.groups["thin"]) & set(classes.groups["large"])
        if name != "ade20k":  # two of whose published colours are the same
            assert len(set(classes.palette)) == count


def test_vocs_colours_are_those_of_the_development_kit() -> None:
    assert known("voc").palette == tuple(colour(index) for index in range(21))
    assert known("voc").palette[15] == (192, 128, 128)


@pytest.mark.parametrize(
    ("name", "file"), [("cityscapes", "cityscapes"), ("ade20k", "ade"), ("voc", "voc")]
)
def test_classes_are_those_of_mmsegmentation(name: str, file: str) -> None:
    """An independent copy of the lists; a few names are spelt otherwise there."""
    mmseg = pytest.importorskip("mmseg", reason="mmsegmentation is not installed")
    # Read and not imported: its data sets need more than is installed.
    source = (Path(mmseg.__file__).parent / "datasets" / f"{file}.py").read_text()
    (lists,) = (
        {word.arg: ast.literal_eval(word.value) for word in node.value.keywords}
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and getattr(node.targets[0], "id", "") == "METAINFO"
    )
    classes = known(name)
    assert [list(colour) for colour in classes.palette] == lists["palette"]
    pairs = zip(lists["classes"], classes.names, strict=True)
    assert sum(theirs.strip() != ours for theirs, ours in pairs) <= 4


def test_a_folder_without_a_list_has_classes_up_to_the_highest_label_of_any_split(
    tmp_path: Path,
) -> None:
    root = tiny_data.folder(tmp_path, classes=4)
    last = max((root / "masks" / "val").rglob("*.png"))
    labels = np.array(Image.open(last))
    labels[0, 1] = 6
    tiny_data.save(last, labels)
    for split in ("train", "val", "all"):
        assert open_dataset("folder", root, split).classes == tuple("0123456")


def test_a_folder_takes_its_classes_from_classes_txt(tmp_path: Path) -> None:
    root = tiny_data.folder(tmp_path, classes=3)
    (root / "classes.txt").write_text("road\nsky\n\nthe rest\n")
    dataset = open_dataset("folder", root, "train")
    assert dataset.classes == ("road", "sky", "the rest")
    assert dataset.palette[1] == (128, 0, 0)


def test_a_folder_takes_names_colours_groups_and_void_from_classes_json(tmp_path: Path) -> None:
    root = tiny_data.folder(tmp_path, classes=4)
    listed = {
        "classes": [
            {"index": 1, "name": "sky", "color": [0, 0, 255]},
            {"index": 0, "name": "road"},
            {"index": 2, "name": "pole", "color": [9, 9, 9]},
        ],
        "ignore_index": 3,
        "groups": {"thin": ["pole"]},
    }
    (root / "classes.json").write_text(json.dumps(listed))
    dataset = open_dataset("folder", root, "train")
    assert dataset.classes == ("road", "sky", "pole")
    assert dataset.palette == ((0, 0, 0), (0, 0, 255), (9, 9, 9))
    assert dataset.groups == {"thin": ("pole",)}
    labels = raw(dataset, 0).astype(int)
    expected = np.where(labels == 3, 255, labels)
    assert np.array_equal(dataset.read(0)[1].numpy(), expected)


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        ("{", "classes.json is not a class list"),
        ("[]", "expected {"),
        ('{"classes": [{"name": "a"}]}', "expected {"),
        ('{"classes": []}', "1 to 254 classes, got 0"),
        ('{"classes": [{"index": 1, "name": "a"}]}', "indices 0, 1, 2"),
        ('{"classes": [{"index": 0, "name": "a", "color": [1, 2]}]}', "colour"),
        ('{"classes": [{"index": 0, "name": "a", "color": [1, 2, 999]}]}', "colour"),
        ('{"classes": [{"index": 0, "name": ""}]}', "a name for every class"),
        (
            '{"classes": [{"index": 0, "name": "a"}, {"index": 1, "name": "a"}]}',
            "got 'a' twice",
        ),
        ('{"classes": [{"index": 0, "name": "a"}], "groups": {"thin": ["b"]}}', "'thin'.*'b'"),
        ('{"classes": [{"index": 0, "name": "a"}], "ignore_index": -1}', "ignore_index"),
    ],
)
def test_an_invalid_class_list_raises(listed: str, reason: str, tmp_path: Path) -> None:
    root = tiny_data.folder(tmp_path)
    (root / "classes.json").write_text(listed)
    with pytest.raises(DataError, match=reason) as raised:
        open_dataset("folder", root, "train")
    assert str(root / "classes.json") in str(raised.value)


def test_masks_with_only_0_and_255_raise_if_classes_are_counted(tmp_path: Path) -> None:
    root = tiny_data.folder(tmp_path)
    for path in (root / "masks").rglob("*.png"):
        labels = np.array(Image.open(path))
        tiny_data.save(path, np.where(labels == 0, 0, 255).astype(np.uint8))
    with pytest.raises(DataError, match="no label but 0 and 255"):
        open_dataset("folder", root, "train")


def test_labels_above_253_raise_if_classes_are_counted(tmp_path: Path) -> None:
    root = tiny_data.folder(tmp_path)
    path = min((root / "masks").rglob("*.png"))
    tiny_data.save(path, np.array(Image.open(path)).astype(np.uint16) + 300)
    with pytest.raises(DataError, match=rf"{path} has the label \d{{3}}: expected .* 0 to 253"):
        open_dataset("folder", root, "train")


# What is refused


@pytest.mark.parametrize("name", DATASETS)
def test_another_layout_raises_with_the_expected_and_found_folders(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError) as raised:
        open_dataset(name, tmp_path, "train")
    message = str(raised.value)
    assert f"{tmp_path} is not laid out as" in message
    assert message.endswith(f"{tmp_path} holds notes.txt, pictures/")
    expected = {"cityscapes": "gtFine/", "ade20k": "annotations/", "voc": "JPEGImages/"}
    assert expected.get(name, "images/") in message.split("expected")[1]


@pytest.mark.parametrize("name", DATASETS)
def test_a_missing_folder_is_reported(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_dataset(name, tmp_path / "nowhere", "train")


@pytest.mark.parametrize("name", DATASETS)
def test_a_file_in_place_of_the_folder_is_reported(name: str, tmp_path: Path) -> None:
    (tmp_path / "archive.zip").touch()
    with pytest.raises(DataError, match=r"archive.zip is a file"):
        open_dataset(name, tmp_path / "archive.zip", "train")


def test_an_unknown_dataset_raises_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="'cityscape': expected one of cityscapes, ade20k"):
        open_dataset("cityscape", "anywhere", "train")


@pytest.mark.parametrize("split", ["training", "", "train+", "train+valid", "..", "train/day0"])
@pytest.mark.parametrize("name", DATASETS)
def test_an_unknown_split_raises(name: str, split: str, tmp_path: Path) -> None:
    root = MAKERS[name](tmp_path)
    with pytest.raises(DataError, match=r"no split"):
        open_dataset(name, root, split)


@pytest.mark.parametrize("name", DATASETS)
def test_a_split_given_twice_raises(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="more than once"):
        open_dataset(name, MAKERS[name](tmp_path), "train+train")


@pytest.mark.parametrize(
    ("name", "emptied"),
    [
        ("cityscapes", "leftImg8bit/val"),
        ("cityscapes", "gtFine/val"),
        ("ade20k", "ADEChallengeData2016/images/validation"),
        ("ade20k", "ADEChallengeData2016/annotations/validation"),
        ("voc", "VOCdevkit/VOC2012/SegmentationClass"),
        ("camvid", "images/val"),
        ("camvid", "labels/val"),
        ("folder", "masks/val"),
    ],
)
@pytest.mark.parametrize("gone", [True, False])
def test_an_empty_split_raises_and_names_the_folder(
    name: str, emptied: str, gone: bool, tmp_path: Path
) -> None:
    root = MAKERS[name](tmp_path)
    shutil.rmtree(root / emptied)
    if not gone:
        (root / emptied).mkdir()
    with pytest.raises(DataError) as raised:
        open_dataset(name, root, "val")
    assert str(root / emptied) in str(raised.value)
    assert len(open_dataset(name, MAKERS[name](tmp_path / "again"), "train")) > 0


def test_an_empty_list_of_voc_raises(tmp_path: Path) -> None:
    root = tiny_data.voc(tmp_path)
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        open_dataset("voc", root, "val")


def test_a_missing_list_of_voc_raises_with_the_existing_ones(tmp_path: Path) -> None:
    root = tiny_data.voc(tmp_path, augmented=False)
    with pytest.raises(
        DataError, match=r"no list trainaug.txt.*holds train.txt, trainval.txt, val"
    ):
        open_dataset("voc", root, "trainaug")


def test_cityscapes_without_label_ids_raises_with_the_folder_contents(tmp_path: Path) -> None:
    root = tiny_data.cityscapes(tmp_path)
    for path in (root / "gtFine").rglob("*_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(DataError, match=r"gtfine_labelids.png below .*gtFine/val.*frankfurt"):
        open_dataset("cityscapes", root, "val")


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("missing", ["image", "mask"])
def test_a_missing_half_of_a_pair_is_named_and_with_skip_bad_left_out_and_listed(
    name: str, missing: str, tmp_path: Path
) -> None:
    root = MAKERS[name](tmp_path)
    whole = open_dataset(name, root, "train")
    gone = whole.samples[1]
    path, other = (gone.image, gone.mask) if missing == "image" else (gone.mask, gone.image)
    assert path is not None
    assert other is not None
    path.unlink()
    named = path if name == "voc" else other  # VOC's lists tell what is missing
    with pytest.raises(DataError, match="1 of the files") as raised:
        open_dataset(name, root, "train")
    assert str(named) in str(raised.value)
    assert raised.value.paths == (named,)
    dataset = open_dataset(name, root, "train", skip_bad=True)
    assert list(dataset.samples) == [sample for sample in whole.samples if sample != gone]
    assert [problem.path for problem in dataset.dropped] == [named]


def test_many_missing_masks_are_counted_and_a_few_named(tmp_path: Path) -> None:
    root = tiny_data.camvid(tmp_path, images=9)
    for path in sorted((root / "labels/train").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DataError, match=r"8 of the files .* and 5 more"):
        open_dataset("camvid", root, "train")
    with pytest.raises(DataError, match="has no mask") as raised:
        open_dataset("camvid", root, "train")
    assert len(raised.value.paths) == 8


def test_two_images_for_one_mask_raise(tmp_path: Path) -> None:
    root = tiny_data.camvid(tmp_path)
    first = min((root / "images/train").iterdir())
    Image.open(first).save(first.with_suffix(".png"))
    with pytest.raises(DataError, match=r"has the same name as"):
        open_dataset("camvid", root, "train")
    assert len(open_dataset("camvid", root, "train", skip_bad=True)) == 5


def test_camvid_with_other_classes_raises(tmp_path: Path) -> None:
    root = tiny_data.camvid(tmp_path)
    listed = json.loads((root / "classes.json").read_text())
    listed["classes"][2]["name"] = "Lamp"
    (root / "classes.json").write_text(json.dumps(listed))
    with pytest.raises(
        DataError, match=r"other classes than the 11 of CamVid.*open it as 'folder'"
    ):
        open_dataset("camvid", root, "train")
    assert open_dataset("folder", root, "train").classes[2] == "Lamp"


def test_layouts_are_described_in_their_module() -> None:
    from fullattn.segmentation.data import folder_layouts

    assert all(f"\n{name} " in (folder_layouts.__doc__ or "") for name in LAYOUTS)


# CamVid itself


@needs_camvid
@pytest.mark.parametrize(
    ("split", "count"), [("train", 367), ("val", 101), ("test", 233), ("train+val", 468)]
)
def test_real_camvid_has_the_published_splits(split: str, count: int) -> None:
    assert len(open_dataset("camvid", CAMVID, split)) == count


@needs_camvid
def test_real_camvid_is_whole_and_has_the_published_frequencies() -> None:
    dataset = open_dataset("camvid", CAMVID, "val")
    report = dataset.check()
    report.raise_for_problems()
    assert report.sizes == {(360, 480): 101}
    published = json.loads((CAMVID / "stats.json").read_text())["val"]
    total = sum(report.pixels.values())
    assert 100 * report.ignored / (total + report.ignored) == pytest.approx(
        published["ignore_pct"], abs=1e-3
    )
    for name, per_cent in published["pct_of_labelled"].items():
        assert 100 * report.pixels[name] / total == pytest.approx(per_cent, abs=1e-3)


@needs_camvid
def test_real_camvids_test_can_be_taken_from_the_unseen_sequence_alone() -> None:
    assert len(open_dataset("camvid", CAMVID, "test").select("Seq05VD_*")) == 171
