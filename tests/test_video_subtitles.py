"""Subtitles come along in every container: as they are, or as the container's own kind of text."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import av
import pytest

from duovsr.errors import Remark
from duovsr.video.window import Window
from tests.clips import Clip, packet_hashes, write_clip
from tests.pieces import copy_beside, copy_clip, copy_streams

MS = Fraction(1, 1000)
SRT = """1
00:00:00,100 --> 00:00:00,500
Guten <i>Tag</i>, <b>Welt</b>
zweite Zeile

2
00:00:00,700 --> 00:00:01,000
Größe & mehr

3
00:00:01,000 --> 00:00:01,900
Ende
"""
SPOKEN = [
    (Fraction(1, 10), Fraction(1, 2), "Guten Tag, Welt\nzweite Zeile"),
    (Fraction(7, 10), Fraction(1), "Größe & mehr"),
    (Fraction(1), Fraction(19, 10), "Ende"),
]
ASS = r"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, Bold, Italic, Alignment, MarginL, MarginR, MarginV, Encoding
Style: Default,Arial,16,&Hffffff,0,0,2,10,10,10,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Dialogue: 0,0:00:00.10,0:00:00.50,Default,,0,0,0,,{\pos(10,20)}Guten {\i1}Tag{\i0}, {\b1}Welt{\b0}\Nzweite Zeile
Dialogue: 0,0:00:00.70,0:00:01.00,Default,,0,0,0,,Größe & mehr
Dialogue: 0,0:00:01.00,0:00:01.90,Default,,0,0,0,,Ende
"""
VTT = "WEBVTT\n\n" + SRT.replace(",", ".").replace("Tag</i>.", "Tag</i>,")


TWO_SECONDS = Clip(pts=range(0, 50 * 512, 512))


def titled(folder: Path, script: str, suffix: str = ".mkv", clip: Clip = TWO_SECONDS) -> Path:
    """A clip with one track of subtitles, German and forced."""
    kind = "ass" if script.startswith("[") else "vtt" if script.startswith("WEBVTT") else "srt"
    text, untitled = folder / f"script.{kind}", write_clip(folder / "clip.mkv", clip)
    text.write_text(script)
    path = folder / f"in{suffix}"
    with av.open(str(untitled)) as pictures, av.open(str(text)) as titles, av.open(str(path), "w") as out:
        copies = [out.add_stream_from_template(stream, opaque=True) for stream in pictures.streams]
        lines = out.add_stream_from_template(titles.streams.subtitles[0])
        lines.metadata.update({"language": "ger", "title": "Untertitel"})
        lines.disposition = av.stream.Disposition.forced
        for container in (titles, pictures):
            for packet in container.demux():
                if packet.size:
                    packet.stream = lines if container is titles else copies[packet.stream_index]
                    out.mux(packet)
    return path


def spoken(path: Path) -> list[tuple[Fraction, Fraction, str]]:
    """Start, end and bare text of everything that is shown."""
    shown = []
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.subtitles[0]):
            for line in packet.decode() if packet.size else []:
                start = packet.pts * packet.time_base
                text = re.sub(r"{[^}]*}", "", line.dialogue.decode()).strip()  # without ASS's formatting
                shown.append((start, start + packet.duration * packet.time_base, text))
    return shown


def assert_shown(path: Path, expected: list[tuple[Fraction, Fraction, str]]) -> None:
    found = spoken(path)
    assert [text for _, _, text in found] == [text for _, _, text in expected]
    for (start, end, _), (first, last, _) in zip(found, expected, strict=True):
        assert abs(start - first) <= MS
        assert abs(end - last) <= MS


@pytest.mark.parametrize("script", [SRT, ASS, VTT], ids=["srt", "ass", "vtt"])
def test_subtitles_are_copied_to_mkv(tmp_path: Path, script: str) -> None:
    source, target = titled(tmp_path, script), tmp_path / "out.mkv"
    assert copy_clip(source, target).notices == []
    assert packet_hashes(target, "subtitles") == packet_hashes(source, "subtitles")
    with av.open(str(source)) as before, av.open(str(target)) as after:
        old, new = before.streams.subtitles[0], after.streams.subtitles[0]
        assert new.codec_context.extradata == old.codec_context.extradata
        assert (new.language, new.metadata["title"], new.disposition) == ("ger", "Untertitel", old.disposition)
        assert av.stream.Disposition.forced in new.disposition


