import csv
import io
import itertools
import json
import os
import pickle
import tarfile
import tracemalloc
import zlib

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from delvm.errors import UserError
from delvm.images.annotate import COCO_KEYPOINTS
from delvm.images.augment import view
from delvm.images.degrade import MAKERS, edges, grey
from delvm.images.files import read_picture
from delvm.images.folders import Pairs
from delvm.images.listing import Entries, Stored
from delvm.images.scenes import Scenes
from delvm.images.sources import (
    SPLITS,
    Views,
    annotation_flags,
    deal,
    fingerprint,
    held_out,
    index_data,
    index_task,
    open_sources,
    split_samples,
)
from delvm.images.tasks import SOURCES, DataConfig, TaskConfig

PALETTE = np.array([(0, 0, 0), (255, 0, 0), (0, 128, 255), (40, 200, 10)], np.uint8)
STEMS = "abcdefghijkl"  # at 0.5 and seed 0, 'adhi' train and 'bcefgjkl' are held out, as pinned below
SCENE = {"scene": "pose", "samples": 5, "validation_samples": 2}


def _picture(seed, shape=(24, 36)):
    """Blocks of one colour, so that a JPEG and a small view still know them. A name is a seed too."""
    seed = zlib.crc32(seed.encode()) if isinstance(seed, str) else seed
    blocks = np.random.default_rng(seed).integers(256, size=(shape[0] // 4, shape[1] // 4, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((4, 4, 1), np.uint8))


def _mask(seed, shape=(24, 36)):
    """Labels of odd sizes: no resampling to 16 pixels falls on their borders."""
    seed = zlib.crc32(seed.encode()) if isinstance(seed, str) else seed
    labels = np.random.default_rng(seed).integers(len(PALETTE), size=(shape[0] // 3 + 1, shape[1] // 3 + 1))
    return PALETTE[np.kron(labels, np.ones((3, 3), int))[: shape[0], : shape[1]]]


def _coordinates(height=64, width=64):
    """Every pixel says where it is; whoever moved it can be found out."""
    rows, columns = np.mgrid[:height, :width].astype(float)
    blue = (rows + columns) * 255 / (height + width - 2)
    channels = (rows * 255 / (height - 1), columns * 255 / (width - 1), blue)
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _save(path, picture, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(picture)).save(path, **settings)
    return path


def _encoded(picture, kind):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return buffer.getvalue()


def _cut(path):
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _refused(function, *arguments):
    """The message with which a call, and the listing of what it returns, is refused; one line."""
    with pytest.raises(UserError) as caught:
        list(function(*arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- tiny cases of every storage; the photograph of a stem is the picture of that seed


def _pairs(root, stems, images="images", annotations="annotations", suffixes=("png", "png")):
    for stem in stems:
        _save(root / images / f"{stem}.{suffixes[0]}", _picture(stem))
        _save(root / annotations / f"{stem}.{suffixes[1]}", _mask(stem))
    return {"images": str(root / images), "annotations": str(root / annotations)}


def _photographs(root, stems):
    for stem in stems:
        _save(root / f"{stem}.png", _picture(stem))
    return {"images": str(root)}


def _classes(root, stems):
    for number, stem in enumerate(stems):
        _save(root / ("cat", "dog")[number % 2] / f"{stem}.png", _picture(stem))
    return {"images": str(root), "source": "classes"}


def _list(root, stems):
    _pairs(root, stems)
    with (root / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "annotation"])
        writer.writerows([f"images/{stem}.png", f"annotations/{stem}.png"] for stem in stems)
    return {"images": str(root / "list.csv"), "source": "list"}


def _coco(root, stems):
    photographs, people = [], []
    joints = {"left_shoulder": (10, 5, 2), "right_shoulder": (25, 5, 2), "left_hip": (12, 20, 2)}
    keypoints = [number for name in COCO_KEYPOINTS for number in joints.get(name, (0, 0, 0))]
    for number, stem in enumerate(stems):
        _save(root / "images" / f"{stem}.png", _picture(stem))
        photographs.append({"id": number, "file_name": f"{stem}.png", "height": 24, "width": 36})
        people.append({"image_id": number, "category_id": 1, "iscrowd": 0, "keypoints": keypoints})
    (root / "person_keypoints.json").write_text(json.dumps({"images": photographs, "annotations": people}))
    return {
        "images": str(root / "images"),
        "annotations": str(root / "person_keypoints.json"),
        "source": "coco",
        "radius": 1,
        "thickness": 2,
    }


def _sa1b(root, stems):
    root.mkdir(parents=True)
    with tarfile.open(root / "sa_000000.tar", "w") as tar:
        for stem in stems:
            mask = {"size": [24, 36], "counts": [24 * 6, 24 * 12, 24 * 18]}  # columns 6 to 17
            text = json.dumps({"annotations": [{"segmentation": mask}]}).encode()
            for name, content in ((f"{stem}.jpg", _encoded(_picture(stem), "jpeg")), (f"{stem}.json", text)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return {"images": str(root), "source": "sa1b"}


def _lmdb(root, stems, annotate=_mask):
    for kind, draw in (("rain.lmdb", _picture), ("clean.lmdb", annotate)):
        (root / kind).mkdir(parents=True)
        environment = lmdb.open(str(root / kind), map_size=1 << 20)
        with environment.begin(write=True) as transaction:
            for stem in stems:
                transaction.put(stem.encode(), _encoded(draw(stem), "png"))
        environment.close()
        lines = "".join(f"{stem}.png (24,36,3) 1\n" for stem in stems)
        (root / kind / "meta_info.txt").write_text(lines)
    return {
        "images": str(root / "rain.lmdb"),
        "annotations": str(root / "clean.lmdb"),
        "source": "lmdb",
    }


def _video(root, stems):
    for stem in stems:
        for number in range(3):
            _save(root / "films" / stem / f"{number}.png", np.roll(_picture(stem), 4 * number, axis=1))
            _save(root / "masks" / stem / f"{number}.png", np.roll(_mask(stem), 4 * number, axis=1))
    return {
        "images": str(root / "films"),
        "annotations": str(root / "masks"),
        "source": "video",
        "frames": 3,
        "stride": 1,
    }


CASES = {
    "pairs": _pairs,
    "pictures": _photographs,
    "classes": _classes,
    "list": _list,
    "coco": _coco,
    "sa1b": _sa1b,
    "lmdb": _lmdb,
    "video": _video,
}
NUM_PICTURES = {"pictures": 1, "classes": 1, "video": 6}  # of a sample; elsewhere 2


def _held(settings):
    """A task's settings as those of its held-out folders."""
    return {f"validation_{key}": settings[key] for key in ("images", "annotations") if key in settings}


def _stem(entry):
    return entry[0].rpartition("/")[2]


def _index(tasks, folder, seed=0, **data):
    """The manifest, as a run keeps it."""
    folder.mkdir(exist_ok=True)
    return json.loads(json.dumps(index_data(tasks, DataConfig(**data), seed, folder)))


def _listed(folder, task="t"):
    """Stems of both lists, without repetition."""
    return tuple("".join(dict.fromkeys(map(_stem, Entries(folder / f"{task}.{split}")))) for split in SPLITS)


def _split(config, seed=0):
    """Stems by split."""
    stems: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, _, entry in split_samples("t", config, seed):
        stems[split].append(_stem(entry))
    return tuple("".join(dict.fromkeys(stems[split])) for split in SPLITS)


# --- what is held out


def test_which_stems_are_held_out():
    # pinned: another split would evaluate earlier models on what they were trained on
    assert "".join(stem for stem in STEMS if held_out(stem, 0.5, 0)) == "bcefgjkl"
    assert "".join(stem for stem in STEMS if held_out(stem, 0.25, 0)) == "cfgkl"
    assert "".join(stem for stem in STEMS if held_out(stem, 0.5, 1)) == "dghj"
    assert held_out("latin\udce9", 1.0, 0)  # a name that is no Unicode


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
    config = TaskConfig(**_pairs(tmp_path, STEMS), validation_fraction=0.5)
    assert _split(config) == ("adhi", "bcefgjkl")
    assert _split(config, seed=1) == ("abcefikl", "dghj")


@pytest.mark.parametrize("source", [name for name in CASES if name != "classes"])
def test_a_stem_is_on_the_same_side_whatever_it_is_stored_in(tmp_path, source):
    config = TaskConfig(**CASES[source](tmp_path / "t", "abcdhl"), validation_fraction=0.5)
    assert config.source == source
    assert _split(config) == ("adh", "bcl")


def test_a_path_is_on_the_same_side_as_class_and_as_picture(tmp_path):
    classes = TaskConfig(**_classes(tmp_path, STEMS), validation_fraction=0.5)
    pictures = TaskConfig(images=str(tmp_path), validation_fraction=0.5)
    held = [f"{('cat', 'dog')[i % 2]}/{stem}" for i, stem in enumerate(STEMS)]
    wanted = {path for path in held if held_out(path, 0.5, 0)}
    for config in (classes, pictures):
        found = {entry[0] for split, _, entry in split_samples("t", config, 0) if split == "validation"}
        assert found == wanted


def test_all_crops_of_a_photograph_are_on_one_side(tmp_path):
    config = TaskConfig(**_sa1b(tmp_path / "t", "abcd"), validation_fraction=0.5)
    sides = {(_stem(entry), split) for split, _, entry in split_samples("t", config, 0)}
    assert sides == {("a", "train"), ("b", "validation"), ("c", "validation"), ("d", "train")}


@pytest.mark.parametrize(
    ("samples", "validation_samples", "expected"),
    [(2, 0, ("ad", "bcefgjkl")), (0, 3, ("adhi", "bce")), (100, 1, ("adhi", "b")), (1, 2, ("a", "bc"))],
)
def test_only_the_first_samples(tmp_path, samples, validation_samples, expected):
    config = TaskConfig(
        **_pairs(tmp_path, STEMS),
        validation_fraction=0.5,
        samples=samples,
        validation_samples=validation_samples,
    )
    assert _split(config) == expected


def test_the_first_samples_of_held_out_folders(tmp_path):
    held = _held(_pairs(tmp_path / "held", "wxyz"))
    config = TaskConfig(**_pairs(tmp_path, "abcd"), **held, samples=3, validation_samples=2)
    assert _split(config) == ("abc", "wx")


def test_nothing_is_listed_beyond_the_first_samples(tmp_path):
    _photographs(tmp_path, STEMS)
    rows = "".join(f"{stem}.png\n" for stem in STEMS)
    (tmp_path / "list.csv").write_text(f"image\n{rows}nowhere.png\n")
    task = {"images": str(tmp_path / "list.csv"), "source": "list", "validation_fraction": 0.5}
    assert _split(TaskConfig(**task, samples=2, validation_samples=3)) == ("ad", "bce")
    for limits in ({}, {"samples": 2}, {"validation_samples": 3}):  # the other side may be further on
        message = _refused(split_samples, "t", TaskConfig(**task, **limits), 0)
        assert message == f"{tmp_path / 'list.csv'}:14: no file 'nowhere.png'"


def _sizes(root, **sizes):
    """A folder a class with so many empty files, 0.png, 1.png, ..., as a task's settings."""
    for name, size in sizes.items():
        (root / name).mkdir(parents=True)
        for number in range(size):
            (root / name / f"{number}.png").touch()
    return {"images": str(root), "source": "classes"}


@pytest.mark.parametrize(
    ("samples", "validation_samples", "expected"),
    [
        (0, 0, (["a/0", "a/1", "a/2", "a/3", "b/0", "c/0", "c/1", "c/2"], ["a/0", "a/1", "c/0", "c/1"])),
        (2, 1, (["a/0", "b/0"], ["a/0"])),
        (5, 3, (["a/0", "a/1", "b/0", "c/0", "c/1"], ["a/0", "a/1", "c/0"])),
        (7, 0, (["a/0", "a/1", "a/2", "b/0", "c/0", "c/1", "c/2"], ["a/0", "a/1", "c/0", "c/1"])),
        (99, 99, (["a/0", "a/1", "a/2", "a/3", "b/0", "c/0", "c/1", "c/2"], ["a/0", "a/1", "c/0", "c/1"])),
    ],
)
def test_the_samples_of_classes_spread_over_them(tmp_path, samples, validation_samples, expected):
    held = _held(_sizes(tmp_path / "held", a=2, c=2))
    config = TaskConfig(
        **_sizes(tmp_path / "train", a=4, b=1, c=3),
        **held,
        samples=samples,
        validation_samples=validation_samples,
    )
    found = {split: [] for split in SPLITS}
    for split, _, entry in split_samples("t", config, 0):
        found[split].append(entry[0])
    assert (found["train"], found["validation"]) == expected


def test_held_out_samples_of_classes_spread_over_them_too(tmp_path):
    folder = _sizes(tmp_path, a=40, b=40, c=40)
    whole = TaskConfig(**folder, validation_fraction=0.5)
    some = TaskConfig(**folder, validation_fraction=0.5, samples=11, validation_samples=7)
    wanted = {split: {name: [] for name in "abc"} for split in SPLITS}
    for split, _, entry in split_samples("t", whole, 0):
        wanted[split][entry[2]].append(entry[0])
    sizes = {"train": {"a": 4, "b": 4, "c": 3}, "validation": {"a": 3, "b": 2, "c": 2}}
    found = [(split, entry[0]) for split, _, entry in split_samples("t", some, 0)]
    for split in SPLITS:
        first = [stem for name, size in sizes[split].items() for stem in wanted[split][name][:size]]
        assert [stem for side, stem in found if side == split] == first
    # a limit of one side alone leaves the other whole
    one = TaskConfig(**folder, validation_fraction=0.5, samples=3)
    held = [entry[0] for split, _, entry in split_samples("t", one, 0) if split == "validation"]
    assert held == list(itertools.chain(*wanted["validation"].values()))


@given(
    st.dictionaries(st.tuples(st.just("train"), st.text(max_size=2)), st.integers(1, 9)), st.integers(1, 40)
)
@examples(max_examples=60, deadline=None)
def test_dealing_is_even(sizes, total):
    dealt = deal(sizes, total)
    assert list(dealt) == list(sizes)
    assert sum(dealt.values()) == min(total, sum(sizes.values()))
    assert all(0 <= dealt[group] <= size for group, size in sizes.items())
    open_ones = [dealt[group] for group, size in sizes.items() if dealt[group] < size]
    if open_ones:  # they had as many as any, but for the last, which the first of them had
        assert max(dealt.values()) - min(open_ones) <= 1
        assert open_ones == sorted(open_ones, reverse=True)


def test_a_split_without_samples(tmp_path):
    config = TaskConfig(**_pairs(tmp_path / "a", "adh"), validation_fraction=0.5, samples=1)
    message = f"tasks.t: no validation samples (3 in all in '{tmp_path / 'a' / 'images'}')"
    assert _refused(split_samples, "t", config, 0) == message
    config = TaskConfig(**_pairs(tmp_path / "b", "bc"), validation_fraction=0.5)
    message = f"tasks.t: no train samples (2 in all in '{tmp_path / 'b' / 'images'}')"
    assert _refused(split_samples, "t", config, 0) == message
    config = TaskConfig(**_sizes(tmp_path / "e", a=3, b=2), validation_fraction=1e-12, samples=2)
    message = f"tasks.t: no validation samples (5 in all in '{tmp_path / 'e'}')"
    assert _refused(split_samples, "t", config, 0) == message
    # photographs, but nobody in them
    held = _coco(tmp_path / "d", "x")
    (tmp_path / "d" / "person_keypoints.json").write_text('{"images": [], "annotations": []}')
    config = TaskConfig(**_coco(tmp_path / "c", "ab"), **_held(held))
    message = f"tasks.t: no validation samples (0 in all in '{held['images']}')"
    assert _refused(split_samples, "t", config, 0) == message


def test_errors_name_the_setting(tmp_path):
    good, nowhere = _pairs(tmp_path, "ab"), str(tmp_path / "nowhere")
    held = _held(_pairs(tmp_path / "held", "xy"))
    for key in ("images", "annotations", "validation_images", "validation_annotations"):
        config = TaskConfig(**good | held | {key: nowhere})
        assert _refused(split_samples, "t", config, 0) == f"tasks.t.{key}: no folder '{nowhere}'"
    (tmp_path / "empty").mkdir()
    config = TaskConfig(**good | held | {"validation_images": str(tmp_path / "empty")})
    message = f"tasks.t.validation_images: no pictures (.jpg, .jpeg, .png) in '{tmp_path / 'empty'}'"
    assert _refused(split_samples, "t", config, 0) == message
    (tmp_path / "held" / "annotations" / "y.png").unlink()
    message = f"tasks.t: image without annotation: {tmp_path / 'held' / 'images' / 'y.png'}"
    assert _refused(split_samples, "t", TaskConfig(**good | held), 0) == message


# --- the lists of one task


def test_the_index_of_a_task(tmp_path):
    config = TaskConfig(**_pairs(tmp_path, STEMS), validation_fraction=0.5)
    part = index_task("t", config, DataConfig(), 0, tmp_path)
    assert part == {"train": 4, "validation": 8, "pictures": 2, "skipped": []}
    assert list(Entries(tmp_path / "t.train")) == [
        [stem, str(tmp_path / "images" / f"{stem}.png"), str(tmp_path / "annotations" / f"{stem}.png")]
        for stem in "adhi"
    ]
    assert _listed(tmp_path) == ("adhi", "bcefgjkl")


def test_an_unreadable_file_stops(tmp_path):
    config = TaskConfig(**_pairs(tmp_path, STEMS), validation_fraction=0.5)
    for stem in "gc":
        _cut(tmp_path / "images" / f"{stem}.png")
    message = _refused(index_task, "t", config, DataConfig(), 0, tmp_path)
    assert message.startswith(f"{tmp_path / 'images' / 'c.png'}: unreadable picture (")  # the first one
    assert message.endswith("; data.unreadable=skip leaves such samples out")


def test_unreadable_files_are_skipped_and_told(tmp_path):
    config = TaskConfig(**_pairs(tmp_path, STEMS), validation_fraction=0.5)
    _cut(tmp_path / "images" / "a.png")
    _cut(tmp_path / "annotations" / "b.png")
    _save(tmp_path / "annotations" / "e.png", _mask(0, (36, 24)))
    part = index_task("t", config, DataConfig(unreadable="skip"), 0, tmp_path)
    assert {key: part[key] for key in ("train", "validation", "pictures")} == {
        "train": 3,
        "validation": 6,
        "pictures": 2,
    }
    assert _listed(tmp_path) == ("dhi", "cfgjkl")
    assert len(part["skipped"]) == 3
    assert part["skipped"][0].startswith(f"{tmp_path / 'images' / 'a.png'}: unreadable picture (")
    assert part["skipped"][1].startswith(f"{tmp_path / 'annotations' / 'b.png'}: unreadable picture (")
    assert part["skipped"][2] == f"{tmp_path / 'annotations' / 'e.png'}: 24x36 pixels, its image has 36x24"


def test_a_task_of_which_nothing_can_be_read(tmp_path):
    tasks = {"t": TaskConfig(**_pairs(tmp_path, "abcd"), validation_fraction=0.5)}
    for stem in "bc":
        _cut(tmp_path / "images" / f"{stem}.png")
    message = _refused(index_data, tasks, DataConfig(unreadable="skip"), 0, tmp_path)
    bad = next(stem for stem in "bc" if stem in message.split("images/")[1])
    assert message.startswith(
        "tasks.t: no readable validation samples, 2 skipped, first:"
        f" {tmp_path / 'images' / bad}.png: unreadable picture ("
    )


def test_all_samples_of_a_task_have_as_many_pictures(tmp_path):
    held = _list(tmp_path / "held", "xy")
    (tmp_path / "held" / "list.csv").write_text("image\nimages/x.png\n")
    config = TaskConfig(**_list(tmp_path / "t", "ab"), **_held(held))
    for unreadable in ("stop", "skip"):
        message = _refused(index_task, "t", config, DataConfig(unreadable=unreadable), 0, tmp_path)
        assert message == "tasks.t: 'x' has 1 pictures, the others 2"


def test_what_is_made_needs_single_photographs(tmp_path):
    config = TaskConfig(**_list(tmp_path / "t", STEMS), make="rain")
    message = _refused(index_task, "t", config, DataConfig(), 0, tmp_path)
    assert message == "tasks.t.make: 'rain' needs single photographs, 'a' has 2 pictures"


def test_a_long_task_takes_no_memory(tmp_path):
    num = 2000
    _save(tmp_path / "a.png", _picture(0, (8, 8)))
    with (tmp_path / "list.csv").open("w") as file:
        file.write("image,name\n")
        file.writelines(f"a.png,{number:02000}\n" for number in range(num))
    config = TaskConfig(images=str(tmp_path / "list.csv"), source="list", validation_fraction=0.5)
    next(split_samples("t", config, 0))  # what an import and the first picture take stays out
    tracemalloc.start()
    try:
        part = index_task("t", config, DataConfig(), 0, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert part["train"] + part["validation"] == num
    assert (tmp_path / "t.train.jsonl").stat().st_size > 1_800_000
    assert peak < 2_000_000  # the entries are 4 MB


# --- the index of all tasks


def test_the_index_of_all_tasks(tmp_path):
    tasks = {
        "drawn": TaskConfig(**SCENE),
        "t": TaskConfig(**_pairs(tmp_path, STEMS), validation_fraction=0.5),
        "rain": TaskConfig(images=str(tmp_path / "images"), make="rain", validation_fraction=0.5),
    }
    assert _index(tasks, tmp_path / "data") == {
        "drawn": {"train": 5, "validation": 2, "pictures": 2, "skipped": [], "dropped": []},
        "t": {"train": 4, "validation": 8, "pictures": 2, "skipped": [], "dropped": []},
        "rain": {"train": 4, "validation": 8, "pictures": 2, "skipped": [], "dropped": []},
    }


def test_scenes_alone_leave_no_lists(tmp_path):
    tasks = {"drawn": TaskConfig(**SCENE)}
    manifest = _index(tasks, tmp_path / "data")
    assert manifest["drawn"]["train"] == 5
    assert list((tmp_path / "data").iterdir()) == []


def test_the_sources_of_a_split(tmp_path):
    tasks = {
        "t": TaskConfig(**_pairs(tmp_path, "abcd"), validation_fraction=0.5),
        "drawn": TaskConfig(**SCENE | {"scene": "deraining"}),
    }
    manifest = _index(tasks, tmp_path / "data")
    for split, stems, number in (("train", "ad", 5), ("validation", "bc", 2)):
        sources = open_sources(manifest, tasks, split, 3, tmp_path / "data")
        assert list(sources) == ["t", "drawn"]
        assert len(sources["t"]) == 2
        for place, stem in enumerate(stems):
            image, annotation = sources["t"][place]
            np.testing.assert_array_equal(image, _picture(stem))
            np.testing.assert_array_equal(annotation, _mask(stem))
        assert len(sources["drawn"]) == number
        expected = Scenes("deraining", number, split, 3)[1]
        for got, wanted in zip(sources["drawn"][1], expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


# --- the same photograph on both sides


@pytest.fixture
def guises(tmp_path):
    """Task t holds out 'b' and 'c'; u trains on them under other names: re-encoded, mirrored."""
    t = TaskConfig(**_pairs(tmp_path / "t", "abcd"), validation_fraction=0.5)
    folder = tmp_path / "u"
    _save(folder / "1.jpg", _picture("b"), quality=60)
    _save(folder / "2.png", _picture("c")[:, ::-1])
    _save(folder / "3.jpg", _picture("a"), quality=60)  # trained on by both: no harm
    _save(folder / "4.png", _picture("unrelated"))
    held = _photographs(tmp_path / "held", "xy")
    return {"t": t, "u": TaskConfig(images=str(folder), **_held(held))}


@pytest.mark.parametrize("order", ["tu", "ut"])
def test_what_another_task_holds_out_is_dropped_and_named(tmp_path, guises, order):
    tasks = {task: guises[task] for task in order}
    manifest = _index(tasks, tmp_path / "data")
    assert list(manifest) == list(order)
    assert manifest["t"] == {"train": 2, "validation": 2, "pictures": 2, "skipped": [], "dropped": []}
    assert manifest["u"] == {
        "train": 2,
        "validation": 2,
        "pictures": 1,
        "skipped": [],
        "dropped": [
            "tasks.u: '1' is nearly 'b' held out by tasks.t",
            "tasks.u: '2' is nearly 'c' held out by tasks.t",
        ],
    }
    assert _listed(tmp_path / "data", "u") == ("34", "xy")
    train = open_sources(manifest, tasks, "train", 0, tmp_path / "data")
    assert {task: len(samples) for task, samples in train.items()} == {"t": 2, "u": 2}
    np.testing.assert_array_equal(train["u"][1][0], _picture("unrelated"))
    assert not list((tmp_path / "data").glob(".*"))


def test_duplicates_can_be_kept(tmp_path, guises):
    manifest = _index(guises, tmp_path / "data", duplicates="keep")
    assert (manifest["u"]["train"], manifest["u"]["dropped"]) == (4, [])
    assert _listed(tmp_path / "data", "u") == ("1234", "xy")


def test_a_task_does_not_train_on_what_it_holds_out(tmp_path):
    folders = _pairs(tmp_path, "ab")
    tasks = {"t": TaskConfig(**folders, **_held(folders))}
    message = _refused(index_data, tasks, DataConfig(), 0, tmp_path)
    assert message == (
        "tasks.t: no training samples left, all are held out too:"
        " tasks.t: 'a' is nearly 'a' held out by tasks.t"
    )
    assert _index(tasks, tmp_path / "data", duplicates="keep")["t"]["train"] == 2


def test_a_picture_that_is_not_used_cannot_leak(tmp_path):
    folders = _pairs(tmp_path, "ab")
    held = _held(_pairs(tmp_path / "held", "bxy"))
    assert _index({"t": TaskConfig(**folders, **held)}, tmp_path / "1")["t"]["dropped"] == [
        "tasks.t: 'b' is nearly 'b' held out by tasks.t"
    ]
    assert _index({"t": TaskConfig(**folders, **held, samples=1)}, tmp_path / "2")["t"]["dropped"] == []
    (tmp_path / "held" / "images" / "b.png").rename(tmp_path / "held" / "images" / "z.png")
    (tmp_path / "held" / "annotations" / "b.png").rename(tmp_path / "held" / "annotations" / "z.png")
    config = TaskConfig(**folders, **held, validation_samples=2)
    assert _index({"t": config}, tmp_path / "3")["t"]["dropped"] == []


def test_the_same_annotation_is_no_leak(tmp_path):
    folders = _pairs(tmp_path, "abcd")
    for stem in "abcd":
        _save(tmp_path / "annotations" / f"{stem}.png", _mask(0))
    config = TaskConfig(**folders, validation_fraction=0.5)
    assert _index({"t": config}, tmp_path / "data")["t"]["dropped"] == []


@pytest.mark.parametrize(("policy", "dropped"), [("restoration", ["b"]), ("crops", [])])
def test_restoration_compares_the_clean_picture(tmp_path, policy, dropped):
    # every image differs, as under heavy rain; the clean picture of 'b' is that of the held-out 'x'
    for stem, clean in (("a", "one"), ("b", "two"), ("x", "two"), ("y", "three")):
        folder = tmp_path / ("held" if stem in "xy" else "train")
        _save(folder / "images" / f"{stem}.png", _picture(f"rainy {stem}"))
        _save(folder / "annotations" / f"{stem}.png", _picture(clean))
    folders = [{key: str(tmp_path / side / key) for key in ("images", "annotations")} for side in
               ("train", "held")]  # fmt: skip
    config = TaskConfig(**folders[0], **_held(folders[1]), policy=policy)
    messages = [f"tasks.t: '{stem}' is nearly 'x' held out by tasks.t" for stem in dropped]
    assert _index({"t": config}, tmp_path / "data")["t"]["dropped"] == messages


# --- every storage, from its settings to views


def test_there_is_a_case_of_every_source():
    assert set(CASES) == set(SOURCES)


@pytest.mark.parametrize("source", CASES)
def test_every_source_gives_views(tmp_path, source):
    config = TaskConfig(**CASES[source](tmp_path / "t", STEMS), validation_fraction=0.5)
    manifest = _index({"t": config}, tmp_path / "data")
    num = NUM_PICTURES.get(source, 2)
    entries = list(split_samples("t", config, 0))
    counts = {split: sum(entry[0] == split for entry in entries) for split in SPLITS}
    assert sum(counts.values()) == len(STEMS) * (6 if source == "sa1b" else 1)
    assert manifest["t"] == {**counts, "pictures": num, "skipped": [], "dropped": []}
    for split in SPLITS:
        samples = open_sources(manifest, {"t": config}, split, 0, tmp_path / "data")["t"]
        views = Views(samples, "t", config, size=16, num_views=2, seed=0)
        assert len(views) == 2 * counts[split]
        stem = _stem(samples.entries[0])
        for picture in samples[0]:
            assert picture.shape == ((24, 24, 3) if source == "sa1b" else (24, 36, 3))
        if source == "sa1b":  # a JPEG, and its upper left
            assert abs(samples[0][0].astype(int) - _picture(stem)[:, :24]).mean() < 20
        else:
            np.testing.assert_array_equal(samples[0][0], _picture(stem))
        if num > 1 and source not in ("coco", "sa1b"):
            np.testing.assert_array_equal(samples[0][1], _mask(stem))
        elif num > 1:  # drawn on black
            assert 0 < samples[0][1].any(axis=-1).mean() < 0.6
        scaled = view(samples[0], (False,) * num, policy="none", size=16, nearest=False, seed=(0,))
        assert torch.equal(views[0], torch.from_numpy(np.stack(scaled)))
        assert (views[1].shape, views[1].dtype) == ((num, 16, 16, 3), torch.uint8)
        assert not torch.equal(views[0], views[1])


@pytest.mark.parametrize("source", CASES)
def test_held_out_folders_of_every_source(tmp_path, source):
    settings, held = (CASES[source](tmp_path / side, stems) for side, stems in
                      (("train", "abc"), ("held", "wxyz")))  # fmt: skip
    config = TaskConfig(**settings, **_held(held))
    manifest = _index({"t": config}, tmp_path / "data")
    each = 6 if source == "sa1b" else 1
    assert (manifest["t"]["train"], manifest["t"]["validation"]) == (3 * each, 4 * each)
    both = ["".join(sorted(stems)) for stems in _listed(tmp_path / "data")]
    assert both == ["abc", "wxyz"]
    for split, stem in (("train", "a"), ("validation", "w")):
        samples = open_sources(manifest, {"t": config}, split, 0, tmp_path / "data")["t"]
        assert _stem(samples.entries[0]) == stem
        error = abs(samples[0][0].astype(int) - _picture(stem)[:, : samples[0][0].shape[1]]).mean()
        assert error < 20 if source == "sa1b" else error == 0


def test_the_classes_of_samples(tmp_path):
    config = TaskConfig(**_classes(tmp_path / "t", STEMS), validation_fraction=0.5)
    manifest = _index({"t": config}, tmp_path / "data")
    for split in SPLITS:
        samples = open_sources(manifest, {"t": config}, split, 0, tmp_path / "data")["t"]
        classes = Views(samples, "t", config, size=16, num_views=3, seed=0).classes()
        names = [entry[0].split("/")[0] for entry in samples.entries]
        assert len(set(names)) == 2
        assert (classes.dtype, classes.tolist()) == (np.int64, [int(name == "dog") for name in names])


def test_views_reach_a_worker(tmp_path):
    tasks = {
        "t": TaskConfig(**_lmdb(tmp_path / "t", "abcd"), validation_fraction=0.5),
        "drawn": TaskConfig(**SCENE, policy="pose"),
    }
    manifest = _index(tasks, tmp_path / "data")
    for task, samples in open_sources(manifest, tasks, "validation", 0, tmp_path / "data").items():
        views = Views(samples, task, tasks[task], size=16, num_views=3, seed=0)
        loader = torch.utils.data.DataLoader(views, batch_size=4, num_workers=1)
        batch = torch.cat(list(loader))
        assert (batch.shape, batch.dtype) == ((6, 2, 16, 16, 3), torch.uint8)
        travelled = pickle.loads(pickle.dumps(views))
        for number in (5, 0, 3, 1):
            assert torch.equal(batch[number], views[number])
            assert torch.equal(travelled[number], views[number])


# --- the fingerprint


def _changes(tasks, path):
    """The fingerprints with a file added, touched, grown, renamed and removed again."""
    seen = [fingerprint(tasks)]
    _save(path, _picture(0))
    seen.append(fingerprint(tasks))
    facts = path.stat()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))  # written again, same size
    seen.append(fingerprint(tasks))
    path.write_bytes(path.read_bytes() + b"0")  # another size at the same time
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    seen.append(fingerprint(tasks))
    path = path.rename(path.with_stem("renamed"))
    seen.append(fingerprint(tasks))
    path.unlink()
    assert fingerprint(tasks) == seen[0]
    return seen


@pytest.mark.parametrize("below", ["", "inner", "inner/most"])
def test_the_fingerprint_changes_with_the_files(tmp_path, below):
    kinds = ("images", "annotations", "depth")
    for folder in (*kinds, *(f"held/{kind}" for kind in kinds)):
        _save(tmp_path / folder / "a.png", _picture(0))
    config = TaskConfig(
        images=str(tmp_path / "images"),
        annotations=str(tmp_path / "annotations"),
        more_annotations={"depth": str(tmp_path / "depth")},
        validation_images=str(tmp_path / "held" / "images"),
        validation_annotations=str(tmp_path / "held" / "annotations"),
        validation_more_annotations={"depth": str(tmp_path / "held" / "depth")},
    )
    for folder, kind in itertools.product((".", "held"), kinds):
        seen = _changes({"t": config}, tmp_path / folder / kind / below / "c.png")
        assert len(set(seen)) == len(seen) == 5


@pytest.mark.parametrize("source", CASES)
def test_the_fingerprint_knows_every_file_of_a_source(tmp_path, source):
    settings, held = (CASES[source](tmp_path / side, "ab") for side in ("train", "held"))
    tasks = {"t": TaskConfig(**settings, **_held(held))}
    seen = [fingerprint(tasks)]
    for file in sorted(tmp_path.rglob("*")):
        if file.is_file() and file.name != "lock.mdb":
            facts = file.stat()
            os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
            seen.append(fingerprint(tasks))
    assert len(set(seen)) == len(seen) >= 3


def test_the_fingerprint_of_a_pattern(tmp_path):
    _sa1b(tmp_path / "tars", "ab")
    tasks = {"t": TaskConfig(images=str(tmp_path / "tars" / "sa_*.tar"), source="sa1b")}
    before = fingerprint(tasks)
    (tmp_path / "tars" / "other.tar").write_text("not in the pattern")
    assert fingerprint(tasks) == before
    (tmp_path / "tars" / "sa_000001.tar").write_text("in the pattern")
    assert fingerprint(tasks) != before


def test_the_fingerprint_follows_linked_folders(tmp_path):
    _photographs(tmp_path / "elsewhere", STEMS)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    config = TaskConfig(images=str(tmp_path / "images"), validation_fraction=0.5)
    assert sorted("".join(_split(config))) == sorted(STEMS)  # they are read, too
    assert len(set(_changes({"t": config}, tmp_path / "elsewhere" / "new.png"))) == 5


def test_the_fingerprint_is_stable_otherwise(tmp_path):
    tasks = {"t": TaskConfig(**_pairs(tmp_path, "ab"), validation_fraction=0.5)}
    before = fingerprint(tasks)
    (tmp_path / "images" / ".a.png").write_text("hidden")
    (tmp_path / "images" / ".cache").mkdir()
    (tmp_path / "images" / ".cache" / "b.png").write_text("in a hidden folder")
    read_picture(tmp_path / "images" / "a.png")
    assert fingerprint(tasks) == before
    assert fingerprint({**tasks, "drawn": TaskConfig(**SCENE)}) == before
    nowhere = TaskConfig(images=str(tmp_path / "nowhere"))
    assert fingerprint({**tasks, "u": nowhere}) == before  # to be refused when it is listed


def test_the_fingerprint_of_names_that_are_no_unicode(tmp_path):
    name = os.fsdecode(b"\xe9.png")
    _save(tmp_path / name, _picture("b"))
    _photographs(tmp_path, "abcd")
    tasks = {"t": TaskConfig(images=str(tmp_path), validation_fraction=0.5)}
    before = fingerprint(tasks)
    manifest = _index(tasks, tmp_path / ".data", duplicates="keep")
    names = [entry[0] for split in SPLITS for entry in Entries(tmp_path / ".data" / f"t.{split}")]
    assert sorted(names) == sorted(["a", "b", "c", "d", os.fsdecode(b"\xe9")])
    assert manifest["t"]["train"] + manifest["t"]["validation"] == 5
    os.utime(tmp_path / name, ns=(1, 1))
    assert fingerprint(tasks) != before


def test_a_link_to_nothing_can_be_skipped(tmp_path):
    tasks = {"t": TaskConfig(**_pairs(tmp_path, "abcd"), validation_fraction=0.5)}
    before = fingerprint(tasks)
    target = tmp_path / "images" / "a.png"
    target.unlink()
    target.symlink_to(tmp_path / "gone.png")
    manifest = _index(tasks, tmp_path / "data", unreadable="skip")
    assert _listed(tmp_path / "data") == ("d", "bc")
    assert [message.split(":")[0] for message in manifest["t"]["skipped"]] == [str(target)]
    broken = fingerprint(tasks)
    _save(tmp_path / "gone.png", _picture(0))
    assert len({before, broken, fingerprint(tasks)}) == 3


# --- views


def _memory(shape=(24, 36), num=2):
    """Pairs that stand in no file."""
    return [[_picture(i, shape), _mask(i, shape)] for i in range(num)]


def _views(samples=None, task="t", num_views=4, seed=0, size=16, **settings):
    config = TaskConfig(**({} if settings.get("make") else {"annotations": "b"}), images="a", **settings)
    return Views(samples or _memory(), task, config, size=size, num_views=num_views, seed=seed)


def test_which_pictures_are_annotations():
    assert annotation_flags(1, 1) == (False,)
    assert annotation_flags(2, 1) == (False, True)
    assert annotation_flags(4, 1) == (False, True, True, True)
    assert annotation_flags(3, 3) == (False, False, False)
    assert annotation_flags(6, 3) == (False, True, False, True, False, True)


def test_items_are_views_of_samples():
    views = _views(_memory(num=3), num_views=4)
    assert len(views) == 12
    items = torch.stack([views[i] for i in range(12)])
    assert (items.shape, items.dtype) == ((12, 2, 16, 16, 3), torch.uint8)
    # view 0 of a sample: what a single view of each would be
    singles = _views(_memory(num=3), num_views=1)
    assert len(singles) == 3
    for sample in range(3):
        assert torch.equal(views[4 * sample], singles[sample])
    assert len({item.numpy().tobytes() for item in items}) == 12
    assert torch.equal(views.view(2, 1), items[9])
    assert not torch.equal(views.view(2, 7), items[11])  # one that is not stored


@pytest.mark.parametrize("policy", ["crops", "segmentation", "pose"])
def test_view_0_is_the_scaled_centre(policy):
    samples = _memory((32, 48))
    view = _views(samples, policy=policy)[0].numpy()
    for picture, whole in zip(view, samples[0], strict=True):
        blocks = whole[:, 8:40].reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
        assert abs(picture - blocks).max() <= 1


def test_views_of_upright_pictures_of_the_right_size():
    samples = _memory((36, 24))
    view = _views(samples, size=24)[0].numpy()
    np.testing.assert_array_equal(view, np.stack([picture[6:30] for picture in samples[0]]))


@pytest.mark.parametrize(
    "settings", [{"policy": "crops"}, {"policy": "restoration"}, {"policy": "geometric", "make": "noise"}]
)
def test_views_are_the_same_in_any_order(settings):
    samples = [sample[:1] for sample in _memory()] if "make" in settings else None
    views = _views(samples, num_views=6, **settings)
    forward = [views[i] for i in range(12)]
    again = _views(samples, num_views=6, **settings)
    for i in (7, 3, 11, 3, 0, 8):
        assert torch.equal(again[i], forward[i])
    # more views leave the first ones as they are
    more = _views(samples, num_views=9, **settings)
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
    for number in range(2):
        _save(tmp_path / "images" / f"{number}.png", _picture(number))
        _save(tmp_path / "annotations" / f"{number}.png", _mask(number))
    folders = {key: str(tmp_path / key) for key in ("images", "annotations")}
    config = TaskConfig(**folders, **_held(folders))
    manifest = _index({"t": config}, tmp_path / "data", duplicates="keep")
    samples = open_sources(manifest, {"t": config}, "train", 0, tmp_path / "data")["t"]
    assert isinstance(samples, Stored)
    assert isinstance(samples.storage, Pairs)
    from_files, from_memory = _views(samples), _views()
    assert len(from_files) == 8
    for i in range(8):
        assert torch.equal(from_files[i], from_memory[i])


def _sample_of_coordinates(root, kind):
    """A task's settings, where all pictures of a sample are alike; how many they are."""
    if kind == "clip":
        for folder, number in itertools.product(("images", "annotations"), range(3)):
            _save(root / folder / "a" / f"{number}.png", _coordinates())
        settings = {"source": "video", "frames": 3, "stride": 1}
    else:
        for folder in ("images", "annotations", "depth", "boxes"):
            _save(root / folder / "a.png", _coordinates())
        settings = {"more_annotations": {name: str(root / name) for name in ("depth", "boxes")}}
    folders = {"images": str(root / "images"), "annotations": str(root / "annotations")}
    held = {f"validation_{key}": value for key, value in (folders | settings).items() if key in
            ("images", "annotations", "more_annotations")}  # fmt: skip
    return folders | settings | held, 6 if kind == "clip" else 4


@pytest.mark.parametrize("policy", ["crops", "geometric"])
@pytest.mark.parametrize("kind", ["clip", "kinds"])
def test_all_pictures_of_a_sample_move_together(tmp_path, kind, policy):
    settings, num = _sample_of_coordinates(tmp_path, kind)
    config = TaskConfig(**settings, policy=policy)
    manifest = _index({"t": config}, tmp_path / "data", duplicates="keep")
    assert (manifest["t"]["train"], manifest["t"]["pictures"]) == (1, num)
    samples = open_sources(manifest, {"t": config}, "train", 0, tmp_path / "data")["t"]
    views = Views(samples, "t", config, size=32, num_views=8, seed=0)
    items = [views[i].numpy().astype(int) for i in range(8)]
    for item in items:
        assert item.shape == (num, 32, 32, 3)
        assert abs(item - item[0]).max() <= 2  # images and annotations may round differently
    for one, other in itertools.combinations(items, 2):  # and they do move
        assert abs(one - other).mean() > 3


def test_colours_of_a_clip_change_in_all_frames_and_in_no_annotation(tmp_path):
    for number in range(3):
        _save(tmp_path / "films" / "a" / f"{number}.png", _coordinates())
        _save(tmp_path / "masks" / "a" / f"{number}.png", _mask("a", (64, 64)))
    folders = {"images": str(tmp_path / "films"), "annotations": str(tmp_path / "masks")}
    clip = {"source": "video", "frames": 3, "stride": 1, "policy": "segmentation", "nearest": True}
    config = TaskConfig(**folders, **_held(folders), **clip)
    manifest = _index({"t": config}, tmp_path / "data", duplicates="keep")
    samples = open_sources(manifest, {"t": config}, "train", 0, tmp_path / "data")["t"]
    views = Views(samples, "t", config, size=32, num_views=6, seed=0)
    labels = {tuple(colour) for colour in PALETTE.tolist()}
    for number in range(1, 6):
        item = views[number].numpy()
        for frame in (2, 4):
            np.testing.assert_array_equal(item[frame], item[0])
            np.testing.assert_array_equal(item[frame + 1], item[1])
        assert {tuple(colour) for colour in item[1].reshape(-1, 3).tolist()} == labels


# --- what is made of a photograph


def _made(make, policy="geometric", **settings):
    """Views of one photograph twice, 64 x 64: with what is made of them, and plain."""
    samples = [[_picture(0, (96, 128))]] * 2
    made = _views(samples, size=64, make=make, policy=policy, **settings)
    plain = Views(samples, "t", TaskConfig(images="a", policy=policy), size=64, num_views=4, seed=0)
    return made, plain


@pytest.mark.parametrize("make", MAKERS)
def test_image_and_annotation_are_made_of_the_same_view(make):
    made, plain = _made(make)
    assert len(made) == len(plain) == 8
    for number in range(8):
        image, annotation = made[number].numpy()
        (photograph,) = plain[number].numpy()
        if make == "edges":
            np.testing.assert_array_equal(image, photograph)
            np.testing.assert_array_equal(annotation, edges(photograph))
        else:
            np.testing.assert_array_equal(annotation, photograph)
            assert not np.array_equal(image, photograph)
        if make == "colour":
            np.testing.assert_array_equal(image, grey(photograph))


@pytest.mark.parametrize("make", [name for name in MAKERS if name not in ("colour", "edges")])
def test_what_is_made_depends_on_seed_task_sample_and_view(make):
    made, _ = _made(make, policy="none")  # all views show the same
    items = [made[number] for number in range(8)]
    assert all(torch.equal(item[1], items[0][1]) for item in items)
    assert len({item[0].numpy().tobytes() for item in items}) == 8  # 2 samples of 4 views
    again = _made(make, policy="none")[0]
    for number in (6, 0, 5, 5):
        assert torch.equal(again[number], items[number])
    for settings in ({"seed": 1}, {"task": "u"}):
        other = _made(make, policy="none", **settings)[0]
        for number in range(8):
            assert torch.equal(other[number][1], items[number][1])
            assert not torch.equal(other[number][0], items[number][0])


@pytest.mark.parametrize("make", MAKERS)
def test_pictures_from_which_something_is_made(tmp_path, make):
    config = TaskConfig(**_photographs(tmp_path / "t", STEMS), validation_fraction=0.5, make=make)
    manifest = _index({"t": config}, tmp_path / "data")
    assert manifest["t"] == {"train": 4, "validation": 8, "pictures": 2, "skipped": [], "dropped": []}
    samples = open_sources(manifest, {"t": config}, "validation", 0, tmp_path / "data")["t"]
    views = Views(samples, "t", config, size=16, num_views=1, seed=0)
    batch = next(iter(torch.utils.data.DataLoader(views, batch_size=8)))
    assert (batch.shape, batch.dtype) == ((8, 2, 16, 16, 3), torch.uint8)
    clean = batch[:, 0 if make == "edges" else 1].numpy()
    for place, stem in enumerate("bcefgjkl"):
        (scaled,) = view([_picture(stem)], (False,), policy="none", size=16, nearest=False, seed=(0,))
        np.testing.assert_array_equal(clean[place], scaled)
