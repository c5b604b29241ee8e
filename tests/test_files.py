import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from delvm.errors import UserError
from delvm.images.files import decode_picture, read_picture

PALETTE = np.array([(0, 0, 0), (255, 0, 0), (0, 128, 255), (40, 200, 10)], np.uint8)


def _picture(seed, shape=(24, 36)):
    return np.random.default_rng(seed).integers(256, size=(*shape, 3), dtype=np.uint8)


def _save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def _refused(function, *arguments):
    """The message with which a call is refused, one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- one picture


def test_a_picture_is_read_as_it_is(tmp_path):
    picture = _picture(0)
    out = read_picture(_save(tmp_path / "a.png", picture))
    assert (out.dtype, out.shape) == (np.uint8, (24, 36, 3))
    np.testing.assert_array_equal(out, picture)
    plain = np.full((24, 36, 3), (200, 100, 50), np.uint8)  # a JPEG changes it by rounding alone
    jpeg = read_picture(_save(tmp_path / "a.jpg", plain))
    assert abs(jpeg.astype(int) - plain).max() <= 2


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda pixels: pixels),
        (2, lambda pixels: pixels[:, ::-1]),
        (3, lambda pixels: pixels[::-1, ::-1]),
        (4, lambda pixels: pixels[::-1]),
        (5, lambda pixels: pixels.swapaxes(0, 1)),
        (6, lambda pixels: np.rot90(pixels, -1)),
        (7, lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
def test_a_photograph_is_turned_upright(tmp_path, orientation, upright):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation  # how the camera was held
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), upright(pixels))


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
    message = _refused(read_picture, path)
    assert message == f"{path}: unreadable picture (more than 8 bits a channel; save it with 8)"


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
    assert _refused(read_picture, path) == f"{path}: unreadable picture (not a picture)"
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


def test_a_picture_out_of_a_larger_file(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", exif=exif)
    np.testing.assert_array_equal(decode_picture(buffer, "a.tar: 7"), np.rot90(pixels, -1))
    for data in (b"a note", b""):  # the message has no address in it, which would be another in every run
        message = _refused(decode_picture, io.BytesIO(data), "a.tar: 7")
        assert message == "a.tar: 7: unreadable picture (not a picture)"
