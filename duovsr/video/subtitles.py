"""Text subtitles of one kind as another, for containers that have their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple, cast

import av
from av.container import OutputContainer
from av.subtitles.stream import SubtitleStream
from av.subtitles.subtitle import AssSubtitle, SubtitleSet

from duovsr.video.container import codec_name

KINDS: dict[str, str] = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}
_ONE_AT_A_TIME = "mov_text"  # its samples follow one another: of two at a time the muxer would end, or move, one
_UNTOLD = 4  # seconds that a text is shown for where the source does not say
_OVERRIDE, _DRAWING = re.compile(rb"{[^}]*}"), re.compile(rb"{[^}]*\\p[1-9]")  # in ASS
_PAUSE = 1  # seconds


class _Text(NamedTuple):
    """What is shown from `start` to `end`, in ticks: an event of ASS, without its times."""

    start: int
    end: int
    line: bytes


class SubtitleConverter:
    """Decodes text subtitles, whatever their kind, and encodes them as `kind` into a new stream of `target`.

    FFmpeg speaks ASS in between: bold, italics and line breaks survive, fonts, colours and places mostly do not,
    drawings never. What is shown at the same time becomes one text of several lines where the kind has one at a time.
    Raises `ValueError` or an FFmpeg error where there is no way.
    """

    def __init__(self, source: SubtitleStream, target: OutputContainer, kind: str) -> None:
        self.damaged = 0
        self._source, self._kind = source, kind
        self._held: list[_Text] = []
        self._written = 0  # the tick until which everything is
        self._due = Fraction(0)  # the tick at which to look again at what is held, which may be thousands of texts
        self._time_base = source.time_base or Fraction(1, 1000)
        source.codec_context.open(strict=False)  # it writes the header
        header = source.codec_context.subtitle_header
        if header is None:
            raise ValueError("the decoder has no ASS header")
        stream = target.add_stream(kind)
        assert isinstance(stream, SubtitleStream)
        self.stream = stream
        stream.codec_context.subtitle_header = header.rstrip(b"\0") + b"\0"  # encoders read it as a C string
        stream.codec_context.time_base = Fraction(1, 1000)  # as the container's: encoders do not use it

    def convert(self, packet: av.Packet[SubtitleStream] | None) -> Iterable[av.Packet[SubtitleStream]]:
        """What one packet becomes, or, of texts that may overlap others, what ended before; None is the end."""
        if packet is None:
            yield from self.shown_until(None)
            return
        try:
            subtitle = self._source.decode2(packet)
            lines = [cast(AssSubtitle, text).ass for text in subtitle or ()]
            lines = [line for line in lines if _is_text(line)]
            start, length = packet.pts or 0, packet.duration or 0
            # mov_text says with an empty one that nothing is shown, and ASS with one that ends as it begins.
            if subtitle is None or not lines or (not length and codec_name(self._source) == "ass"):
                return
            if self._kind != _ONE_AT_A_TIME:
                yield self._encoded(subtitle, start, length)
                return
        except av.error.FFmpegError:
            self.damaged += 1
            return
        end = start + (length or round(_UNTOLD / self._time_base))
        start = max(start, self._written)
        if start >= end:
            self.damaged += 1
        self._held += [_Text(start, end, line) for line in lines if start < end]

    def shown_until(self, time: Fraction | None) -> Iterator[av.Packet[SubtitleStream]]:
        """What is shown before `time` seconds, after which everything comes that is still to be converted; None: all
        that is held. Each packet has all texts of a span in which none begins or ends."""
        limit = None if time is None else time / self._time_base
        if limit is not None and limit < self._due:
            return
        self._due = (limit or 0) + _PAUSE / self._time_base
        moments = sorted({max(moment, self._written) for text in self._held for moment in text[:2]})
        for start, end in pairwise(moments):
            if limit is not None and end > limit:
                break
            self._written = end
            lines = [text.line for text in self._held if text.start <= start and end <= text.end]
            if not lines:
                continue
            try:
                yield self._encoded(SubtitleSet.create(_joined(lines), 0, end - start), start, end - start)
            except av.error.FFmpegError:
                self.damaged += 1
        self._held = [text for text in self._held if text.end > self._written]

    def _encoded(self, subtitle: SubtitleSet, pts: int, duration: int) -> av.Packet[SubtitleStream]:
        packet = self.stream.codec_context.encode_subtitle(subtitle)
        packet.pts = packet.dts = pts
        packet.duration, packet.time_base = duration, self._time_base
        packet.stream = self.stream
        return packet


def _is_text(line: bytes) -> bool:
    """Whether an event of ASS shows letters: some show nothing, and of drawings other kinds would show the strokes."""
    text = line.split(b",", 8)[-1]
    return not _DRAWING.search(text) and bool(_OVERRIDE.sub(b"", text).strip())


def _joined(lines: list[bytes]) -> bytes:
    """Events of ASS, `order,layer,style,name,left,right,up,effect,text`, as one below the other, each in its style."""
    first, *others = lines
    for line in others:
        _, _, style, *_, text = line.split(b",", 8)
        first += rb"{\b0\i0\u0}\N{\r" + style + b"}" + text  # FFmpeg's encoder takes \r for what it adds alone
    return first
