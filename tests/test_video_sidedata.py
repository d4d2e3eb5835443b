"""What a picture carries beside its pixels, and no encoder is told, is said."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import av
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from duovsr.errors import Remark
from duovsr.video.reader import VideoReader
from tests.clips import Clip, write_clip
from tests.pieces import copy_clip

CAPTION = b"\xb5\x00\x31GA94\x03\x41\xff\xfc\x94\x2c\xff"  # ITU-T T.35: one pair of CEA-608's bytes
PROFILE = b"\0\0\0\x80" + b"none" * 31


def said(path: Path) -> list[str]:
    with VideoReader(path) as reader:
        assert list(reader)
    return reader.notices


def test_closed_captions_are_said(tmp_path: Path) -> None:
    """Broadcasts have them in the pictures, and not in the first of all."""
    clip = Clip(pts=range(12), time_base=Fraction(1, 25), pix_fmt="yuv420p", options={"bf": "0", "slices": "1"})
    plain = write_clip(tmp_path / "plain.h264", clip)
    message = b"\0\0\1\x06\x04" + bytes([len(CAPTION)]) + CAPTION + b"\x80"
    with av.open(str(plain)) as container, av.open(str(tmp_path / "in.ts"), "w") as out:
        video = out.add_stream_from_template(container.streams.video[0], opaque=True)
        for number, packet in enumerate(packet for packet in container.demux() if packet.size):
            data = bytes(packet)
            slice_at = max(data.rfind(b"\0\0\1" + kind) for kind in (b"\x65", b"\x41", b"\x61", b"\x01"))
            with_caption = av.Packet(data[:slice_at] + message + data[slice_at:] if number > 4 else data)
            with_caption.pts = with_caption.dts = 3600 * number
            with_caption.time_base, with_caption.stream = Fraction(1, 90000), video
            with_caption.is_keyframe = packet.is_keyframe
            out.mux(with_caption)
    assert said(tmp_path / "in.ts") == ["closed captioning inside the pictures is not kept"]
    assert said(plain) == []


def box(name: bytes, *content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, content)), name) + b"".join(content)


def test_360_degrees_and_3d_are_said(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip())
    projection = box(b"proj", box(b"prhd", bytes(16)), box(b"equi", bytes(20)))
    extra = box(b"st3d", b"\0\0\0\0\1") + box(b"sv3d", box(b"svhd", b"\0\0\0\0x\0"), projection)
    data = bytearray(source.read_bytes())
    place, end, sizes = 0, len(data), []
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        while data[place + 4 : place + 8] != name:
            place += struct.unpack_from(">I", data, place)[0]
        sizes.append(place)
        end = place + struct.unpack_from(">I", data, place)[0]
        place += 16 if name == b"stsd" else 8
    data[end:end] = extra
    for size in sizes:
        struct.pack_into(">I", data, size, struct.unpack_from(">I", data, size)[0] + len(extra))
    source.write_bytes(data)
    assert said(source) == [
        "the arrangement of the two views of 3D is not kept",
        "the projection of 360-degree video is not kept",
    ]


def test_3d_that_the_tags_tell_is_kept_in_matroska(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(stream_metadata={"stereo_mode": "left_right"}))
    assert copy_clip(source, tmp_path / "out.mkv").notices == []
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.streams.video[0].metadata["stereo_mode"] == "left_right"
    lost = "metadata of streams is not kept, mp4 does not hold it: stereo_mode (#0)"
    assert copy_clip(source, tmp_path / "out.mp4").notices == [lost]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("pix_fmt", ["rgb24", "rgba", "gray", "rgb48be", "ya8", "monob"])
def test_a_png_with_a_colour_profile(tmp_path: Path, pix_fmt: str) -> None:
    """PyAV and FFmpeg both free its name: in another process, for that one would die."""
    source = write_clip(tmp_path / "in.png", Clip(pts=(0,), codec="png", pix_fmt=pix_fmt), "image2")
    data = source.read_bytes()
    assert said(source) == []
    source.write_bytes(data[:33] + chunk(b"iCCP", b"Display P3\0\0" + zlib.compress(PROFILE)) + data[33:])
    code = (
        "import sys; from pathlib import Path; from duovsr.video.reader import VideoReader\n"
        "with VideoReader(Path(sys.argv[1])) as reader: list(reader)\n"
        "print(*reader.notices)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the ICC colour profile is not kept\n")


@pytest.mark.parametrize(("name", "is_said"), [(b"Display P3", True), (b"sRGB IEC61966-2.1", False)])
def test_a_jpeg_with_a_colour_profile(tmp_path: Path, name: bytes, is_said: bool) -> None:
    """Images without one are sRGB, and their output is tagged so."""
    source = write_clip(tmp_path / "in.jpg", Clip(pts=(0,), codec="mjpeg", pix_fmt="yuvj420p"), "image2")
    data, profile = source.read_bytes(), PROFILE + name
    segment = b"ICC_PROFILE\0\1\1" + profile
    source.write_bytes(data[:2] + b"\xff\xe2" + struct.pack(">H", 2 + len(segment)) + segment + data[2:])
    assert said(source) == (["the ICC colour profile is not kept"] if is_said else [])


@pytest.mark.parametrize("name", ["in.jpg", "in.png", "in.webp", "in.tif"])
def test_the_texts_of_images_are_said(tmp_path: Path, name: str) -> None:
    """But neither how the pixels are turned, which they are, nor what wrote the file."""
    image, exif = Image.new("RGB", (32, 24)), Image.Exif()
    exif.update({0x0112: 6, 0x0131: "writer"})
    image.save(tmp_path / name, exif=exif)
    assert said(tmp_path / name) == []
    exif.update({0x010E: "a view", 0x010F: "Maker"})
    image.save(tmp_path / name, exif=exif)
    [notice] = said(tmp_path / name)
    assert notice.startswith("metadata of images is not kept: ")
    assert {"ImageDescription", "Make"} <= set(notice.partition(": ")[2].split(", "))
    assert not isinstance(notice, Remark)


def test_texts_of_png_are_said_briefly(tmp_path: Path) -> None:
    """Those of all images, in a line, whatever the encoding."""
    (tmp_path / "in").mkdir()
    for number, keys in enumerate((["Title"], ["Title", "Comment"], [f"key {n}" for n in range(40)])):
        texts = PngInfo()
        for key in keys:
            texts.add_text(key, "text")
        Image.new("RGB", (32, 24)).save(tmp_path / "in" / f"{number}.png", pnginfo=texts)
    [notice] = said(tmp_path / "in")
    assert notice.startswith("metadata of images is not kept: Title, Comment, key 0, ")
    assert notice.endswith(" ...") and len(notice) < 140
    odd = tmp_path / "odd.png"
    Image.new("RGB", (32, 24)).save(odd)
    data = odd.read_bytes()
    odd.write_bytes(data[:33] + chunk(b"tEXt", b"caf\xe9\0text") + data[33:])
    assert said(odd) == ["metadata of images is not kept: texts in an unknown encoding"]
