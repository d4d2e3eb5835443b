"""The part of a source's timeline that goes into the output, and its place there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import av
from av.subtitles.stream import SubtitleStream
from av.video.stream import VideoStream

if TYPE_CHECKING:
    from av.container.core import Chapter


_GRACE = Fraction(1, 10)  # seconds that packets overlap at most, around damage, while time goes on
INTERLEAVING = 10  # seconds; no file keeps its streams further apart
_CERTAIN = 1  # seconds after which a time that is ahead is no mistake
_ROUNDING = Fraction(1, 1000)  # seconds, of the clocks of chapters
_ABSURD = 2**62  # ticks, which only damaged files have: a move could leave the 64 bits of a timestamp


@dataclass(frozen=True)
class Window:
    """The part of the source's timeline that is kept, in seconds; `end` is excluded, None is open. All of it moves by
    `shift`. `moves` are those of `VideoReader`: the timeline is the one that goes on where the source's time starts
    again."""

    start: Fraction | None = None
    end: Fraction | None = None
    shift: Fraction = Fraction(0)
    moves: tuple[Fraction, ...] = ()

    @property
    def is_cut(self) -> bool:
        return self.start is not None or self.end is not None

    def place(self, packet: av.Packet[Any], *, clip: bool, lead: int = 0) -> bool:
        """Moves a packet to its time in the output; False: it is outside.

        A packet belongs where it starts: sound may begin, and end, later than the piece by less than one packet (PCM 20
        ms, FLAC 0.1 s), for it is not coded anew; where it is, packets of `lead` seconds before the piece belong to it.
        With `clip`, for what is shown for a while, a packet belongs where any of it is, and is cut.
        """
        tick = packet.time_base
        pts = packet.dts if packet.pts is None else packet.pts
        if pts is None:
            return not self.is_cut
        if abs(pts) >= _ABSURD:
            return False
        last = pts + (packet.duration or 0)
        if clip and self.start is not None and pts * tick < self.start < last * tick:
            late = ceil(self.start / tick) - pts
            pts += late
            packet.pts, packet.dts, packet.duration = pts, pts, last - pts
        if self.start is not None and pts * tick < self.start - lead:
            return False
        if self.end is not None and pts * tick >= self.end:
            return False
        if clip and self.end is not None and last * tick > self.end:
            packet.duration = max(1, floor(self.end / tick) - pts)
        _move(packet, round(self.shift / tick))
        return True

    def chapters(self, chapters: list[Chapter]) -> list[Chapter]:
        """Those that the window holds any of, cut and moved."""
        kept: list[Chapter] = []
        for chapter in chapters:
            tick = chapter["time_base"]
            assert tick is not None, "FFmpeg gives every chapter a time base"
            first, last = chapter["start"] * tick, chapter["end"] * tick
            if self.start is not None and first < self.start >= last:
                continue
            if self.end is not None and first >= self.end:
                continue
            first = first if self.start is None else max(first, self.start)
            last = last if self.end is None else min(last, self.end)
            start, end = (round((time + self.shift) / tick) for time in (first, last))
            kept.append({**chapter, "start": start, "end": end})
        return kept


class JoinedTime:
    """Gives the packets of all streams one timeline where the source's time starts again, as in joined files: they are
    moved on as the picture was, by one of `moves`."""

    def __init__(self, moves: tuple[Fraction, ...]) -> None:
        self._moves = (Fraction(0), *moves)
        self._current = Fraction(0)  # of the part that is being read
        self._streams: dict[int, tuple[Fraction, Fraction]] = {}  # move and end of the last packet

    def place(self, packet: av.Packet[Any]) -> None:
        """Moves a packet; all of them are to be shown, in the order of the file, those of the picture too."""
        tick = packet.time_base
        timestamp = packet.pts if packet.dts is None else packet.dts
        if len(self._moves) == 1 or timestamp is None or abs(timestamp) >= _ABSURD:
            return
        if not isinstance(packet.stream, SubtitleStream):  # too few to tell that time has started again
            time = timestamp * tick
            move, end = self._streams.get(packet.stream_index, (self._current, time + self._current))
            if time + move < end - _GRACE:
                move = min(self._moves, key=lambda move: abs(time + move - end))
            self._streams[packet.stream_index] = move, time + move + (packet.duration or 0) * tick
            self._current = move
        _move(packet, round(self._current / tick))


class SteadyTime:
    """Puts right packets of sound that are far ahead of those before and after them: written as they are, they would
    keep out all that follow."""

    def __init__(self) -> None:
        self._ends: dict[int, Fraction] = {}  # of each stream's last packet
        self._held: dict[int, list[av.Packet[Any]]] = {}  # those that are ahead, until it is clear whether all are

    def pass_on(self, packet: av.Packet[Any]) -> Iterator[av.Packet[Any]]:
        """The packet and those that waited for it, or nothing yet; a stream's packets stay in order."""
        if isinstance(packet.stream, SubtitleStream):  # which come when they like
            yield packet
            return
        time, held = decoding_time(packet), self._held.setdefault(packet.stream_index, [])
        end = self._ends.get(packet.stream_index, time)
        if held and time < decoding_time(held[0]):
            early = end - decoding_time(held[0])
            for each in held:
                _move(each, round(early / each.time_base))
            end = _end(held[-1])
            yield from held
            held.clear()
        if held or time - end > _GRACE:
            held.append(packet)
            if time - decoding_time(held[0]) < _CERTAIN:
                return
            yield from held  # a hole
            held.clear()
        else:
            yield packet
        self._ends[packet.stream_index] = _end(packet)

    def rest(self) -> Iterator[av.Packet[Any]]:
        for held in self._held.values():
            yield from held


class PieceEnd:
    """Tells from packets of picture and sound where nothing more of a piece comes: some time after its end, or where
    time starts again, which the reader has not seen, for it stopped before."""

    def __init__(self, end: Fraction | None) -> None:
        self._end = end
        self._recent: dict[int, deque[Fraction]] = {}  # two times: of one alone, nobody knows whether it is wrong

    def is_passed(self, packet: av.Packet[Any]) -> bool:
        if self._end is None or isinstance(packet.stream, SubtitleStream):
            return False
        recent = self._recent.setdefault(packet.stream_index, deque(maxlen=2))
        before, time = min(recent, default=Fraction(0)), decoding_time(packet)
        recent.append(time)
        if isinstance(packet.stream, VideoStream) and min(before, time) > self._end + INTERLEAVING:
            return True
        return before > self._end - _CERTAIN and time < before - _CERTAIN


def do_overlap(chapters: list[Chapter]) -> bool:
    """By more than their clock's rounding."""
    times = sorted((c["start"] * (c["time_base"] or 0), c["end"] * (c["time_base"] or 0)) for c in chapters)
    return any(end - start > _ROUNDING for (_, end), (start, _) in pairwise(times))


def decoding_time(packet: av.Packet[Any]) -> Fraction:
    timestamp = packet.dts if packet.dts is not None else packet.pts
    return Fraction(0) if timestamp is None else timestamp * packet.time_base


def _end(packet: av.Packet[Any]) -> Fraction:
    return decoding_time(packet) + (packet.duration or 0) * packet.time_base


def _move(packet: av.Packet[Any], ticks: int) -> None:
    packet.pts = None if packet.pts is None else packet.pts + ticks
    packet.dts = None if packet.dts is None else packet.dts + ticks


WHOLE = Window()
