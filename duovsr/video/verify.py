"""Whether a finished file holds what was to be written, read from the file itself."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av

from duovsr.video.boxes import find

_MATROSKA_CLOCK = Fraction(1, 1000)


class _Ends(NamedTuple):
    """When a file says that it ends, in seconds, and that its picture does; either is off by `error` at most."""

    file: Fraction
    picture: Fraction
    error: Fraction


def verify_output(path: Path, expected_pts: Sequence[int], end: int, time_base: Fraction) -> None:
    """Demuxes a finished mp4, mov, mkv or webm. Raises `AssertionError` unless it shows as many frames, and when, as
    expected, and says that its picture lasts until `end`, where the last frame ends, and the whole of it no less.

    Times may be off by the rounding to the container's own clock (1 ms in mkv), never by more.
    """
    with av.open(str(path.absolute()), "r", metadata_errors="surrogateescape") as container:
        stream = container.streams.video[0]
        tick = stream.time_base or Fraction(0)
        shown = (packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard)
        found = sorted(-1 if pts is None else pts for pts in shown)
        if "matroska" in container.format.name:
            whole = Fraction(container.duration or 0, av.time_base)
            picture = _seconds(stream.metadata["DURATION"])
            # Half of the clock for the last frame's time, and the whole for its duration, which is no less.
            ends = _Ends(whole, picture, 3 * _MATROSKA_CLOCK / 2)
        else:
            ends = _movie_ends(path, stream.index)
    if len(found) != len(expected_pts):
        raise AssertionError(f"`{path}` has {len(found)} frames instead of {len(expected_pts)}")
    for index, (pts, expected) in enumerate(zip(found, sorted(expected_pts), strict=True)):
        if abs(pts * tick - expected * time_base) > tick / 2:
            raise AssertionError(f"frame {index} of `{path}` is at {pts * tick} s instead of {expected * time_base} s")
    last = end * time_base
    if abs(ends.picture - last) > ends.error:
        raise AssertionError(f"the picture of `{path}` ends at {float(ends.picture)} s instead of {float(last)} s")
    if ends.file < last - ends.error:
        raise AssertionError(f"`{path}` says that it ends at {float(ends.file)} s, its picture at {float(last)} s")


def _seconds(clock: str) -> Fraction:
    """Of a Matroska track's `DURATION`, as 00:01:30.500000000."""
    return sum((Fraction(part) * 60**power for power, part in enumerate(reversed(clock.split(":")))), Fraction(0))


def _movie_ends(path: Path, track: int) -> _Ends:
    """Of an mp4 or mov, from the headers of the movie and of its `track`th track. What FFmpeg says of such a file is
    worked out from times of decoding, and may be too short where they vary."""
    with path.open("rb") as file:
        movie = find(file, (0, path.stat().st_size), b"moov")
        clock, whole = _fields(file, find(file, movie, b"mvhd"), ">4xIIII", ">4xQQIQ")[-2:]
        header = find(file, find(file, movie, b"trak", track), b"tkhd")
        picture = _fields(file, header, ">4xIIIII", ">4xQQIIQ")[-1]
    # A late start and what follows it are each rounded up.
    return _Ends(Fraction(whole, clock), Fraction(picture, clock), Fraction(2, clock))


def _fields(file: BinaryIO, box: tuple[int, int], short: str, long: str) -> tuple[int, ...]:
    """The numbers of a header, whose first byte tells how long they are."""
    file.seek(box[0])
    content = file.read(box[1] - box[0])
    fields: tuple[int, ...] = struct.unpack_from(long if content[0] else short, content)
    return fields
