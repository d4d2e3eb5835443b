"""Which clip is measured against which: two files, or two folders whose files have the same stems."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from duovsr.errors import InputError

VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogv")
    + (".ts", ".webm", ".wmv", ".y4m")
)


@dataclass(frozen=True)
class ClipPair:
    """The clip to measure, and the truth or LQ clip to measure it against."""

    name: str
    output: Path
    reference: Path


def pair_clips(output: Path, reference: Path) -> tuple[ClipPair, ...]:
    """The pairs of two files, or of two folders by stem, in the order of their names.

    Other files than videos in a folder are passed over. Raises `InputError` for a path that does not exist, a file
    against a folder, folders without videos, a stem that stands twice, and a clip without partner on either side.
    """
    for path in (output, reference):
        if not path.exists():
            raise InputError(f"no such file or folder: `{path}`")
    if output.is_dir() != reference.is_dir():
        folder, file = (output, reference) if output.is_dir() else (reference, output)
        raise InputError(f"`{folder}` is a folder, but `{file}` is a file", hint="give two files or two folders")
    if not output.is_dir():
        return (ClipPair(output.stem, output, reference),)
    outputs, references = _clips_by_stem(output), _clips_by_stem(reference)
    for clips, others, elsewhere in ((outputs, references, reference), (references, outputs, output)):
        unpaired = sorted(clips.keys() - others.keys())
        if unpaired:
            more = f" (nor for {len(unpaired) - 1} others)" if len(unpaired) > 1 else ""
            raise InputError(f"no clip in `{elsewhere}` has the name of `{clips[unpaired[0]]}`{more}")
    return tuple(ClipPair(stem, outputs[stem], references[stem]) for stem in sorted(outputs))


def _clips_by_stem(folder: Path) -> dict[str, Path]:
    clips: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in VIDEO_SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in clips:
            raise InputError(f"`{clips[path.stem]}` and `{path}` have the same stem", hint="keep one of them there")
        clips[path.stem] = path
    if not clips:
        raise InputError(f"no videos in `{folder}`")
    return clips
