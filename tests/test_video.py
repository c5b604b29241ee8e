import json
import pickle
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from delvm.errors import UserError
from delvm.images.video import Video, decode_late, opened, read_frames

LOSSLESS = {
    ".mkv": ("ffv1", "bgr0"),
    ".avi": ("ffv1", "bgr0"),
    ".mov": ("png", "rgb24"),
    ".mp4": ("png", "rgb24"),
}


def _frame(number, seed=0, shape=(16, 24)):
    """Noise, with its number in the first pixel."""
    picture = np.random.default_rng((seed, number)).integers(256, size=(*shape, 3), dtype=np.uint8)
    picture[0, 0] = number
    return picture


def _numbers(pictures):
    return [int(picture[0, 0, 0]) for picture in pictures]


def _write_video(path, num=12, seed=0, codec=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    name, layout = codec or LOSSLESS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 24, layout
        for number in range(num):
            frame = av.VideoFrame.from_ndarray(_frame(number, seed), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _write_frames(folder, num=12, seed=0, pattern="{:05d}.png", shape=(16, 24)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num):
        Image.fromarray(_frame(number, seed, shape)).save(folder / pattern.format(number))
    return folder


def _video(folder, *annotations, **given):
    return Video(str(folder), *map(str, annotations), key="tasks.t", **{"frames": 3, "stride": 2} | given)


def _only(storage):
    """The one sample of a storage."""
    (entry,) = storage.entries()
    return storage.read(entry)


def _refused(function, *arguments):
    """The message with which a call, and the listing of what it returns, is refused; one line."""
    with pytest.raises(UserError) as caught:
        list(function(*arguments))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which frames


def test_every_frame_of_a_clip_that_just_fits(tmp_path):
    _write_frames(tmp_path / "a", 16)
    (pictures,) = [_only(_video(tmp_path, frames=16, stride=1))]
    assert _numbers(pictures) == list(range(16))
    np.testing.assert_array_equal(np.stack(pictures), np.stack([_frame(i) for i in range(16)]))


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 20),
    extra=st.integers(0, 200),
    stride=st.integers(1, 9),
    random_stride=st.integers(0, 4),
    name=st.text(max_size=3),
)
def test_the_frames_chosen(frames, extra, stride, random_stride, name):
    storage = _video("x", frames=frames, stride=stride, random_stride=random_stride)
    num_frames = frames + extra
    chosen = storage.choose(name, num_frames)
    assert len(chosen) == frames
    assert chosen[0] >= 0
    assert chosen[-1] < num_frames
    steps = set(np.diff(chosen).tolist())
    largest = (num_frames - 1) // (frames - 1) if frames > 1 else 0
    if frames == 1:
        assert steps == set()
    elif random_stride:
        assert len(steps) == 1
        assert steps <= set(range(1, min(random_stride, largest) + 1))
    else:
        assert steps == {min(stride, largest)}
    assert chosen == storage.choose(name, num_frames)


def test_starts_and_strides_depend_on_seed_and_name():
    def clips(**given):
        storage = _video("x", frames=4, stride=8, **given)
        return [tuple(storage.choose(f"clip{i}", 100)) for i in range(400)]

    fixed = clips()
    starts = [clip[0] for clip in fixed]
    assert (min(starts), max(starts)) == (0, 75)  # 100 - 3 * 8 possible starts, both ends among them
    assert len(set(starts)) > 60
    assert fixed == clips()
    assert sum(a == b for a, b in zip(fixed, clips(seed=1), strict=True)) < 40
    strides = [clip[1] - clip[0] for clip in clips(random_stride=4)]
    assert {stride: 70 < strides.count(stride) < 130 for stride in strides} == dict.fromkeys(
        (1, 2, 3, 4), True
    )


def test_the_largest_stride_that_fits(tmp_path):
    _write_frames(tmp_path / "a", 11)
    assert _numbers(_only(_video(tmp_path, frames=4, stride=8))) in ([0, 3, 6, 9], [1, 4, 7, 10])
    assert _numbers(_only(_video(tmp_path, frames=11))) == list(range(11))
    assert len(_only(_video(tmp_path, frames=1))) == 1


# --- videos


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_frames_of_a_file(tmp_path, suffix):
    path = _write_video(tmp_path / f"a{suffix}", 12)
    storage = _video(tmp_path, frames=4, stride=2)
    (entry,) = json.loads(json.dumps(list(storage.entries())))
    assert entry == ["a", str(path), 12]
    pictures = storage.read(entry)
    numbers = storage.choose("a", 12)
    assert numbers[-1] == numbers[0] + 6
    for number, picture in zip(numbers, pictures, strict=True):
        assert picture.dtype == np.uint8
        np.testing.assert_array_equal(picture, _frame(number))
    for picture, again in zip(pictures, pickle.loads(pickle.dumps(storage)).read(entry), strict=True):
        np.testing.assert_array_equal(picture, again)


