import math
import re
from dataclasses import asdict

import pytest

from delvm.images.coco import Coco
from delvm.images.folders import Classes, Listed, Pairs, Pictures
from delvm.images.lmdb import Lmdb
from delvm.images.sa1b import Sa1b
from delvm.images.tasks import OWN, SOURCES, TOKEN_SOURCES, DataConfig, TaskConfig, open_storage
from delvm.images.video import Video

PAIRS = {"images": "a", "annotations": "b", "validation_fraction": 0.5}
HELD = {"validation_images": "c", "validation_annotations": "d"}
SCENE = {"scene": "pose", "samples": 5, "validation_samples": 2}


def _kind(source, **settings):
    """The least that a source needs, and more."""
    needed = {"images": "a"} | ({"annotations": "b"} if source in ("pairs", "coco") else {})
    return {"source": source, **needed, **settings}


# --- settings


def test_defaults_of_a_task():
    task = TaskConfig(images="a", annotations="b")
    assert (task.policy, task.nearest, task.samples, task.validation_samples) == ("crops", False, 0, 0)
    assert (task.validation_fraction, task.make, task.more_annotations) == (0.2, "", {})
    # LVM's clips of videos, DeLVM's skeletons
    assert (task.stride, task.random_stride) == (8, 0)
    assert (task.draw, task.radius, task.thickness, task.crops) == ("skeletons", 8, 4, True)
    data = DataConfig()
    assert (data.image_size, data.unreadable, data.duplicates) == (256, "stop", "drop")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 7}, "image_size: 7 must be at least 8"),
        ({"image_size": -32}, "image_size: -32 must be at least 8"),
        ({"unreadable": "ignore"}, "unreadable: 'ignore' is unknown; choices: stop, skip"),
        ({"duplicates": "stop"}, "duplicates: 'stop' is unknown; choices: drop, keep"),
    ],
)
def test_data_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DataConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({"images": "a"}, "pictures"),
        ({"images": "a", "annotations": "b"}, "pairs"),
        (SCENE, "scene"),
        (SCENE | {"source": "scene"}, "scene"),
        ({"images": "a", "source": "classes"}, "classes"),
        ({"images": "a", "annotations": "b", "source": "lmdb"}, "lmdb"),
    ],
)
def test_the_source_follows_from_what_is_given(settings, source):
    config = TaskConfig(**settings)
    assert config.source == source
    assert TaskConfig(**asdict(config)) == config  # as a run keeps it


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            PAIRS | {"policy": "crop"},
            "policy: 'crop' is unknown; choices: none, crops, geometric, segmentation, restoration, pose",
        ),
        (
            PAIRS | {"policy": "restoration", "nearest": True},
            "policy: 'restoration' changes the colours that nearest keeps as labels;"
            " choices: none, crops, geometric, segmentation, pose",
        ),
        (
            PAIRS | {"source": "folder"},
            "source: 'folder' is unknown;"
            " choices: pairs, pictures, classes, list, coco, sa1b, lmdb, video, scene, delvm, lvm",
        ),
        (
            {"images": "a", "make": "snow"},
            "make: 'snow' is unknown; choices: rain, blur, noise, low_light, colour, inpainting, edges",
        ),
        (_kind("coco", draw="joints"), "draw: 'joints' is unknown; choices: skeletons, masks, boxes"),
        (PAIRS | {"samples": -1}, "samples: -1 must be at least 0"),
        (PAIRS | {"validation_samples": -2}, "validation_samples: -2 must be at least 0"),
        (_kind("coco", radius=-1), "radius: -1 must be at least 0"),
        (_kind("coco", thickness=0), "thickness: 0 must be at least 1"),
        (_kind("video", frames=-1), "frames: -1 must be at least 0"),
        *(
            (
                task | {"policy": policy},
                f"policy: '{policy}' mirrors skeletons but not the colours of left and right limbs;"
                " choices: none, pose",
            )
            for task in (_kind("coco"), SCENE)
            for policy in ("crops", "geometric", "segmentation", "restoration")
        ),
        (
            _kind("pictures", make="rain", ranges={"slant": [0.0, 9.0]}),
            "ranges.slant: make 'rain' has no such range; choices: streaks, length, opacity, angle",
        ),
        (
            _kind("pictures", make="edges", ranges={"sigma": [0.0, 9.0]}),
            "ranges.sigma: make 'edges' has no such range; choices: none",
        ),
        (
            _kind("pictures", ranges={"sigma": [0.0, 9.0]}),
            "ranges.sigma: make '' has no such range; choices: none",
        ),
        *(
            (
                _kind("pictures", make="noise", ranges={"sigma": values}),
                f"ranges.sigma: {values} must be [lowest, highest]",
            )
            for values in ([1.0], [2.0, 1.0], [0.0, math.inf])
        ),
        (_kind("lvm", policy="crops"), "policy: 'crops' needs pictures, source 'lvm' has tokens"),
        (_kind("video", stride=0), "stride: 0 must be at least 1"),
        (_kind("video", random_stride=-1), "random_stride: -1 must be at least 0"),
        (_kind("video", stride=2, random_stride=4), "stride, random_stride: exclude each other"),
        # scenes
        *(
            (SCENE | {key: value}, "scene: 'pose' and folders exclude each other")
            for key, value in {
                "images": "a",
                "annotations": "a",
                "more_annotations": {"depth": "a"},
                "validation_images": "a",
                "validation_annotations": "a",
                "validation_more_annotations": {"depth": "a"},
            }.items()
        ),
        (SCENE | {"scene": "poses"}, "scene: 'poses' is unknown; choices: segmentation, deraining, pose"),
        ({"source": "scene"}, "scene: '' is unknown; choices: segmentation, deraining, pose"),
        (SCENE | {"samples": 0}, "samples: a scene needs at least 1"),
        (SCENE | {"validation_samples": 0}, "validation_samples: a scene needs at least 1"),
        (SCENE | {"make": "rain"}, "make: 'rain' needs photographs; a scene has its annotations"),
        (SCENE | {"source": "pairs"}, "scene: 'pose' and source 'pairs' exclude each other"),
        # what is missing
        ({}, "images: missing; source 'pictures' needs images; or give a scene"),
        (
            {"annotations": "b"},
            "images: missing; source 'pairs' needs images and annotations; or give a scene",
        ),
        (
            {"source": "coco", "images": "a"},
            "annotations: missing; source 'coco' needs images and annotations; or give a scene",
        ),
        ({"source": "sa1b"}, "images: missing; source 'sa1b' needs images; or give a scene"),
        # annotations where there can be none
        *(
            (_kind(source, annotations="b"), f"annotations: source '{source}' takes none")
            for source in ("pictures", "classes", "list", "sa1b", "delvm", "lvm")
        ),
        ({"images": "a"} | HELD, "validation_annotations: source 'pictures' takes none"),
        (
            _kind("coco", more_annotations={"depth": "c"}),
            "more_annotations: they go with annotations; sources: pairs, lmdb",
        ),
        (
            _kind("lmdb", more_annotations={"depth": "c"}),
            "more_annotations: they go with annotations; sources: pairs, lmdb",
        ),
        (
            PAIRS | {"validation_more_annotations": {"depth": "c"}},
            "validation_more_annotations: they go with annotations; sources: pairs, lmdb",
        ),
        # held-out folders
        *(
            (PAIRS | {key: "c"}, "validation_images, validation_annotations: give both or neither")
            for key in HELD
        ),
        (_kind("lmdb") | HELD, "annotations: missing; validation_annotations are given"),
        *(
            (
                PAIRS | HELD | {"more_annotations": more, "validation_more_annotations": held},
                "more_annotations, validation_more_annotations: give the same names in the same order",
            )
            for more, held in [
                ({"depth": "e"}, {}),
                ({}, {"depth": "e"}),
                ({"depth": "e"}, {"edges": "e"}),
                ({"depth": "e", "edges": "f"}, {"edges": "f", "depth": "e"}),
            ]
        ),
        *(
            (
                PAIRS | {"validation_fraction": fraction},
                f"validation_fraction: {fraction} must lie between 0 and 1, or give validation_images and"
                " validation_annotations",
            )
            for fraction in (0.0, 1.0, -0.1, 20.0, float("nan"))
        ),
        (
            {"images": "a", "validation_fraction": 0.0},
            "validation_fraction: 0.0 must lie between 0 and 1, or give validation_images",
        ),
        # what would be ignored
        *(
            (settings | {"make": "rain"}, "make: 'rain' makes the annotations; give single photographs alone")
            for settings in (
                PAIRS,
                _kind("coco"),
                _kind("sa1b"),
                _kind("lvm"),
                _kind("video"),
                _kind("lmdb", annotations="b"),
            )
        ),
        *(
            (
                settings | {"nearest": True},
                "nearest: there are no annotations whose colours it could keep",
            )
            for settings in (
                {"images": "a"},
                {"images": "a", "make": "edges"},
                _kind("list", make="edges"),
                _kind("classes"),
                _kind("lmdb"),
                _kind("video"),
            )
        ),
    ],
)
def test_task_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TaskConfig(**settings)


@pytest.mark.parametrize("key", OWN)
def test_settings_of_another_source_are_refused(key):
    changed = {"draw": "masks", "crops": False}.get(key, 3)
    for source in OWN[key]:
        assert getattr(TaskConfig(**_kind(source, **{key: changed})), key) == changed
    for source in (*SOURCES, *TOKEN_SOURCES, "scene"):
        if source not in OWN[key]:
            settings = SCENE if source == "scene" else _kind(source)
            message = f"{key}: source '{source}' has no such setting; sources: {', '.join(OWN[key])}"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                TaskConfig(**settings, **{key: changed})


def test_task_settings_that_are_taken():
    TaskConfig(**PAIRS, nearest=True)
    TaskConfig(**PAIRS, policy="restoration")
    TaskConfig(images="a", annotations="b", **HELD, validation_fraction=0.0)
    TaskConfig(images="a", validation_images="b")
    TaskConfig(images="a", make="inpainting", policy="restoration")
    more = {"more_annotations": {"depth": "e"}, "validation_more_annotations": {"depth": "f"}}
    TaskConfig(**PAIRS, **HELD, **more)
    TaskConfig(**SCENE, policy="pose", nearest=True)
    for source in ("list", "sa1b"):  # they bring their annotations
        TaskConfig(**_kind(source, nearest=True))


