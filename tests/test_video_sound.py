"""Sound that a container does not hold is converted, and every sample stays at its time."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from duovsr.video.window import Window
from tests.clips import Clip, click_times, packet_hashes, start_time, write_clicks, write_clip
from tests.pieces import copy_beside, copy_clip, copy_streams


@pytest.mark.parametrize(
    ("codec", "source_suffix", "suffix", "becomes"),
    [
        ("flac", ".mkv", ".webm", "opus"),
        ("libmp3lame", ".mkv", ".webm", "opus"),
        ("aac", ".mp4", ".webm", "opus"),
        ("ac3", ".mkv", ".webm", "opus"),
        ("pcm_s16le", ".mov", ".webm", "opus"),
        ("libopus", ".mkv", ".mov", "aac"),
        ("flac", ".mkv", ".mov", "alac"),
        ("pcm_u8", ".mkv", ".mp4", "alac"),
        ("adpcm_ms", ".avi", ".mp4", "aac"),
        ("adpcm_ms", ".avi", ".mkv", "flac"),
    ],
)
@pytest.mark.parametrize("start", [Fraction(0), Fraction(13, 10)])
def test_sound_that_the_container_does_not_hold_is_converted_in_time(
    tmp_path: Path, codec: str, source_suffix: str, suffix: str, becomes: str, start: Fraction
) -> None:
    if source_suffix == ".avi" and start:
        pytest.skip("avi has no late starts")
    rate = 48000 if codec in ("libopus", "ac3") else 44100
    video = "mpeg4" if source_suffix == ".avi" else "libx264"
    source = write_clicks(tmp_path / f"in{source_suffix}", codec, rate=rate, start=start, video=video)
    target = tmp_path / f"out{suffix}"
    name = {"mp3": "mp3", "libmp3lame": "mp3", "libopus": "opus"}.get(codec, codec)
    held = {".mkv": "matroska"}.get(suffix, suffix[1:])
    assert copy_clip(source, target).notices[-1] == (
        f"audio stream #1 ({name}) is converted to {becomes}: {held} does not hold it"
    )
    with av.open(str(target)) as container:
        assert container.streams.audio[0].codec_context.codec.canonical_name == becomes
    before, after = click_times(source), click_times(target)
    assert len(before) == 4
    moves = np.subtract(after, before)
    assert np.abs(moves).max() <= 0.001
    picture_moves = start_time(target, "video") - start_time(source, "video")
    assert picture_moves == 0


@pytest.mark.parametrize("layout", ["mono", "3.0", "quad", "5.1", "5.1(side)", "7.1"])
@pytest.mark.parametrize(("codec", "suffix"), [("flac", ".webm"), ("pcm_u8", ".mp4"), ("libopus", ".mov")])
def test_all_channels_are_converted(tmp_path: Path, codec: str, suffix: str, layout: str) -> None:
    layout = "5.1" if codec == "libopus" and "(" in layout else layout
    source = write_clicks(tmp_path / "in.mkv", codec, rate=48000, layout=layout)
    copy_beside(source, tmp_path / f"out{suffix}")
    with av.open(str(source)) as before, av.open(str(tmp_path / f"out{suffix}")) as after:
        channels = before.streams.audio[0].codec_context.layout.nb_channels
        assert after.streams.audio[0].codec_context.layout.nb_channels == channels
    assert np.abs(np.subtract(click_times(tmp_path / f"out{suffix}"), click_times(source))).max() <= 0.001


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_sound_whose_packets_tell_no_length_is_copied_to_its_end(tmp_path: Path, suffix: str) -> None:
    source, target = write_clicks(tmp_path / "in.mkv", "alac"), tmp_path / f"out{suffix}"
    copy_clip(source, target)
    assert packet_hashes(target, "audio") == packet_hashes(source, "audio")


def hollow(source: Path, path: Path, first: Fraction, last: Fraction) -> Path:
    """A copy of `source` whose sound has a hole."""
    with av.open(str(source)) as container, av.open(str(path), "w") as out:
        copies = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in container.streams}
        for packet in container.demux():
            inside = packet.pts is not None and first <= packet.pts * packet.time_base < last
            if packet.size and not (inside and packet.stream.type == "audio"):
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    return path


def test_converted_sound_keeps_its_place_after_a_hole(tmp_path: Path) -> None:
    whole = write_clicks(tmp_path / "whole.mkv", "pcm_s16le")
    source = hollow(whole, tmp_path / "in.mkv", Fraction(7, 10), Fraction(23, 10))
    copy_beside(source, tmp_path / "out.webm")
    assert np.abs(np.subtract(click_times(tmp_path / "out.webm"), [0.5025, 2.5025, 3.5025])).max() <= 0.001
    with av.open(str(tmp_path / "out.webm")) as container:
        seconds = sum(frame.samples for frame in container.decode(audio=0)) / 48000
    assert abs(seconds - 4) < 0.05  # the hole is silence, not a jump


def test_converted_sound_of_a_window(tmp_path: Path) -> None:
    source, target = write_clicks(tmp_path / "in.mkv", "pcm_s16le", video="libvpx-vp9"), tmp_path / "out.webm"
    copy_streams(source, target, Window(Fraction(1), Fraction(3), Fraction(-1)))
    assert np.abs(np.subtract(click_times(target), [0.5025, 1.5025])).max() <= 0.001


LONG_PACKETS = [(codec, suffix) for codec in ("tta", "wavpack") for suffix in (".mkv", ".mp4", ".webm")]


@pytest.mark.parametrize(
    ("start", "end"), [(Fraction(3, 10), Fraction(9, 10)), (Fraction(13, 10), None), (None, Fraction(2))]
)
@pytest.mark.parametrize(("codec", "suffix"), [*LONG_PACKETS, ("flac", ".webm")])
def test_a_piece_has_all_of_its_converted_sound(
    tmp_path: Path, codec: str, suffix: str, start: Fraction | None, end: Fraction | None
) -> None:
    """Packets of TTA last a second, those of WavPack half of one: a piece may lie in the middle of one."""
    source, target = write_clicks(tmp_path / "in.mkv", codec), tmp_path / f"out{suffix}"
    first, last = start or Fraction(0), end or Fraction(4)
    copier = copy_beside(source, target, window=Window(start, end, -first))
    reason = "its packets are too long to be cut" if suffix == ".mkv" else f"{suffix[1:]} does not hold it"
    assert len(copier.notices) == 1
    assert copier.notices[0].endswith(f": {reason}")
    expected = [click - float(first) for click in click_times(source) if first < click < last]
    assert np.abs(np.subtract(click_times(target), expected)).max() <= 0.001
    with av.open(str(target)) as container:
        frames = [(frame.pts * frame.time_base, frame.samples / frame.rate) for frame in container.decode(audio=0)]
    assert abs(frames[0][0]) <= 0.03  # what a lossy encoder begins with
    assert abs(frames[-1][0] + frames[-1][1] - (last - first)) <= 0.03


@pytest.mark.parametrize("codec", ["tta", "wavpack"])
def test_a_whole_clip_keeps_its_long_packets(tmp_path: Path, codec: str) -> None:
    source, target = write_clicks(tmp_path / "in.mkv", codec), tmp_path / "out.mkv"
    assert copy_beside(source, target).notices == []
    assert packet_hashes(target, "audio") == packet_hashes(source, "audio")


def test_damaged_sound_is_counted_and_the_rest_stays_in_place(tmp_path: Path) -> None:
    whole, source = write_clicks(tmp_path / "whole.mkv", "flac"), tmp_path / "in.mkv"
    with av.open(str(whole)) as container, av.open(str(source), "w") as out:
        copies = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in container.streams}
        for index, packet in enumerate(packet for packet in container.demux() if packet.size):
            damaged = av.Packet(bytes(255) if packet.stream.type == "audio" and index % 3 == 0 else bytes(packet))
            damaged.pts, damaged.dts, damaged.time_base = packet.pts, packet.dts, packet.time_base
            damaged.is_keyframe, damaged.stream = packet.is_keyframe, copies[packet.stream_index]
            out.mux(damaged)
    copier = copy_beside(source, tmp_path / "out.webm")
    assert any(
        re.fullmatch(r"left out: \d+ damaged packets? of sound or subtitles", notice) for notice in copier.notices
    )
    heard = click_times(tmp_path / "out.webm")
    assert len(heard) >= 2
    assert max(min(abs(time - true) for true in click_times(whole)) for time in heard) <= 0.001


@pytest.mark.parametrize(("layout", "kept"), [("stereo", True), ("5.1", True), ("hexadecagonal", False)])
@pytest.mark.parametrize("suffix", [".mkv", ".nut"])
def test_pcm_without_a_layout_gets_one_in_mp4(tmp_path: Path, suffix: str, layout: str, kept: bool) -> None:
    """mp4 finds out at the very end that the places of channels are missing."""
    source, target = write_clicks(tmp_path / f"in{suffix}", "pcm_s24le", layout=layout), tmp_path / "out.mp4"
    notices = copy_clip(source, target).notices
    assert notices == ([] if kept else ["audio stream #1 (pcm_s24le) is not kept: mp4 does not hold it"])
    with av.open(str(target)) as container:
        assert [stream.layout.name for stream in container.streams.audio] == [layout] * kept
    if kept:
        assert np.abs(np.subtract(click_times(target), click_times(source))).max() <= 0.001


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_s24le", "pcm_u8"])
def test_a_piece_cuts_long_packets_of_pcm(tmp_path: Path, codec: str) -> None:
    """Some files hold a second in a packet: a piece has all of its sound all the same, and no other."""
    source, target, rate = tmp_path / "in.mkv", tmp_path / "out.mkv", 48000
    width = {"pcm_s16le": 4, "pcm_s24le": 6, "pcm_u8": 2}[codec]
    data = np.random.default_rng(0).integers(0, 256, 4 * rate * width, np.uint8).tobytes()
    with av.open(str(source), "w") as container:
        video, audio = container.add_stream("libx264", rate=25), container.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio.layout = "stereo"
        container.mux(video.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(video.encode(None))
        for second in range(4):
            packet = av.Packet(data[second * rate * width :][: rate * width])
            packet.stream, packet.time_base, packet.pts, packet.dts = audio, Fraction(1), second, second
            container.mux(packet)
    copier = copy_beside(source, target, window=Window(Fraction(6, 5), Fraction(29, 10), Fraction(-6, 5)))
    assert copier.notices == []
    with av.open(str(target)) as container:
        (audio,) = container.streams.audio
        packets = [packet for packet in container.demux(audio) if packet.size]
    assert packets[0].pts == 0
    assert b"".join(map(bytes, packets)) == data[int(1.2 * rate) * width : int(2.9 * rate) * width]


@pytest.mark.parametrize(
    ("codec", "container", "becomes"),
    [("eac3", "nut", "aac"), ("ac3", "nut", "ac3"), ("eac3", "mkv", "eac3"), ("ac3", "ts", "ac3")],
)
def test_sound_that_is_not_what_its_container_says(tmp_path: Path, codec: str, container: str, becomes: str) -> None:
    """NUT calls E-AC-3 AC-3, which mp4's muxer refuses at its very end."""
    source = write_clip(tmp_path / f"in.{container}", Clip(audio=[codec]))
    notices = copy_clip(source, tmp_path / "out.mp4").notices
    assert [str(notice) for notice in notices if "converted" in notice] == (
        [] if becomes == codec else ["audio stream #1 (ac3) is converted to aac: mp4 does not hold it"]
    )
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert out.streams.audio[0].codec_context.name == becomes
