"""What goes on beside the model: frames are decoded ahead and encoded behind, in threads with bounded queues; and a GPU
is given its next work before its last results are fetched."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _End:
    """The last thing in a queue, with the error that ended its thread, if one did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def one_ahead(items: Iterable[Item], ahead: bool) -> Iterator[Item]:
    """Each item once the one after it is there, unless not `ahead`: then as soon as it is itself.

    Where there is none after it because of an error, it comes before the error.
    """
    held: list[Item] = []
    try:
        for item in items:
            held.append(item)
            if len(held) > ahead:
                yield held.pop(0)
    except Exception:
        yield from held
        raise
    yield from held


@contextmanager
def prefetch(items: Iterable[Item], depth: int) -> Iterator[Iterator[Item]]:
    """Iterate `items` in a thread, at most `depth` ahead; its exceptions arrive in order.

    When the context is left, however it is left, the thread has ended and `items` may be closed.
    """
    ahead: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()  # never full: the end always gets through
    room = threading.Semaphore(depth)
    stopped = threading.Event()

    def offer(item: Item) -> bool:
        while not stopped.is_set():
            if room.acquire(timeout=0.1):
                ahead.put(item)
                return True
        return False

    def work() -> None:
        if stopped.is_set():  # Ctrl-C may come while the thread starts: `items` may be closed by now
            return
        try:
            for item in items:
                if not offer(item):
                    return
            ahead.put(_End())
        except BaseException as error:  # noqa: BLE001 - handed over to the consumer, who raises it
            ahead.put(_End(error))

    def received() -> Iterator[Item]:
        while not isinstance(item := ahead.get(), _End):
            room.release()
            yield item
        if item.error is not None:
            raise item.error

    thread = threading.Thread(target=work, name="duovsr-decode", daemon=True)
    try:
        thread.start()
        yield received()
    finally:
        stopped.set()
        if thread.is_alive():
            try:
                thread.join()
            except BaseException:  # Ctrl-C while waiting: see `BackgroundSink`
                thread.join()
                raise


class BackgroundSink(Generic[Item]):
    """Calls `consume` for every item in a thread. `put` blocks while `depth` items wait, and raises what it raised.

    Leaving the `with` block waits for all items; leaving it by an exception drops what waits.
    """

    def __init__(self, consume: Callable[[Item], None], depth: int) -> None:
        self._consume = consume
        self._queue: queue.SimpleQueue[Item | _End] = queue.SimpleQueue()  # never full: the end always gets through
        self._room = threading.Semaphore(depth)
        self._error: BaseException | None = None
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="duovsr-encode", daemon=True)

    def __enter__(self) -> BackgroundSink[Item]:
        self._thread.start()
        return self

    def put(self, item: Item) -> None:
        if self._error is not None:
            raise self._error
        self._room.acquire()
        self._queue.put(item)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._dropped.set()
        try:
            self._queue.put(_End())
            self._thread.join()
        except BaseException:  # Ctrl-C while waiting: the thread must end before the file is closed under it
            self._dropped.set()
            self._thread.join()
            raise
        if error is None and self._error is not None:
            raise self._error

    def _work(self) -> None:
        while not isinstance(item := self._queue.get(), _End):
            self._room.release()
            if self._dropped.is_set() or self._error is not None:
                continue  # keep the queue moving, so that `put` never waits for ever
            try:
                self._consume(item)
            except BaseException as error:  # noqa: BLE001 - raised again by `put` or on leaving
                self._error = error
