"""Footage to train on: folders of videos and images, with or without a `manifest.csv`, and tar shards of both."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import av
import torch
from av.container import InputContainer
from torch import Tensor
from torch.nn import functional as F

from duovsr.errors import InputError
from duovsr.video.color import FrameToRgb, decoding_tags, picture_tags
from duovsr.video.container import main_video, open_input
from duovsr.video.deinterlace import deinterlaced
from duovsr.video.info import has_fields
from duovsr.video.sidedata import Orientation, SideData

VIDEOS = frozenset(".avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ts .webm .wmv .y4m".split())
IMAGES = frozenset(".bmp .jpeg .jpg .png .tif .tiff .webp".split())
SHARD = ".tar"
VALIDATION_PART = 12  # one source in so many is held out
_COLUMNS = ("file", "repo", "path", "kind")
_PREFERENCE = {"ai-generated": 0.3, "animation": 0.7}  # by kind: generated clips carry their generator's texture
_FROM_ZERO = ("matroska,webm", "asf")  # formats whose durations begin at time 0, not at the first frame
_MOST_WINDOWS = 12  # of a window's side: what a short side is shrunk to, so that no photo is too large for the memory


class Member(NamedTuple):
    """Where a shard has a file, in bytes."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Source:
    """A clip or a still: a file, or a member of a tar shard."""

    path: Path  # the file, or the shard
    still: bool
    validation: bool  # held out from training
    sharpness: float | None = None  # see `sharpness`; None until it is measured
    preference: float = 1.0
    member: Member | None = None

    @property
    def name(self) -> str:
        return (self.path / self.member.name if self.member else self.path).as_posix()

    @property
    def identity(self) -> str:
        """The same however the path is spelt."""
        return identity_of(self.name)

    @property
    def weight(self) -> float:
        """The part of the samples made from it: sharper sources teach more; above 2500 it is sharpening and noise."""
        assert self.sharpness is not None, "measured before it is weighed"
        return self.preference * math.sqrt(min(self.sharpness, 2500.0))


def find_sources(folders: list[Path]) -> list[Source]:
    """The clips and stills of folders and `.tar` shards, each once and in the order of their names.

    A folder with a `manifest.csv` is what that lists; its columns are `file`, `repo` and `path` (the origin), `kind`
    (`still`, or any word for a clip) and perhaps `lapvar` (the sharpness). Any other folder is all videos, images and
    shards in it, by suffix. Held-out sources are chosen by a hash of their origin, so that two cuts of one recording
    that a manifest lists never fall on different sides; without a manifest the origin is the path in the folder.
    Raises InputError for a missing or empty folder, and for a manifest or a shard that cannot be read.
    """
    sources: dict[tuple[Path, Member | None], Source] = {}
    for folder in folders:
        if not folder.is_dir() and not (folder.is_file() and folder.suffix.lower() == SHARD):
            hint = "name a folder of videos and images, or a .tar shard of them"
            raise InputError(f"{'not a' if folder.exists() else 'no such'} folder: `{folder}`", hint=hint)
        found = list(_listed(folder) if (folder / "manifest.csv").is_file() else _present(folder))
        if not found:
            raise InputError(f"no sources in `{folder}`", hint=f"known suffixes: {' '.join(sorted(VIDEOS | IMAGES))}")
        sources |= {(source.path.resolve(), source.member): source for source in found}  # once, however it is spelt
    return sorted(sources.values(), key=lambda source: source.name)


def identity_of(name: str, directory: str = ".") -> str:
    """Of a source by its name, which is relative to `directory` if it is not absolute."""
    return str(Path(directory, name).resolve())


def _held_out(origin: str) -> bool:
    return hashlib.sha256(origin.encode(errors="surrogateescape")).digest()[0] % VALIDATION_PART == 0


