"""A folder of videos: which files are meant, what their outputs are called, and one after another with one model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from duovsr.errors import DuovsrError, InputError, Interrupted, NoSpaceError, UsageError
from duovsr.options import PIPE, Progress, UpscaleOptions
from duovsr.video.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_pattern, is_sequence, listed, natural_order
from duovsr.video.output import CONTAINERS, FORMATS, JOB_SUFFIX, disk_errors, is_left_behind

if TYPE_CHECKING:
    from duovsr.engine.files import UpscaleReport
    from duovsr.engine.upscaler import Upscaler

_WRITTEN = (*CONTAINERS, *FORMATS)


@dataclass(frozen=True)
class Selection:
    """Which files of a folder are meant, and what their outputs are called.

    `pattern` is of names, and reaches images too. `suffix` comes after the name, and may bring a container: `_x4.mkv`.
    """

    recursive: bool = False
    pattern: str | None = None
    suffix: str = ""


@dataclass(frozen=True)
class Item:
    source: Path
    target: Path

    @property
    def is_finished(self) -> bool:
        """A target is whole if it exists: nothing stands under its name before. What a job left beside it has to go."""
        return os.path.isfile(self.target) and not is_left_behind(self.target)


@dataclass(frozen=True)
class Outcome:
    """What became of one file. `report` is there if it is done, `reason`, a line, if it failed."""

    item: Item
    status: Literal["done", "skipped", "failed", "to do"]
    report: UpscaleReport | None = None
    reason: str = ""


def is_batch(source: Path, selection: Selection) -> bool:
    """Whether `source` is a folder of clips; one of images alone is one clip unless `selection` reaches into it."""
    if not os.path.isdir(source):
        return False
    return selection.recursive or selection.pattern is not None or not is_sequence(source)


def find_items(source: Path, destination: Path, selection: Selection) -> list[Item]:
    """The files of the folder `source`, in natural order (2 before 10), and their places in the folder `destination`.

    Hidden files, job folders and what is in `destination` are left out, and links to folders that are in either; other
    links are followed, to each folder once. A folder below `source` that cannot be read is an item, which fails. Raises
    `UsageError`, or `InputError` if there is nothing. Touches nothing.
    """
    _check_folders(source, destination)
    if Path(f"x{selection.suffix}").name != f"x{selection.suffix}":
        raise UsageError(f"unsupported suffix: `{selection.suffix}`", hint="use an ending of a name, such as _x4.mkv")
    if is_pattern(destination / f"x{selection.suffix}"):  # of one clip's images, which nobody would find again
        raise UsageError(f"unsupported suffix: `{selection.suffix}`", hint="a folder's clips become a file each")
    items = []
    for path in _clips(source, selection, _Folders(source, destination)):
        place = destination / path.relative_to(source)
        name = path.name if os.path.isdir(path) else output_name(path.name, selection.suffix)
        items.append(Item(path, place.with_name(name)))
    if not items:
        wanted = "videos" if selection.pattern is None else f"videos or images named `{selection.pattern}`"
        hint = None if selection.recursive else "use --recursive to look into its folders, too"
        raise InputError(f"no {wanted} in `{source}`", hint=hint)
    _check_targets(items)
    return items


def output_name(name: str, suffix: str) -> str:
    """What the output of the input `name` is called, whatever lies beside it: `a.mp4` stays, `a.avi` is `a.avi.mkv`.

    The input's container is kept where duovsr writes it. Where it changes, the whole name is kept: the outputs of
    `a.avi` and `a.mkv` are two.
    """
    stem, dot, container = name.rpartition(".")
    container = dot + container
    if Path(f"x{suffix}").suffix.lower() in _WRITTEN:
        ending = suffix
    elif container.lower() in _WRITTEN:
        ending = suffix + container
    else:
        ending = suffix + (".png" if container.lower() in IMAGE_SUFFIXES else ".mkv")
    return (stem if ending.lower().endswith(container.lower()) else name) + ending


def upscale_items(
    upscaler: Upscaler,
    items: Sequence[Item],
    options: UpscaleOptions,
    on_progress: Callable[[Item, Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """Upscale one file after another; each is reported with 0 frames when it begins, and yielded when it ends.

    What fails does not stop the rest, but for a full disk (`NoSpaceError`), which all others would meet, and
    `should_stop` (`Interrupted`). The unfinished are gone on with by the same call.
    """
    for item in items:
        if should_stop():
            raise Interrupted(f"interrupted before `{item.source}`")
        report_progress = None if on_progress is None else partial(on_progress, item)
        if report_progress is not None:
            report_progress(Progress(0, None))
        try:
            if os.path.isdir(item.source):
                listed(item.source)
            if is_pattern(item.target):  # it would become the images of other items
                message = f"the output's name is a pattern for many images: `{item.target}`"
                raise UsageError(message, hint="rename the input")
            with disk_errors(item.target):
                item.target.parent.mkdir(parents=True, exist_ok=True)
            report = upscaler.upscale_file(item.source, item.target, options, report_progress, should_stop)
        except (NoSpaceError, Interrupted):
            raise
        except DuovsrError as error:
            yield Outcome(item, "failed", reason=f"{error} ({error.hint})" if error.hint else str(error))
        except Exception as error:  # noqa: BLE001 - a bug that one file shows must not cost the others
            yield Outcome(item, "failed", reason=f"a bug: {type(error).__name__}: {error}".splitlines()[0])
        else:
            yield Outcome(item, "done", report)


def _check_folders(source: Path, destination: Path) -> None:
    is_file = os.path.lexists(destination) or destination == PIPE or destination.suffix.lower() in _WRITTEN
    if is_file and not os.path.isdir(destination):
        raise UsageError(f"the target of a folder is a folder, not `{destination}`", hint="name a folder")
    if not os.path.isdir(destination.parent):
        raise UsageError(f"no such folder: `{destination.parent}`", hint="create it first")
    if os.path.isdir(destination) and destination.samefile(source):
        raise UsageError(f"the target folder is the source folder: `{source}`", hint="name another folder")


class _Folders:
    """Which folders below `source` are looked into, by the places that links lead to: some go round in a circle."""

    def __init__(self, source: Path, destination: Path) -> None:
        self._roots = [Path(os.path.realpath(root)) for root in (source, destination)]
        self._seen = set(self._roots)

    def is_new(self, folder: Path) -> bool:
        """Whether to look into it: once each, and what is in the source is found without links."""
        place = Path(os.path.realpath(folder))
        if place in self._seen or (folder.is_symlink() and any(map(place.is_relative_to, self._roots))):
            return False
        self._seen.add(place)
        return True


def _clips(folder: Path, selection: Selection, folders: _Folders, *, is_below: bool = False) -> Iterator[Path]:
    suffixes = VIDEO_SUFFIXES if selection.pattern is None else VIDEO_SUFFIXES | IMAGE_SUFFIXES
    try:
        paths = sorted(listed(folder), key=natural_order)
    except InputError:
        if not is_below:
            raise
        yield folder
        return
    for path in paths:
        if path.name.startswith(".") or path.name.endswith(JOB_SUFFIX):
            continue
        if os.path.isdir(path):
            if selection.recursive and folders.is_new(path):
                yield from _clips(path, selection, folders, is_below=True)
        elif path.suffix.lower() in suffixes and (selection.pattern is None or fnmatch(path.name, selection.pattern)):
            yield path


def _check_targets(items: Sequence[Item]) -> None:
    sources = {os.path.realpath(item.source) for item in items}
    taken: dict[str, Item] = {}
    for item in items:
        if os.path.realpath(item.target) in sources:
            raise UsageError(f"the target of `{item.source}` is an input: `{item.target}`", hint="use a --suffix")
        other = taken.setdefault(str(item.target).casefold(), item)  # some file systems know no case
        if other is not item:
            message = f"`{other.source}` and `{item.source}` would both become `{item.target}`"
            raise UsageError(message, hint="rename one of them")
