"""All that is not the picture comes along, or a line says what does not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import pytest
from clips import Clip, packet_hashes, start_time, write_clip
from test_video_roundtrip import copy_clip

RICH = Clip(
    pts=range(0, 40 * 512, 512),
    audio=["aac", "libopus"],
    languages=["deu", "fra"],
    metadata={"title": "A clip", "comment": "made by a test"},
    chapters=[(0, 800, "One"), (800, 1600, "Two")],
)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("source_suffix", [".mp4", ".mkv"])
def test_all_sound_tracks_chapters_and_metadata(tmp_path: Path, source_suffix: str, suffix: str) -> None:
    source, target = write_clip(tmp_path / f"in{source_suffix}", RICH), tmp_path / f"out{suffix}"
    assert copy_clip(source, target).notices == []
    for index in range(2):
        assert packet_hashes(target, "audio", index) == packet_hashes(source, "audio", index)
    with av.open(str(target)) as container:
        assert [stream.metadata["language"] for stream in container.streams.audio] == ["deu", "fra"]
        assert {key.lower(): value for key, value in container.metadata.items()}["title"] == "A clip"
        titles = [(c["start"] * c["time_base"], c["metadata"]["title"]) for c in container.chapters()]
    assert titles == [(0, "One"), (Fraction(4, 5), "Two")]
    offsets = [start_time(path, "video") - start_time(path, "audio") for path in (source, target)]
    assert abs(offsets[0] - offsets[1]) <= Fraction(1, 1000)


def test_dispositions(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", RICH)
    marked = tmp_path / "marked.mkv"
    with av.open(str(source)) as container, av.open(str(marked), "w") as out:
        copies = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in container.streams}
        copies[1].disposition = av.stream.Disposition.comment
        copies[2].disposition = av.stream.Disposition.default | av.stream.Disposition.hearing_impaired
        for packet in container.demux():
            if packet.size:
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    copy_clip(marked, tmp_path / "out.mkv")
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert [stream.disposition for stream in container.streams.audio] == [
            av.stream.Disposition.comment,
            av.stream.Disposition.default | av.stream.Disposition.hearing_impaired,
        ]


def add_text_and_font(source: Path, path: Path) -> Path:
    """A copy of `source` with an srt track and an attached file."""
    script = path.with_suffix(".srt")
    script.write_text("1\n00:00:00,100 --> 00:00:00,500\nGuten Tag\n\n2\n00:00:00,700 --> 00:00:01,000\nDanke\n")
    with av.open(str(source)) as clip, av.open(str(script)) as text, av.open(str(path), "w") as out:
        copies = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in clip.streams}
        lines = out.add_stream_from_template(text.streams.subtitles[0])
        lines.metadata["language"] = "deu"
        out.add_attachment("font.ttf", "font/ttf", b"a font")
        for container, target in ((text, {0: lines}), (clip, copies)):
            for packet in container.demux():
                if packet.size:
                    packet.stream = target[packet.stream_index]
                    out.mux(packet)
    return path


def test_subtitles_and_attachments_in_mkv(tmp_path: Path) -> None:
    source = add_text_and_font(write_clip(tmp_path / "clip.mkv", RICH), tmp_path / "in.mkv")
    target = tmp_path / "out.mkv"
    assert copy_clip(source, target).notices == []
    assert packet_hashes(target, "subtitles") == packet_hashes(source, "subtitles")
    with av.open(str(target)) as container:
        assert container.streams.subtitles[0].language == "deu"
        assert [(item.metadata["filename"], item.data) for item in container.streams.attachments] == [
            ("font.ttf", b"a font")
        ]


def test_what_mp4_cannot_hold_is_said(tmp_path: Path) -> None:
    source = add_text_and_font(write_clip(tmp_path / "clip.mkv", RICH), tmp_path / "in.mkv")
    assert copy_clip(source, tmp_path / "out.mp4").notices == [
        "subtitle stream #3 (subrip) is not kept: mp4 does not hold it",
        "attachment `font.ttf` is not kept: only mkv holds it",
    ]


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
