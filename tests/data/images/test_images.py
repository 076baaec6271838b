"""Image corpora: what they hold, how they are split, and which input they refuse before a run starts."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from hf_adafisher.data.images.corpora import ImageSplit, available_images, load_images
from hf_adafisher.data.images.files import BrokenImageError
from hf_adafisher.data.images.hub import HUB_IMAGES
from hf_adafisher.data.images.sampling import held_out_positions, stratified_positions
from tests.data.images.image_samples import COLOURS, class_folders, encoded, picture

THREE = {"red": 10, "blue": 20, "green": 30}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to, or read from, the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(labels: list[Any], names: list[str] | None = None, **columns: list[Any]) -> datasets.Dataset:
    """A table of pictures, the colour of each by its label."""
    colours = list(COLOURS.values())
    images = [encoded(picture(colours[int(v or 0) % 3], seed=k)) for k, v in enumerate(labels)]
    data = {"image": [{"bytes": image, "path": None} for image in images], "label": labels, **columns}
    made = datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())
    return made if names is None else made.cast_column("label", datasets.ClassLabel(names=names))


def mean_colours(split: ImageSplit) -> list[np.ndarray]:
    """The mean colour of every image of a split, decoded."""
    return [np.asarray(split.image(k), dtype=float).mean(axis=(0, 1)) for k in range(len(split))]


def test_digits_is_the_default_and_holds_every_image_once() -> None:
    corpus = load_images()
    assert corpus.name == "digits" and corpus.class_names == tuple("0123456789") and "scikit-learn" in corpus.source
    raw = load_digits()
    expected = Counter(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(raw.images, raw.target, strict=True)
    )
    found: Counter[tuple[bytes, int]] = Counter()
    for split in (corpus.train, corpus.validation, corpus.test):
        for k in range(len(split)):
            pixels = np.asarray(split.image(k))
            assert pixels.shape == (8, 8, 3) and (pixels == pixels[..., :1]).all()
            found[pixels[..., 0].tobytes(), int(split.labels[k])] += 1
    assert found == expected
    assert [len(split) for split in (corpus.train, corpus.validation, corpus.test)] == [1438, 180, 179]


def test_class_folders_become_classes_and_labels_belong_to_their_images(tmp_path: Path) -> None:
    corpus = load_images(data_dir=class_folders(tmp_path / "images", THREE))
    assert corpus.class_names == ("blue", "green", "red")
    for split in (corpus.train, corpus.validation):
        for colour, label, k in zip(mean_colours(split), split.labels, range(len(split)), strict=True):
            name = corpus.class_names[label]
            assert np.argmax(colour) == np.argmax(COLOURS[name])
            assert f"{os.sep}{name}{os.sep}" in split.name(k)
    names = {split.name(k) for split in (corpus.train, corpus.validation) for k in range(len(split))}
    assert len(names) == 60 and len(corpus.test) == 0


def test_without_a_validation_split_a_tenth_of_each_class_is_held_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = class_folders(tmp_path / "images", THREE)
    with caplog.at_level(logging.WARNING):
        corpus = load_images(data_dir=folder, seed=3)
    assert np.bincount(corpus.validation.labels).tolist() == [2, 3, 1]
    assert np.bincount(corpus.train.labels).tolist() == [18, 27, 9]
    assert "6 of 60" in caplog.text and "no labelled test split" in caplog.text and "seed 3" in corpus.source
    again, other = load_images(data_dir=folder, seed=3), load_images(data_dir=folder, seed=4)
    assert again.validation.indices.tolist() == corpus.validation.indices.tolist()
    assert other.validation.indices.tolist() != corpus.validation.indices.tolist()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_stratified_positions_are_within_one_of_the_exact_share(labels: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(labels)))
    array = np.asarray(labels)
    chosen = stratified_positions(array, count, seed=1)
    assert len(chosen) == count == len(set(chosen.tolist()))
    assert (np.diff(chosen) > 0).all()
    for label, size in Counter(labels).items():
        assert abs((array[chosen] == label).sum() - size * count / len(labels)) < 1


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.floats(0.01, 0.99))
def test_held_out_images_leave_every_class_one_to_train_on(labels: list[int], fraction: float) -> None:
    array = np.asarray(labels)
    if max(Counter(labels).values()) < 2:
        with pytest.raises(ValueError, match=r"cannot hold out"):
            held_out_positions(array, fraction, seed=0)
        return
    chosen = held_out_positions(array, fraction, seed=0)
    assert 1 <= len(chosen) == len(set(chosen.tolist()))
    assert set(np.delete(array, chosen).tolist()) == set(labels)


def test_a_sample_keeps_the_proportions(tmp_path: Path) -> None:
    corpus = load_images()
    sample = corpus.train.sample(100, seed=1)
    assert len(sample) == 100 and set(np.bincount(sample.labels)) <= {9, 10, 11}
    assert corpus.train.sample(10**6) is corpus.train


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "validation", "testing")])
def test_split_folders(tmp_path: Path, names: tuple[str, str, str]) -> None:
    for name, count in zip(names, (4, 2, 3), strict=True):
        class_folders(tmp_path / name, {"red": count, "blue": count})
    corpus = load_images(data_dir=tmp_path)
    assert [len(split) for split in (corpus.train, corpus.validation, corpus.test)] == [8, 4, 6]
    assert corpus.class_names == ("blue", "red")
    assert f"{os.sep}{names[2]}{os.sep}" in corpus.test.name(0)


def test_parquet_files_and_saved_data_sets_give_the_same_corpus(tmp_path: Path) -> None:
    parts = {
        "train": table([0, 1, 1, 2, 0, 2], ["a", "b", "c"]),
        "validation": table([2, 1], ["a", "b", "c"]),
        "test": table([0], ["a", "b", "c"]),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for name, part in parts.items():
        part.to_parquet(tmp_path / "files" / f"{name}-00000-of-00001.parquet")
    for folder in ("saved", "files"):
        corpus = load_images(data_dir=tmp_path / folder)
        assert corpus.class_names == ("a", "b", "c")
        assert [s.labels.tolist() for s in (corpus.train, corpus.validation, corpus.test)] == [
            [0, 1, 1, 2, 0, 2],
            [2, 1],
            [0],
        ]
        dominant = [int(np.argmax(colour)) for colour in mean_colours(corpus.train)]
        assert dominant == [[2, 1, 0][label] for label in corpus.train.labels]


def test_one_parquet_file_with_its_own_columns(tmp_path: Path) -> None:
    """Plain bytes as images, another column of integers as labels, classes named by their numbers."""
    data = {"picture": [encoded(picture(seed=k)) for k in range(8)], "kind": [0, 1, 2, 2] * 2, "label": ["x"] * 8}
    datasets.Dataset.from_dict(data).to_parquet(tmp_path / "all.parquet")
    corpus = load_images(data_dir=tmp_path / "all.parquet", image_column="picture", label_column="kind")
    assert corpus.class_names == ("0", "1", "2")
    assert np.asarray(corpus.train.image(0)).shape == (8, 12, 3)


def saved(tmp_path: Path, made: datasets.Dataset) -> Path:
    """The table as a folder of ``save_to_disk``."""
    made.save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: table([0, 1]).remove_columns("label"), r"no column 'label'.*--label_column"),
        (lambda: table([0.0, 1.0]), r"label column 'label' has the type float64; it must hold class numbers"),
        (
            lambda: table([0, 1]).remove_columns("label").add_column("label", ["cat", "dog"]),
            r"'label' has the type string.*class_encode_column",
        ),
        (lambda: table([1, 1, 1]), r"only the class '1'; a classifier needs images of at least 2 classes"),
        (lambda: table([0, 1, None]), r"row 2 has no label"),
        (lambda: table([0, 1, -3]), r"row 2 has the label -3"),
        (lambda: table([0, 1]).remove_columns("image"), r"which column has the images\? Give --image_column"),
        (lambda: table([]), r"cannot be read as a data set saved with save_to_disk"),  # datasets' own limit
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, made: Any, message: str) -> None:
    folder = saved(tmp_path, made())
    with pytest.raises(ValueError, match=message):
        load_images(data_dir=folder)


def test_the_column_of_images_is_found_by_its_type(tmp_path: Path) -> None:
    folder = saved(tmp_path, table([0, 1] * 4).rename_column("image", "x").add_column("image", [1] * 8))
    assert np.asarray(load_images(data_dir=folder).train.image(0)).shape == (8, 12, 3)
    with pytest.raises(ValueError, match=r"column 'image' has the type .*no image"):
        load_images(data_dir=folder, image_column="image")


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, table([0, 1]))
    with pytest.raises(ValueError, match=r"no label column 'fine'; its columns: image, label"):
        load_images(data_dir=folder, label_column="fine")
    with pytest.raises(ValueError, match=r"no column 'img'; its columns: image, label"):
        load_images(data_dir=folder, image_column="img")


def test_an_empty_table(tmp_path: Path) -> None:
    table([0, 1]).select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read: .*no data"):
        load_images(data_dir=tmp_path)


def test_a_class_in_test_that_training_lacks(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    parts = {"train": table([0, 1, 0, 1], names), "test": table([0, 2], names)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"the test split has 1 classes without a training image: 'c'"):
        load_images(data_dir=tmp_path / "saved")
    class_folders(tmp_path / "folders" / "train", {"a": 2, "b": 2})
    class_folders(tmp_path / "folders" / "test", {"a": 1, "zebra": 1})
    with pytest.raises(ValueError, match=r"classes without a folder in .*train'?: 'zebra'"):
        load_images(data_dir=tmp_path / "folders")


def test_class_names_must_agree_between_splits(tmp_path: Path) -> None:
    parts = {"train": table([0, 1, 0, 1], ["a", "b"]), "test": table([0, 1], ["b", "a"])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"class names \['b', 'a'\] are not those of the training split"):
        load_images(data_dir=tmp_path / "saved")


def test_a_split_without_labels_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = {"train": table([0, 1, 0, 1]), "test": table([-1, -1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert len(load_images(data_dir=tmp_path / "saved").test) == 0
    assert "has no labels" in caplog.text


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist"):
        load_images(data_dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' holds no images"):
        load_images(data_dir=tmp_path / "empty")
    picture().save(tmp_path / "empty" / "loose.png")
    with pytest.raises(ValueError, match=r"its 1 images are in no class folder"):
        load_images(data_dir=tmp_path / "empty")
    class_folders(tmp_path / "gap", {"red": 2, "blue": 0})
    with pytest.raises(ValueError, match=r"class folder .*blue' holds no images"):
        load_images(data_dir=tmp_path / "gap")
    class_folders(tmp_path / "only" / "test", {"red": 2, "blue": 2})
    with pytest.raises(ValueError, match=r"has no train folder besides .*test"):
        load_images(data_dir=tmp_path / "only")
    (tmp_path / "note.txt").write_text("no images")
    with pytest.raises(ValueError, match=r"neither a folder nor a parquet file"):
        load_images(data_dir=tmp_path / "note.txt")


@pytest.mark.parametrize("content", [b"", b"this is no parquet file"])
def test_damaged_parquet_files_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.parquet'? (has zero bytes|cannot be read)"):
        load_images(data_dir=tmp_path)


def damage(folder: Path) -> list[str]:
    """Breaks three files of a folder of PNG and JPEG images: zero bytes, truncated, no image."""
    whole = encoded(picture(size=(64, 64)), "JPEG")
    (folder / "red" / "000.png").write_bytes(b"")
    (folder / "red" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "blue" / "text.png").write_text("no image at all")
    return ["000.png", "cut.jpg", "text.png"]


def test_broken_files_are_named_before_a_run_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = class_folders(tmp_path / "images", THREE)
    names = damage(folder)
    with pytest.raises(ValueError, match=r"3 of 62 images are broken") as error:
        load_images(data_dir=folder)
    assert all(name in str(error.value) for name in names) and "--skip_broken" in str(error.value)
    assert "zero bytes" in str(error.value) and "truncated" in str(error.value).lower()
    with caplog.at_level(logging.WARNING):
        corpus = load_images(data_dir=folder, skip_broken=True)
    assert "3 of 62 images are broken and left out" in caplog.text
    assert sorted(Path(name).name for name in corpus.skipped) == names
    assert len(corpus.train) + len(corpus.validation) == 59
    assert all(len(mean_colours(split)) == len(split) for split in (corpus.train, corpus.validation))


def test_damage_in_the_middle_is_named_when_it_is_met_and_skipped_when_asked(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "images", {"red": 4, "blue": 4})
    data = bytearray(encoded(picture(size=(64, 64))))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    (folder / "red" / "000.png").write_bytes(data)
    corpus = load_images(data_dir=folder)
    position = next(k for k in range(len(corpus.train)) if corpus.train.name(k).endswith(f"red{os.sep}000.png"))
    with pytest.raises(BrokenImageError, match=r"red.000\.png' cannot be read"):
        corpus.train.image(position)
    assert list(map(os.path.basename, load_images(data_dir=folder, skip_broken=True).skipped)) == ["000.png"]


def test_broken_rows_of_a_table_are_named(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"image": [encoded(picture(seed=k)) for k in range(6)], "label": [0, 1] * 3})
    rows = made.to_dict()
    rows["image"][3] = rows["image"][3][:60]
    rows["image"][4] = b""
    folder = saved(tmp_path, datasets.Dataset.from_dict(rows))
    with pytest.raises(ValueError, match=r"2 of 6 images are broken: .*row 3 .*row 4 \(the file has zero bytes\)"):
        load_images(data_dir=folder)
    assert len(load_images(data_dir=folder, skip_broken=True).skipped) == 2


HUB_LAYOUTS = {
    "cifar10": (("train", "test"), "img", "label"),
    "cifar100": (("train", "test"), "img", "fine_label"),
    "imagenet-1k": (("train", "validation", "test"), "image", "label"),
    "tiny-imagenet": (("train", "valid"), "image", "label"),
}


@pytest.mark.parametrize("name", sorted(HUB_LAYOUTS))
def test_hub_images_are_read_by_their_own_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code as for the Hub, over a local stand-in with the real one's splits and columns."""
    splits, image, label = HUB_LAYOUTS[name]
    sizes = dict(zip(splits, (20, 4, 6), strict=False))

    def stand_in(path: str, *args: Any, **kwargs: Any) -> datasets.DatasetDict:
        assert path == HUB_IMAGES[name].path
        made = {}
        for split, size in sizes.items():
            hidden = name == "imagenet-1k" and split == "test"
            part = table([0, 1] * (size // 2), ["cat", "dog"])
            part = part.rename_columns({old: new for old, new in (("image", image), ("label", label)) if old != new})
            if name == "cifar100":
                part = part.add_column("coarse_label", [0] * size)
            made[split] = part.map(lambda row: {label: -1}, load_from_cache_file=False) if hidden else part
        return datasets.DatasetDict(made)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    corpus = load_images(name)
    assert corpus.name == name and corpus.class_names == ("cat", "dog") and HUB_IMAGES[name].path in corpus.source
    lengths = [len(split) for split in (corpus.train, corpus.validation, corpus.test)]
    assert lengths == ([18, 2, 4] if "test" in splits[1] else [20, 4, 0])
    assert np.asarray(corpus.train.image(0)).shape == (8, 12, 3)


def test_any_data_set_of_the_hub_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    made = datasets.DatasetDict({"train": table([0, 1] * 10), "valid": table([0, 1]), "extra": table([0, 1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, **__: made if path == "some/flowers" else None)
    corpus = load_images("some/flowers")
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (20, 2, 0)


@pytest.mark.parametrize("name", list(HUB_IMAGES))
def test_hub_images_without_network_or_cache(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=rf"'{name}'.*{re.escape(HUB_IMAGES[name].path)}.*--data_dir"):
        load_images(name)


@pytest.mark.parametrize(("name", "nearest"), [("cifar-10", "cifar10"), ("Digits", "digits"), ("imagenet", "")])
def test_unknown_names_are_refused_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown data set '{name}'") as error:
        load_images(name)
    assert all(known in str(error.value) for known in available_images())
    assert not nearest or f"did you mean {nearest!r}" in str(error.value)


def test_contradictory_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"either a data set's name \(got 'digits'\) or data_dir"):
        load_images("digits", data_dir=tmp_path)
    for fraction in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=r"validation_fraction"):
            load_images(validation_fraction=fraction)


@pytest.mark.skipif("HF_ADAFISHER_DATA" not in os.environ, reason="HF_ADAFISHER_DATA is not set")
def test_the_cifar10_subset() -> None:
    corpus = load_images(data_dir=Path(os.environ["HF_ADAFISHER_DATA"]) / "data" / "cifar10")
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (9000, 1000, 2000)
    assert corpus.class_names[:3] == ("airplane", "automobile", "bird")
    assert set(np.bincount(corpus.validation.labels)) == {100}


def test_a_label_far_out_of_range_is_found_before_training(tmp_path: Path) -> None:
    """E6: a confusion matrix of a million classes would take 7 TiB, after the training."""
    import datasets

    rows = {"image": [{"bytes": encoded(picture(seed=row)), "path": None} for row in range(6)]}
    table = datasets.Dataset.from_dict({**rows, "label": [0, 1, 0, 1, 1_000_000, 0]})
    table.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train: row 4 has the label 1000000, far out of the range"):
        load_images(data_dir=tmp_path)
    datasets.Dataset.from_dict({**rows, "label": [0, 1, 0, 1, 500, 0]}).to_parquet(tmp_path / "train.parquet")
    assert len(load_images(data_dir=tmp_path, validation_fraction=0.2).class_names) == 501  # gaps are allowed