@pytest.mark.parametrize("script", [SRT, ASS, VTT], ids=["srt", "ass", "vtt"])
@pytest.mark.parametrize(("suffix", "becomes"), [(".mp4", "mov_text"), (".mov", "mov_text"), (".webm", "webvtt")])
def test_text_becomes_what_the_container_holds(tmp_path: Path, script: str, suffix: str, becomes: str) -> None:
    source, target = titled(tmp_path, script), tmp_path / f"out{suffix}"
    assert_shown(source, SPOKEN)
    name = {SRT: "subrip", ASS: "ass", VTT: "webvtt"}[script]
    held, stream = suffix[1:], f"subtitle stream #1 ({name})"
    said = [] if name == becomes else [f"{stream} is converted to {becomes}: {held} does not hold it"]
    if suffix == ".mov":
        said.append(f"{stream} is no longer marked `forced`: mov does not hold it")
    if suffix != ".webm":
        said.append(f"subtitles are on by default: {held} needs it")
    notices = copy_beside(source, target).notices
    assert notices == said
    assert all(isinstance(notice, Remark) == ("forced" not in notice) for notice in notices)
    assert_shown(target, SPOKEN)
    with av.open(str(target)) as container:
        stream = container.streams.subtitles[0]
        assert stream.codec_context.codec.canonical_name == becomes
        assert stream.language == "ger"


def script_of(*events: tuple[int, int, str]) -> str:
    """Start and end in tenths of a second, below an hour."""
    clock = [f"00:{tenths // 600:02}:{tenths // 10 % 60:02},{tenths % 10}00" for *span, _ in events for tenths in span]
    blocks = zip(clock[::2], clock[1::2], events, strict=True)
    return "".join(f"{number}\n{a} --> {b}\n{text}\n\n" for number, (a, b, (*_, text)) in enumerate(blocks, 1))


OVERLAPPING = (
    (1, 9, "long"),
    (3, 5, "inside"),
    (8, 12, "over"),
    (8, 12, "beside"),
    (12, 14, "next"),
    (13, 400, "late"),
)
SHOWN = (
    (1, 3, "long"),
    (3, 5, "long\ninside"),
    (5, 8, "long"),
    (8, 9, "long\nover\nbeside"),
    (9, 12, "over\nbeside"),
    (12, 13, "next"),
    (13, 14, "next\nlate"),
    (14, 400, "late"),
)


@pytest.mark.parametrize(
    ("suffix", "shown"), [(".mp4", SHOWN), (".mov", SHOWN), (".webm", OVERLAPPING), (".mkv", OVERLAPPING)]
)
def test_what_is_shown_at_the_same_time(tmp_path: Path, suffix: str, shown: tuple[tuple[int, int, str], ...]) -> None:
    """mp4 and mov have one text at a time: it has all lines of its span."""
    source, target = titled(tmp_path, script_of(*OVERLAPPING)), tmp_path / f"out{suffix}"
    copy_beside(source, target)
    assert_shown(target, [(Fraction(start, 10), Fraction(end, 10), text) for start, end, text in shown])


def test_a_style_ends_with_its_line(tmp_path: Path) -> None:
    source = titled(tmp_path, script_of((1, 9, "<b>bold"), (3, 5, "plain")))
    copy_beside(source, tmp_path / "out.mp4")
    copy_beside(tmp_path / "out.mp4", tmp_path / "out.mkv")
    with av.open(str(tmp_path / "out.mkv")) as container:
        texts = [bytes(packet) for packet in container.demux(subtitles=0) if packet.size]
    assert texts == [b"<b>bold</b>", b"<b>bold</b>\nplain", b"<b>bold</b>"]


