"""Everything but the picture: sound, subtitles, chapters, attachments and metadata, copied packet for packet."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from av.container import OutputContainer
from av.stream import AttachmentStream, DataStream, Discard, Stream
from av.video.stream import VideoStream

from duovsr.video.info import codec_name, main_video, open_input

# Keys that describe the source file itself and would be false, or noise, in the output.
_FILE_KEYS = {"encoder", "major_brand", "minor_version", "compatible_brands"}
_PICTURE_KEYS = {"encoder", "rotate", "duration", "bps", "number_of_frames", "number_of_bytes"}


class StreamCopier:
    """Copies what `source` has beside its main video into `target`, in step with a video that is being written.

    To be made after the video stream was added to `target` and before the header is written. `notices` names what the
    target's container cannot hold.
    """

    def __init__(self, source: Path, target: OutputContainer, video: VideoStream) -> None:
        self.notices: list[str] = []
        self._target = target
        self._input = open_input(source)
        self._copies: dict[int, Stream] = {}
        self._refused = 0
        main = main_video(self._input, source)
        self._copy_file_properties()
        self._copy_properties(main, video)
        for stream in self._input.streams:
            if stream.index != main.index:
                self._add(stream)
            if stream.index not in self._copies:
                stream.discard = Discard.all  # the demuxer skips it: the video is not read from the disk twice
        self._packets = self._demux()
        self._pending = next(self._packets, None)

    def copy_until(self, time: Fraction) -> None:
        """Writes all packets up to `time` seconds, so that the target stays interleaved and its queues short."""
        while self._pending is not None and _decoding_time(self._pending) <= time:
            self._copy_pending()

    def finish(self) -> None:
        """Writes what is left, and completes `notices`."""
        while self._pending is not None:
            self._copy_pending()
        if self._refused:
            self.notices.append(f"{self._refused} damaged packets of sound or subtitles were not copied")

    def close(self) -> None:
        self._input.close()

    def _add(self, stream: Stream) -> None:
        label = f"{stream.type} stream #{stream.index} ({codec_name(stream)})"
        if isinstance(stream, VideoStream):
            self.notices.append(f"{label} is not kept: only the main video is")
            return
        if isinstance(stream, DataStream):
            # Chapter and timecode tracks of mp4/mov: the muxer makes them anew from the chapters and the metadata.
            if stream.name not in ("bin_data", "tmcd", None):
                self.notices.append(f"{label} is not kept")
            return
        if isinstance(stream, AttachmentStream) and self._target.format.name != "matroska":
            name = stream.metadata.get("filename", f"#{stream.index}")
            self.notices.append(f"attachment `{name}` is not kept: only mkv holds it")
            return
        if not self._is_held(stream):
            self.notices.append(f"{label} is not kept: {self._target.format.name} does not hold it")
            return
        copy = self._target.add_stream_from_template(stream)
        self._copy_properties(stream, copy)
        if not isinstance(stream, AttachmentStream):  # an attachment's payload is in the header
            self._copies[stream.index] = copy

    def _is_held(self, stream: Stream) -> bool:
        """Whether the container takes such a stream: asked of the muxer, with a file in memory."""
        with av.open(io.BytesIO(), "w", format=self._target.format.name) as trial:
            try:
                trial.add_stream_from_template(stream)
                trial.start_encoding()
            except (ValueError, av.error.FFmpegError):
                return False
        return True

    def _copy_file_properties(self) -> None:
        self._target.metadata.update(_without(self._input.metadata, _FILE_KEYS))
        chapters = self._input.chapters()
        if chapters:
            self._target.set_chapters(chapters)

    def _copy_properties(self, stream: Stream, copy: Stream) -> None:
        keys = _PICTURE_KEYS if isinstance(stream, VideoStream) else {"encoder"}
        copy.metadata.update(_without(stream.metadata, keys))
        copy.disposition = stream.disposition

    def _demux(self) -> Iterator[av.Packet[Stream]]:
        if not self._copies:
            return
        try:
            for packet in self._input.demux():
                if packet.stream_index in self._copies and packet.size:  # PyAV ends each stream with an empty packet
                    yield packet
        except av.error.FFmpegError:
            self.notices.append("sound and subtitles end early: the source is damaged")

    def _copy_pending(self) -> None:
        packet = self._pending
        assert packet is not None
        packet.stream = self._copies[packet.stream_index]
        try:
            self._target.mux(packet)
        except av.error.ArgumentError:  # a timestamp that goes back, which no container takes
            self._refused += 1
        self._pending = next(self._packets, None)


def _decoding_time(packet: av.Packet[Stream]) -> Fraction:
    timestamp = packet.dts if packet.dts is not None else packet.pts
    return Fraction(0) if timestamp is None else timestamp * packet.time_base


def _without(metadata: dict[str, str], keys: set[str]) -> dict[str, str]:
    return {key: value for key, value in metadata.items() if key.lower().split("-")[0] not in keys}
