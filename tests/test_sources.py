import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from delvm.errors import UserError
from delvm.images.scenes import Scenes
from delvm.images.sources import (
    DataConfig,
    PairedFolders,
    TaskConfig,
    Views,
    check_files,
    fingerprint,
    held_out,
    index_data,
    index_task,
    list_pictures,
    match_pairs,
    open_sources,
    read_picture,
    refuse_leaks,
)

PALETTE = np.array([(0, 0, 0), (255, 0, 0), (0, 128, 255), (40, 200, 10)], np.uint8)


def _picture(seed, shape=(24, 36)):
    """Blocks of one colour, so that a JPEG and a small view still know them."""
    blocks = np.random.default_rng(seed).integers(256, size=(shape[0] // 4, shape[1] // 4, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((4, 4, 1), np.uint8))


def _mask(seed, shape=(24, 36)):
    """Labels of odd sizes: no resampling to 16 pixels falls on their borders."""
    labels = np.random.default_rng(seed).integers(len(PALETTE), size=(shape[0] // 3 + 1, shape[1] // 3 + 1))
    return PALETTE[np.kron(labels, np.ones((3, 3), int))[: shape[0], : shape[1]]]


def _save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def _pairs(root, stems, images="images", annotations="annotations", suffixes=("jpg", "png")):
    """Two folders of pictures with these stems; returns them as a task's settings."""
    for number, stem in enumerate(stems):
        _save(root / images / f"{stem}.{suffixes[0]}", _picture(number))
        _save(root / annotations / f"{stem}.{suffixes[1]}", _mask(number))
    return {"images": str(root / images), "annotations": str(root / annotations)}


def _cut(path):
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _refused(function, *arguments):
    """The message with which a call is refused, one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _stems(split):
    return {name: [entry[0] for entry in entries] for name, entries in split.items()}


# --- settings


def test_defaults_of_a_task():
    task = TaskConfig(images="a", annotations="b", validation_fraction=0.2)
    assert (task.policy, task.nearest, task.samples, task.validation_samples) == ("crops", False, 0, 0)
    assert (DataConfig().image_size, DataConfig().unreadable) == (256, "stop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 7}, "image_size: 7 must be at least 8"),
        ({"image_size": -32}, "image_size: -32 must be at least 8"),
        ({"unreadable": "ignore"}, "unreadable: 'ignore' is unknown; choices: stop, skip"),
    ],
)
def test_data_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DataConfig(**settings)


FOLDERS = {"images": "a", "annotations": "b", "validation_fraction": 0.5}
SCENE = {"scene": "pose", "samples": 5, "validation_samples": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            FOLDERS | {"policy": "crop"},
            "policy: 'crop' is unknown; choices: none, crops, geometric, segmentation, restoration, pose",
        ),
        (
            FOLDERS | {"policy": "restoration", "nearest": True},
            "policy: 'restoration' changes the colours that nearest keeps as labels;"
            " choices: none, crops, geometric, segmentation, pose",
        ),
        (FOLDERS | {"samples": -1}, "samples: -1 must be at least 0"),
        (FOLDERS | {"validation_samples": -2}, "validation_samples: -2 must be at least 0"),
        (SCENE | {"images": "a"}, "scene: 'pose' and folders exclude each other"),
        (SCENE | {"annotations": "a"}, "scene: 'pose' and folders exclude each other"),
        (SCENE | {"validation_images": "a"}, "scene: 'pose' and folders exclude each other"),
        (SCENE | {"validation_annotations": "a"}, "scene: 'pose' and folders exclude each other"),
        (SCENE | {"scene": "poses"}, "scene: 'poses' is unknown; choices: segmentation, deraining, pose"),
        (SCENE | {"samples": 0}, "samples: a scene needs at least 1"),
        (SCENE | {"validation_samples": 0}, "validation_samples: a scene needs at least 1"),
        ({}, "images: missing; a task needs images and annotations (folders), or a scene"),
        (
            {"images": "a", "validation_fraction": 0.5},
            "annotations: missing; a task needs images and annotations (folders), or a scene",
        ),
        (
            FOLDERS | {"validation_images": "c"},
            "validation_images, validation_annotations: give both or neither",
        ),
        (
            FOLDERS | {"validation_annotations": "c"},
            "validation_images, validation_annotations: give both or neither",
        ),
        *(
            (
                FOLDERS | {"validation_fraction": fraction},
                f"validation_fraction: {fraction} must lie between 0 and 1, or give validation_images and"
                " validation_annotations",
            )
            for fraction in (0.0, 1.0, -0.1, 20.0, float("nan"))
        ),
    ],
)
def test_task_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskConfig(**settings)


def test_task_settings_that_are_taken():
    TaskConfig(**FOLDERS, nearest=True)
    TaskConfig(**FOLDERS, policy="restoration")
    TaskConfig(images="a", annotations="b", validation_images="c", validation_annotations="d")
    assert TaskConfig(images="a", annotations="b").validation_fraction == 0.2
    TaskConfig(**SCENE, policy="pose")


# --- one picture


def test_a_picture_is_read_as_it_is(tmp_path):
    picture = _picture(0)
    out = read_picture(_save(tmp_path / "a.png", picture))
    assert (out.dtype, out.shape) == (np.uint8, (24, 36, 3))
    np.testing.assert_array_equal(out, picture)
    plain = np.full((24, 36, 3), (200, 100, 50), np.uint8)  # a JPEG changes it by rounding alone
    jpeg = read_picture(_save(tmp_path / "a.jpg", plain))
    assert abs(jpeg.astype(int) - plain).max() <= 2


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), np.rot90(pixels, -1))


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = _picture(0)[..., 0]
    for channels in ([grey], [grey, np.full_like(grey, 7)]):  # without and with alpha
        path = _save(tmp_path / "a.png", np.dstack(channels).squeeze())
        np.testing.assert_array_equal(read_picture(path), np.dstack([grey] * 3))


def test_alpha_is_dropped(tmp_path):
    alpha = _picture(1)[..., 0]
    path = _save(tmp_path / "a.png", np.dstack([_picture(0), alpha]))
    np.testing.assert_array_equal(read_picture(path), _picture(0))


def test_a_palette_becomes_its_colours(tmp_path):
    labels = np.random.default_rng(0).integers(len(PALETTE), size=(24, 36)).astype(np.uint8)
    indexed = Image.frombytes("P", (36, 24), labels.tobytes())
    indexed.putpalette(PALETTE.tobytes())
    indexed.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), PALETTE[labels])


def test_more_than_eight_bits_are_refused(tmp_path):
    # Pillow would make 255 of everything above it
    path = _save(tmp_path / "depth.png", np.full((24, 36), 4000, np.uint16))
    assert _refused(read_picture, path).startswith(f"{path}: unreadable picture (")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_cut_short(tmp_path, suffix):
    path = _save(tmp_path / f"a.{suffix}", _picture(0, (64, 64)))
    whole = path.read_bytes()
    for size in (len(whole) * 3 // 4, len(whole) // 2, 100, 10, 1, 0):
        path.write_bytes(whole[:size])
        assert _refused(read_picture, path).startswith(f"{path}: unreadable picture (")


def test_not_a_picture(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("a note")
    assert _refused(read_picture, path).startswith(f"{path}: unreadable picture (cannot identify image file")
    path.unlink()
    message = _refused(read_picture, path)
    assert message == f"{path}: unreadable picture ([Errno 2] No such file or directory: '{path}')"
    path.mkdir()
    assert _refused(read_picture, path).startswith(f"{path}: unreadable picture ([Errno 21]")


def test_a_picture_too_large_to_unpack(tmp_path):
    # 60000 x 60000 pixels in the header, no data
    header = b"IHDR" + struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "a.png").write_bytes(start + struct.pack(">I", 10) + b"IDAT")
    message = _refused(read_picture, tmp_path / "a.png")
    assert message.startswith(f"{tmp_path / 'a.png'}: unreadable picture (Image size (3600000000 pixels)")


# --- folders


def test_the_pictures_of_a_folder(tmp_path):
    for name in ("b.jpg", "a.JPG", "c.jpeg", "e.PNG", "d.png", "two.dots.png"):
        (tmp_path / name).touch()
    for name in (".f.jpg", "._b.jpg", "notes.txt", "jpg", "g.gif", "h.jpg.part", "i.tiff"):
        (tmp_path / name).touch()
    _save(tmp_path / "inside" / "z.jpg", _picture(0))
    found = list_pictures(str(tmp_path), "tasks.t.images")
    assert list(found) == ["a", "b", "c", "d", "e", "two.dots"]
    assert found["a"] == tmp_path / "a.JPG"
    assert found["two.dots"] == tmp_path / "two.dots.png"


def test_two_files_with_one_stem(tmp_path):
    for name in ("a.jpg", "b.PNG", "b.jpg"):
        (tmp_path / name).touch()
    message = _refused(list_pictures, str(tmp_path), "tasks.t.images")
    assert message == f"tasks.t.images: 'b.PNG' and 'b.jpg' have the same stem in {tmp_path}"


def test_no_folder(tmp_path):
    folder = str(tmp_path / "nowhere")
    assert _refused(list_pictures, folder, "tasks.t.images") == f"tasks.t.images: no folder '{folder}'"
    (tmp_path / "nowhere").touch()  # a file is no folder
    assert _refused(list_pictures, folder, "tasks.t.images") == f"tasks.t.images: no folder '{folder}'"


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _save(tmp_path / "photos" / "a.jpg", _picture(0))
    assert list_pictures("~/photos", "tasks.t.images") == {"a": tmp_path / "photos" / "a.jpg"}


def test_pairs_go_by_stem(tmp_path):
    folders = _pairs(tmp_path, ["cat", "ant", "bee"])
    _save(tmp_path / "annotations" / "extra.png", _mask(9))
    assert match_pairs(*folders.values(), "t") == [
        (stem, str(tmp_path / "images" / f"{stem}.jpg"), str(tmp_path / "annotations" / f"{stem}.png"))
        for stem in ("ant", "bee", "cat")
    ]


def test_an_image_without_annotation(tmp_path):
    folders = _pairs(tmp_path, ["a", "b", "c", "d"])
    for stem, more in (("c", ""), ("b", " (and 1 more)"), ("d", " (and 2 more)")):
        (tmp_path / "annotations" / f"{stem}.png").unlink()
        first = tmp_path / "images" / ("c.jpg" if stem == "c" else "b.jpg")
        message = f"tasks.t: image without annotation: {first}{more}"
        assert _refused(match_pairs, *folders.values(), "t") == message


def test_folders_that_hold_no_pairs(tmp_path):
    folders = _pairs(tmp_path, ["a"])
    (tmp_path / "empty").mkdir()
    empty, nowhere = str(tmp_path / "empty"), str(tmp_path / "nowhere")
    cases = {
        (empty, folders["annotations"]): f"images: no pictures (.jpg, .jpeg, .png) in '{empty}'",
        (nowhere, folders["annotations"]): f"images: no folder '{nowhere}'",
        (folders["images"], nowhere): f"annotations: no folder '{nowhere}'",
    }
    for pair, message in cases.items():
        for prefix in ("", "validation_"):
            assert _refused(match_pairs, *pair, "t", prefix) == f"tasks.t.{prefix}{message}"


# --- what is held out


def test_which_stems_are_held_out():
    # pinned: another split would evaluate earlier models on what they were trained on
    assert "".join(stem for stem in "abcdefghijkl" if held_out(stem, 0.5, 0)) == "bcefgjkl"
    assert "".join(stem for stem in "abcdefghijkl" if held_out(stem, 0.25, 0)) == "cfgkl"
    assert "".join(stem for stem in "abcdefghijkl" if held_out(stem, 0.5, 1)) == "dghj"


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("name", ["{}", "IMG_{:06d}", "photo {} é"])
def test_the_fraction_is_kept_and_grows_by_stems(seed, name):
    stems = [name.format(number) for number in range(4000)]
    before: set[str] = set()
    for fraction in (0.01, 0.1, 0.5, 0.9):
        chosen = {stem for stem in stems if held_out(stem, fraction, seed)}
        deviation = (fraction * (1 - fraction) / len(stems)) ** 0.5
        assert abs(len(chosen) / len(stems) - fraction) < 4 * deviation
        assert before < chosen
        before = chosen


def test_another_seed_holds_out_others():
    stems = [str(number) for number in range(4000)]
    same = np.mean([held_out(stem, 0.5, 0) == held_out(stem, 0.5, 1) for stem in stems])
    assert 0.46 < same < 0.54


def test_a_task_is_split_by_fraction(tmp_path):
    config = TaskConfig(**_pairs(tmp_path, "abcdefghijkl"), validation_fraction=0.5)
    assert _stems(index_task("t", config, 0)) == {"train": list("adhi"), "validation": list("bcefgjkl")}
    assert _stems(index_task("t", config, 1)) == {"train": list("abcefikl"), "validation": list("dghj")}


def test_a_stem_is_on_the_same_side_in_every_task(tmp_path):
    photos = TaskConfig(**_pairs(tmp_path / "a", "abcdefghijkl"), validation_fraction=0.5)
    fewer = _pairs(tmp_path / "b", "lcabdh", suffixes=("png", "png"))
    other = TaskConfig(**fewer, validation_fraction=0.5, policy="pose")
    first, second = _stems(index_task("t", photos, 0)), _stems(index_task("u", other, 0))
    assert second == {"train": list("adh"), "validation": list("bcl")}
    for split in second:
        assert set(second[split]) < set(first[split])


def test_held_out_folders(tmp_path):
    held = _pairs(tmp_path, "xa", "val_images", "val_annotations")
    config = TaskConfig(
        **_pairs(tmp_path, "abc"),
        validation_images=held["images"],
        validation_annotations=held["annotations"],
    )
    split = index_task("t", config, 0)
    assert _stems(split) == {"train": ["a", "b", "c"], "validation": ["a", "x"]}
    assert split["validation"][0][1:] == (f"{held['images']}/a.jpg", f"{held['annotations']}/a.png")
    (tmp_path / "val_annotations" / "x.png").unlink()
    message = f"tasks.t: image without annotation: {held['images']}/x.jpg"
    assert _refused(index_task, "t", config, 0) == message


@pytest.mark.parametrize(
    ("samples", "validation_samples", "expected"),
    [(2, 0, ("ad", "bcefgjkl")), (0, 3, ("adhi", "bce")), (100, 1, ("adhi", "b"))],
)
def test_only_the_first_samples(tmp_path, samples, validation_samples, expected):
    config = TaskConfig(
        **_pairs(tmp_path, "abcdefghijkl"),
        validation_fraction=0.5,
        samples=samples,
        validation_samples=validation_samples,
    )
    assert tuple("".join(stems) for stems in _stems(index_task("t", config, 0)).values()) == expected


def test_a_split_without_samples(tmp_path):
    folders = _pairs(tmp_path, "a")  # 'a' trains at 0.5, see above
    config = TaskConfig(**folders, validation_fraction=0.5)
    message = f"tasks.t: no validation samples (1 pairs in '{folders['images']}')"
    assert _refused(index_task, "t", config, 0) == message
    config = TaskConfig(**_pairs(tmp_path / "other", "bc"), validation_fraction=0.5)
    message = f"tasks.t: no train samples (2 pairs in '{tmp_path / 'other' / 'images'}')"
    assert _refused(index_task, "t", config, 0) == message


# --- the files themselves


def test_pairs_are_read_when_asked_for(tmp_path):
    source = PairedFolders(match_pairs(*_pairs(tmp_path, "ab", suffixes=("png", "png")).values(), "t"))
    assert (len(source), source.name(0), source.name(1)) == (2, "a", "b")
    for index in range(2):
        image, annotation = source[index]
        np.testing.assert_array_equal(image, _picture(index))
        np.testing.assert_array_equal(annotation, _mask(index))


def test_whole_files_are_kept(tmp_path):
    files = match_pairs(*_pairs(tmp_path, "abc").values(), "t")
    for unreadable in ("stop", "skip"):
        assert check_files(files, unreadable) == (files, [])


def test_an_unreadable_file_stops(tmp_path):
    files = match_pairs(*_pairs(tmp_path, "abcdefgh").values(), "t")
    for stem in "gc":
        _cut(tmp_path / "images" / f"{stem}.jpg")
    message = _refused(check_files, files, "stop")
    assert message.startswith(f"{tmp_path / 'images' / 'c.jpg'}: unreadable picture (")  # the first one
    assert message.endswith("; data.unreadable=skip leaves such pairs out")


def test_unreadable_files_are_skipped_and_told(tmp_path):
    files = match_pairs(*_pairs(tmp_path, "abcdef").values(), "t")
    _cut(tmp_path / "images" / "b.jpg")
    _cut(tmp_path / "annotations" / "d.png")
    _save(tmp_path / "annotations" / "e.png", _mask(0, (36, 24)))
    kept, messages = check_files(files, "skip")
    assert kept == [files[0], files[2], files[5]]
    assert len(messages) == 3
    assert messages[0].startswith(f"{tmp_path / 'images' / 'b.jpg'}: unreadable picture (")
    assert messages[1].startswith(f"{tmp_path / 'annotations' / 'd.png'}: unreadable picture (")
    assert messages[2] == f"{tmp_path / 'annotations' / 'e.png'}: 24x36 pixels, its image has 36x24"


def test_shapes_that_differ_stop(tmp_path):
    files = match_pairs(*_pairs(tmp_path, "ab").values(), "t")
    path = _save(tmp_path / "annotations" / "b.png", _mask(0, (12, 36)))
    message = f"{path}: 36x12 pixels, its image has 36x24"
    assert _refused(check_files, files, "stop") == f"{message}; data.unreadable=skip leaves such pairs out"
    assert _refused(PairedFolders(files).__getitem__, 1) == message


# --- the index of all tasks


def test_the_index(tmp_path):
    tasks = {
        "drawn": TaskConfig(**SCENE),
        "t": TaskConfig(**_pairs(tmp_path, "abcdefghijkl"), validation_fraction=0.5),
    }
    split = index_task("t", tasks["t"], 0)
    assert index_data(tasks, DataConfig(), 0) == {
        "drawn": {"train": 5, "validation": 2, "skipped": []},
        "t": {**split, "skipped": []},
    }
    for path in (tmp_path / "images" / "a.jpg", tmp_path / "annotations" / "b.png"):
        _cut(path)
    assert "data.unreadable=skip" in _refused(index_data, tasks, DataConfig(), 0)
    index = index_data(tasks, DataConfig(unreadable="skip"), 0)
    assert [entry[0] for entry in index["t"]["train"]] == list("dhi")
    assert [entry[0] for entry in index["t"]["validation"]] == list("cefgjkl")
    assert [message.split(":")[0] for message in index["t"]["skipped"]] == [
        str(tmp_path / "images" / "a.jpg"),
        str(tmp_path / "annotations" / "b.png"),
    ]


def test_a_task_of_which_nothing_can_be_read(tmp_path):
    tasks = {"t": TaskConfig(**_pairs(tmp_path, "abcd"), validation_fraction=0.5)}
    for stem in "bc":
        _cut(tmp_path / "images" / f"{stem}.jpg")
    message = _refused(index_data, tasks, DataConfig(unreadable="skip"), 0)
    assert message == "tasks.t: no readable validation samples, 2 skipped"


def test_a_task_does_not_train_on_what_it_holds_out(tmp_path):
    folders = _pairs(tmp_path, "ab")
    held = {f"validation_{key}": folder for key, folder in folders.items()}
    message = _refused(index_data, {"t": TaskConfig(**folders, **held)}, DataConfig(), 0)
    picture = (tmp_path / "images" / "a.jpg").resolve()
    assert message == f"tasks.t: held out, but tasks.t trains on it: {picture}"


def test_a_task_does_not_train_on_what_another_holds_out(tmp_path):
    _pairs(tmp_path, "abcd", "others", "labels")
    split = TaskConfig(**_pairs(tmp_path, "abcd"), validation_fraction=0.5)
    # the same photographs, under their own annotations, with a split of their own
    everything = TaskConfig(
        images=str(tmp_path / "images"),
        annotations=str(tmp_path / "labels"),
        validation_images=str(tmp_path / "others"),
        validation_annotations=str(tmp_path / "labels"),
    )
    picture = (tmp_path / "images" / "b.jpg").resolve()  # 'a' trains at 0.5, see above
    for tasks in ({"t": split, "u": everything}, {"u": everything, "t": split}):
        message = _refused(index_data, tasks, DataConfig(), 0)
        assert message == f"tasks.t: held out, but tasks.u trains on it: {picture}"
    alike = TaskConfig(
        images=str(tmp_path / "images"), annotations=str(tmp_path / "labels"), validation_fraction=0.5
    )
    index = index_data({"t": split, "v": alike}, DataConfig(), 0)
    assert [entry[0] for entry in index["v"]["validation"]] == ["b", "c"]


def test_a_link_is_the_same_picture(tmp_path):
    folders = _pairs(tmp_path, "ab")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "z.jpg").symlink_to(tmp_path / "images" / "b.jpg")
    _save(tmp_path / "labels" / "z.png", _mask(0))
    held = {
        "validation_images": str(tmp_path / "links"),
        "validation_annotations": str(tmp_path / "labels"),
    }
    message = _refused(index_data, {"t": TaskConfig(**folders, **held)}, DataConfig(), 0)
    assert message.endswith(f"trains on it: {(tmp_path / 'images' / 'b.jpg').resolve()}")
    # a picture that is not used cannot leak
    index = index_data({"t": TaskConfig(**folders, **held, samples=1)}, DataConfig(), 0)
    assert [entry[0] for entry in index["t"]["train"]] == ["a"]


def test_scenes_and_annotations_do_not_leak():
    files = {"train": [("a", "a.jpg", "same.png")], "validation": [("b", "b.jpg", "same.png")]}
    refuse_leaks({"drawn": {"train": 5, "validation": 2}, "t": files})


def test_the_sources_of_a_split(tmp_path):
    tasks = {
        "t": TaskConfig(**_pairs(tmp_path, "abcd", suffixes=("png", "png")), validation_fraction=0.5),
        "drawn": TaskConfig(**SCENE | {"scene": "deraining"}),
    }
    index = json.loads(json.dumps(index_data(tasks, DataConfig(), 0)))  # as a run keeps it
    for split, stems, number in (("train", "ad", 5), ("validation", "bc", 2)):
        sources = open_sources(index, tasks, split, 3)
        assert list(sources) == ["t", "drawn"]
        assert [sources["t"].name(i) for i in range(len(sources["t"]))] == list(stems)
        np.testing.assert_array_equal(sources["t"][1][0], _picture("abcd".index(stems[1])))
        assert len(sources["drawn"]) == number
        assert sources["drawn"].name(1) == f"deraining-{split}-00001"
        expected = Scenes("deraining", number, split, 3)[1]
        for got, wanted in zip(sources["drawn"][1], expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


# --- the fingerprint


def test_the_fingerprint_changes_with_the_files(tmp_path):
    held = _pairs(tmp_path, "x", "val_images", "val_annotations")
    config = TaskConfig(
        **_pairs(tmp_path, "ab"),
        validation_images=held["images"],
        validation_annotations=held["annotations"],
    )
    tasks = {"t": config}
    seen = [fingerprint(tasks)]
    for folder in ("images", "annotations", "val_images", "val_annotations"):
        path = tmp_path / folder / "c.png"
        _save(path, _picture(0))  # added
        seen.append(fingerprint(tasks))
        facts = path.stat()
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))  # written again, same size
        seen.append(fingerprint(tasks))
        path.write_bytes(path.read_bytes() + b"0")  # another size at the same time
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
        seen.append(fingerprint(tasks))
        path.rename(path.with_stem("d"))
        seen.append(fingerprint(tasks))
    assert len(set(seen)) == len(seen)
    before = seen[-1]
    path.with_stem("d").unlink()
    assert fingerprint(tasks) not in {before, *seen[-4:]}


def test_the_fingerprint_is_stable_otherwise(tmp_path):
    tasks = {"t": TaskConfig(**_pairs(tmp_path, "ab"), validation_fraction=0.5)}
    before = fingerprint(tasks)
    (tmp_path / "images" / "notes.txt").write_text("not a picture")
    (tmp_path / "images" / ".a.jpg").write_text("hidden")
    read_picture(tmp_path / "images" / "a.jpg")
    assert fingerprint(tasks) == before
    assert fingerprint({**tasks, "drawn": TaskConfig(**SCENE)}) == before
    config = TaskConfig(**tasks["t"].__dict__ | {"images": str(tmp_path / "nowhere")})
    assert _refused(fingerprint, {"t": config}) == f"tasks.t.images: no folder '{tmp_path / 'nowhere'}'"


def test_a_link_to_nothing_can_be_skipped(tmp_path):
    tasks = {"t": TaskConfig(**_pairs(tmp_path, "abcd"), validation_fraction=0.5)}
    before = fingerprint(tasks)
    target = tmp_path / "images" / "a.jpg"
    target.unlink()
    target.symlink_to(tmp_path / "gone.jpg")
    index = index_data(tasks, DataConfig(unreadable="skip"), 0)
    assert [entry[0] for entry in index["t"]["train"]] == ["d"]
    assert [message.split(":")[0] for message in index["t"]["skipped"]] == [str(target)]
    broken = fingerprint(tasks)
    _save(tmp_path / "gone.jpg", _picture(0))
    assert len({before, broken, fingerprint(tasks)}) == 3


# --- views


class Memory:
    """Two pairs that stand in no file."""

    def __init__(self, shape=(24, 36), num=2):
        self.pairs = [(_picture(i, shape), _mask(i, shape)) for i in range(num)]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]

    def name(self, index):
        return f"{index}"


def _views(source=None, task="t", num_views=4, seed=0, size=16, **settings):
    config = TaskConfig(images="a", annotations="b", validation_fraction=0.5, **settings)
    return Views(source or Memory(), task, config, size=size, num_views=num_views, seed=seed)


def test_items_are_views_of_samples():
    views = _views(Memory(num=3), num_views=4)
    assert len(views) == 12
    items = torch.stack([views[i] for i in range(12)])
    assert (items.shape, items.dtype) == ((12, 2, 16, 16, 3), torch.uint8)
    # view 0 of a sample: what a single view of each would be
    singles = _views(Memory(num=3), num_views=1)
    assert len(singles) == 3
    for sample in range(3):
        assert torch.equal(views[4 * sample], singles[sample])
    assert len({item.numpy().tobytes() for item in items}) == 12


@pytest.mark.parametrize("policy", ["crops", "segmentation", "pose"])
def test_view_0_is_the_scaled_centre(policy):
    source = Memory((32, 48))
    view = _views(source, policy=policy)[0].numpy()
    for picture, whole in zip(view, source[0], strict=True):
        blocks = whole[:, 8:40].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
        assert abs(picture - blocks).max() <= 1


def test_views_of_upright_pictures_of_the_right_size():
    source = Memory((36, 24))
    view = _views(source, size=24)[0].numpy()
    np.testing.assert_array_equal(view, np.stack([picture[6:30] for picture in source[0]]))


@pytest.mark.parametrize("policy", ["crops", "restoration"])
def test_views_are_the_same_in_any_order(policy):
    views = _views(policy=policy, num_views=6)
    forward = [views[i] for i in range(12)]
    again = _views(policy=policy, num_views=6)
    for i in (7, 3, 11, 3, 0, 8):
        assert torch.equal(again[i], forward[i])
    # more views leave the first ones as they are
    more = _views(policy=policy, num_views=9)
    for i in range(6):
        assert torch.equal(more[i], forward[i])
        assert torch.equal(more[9 + i], forward[6 + i])


def test_seed_and_task_make_other_views():
    first = [_views()[i] for i in range(8)]
    for other in (_views(seed=1), _views(task="u")):
        same = [torch.equal(other[i], first[i]) for i in range(8)]
        assert same == [True, False, False, False] * 2  # view 0 is the pair itself


def test_policy_none_repeats_the_pair():
    views = _views(policy="none")
    assert all(torch.equal(views[i], views[0]) for i in range(4))
    assert not torch.equal(views[4], views[0])


@pytest.mark.parametrize("policy", ["crops", "geometric", "segmentation"])
def test_nearest_keeps_the_colours_of_labels(policy):
    def colours(nearest):
        views = _views(policy=policy, nearest=nearest, num_views=8)
        return {tuple(c) for i in range(16) for c in views[i][1].reshape(-1, 3).tolist()}

    labels = {tuple(c) for c in PALETTE.tolist()}
    assert colours(True) == labels
    assert len(colours(False)) > 100  # averaged: what `nearest` is there to prevent


def test_views_of_files(tmp_path):
    files = match_pairs(*_pairs(tmp_path, "ab", suffixes=("png", "png")).values(), "t")
    from_files, from_memory = _views(PairedFolders(files)), _views(Memory())
    assert len(from_files) == 8
    for i in range(8):
        assert torch.equal(from_files[i], from_memory[i])


def test_every_task_of_the_index_gives_views(tmp_path):
    tasks = {
        "t": TaskConfig(**_pairs(tmp_path, "abcd"), validation_fraction=0.5),
        "drawn": TaskConfig(**SCENE, policy="pose"),
    }
    index = index_data(tasks, DataConfig(), 0)
    for task, source in open_sources(index, tasks, "validation", 0).items():
        views = Views(source, task, tasks[task], size=16, num_views=1, seed=0)
        assert len(views) == 2
        batch = next(iter(torch.utils.data.DataLoader(views, batch_size=2)))
        assert (batch.shape, batch.dtype) == ((2, 2, 16, 16, 3), torch.uint8)
        assert not torch.equal(batch[0], batch[1])