def _listed(folder: Path) -> Iterator[Source]:
    manifest = folder / "manifest.csv"
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
            if missing:
                raise InputError(f"no column `{missing[0]}` in `{manifest}`", hint=f"it needs {', '.join(_COLUMNS)}")
            for row in rows:
                yield _row(row, folder, f"line {rows.line_num} of `{manifest}`")
    except (UnicodeDecodeError, csv.Error) as error:
        hint = "save it again as CSV, encoded in UTF-8"
        raise InputError(f"not a table in UTF-8: `{manifest}`", hint=hint) from error


def _row(row: dict[str, str | None], folder: Path, where: str) -> Source:
    """Raises InputError where the row is short, names no file, or has no variance where it has something."""
    empty = [column for column in _COLUMNS if row[column] is None or (column == "file" and not row[column])]
    if empty:
        raise InputError(f"no `{empty[0]}` in {where}", hint=f"a row needs {', '.join(_COLUMNS)}")
    try:
        sharpness = float(noted) if (noted := row.get("lapvar")) else None
    except ValueError as error:
        raise InputError(f"not a number: `{row['lapvar']}` in column lapvar, {where}") from error
    if sharpness is not None and not 0 <= sharpness < math.inf:
        raise InputError(f"not a variance: `{row['lapvar']}` in column lapvar, {where}")
    file, kind, held_out = str(row["file"]), str(row["kind"]), _held_out(f"{row['repo']}/{row['path']}")
    return Source(folder / file, kind == "still", held_out, sharpness, _PREFERENCE.get(kind, 1.0))


def _present(folder: Path) -> Iterator[Source]:
    root, files = (folder, folder.rglob("*")) if folder.is_dir() else (folder.parent, iter([folder]))
    for file in sorted(files, key=Path.as_posix):
        origin, suffix = file.relative_to(root).as_posix(), file.suffix.lower()
        if suffix == SHARD and file.is_file():
            yield from _members(file, origin)
        elif suffix in VIDEOS | IMAGES and file.is_file():
            yield Source(file, suffix in IMAGES, _held_out(origin))


def _members(shard: Path, origin: str) -> Iterator[Source]:
    try:
        with tarfile.open(shard, "r:") as archive:
            for entry in archive:
                suffix = Path(entry.name).suffix.lower()
                if suffix in VIDEOS | IMAGES and entry.isfile():
                    member = Member(entry.name, entry.offset_data, entry.size)
                    yield Source(shard, suffix in IMAGES, _held_out(f"{origin}/{entry.name}"), member=member)
    except tarfile.TarError as error:
        hint = "shards are uncompressed tar files; this one may be cut off"
        raise InputError(f"not a readable tar file: `{shard}`", hint=hint) from error


def sharpness(frame: Tensor) -> float:
    """The variance of the Laplacian of a frame (3, H, W) uint8 in grey levels 0..255, as OpenCV has it (`CV_64F`)."""
    red, green, blue = frame.double()
    grey = (0.299 * red + 0.587 * green + 0.114 * blue).round()
    padded = F.pad(grey[None], (1, 1, 1, 1), mode="reflect")[0]
    sides = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return float((sides - 4 * grey).var(correction=0))


