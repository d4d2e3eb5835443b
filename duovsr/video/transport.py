"""What a transport stream lacks, told by the counters in its packets: FFmpeg passes on what is left without a word."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

_SYNC = 0x47  # how each packet begins
_PACKET = 188  # bytes
_SIZES = (188, 192, 204)  # from one to the next: as broadcast, with 4 bytes of time before each, with a checksum after
_CERTAIN = 5  # beginnings in a row that are no chance
_BLOCK = 1 << 22  # bytes that are looked at together
_NEAR = 1 << 12  # bytes that are searched at first for the next packet
_PROGRAMS = 0  # the number of the table that begins each part of a stream


@dataclass
class Losses:
    """`torn` are the numbers (PID) of streams that lack packets. `suspect`: there are bytes that are no packets, or
    counters that start anew where the program table's does, as after a hole, but also where parts were joined.
    `unfinished` are those whose last piece of sound or text is shorter than it says, as where a recording was stopped;
    pictures do not say. `cut_off`: the file ends inside a packet."""

    torn: set[int] = field(default_factory=set)
    suspect: bool = False
    unfinished: set[int] = field(default_factory=set)
    cut_off: bool = False


@dataclass
class _Stream:
    """A stream's packets from its latest with a payload on: (N, 188) uint8, and their places in the file."""

    packets: np.ndarray
    places: np.ndarray
    due: int = 0  # bytes of the latest piece of sound or text

    def take(self, packets: np.ndarray, places: np.ndarray) -> None:
        self.packets, self.places = np.concatenate([self.packets, packets]), np.concatenate([self.places, places])
        begins = np.flatnonzero(packets[:, 1] & 0x40)
        if len(begins):
            head = _payload(packets[begins[-1]])
            stated = int.from_bytes(head[4:6], "big")
            self.due = 6 + stated if stated else 0
            packets = packets[begins[-1] :]
        if self.due:
            self.due -= sum(len(_payload(packet)) for packet in packets)

    def compare(self, restarts: np.ndarray) -> tuple[bool, bool]:
        """Whether packets are missing between these, and whether some may be at one of the places `restarts`. Each
        packet with a payload counts on by one, from 0 to 15 and again. One may come twice, and where the stream says so
        (by its discontinuity indicator) the counter starts anew."""
        packets = self.packets
        filled = np.flatnonzero(packets[:, 3] & 0x10)
        says_so = (packets[:, 3] & 0x20 > 0) & (packets[:, 4] > 0) & (packets[:, 5] & 0x80 > 0)
        steps = np.diff(packets[filled, 3].astype(int)) & 0xF
        torn = suspect = False
        for index in np.flatnonzero((steps != 1) & (np.diff(says_so.cumsum()[filled]) == 0)):
            before, after = filled[index], filled[index + 1]
            if steps[index] == 0 and _payload(packets[before]) == _payload(packets[after]):
                continue
            between = (self.places[before] < restarts) & (restarts < self.places[after])
            is_begin = packets[after, 1] & 0x40 > 0  # of a picture, or of some sound
            suspect |= bool(is_begin and between.any())
            torn |= not (is_begin and bool(between.any()))
        latest = filled[-1] if len(filled) else 0
        self.packets, self.places = packets[latest:], self.places[latest:]
        return torn, suspect


def losses(path: Path, streams: Collection[int]) -> Losses:
    """Reads a transport stream once, and finds what is missing of each of `streams`."""
    found = Losses()
    held = {number: _Stream(np.empty((0, _PACKET), np.uint8), np.empty(0, int)) for number in {*streams, _PROGRAMS}}
    restarts = np.empty(0, int)  # the latest, and those of the packets at hand
    count = 0
    with path.open("rb") as file:
        for packets in _packets(file, found):
            numbers = (packets[:, 1].astype(int) & 0x1F) << 8 | packets[:, 2]
            intact = packets[:, 1] < 0x80  # what the receiver marked as wrong may have any number
            for number, stream in held.items():
                own = np.flatnonzero((numbers == number) & intact)
                stream.take(packets[own], own + count)
            tables = held[_PROGRAMS]
            counters = tables.packets[:, 3].astype(int) & 0xF
            begins = np.flatnonzero((np.diff(counters) & 0xF != 1) | (counters[1:] == 0)) + 1
            restarts = np.concatenate([restarts[-1:], tables.places[begins]])
            for number in streams:
                torn, suspect = held[number].compare(restarts)
                found.torn |= {number} if torn else set()
                found.suspect |= suspect
            tables.packets, tables.places = tables.packets[-1:], tables.places[-1:]
            count += len(packets)
    found.unfinished = {number for number in streams if held[number].due > 0}
    return found


def _payload(packet: np.ndarray) -> bytes:
    if not packet[3] & 0x10:
        return b""
    begin = 5 + int(packet[4]) if packet[3] & 0x20 else 4  # after the times, of which a second copy has its own
    return packet[begin:].tobytes()


def _packets(file: BinaryIO, found: Losses) -> Iterator[np.ndarray]:
    """(N, 188) uint8 at a time; after bytes that are no packets, it goes on with the next that are."""
    rest = np.empty(0, np.uint8)
    size = 0
    while True:
        block = np.frombuffer(file.read(_BLOCK), np.uint8)
        if not size:
            size, first = _form(block)
            block = block[first:]
        is_end = len(block) == 0
        rest = np.concatenate([rest, block if len(block) else np.zeros(size - _PACKET, np.uint8)])
        while len(rest) >= (size if is_end else size * _CERTAIN):
            whole = rest[: len(rest) // size * size].reshape(-1, size)
            wrong = np.flatnonzero(whole[:, 0] != _SYNC)
            good = int(wrong[0]) if len(wrong) else len(whole)
            yield whole[:good, :_PACKET]
            rest = rest[good * size :]
            if len(wrong):
                next_packet = _next_packet(rest, size)
                found.suspect |= next_packet < len(rest)  # zeros at the end are no hole
                rest = rest[next_packet:]
        if is_end:
            found.cut_off = bool(len(rest) and rest[0] == _SYNC)
            return


def _form(head: np.ndarray) -> tuple[int, int]:
    """How far it is from packet to packet, and to the first of them."""
    starts = {size: _next_packet(head, size) for size in _SIZES}
    size = min(starts, key=lambda size: starts[size])
    return size, starts[size]


def _next_packet(data: np.ndarray, size: int) -> int:
    """Where the next packet begins; the length of `data` if there is none. What is looked at grows step by step: of a
    bad reception the next packet is near, and there are many."""
    span = _NEAR
    while True:
        begins = data[: span + size * (_CERTAIN - 1)] == _SYNC
        candidates = np.flatnonzero(begins[:span])
        for later in range(size, size * _CERTAIN, size):
            places = candidates + later
            candidates = candidates[begins[np.minimum(places, len(begins) - 1)] | (places >= len(begins))]
        if len(candidates):
            return int(candidates[0])
        if span >= len(data):
            return len(data)
        span *= 8
