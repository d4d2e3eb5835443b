"""The boxes that mp4 and mov are made of: a size of 32 bits or more, a name, a content, often of boxes."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO


def find(file: BinaryIO, outer: tuple[int, int], name: bytes, number: int = 0) -> tuple[int, int]:
    """Where the content of the `number`th box of this name begins and ends, among those inside `outer`."""
    place, end = outer
    while place < end:
        file.seek(place)
        size, found = struct.unpack(">I4s", file.read(8))
        content = place + 8
        if size == 1:  # more than 32 bits hold
            (size,) = struct.unpack(">Q", file.read(8))
            content += 8
        if found == name:
            if number == 0:
                return content, place + size
            number -= 1
        place += max(size, 8)
    raise AssertionError(f"`{file.name}` has no {name.decode()} box")


def refer_to_chapters(path: Path) -> None:
    """Makes the first track of a file refer to the second, which has the titles of its chapters.

    FFmpeg writes one reference a track, and that may be the timecode's; a track of titles to which none refers is taken
    for subtitles.
    """
    with path.open("r+b") as file:
        movie = find(file, (0, path.stat().st_size), b"moov")
        track = find(file, movie, b"trak")
        references = find(file, track, b"tref")
        file.seek(references[0])
        if b"chap" in file.read(references[1] - references[0]):
            return
        assert movie[1] == path.stat().st_size, "nothing comes after the index, so nothing in it moves"
        file.seek(references[1])
        rest = file.read()
        chapters = struct.pack(">I4sI", 12, b"chap", 2)
        file.seek(references[1])
        file.write(chapters + rest)
        for content, end in (movie, track, references):
            file.seek(content - 8)
            file.write(struct.pack(">I", end - content + 8 + len(chapters)))
