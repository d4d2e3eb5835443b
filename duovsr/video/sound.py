"""Sound as it is, or of another kind, for containers that do not hold it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.audio.codeccontext import AudioCodecContext
from av.audio.fifo import AudioFifo
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.codec import Codec
from av.container import OutputContainer
from av.stream import Stream

from duovsr.video.container import codec_name, first_packet
from duovsr.video.window import Window

# Container: encoders for sound that is lossy already, and for sound that is not; the first that takes it.
_LOSSY = {"mp4": ("aac",), "mov": ("aac",), "matroska": ("flac",), "webm": ("libopus",)}
_LOSSLESS = {**_LOSSY, "mp4": ("alac", "aac"), "mov": ("alac", "aac")}  # ALAC has few layouts of four channels and more
_BIT_RATE = 128000  # per channel: beyond what ears tell from the source
_JITTER = Fraction(1, 100)  # seconds; containers round times, and a real hole is as long as a packet
_LONGEST_HOLE = 60  # seconds; beyond, times jump: a damaged one may be days ahead
LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # that encoders take


_WHOLE_BYTES = re.compile(r"pcm_[suf](8|16|24|32|64)(?:le|be)?")
_SHORT = 50  # packets a second, of PCM that is cut
_LONG = ("tta", "wavpack")  # have packets of half a second and more
LEAD = 2  # seconds before a piece whose packets may reach into it


def short_packets(packet: av.Packet[Any]) -> Iterator[av.Packet[Any]]:
    """PCM as packets of 20 ms at most, between which a piece can be cut: some files hold seconds in one. Others as
    they are."""
    context = packet.stream.codec_context
    depth = _WHOLE_BYTES.fullmatch(context.name) if isinstance(context, AudioCodecContext) else None
    if depth is None or packet.pts is None:
        yield packet
        return
    width, step = int(depth[1]) // 8 * context.layout.nb_channels, context.sample_rate // _SHORT
    samples, data, tick = packet.size // width, bytes(packet), context.sample_rate * packet.time_base
    for first in range(0, samples, step):
        last = min(first + step, samples)
        part: av.Packet[Any] = av.Packet(data[first * width : last * width])
        part.stream, part.time_base = packet.stream, packet.time_base
        part.pts = part.dts = packet.pts + round(first / tick)
        part.duration = round(last / tick) - round(first / tick)
        yield part


def is_too_long_to_cut(stream: Stream) -> bool:
    """Whether the packets last so long that a piece cannot be cut between them: much of its sound would be missing."""
    return isinstance(stream, AudioStream) and codec_name(stream) in _LONG


def add_copy(stream: Stream, target: OutputContainer) -> Stream:
    """A track for the packets of `stream`. mp4 names the place of every channel of PCM, which mkv, avi and nut do not
    know: there it is the usual one where so many are, as for players."""
    copy = target.add_stream_from_template(stream)
    if isinstance(copy, AudioStream) and _is_pcm(stream) and target.format.name == "mp4":
        layout = copy.codec_context.layout
        if layout.name == f"{layout.nb_channels} channels" and layout.nb_channels in LAYOUTS:
            copy.codec_context.layout = LAYOUTS[layout.nb_channels]
    return copy


def sample_packet(source: Path, stream: Stream) -> av.Packet[Any] | None:
    """What mp4's muxer judges at the end alone: of PCM whole samples of silence, as deep as they may be, and of AC-3
    the first packet, for NUT and others call E-AC-3 so; None for other codecs."""
    if not isinstance(stream, AudioStream):
        return None
    packet: av.Packet[Any] | None = None
    if _is_pcm(stream):
        packet = av.Packet(bytes(24 * stream.codec_context.layout.nb_channels))
    elif codec_name(stream) == "ac3":
        packet = first_packet(source, stream.index)
    if packet is not None:
        packet.pts, packet.dts, packet.time_base = 0, 0, Fraction(1, 1000)
    return packet


def _is_pcm(stream: Stream) -> bool:
    return codec_name(stream).startswith("pcm_")


def has_format(stream: AudioStream) -> bool:
    """Whether FFmpeg found out how samples look: of damaged sound, PyAV's format is None, against its own types."""
    return cast("object", stream.codec_context.format) is not None


def encoders_for(source: AudioStream, format_name: str) -> tuple[str, ...]:
    """Encoders of sound that the container `format_name` does not hold as it is, best first."""
    codec = source.codec_context.codec
    return (_LOSSLESS if codec.lossless and not codec.lossy else _LOSSY)[format_name]