def test_skeletons_have_a_policy_of_their_own():
    assert TaskConfig(**_kind("coco")).policy == TaskConfig(**SCENE).policy == "pose"
    assert TaskConfig(**_kind("coco", draw="masks")).policy == "crops"
    assert TaskConfig(**_kind("coco", draw="masks", policy="geometric")).policy == "geometric"


def test_frames_of_a_sample():
    assert TaskConfig(**_kind("video", frames=5)).num_frames(10) == 5
    assert TaskConfig(**_kind("video")).num_frames(16) == 16
    assert TaskConfig(**PAIRS).num_frames(2) == TaskConfig(**SCENE).num_frames(2) == 1
    # DeLVM's lines are image and annotation in turn, LVM's pictures alone, unless frames says otherwise
    assert [TaskConfig(**_kind("delvm")).num_frames(number) for number in (1, 2, 8)] == [1, 1, 4]
    assert [TaskConfig(**_kind("lvm")).num_frames(number) for number in (1, 16)] == [1, 16]
    assert TaskConfig(**_kind("lvm", frames=8)).num_frames(16) == 8


# --- storages


@pytest.mark.parametrize(
    ("settings", "train", "held"),
    [
        (_kind("pictures"), Pictures("a", key="tasks.t"), Pictures("c", key="tasks.t")),
        (_kind("classes"), Classes("a", key="tasks.t"), Classes("c", key="tasks.t")),
        (_kind("list"), Listed("a", key="tasks.t"), Listed("c", key="tasks.t")),
        (_kind("pairs"), Pairs("a", ["b"], key="tasks.t"), Pairs("c", ["d"], key="tasks.t")),
        (
            _kind(
                "pairs",
                more_annotations={"depth": "e", "boxes": "f"},
                validation_more_annotations={"depth": "g", "boxes": "h"},
            ),
            Pairs("a", ["b", "e", "f"], key="tasks.t"),
            Pairs("c", ["d", "g", "h"], key="tasks.t"),
        ),
        (_kind("lmdb"), Lmdb("a", [], key="tasks.t"), Lmdb("c", [], key="tasks.t")),
        (
            _kind("lmdb", annotations="b"),
            Lmdb("a", ["b"], key="tasks.t"),
            Lmdb("c", ["d"], key="tasks.t"),
        ),
        (
            _kind("video", frames=4, stride=2),
            Video("a", key="tasks.t", frames=4, stride=2, seed=7),
            Video("c", key="tasks.t", frames=4, stride=2, seed=7),
        ),
        (
            _kind("video", annotations="b", random_stride=3),
            Video("a", "b", key="tasks.t", random_stride=3, seed=7),
            Video("c", "d", key="tasks.t", random_stride=3, seed=7),
        ),
    ],
)
def test_a_task_opens_its_storage(settings, train, held):
    both = HELD if "annotations" in settings else {"validation_images": "c"}
    config = TaskConfig(**settings, **both)
    assert open_storage("t", config, 7) == train
    assert open_storage("t", config, 7, "validation_") == held


def test_a_coco_task_opens_its_storage():
    config = TaskConfig(**_kind("coco", draw="boxes", radius=2, thickness=3), **HELD)
    palettes = []
    for prefix, images, annotations in (("", "a", "b"), ("validation_", "c", "d")):
        storage = open_storage("t", config, 7, prefix)
        assert isinstance(storage, Coco)
        assert (str(storage.images), str(storage.annotations), storage.key) == (
            images,
            annotations,
            "tasks.t",
        )
        assert (storage.draw, storage.radius, storage.thickness) == ("boxes", 2, 3)
        palettes.append(storage.palette)
    assert palettes[0] == palettes[1]  # a category has one colour on both sides


def test_an_sa1b_task_opens_its_storage():
    for crops in (True, False):
        storage = open_storage("t", TaskConfig(**_kind("sa1b", crops=crops)), 7)
        assert isinstance(storage, Sa1b)
        assert (storage.tars, storage.key, storage.seed, storage.crops) == ("a", "tasks.t", 7, crops)