def test_frames_that_are_stored_out_of_order(tmp_path):
    """Inter-coded video stores a frame behind the one that it is predicted from."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"bf": "2", "qscale": "1"})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 16, 24, "yuv420p", 12
        for number in range(24):
            picture = np.full((16, 24, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
        assert times != sorted(times)
    brightness = [picture.mean() for picture in _only(_video(tmp_path, frames=24))]
    assert len(brightness) == 24
    assert abs(np.array(brightness) - 10 * np.arange(24)).max() < 8  # lossy, but no frame is another


def test_a_file_that_was_cut_without_encoding(tmp_path):
    """Its frames before the cut are hidden, but counted; a clip may reach its end all the same."""
    _write_video(tmp_path / "whole" / "a.mp4", 12)
    (tmp_path / "cut").mkdir()
    with (
        av.open(str(tmp_path / "whole" / "a.mp4")) as whole,
        av.open(str(tmp_path / "cut" / "a.mp4"), "w") as cut,
    ):
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                shift = round(0.5 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                cut.mux(packet)
    with av.open(str(tmp_path / "cut" / "a.mp4")) as cut:
        shown = sum(1 for _ in cut.decode(video=0))
        assert (cut.streams.video[0].frames, shown) == (12, 7)
    assert _numbers(_only(_video(tmp_path / "cut", frames=12))) == list(range(12))


def test_videos_and_folders_side_by_side(tmp_path):
    _write_video(tmp_path / "c.mkv", 9)
    _write_frames(tmp_path / "b", 7)
    _write_video(tmp_path / "a.avi", 8)
    (tmp_path / "readme.txt").write_text("no video")
    (tmp_path / ".cache").mkdir()
    entries = list(_video(tmp_path).entries())
    assert entries == [
        ["a", str(tmp_path / "a.avi"), 8],
        ["b", str(tmp_path / "b"), 7],
        ["c", str(tmp_path / "c.mkv"), 9],
    ]


def test_frames_in_the_order_of_their_numbers(tmp_path):
    _write_frames(tmp_path / "a", 12, pattern="view-{}_of_12.png")
    assert _numbers(_only(_video(tmp_path, frames=12))) == list(range(12))


def test_listing_goes_video_by_video(tmp_path):
    _write_frames(tmp_path / "videos" / "a", 3)
    _write_frames(tmp_path / "videos" / "b", 3)
    _write_frames(tmp_path / "masks" / "a", 3)
    entries = _video(tmp_path / "videos", tmp_path / "masks").entries()
    assert next(entries)[0] == "a"
    assert _refused(list, entries) == f"tasks.t: video without annotation: {tmp_path / 'videos' / 'b'}"


# --- clips from the midst of a film

GROUP = 12  # frames from one key frame to the next


def _write_film(path, codec, num=60, first=0, format=None, **options):
    """Moving patterns, coded with few key frames; the first frame's time is `first` tenths of a second."""
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    rows, columns = np.mgrid[:32, :48]
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=10, options={key: str(x) for key, x in options.items()})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 32, 48, "yuv420p", GROUP
        for number in range(num):
            waves = 128 + 90 * np.sin((columns + 2 * number) / 9) * np.cos((rows - number) / 7)
            picture = np.stack([waves, waves[::-1], np.full_like(waves, 4 * number)], axis=-1)
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = first + number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _decoded(path):
    """All pictures of a film, from its beginning on, and the numbers of its key frames."""
    with opened(path) as container:
        frames = list(container.decode(video=0))
        return [x.to_ndarray(format="rgb24") for x in frames], [
            i for i, x in enumerate(frames) if x.key_frame
        ]


def _seen(path, numbers):
    """The numbers of the frames that are decoded for a clip."""
    seen = []
    with opened(path) as container:
        for number, _ in decode_late(container, numbers):
            seen.append(number)
            if number == numbers[-1]:
                break
    return seen


CLIPS = ([0, 1, 2], [5, 9, 13], [12], [23, 24, 25], [11, 30], [36, 38, 40], [47, 53, 59], [58, 59], [59])


