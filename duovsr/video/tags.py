"""What files say about themselves and their streams, and how much of it a container holds."""

from __future__ import annotations

import io
from collections.abc import Mapping

import av
from av.container import OutputContainer
from av.stream import Disposition

# Keys that describe the source file itself and would be false, or noise, in the output.
_FILE_KEYS = {"encoder", "major_brand", "minor_version", "compatible_brands"}
_FILE_KEYS |= {"software", "com.android.version"}  # of AVI and of cameras
_STREAM_KEYS = {"encoder", "rotate", "duration", "bps", "number_of_frames", "number_of_bytes"}
_STREAM_KEYS |= {"_statistics_tags", "_statistics_writing_app", "_statistics_writing_date_utc"}
# Apple's cameras say what other files say too, but under names that mp4's and mov's muxers do not write.
_APPLE = "com.apple.quicktime."
_APPLE_NAMES = {"location.iso6709": "location", "creationdate": "date"}
# Of a stream, beside `default`, which all hold.
_MARKS = {
    "comment": Disposition.comment,
    "forced": Disposition.forced,
    "hearing_impaired": Disposition.hearing_impaired,
    "visual_impaired": Disposition.visual_impaired,
    "dub": Disposition.dub,
    "original": Disposition.original,
}
_MARKS_HELD = {"matroska": set(_MARKS), "webm": {"forced"}, "mp4": set(_MARKS) - {"original"}, "mov": set[str]()}


def file_tags(metadata: Mapping[str, str], format_name: str) -> dict[str, str]:
    """What the source says of its content, in the names of the target's format."""
    tags = dict(metadata)
    if format_name in ("mp4", "mov"):
        for key in [key for key in tags if key.lower().startswith(_APPLE)]:
            name = key.lower().removeprefix(_APPLE)
            tags.setdefault(_APPLE_NAMES.get(name, name), tags.pop(key))
    return {key: value for key, value in tags.items() if _plain(key) not in _FILE_KEYS}


def stream_tags(metadata: Mapping[str, str], *, changed: bool) -> dict[str, str]:
    """What is still true of a stream whose packets are, or are not, `changed`."""
    keys = _STREAM_KEYS if changed else {"encoder"}
    return {key: value for key, value in metadata.items() if _plain(key) not in keys}


def tags_not_held(target: OutputContainer) -> list[str]:
    """The keys of the target's metadata that will not be in it: asked of the muxer, with a file in memory."""
    if target.format.name not in ("mp4", "mov"):
        return []
    tags = {key: value for key, value in target.metadata.items() if key.lower() != "timecode"}  # a track of its own
    file, options = io.BytesIO(), target.container_options
    with av.open(file, "w", target.format.name, container_options=options, metadata_errors="surrogateescape") as trial:
        trial.metadata.update(tags)
        stream = trial.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        trial.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        trial.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r", metadata_errors="surrogateescape") as written:
        held = {_plain(key) for key in written.metadata}
    return sorted(key for key in tags if _plain(key) not in held)


def marks_not_held(disposition: Disposition, format_name: str) -> list[str]:
    """The marks of a stream that the format has no place for."""
    return [name for name, mark in _MARKS.items() if mark & disposition and name not in _MARKS_HELD[format_name]]


def _plain(key: str) -> str:
    """Without the language that FFmpeg appends."""
    return key.lower().split("-")[0]
