"""A task's settings -> the storage of its samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from delvm.images.augment import JOINT_COLOUR, POLICIES
from delvm.images.coco import DRAW, Coco
from delvm.images.degrade import MAKERS, ranges_of
from delvm.images.files import Storage
from delvm.images.folders import Classes, Listed, Pairs, Pictures
from delvm.images.lmdb import Lmdb
from delvm.images.sa1b import Sa1b
from delvm.images.scenes import SCENES
from delvm.images.video import Video

SKELETON_POLICIES = ("none", "pose")
VIDEO_FRAMES = 16  # as LVM has them (Bai et al. 2023)


@dataclass
class DataConfig:
    """What holds for the pictures of every task."""

    image_size: int = 256
    """Side of the square pictures that the tokenizer sees, in pixels."""
    unreadable: str = "stop"
    """A picture that cannot be read: `stop`, or `skip` its sample and report it."""
    duplicates: str = "drop"
    """A training photograph that is nearly a held-out one, of any task: `drop` it, said, or `keep` it."""

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise ValueError(f"image_size: {self.image_size} must be at least 8")
        for key, choices in (("unreadable", ("stop", "skip")), ("duplicates", ("drop", "keep"))):
            if getattr(self, key) not in choices:
                raise ValueError(f"{key}: '{getattr(self, key)}' is unknown; choices: {', '.join(choices)}")


@dataclass
class TaskConfig:
    """Where a task's samples come from, and what becomes of them."""

    source: str = ""
    """How they are stored, a name from `SOURCES`; empty: `scene`, `pairs` or `pictures`, by what is given."""
    images: str = ""
    """Folder of pictures; what else it may be stands with each source in `SOURCES`."""
    annotations: str = ""
    """Folder (or file) of the annotations."""
    more_annotations: dict[str, str] = field(default_factory=dict)
    """Further kinds of annotation of the same images, by name: depth: DIR, normals: DIR (pairs and lmdb)."""
    validation_images: str = ""
    """Held-out images; without them `validation_fraction` splits `images`."""
    validation_annotations: str = ""
    validation_more_annotations: dict[str, str] = field(default_factory=dict)
    validation_fraction: float = 0.2
    """Share of the stems held out. A stem falls on the same side in every task with this share."""
    scene: str = ""
    """A name from `delvm.images.scenes.SCENES`: exact annotations over photographs, made on the spot."""
    make: str = ""
    """A name from `delvm.images.degrade.MAKERS`: image and annotation are made of views of a photograph."""
    ranges: dict[str, list[float]] = field(default_factory=dict)
    """What `make` draws from, [lowest, highest] by name: angle: [-40, 40] of rain. See `RESTORED`."""
    samples: int = 0
    """Training samples of a scene; of other sources, the first so many as they are listed (0: all), of
    `classes` the first of every class, as even as they go."""
    validation_samples: int = 0
    """Held-out samples, as `samples`."""
    policy: str = ""
    """How views are made, from `delvm.images.augment.POLICIES`; empty: `crops`, for skeletons `pose`."""
    nearest: bool = False
    """The annotations' colours are labels: resample them to the nearest pixel, never mix."""
    draw: str = "skeletons"
    """coco: `skeletons`, `masks` or `boxes`."""
    radius: int = 8
    """coco: of a joint, in pixels of the stored picture; 0 draws limbs alone."""
    thickness: int = 4
    """coco: of a limb or a box."""
    crops: bool = True
    """sa1b: six square crops of each picture instead of the whole."""
    frames: int = 0
    """video: frames of a sample (0: 16). delvm, lvm: of a line (0: every second picture of a line of DeLVM
    is an annotation, none of LVM)."""
    stride: int = 8
    """video: frames of the film from one to the next."""
    random_stride: int = 0
    """video: instead of `stride`, 1 to so many, drawn for each film."""

    def __post_init__(self) -> None:
        self.source = self.source or ("scene" if self.scene else "pairs" if self.annotations else "pictures")
        skeletons = self.scene == "pose" or (self.source == "coco" and self.draw == "skeletons")
        if self.policy and self.source in TOKEN_SOURCES:
            raise ValueError(f"policy: '{self.policy}' needs pictures, source '{self.source}' has tokens")
        self.policy = self.policy or ("pose" if skeletons else "crops")
        tables = {
            "source": (*SOURCES, "scene", *TOKEN_SOURCES),
            "policy": POLICIES,
            "draw": DRAW,
            "make": ("", *MAKERS),
        }
        for key, table in tables.items():
            if getattr(self, key) not in table:
                choices = ", ".join(name for name in table if name)
                raise ValueError(f"{key}: '{getattr(self, key)}' is unknown; choices: {choices}")
        if self.nearest and self.policy in JOINT_COLOUR:
            others = ", ".join(name for name in POLICIES if name not in JOINT_COLOUR)
            raise ValueError(
                f"policy: '{self.policy}' changes the colours that nearest keeps as labels; choices: {others}"
            )
        if skeletons and self.policy not in SKELETON_POLICIES:
            raise ValueError(
                f"policy: '{self.policy}' mirrors skeletons but not the colours of left and right limbs;"
                f" choices: {', '.join(SKELETON_POLICIES)}"
            )
        self._check_ranges()
        least = {"samples": 0, "validation_samples": 0, "radius": 0, "thickness": 1, "stride": 1,
                 "random_stride": 0, "frames": 0}  # fmt: skip
        for key, bound in least.items():
            if getattr(self, key) < bound:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least {bound}")
        for key, sources in OWN.items():
            if self.source not in sources and getattr(self, key) != getattr(TaskConfig, key):
                raise ValueError(
                    f"{key}: source '{self.source}' has no such setting; sources: {', '.join(sources)}"
                )
        if self.random_stride and self.stride != TaskConfig.stride:
            raise ValueError("stride, random_stride: exclude each other")
        (self._check_scene if self.source == "scene" else self._check_files)()

    def _check_ranges(self) -> None:
        known = ranges_of(self.make) if self.make else {}
        for name, values in self.ranges.items():
            if name not in known:
                choices = ", ".join(known) or "none"
                raise ValueError(f"ranges.{name}: make '{self.make}' has no such range; choices: {choices}")
            if len(values) != 2 or not -math.inf < values[0] <= values[1] < math.inf:
                raise ValueError(f"ranges.{name}: {values} must be [lowest, highest]")

    def _check_scene(self) -> None:
        folders = ("images", "annotations", "more_annotations")
        for key in (*folders, *(f"validation_{folder}" for folder in folders)):
            if getattr(self, key):
                raise ValueError(f"scene: '{self.scene}' and folders exclude each other")
        if self.make:
            raise ValueError(f"make: '{self.make}' needs photographs; a scene has its annotations")
        if self.scene not in SCENES:
            raise ValueError(f"scene: '{self.scene}' is unknown; choices: {', '.join(SCENES)}")
        for key in ("samples", "validation_samples"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: a scene needs at least 1")

    def _check_files(self) -> None:
        name = self.source
        if self.scene:
            raise ValueError(f"scene: '{self.scene}' and source '{name}' exclude each other")
        needed = ["images", "annotations"] if name in NEED_ANNOTATIONS else ["images"]
        for key in needed:
            if not getattr(self, key):
                raise ValueError(
                    f"{key}: missing; source '{name}' needs {' and '.join(needed)}; or give a scene"
                )
        for prefix in ("", "validation_"):
            annotated = bool(getattr(self, f"{prefix}annotations"))
            if annotated and name not in (*NEED_ANNOTATIONS, *MAY_HAVE_ANNOTATIONS):
                raise ValueError(f"{prefix}annotations: source '{name}' takes none")
            if getattr(self, f"{prefix}more_annotations") and not (annotated and name in MAY_HAVE_MORE):
                choices = ", ".join(MAY_HAVE_MORE)
                raise ValueError(f"{prefix}more_annotations: they go with annotations; sources: {choices}")
        if self.validation_annotations and not self.annotations:
            raise ValueError("annotations: missing; validation_annotations are given")
        if self.annotations:
            if bool(self.validation_images) != bool(self.validation_annotations):
                raise ValueError("validation_images, validation_annotations: give both or neither")
            if self.validation_images and list(self.more_annotations) != list(
                self.validation_more_annotations
            ):
                raise ValueError(
                    "more_annotations, validation_more_annotations: give the same names in the same order"
                )
        if self.make and (self.annotations or name in ("sa1b", "video", *TOKEN_SOURCES)):
            raise ValueError(f"make: '{self.make}' makes the annotations; give single photographs alone")
        if self.nearest and not self.annotations and (self.make or name not in BRING_ANNOTATIONS):
            raise ValueError("nearest: there are no annotations whose colours it could keep")
        if not self.validation_images and not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction: {self.validation_fraction} must lie between 0 and 1, or give"
                f" validation_images{' and validation_annotations' * bool(self.annotations)}"
            )

    def num_frames(self, pictures: int) -> int:
        """Frames of a sample with so many pictures; each has an image and its annotations."""
        if self.source == "video":
            return self.frames or VIDEO_FRAMES
        if self.source in TOKEN_SOURCES:
            return self.frames or (max(1, pictures // 2) if self.source == "delvm" else pictures)
        return 1


@dataclass(frozen=True)
class Place:
    """Where one split of a task is stored."""

    images: str
    annotations: list[str]
    key: str
    """The task in error messages."""
    seed: int


SOURCES: dict[str, Callable[[TaskConfig, Place], Storage]] = {
    # folders of images and annotations, matched by stem
    "pairs": lambda c, at: Pairs(at.images, at.annotations, key=at.key),
    # one folder, with all below it
    "pictures": lambda c, at: Pictures(at.images, key=at.key),
    # one folder a class, as ImageNet has them
    "classes": lambda c, at: Classes(at.images, key=at.key),
    # images: a CSV or JSONL of paths
    "list": lambda c, at: Listed(at.images, key=at.key),
    # annotations: person_keypoints_*.json or instances_*.json
    "coco": lambda c, at: Coco(
        at.images, at.annotations[0], c.draw, key=at.key, radius=c.radius, thickness=c.thickness
    ),
    # images: a tar, or a folder of tars
    "sa1b": lambda c, at: Sa1b(at.images, key=at.key, seed=at.seed, crops=c.crops),
    # LMDB folders with meta_info.txt
    "lmdb": lambda c, at: Lmdb(at.images, at.annotations, key=at.key),
    # a folder of films, or of folders of frames
    "video": lambda c, at: Video(
        at.images, *at.annotations, key=at.key, frames=c.frames or VIDEO_FRAMES, stride=c.stride,
        random_stride=c.random_stride, seed=at.seed,
    ),
}  # fmt: skip
TOKEN_SOURCES = ("delvm", "lvm")
"""Tasks of other projects' token files (`delvm.tokens.lines`): there are no pictures to read."""
NEED_ANNOTATIONS, MAY_HAVE_ANNOTATIONS, MAY_HAVE_MORE = (
    ("pairs", "coco"),
    ("lmdb", "video"),
    ("pairs", "lmdb"),
)
BRING_ANNOTATIONS = ("list", "sa1b")  # within `images`
OWN = {
    "draw": ("coco",),
    "radius": ("coco",),
    "thickness": ("coco",),
    "crops": ("sa1b",),
    "frames": ("video", *TOKEN_SOURCES),
    "stride": ("video",),
    "random_stride": ("video",),
}
"""Settings of some sources alone."""


def open_storage(task: str, config: TaskConfig, seed: int, prefix: str = "") -> Storage:
    """The storage of a task's samples; `prefix`: "" or "validation_"."""
    more: dict[str, str] = getattr(config, f"{prefix}more_annotations")
    first: str = getattr(config, f"{prefix}annotations")
    place = Place(getattr(config, f"{prefix}images"), [first, *more.values()] if first else [],
                  f"tasks.{task}", seed)  # fmt: skip
    return SOURCES[config.source](config, place)
