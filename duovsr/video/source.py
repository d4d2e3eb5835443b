"""Where pictures come from: a container that FFmpeg reads, or image files in a row. Damage is skipped and counted."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.packet import PktSideDataT
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from duovsr.errors import InputError, Remark, UsageError
from duovsr.options import PIPE
from duovsr.video.container import average_rate, codec_name, has_times, label_of, main_video, open_input
from duovsr.video.images import is_sequence, numbered_files
from duovsr.video.sidedata import SideData
from duovsr.video.transport import Losses, losses

IMAGES_RATE = Fraction(25)
_HOLE = 1024  # bytes between two packets, far beyond what matroska puts there
_BESIDE: PktSideDataT = "matroska_block_additional"  # transparency, of VP9
_GAP = 1.6  # times the steps around it, beyond the 2 and 3 fields that a film's pictures take in turn
_REORDERED = 16  # packets; no encoder moves one further from its place
_WITHOUT_TIME = 250  # packets, which are held meanwhile
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own drop the transparency without a word


class Source(ABC):
    """Pictures in the order of showing, and what the files say of them: all of it once the first picture is there."""

    path: Path
    stills: bool  # every picture has properties of its own
    of_images: bool  # files of one picture each, be it one alone
    time_base: Fraction
    start_pts: int
    frame_rate: Fraction | None  # average
    num_frames: int | None  # a claim or an estimate
    duration: Fraction | None  # seconds
    sample_aspect_ratio: Fraction | None
    codec: str
    audio_codec: str | None
    views_are_tagged = False  # as matroska's `stereo_mode`, which is copied
    damaged: int  # packets or files that did not decode
    notices: list[str]

    @abstractmethod
    def pictures(self) -> Iterator[av.VideoFrame]:
        """What decodes; pts, where there are any, count `time_base`. Raises `InputError` for sizes that do not fit."""

    def is_incomplete(self, count: int) -> bool:
        """Whether, after all `count` pictures, something is missing that gave no other sign."""
        return False

    def missing(self, first: int, last: int) -> int:
        """How many pictures' places between those of two pts are empty, as their numbers tell."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Ends the reading."""


def open_source(path: Path, frame_rate: Fraction | None = None) -> Source:
    """Raises `InputError` for what is not a video, `UsageError` for a frame rate where the source has its own times."""
    if frame_rate is not None and not is_sequence(path):
        raise UsageError(f"a frame rate is for sequences of images: `{path}` has its own times", hint="leave it out")
    if frame_rate is not None and frame_rate <= 0:
        raise UsageError(f"unsupported frame rate: `{frame_rate}`", hint="use a number above 0")
    return ImageSource(path, frame_rate or IMAGES_RATE) if is_sequence(path) else ClipSource(path)


