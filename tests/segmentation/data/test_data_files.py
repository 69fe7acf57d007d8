"""Decoding of image and mask formats, and reports of damaged files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fullattn.segmentation.data import DataError, SegmentationDataset, open_dataset, smallest_image
from fullattn.segmentation.data.classes import Classes, numbered
from fullattn.segmentation.data.decode import image_size, read_image, read_labels
from fullattn.segmentation.data.files import Sample
from helpers import tiny_data

HEIGHT, WIDTH = 12, 20
RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


# Pictures


def test_a_colour_picture_is_its_pixels(tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "a.png", RGB)
    image = read_image(tmp_path / "a.png")
    assert image.is_contiguous()
    assert torch.equal(image, channels_first(RGB))


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tif", "webp"])
def test_every_format_gives_three_channels_of_bytes(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    smooth = np.full((HEIGHT, WIDTH, 3), (200, 100, 50), np.uint8)
    tiny_data.save(path, smooth)
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert (image.int() - channels_first(smooth).int()).abs().max() <= 3


def test_grey_is_repeated(tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "a.png", GREY)
    assert torch.equal(read_image(tmp_path / "a.png"), torch.from_numpy(GREY).expand(3, -1, -1))


def test_16_bit_grey_keeps_its_upper_bits(tmp_path: Path) -> None:
    deep = RANDOM.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    tiny_data.save(tmp_path / "a.png", deep)
    expected = torch.from_numpy((deep // 256).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(read_image(tmp_path / "a.png"), expected)


def test_16_bit_colour_keeps_its_upper_bits(tmp_path: Path) -> None:
    deep = RANDOM.integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    expected = channels_first((deep // 256).astype(np.uint8))
    assert torch.equal(read_image(tmp_path / "a.png"), expected)


def test_transparency_is_dropped_and_not_blended(tmp_path: Path) -> None:
    alpha = RANDOM.integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
    tiny_data.save(tmp_path / "a.png", np.concatenate([RGB, alpha], axis=2))
    assert torch.equal(read_image(tmp_path / "a.png"), channels_first(RGB))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_a_palette_picture_becomes_its_colours(
    transparency: int | bytes | None, tmp_path: Path
) -> None:
    palette = RANDOM.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GREY)
    image.putpalette(palette.ravel().tolist())
    image.save(
        tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency})
    )
    assert torch.equal(read_image(tmp_path / "a.png"), channels_first(palette[GREY]))


# What each orientation does to the stored pixels, from the EXIF standard.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
def test_exif_orientation_is_applied_to_the_pixels_and_to_the_size(
    orientation: int, ending: str, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    # Large blocks of grey, which JPEG keeps.
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :32], pixels[16:, 32:] = 255, 100
    Image.fromarray(pixels).save(path, exif=exif)
    image = read_image(path)
    expected = channels_first(np.ascontiguousarray(TURNS[orientation](pixels)))
    assert image.shape == expected.shape
    assert (image.int() - expected.int()).abs().max() <= 12
    assert image_size(path) == expected.shape[1:]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_32_bits_raise(dtype: type, tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "a.tif", GREY.astype(dtype))
    with pytest.raises(DataError, match=r"a.tif has 32 bits per channel: expected 8 or 16"):
        read_image(tmp_path / "a.tif")


# Masks


@pytest.mark.parametrize("mode", [None, "P"])
def test_a_mask_is_numbers_and_never_colours(mode: str | None, tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "a.png", GREY, mode=mode)
    assert np.array_equal(read_labels(tmp_path / "a.png"), GREY)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palette_masks_of_few_bits_are_read(bits: int, tmp_path: Path) -> None:
    expected = GREY % 2**bits
    image = Image.fromarray(expected)
    image.putpalette([0, 0, 0, 128, 0, 0] * 2 ** (bits - 1))
    image.save(tmp_path / "a.png", bits=bits)
    assert np.array_equal(read_labels(tmp_path / "a.png"), expected)


def test_a_mask_of_one_bit_is_0_and_1(tmp_path: Path) -> None:
    Image.fromarray(GREY > 100).save(tmp_path / "a.png")
    assert np.array_equal(read_labels(tmp_path / "a.png"), GREY > 100)


def test_16_bit_masks_are_read_and_labels_beyond_a_byte_are_strays(tmp_path: Path) -> None:
    deep = (GREY % 3).astype(np.uint16)
    tiny_data.save(tmp_path / "m.png", deep)
    tiny_data.save(tmp_path / "i.png", RGB)
    dataset = SegmentationDataset([Sample(tmp_path / "i.png", tmp_path / "m.png")], numbered(3))
    assert np.array_equal(dataset.read(0)[1].numpy(), deep)
    # 257 and 511 would be 1 and 255 if only their lower bytes were looked at.
    deep[0, :2] = 257, 511
    tiny_data.save(tmp_path / "m.png", deep)
    with pytest.raises(DataError, match=r"257, 511 \(pixels: 2\)"):
        dataset.read(0)


def test_a_grey_mask_saved_as_colour_is_read(tmp_path: Path) -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    three = np.stack([GREY] * 3, axis=2)
    for name, pixels in {
        "rgb": three,
        "rgba": np.concatenate([three, alpha], axis=2),
        "la": np.concatenate([three[..., :1], alpha], axis=2),
    }.items():
        tiny_data.save(tmp_path / f"{name}.png", pixels)
        assert np.array_equal(read_labels(tmp_path / f"{name}.png"), GREY)


def test_a_colour_mask_raises(tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "a.png", RGB)
    with pytest.raises(DataError, match=r"a.png is a colour image \(RGB\)"):
        read_labels(tmp_path / "a.png")


def test_a_float_mask_raises(tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "a.tif", GREY.astype(np.float32))
    with pytest.raises(DataError, match=r"a.tif is not a mask: expected integers, got float32"):
        read_labels(tmp_path / "a.tif")


def test_an_image_without_a_mask_is_ignored_everywhere(tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "a.png", RGB)
    _, mask = SegmentationDataset([Sample(tmp_path / "a.png", None)], numbered(2)).read(0)
    assert mask.shape == (HEIGHT, WIDTH)
    assert (mask == 255).all()


# Damage

DAMAGES = {
    "truncated": lambda path: tiny_data.truncate(path),
    "cut in its head": lambda path: tiny_data.truncate(path, 0.01),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "gone": lambda path: path.unlink(),
    "overwritten": lambda path: path.write_bytes(
        path.read_bytes()[:60] + bytes(200) + path.read_bytes()[260:]
    ),
}


@pytest.mark.parametrize("half", ["image", "mask"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_raises_an_error_that_names_it(
    damage: str, half: str, tmp_path: Path
) -> None:
    # Pictures of noise, so that what is cut off is not only the end of the format.
    pixels = RANDOM.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    tiny_data.save(tmp_path / "image.jpg", pixels)
    tiny_data.save(tmp_path / "mask.png", pixels[..., 0] % 5)
    paths = Sample(tmp_path / "image.jpg", tmp_path / "mask.png")
    path = getattr(paths, half)
    DAMAGES[damage](path)
    with pytest.raises(DataError) as raised:
        SegmentationDataset([paths], numbered(5)).read(0)
    assert str(raised.value).startswith(f"{path} ")
    assert raised.value.paths == (path,)
    expected = {
        "truncated": "truncated or damaged",
        "cut in its head": "",
        "empty": "the file is empty",
        "text": "not a valid image file",
        "gone": "does not exist",
        "overwritten": "",
    }
    assert expected[damage] in str(raised.value)


def test_a_mask_of_another_size_raises_an_error_that_names_both_files(tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "i.png", RGB)
    tiny_data.save(tmp_path / "m.png", GREY.T % 2)
    dataset = SegmentationDataset([Sample(tmp_path / "i.png", tmp_path / "m.png")], numbered(2))
    with pytest.raises(DataError, match=r"m.png is 20×12 .* its image .*i.png is 12×20") as raised:
        dataset.read(0)
    assert raised.value.paths == (tmp_path / "m.png", tmp_path / "i.png")


# The look at all files


def broken(root: Path) -> tuple[SegmentationDataset, dict[str, Path]]:
    """Make CamVid with four bad files and six good pairs."""
    dataset = open_dataset("camvid", tiny_data.camvid(root, images=10), "train")
    paths = {
        "truncated": dataset.samples[1].image,
        "mask": dataset.samples[3].mask,
        "stray": dataset.samples[5].mask,
        "size": dataset.samples[8].mask,
    }
    tiny_data.truncate(paths["truncated"])
    paths["mask"].write_bytes(b"")
    labels = np.array(Image.open(paths["stray"]))
    labels[0, 0] = 77
    tiny_data.save(paths["stray"], labels)
    tiny_data.save(paths["size"], labels[:-1] % 11)
    return dataset, paths


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_check_finds_every_fault_and_counts_the_rest(threads: int | None, tmp_path: Path) -> None:
    dataset, paths = broken(tmp_path)
    report = dataset.check(threads=threads)
    assert [problem.path for problem in report.problems] == list(paths.values())
    reasons = dict(zip(paths, (problem.reason for problem in report.problems), strict=True))
    assert "truncated" in reasons["truncated"]
    assert "empty" in reasons["mask"]
    assert "77 (pixels: 1)" in reasons["stray"]
    assert "47×64" in reasons["size"]
    assert report.images == 10
    assert report.sizes == {(48, 64): 6}
    good = [i for i, sample in enumerate(dataset.samples) if not set(sample) & set(paths.values())]
    masks = torch.stack([dataset.read(i)[1] for i in good])
    for index, name in enumerate(dataset.classes):
        assert report.pixels[name] == (masks == index).sum()
    assert report.ignored == (masks == 255).sum()


def test_check_without_decoding_finds_sizes_and_unreadable_files(tmp_path: Path) -> None:
    dataset, paths = broken(tmp_path)
    report = dataset.check(decode=False)
    assert [problem.path for problem in report.problems] == [paths["mask"], paths["size"]]
    assert report.sizes == {(48, 64): 8}
    assert (report.pixels, report.ignored, report.absent) == ({}, 0, ())


def test_a_reports_error_counts_the_bad_files_and_names_some(tmp_path: Path) -> None:
    dataset, paths = broken(tmp_path)
    report = dataset.check()
    with pytest.raises(DataError, match=r"4 of 10 samples .* and 1 more") as raised:
        report.raise_for_problems()
    assert str(paths["truncated"]) in str(raised.value)
    assert raised.value.paths == tuple(paths.values())
    for path in paths.values():
        assert str(path) in str(report)
    assert "camvid train: 10 images, 4 bad" in str(report)


def test_bad_files_can_be_left_out_and_stay_listed(tmp_path: Path) -> None:
    dataset, paths = broken(tmp_path)
    rest = dataset.without(dataset.check().problems)
    assert len(rest) == 6
    assert [problem.path for problem in rest.dropped] == list(paths.values())
    again = rest.check()
    again.raise_for_problems()
    assert again.dropped == rest.dropped
    assert "4 files left out" in str(again)
    assert (rest.classes, rest.groups, rest.split) == (
        dataset.classes,
        dataset.groups,
        dataset.split,
    )


def test_what_was_left_out_before_stays_listed(tmp_path: Path) -> None:
    root = tiny_data.camvid(tmp_path)
    unpaired, bad = sorted((root / "images/train").iterdir())[:2]
    (root / "labels/train" / f"{unpaired.stem}.png").unlink()
    tiny_data.truncate(bad)
    dataset = open_dataset("camvid", root, "train", skip_bad=True)
    rest = dataset.without(dataset.check().problems)
    assert [problem.path for problem in rest.dropped] == [unpaired, bad]
    assert len(rest) == 4


def test_a_dataset_of_only_bad_files_raises(tmp_path: Path) -> None:
    dataset = open_dataset("camvid", tiny_data.camvid(tmp_path, images=2), "val")
    for sample in dataset.samples:
        tiny_data.truncate(sample.image)
    with pytest.raises(DataError, match="every image of camvid val is bad"):
        dataset.without(dataset.check().problems)


def test_classes_in_no_mask_are_reported(tmp_path: Path) -> None:
    tiny_data.save(tmp_path / "i.png", RGB)
    tiny_data.save(tmp_path / "m.png", np.ones_like(GREY))
    classes = Classes(("a", "b", "c"), ((0, 0, 0),) * 3)
    report = SegmentationDataset([Sample(tmp_path / "i.png", tmp_path / "m.png")], classes).check()
    assert report.absent == ("a", "c")
    assert "classes in no mask: a, c" in str(report)


def test_samples_can_be_selected_by_name(tmp_path: Path) -> None:
    dataset = open_dataset("camvid", tiny_data.camvid(tmp_path), "test")
    chosen = dataset.select("Seq05VD_*")
    assert len(chosen) == 3
    assert set(chosen.samples) < set(dataset.samples)
    assert dataset.select("Seq05VD_*.jpg").samples == chosen.samples
    with pytest.raises(DataError, match=r"no image .* 'Seq06\*': the names are 0001TP_008550"):
        dataset.select("Seq06*")


def test_the_smallest_height_and_width_are_found_with_their_images(tmp_path: Path) -> None:
    sizes = {"low": (10, 50), "narrow": (40, 15), "large": (60, 70)}
    samples = []
    for name, size in sizes.items():
        tiny_data.save(tmp_path / f"{name}.jpg", np.zeros((*size, 3), np.uint8))
        samples.append(Sample(tmp_path / f"{name}.jpg", None))
    found = smallest_image(SegmentationDataset(samples, numbered(2)))
    assert found == (10, 15, tmp_path / "low.jpg", tmp_path / "narrow.jpg")
    (tmp_path / "large.jpg").unlink()
    with pytest.raises(DataError, match=r"large.jpg does not exist"):
        smallest_image(SegmentationDataset(samples, numbered(2)))


def test_unreadable_masks_of_a_folder_whose_classes_are_counted(tmp_path: Path) -> None:
    root = tiny_data.folder(tmp_path)
    bad = min((root / "masks" / "val").rglob("*.png"))
    bad.write_bytes(b"")
    with pytest.raises(DataError, match=f"{bad} cannot be read: the file is empty"):
        open_dataset("folder", root, "train")
    assert len(open_dataset("folder", root, "train", skip_bad=True).classes) == 4
