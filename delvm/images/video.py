"""Videos and folders of frames -> clips, frame by frame with their annotations."""

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from delvm.errors import UserError
from delvm.images.files import Entry, Sample, read_picture
from delvm.images.folders import Folder

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".webm", ".mov")

REORDERED = 16
"""A frame is stored at most so many places behind its turn: the most that H.264 and HEVC allow."""


@dataclass(frozen=True)
class Video:
    """A clip of `frames` frames from each video: [name, path, number of frames], with annotations also their
    path and number of frames.

    A video is a file, or a folder whose pictures are the frames: an image sequence, the views of an object.
    `annotations` is a folder of videos under the same names, frame for frame.

    A clip begins at random and takes every `stride`-th frame; a video too short for that is read with the
    largest stride that fits. With `random_stride`, `stride` is ignored and drawn from 1..random_stride for
    each clip. Both draws depend on (seed, name) alone. LVM (Bai et al., CVPR 2024) takes 16 frames, of videos
    with stride 8, of image sequences with a random one of 1 to 4.
    """

    videos: str
    annotations: str = ""
    key: str = field(kw_only=True)
    """The task's setting, for errors: `tasks.NAME`."""
    frames: int = field(default=16, kw_only=True)
    stride: int = field(default=8, kw_only=True)
    random_stride: int = field(default=0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for setting, least in (("frames", 1), ("stride", 1), ("random_stride", 0)):
            if getattr(self, setting) < least:
                raise UserError(f"{self.key}.{setting}: {getattr(self, setting)} must be at least {least}")

    def entries(self) -> Iterator[Entry]:
        """Sorted by name. Raises UserError for a missing or empty folder, a video without annotation."""
        videos = list_videos(self.videos, f"{self.key}.images")
        annotations = list_videos(self.annotations, f"{self.key}.annotations") if self.annotations else None
        for name, path in videos.items():
            entry = [name, str(path), count_or_zero(path)]
            if annotations is not None:
                if name not in annotations:
                    raise UserError(f"{self.key}: video without annotation: {path}")
                entry += [str(annotations[name]), count_or_zero(annotations[name])]
            yield entry

    def read(self, entry: Entry) -> Sample:
        """`frames` pictures; with annotations frame, annotation, frame, annotation ...

        Raises:
            UserError: a damaged video, one shorter than `frames`, an annotation of another length or size.
        """
        name, path, num_frames, *annotation = entry
        for file, number in zip(entry[1::2], entry[2::2], strict=True):
            if not number:
                count_frames(Path(file))  # raises what kept `entries` from counting
            if number != num_frames:
                raise UserError(f"{file}: {number} frames, its video has {num_frames}")
        if num_frames < self.frames:
            raise UserError(f"{path}: {num_frames} frames, {self.key}.frames asks for {self.frames}")
        numbers = self.choose(name, num_frames)
        clips = [read_frames(Path(file), numbers) for file in (path, *annotation[:1])]
        for file, clip in zip((path, *annotation[:1]), clips, strict=True):
            for number, picture in zip(numbers, clip, strict=True):
                if picture.shape != clips[0][0].shape:
                    height, width = clips[0][0].shape[:2]
                    raise UserError(
                        f"{file}: frame {number} has {picture.shape[1]}x{picture.shape[0]} pixels,"
                        f" the clip's first {width}x{height}"
                    )
        return [picture for moment in zip(*clips, strict=True) for picture in moment]

    def choose(self, name: str, num_frames: int) -> list[int]:
        """The numbers of a clip's frames, in 0..num_frames-1; num_frames is at least `frames`."""
        rng = np.random.default_rng((self.seed, zlib.crc32(name.encode())))
        stride = int(rng.integers(1, self.random_stride + 1)) if self.random_stride else self.stride
        stride = min(stride, (num_frames - 1) // max(1, self.frames - 1))
        last = stride * (self.frames - 1)
        start = int(rng.integers(num_frames - last))
        return [start + stride * number for number in range(self.frames)]


def list_videos(folder: str, setting: str) -> dict[str, Path]:
    """Name -> video file or folder right in a folder, sorted. `setting` names the folder in errors."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"{setting}: no folder '{folder}'")
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES):
            continue
        if not path.is_dir():
            pyav()  # missing: to be said once, not of every file
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise UserError(f"{setting}: '{found[name].name}' and '{path.name}' have one name in {folder}")
        found[name] = path
    if not found:
        raise UserError(
            f"{setting}: no videos ({', '.join(VIDEO_SUFFIXES)}) or folders of frames in '{folder}'"
        )
    return found


def list_frames(folder: Path) -> list[Path]:
    """The pictures of a folder by name, numbers in it by their value: `2.png` comes before `10.png`."""
    frames = Folder(folder, str(folder))
    if not frames:
        raise UserError(f"{folder}: no frames in this folder")
    return [frames[stem] for stem in sorted(frames, key=by_number)]


def by_number(stem: str) -> list:
    """A sorting key: text, number, text, ..."""
    parts: list = re.split("([0-9]+)", stem)
    parts[1::2] = map(int, parts[1::2])
    return parts


def count_or_zero(path: Path) -> int:
    """The number of frames, 0 for a damaged video: reading it will say how, where it can be skipped."""
    try:
        return count_frames(path)
    except UserError:
        return 0


def count_frames(path: Path) -> int:
    """As the file states it, else by decoding. Raises UserError where it is damaged or has no frame."""
    if path.is_dir():
        return len(list_frames(path))
    with opened(path) as container:
        number = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
        if not number:
            raise ValueError("no frame")
    return number


def read_frames(path: Path, numbers: Sequence[int]) -> list[np.ndarray]:
    """The frames of these ascending numbers, (H, W, 3) uint8 RGB each.

    Of a video file that tells its frames' times, no more is decoded than from the key frame before the first
    to the last.
    """
    if path.is_dir():
        frames = list_frames(path)
        return [read_picture(frames[number]) for number in numbers]
    with suppress(UserError), opened(path) as container:  # what is wrong is said of the whole film, below
        pictures = take(decode_late(container, numbers), numbers)
        if len(pictures) == len(numbers):
            return pictures
    with opened(path) as container:
        pictures = take(enumerate(container.decode(video=0)), numbers)
        if len(pictures) < len(numbers):
            raise ValueError(f"it ends before frame {numbers[len(pictures)]}")
    return pictures


def take(frames: Iterable[tuple[int, Any]], numbers: Sequence[int]) -> list[np.ndarray]:
    """The pictures of these ascending numbers; no frame behind the last is asked for."""
    wanted = set(numbers)
    pictures = []
    for number, frame in frames:
        if number in wanted:
            pictures.append(frame.to_ndarray(format="rgb24"))
        if number == numbers[-1]:
            break
    return pictures


def decode_late(container: Any, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(number, frame) from the key frame at or before the first of ascending numbers on.

    Packets are read up to the last number, undecoded, for their times: sorted, these number the frames. It
    ends where they do not tell for sure what a frame's number is when the film is decoded from its beginning:

    - packets have no times, or two have one: a raw stream may have none, those of AVI are guessed;
    - the film was cut within a group of pictures: what comes before its first key frame may not be shown;
    - packets are not frames: fields in packets of their own, VP8's pictures that are never shown, a picture
      that is whole only some frames behind a key frame.
    """
    stream = container.streams.video[0]
    if stream.codec_context.codec.canonical_name == "vp8":
        return
    packets = (packet for packet in container.demux(stream) if packet.size)  # the last, empty, flushes
    times, keys = [], []
    for packet in islice(packets, numbers[-1] + 1 + REORDERED):
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    if len(times) <= numbers[0] or None in times or len(set(times)) < len(times):
        return
    if times[0] not in keys or times[0] != min(times):
        return
    times.sort()
    key = max(time for time in keys if time <= times[numbers[0]])
    container.seek(key, stream=stream)
    places = {time: number for number, time in enumerate(times)}
    following = places[key]
    for frame in container.decode(stream):
        number = places.get(frame.pts, len(times))
        if number > following:
            return
        yield number, frame  # the first ones may be of the group before, stored behind the key frame
        following = max(following, number + 1)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A video file's container; whatever goes wrong with it in the block becomes a UserError."""
    av = pyav()
    try:
        # An mp4 cut without encoding hides the frames before the cut, but counts them: show them.
        with av.open(str(path), options={"ignore_editlist": "1"}) as container:
            if not container.streams.video:
                raise ValueError("no video in it")
            yield container
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise UserError(f"{path}: unreadable video ({getattr(error, 'strerror', None) or error})") from error


def pyav() -> Any:
    """The package av, wanted by video files alone. Raises UserError where it is missing."""
    try:
        import av
    except ImportError as error:
        raise UserError("a video file needs a package that is missing: pip install delvm[video]") from error
    return av
