"""Pictures as files: which paths name stills, numbered sequences and folders of them. Nothing is decoded.

What may not be looked at is passed for not there (`os.path`, where `pathlib` raises): opening it then says why.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from duovsr.errors import InputError

# Of what can be read: no .jxl, for which the wheel's FFmpeg has no decoder.
IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".dpx", ".exr", ".hdr", ".heic", ".heif", ".hif", ".j2c", ".j2k", ".jfif", ".jls", ".jp2", ".jpc")
    + (".jpe", ".jpeg", ".jpg", ".pam", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".ras", ".sgi")
    + (".sun", ".tga", ".tif", ".tiff", ".webp", ".xwd")
)
VIDEO_SUFFIXES = frozenset(
    (".264", ".265", ".3g2", ".3gp", ".apng", ".asf", ".avi", ".divx", ".dv", ".evo", ".f4v", ".flv", ".gif", ".gxf")
    + (".h264", ".h265", ".hevc", ".ismv", ".ivf", ".m1v", ".m2p", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg")
    + (".mjpg", ".mk3d", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nut", ".obu")
    + (".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".tod", ".tp", ".trp", ".ts", ".vob", ".vro", ".webm", ".wmv", ".wtv")
    + (".xvid", ".y4m")
)

_NUMBER = re.compile(r"%(?:0(\d{1,3}))?d", re.ASCII)


def kind_of(path: Path) -> Literal["video", "images"]:
    """`images` for a still's name, a pattern, and a folder of images; `video` for all else."""
    return "images" if path.suffix.lower() in IMAGE_SUFFIXES or is_sequence(path) else "video"


def is_sequence(path: Path) -> bool:
    """Whether `path` is many pictures: a pattern, or a folder with images and no videos."""
    return is_pattern(path) or (os.path.isdir(path) and bool(_folder_images(path)))


def is_pattern(path: Path) -> bool:
    """Whether the name is an image's with `%d` or `%05d` for a number, and not that of a file that exists."""
    return path.suffix.lower() in IMAGE_SUFFIXES and len(_NUMBER.findall(path.name)) == 1 and not os.path.exists(path)


def numbered_name(pattern: Path, number: int) -> Path:
    """The file of a pattern's sequence that has the number. Other percent signs stay what they are."""
    return pattern.with_name(_NUMBER.sub(lambda place: f"{number:0{place[1] or 1}d}", pattern.name))


def image_files(path: Path) -> list[Path]:
    """The files of a sequence in their order; none for all else."""
    return [file for _, file in numbered_files(path)]


def numbered_files(path: Path) -> list[tuple[int, Path]]:
    """The files of a sequence with their numbers: a pattern's own, or, in a folder, the place by name (2 before 10)."""
    if not is_pattern(path):
        return list(enumerate(_folder_images(path))) if os.path.isdir(path) else []
    place = _NUMBER.search(path.name)
    assert place is not None, "patterns have a number"
    name = re.compile(re.escape(path.name[: place.start()]) + r"(\d+)" + re.escape(path.name[place.end() :]), re.ASCII)
    width = int(place[1] or 1)
    if not os.path.isdir(path.parent):
        return []
    matches = ((name.fullmatch(file.name), file) for file in listed(path.parent))
    numbers = ((match[1], file) for match, file in matches if match)
    return sorted((int(digits), file) for digits, file in numbers if digits == f"{int(digits):0{width}d}")


def _folder_images(folder: Path) -> list[Path]:
    files = [file for file in listed(folder) if not file.name.startswith(".")]
    if any(file.suffix.lower() in VIDEO_SUFFIXES for file in files):
        return []  # videos, and perhaps their covers
    return sorted((file for file in files if file.suffix.lower() in IMAGE_SUFFIXES), key=natural_order)


def listed(folder: Path) -> list[Path]:
    """What is in a folder. Raises `InputError` where that cannot be read."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read the folder `{folder}`: {error.strerror}") from error


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """A key for sorting by name: 2 before 10."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name
