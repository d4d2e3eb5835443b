"""What is not a video is refused in one line; what is one is described."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clips import AUDIO_RATE, Clip, picture, write_clip
from PIL import Image

from duovsr.errors import InputError
from duovsr.options import UpscaleOptions
from duovsr.video.color import ColorTags
from duovsr.video.reader import VideoReader
from tests.clips import probe


def write_sound(path: Path, cover: bool) -> None:
    """Sound alone, or with a cover picture."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=AUDIO_RATE)
        art = container.add_stream("png", rate=1) if cover else None
        if art is not None:
            art.width, art.height, art.pix_fmt = 64, 48, "rgb24"
            art.disposition = av.stream.Disposition.attached_pic
            container.mux(art.encode(av.VideoFrame.from_ndarray(picture(0, (64, 48)), format="rgb24")))
            container.mux(art.encode(None))
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1152), np.int16), format="s16p", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, index * 1152, Fraction(1, AUDIO_RATE)
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def cut_before_index(path: Path) -> None:
    data = write_clip(path, Clip(pts=range(0, 30 * 512, 512))).read_bytes()
    path.write_bytes(data[: data.rindex(b"moov") - 4])


BAD_INPUTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("missing.mp4", lambda path: None, "no such file"),
    "folder": ("folder.mp4", lambda path: path.mkdir(), "a folder, not a video"),
    "empty": ("empty.mp4", lambda path: path.touch(), "the file is empty"),
    "text": ("text.mp4", lambda path: path.write_text("not a video\n" * 500), "not a video"),
    "text named so": ("text.txt", lambda path: path.write_text("not a video\n" * 500), "a text file, not a video"),
    "subtitles": (
        "subs.srt",
        lambda path: path.write_text("1\n00:00:00,000 --> 00:00:01,000\nhi\n"),
        "no video stream",
    ),
    "noise": ("noise.mkv", lambda path: path.write_bytes(np.random.default_rng(0).bytes(40000)), "not a video"),
    "no index": ("cut.mp4", cut_before_index, "no usable index"),
    "sound": ("sound.mp3", lambda path: write_sound(path, cover=False), "no video stream"),
    "sound with cover": ("cover.mp3", lambda path: write_sound(path, cover=True), "no video stream"),
}


@pytest.mark.parametrize("opener", [probe, VideoReader])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_that_names_the_file(tmp_path: Path, case: str, opener: Callable[[Path], object]) -> None:
    name, make, reason = BAD_INPUTS[case]
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError, match=f"^{reason}.*{re.escape(name)}`$") as caught:
        opener(path)
    assert caught.value.exit_code == 3


DEFAULT = av.stream.Disposition.default


@pytest.mark.parametrize(
    ("sizes", "marked", "expected"),
    [(((32, 24), (64, 48)), None, 1), (((64, 48), (32, 24)), None, 0), (((32, 24), (64, 48)), 0, 0)],
)
def test_of_two_videos_the_larger_is_read_or_the_default(
    tmp_path: Path, sizes: tuple[tuple[int, int], ...], marked: int | None, expected: int
) -> None:
    singles = [write_clip(tmp_path / f"{size[0]}.mkv", Clip(size=size)) for size in sizes]
    with av.open(str(tmp_path / "both.mkv"), "w") as out, ExitStack() as opened:
        sources = [opened.enter_context(av.open(str(path))) for path in singles]
        copies = [out.add_stream_from_template(source.streams.video[0], opaque=True) for source in sources]
        for number, copy in enumerate(copies):
            copy.disposition = DEFAULT if number == marked else av.stream.Disposition(0)
        for source, copy in zip(sources, copies, strict=True):
            for packet in filter(lambda packet: packet.size, source.demux()):
                packet.stream = copy
                out.mux(packet)
    info = probe(tmp_path / "both.mkv")
    assert (info.width, info.height) == sizes[expected]


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def full_box(kind: bytes, *parts: bytes, version: int = 0) -> bytes:
    return box(kind, struct.pack(">I", version << 24), *parts)


def write_heic(path: Path, grid: bool) -> None:
    """Two pictures of 128x128 and a thumbnail of 64x64, as phones write them. With `grid` the picture to show is the
    two side by side, else the first."""
    movies = [write_clip(path.with_suffix(f".{n}.mkv"), HEVC_STILL) for n in range(2)]
    movies.append(write_clip(path.with_suffix(".small.mkv"), replace(HEVC_STILL, size=(64, 64))))
    payloads, headers = [], []
    for movie in movies:
        with av.open(str(movie)) as container:
            headers.append(container.streams.video[0].codec_context.extradata or b"")
            payloads.append(b"".join(map(bytes, container.demux(video=0))))
    if grid:
        payloads.append(struct.pack(">4B2H", 0, 0, 0, 1, 256, 128))  # one row, two columns
    properties = [box(b"hvcC", headers[0]), box(b"hvcC", headers[2])]
    properties += [full_box(b"ispe", struct.pack(">2I", *size)) for size in ((128, 128), (64, 64), (256, 128))]
    has = {1: b"\x01\x03", 2: b"\x01\x03", 3: b"\x02\x04", 4: b"\x05"}
    items = range(1, len(payloads) + 1)
    links = b"".join(struct.pack(">HB", item, len(has[item])) + has[item] for item in items)
    entries = (struct.pack(">2H", i, 0) + (b"grid" if i == 4 else b"hvc1") + b"\0" for i in items)
    described = b"".join(full_box(b"infe", entry, version=2) for entry in entries)
    references = box(b"dimg", struct.pack(">4H", 4, 2, 1, 2)) if grid else b""
    references += box(b"thmb", struct.pack(">3H", 3, 1, 4 if grid else 1))
    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")

    def meta(offset: int) -> bytes:
        places = b""
        for item, payload in zip(items, payloads, strict=True):
            places += struct.pack(">3H2I", item, 0, 1, offset, len(payload))
            offset += len(payload)
        return full_box(
            b"meta",
            full_box(b"hdlr", bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", struct.pack(">H", 4 if grid else 1)),
            full_box(b"iloc", struct.pack(">2BH", 0x44, 0, len(items)), places),
            full_box(b"iinf", struct.pack(">H", len(items)), described),
            full_box(b"iref", references),
            box(b"iprp", box(b"ipco", *properties), full_box(b"ipma", struct.pack(">I", len(items)), links)),
        )

    path.write_bytes(head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", *payloads))


# Without B-frames: of a clip as short as the wait for them, libx265 gives decoding times that it never wrote.
HEVC_STILL = Clip(
    (0,), size=(128, 128), codec="libx265", pix_fmt="yuv420p", options={"x265-params": "log-level=none:bframes=0"}
)


def test_a_picture_in_tiles_is_refused_and_one_in_a_piece_is_read(tmp_path: Path) -> None:
    """FFmpeg hands out every tile, and the thumbnail, as a video of its own."""
    write_heic(tmp_path / "whole.heic", grid=False)
    write_heic(tmp_path / "tiles.heic", grid=True)
    info = probe(tmp_path / "whole.heic")
    assert (info.width, info.height) == (128, 128)
    with pytest.raises(InputError, match=r"tiles.*tiles.heic`$") as caught:
        probe(tmp_path / "tiles.heic")
    assert caught.value.hint


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "in.mp4", Clip(pts=(0,)))
    if os.geteuid() == 0:  # permissions do not bind root

        def refuse(*args: object, **kwargs: object) -> None:
            raise av.error.PermissionError(13, "Permission denied")

        monkeypatch.setattr(av, "open", refuse)
    path.chmod(0)
    with pytest.raises(InputError, match="no permission to read"):
        probe(path)


def test_video_without_a_single_picture_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "in.mkv", Clip(pts=(0,), codec="ffv1", pix_fmt="bgr0"))
    with av.open(str(path)) as container:
        payload = next(bytes(packet) for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes().replace(payload, bytes(len(payload))))
    with pytest.raises(InputError, match=r"no picture of .* can be decoded"):
        probe(path)


def test_an_animated_webp_is_refused_with_a_hint(tmp_path: Path) -> None:
    """FFmpeg reads still ones only."""
    first, *others = (Image.fromarray(picture(index, (64, 48))) for index in range(3))
    first.save(tmp_path / "moving.webp", save_all=True, append_images=others)
    with pytest.raises(InputError, match="can be decoded") as caught:
        probe(tmp_path / "moving.webp")
    assert "animated WebP" in (caught.value.hint or "")


def test_names_that_look_like_protocols_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "take.mp4", Clip(pts=(0,))).rename(tmp_path / "clip: take 1.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe(Path("clip: take 1.mp4")).width == 64


def test_description(tmp_path: Path) -> None:
    clip = Clip(
        pts=range(0, 50 * 512, 512),
        codec="libx265",
        pix_fmt="yuv420p10le",
        options={"x265-params": "log-level=none"},
        color=(9, 16, 9, 1),
        aspect=Fraction(16, 11),
        audio=["aac"],
    )
    path = write_clip(tmp_path / "in.mp4", clip)
    info = probe(path)
    assert (info.path, info.width, info.height, info.rotation) == (path, 64, 48, 0)
    assert (info.time_base, info.frame_rate) == (Fraction(1, 12800), 25)
    assert (info.num_frames, info.duration) == (50, 2)
    assert (info.codec, info.audio_codec, info.bit_depth) == ("hevc", "aac", 10)
    assert (info.color, info.sample_aspect_ratio) == (ColorTags(9, 16, 9, 1), Fraction(16, 11))


@pytest.mark.parametrize("scale", [1, 1.13, 1.5, 2.7, 3.99, 4])
@pytest.mark.parametrize("size", [(64, 48), (43, 29), (7, 3), (1, 1), (720, 576), (33, 1080)])
def test_no_scale_changes_the_aspect_of_pixels(tmp_path: Path, size: tuple[int, int], scale: float) -> None:
    info = replace(probe(write_clip(tmp_path / "in.mp4")), width=size[0], height=size[1])
    for aspect in (None, Fraction(1), Fraction(16, 11), Fraction(65521, 65519)):
        given = replace(info, sample_aspect_ratio=aspect)
        assert given.aspect_at(*UpscaleOptions(scale=scale).target_size(*size)) == aspect


@pytest.mark.parametrize(
    ("source", "aspect", "size", "expected"),
    [
        ((64, 48), Fraction(4, 3), (128, 72), Fraction(1)),
        ((720, 576), Fraction(64, 45), (1920, 1080), Fraction(1)),
        ((720, 576), Fraction(16, 15), (1920, 1152), Fraction(4, 5)),
        ((64, 48), Fraction(1), (64, 96), Fraction(2)),
        ((64, 48), None, (64, 96), None),  # nobody knows the shape
    ],
)
def test_a_size_that_stretches_changes_the_aspect_of_pixels(
    tmp_path: Path,
    source: tuple[int, int],
    aspect: Fraction | None,
    size: tuple[int, int],
    expected: Fraction | None,
) -> None:
    info = probe(write_clip(tmp_path / "in.mp4"))
    info = replace(info, width=source[0], height=source[1], sample_aspect_ratio=aspect)
    assert info.aspect_at(*size) == expected


def test_full_range_by_pixel_format_and_by_tag(tmp_path: Path) -> None:
    jpeg = write_clip(
        tmp_path / "in.jpg", Clip(pts=(0,), codec="mjpeg", pix_fmt="yuvj420p", color=(2, 2, 2, 2)), "image2"
    )
    assert probe(jpeg).color.range == 2
    full = write_clip(tmp_path / "in.mp4", Clip(pts=(0,), color=(1, 1, 1, 2)))
    assert probe(full).color.range == 2


def test_plain_video_has_nothing_to_say(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "in.mp4", Clip())
    info = probe(path)
    assert (info.has_alpha, info.interlaced, info.hdr) == (False, False, None)
    with VideoReader(path) as reader:
        assert reader.info == info
        assert len(list(reader)) == reader.frames_read == 12
    assert (reader.notices, reader.window) == ([], (None, None))


def test_a_damaged_matrix_of_display_fits_the_frames(tmp_path: Path) -> None:
    """A matrix that is no rotation: the size that is told is the size that is read."""
    path = write_clip(tmp_path / "in.mp4", Clip(rotation=90))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # after version, times, identity, layer and volume
    for a, b, c, d in ((5, 3, -40, 2), (0, 0, 0, 0), (1, -9, 2, -1), (-(2**31), 2**31 - 1, -(2**31), 1)):
        data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(data)
        with VideoReader(path) as reader:
            frame = next(iter(reader))
        assert frame.pixels.shape == (reader.info.height, reader.info.width, 3)
