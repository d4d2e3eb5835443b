"""Everything but the picture: sound, subtitles, chapters, attachments and metadata, copied packet for packet."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import av
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.stream import AttachmentStream, DataStream, Discard, Disposition, Stream
from av.subtitles.stream import SubtitleStream
from av.video.stream import VideoStream

from duovsr.errors import Remark
from duovsr.video.container import codec_name, counted, first_packet, label_of, main_video, open_input
from duovsr.video.sound import (
    LEAD,
    SoundConverter,
    add_copy,
    encoders_for,
    has_format,
    is_too_long_to_cut,
    sample_packet,
    short_packets,
)
from duovsr.video.subtitles import KINDS, SubtitleConverter
from duovsr.video.tags import (
    file_tags,
    is_location_rounded,
    marks_not_held,
    stream_tags,
    stream_tags_not_held,
    tags_not_held,
)
from duovsr.video.timecode import Timecode
from duovsr.video.window import (
    INTERLEAVING,
    WHOLE,
    JoinedTime,
    PieceEnd,
    SteadyTime,
    Window,
    decoding_time,
    do_overlap,
)

# QuickTime numbers its languages, and FFmpeg's mov muxer knows one ISO 639-2 spelling of each.
_MOV_LANGUAGES = dict(
    pair.split("/")
    for pair in "deu/ger fre/fra nld/dut swe/sve ell/gre isl/ice zho/chi cze/ces slo/slk rum/ron msa/may eus/baq"
    " fas/per kat/geo hye/arm".split()
)
_IMAGE_TYPES = {"mjpeg": "jpg", "png": "png"}  # of cover art, as Matroska attaches it
_LONGEST = 2**31 - 1  # ticks of a packet, beyond which mp4's muxer fails


class _Route(Protocol):
    """The way of one stream's packets into the target; `None` is the end of the stream."""

    stream: Any
    damaged: int

    def convert(self, packet: av.Packet[Any] | None) -> Iterable[av.Packet[Any]]: ...


