"""Which clip is measured against which: two files, or two folders whose files have the same names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from duovsr.errors import InputError
from duovsr.video.images import VIDEO_SUFFIXES, listed


@dataclass(frozen=True)
class ClipPair:
    """The clip to measure, and the truth or LQ clip to measure it against."""

    name: str
    output: Path
    reference: Path


def pair_clips(output: Path, reference: Path) -> tuple[ClipPair, ...]:
    """The pairs of two files, or of two folders by name, in the order of the outputs' names.

    An output has the name of its reference, as `duovsr upscale` gives it (`a.mp4`, or `a.avi.mkv` for `a.avi`), or its
    stem. Other files than videos in a folder are passed over. Raises `InputError` for a path that does not exist, a
    file against a folder, folders without videos, a stem that stands twice, and a clip without partner on either side.
    """
    for path in (output, reference):
        try:
            path.stat()
        except FileNotFoundError as error:
            raise InputError(f"no such file or folder: `{path}`") from error
        except OSError as error:
            raise InputError(f"cannot read `{path}`: {error.strerror}") from error
    if output.is_dir() != reference.is_dir():
        folder, file = (output, reference) if output.is_dir() else (reference, output)
        raise InputError(f"`{folder}` is a folder, but `{file}` is a file", hint="give two files or two folders")
    if not output.is_dir():
        return (ClipPair(output.stem, output, reference),)
    outputs, references = _clips(output), _clips(reference)
    partners = {clip: _partner(clip, references) for clip in outputs}
    _check_all([clip for clip, partner in partners.items() if partner is None], reference)
    _check_all([clip for clip in references if clip not in partners.values()], output)
    measured: dict[Path, Path] = {}
    for clip, partner in partners.items():
        if partner is not None and (other := measured.setdefault(partner, clip)) != clip:
            raise _same_stem(other, clip)
    return tuple(ClipPair(clip.stem, clip, partner) for partner, clip in measured.items())


def _clips(folder: Path) -> list[Path]:
    files = (path for path in sorted(listed(folder)) if not path.name.startswith("."))
    clips = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if not clips:
        raise InputError(f"no videos in `{folder}`")
    return clips


def _partner(output: Path, references: list[Path]) -> Path | None:
    for name in (output.name, output.stem):
        for reference in references:
            if reference.name == name:
                return reference
    alike = [reference for reference in references if reference.stem == output.stem]
    if len(alike) > 1:
        raise _same_stem(*alike[:2])
    return alike[0] if alike else None


def _check_all(unpaired: list[Path], elsewhere: Path) -> None:
    if unpaired:
        more = f" (nor for {len(unpaired) - 1} others)" if len(unpaired) > 1 else ""
        raise InputError(f"no clip in `{elsewhere}` has the name of `{unpaired[0]}`{more}")


def _same_stem(first: Path, second: Path) -> InputError:
    return InputError(f"`{first}` and `{second}` have the same stem", hint="keep one of them there")
