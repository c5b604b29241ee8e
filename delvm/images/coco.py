"""COCO's JSON and a folder of photographs -> (photograph, drawn annotation) pairs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from delvm.errors import UserError
from delvm.images.annotate import (
    LIMBS,
    coco_joints,
    distinct_colours,
    paint_boxes,
    paint_masks,
    skeletons,
)
from delvm.images.files import Entry, Sample, read_picture

DRAW = ("skeletons", "masks", "boxes")

NUM_COLOURS = 91
"""COCO's category ids reach 90, with gaps: an id is a place in the palette."""

FAR = 2**15
"""No joint or box lies farther out, in pixels: photographs are smaller, and OpenCV cannot draw far beyond."""

DAMAGED = (KeyError, TypeError, ValueError, OverflowError)
"""What wrong content of a JSON raises."""


class Coco:
    """Photographs and what `person_keypoints_*.json` or `instances_*.json` of COCO says of them.

    Crowd regions are painted as masks, for their pixels are of their category, but have neither box nor
    skeleton. An entry is `[stem, file, [height, width], facts]`; facts are, one an annotation, 51 keypoint
    numbers, `[category, segmentation]` or `[category, x, y, width, height]` (Lin et al., ECCV 2014).

    The JSON is read whole: listing takes about five times the file's size in memory, 3 KB for an annotation
    with a polygon of 25 points, 4 KB with keypoints too. Nothing of it is held after that.

    Args:
        images: folder of the photographs.
        annotations: the JSON file.
        draw: what the annotation shows; one of `DRAW`.
        key: the task's setting, as errors name it: `tasks.pose`.
        radius: of a skeleton's joints, in pixels of the stored photograph; 0 draws limbs alone.
        thickness: of a skeleton's limbs and of a box's lines, in pixels of the stored photograph, at least 1.
        seed: of the palette; a category has one colour in every file of the same seed.

    Raises:
        ValueError: an unknown `draw`.
    """

    def __init__(
        self,
        images: str,
        annotations: str,
        draw: str,
        *,
        key: str,
        radius: int = 8,
        thickness: int = 4,
        seed: int = 0,
    ) -> None:
        if draw not in DRAW:
            raise ValueError(f"{key}.draw: '{draw}' is unknown; choices: {', '.join(DRAW)}")
        self.images, self.annotations = Path(images).expanduser(), Path(annotations).expanduser()
        self.draw, self.key = draw, key
        self.radius, self.thickness = radius, thickness
        self.palette = distinct_colours(NUM_COLOURS, np.random.default_rng(seed))

    def entries(self) -> Iterator[Entry]:
        """Every photograph with something to draw, sorted by file name.

        Raises:
            UserError: a folder, file or photograph that is missing; a JSON that is not COCO's.
        """
        if not self.images.is_dir():
            raise UserError(f"{self.key}.images: no folder '{self.images}'")
        for name, size, facts in self._load():
            file = self.images / name
            if not file.is_file():
                raise UserError(f"{self.annotations}: '{name}' is not in {self.images}")
            yield [file.stem, str(file), size, facts]

    def _load(self) -> list[tuple[str, list[int], list]]:
        """(file name, [height, width], facts) of photographs; the rest of the JSON is not kept."""
        try:
            content = json.loads(self.annotations.read_bytes())
        except OSError as error:
            raise UserError(f"{self.key}.annotations: {error.strerror}: '{self.annotations}'") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.annotations}: not JSON ({error})") from error
        facts: dict[Any, list] = {}
        place = "not COCO's JSON"
        try:
            photographs, annotations = content["images"], content["annotations"]
            for number, annotation in enumerate(annotations):
                place = f"annotations[{number}]"
                if (fact := self._fact(annotation)) is not None:
                    facts.setdefault(annotation["image_id"], []).append(fact)
            found = []
            for number, image in enumerate(photographs):
                place = f"images[{number}]"
                if image["id"] in facts:
                    size = [int(image["height"]), int(image["width"])]
                    found.append((str(image["file_name"]), size, facts[image["id"]]))
        except DAMAGED as error:
            raise UserError(f"{self.annotations}: {place}: {reason(error)}") from error
        return sorted(found, key=lambda photograph: photograph[0])

    def _fact(self, annotation: Mapping[str, Any]) -> list | None:
        """What `read` needs of one annotation; None for one with nothing to draw."""
        if self.draw == "skeletons":
            keypoints = annotation["keypoints"]
            joints = coco_joints(keypoints)
            refuse_far("keypoints", keypoints)
            return keypoints if any(start in joints and end in joints for start, end, _ in LIMBS) else None
        category = annotation["category_id"]
        if not isinstance(category, int) or not 0 <= category < NUM_COLOURS:
            raise ValueError(f"category_id: {category} must be a whole number from 0 to {NUM_COLOURS - 1}")
        if self.draw == "masks":
            segmentation = annotation["segmentation"]  # checked when read: all at once would take hours
            return [category, segmentation] if segmentation else None
        left, top, width, height = annotation["bbox"]
        refuse_far("bbox", annotation["bbox"])
        crowd = annotation.get("iscrowd", 0)
        return None if crowd or width <= 0 or height <= 0 else [category, left, top, width, height]

    def read(self, entry: Entry) -> Sample:
        """[photograph, annotation], (H, W, 3) uint8 each.

        Raises:
            UserError: an unreadable photograph, another size than the JSON's, a damaged segmentation.
        """
        _, file, (height, width), facts = entry
        picture = read_picture(Path(file))
        size = picture.shape[:2]
        if size != (height, width):
            raise UserError(f"{file}: {size[1]}x{size[0]} pixels, {self.annotations} says {width}x{height}")
        if self.draw == "skeletons":
            people = [coco_joints(keypoints) for keypoints in facts]
            return [picture, skeletons(people, size, self.thickness, self.radius)]
        colours = [self.palette[category] for category, *_ in facts]
        if self.draw == "boxes":
            boxes = [(*box, colour) for (_, *box), colour in zip(facts, colours, strict=True)]
            return [picture, paint_boxes(boxes, size, self.thickness)]
        masks = (decode_segmentation(segmentation, size) for _, segmentation in facts)
        try:
            return [picture, paint_masks(masks, size, colours)]
        except DAMAGED as error:
            raise UserError(f"{self.annotations}: segmentation of {file}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What to say of a JSON's wrong content: KeyError alone would be a bare word."""
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def refuse_far(name: str, numbers: Sequence[float]) -> None:
    """Raises ValueError for coordinates that are in no picture, or no numbers."""
    if not all(abs(number) <= FAR for number in numbers):
        raise ValueError(f"{name}: {list(numbers)} must be numbers from -{FAR} to {FAR}")


def decode_segmentation(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool from what COCO allows: polygons `[[x, y, x, y, ...], ...]`, or `{"size", "counts"}`.

    Raises:
        ValueError: damaged, or not of this size (H, W).
        KeyError, TypeError: not a segmentation.
    """
    if isinstance(segmentation, Mapping):
        if list(segmentation["size"]) != list(size):
            raise ValueError(f"an RLE of size {segmentation['size']}, its picture has {list(size)}")
        return decode_rle(segmentation["counts"], size)
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise UserError("COCO's polygons need pycocotools: pip install 'delvm[data]'") from error
    for polygon in segmentation:
        # pycocotools takes four numbers for a box, and walks an outline pixel by pixel however far it goes
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon of {len(polygon)} numbers; it needs x and y of three points or more")
        if not all(-max(size) <= number <= 2 * max(size) for number in polygon):
            raise ValueError(f"a polygon far outside its picture of size {list(size)}")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))).astype(bool)


def decode_rle(counts: str | Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool from COCO's run-length encoding: pixels column by column, runs off and on in turn.

    pycocotools' decoder may read and write where it must not when the runs are damaged; here they are checked
    to cover the picture exactly before a pixel is written.

    Args:
        counts: the runs, or COCO's string of them.
        size: (H, W).

    Raises:
        ValueError: counts that are damaged or do not cover the picture exactly.
    """
    runs = np.asarray(unpack_runs(counts) if isinstance(counts, str) else counts)
    if runs.ndim != 1 or runs.dtype.kind != "i":
        raise ValueError("RLE counts must be whole numbers or a string of them")
    num_pixels = size[0] * size[1]
    # each is bounded first: a sum of damaged counts could wrap around to the right one
    if runs.min() < 0 or runs.max() > num_pixels or runs.sum() != num_pixels:
        raise ValueError(f"the RLE counts do not cover a picture of size {list(size)} exactly")
    mask_wh = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1])
    return np.ascontiguousarray(mask_wh.T)  # row by row, as the pictures that it meets are


def unpack_runs(text: str) -> np.ndarray:
    """Run lengths, int64, of COCO's compressed string: LEB128 with 5 bits a character, from '0' on.

    A number's characters come lowest bits first; bit 32 says that more follow, bit 16 of the last is the
    sign. From the fourth on, a number is the difference to the one two before.

    Raises:
        ValueError: other characters, or a number that does not end.
    """
    chunks = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - ord("0")
    if not len(chunks) or chunks.min() < 0 or chunks.max() > 63 or chunks[-1] & 32:
        raise ValueError("RLE counts are cut or not COCO's compressed string")
    ends = np.flatnonzero(chunks & 32 == 0)
    starts = np.append(0, ends[:-1] + 1)
    places = np.arange(len(chunks)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 6:  # 35 bits: more pixels than any picture has, and no overflow below
        raise ValueError("RLE counts hold an impossible number")
    numbers = np.add.reduceat((chunks & 31) << 5 * places, starts)
    numbers -= np.where(chunks[ends] & 16, 1 << 5 * (places[ends] + 1), 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers
