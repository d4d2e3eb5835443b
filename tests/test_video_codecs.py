"""What is chosen to write the output: codec, pixel format, settings; and that a piece comes out the same every time."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from duovsr.errors import UsageError
from duovsr.video import codecs
from duovsr.video.codecs import CODECS, Encoding, choose_encoding
from duovsr.video.color import ColorTags
from duovsr.video.info import VideoInfo
from duovsr.video.sidedata import HDRMetadata, MasteringDisplay
from tests.clips import coded_pictures, probe

HDR = HDRMetadata(
    MasteringDisplay(
        red=(34000, 16000),
        green=(13250, 34500),
        blue=(7500, 3000),
        white=(15635, 16450),
        min_luminance=50,
        max_luminance=10000000,
    ),
    (1000, 400),
)
CONTAINER = {"rawvideo": "nut"}  # of those that Matroska does not take here
SOFTWARE = [name for name, codec in CODECS.items() if not codec.hardware]


def source(depth: int = 8, alpha: bool = False, hdr: HDRMetadata | None = None) -> VideoInfo:
    return VideoInfo(
        path=Path("in.mkv"),
        width=64,
        height=48,
        time_base=Fraction(1, 25),
        frame_rate=Fraction(25),
        num_frames=12,
        duration=None,
        sample_aspect_ratio=None,
        rotation=0,
        bit_depth=depth,
        color=ColorTags(2, 2, 2, 0),
        codec="h264",
        audio_codec=None,
        has_alpha=alpha,
        hdr=hdr,
    )


def choose(
    info: VideoInfo,
    format_name: str = "matroska",
    codec: str | None = None,
    *options: tuple[str, str],
    size: tuple[int, int] = (128, 96),
    pix_fmt: str | None = None,
    crf: int | None = None,
) -> Encoding:
    return choose_encoding(
        info, *size, format_name, codec=codec, crf=crf, pix_fmt=pix_fmt, encoder_options=tuple(options)
    )


def encode(path: Path, encoding: Encoding, frames: int = 12, size: tuple[int, int] = (128, 96)) -> Path:
    """Moving gradients, opaque on the left and transparent on the right where the format can say so."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(encoding.encoder, rate=25, options=encoding.options)
        video.width, video.height = size
        video.pix_fmt = encoding.pix_fmt
        video.codec_context.time_base = Fraction(1, 25)
        for frame in coded_pictures(frames, size, encoding.pix_fmt):
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


@pytest.mark.parametrize(
    ("depth", "alpha", "format_name", "expected"),
    [
        (8, False, "mp4", ("h264", "yuv420p")),
        (10, False, "mp4", ("hevc", "yuv420p10le")),
        (8, False, "webm", ("vp9", "yuv420p")),
        (10, False, "webm", ("av1", "yuv420p10le")),
        (8, True, "mp4", ("h264", "yuv420p")),
        (16, True, "mp4", ("hevc", "yuv420p10le")),
        (8, True, "matroska", ("vp9", "yuva420p")),
        (8, True, "webm", ("vp9", "yuva420p")),
        (8, True, "mov", ("prores", "yuva444p10le")),
        (16, True, "mov", ("prores", "yuva444p10le")),
    ],
)
def test_defaults_follow_source_and_container(
    depth: int, alpha: bool, format_name: str, expected: tuple[str, str]
) -> None:
    encoding = choose(source(depth, alpha), format_name)
    assert (encoding.name, encoding.pix_fmt) == expected
    assert encoding.alpha == (alpha and format_name != "mp4")
    flattened = f"transparency is flattened on black: {expected[0]} in mp4 ({expected[1]}) does not hold it"
    assert (flattened in encoding.notices) == (alpha and format_name == "mp4")


def test_transparency_of_a_chosen_codec() -> None:
    assert choose(source(16, True), "matroska", "ffv1").pix_fmt == "gbrap16le"
    assert choose(source(8, True), "mp4", "ffv1").pix_fmt == "bgra"
    assert not choose(source(8, True), "mp4", "vp9").alpha  # the muxer has no place for VP9's second picture
    flattened = choose(source(8, True), "mov", "prores", pix_fmt="yuv422p10le")
    assert not flattened.alpha
    assert "transparency is flattened on black: prores in mov (yuv422p10le)" in flattened.notices[0]
    opaque = choose(source(8, False), "webm", "vp9", pix_fmt="yuva420p")
    assert (opaque.alpha, opaque.notices) == (False, ())


@pytest.mark.parametrize(
    ("codec", "suffix", "depth"),
    [("vp9", ".webm", 8), ("prores", ".mov", 8), ("ffv1", ".mkv", 16), ("ffv1", ".mp4", 8)],
)
def test_transparency_is_in_the_file(tmp_path: Path, codec: str, suffix: str, depth: int) -> None:
    format_name = {".webm": "webm", ".mov": "mov", ".mp4": "mp4", ".mkv": "matroska"}[suffix]
    path = encode(tmp_path / f"out{suffix}", choose(source(depth, True), format_name, codec), frames=2)
    with av.open(str(path)) as container:
        if codec == "vp9":  # FFmpeg's own decoder drops it
            decoder = av.CodecContext.create("libvpx-vp9", "r")
            packet = next(packet for packet in container.demux(video=0) if packet.size)
            frame = decoder.decode(packet)[0]  # type: ignore[attr-defined]
        else:
            frame = next(container.decode(video=0))
    alpha = frame.reformat(format="rgba").to_ndarray()[..., 3]
    assert alpha[:, :56].min() >= 250
    assert alpha[:, 72:].max() <= 5


def test_own_options_come_last() -> None:
    encoding = choose(source(), "mp4", "h264", ("preset", "slow"), ("aq-mode", "3"), ("x264-params", "ref=2"))
    assert encoding.options == {
        "preset": "slow",
        "mbtree": "0",
        "crf": "18",
        "aq-mode": "3",
        "x264-params": "ref=2",
    }
    hevc = choose(source(10, hdr=HDR), "mp4", "hevc", ("x265-params", "open-gop=1"), ("x265-params", "ref=2"))
    assert hevc.options["x265-params"].startswith("log-level=none:open-gop=0:hdr10=1:")
    assert hevc.options["x265-params"].endswith(":open-gop=1:ref=2")
    assert choose(source(), "mp4", "h264", ("crf", "30")).options["crf"] == "30"


def test_of_a_list_of_options_the_last_counts(tmp_path: Path) -> None:
    """What `merge` builds on: libx265 takes the later of two values."""
    coarse, fine = (
        encode(tmp_path / f"{qp}.mkv", choose(source(), "matroska", "hevc", *options)).stat().st_size
        for qp, options in (
            ("coarse", [("x265-params", "qp=10"), ("x265-params", "qp=45")]),
            ("fine", [("x265-params", "qp=45"), ("x265-params", "qp=10")]),
        )
    )
    assert coarse < fine / 2


@pytest.mark.parametrize(
    ("codec", "option", "message"),
    [
        ("h264", ("presett", "slow"), "encoder libx264 has no option `presett`"),
        ("av1", ("x264-params", "ref=2"), "encoder libsvtav1 has no option `x264-params`"),
        ("h264", ("preset", "slo"), "encoder libx264 refuses `preset=slo` for 128x96 in `yuv420p`"),
        ("h264", ("x264-params", "foo=1"), r"refuses `x264-params=foo=1`: Error parsing option 'foo = 1'$"),
        ("h264", ("x264opts", "foo=1"), r"encoder libx264 refuses `x264opts=foo=1`"),
        ("hevc", ("x265-params", "foo=1"), r"refuses `x265-params=foo=1`: Unknown option: foo$"),
        ("hevc", ("x265-params", "aq-mode=zz"), r"Invalid value for aq-mode: zz$"),
        ("av1", ("svtav1-params", "foo=1"), r"Error parsing option foo: 1$"),
        ("av1", ("preset", "99"), "encoder libsvtav1 refuses `preset=99`"),
        ("vp9", ("cpu-used", "99"), "encoder libvpx-vp9 refuses `cpu-used=99`"),
        ("ffv1", ("slices", "5"), "encoder ffv1 refuses `slices=5`"),
    ],
)
def test_options_that_the_encoder_does_not_take(codec: str, option: tuple[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        choose(source(), "matroska", codec, option)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert av.logging.get_level() is None


@pytest.mark.parametrize(
    ("codec", "option"),
    [
        ("h264", ("color_range", "pc")),
        ("vp9", ("colorspace", "bt709")),
        ("ffv1", ("color_primaries", "bt2020")),
        ("av1", ("color_trc", "smpte2084")),
        ("h264", ("x264-params", "ref=2:colormatrix=bt709")),
        ("h264", ("x264opts", "colormatrix=bt2020nc:fullrange=on")),
        ("hevc", ("x265-params", "range=full")),
        ("av1", ("svtav1-params", "color-range=1")),
    ],
)
def test_tags_of_colour_are_no_options(codec: str, option: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="would tag colours falsely"):
        choose(source(), "matroska", codec, option)


def test_rawvideo_is_for_pipes() -> None:
    for format_name in ("mp4", "matroska", "mov", "webm"):
        with pytest.raises(UsageError, match="codec `rawvideo` is for pipes alone") as caught:
            choose(source(), format_name, "rawvideo")
        assert ".mkv" not in str(caught.value.hint)
    with pytest.raises(UsageError) as caught:
        choose(source(), "mp4", "h265")
    assert "ffv1" in str(caught.value.hint) and "rawvideo" not in str(caught.value.hint)


def test_a_close_name_is_hinted() -> None:
    with pytest.raises(UsageError) as caught:
        choose(source(), "mp4", "h264", ("presett", "slow"))
    assert caught.value.hint == "did you mean `preset`?"


@pytest.mark.parametrize(
    ("codec", "depth", "pix_fmt", "cq"),
    [
        ("h264_nvenc", 8, "yuv420p", "19"),
        ("h264_nvenc", 10, "yuv420p", "19"),
        ("hevc_nvenc", 8, "yuv420p", "22"),
        ("hevc_nvenc", 10, "p010le", "22"),
        ("av1_nvenc", 10, "p010le", "28"),
    ],
)
def test_choice_of_nvenc(monkeypatch: pytest.MonkeyPatch, codec: str, depth: int, pix_fmt: str, cq: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip("this build of FFmpeg has no NVENC")
    monkeypatch.setattr(codecs, "check_encoder", lambda *arguments: None)  # few machines have the hardware
    encoding = choose(source(depth), "mp4", codec, size=(640, 480))
    assert (encoding.encoder, encoding.pix_fmt) == (codec, pix_fmt)
    assert encoding.options == {"preset": "p5", "b": "0", "cq": cq}
    assert choose(source(depth), "mp4", codec, ("qp", "20"), size=(640, 480)).options.get("cq") is None


@pytest.mark.parametrize("codec", ["h264_nvenc", "hevc_nvenc", "av1_nvenc"])
def test_nvenc_opens_or_says_why_not(codec: str) -> None:
    try:
        choose(source(), "mp4", codec, size=(640, 480))
    except UsageError as error:
        assert f"{codec}" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        assert error.hint  # noqa: PT017


def test_an_encoder_that_the_build_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", set())
    with pytest.raises(UsageError, match="this build of FFmpeg has no encoder `libx264`"):
        choose(source())


@pytest.mark.parametrize("codec", ["hevc", "av1"])
def test_hdr10_is_in_the_file(tmp_path: Path, codec: str) -> None:
    encoding = choose(source(10, hdr=HDR), "matroska", codec)
    assert encoding.notices == ()
    found = probe(encode(tmp_path / "out.mkv", encoding)).hdr
    assert found is not None
    assert found.light_level == (1000, 400)
    assert found.mastering_display is not None
    assert HDR.mastering_display is not None
    for field in ("red", "green", "blue", "white"):
        x_y = getattr(found.mastering_display, field), getattr(HDR.mastering_display, field)
        assert np.abs(np.subtract(*x_y)).max() <= 1  # AV1 counts chromaticities in 1/65536
    assert abs(found.mastering_display.min_luminance - 50) <= 1
    assert abs(found.mastering_display.max_luminance - 10000000) <= 1


def test_parts_of_hdr10() -> None:
    light = HDRMetadata(None, (1000, 400))
    assert choose(source(10, hdr=light), "mp4", "av1").options["svtav1-params"] == "content-light=1000,400"
    display = HDRMetadata(HDR.mastering_display, None)
    assert "max-cll" not in choose(source(10, hdr=display), "mp4", "hevc").options["x265-params"]
    assert choose(source(10, hdr=HDR), "matroska", "ffv1").notices == (
        "HDR10 mastering data is not kept: ffv1 does not write it here, hevc and av1 do",
    )


ENCODE_AND_HASH = """
import hashlib, sys
from pathlib import Path
import av
from tests.test_video_codecs import CONTAINER, choose, encode, source
for size in ((64, 48), (162, 122)):
    encoding = choose(source(int(sys.argv[3])), CONTAINER.get(sys.argv[2], "matroska"), sys.argv[2], size=size)
    path = encode(Path(sys.argv[1]), encoding, frames=40, size=size)
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            print(hashlib.sha256(bytes(packet)).hexdigest())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills fresh memory with a given byte")
@pytest.mark.parametrize(("codec", "depth"), [(name, 8) for name in SOFTWARE] + [("h264", 10), ("hevc", 10)])
def test_a_piece_is_encoded_the_same_every_time(tmp_path: Path, codec: str, depth: int) -> None:
    """Memory that an encoder reads without having written it would change the packets."""
    outputs = set()
    for byte in ("1", "85", "255"):
        arguments = [str(tmp_path / f"{byte}.mkv"), codec, str(depth)]
        environment = os.environ | {"MALLOC_PERTURB_": byte, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", ENCODE_AND_HASH, *arguments]
        outputs.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(outputs) == 1
    assert len(next(iter(outputs)).splitlines()) >= 80


@pytest.mark.parametrize("codec", SOFTWARE)
def test_a_piece_starts_with_a_keyframe_and_refers_to_nothing_before_it(tmp_path: Path, codec: str) -> None:
    """Two pieces in a row, through one decoder: as many pictures as each alone, and the same ones."""
    encoding = choose(source(), CONTAINER.get(codec, "matroska"), codec)
    path = encode(tmp_path / "piece.mkv", encoding, frames=30)
    with av.open(str(path)) as container:
        alone = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    packets = []
    for _ in range(2):
        with av.open(str(path)) as container:
            packets.append([packet for packet in container.demux(video=0) if packet.size])
    assert all(piece[0].is_keyframe for piece in packets)
    with av.open(str(path)) as container:
        decoder = container.streams.video[0].codec_context
        frames = [frame for packet in (*packets[0], *packets[1], None) for frame in decoder.decode(packet)]
    joined = [frame.to_ndarray(format="rgb24") for frame in frames]
    assert len(joined) == 60
    assert (np.stack(joined) == np.stack(alone + alone)).all()
