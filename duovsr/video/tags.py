"""What files say about themselves and their streams, and how much of it a container holds."""

from __future__ import annotations

import io
from collections.abc import Mapping

import av
from av.container import OutputContainer
from av.stream import Disposition, Stream

# Keys that describe the source file itself and would be false, or noise, in the output.
_FILE_KEYS = {"encoder", "major_brand", "minor_version", "compatible_brands"}
_FILE_KEYS |= {"software", "com.android.version"}  # of AVI and of cameras
_STREAM_KEYS = {"encoder", "vendor_id"}
_PACKET_KEYS = {"rotate", "alpha_mode", "duration", "bps", "number_of_frames", "number_of_bytes"}
_PACKET_KEYS |= {"_statistics_tags", "_statistics_writing_app", "_statistics_writing_date_utc"}
_TIMECODE = "timecode"  # mp4 and mov have a track for it, and its metadata is checked where that is made
# Apple's cameras say what other files say too, but under names that mp4's and mov's muxers do not write.
_APPLE = "com.apple.quicktime."
_LOCATION = "location"
_APPLE_NAMES = {"location.iso6709": _LOCATION, "creationdate": "date"}
# Of a stream, beside `default`, which all hold.
_MARKS = (
    "comment forced hearing_impaired visual_impaired dub original captions descriptions clean_effects dependent".split()
)
_MARKS_HELD = {
    "matroska": set(_MARKS) - {"captions", "clean_effects", "dependent"},
    "webm": {"forced", "captions", "descriptions"},
    "mp4": set(_MARKS) - {"original", "clean_effects", "dependent"},
    "mov": set[str](),
}
_IMPLIED = {"captions": "hearing_impaired", "descriptions": "visual_impaired"}  # mp4 has one mark for both of each


def file_tags(metadata: Mapping[str, str], format_name: str) -> dict[str, str]:
    """What the source says of its content, in the names of the target's format."""
    tags = dict(metadata)
    if format_name in ("mp4", "mov"):
        for key in [key for key in tags if key.lower().startswith(_APPLE)]:
            name = key.lower().removeprefix(_APPLE)
            tags.setdefault(_APPLE_NAMES.get(name, name), tags.pop(key))
    return {key: value for key, value in tags.items() if _plain(key) not in _FILE_KEYS}


def stream_tags(metadata: Mapping[str, str], *, changed: bool) -> dict[str, str]:
    """What is still true of a stream whose packets are, or are not, `changed`, in the names that muxers know."""
    keys = _STREAM_KEYS | _PACKET_KEYS if changed else _STREAM_KEYS
    tags = {key: value for key, value in metadata.items() if _plain(key) not in keys}
    if "name" in tags:  # what the demuxer of mp4 and mov calls a title
        tags.setdefault("title", tags.pop("name"))
    if tags.get("language") == "und":  # not known
        del tags["language"]
    return tags


def tags_not_held(target: OutputContainer) -> list[str]:
    """The keys of the target's metadata that will not be in it."""
    return _missing(target.metadata, _reread(target, {})[0])


def is_location_rounded(target: OutputContainer) -> bool:
    """Whether its place on earth will be in the target with fewer digits: mp4 counts 1/65536 of a degree."""
    held = _reread(target, {})[0]
    places = [text for key, text in target.metadata.items() if _plain(key) == _LOCATION]
    return _LOCATION in held and any(place not in held.values() for place in places)


def stream_tags_not_held(target: OutputContainer, stream: Stream) -> list[str]:
    """The keys of the metadata of the target's `stream` that will not be in it; what counts its packets is no loss."""
    held = stream_tags(_reread(target, stream.metadata)[1], changed=False)
    return [key for key in _missing(stream.metadata, held) if _plain(key) not in _PACKET_KEYS]


def _reread(target: OutputContainer, of_stream: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What is left of the target's metadata and of a stream's: asked of the muxer, with a file in memory."""
    if target.format.name not in ("mp4", "mov"):
        return target.metadata, dict(of_stream)
    file, options = io.BytesIO(), target.container_options
    with av.open(file, "w", target.format.name, container_options=options, metadata_errors="surrogateescape") as trial:
        stream = trial.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 16
        for copy, tags in ((trial, target.metadata), (stream, of_stream)):
            copy.metadata.update({key: value for key, value in tags.items() if key.lower() != _TIMECODE})
        trial.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        trial.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r", metadata_errors="surrogateescape") as written:
        return written.metadata, written.streams[0].metadata


def _missing(tags: Mapping[str, str], held: Mapping[str, str]) -> list[str]:
    """A key without a language may be held under one; with a language, its text must be there."""
    known = {_TIMECODE, *map(_plain, held)}
    texts = {(_plain(key), text) for key, text in held.items()}
    return sorted(
        key
        for key, text in tags.items()
        if (_plain(key) not in known if _plain(key) == key.lower() else (_plain(key), text) not in texts)
    )


def marks_not_held(disposition: Disposition, format_name: str) -> list[str]:
    """The marks of a stream that the format has no place for."""
    marks = [name for name in _MARKS if Disposition[name] & disposition]
    return [name for name in marks if name not in _MARKS_HELD[format_name] and _IMPLIED.get(name) not in marks]


def _plain(key: str) -> str:
    """Without the language that FFmpeg appends."""
    return key.lower().split("-")[0]