def measure(source: Source, side: int) -> float:
    """The sharpness of the middle frame. Raises InputError as `open_footage` and `Footage.read` do."""
    with open_footage(source, side) as footage:
        return sharpness(footage.read(footage.length // 2, 1)[0])


@contextmanager
def open_footage(source: Source, side: int) -> Iterator[Footage]:
    """The source, opened to cut windows of `side` pixels from. Raises InputError for what is not a video or image, and
    for what turns out to be damaged while it is open."""
    try:
        with _open(source) as container:
            yield Footage(container, source.name, side)
    except av.error.FFmpegError as error:
        raise InputError(f"not a video or image, or damaged: `{source.name}`") from error


def _open(source: Source) -> InputContainer:
    if source.member is None:
        return open_input(source.path)
    with source.path.open("rb") as shard:
        shard.seek(source.member.offset)
        return av.open(io.BytesIO(shard.read(source.member.size)), "r", metadata_errors="surrogateescape")


class Footage:
    """An opened clip or still. `length` is its number of frames as the container has it, 1 where it does not say."""

    def __init__(self, container: InputContainer, name: str, side: int) -> None:
        self._container, self._name, self._side = container, name, side
        self._stream = main_video(container, Path(name))
        assert self._stream.time_base is not None, "every opened stream has a time base"
        rate = self._stream.average_rate or self._stream.base_rate or Fraction(25)
        self._ticks = 1 / (rate * self._stream.time_base)  # of a frame
        self._second = 1 / self._stream.time_base
        duration = self._stream.duration or (container.duration or 0) * self._second / av.time_base
        if container.format.name in _FROM_ZERO and duration > (begin := self._stream.start_time or 0):
            duration -= begin
        # An mp4 also counts the frames that its edit list hides; its duration does not.
        lengths = [length for length in (self._stream.frames, round(duration / self._ticks)) if length]
        self.length = min(lengths, default=1)
        self._to_rgb: FrameToRgb | None = None
        self._orientation = Orientation()

    def read(self, start: int, count: int, step: int = 1) -> Tensor:
        """Frames start, start + step, ...: (T, 3, H, W) uint8 RGB, upright; T < `count` where the clip ends early.

        Interlaced ones are deinterlaced, as by `upscale`; large ones are shrunk to a short side of 12 windows. Read
        once only: it goes on where it has ended. Raises InputError where there is no frame at `start`, and for frames
        that are smaller than a window.
        """
        pictures = islice(self._whole(self._pictures(start)), 0, (count - 1) * step + 1, step)
        frames = [self._frame(picture) for picture in pictures]
        if not frames:
            raise InputError(f"no frame {start} in `{self._name}`")
        if any(frame.shape != frames[0].shape for frame in frames):
            raise InputError(f"the size changes after frame {start} of `{self._name}`")
        return torch.stack(frames)

    def _whole(self, pictures: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
        """The pictures without the combs of two moments, which a model would learn to draw."""
        return deinterlaced(_numbered(pictures), Fraction(1)) if has_fields(self._stream.codec.name) else pictures

    def _pictures(self, start: int) -> Iterator[av.VideoFrame]:
        """The decoded frames from `start` on, reached from the keyframe before."""
        if start == 0:  # without seeking, which some formats cannot do
            yield from self._container.decode(self._stream)
            return
        begin = self._stream.start_time or 0
        time, back = begin + round(start * self._ticks), 0
        while True:
            # MPEG transport and program streams have no index: a seek may end after the keyframe that is needed.
            self._container.seek(time - back, stream=self._stream)
            pictures = self._container.decode(self._stream)
            first = next(pictures, None)
            if time - back < begin - self._second or (first and first.pts is not None and first.pts <= time):
                break
            back = max(2 * back, round(self._second))
        for picture in chain([first] if first else [], pictures):
            if picture.pts is not None and picture.pts > time - self._ticks / 2:
                yield picture

    def _frame(self, picture: av.VideoFrame) -> Tensor:
        """(3, H, W) uint8."""
        if self._to_rgb is None:
            tags = picture_tags(picture)
            known = decoding_tags(tags, picture.width, picture.height)
            if known is None:
                raise InputError(f"unsupported colour matrix {tags.matrix} (H.273) in `{self._name}`")
            self._to_rgb, self._orientation = FrameToRgb(known, 8), SideData(picture).orientation
        frame = torch.from_numpy(self._orientation.upright(self._to_rgb(picture))).permute(2, 0, 1)
        short, most = min(frame.shape[1:]), _MOST_WINDOWS * self._side
        if short < self._side:
            raise InputError(f"smaller than {self._side} pixels: `{self._name}`")
        if short > most:
            size = [round(length * most / short) for length in frame.shape[1:]]
            frame = F.interpolate(frame[None], size, mode="bicubic", antialias=True)[0]
        return frame


def _numbered(pictures: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """In place of their times: the filter wants some where the file has none."""
    for n, picture in enumerate(pictures):
        picture.pts = n
        yield picture
