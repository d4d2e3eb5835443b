"""All that is not the picture comes along, or a line says what does not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from duovsr.video import window as video_window
from duovsr.video.remux import StreamCopier
from duovsr.video.window import Window
from tests.clips import Clip, edited, packet_hashes, start_time, write_clip
from tests.pieces import copy_beside, copy_clip, copy_streams

RICH = Clip(
    pts=range(0, 40 * 512, 512),
    audio=["aac", "libopus"],
    languages=["deu", "fra"],
    metadata={"title": "A clip", "comment": "made by a test"},
    chapters=[(0, 800, "One"), (800, 1600, "Two")],
)
MS = Fraction(1, 1000)


def titles(path: Path) -> list[tuple[Fraction, Fraction, str]]:
    with av.open(str(path)) as container:
        chapters = container.chapters()
    return [(c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]["title"]) for c in chapters]


def packet_times(path: Path, kind: str) -> list[Fraction]:
    with av.open(str(path)) as container:
        stream = container.streams.get({kind: 0})[0]
        return [packet.pts * packet.time_base for packet in container.demux(stream) if packet.size]


def assert_offset_is_kept(source: Path, target: Path) -> None:
    offsets = [start_time(path, "video") - start_time(path, "audio") for path in (source, target)]
    assert abs(offsets[0] - offsets[1]) <= MS


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("source_suffix", [".mp4", ".mkv", ".mov"])
def test_all_sound_tracks_chapters_and_metadata(tmp_path: Path, source_suffix: str, suffix: str) -> None:
    audio = ["aac", "libmp3lame"] if ".mov" in (suffix, source_suffix) else RICH.audio  # mov has no Opus
    languages = ["ger" if source_suffix == ".mov" else "deu", "fra"]
    clip = Clip(**{**vars(RICH), "audio": audio, "languages": languages})
    source, target = write_clip(tmp_path / f"in{source_suffix}", clip), tmp_path / f"out{suffix}"
    assert copy_clip(source, target).notices == []
    for index in range(2):
        assert packet_hashes(target, "audio", index) == packet_hashes(source, "audio", index)
    with av.open(str(target)) as container:
        german = "ger" if ".mov" in (suffix, source_suffix) else "deu"  # as QuickTime's language 2 is read
        assert [stream.metadata["language"] for stream in container.streams.audio] == [german, "fra"]
        metadata = {key.lower(): value for key, value in container.metadata.items()}
    assert (metadata["title"], metadata["comment"]) == ("A clip", "made by a test")
    assert titles(target) == [(0, Fraction(4, 5), "One"), (Fraction(4, 5), Fraction(8, 5), "Two")]
    assert_offset_is_kept(source, target)


@pytest.mark.parametrize("suffix", [".webm", ".mkv"])
def test_webm_sound_is_copied(tmp_path: Path, suffix: str) -> None:
    clip = Clip(codec="libvpx-vp9", pix_fmt="yuv420p", audio=["libopus"], languages=["deu"], chapters=[(0, 400, "One")])
    source, target = write_clip(tmp_path / "in.webm", clip), tmp_path / f"out{suffix}"
    assert copy_streams(source, target).notices == []
    assert packet_hashes(target, "audio") == packet_hashes(source, "audio")
    assert titles(target) == [(0, Fraction(2, 5), "One")]
    assert_offset_is_kept(source, target)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_dispositions(tmp_path: Path, suffix: str) -> None:
    def mark(out: av.container.OutputContainer, copies: dict[int, av.stream.Stream]) -> None:
        copies[1].disposition = av.stream.Disposition.comment
        copies[2].disposition = av.stream.Disposition.default | av.stream.Disposition.hearing_impaired

    clip = Clip(**{**vars(RICH), "audio": ["aac", "libmp3lame"]})
    marked = edited(write_clip(tmp_path / "in.mkv", clip), tmp_path / f"marked{suffix}", mark)
    copy_streams(marked, tmp_path / f"out{suffix}")
    with av.open(str(marked)) as before, av.open(str(tmp_path / f"out{suffix}")) as after:
        kept = [stream.disposition for stream in after.streams.audio]
        assert kept == [stream.disposition for stream in before.streams.audio]
    assert kept[0] != kept[1]
    assert av.stream.Disposition.default in kept[1]
    if suffix == ".mkv":
        assert av.stream.Disposition.hearing_impaired in kept[1]


def test_attachments_in_mkv(tmp_path: Path) -> None:
    source = edited(
        write_clip(tmp_path / "clip.mkv", RICH),
        tmp_path / "in.mkv",
        lambda out, copies: out.add_attachment("font.ttf", "font/ttf", b"a font"),
    )
    assert copy_clip(source, tmp_path / "out.mkv").notices == []
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert [(item.metadata["filename"], item.data) for item in container.streams.attachments] == [
            ("font.ttf", b"a font")
        ]
    assert copy_clip(source, tmp_path / "out.mp4").notices == ["attachment `font.ttf` is not kept: only mkv holds it"]


def test_what_is_not_wanted_is_left_out_without_a_word(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(audio=["flac", "aac"]))
    assert copy_streams(source, tmp_path / "out.mov", audio=False).notices == []
    with av.open(str(tmp_path / "out.mov")) as container:
        assert not container.streams.audio


def test_sound_outlives_the_picture(tmp_path: Path) -> None:
    """Packets after the last frame are copied too, and sound from a transport stream is rewrapped for mp4 and mkv."""
    source = write_clip(tmp_path / "in.ts", Clip(pts=(0, 512), pix_fmt="yuv420p", audio=["aac"]))
    packets = len(packet_hashes(source, "audio"))
    assert packets > 40
    for suffix in (".mp4", ".mkv"):
        target = tmp_path / f"out{suffix}"
        assert copy_clip(source, target).notices == []
        assert len(packet_hashes(target, "audio")) == packets
        with av.open(str(target)) as container:
            assert sum(frame.samples for frame in container.decode(audio=0)) >= (packets - 2) * 1024


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("damage", [b"\0", b"\xff"])
@pytest.mark.parametrize("number", [0, 9])
def test_a_damaged_packet_of_a_transport_stream_is_left_out(
    tmp_path: Path, number: int, damage: bytes, suffix: str
) -> None:
    """Muxers look into AAC from there, which says what it is in each packet."""
    source = write_clip(tmp_path / "in.ts", Clip(pts=range(0, 40 * 512, 512), pix_fmt="yuv420p", audio=["aac"]))
    with av.open(str(source)) as container:
        packet = [bytes(packet) for packet in container.demux(audio=0) if packet.size][number]
    data = source.read_bytes()
    at = data.index(packet[:40])
    source.write_bytes(data[: at + 2] + 5 * damage + data[at + 7 :])
    target = tmp_path / f"out{suffix}"
    notices = copy_beside(source, target).notices
    lost = len(packet_hashes(source, "audio")) - len(packet_hashes(target, "audio"))
    assert lost == 1 if damage == b"\0" else 1 < lost < 4  # a false length hides packets, and cuts one of them
    assert notices == [f"left out: {lost} damaged packet{'s' if lost > 1 else ''} of sound or subtitles"]
    if damage == b"\0":
        with av.open(str(target)) as container:
            assert sum(frame.samples for frame in container.decode(audio=0)) > 40 * 1024


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
@pytest.mark.parametrize("source_suffix", [".mkv", ".mp4"])
def test_a_window_cuts_and_moves(tmp_path: Path, source_suffix: str, suffix: str) -> None:
    intra = {"g": "1", "bf": "0"}
    clip = Clip(pts=range(0, 100 * 512, 512), options=intra, audio=["aac"], chapters=RICH.chapters)
    source, target = write_clip(tmp_path / f"in{source_suffix}", clip), tmp_path / f"out{suffix}"
    start, end = Fraction(52, 100), Fraction(3)
    assert copy_streams(source, target, Window(start, end, -start)).notices == []
    times, hashes = packet_times(source, "audio"), packet_hashes(source, "audio")
    inside = [(time, digest) for time, digest in zip(times, hashes, strict=True) if start <= time < end]
    assert packet_hashes(target, "audio") == [digest for _, digest in inside]
    moved = packet_times(target, "audio")
    assert max(abs(a - (b - start)) for a, (b, _) in zip(moved, inside, strict=True)) <= MS
    assert packet_times(target, "video")[0] == 0
    found = titles(target)
    assert [title for _, _, title in found] == ["One", "Two"]
    expected = [(Fraction(0), Fraction(28, 100)), (Fraction(28, 100), Fraction(108, 100))]
    for (first, last, _), span in zip(found, expected, strict=True):
        assert abs(first - span[0]) <= MS
        assert abs(last - span[1]) <= MS


def test_a_window_without_chapters(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(pts=range(0, 100 * 512, 512), chapters=RICH.chapters))
    copy_streams(source, tmp_path / "late.mkv", Window(start=Fraction(2)))
    copy_streams(source, tmp_path / "early.mkv", Window(end=Fraction(1, 2)))
    assert titles(tmp_path / "late.mkv") == []
    assert titles(tmp_path / "early.mkv") == [(0, Fraction(1, 2), "One")]


@pytest.mark.parametrize(("suffix", "is_said"), [(".mkv", False), (".mp4", True), (".mov", True)])
def test_overlapping_chapters_are_kept_or_said(tmp_path: Path, suffix: str, is_said: bool) -> None:
    chapters = [(0, 900, "Whole"), (100, 300, "Part"), (300, 900, "Rest")]
    source = write_clip(tmp_path / "in.mkv", Clip(pts=range(0, 25 * 512, 512), chapters=chapters))
    copier = copy_streams(source, tmp_path / f"out{suffix}")
    kept = [(first, last) for first, last, _ in titles(tmp_path / f"out{suffix}")]
    assert (kept == [(Fraction(a, 1000), Fraction(b, 1000)) for a, b, _ in chapters]) is not is_said
    assert [notice.startswith("chapters end where the next begins") for notice in copier.notices] == [True] * is_said


@pytest.mark.parametrize("time_base", [Fraction(1, 44100), Fraction(1, 1000), Fraction(1, 90000)])
def test_a_move_is_exact_to_half_a_tick(time_base: Fraction) -> None:
    """Every packet of a stream moves by the same, however many there are."""
    shift = Fraction(-1001, 30000)
    moves = set()
    for index in range(1000):
        packet = av.Packet(b"x")
        packet.pts, packet.dts, packet.time_base = index * 1024, index * 1024 - 7, time_base
        assert Window(shift=shift).place(packet, clip=False)
        moves.add((packet.pts - index * 1024, packet.dts - index * 1024 + 7))
    assert len(moves) == 1
    for moved in moves.pop():
        assert abs(moved * time_base - shift) <= time_base / 2


def test_reading_stops_after_the_end_of_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(pts=range(0, 500 * 512, 512), audio=["aac"]))
    monkeypatch.setattr(video_window, "INTERLEAVING", 1)
    with av.open(str(tmp_path / "out.mkv"), "w") as out, av.open(str(source)) as container:
        video = out.add_stream_from_template(container.streams.video[0], opaque=True)
        copier = StreamCopier(source, out, video, window=Window(end=Fraction(2)))
        copier.finish()
        following = next(packet for packet in copier._input.demux() if packet.pts is not None)
        assert 3 <= following.pts * following.time_base < 4
    copier.close()


def jpeg() -> bytes:
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = 32, 32, "yuvj420p"
    encoder.time_base = Fraction(1, 25)
    return bytes(encoder.encode(av.VideoFrame(32, 32, "yuvj420p"))[0])


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_cover_art(tmp_path: Path, suffix: str) -> None:
    image = jpeg()
    covered = edited(
        write_clip(tmp_path / "clip.mkv", Clip(audio=["aac"])),
        tmp_path / "covered.mkv",
        lambda out, copies: out.add_attachment("front.jpg", "image/jpeg", image),
    )
    assert copy_clip(covered, tmp_path / f"once{suffix}").notices == []
    assert copy_clip(tmp_path / f"once{suffix}", tmp_path / f"twice{suffix}").notices == []
    assert copy_clip(tmp_path / f"once{suffix}", tmp_path / "other.mkv").notices == []
    for path in (tmp_path / f"once{suffix}", tmp_path / f"twice{suffix}", tmp_path / "other.mkv"):
        with av.open(str(path)) as container:
            covers = [s for s in container.streams.video if s.disposition & av.stream.Disposition.attached_pic]
            assert len(covers) == 1
            assert next(bytes(packet) for packet in container.demux(covers[0]) if packet.size) == image
            assert len(container.streams.audio) == 1


def test_cover_art_that_has_no_place_is_said(tmp_path: Path) -> None:
    covered = edited(
        write_clip(tmp_path / "clip.mkv", Clip(pts=(0, 512), codec="libvpx-vp9", pix_fmt="yuv420p")),
        tmp_path / "covered.mkv",
        lambda out, copies: out.add_attachment("front.jpg", "image/jpeg", jpeg()),
    )
    assert copy_streams(covered, tmp_path / "out.webm").notices == ["cover art #1 is not kept: webm does not hold it"]
    assert copy_clip(covered, tmp_path / "out.mov").notices == ["cover art #1 is not kept: mov does not hold it"]


def test_a_second_video_is_said(tmp_path: Path) -> None:
    one = write_clip(tmp_path / "one.mkv", Clip())
    with av.open(str(one)) as container, av.open(str(tmp_path / "two.mkv"), "w") as out:
        copies = [out.add_stream_from_template(container.streams.video[0], opaque=True) for _ in range(2)]
        for packet in container.demux():
            if packet.size:
                for copy in copies:
                    again = av.Packet(bytes(packet))
                    again.pts, again.dts, again.time_base = packet.pts, packet.dts, packet.time_base
                    again.is_keyframe, again.stream = packet.is_keyframe, copy
                    out.mux(again)
    assert copy_streams(tmp_path / "two.mkv", tmp_path / "out.mkv").notices == [
        "video stream #1 (h264) is not kept: only the main video is"
    ]


def test_damaged_packets_do_not_stop_the_copy(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(pts=range(0, 100 * 512, 512), audio=["aac"]))
    data = bytearray(source.read_bytes())
    for position in np.random.default_rng(3).integers(len(data) // 8, len(data), 60):
        data[position] ^= 255
    (tmp_path / "broken.mkv").write_bytes(bytes(data))
    for suffix in (".mkv", ".mp4", ".webm"):
        copy_beside(tmp_path / "broken.mkv", tmp_path / f"out{suffix}")