class _Copy:
    """Packets as they are. Sound that does not say how long it is, as ALAC in Matroska, takes the least time from one
    packet to the next: mp4 ends with the last one, and players would not reach it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.damaged = 0
        self._latest: int | None = None
        self._step = 0

    def convert(self, packet: av.Packet[Any] | None) -> Iterable[av.Packet[Any]]:
        if packet is None:
            return
        packet.stream = self.stream
        if isinstance(self.stream, AudioStream) and not packet.duration and packet.pts is not None:
            step = packet.pts - (packet.pts if self._latest is None else self._latest)
            self._step = min(self._step or step, step) if step > 0 else self._step
            self._latest, packet.duration = packet.pts, self._step
        yield packet


class StreamCopier:
    """Copies what `source` has beside its main video into `target`, in step with a video that is being written.

    To be made after the video stream was added to `target` and before the header is written. What the container does
    not hold is converted where there is a way. `notices` names what is converted and what is not kept; `audio` and
    `subtitles` leave out theirs without a word.
    """

    def __init__(
        self,
        source: Path,
        target: OutputContainer,
        video: VideoStream,
        *,
        window: Window = WHOLE,
        audio: bool = True,
        subtitles: bool = True,
    ) -> None:
        self.notices: list[str] = []
        self._target = target
        self._window = window
        self._left_out = {kind for kind, wanted in (("audio", audio), ("subtitle", subtitles)) if not wanted}
        self._input = open_input(source)
        self._joined, self._steady, self._end = JoinedTime(window.moves), SteadyTime(), PieceEnd(window.end)
        self._routes: dict[int, _Route] = {}
        self._texts: list[SubtitleConverter] = []
        self._covers: list[av.Packet[Any]] = []
        self._refused = self._damaged = 0
        self._lost_tags: dict[str, list[str]] = {}  # the streams that have such tags, and lose them
        main = main_video(self._input, source)
        self._copy_file_properties()
        self._copy_properties(main, video)
        self._note_losses(main, video)
        self._settle_timecode(main, video)
        for stream in self._input.streams:
            if stream.index != main.index and stream.type not in self._left_out:
                self._add(source, stream)
            tells_time = stream.index == main.index and (window.moves or window.end is not None)
            if stream.index not in self._routes and not tells_time:
                stream.discard = Discard.all  # the demuxer skips it: the video is not read from the disk twice
        self._check_subtitles_on()
        if self._lost_tags:
            tags = ", ".join(f"{key} ({' '.join(streams)})" for key, streams in sorted(self._lost_tags.items()))
            self.notices.append(f"metadata of streams is not kept, {target.format.name} does not hold it: {tags}")
        self._packets = self._flow()
        self._pending = next(self._packets, None)

    def copy_until(self, time: Fraction) -> None:
        """Writes all packets up to `time` seconds, so that the target stays interleaved and its queues short."""
        while self._pending is not None and decoding_time(self._pending) <= time:
            self._copy_pending()

    def finish(self) -> None:
        """Writes what is left, and completes `notices`."""
        while self._pending is not None:
            self._copy_pending()
        damaged = self._damaged + sum(route.damaged for route in self._routes.values())
        if damaged:
            self.notices.append(f"left out: {counted(damaged, 'damaged packet')} of sound or subtitles")
        if self._refused:
            late = counted(self._refused, "packet")
            reason = "as around damage or where parts overlap"
            self.notices.append(f"left out: {late} of sound or subtitles with times that go back, {reason}")

    def close(self) -> None:
        self._input.close()

    def _add(self, source: Path, stream: Stream) -> None:
        label = label_of(stream)
        container = self._target.format.name
        if isinstance(stream, VideoStream):
            if not stream.disposition & Disposition.attached_pic:
                self.notices.append(f"{label} is not kept: only the main video is")
            elif not self._add_cover(source, stream):
                self.notices.append(f"cover art #{stream.index} is not kept: {container} does not hold it")
        elif isinstance(stream, DataStream):
            # Timecode tracks of mp4/mov, and those of chapters, which FFmpeg discards: the muxer makes them anew from
            # the metadata and the chapters.
            if "timecode" not in stream.metadata and stream.discard != Discard.all:
                self.notices.append(f"data stream #{stream.index} ({stream.name or 'unknown'}) is not kept")
        elif isinstance(stream, AttachmentStream):
            if container == "matroska":
                self._target.add_stream_from_template(stream)  # its payload goes into the header
            else:
                name = stream.metadata.get("filename", f"#{stream.index}")
                self.notices.append(f"attachment `{name}` is not kept: only mkv holds it")
        else:
            self._add_track(source, stream, label)

    def _add_track(self, source: Path, stream: Stream, label: str) -> None:
        """Sound or subtitles: as they are, else as another kind, else not at all."""
        container = self._target.format.name
        route: _Route | None = None
        if isinstance(stream, AudioStream) and stream.codec_context and not has_format(stream):
            self.notices.append(f"{label} is not kept: none of it decodes")  # and muxers fail on it at the very end
            return
        is_held = self._is_held(lambda trial: add_copy(stream, trial), sample=sample_packet(source, stream))
        is_too_long = is_held and self._window.is_cut and is_too_long_to_cut(stream)
        if is_held and not is_too_long:
            route = _Copy(add_copy(stream, self._target))
        elif isinstance(stream, SubtitleStream) and stream.codec_context and stream.codec_context.codec.text_sub:
            kind = KINDS[container]
            if self._is_held(lambda trial: SubtitleConverter(stream, trial, kind)):
                route = SubtitleConverter(stream, self._target, kind)
                self._texts.append(route)
                self.notices.append(Remark(f"{label} is converted to {kind}: {container} does not hold it"))
        elif isinstance(stream, AudioStream) and stream.codec_context:
            for encoder in encoders_for(stream, container):
                if self._is_held(partial(SoundConverter, stream, encoder=encoder, window=self._window)):
                    route = SoundConverter(stream, self._target, encoder, self._window)
                    reason = "its packets are too long to be cut" if is_too_long else f"{container} does not hold it"
                    self.notices.append(Remark(f"{label} is converted to {codec_name(route.stream)}: {reason}"))
                    break
        if route is None:
            self.notices.append(f"{label} is not kept: {container} does not hold it")
            return
        self._copy_properties(stream, route.stream)
        self._note_losses(stream, route.stream)
        self._routes[stream.index] = route

    def _check_subtitles_on(self) -> None:
        """mp4's muxer turns on one track of each kind. Of sound any player does, but subtitles appear."""
        container = self._target.format.name
        tracks = [route.stream for route in self._routes.values() if isinstance(route.stream, SubtitleStream)]
        marked = any(track.disposition & Disposition.default for track in tracks)
        if container in ("mp4", "mov") and tracks and not marked:
            self.notices.append(Remark(f"subtitles are on by default: {container} needs it"))

    def _is_held(self, add: Callable[[OutputContainer], object], sample: av.Packet[Any] | None = None) -> bool:
        """Whether the container takes such a stream: asked of the muxer, with a file in memory, a whole one where there
        is a `sample` to write: mp4 describes its tracks at the end."""
        trial = av.open(io.BytesIO(), "w", format=self._target.format.name)
        try:
            add(trial)
            trial.start_encoding()
            if sample is not None:
                sample.stream = trial.streams[0]
                trial.mux(sample)
                trial.close()
        except (ValueError, av.error.FFmpegError):
            return False
        finally:
            with suppress(av.error.FFmpegError):  # some streams cannot end before they have begun
                trial.close()
        return True

    def _add_cover(self, source: Path, stream: VideoStream) -> bool:
        """Cover art: a picture that players show for the file. False: there is no place for it."""
        container, kind = self._target.format.name, _IMAGE_TYPES.get(codec_name(stream))
        if kind is None or container not in ("mp4", "matroska"):
            return False
        packet = first_packet(source, stream.index)
        if packet is None:
            return False
        if container == "matroska":
            name = stream.metadata.get("filename", f"cover.{kind}")
            self._target.add_attachment(name, "image/png" if kind == "png" else "image/jpeg", bytes(packet))
            return True
        copy = self._target.add_stream_from_template(stream, opaque=True)
        self._copy_properties(stream, copy)
        copy.disposition = Disposition.attached_pic  # and nothing else, or the muxer takes it for a second video
        packet.stream, packet.pts, packet.dts = copy, 0, 0
        self._covers.append(packet)
        return True

    def _copy_file_properties(self) -> None:
        self._target.metadata.update(file_tags(self._input.metadata, self._target.format.name))
        lost = tags_not_held(self._target)
        if lost:
            self.notices.append(f"metadata is not kept, {self._target.format.name} does not hold it: {', '.join(lost)}")
        if is_location_rounded(self._target):
            self.notices.append(Remark(f"the location is rounded to about 2 m: {self._target.format.name} does so"))
        chapters = self._window.chapters(self._input.chapters())
        if chapters:
            self._target.set_chapters(chapters)
        if self._target.format.name in ("mp4", "mov") and do_overlap(chapters):
            notice = f"chapters end where the next begins: {self._target.format.name} does not hold overlapping ones"
            self.notices.append(notice)

    def _copy_properties(self, stream: Stream, copy: Stream) -> None:
        changed = isinstance(stream, VideoStream) or self._window != WHOLE or copy.name != stream.name
        copy.metadata.update(stream_tags(stream.metadata, changed=changed))
        language = copy.metadata.get("language")
        if language in _MOV_LANGUAGES and self._target.format.name == "mov":
            copy.metadata["language"] = _MOV_LANGUAGES[language]
        copy.disposition = stream.disposition

    def _note_losses(self, stream: Stream, copy: Stream) -> None:
        """Of tags, to be said together, and of marks."""
        for key in stream_tags_not_held(self._target, copy):
            self._lost_tags.setdefault(key, []).append(f"#{stream.index}")
        container = self._target.format.name
        for mark in marks_not_held(stream.disposition, container):
            self.notices.append(f"{label_of(stream)} is no longer marked `{mark}`: {container} does not hold it")

    def _settle_timecode(self, main: VideoStream, video: VideoStream) -> None:
        """A piece begins at a later one than the whole. mp4 and mov make a track of it, and fail where it makes no
        sense."""
        rate = video.codec_context.framerate  # `average_rate` comes with the header
        start, begin = self._window.start, (main.start_time or 0) * (main.time_base or 0)
        for metadata in (video.metadata, self._target.metadata):
            for key in [key for key in metadata if key.lower() == "timecode"]:
                first = Timecode.parse(metadata[key], rate)
                if first is not None and start is not None:
                    metadata[key] = str(first.after(start - begin))
                elif first is None and (start is not None or self._target.format.name in ("mp4", "mov")):
                    known = f"{rate} frames a second" if rate else "an unknown frame rate"
                    text = " ".join(metadata.pop(key).split())
                    notice = f"the timecode is not kept: `{text}` does not go with {known}"
                    self.notices += [notice] if notice not in self.notices else []

    def _flow(self) -> Iterator[av.Packet[Any]]:
        """All packets to be written, in order, at their times in the output."""
        yield from self._covers
        if not self._routes:
            return
        try:
            for packet in self._input.demux():
                if not packet.size:  # PyAV's sign of a stream's end
                    continue
                self._joined.place(packet)
                if self._end.is_passed(packet):
                    break
                if packet.stream_index in self._routes:
                    for steady in self._steady.pass_on(packet):
                        yield from self._converted(steady)
        except av.error.FFmpegError:
            self.notices.append("sound and subtitles end early: the source is damaged")
        for packet in self._steady.rest():
            yield from self._converted(packet)
        for route in self._routes.values():
            yield from route.convert(None)

    def _converted(self, packet: av.Packet[Any]) -> Iterable[av.Packet[Any]]:
        if not 0 <= (packet.duration or 0) <= _LONGEST:
            packet.duration = 0
        for part in short_packets(packet) if self._window.is_cut else (packet,):
            route = self._routes[part.stream_index]
            lead = LEAD if isinstance(route, SoundConverter) else 0
            if self._window.place(part, clip=isinstance(part.stream, SubtitleStream), lead=lead):
                time = decoding_time(part)
                yield from route.convert(part)
                for texts in self._texts:
                    yield from texts.shown_until(time - INTERLEAVING)

    def _copy_pending(self) -> None:
        packet = self._pending
        assert packet is not None
        try:
            self._target.mux(packet)
        except av.error.ArgumentError:  # a timestamp that goes back, which no container takes
            self._refused += 1
        except (av.error.InvalidDataError, av.error.PatchWelcomeError):  # of muxers that look into AAC of MPEG-TS
            self._damaged += 1
        self._pending = next(self._packets, None)