def test_texts_are_not_held_to_the_end(tmp_path: Path) -> None:
    """They lie beside the sound of their time in the file, not behind all of it."""
    clip = Clip(pts=range(0, 40 * 12800, 12800), codec="ffv1", pix_fmt="bgr0", audio=["aac"])
    titled(tmp_path, script_of((10, 30, "early"), (20, 25, "both"), (350, 370, "late")), clip=clip)
    copy_beside(tmp_path / "in.mkv", tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        packets = [packet for packet in container.demux() if packet.size]
        sound = [(p.pos, p.pts * p.time_base) for p in packets if p.stream.type == "audio"]
        texts = [p.pos for p in packets if p.stream.type == "subtitle" and p.size > 2]
    assert len(texts) == 4
    assert max(time for place, time in sound if place < texts[2]) < 20


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mp4", ".mov"])
def test_text_of_mp4(tmp_path: Path, suffix: str) -> None:
    copy_clip(titled(tmp_path, SRT), tmp_path / "in.mp4")
    target = tmp_path / f"out{suffix}"
    becomes = {".mkv": "subrip", ".webm": "webvtt"}.get(suffix)
    held = {".mkv": "matroska"}.get(suffix, suffix[1:])
    said = [f"subtitle stream #1 (mov_text) is converted to {becomes}: {held} does not hold it"] if becomes else []
    if suffix == ".mov":
        said.append("subtitle stream #1 (mov_text) is no longer marked `forced`: mov does not hold it")
    assert copy_beside(tmp_path / "in.mp4", target).notices == said
    assert_shown(target, SPOKEN)


def test_bold_and_italics_survive(tmp_path: Path) -> None:
    copy_clip(titled(tmp_path, ASS), tmp_path / "out.mp4")
    copy_clip(tmp_path / "out.mp4", tmp_path / "out.mkv")
    with av.open(str(tmp_path / "out.mkv")) as container:
        first = next(bytes(packet) for packet in container.demux(subtitles=0) if packet.size)
    assert first == b"Guten <i>Tag</i>, <b>Welt</b>\nzweite Zeile"


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_subtitles_of_a_window(tmp_path: Path, suffix: str) -> None:
    """The one that is shown when the window opens, or closes, is cut; all move."""
    source, target = titled(tmp_path, SRT), tmp_path / f"out{suffix}"
    copy_streams(source, target, Window(Fraction(2, 5), Fraction(3, 2), Fraction(-2, 5)))
    expected = [
        (Fraction(0), Fraction(1, 10), SPOKEN[0][2]),
        (Fraction(3, 10), Fraction(6, 10), SPOKEN[1][2]),
        (Fraction(6, 10), Fraction(11, 10), SPOKEN[2][2]),
    ]
    assert_shown(target, expected)
    late = tmp_path / f"late{suffix}"
    copy_streams(source, late, Window(Fraction(1), None, Fraction(-1)))
    assert_shown(late, [(Fraction(0), Fraction(9, 10), "Ende")])


def test_subtitles_that_are_not_wanted(tmp_path: Path) -> None:
    source = titled(tmp_path, SRT)
    assert copy_streams(source, tmp_path / "out.mp4", subtitles=False).notices == []
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.subtitles


def with_pictures_for_subtitles(folder: Path) -> Path:
    """A clip with a track of Blu-ray subtitles: one empty display set."""
    clip, path = write_clip(folder / "clip.mkv", Clip()), folder / "in.mkv"
    with av.open(str(clip)) as pictures, av.open(str(path), "w") as out:
        video = out.add_stream_from_template(pictures.streams.video[0], opaque=True)
        lines = out.add_mux_stream("hdmv_pgs_subtitle")
        lines.time_base = MS
        ends = av.Packet(b"\x80\x00\x00")  # an end segment
        ends.pts = ends.dts = 100
        ends.time_base, ends.stream = MS, lines
        out.mux(ends)
        for packet in pictures.demux():
            if packet.size:
                packet.stream = video
                out.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm"])
def test_subtitles_that_are_pictures_stay_in_mkv(tmp_path: Path, suffix: str) -> None:
    source = with_pictures_for_subtitles(tmp_path)
    assert copy_clip(source, tmp_path / "out.mkv").notices == []
    assert packet_hashes(tmp_path / "out.mkv", "subtitles") == packet_hashes(source, "subtitles")
    assert copy_beside(source, tmp_path / f"out{suffix}").notices == [
        f"subtitle stream #1 (hdmv_pgs_subtitle) is not kept: {suffix[1:]} does not hold it"
    ]
    with av.open(str(tmp_path / f"out{suffix}")) as container:
        assert not container.streams.subtitles


def test_damaged_text_is_no_end(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 in the middle: the lines around them come along."""
    source = titled(tmp_path, SRT)
    source.write_bytes(source.read_bytes().replace("Größe".encode(), b"Gr\xff\xfe\xff\xfee"))
    copy_clip(source, tmp_path / "out.mp4")
    texts = [text for _, _, text in spoken(tmp_path / "out.mp4")]
    assert (texts[0], texts[-1]) == (SPOKEN[0][2], "Ende")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_only_letters_that_are_shown_are_converted(tmp_path: Path, suffix: str) -> None:
    """ASS also has drawings, empty lines, and lines that are never shown."""
    script = ASS.split("Dialogue")[0] + "".join(
        rf"Dialogue: 0,0:00:{begin},0:00:{end},Default,,0,0,0,,{text}" + "\n"
        for begin, end, text in (
            ("00.10", "01.00", "Text"),
            ("00.20", "00.50", r"{\an7\p1}m 0 0 l 100 0 100 100{\p0}"),
            ("00.30", "00.60", r"{\pos(1,2)}"),
            ("00.40", "00.40", "nie"),
        )
    )
    target = tmp_path / f"out{suffix}"
    copy_beside(titled(tmp_path, script), target)
    assert_shown(target, [(Fraction(1, 10), Fraction(1), "Text")])