class ClipSource(Source):
    """The main video of one file, still or pipe."""

    stills = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self.notices: list[str] = []
        self._demuxed_until = Fraction(0)
        self._shown_until = Fraction(0)
        self._read_until: int | None = None  # bytes of the file, where they are packet by packet
        self._is_after_hole = self._is_hollow = self._is_suspect = self._is_cut_off = False
        self._losses = Losses()
        self._shown = array("q")  # the pts of a transport stream's pictures
        self._sound_until: dict[int, Fraction] = {}
        self._halting: set[int] = set()  # sound with a hole in its times
        self._container = open_input(path)
        try:
            self._stream = main_video(self._container, path)
            self._decoder = _alpha_decoder(self._stream)
        except BaseException:
            self.close()
            raise
        assert self._stream.time_base is not None, "every opened stream has a time base"
        self.time_base, self.start_pts = self._stream.time_base, self._stream.start_time or 0
        self._is_raw, format_name = not has_times(self._container), self._container.format.name
        self._is_matroska, self._is_transport = format_name == "matroska,webm", format_name == "mpegts"
        self._is_movie = format_name.startswith("mov,")  # mp4 too
        self.of_images = format_name == "image2" or format_name.endswith("_pipe")  # FFmpeg's names, of files too
        self.frame_rate = average_rate(self._container, self._stream)
        if self._is_raw and self.frame_rate is None:
            self.frame_rate = IMAGES_RATE
            self.notices.append(f"the raw stream tells no frame rate: {IMAGES_RATE} frames a second are assumed")
        self.duration = self._duration()
        estimate = round(self.duration * self.frame_rate) if self.duration and self.frame_rate else 0
        # An mp4 also counts the frames that its edit list hides; its duration does not.
        self.num_frames = min(filter(None, (self._stream.frames, estimate)), default=None)
        self.sample_aspect_ratio = self._stream.sample_aspect_ratio or None
        self.codec = codec_name(self._stream)
        self.views_are_tagged = "stereo_mode" in map(str.lower, self._stream.metadata)
        audio = self._container.streams.best("audio")
        self.audio_codec = codec_name(audio) if audio else None

    def pictures(self) -> Iterator[av.VideoFrame]:
        for number, picture in enumerate(self._decoded()):
            if self._is_raw and picture.pts is None:
                picture.pts = round(number / (self._rate() * self.time_base))
            if self._is_transport and picture.pts is not None:
                self._shown.append(picture.pts)
            yield picture
        if self.path != PIPE and self.path.is_file():
            if self._is_transport:
                self._look_for_losses()
            if self._is_movie:
                self._look_beyond_the_end()

    def _decoded(self) -> Iterator[av.VideoFrame]:
        for packet in self._with_start(self._packets()):
            if packet.stream_index == self._stream.index and packet.size:
                self._is_suspect |= packet.is_corrupt
                yield from self._decode(packet)
        yield from self._decode(None)  # what the decoder still holds back for reordering

    def _packets(self) -> Iterator[av.Packet[Any]]:
        """Of all streams, as far as the container can be read."""
        packets = self._container.demux()
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError:  # the container is broken from here on
                self.damaged += 1
                packet = None
            if packet is None:
                return
            self._look_for_holes(packet)
            yield packet

    def _with_start(self, packets: Iterator[av.Packet[Any]]) -> Iterator[av.Packet[Any]]:
        """The packets, and `start_pts` right where the first pictures have no time: matroska's negative times of
        reordered pictures are lost in FFmpeg. They come before the first picture that has one."""
        queue: list[av.Packet[Any]] = []
        known: list[int] = []
        unknown = 0
        for packet in packets:
            queue.append(packet)
            if packet.stream_index != self._stream.index or not packet.size:
                continue
            if packet.pts is not None:
                known.append(packet.pts)
            unknown += packet.pts is None and packet.dts is None
            if not unknown or len(known) >= _REORDERED or unknown >= _WITHOUT_TIME:
                break
        if known and unknown:
            self.start_pts = min(known) - unknown * max(1, round(1 / (self._rate() * self.time_base)))
        yield from queue
        yield from packets

    def _look_for_holes(self, packet: av.Packet[Any]) -> None:
        """Notes how far the container was read, and bytes of matroska that were skipped, and pictures with them: its
        demuxer says nothing, and goes on with the next cluster."""
        if self._is_matroska and packet.pos is not None:
            self._is_after_hole |= self._read_until is not None and packet.pos > self._read_until + _HOLE
            beside = packet.get_sidedata(_BESIDE).data_size if packet.has_sidedata(_BESIDE) else 0
            self._read_until = max(self._read_until or 0, packet.pos + packet.size + beside)
        if packet.pts is None:
            return
        start = packet.pts * packet.time_base
        end = start + (packet.duration or 0) * packet.time_base
        self._demuxed_until = max(self._demuxed_until, end)
        if packet.stream.type == "audio":
            length = end - start
            if length and start - self._sound_until.get(packet.stream_index, start) > length / 2:
                self._halting.add(packet.stream_index)
            self._sound_until[packet.stream_index] = end
        if packet.stream_index == self._stream.index:
            self._is_hollow |= self._is_after_hole and start - self._shown_until > 2 / self._rate()
            self._is_after_hole = False
            self._shown_until = max(self._shown_until, end)

    def _rate(self) -> Fraction:
        return self.frame_rate or IMAGES_RATE

    def is_incomplete(self, count: int) -> bool:
        """Whether all streams end well before the container says they do, as in a truncated mkv, or bytes in the middle
        of it were skipped, or the index of an mp4 has pictures beyond the end of the file, or packets of a transport
        stream are missing, and pictures too (joined files lack packets, but no pictures)."""
        hints = self._is_suspect or self._losses.suspect or bool(self._losses.torn)
        # Of a transport stream whose rate changes, FFmpeg's average may count on too many pictures.
        is_short = hints and count < (self.num_frames or 0)
        is_short = is_short and (not self._is_transport or _has_gap(np.diff(self._shown)))
        if self._is_hollow or self._is_cut_off or self._stream.id in self._losses.torn or is_short:
            return True
        if not self._container.duration or not self._demuxed_until:
            return False
        end = Fraction(self._container.duration, av.time_base)
        if not self._is_matroska:  # there, FFmpeg's muxer counts from 0, and others from the start
            end += Fraction(self._container.start_time or 0, av.time_base)
        return end - self._demuxed_until > max(2 / self._rate(), Fraction(1, 2))

    def _look_for_losses(self) -> None:
        """Reads a transport stream again for what it lacks, and says so of all but the picture."""
        beside = [stream for stream in self._container.streams if stream.type in ("audio", "subtitle")]
        self._losses = losses(self.path, {stream.id for stream in (self._stream, *beside)})
        hints = self._losses.suspect or bool(self._losses.torn)
        for stream in beside:
            if stream.id in self._losses.torn or (hints and stream.index in self._halting):
                self.notices.append(f"damaged input: parts of {label_of(stream)} are missing")
            if stream.id in self._losses.unfinished and not self._losses.cut_off:
                self.notices.append(Remark(f"the source stops in the middle of {label_of(stream)}, as recordings do"))
        if self._losses.cut_off:
            self.notices.append("damaged input: the file ends in the middle of a packet")

    def _look_beyond_the_end(self) -> None:
        """Compares the index of an mp4 or mov, whose demuxer ends where the file does, with the file."""
        size = self.path.stat().st_size
        for stream in self._container.streams:
            if any(entry.pos + entry.size > size for entry in stream.index_entries):
                self._is_cut_off |= stream.index == self._stream.index
                if stream.type in ("audio", "subtitle"):
                    self.notices.append(f"damaged input: parts of {label_of(stream)} are missing")

    def close(self) -> None:
        self._container.close()

    def _decode(self, packet: av.Packet[Any] | None) -> Iterator[av.VideoFrame]:
        try:
            yield from self._stream.decode(packet) if self._decoder is None else self._decoder.decode(packet)
        except av.error.FFmpegError:
            self.damaged += 1

    def _duration(self) -> Fraction | None:
        if self._stream.duration:
            return self._stream.duration * self.time_base
        return Fraction(self._container.duration, av.time_base) if self._container.duration else None


