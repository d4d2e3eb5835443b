"""Text subtitles of one kind as another, for containers that have their own."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import av
from av.container import OutputContainer
from av.subtitles.stream import SubtitleStream

KINDS: dict[str, str] = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}


class SubtitleConverter:
    """Decodes text subtitles, whatever their kind, and encodes them as `kind` into a new stream of `target`.

    FFmpeg speaks ASS in between: bold, italics and line breaks survive, fonts, colours and places mostly do not. Raises
    `ValueError` or an FFmpeg error where there is no way.
    """

    def __init__(self, source: SubtitleStream, target: OutputContainer, kind: str) -> None:
        self.damaged = 0
        self._source = source
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
        """What one packet becomes; None is the end."""
        if packet is None:
            return
        try:
            subtitle = self._source.decode2(packet)
            if subtitle is None or len(subtitle) == 0:
                return  # mov_text says with an empty one that nothing is shown
            converted = self.stream.codec_context.encode_subtitle(subtitle)
        except av.error.FFmpegError:
            self.damaged += 1
            return
        converted.pts = converted.dts = packet.pts
        converted.duration, converted.time_base = packet.duration, packet.time_base
        converted.stream = self.stream
        yield converted