class SoundConverter:
    """Decodes sound and encodes it with `encoder` into a new stream of `target`, every sample at its time, and none
    outside of `window`.

    Raises `ValueError` or an FFmpeg error where there is no way.
    """

    def __init__(self, source: AudioStream, target: OutputContainer, encoder: str, window: Window) -> None:
        self.damaged = 0
        self._source, self._window = source, window
        self._next: int | None = None  # where the next sample is due, counted in samples
        context = source.codec_context
        if context.layout.nb_channels not in LAYOUTS or not context.sample_rate:
            raise ValueError(f"{context.layout.nb_channels} channels at {context.sample_rate} Hz")
        codec = Codec(encoder, "w")
        rate = _closest_rate(context.sample_rate, codec.audio_rates)
        stream = target.add_stream(encoder, rate=rate)
        assert isinstance(stream, AudioStream)
        self.stream = stream
        stream.codec_context.layout = LAYOUTS[context.layout.nb_channels]
        stream.codec_context.format = _closest_format(context, codec)
        if codec.lossy and not codec.lossless:
            stream.codec_context.bit_rate = _BIT_RATE * context.layout.nb_channels

    def convert(self, packet: av.Packet[AudioStream] | None) -> Iterable[av.Packet[AudioStream]]:
        """What one packet becomes, some packets later; None is the end."""
        packets = []
        try:
            for frame in self._source.decode(packet):
                for placed in self._in_place(frame):
                    for kept in self._inside(placed):
                        packets += self.stream.encode(kept)
        except (ValueError, OverflowError, av.error.FFmpegError):  # another layout or rate than before, an absurd time
            self.damaged += 1
        if packet is None:
            packets += self.stream.encode(None)
        return packets

    def _in_place(self, frame: AudioFrame) -> Iterator[AudioFrame]:
        """The frame right after the one before, as encoders want it; silence fills a hole, and of two frames at one
        time the second goes.
        """
        rate = frame.sample_rate
        start = self._next or 0
        if frame.pts is not None and frame.time_base is not None:
            start = round(frame.pts * frame.time_base * rate)
        due = start if self._next is None else self._next
        if start - due > _JITTER * rate:
            if start - due <= _LONGEST_HOLE * rate:
                for begin in range(due, start, rate):  # a second at a time
                    yield _silence(frame, begin, min(rate, start - begin))
            due = start
        elif due - start >= frame.samples and due - start > _JITTER * rate:
            return
        frame.pts, frame.time_base = due, Fraction(1, rate)
        self._next = due + frame.samples
        yield frame

    def _inside(self, frame: AudioFrame) -> Iterator[AudioFrame]:
        """What the window holds of a frame that is in its place."""
        window, rate, pts, end = self._window, frame.sample_rate, frame.pts, frame.samples
        assert pts is not None
        begin = 0 if window.start is None else max(0, round((window.start + window.shift) * rate) - pts)
        end = end if window.end is None else min(end, round((window.end + window.shift) * rate) - pts)
        if begin >= end:
            return
        if end - begin < frame.samples:
            fifo = AudioFifo()
            frame.pts = None  # a queue begins at 0
            fifo.write(frame)
            if begin:
                fifo.read(begin)
            frame = cast(AudioFrame, fifo.read(end - begin))
            frame.pts, frame.time_base = pts + begin, Fraction(1, rate)
        yield frame


def _silence(like: AudioFrame, pts: int, samples: int) -> AudioFrame:
    frame = AudioFrame(like.format.name, like.layout.name, samples)
    frame.sample_rate, frame.pts, frame.time_base = like.sample_rate, pts, Fraction(1, like.sample_rate)
    zero = b"\x80" if like.format.name.startswith("u8") else b"\0"
    for plane in frame.planes[: frame.layout.nb_channels]:  # PyAV 18.1 counts one too many where there are eight
        plane.update(zero * plane.buffer_size)
    return frame


def _closest_rate(rate: int, supported: list[int] | None) -> int:
    """The least supported rate that loses nothing, else the highest."""
    if not supported or rate in supported:
        return rate
    return min((other for other in supported if other > rate), default=max(supported))


def _closest_format(context: AudioCodecContext, codec: Codec) -> str:
    """The encoder's sample format as deep as the decoder's, else its deepest."""
    formats = codec.audio_formats or [context.format]
    alike = [fmt for fmt in formats if fmt.bytes == context.format.bytes]
    return (alike or sorted(formats, key=lambda fmt: fmt.bytes)[-1:])[0].name