class ImageSource(Source):
    """Image files, one frame each, at a constant rate. A number missing from a pattern leaves its time empty."""

    stills = of_images = True
    start_pts = 0
    audio_codec = None

    def __init__(self, path: Path, frame_rate: Fraction) -> None:
        self.path = path
        self.damaged = 0
        self.notices: list[str] = []
        self._files = numbered_files(path)
        if not self._files:
            raise _no_images(path)
        self._first, last = self._files[0][0], self._files[-1][0]
        self.time_base, self.frame_rate = 1 / frame_rate, frame_rate
        self.num_frames = len(self._files)
        self.duration = (last - self._first + 1) / frame_rate
        self.sample_aspect_ratio = None
        self.codec = "unknown codec"

    def pictures(self) -> Iterator[av.VideoFrame]:
        size: tuple[int, int] | None = None
        for number, file in self._files:
            picture = self._picture(file)
            if picture is None:
                self.damaged += 1
                continue
            turned = SideData(picture).orientation.transposed
            found = (picture.height, picture.width) if turned else (picture.width, picture.height)
            size = size or found
            if found != size:
                message = f"`{file}` is {found[0]}x{found[1]}, the images before it are {size[0]}x{size[1]}"
                raise InputError(message, hint="images of one sequence have one size")
            picture.pts, picture.time_base = number - self._first, self.time_base
            yield picture

    def missing(self, first: int, last: int) -> int:
        there = sum(first <= number - self._first <= last for number, _ in self._files)
        return last - first + 1 - there

    def close(self) -> None:
        """No file is open between two pictures."""

    def _picture(self, file: Path) -> av.VideoFrame | None:
        """The only picture of a file, or its first; None if it does not decode. The first file to decode tells the
        properties of the sequence."""
        try:
            clip = ClipSource(file)
        except InputError:
            return None
        try:
            picture = next(clip.pictures(), None)
            if picture is not None and self.codec == "unknown codec":
                self.codec, self.sample_aspect_ratio = clip.codec, clip.sample_aspect_ratio
            return picture
        finally:
            clip.close()


def _no_images(pattern: Path) -> InputError:
    if not os.path.isdir(pattern.parent):
        return InputError(f"no such folder: `{pattern.parent}`", hint=f"check the path before `{pattern.name}`")
    hint = "%05d is a number of five digits, with zeros before it; %d is one without"
    return InputError(f"no image has a name such as `{pattern}`", hint=hint)


def _has_gap(steps: np.ndarray) -> bool:
    """Whether one of these times between pictures is far longer than usual both before and after it. Around a hole
    there may be several, where reordered pictures lack those that they refer to."""
    for at, step in enumerate(steps):
        around = steps[max(0, at - _REORDERED) : at], steps[at + 1 : at + 1 + _REORDERED]
        if step > _GAP * max(np.median(side) if len(side) else 0 for side in around):
            return True
    return False


def _alpha_decoder(stream: VideoStream) -> VideoCodecContext | None:
    """A decoder that reads the transparency beside the picture, where the file says there is some (WebM)."""
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    name = _ALPHA_DECODERS.get(codec_name(stream))
    if name is None or tags.get("alpha_mode") != "1":
        return None
    decoder = VideoCodecContext.create(name, "r")
    assert isinstance(decoder, VideoCodecContext)
    return decoder
