"""Whole pictures from interlaced ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
from av.filter import Graph

_LEAST_SIDE = 4  # bwdif refuses less


def deinterlaced(pictures: Iterable[av.VideoFrame], time_base: Fraction) -> Iterator[av.VideoFrame]:
    """The pictures, one for one and at their own pts (`time_base` s), those that are marked interlaced through bwdif.

    The first field of each, in the order that the picture tells, stays; the other lines are interpolated in space and
    time. Pictures before the first interlaced one pass untouched, later progressive ones through the filter, which
    leaves them as they are. Two pictures are held.
    """
    graph: Graph | None = None
    form: tuple[int, int, str] | None = None
    for picture in pictures:
        if graph is not None and form != _form(picture):  # a filter takes one size and format
            yield from _finished(graph, None, time_base)
            graph = None
        if graph is None:
            if not picture.interlaced_frame or min(picture.width, picture.height) < _LEAST_SIDE:
                yield picture
                continue
            graph, form = _bwdif(picture, time_base), _form(picture)
        yield from _finished(graph, picture, time_base)
    if graph is not None:
        yield from _finished(graph, None, time_base)


def _form(picture: av.VideoFrame) -> tuple[int, int, str]:
    return picture.width, picture.height, picture.format.name


def _bwdif(picture: av.VideoFrame, time_base: Fraction) -> Graph:
    graph = Graph()
    source = graph.add_buffer(width=picture.width, height=picture.height, format=picture.format, time_base=time_base)
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    return graph


def _finished(graph: Graph, picture: av.VideoFrame | None, time_base: Fraction) -> Iterator[av.VideoFrame]:
    """Hands a picture (None: the end) to the filter and yields what that lets out."""
    graph.vpush(picture)
    while True:
        try:
            done = graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        assert done.pts is not None and done.time_base is not None, "every picture has its pts by now"
        done.pts, done.time_base = int(done.pts * done.time_base / time_base), time_base  # bwdif counts half ticks
        yield done