@pytest.mark.parametrize(
    ("codec", "suffix", "first", "begins", "options"),
    [
        ("mpeg4", ".mp4", 0, 0.1, {"bf": 2}),
        ("mpeg4", ".mkv", 50, 5, {"bf": 2}),
        ("mpeg4", ".avi", 0, 0, {}),
        ("libx264", ".mp4", 0, 0.2, {"bf": 3}),
        ("libx264", ".mov", 0, 0.2, {"bf": 8, "x264-params": "b-pyramid=normal:ref=8:scenecut=0"}),
        ("libx264", ".mkv", 50, 5, {"bf": 3, "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}),
        ("libvpx-vp9", ".webm", 50, 5, {"deadline": "realtime", "cpu-used": 8}),
    ],
)
def test_a_clip_is_decoded_from_the_key_frame_before_it(tmp_path, codec, suffix, first, begins, options):
    path = _write_film(tmp_path / f"a{suffix}", codec, first=first, **options)
    pictures, keys = _decoded(path)
    assert len(pictures) == 60
    assert len(keys) in (5, 6)  # the last frame may be one, where it has no other to be predicted from
    with opened(path) as container:
        stream = container.streams.video[0]
        assert stream.start_time * stream.time_base == pytest.approx(begins)
    for numbers in CLIPS:
        key = max(number for number in keys if number <= numbers[0])
        assert _seen(path, numbers) == list(range(key, numbers[-1] + 1))
        clip = read_frames(path, numbers)
        np.testing.assert_array_equal(np.stack(clip), np.stack([pictures[number] for number in numbers]))


@pytest.mark.parametrize("suffix", [".mov", ".mp4"])  # of them every frame is a key frame
def test_a_late_clip_of_a_film_whose_beginning_is_damaged(tmp_path, suffix):
    path = _write_video(tmp_path / f"a{suffix}", 12)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    content[places[1] + 30 : places[2] - 30] = bytes(places[2] - places[1] - 60)
    path.write_bytes(content)
    assert _numbers(read_frames(path, [6, 9])) == [6, 9]
    assert _numbers(read_frames(path, [0])) == [0]
    assert _refused(read_frames, path, [1]).startswith(f"{path}: unreadable video (")
    assert _refused(read_frames, path, [0, 9]).startswith(f"{path}: unreadable video (")


def _cut_film(whole, path, begin):
    """A film from a packet on, without encoding."""
    with av.open(str(whole)) as film, av.open(str(path), "w") as cut:
        stream = cut.add_stream_from_template(film.streams.video[0])
        for packet in list(film.demux(video=0))[begin:]:
            if packet.dts is not None:
                packet.stream = stream
                cut.mux(packet)


@pytest.mark.parametrize("kind", ["no times", "guessed times", "refreshed", "vp8", "cut"])
def test_a_clip_of_a_film_whose_times_do_not_tell(tmp_path, kind):
    """It is decoded from the beginning."""
    path = tmp_path / "a.avi"
    if kind == "no times":
        _write_film(path, "libx264", format="h264", bf=3)
    elif kind == "guessed times":
        _write_film(path, "libx264", bf=3)
    elif kind == "refreshed":  # what is missing behind a key frame comes stripe by stripe
        path = _write_film(tmp_path / "a.mp4", "libx264", **{"x264-params": "intra-refresh=1"})
    elif kind == "vp8":
        path = _write_film(tmp_path / "a.webm", "libvpx", **{"cpu-used": 8, "deadline": "realtime"})
    else:
        path = tmp_path / "a.mkv"
        _cut_film(_write_film(tmp_path / "whole.mkv", "mpeg4", bf=2), path, 5)
    pictures, _ = _decoded(path)
    numbers = [len(pictures) - 20, len(pictures) - 15, len(pictures) - 1]
    assert numbers[0] > 2 * GROUP
    assert numbers[-1] not in _seen(path, numbers)
    clip = read_frames(path, numbers)
    np.testing.assert_array_equal(np.stack(clip), np.stack([pictures[number] for number in numbers]))
    with pytest.raises(UserError, match=f"it ends before frame {len(pictures)}"):
        read_frames(path, [numbers[0], len(pictures)])


# --- annotations


def test_frames_and_annotations_take_turns(tmp_path):
    _write_video(tmp_path / "videos" / "a.mkv", 12)
    _write_frames(tmp_path / "videos" / "b", 9)
    _write_frames(tmp_path / "masks" / "a", 12, seed=1)
    _write_video(tmp_path / "masks" / "b.avi", 9, seed=1)
    _write_frames(tmp_path / "masks" / "spare", 2)
    storage = _video(tmp_path / "videos", tmp_path / "masks")
    entries = json.loads(json.dumps(list(storage.entries())))
    assert entries == [
        ["a", str(tmp_path / "videos" / "a.mkv"), 12, str(tmp_path / "masks" / "a"), 12],
        ["b", str(tmp_path / "videos" / "b"), 9, str(tmp_path / "masks" / "b.avi"), 9],
    ]
    for entry in entries:
        numbers = storage.choose(entry[0], entry[2])
        expected = [_frame(number, seed) for number in numbers for seed in (0, 1)]
        np.testing.assert_array_equal(np.stack(storage.read(entry)), np.stack(expected))


def test_annotations_of_another_length_or_size(tmp_path):
    _write_frames(tmp_path / "videos" / "a", 12)
    masks = _write_frames(tmp_path / "masks" / "a", 11)
    storage = _video(tmp_path / "videos", tmp_path / "masks", frames=12)
    assert _refused(_only, storage) == f"{masks}: 11 frames, its video has 12"
    _write_frames(tmp_path / "masks" / "a", 12, shape=(16, 23))
    assert _refused(_only, storage) == f"{masks}: frame 0 has 23x16 pixels, the clip's first 24x16"


def test_frames_of_other_sizes(tmp_path):
    folder = _write_frames(tmp_path / "a", 12)
    Image.fromarray(_frame(5, shape=(8, 24))).save(folder / "00005.png")
    message = f"{folder}: frame 5 has 24x8 pixels, the clip's first 24x16"
    assert _refused(_only, _video(tmp_path, frames=12)) == message


# --- refusals


def test_a_video_that_is_too_short(tmp_path):
    path = _write_video(tmp_path / "a.avi", 5)
    assert _refused(_only, _video(tmp_path, frames=6)) == f"{path}: 5 frames, tasks.t.frames asks for 6"
    assert _numbers(_only(_video(tmp_path, frames=5))) == list(range(5))


def test_damaged_videos_are_listed_and_refused_when_read(tmp_path):
    for suffix in LOSSLESS:
        path = _write_video(tmp_path / f"cut_{suffix[1:]}{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (tmp_path / "text.webm").write_bytes(b"no video" * 99)
    (tmp_path / "empty.mov").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 80), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    storage = _video(tmp_path, frames=12)
    entries = {entry[0]: entry for entry in storage.entries()}
    messages = {name: _refused(storage.read, entry) for name, entry in entries.items()}
    assert list(messages) == sorted(
        ["cut_avi", "cut_mkv", "cut_mov", "cut_mp4", "empty", "folder", "sound", "text"]
    )
    for name in ("cut_avi", "cut_mov", "cut_mp4", "empty", "text"):
        assert messages[name].startswith(f"{entries[name][1]}: unreadable video (")
    assert messages["sound"] == f"{tmp_path / 'sound.mkv'}: unreadable video (no video in it)"
    assert messages["folder"] == f"{tmp_path / 'folder'}: no frames in this folder"
    # nothing tells a Matroska file that was cut from a shorter one
    assert 0 < entries["cut_mkv"][2] < 12
    assert messages["cut_mkv"].endswith(f": {entries['cut_mkv'][2]} frames, tasks.t.frames asks for 12")


def test_a_file_that_promises_more_frames(tmp_path):
    path = _write_video(tmp_path / "a.avi", 4, codec=("mpeg4", "yuv420p"))
    storage = _video(tmp_path, frames=6)
    message = _refused(storage.read, ["a", str(path), 6])
    assert message == f"{path}: unreadable video (it ends before frame 4)"


def test_folders_that_are_refused(tmp_path):
    nowhere = f"{tmp_path}/nowhere"
    assert _refused(_video(nowhere).entries) == f"tasks.t.images: no folder '{nowhere}'"
    message = "no videos (.mp4, .mkv, .avi, .webm, .mov) or folders of frames in"
    assert _refused(_video(tmp_path).entries) == f"tasks.t.images: {message} '{tmp_path}'"
    _write_frames(tmp_path / "a", 1)
    assert _refused(_video(tmp_path, nowhere).entries) == f"tasks.t.annotations: no folder '{nowhere}'"
    (tmp_path / "a.mkv").write_bytes(b"")
    assert (
        _refused(_video(tmp_path).entries) == f"tasks.t.images: 'a' and 'a.mkv' have one name in {tmp_path}"
    )


@pytest.mark.parametrize(
    ("setting", "value", "least"), [("frames", 0, 1), ("stride", 0, 1), ("random_stride", -1, 0)]
)
def test_settings_that_are_refused(setting, value, least):
    with pytest.raises(UserError, match=f"^tasks.t.{setting}: {value} must be at least {least}$"):
        _video("x", **{setting: value})


def test_the_package_is_missing(tmp_path, monkeypatch):
    _write_frames(tmp_path / "folders" / "a")
    _write_video(tmp_path / "files" / "a.mkv")
    monkeypatch.setitem(sys.modules, "av", None)
    message = _refused(_video(tmp_path / "files").entries)
    assert message == "a video file needs a package that is missing: pip install delvm[video]"
    assert len(_only(_video(tmp_path / "folders"))) == 3  # pictures need no av
