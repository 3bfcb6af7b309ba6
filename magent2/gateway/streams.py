"""The open streams of a gateway: how many there are, how they are written, and how all end cleanly at shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, Iterator, Sequence
from types import FrameType
from typing import Any

from magent2.conversations import Frame
from magent2.gateway.problems import Problem

RETRY_MS = 1000
MAX_CHUNK_BYTES = 64 * 1024


class Streams:
    """Counts the open streams and can end them all, each with a clean end of its response."""

    def __init__(self, most: int, max_unsent_bytes: int) -> None:
        self._most = most
        # beside a chunk, the server buffers 64 KiB before it makes us wait
        self._max_chunk_bytes = max(1, min(MAX_CHUNK_BYTES, max_unsent_bytes - MAX_CHUNK_BYTES))
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    def __len__(self) -> int:
        return len(self._tasks)

    def check_room(self) -> None:
        """Raise a 503 `Problem` when no more stream may be opened."""
        if self._closing or len(self._tasks) >= self._most:
            raise Problem(503, "too_many_streams", "this gateway has no room for another stream", Retry_After="5")

    def close(self) -> None:
        """End every stream at its next wait; their readers resume elsewhere."""
        self._closing = True
        for task in self._tasks:
            task.cancel()

    async def write(
        self, batches: AsyncGenerator[Sequence[Frame], None], max_events: int | None
    ) -> AsyncGenerator[bytes, None]:
        """The response's chunks, whole events each: what is pending leaves joined."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream is written by a task")
        self._tasks.add(task)
        left = max_events
        try:
            # said at once, so that the headers and a first byte leave before any event
            yield b"retry: %d\n\n" % RETRY_MS
            async for batch in batches:
                frames = batch if left is None else batch[:left]
                for chunk in join(frames, self._max_chunk_bytes):
                    yield chunk
                if left is not None:
                    left -= len(frames)
                    if left <= 0:
                        return
        except asyncio.CancelledError:
            if not self._closing:
                raise
            task.uncancel()  # ours: the response ends as if the log had
        finally:
            self._tasks.discard(task)
            await batches.aclose()


def join(frames: Sequence[Frame], max_chunk_bytes: int) -> Iterator[bytes]:
    """The frames as SSE, several to a chunk of about this size; a frame without a cursor has no `id:`."""
    parts: list[bytes] = []
    size = 0
    for frame in frames:
        head = b"" if frame.cursor is None else b"id: %s\n" % frame.cursor.encode()
        parts.append(b"%sdata: %s\n\n" % (head, frame.data))
        size += len(parts[-1])
        if size >= max_chunk_bytes:
            yield b"".join(parts)
            parts, size = [], 0
    if parts:
        yield b"".join(parts)


@contextlib.contextmanager
def closed_by_signal(streams: Streams) -> Iterator[None]:
    """End the streams when the process is told to stop, before the server's own handler: it waits for them.

    A server only runs the application's shutdown when all connections are closed, so a stream has to hear of it
    earlier. Outside the main thread there are no signals, and whoever runs the server closes the streams.
    """
    loop = asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}

    def stop(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(streams.close)
        if callable(handler := before[signal.Signals(number)]):
            handler(number, frame)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.getsignal(number)
            signal.signal(number, stop)
    except ValueError:
        before.clear()
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, before[number])
