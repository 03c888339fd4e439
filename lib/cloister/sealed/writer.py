# SPDX-License-Identifier: Apache-2.0
"""Write one sealed file: a header, then a stream of authenticated segments."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Final

from cloister.atomicfile import AtomicFile, file_error
from cloister.errors import CloisterError, Code
from cloister.sealed.batches import BATCH_SIZE, SPREAD_SIZE, batch, bytes_of, read_at
from cloister.sealed.datakey import DataKey
from cloister.sealed.format import DATA_SEGMENT_SIZE, AssociatedData, Header
from cloister.sealed.segments import (
    MAX_SEGMENTS,
    NONCE_PREFIX_SIZE,
    SALT_SIZE,
    STREAM_HEADER_SIZE,
    TAG_SIZE,
    Layout,
    StreamCipher,
)
from cloister.sealed.spread import Job, cores, spread

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Called once in every thread; returns what gives that thread plaintext by offset and length.
Source = Callable[[], Callable[[int, int], memoryview]]

_FILE_MODE: Final = 0o644  # ciphertext, on storage that others may read


class SealedWriter(io.RawIOBase):
    """A writable binary file whose content is encrypted before it leaves memory.

    With a path the file appears whole when the writer is closed (temporary name, sync, rename); an exception in the
    `with` block, `discard`, or forgetting to close leaves what stood there before. With a file object, closing
    writes the last segment and leaves the file object open. Holds about 1 MiB and one segment; large writes to a path
    are spread over `workers` threads (0: one for each core), of which each holds as much.
    """

    def __init__(
        self,
        target: Path | BinaryIO,
        *,
        data_key: DataKey,
        associated: AssociatedData,
        segment_size: int = DATA_SEGMENT_SIZE,
        workers: int = 0,
        durable_name: bool = True,
    ) -> None:
        """`durable_name`: sync the folder, too, before `close` returns; otherwise the caller does so later."""
        super().__init__()
        self._workers = workers or cores()
        self.header = Header.make(data_key, associated, segment_size=segment_size)
        self.stream_header = (
            bytes([STREAM_HEADER_SIZE]) + secrets.token_bytes(SALT_SIZE) + secrets.token_bytes(NONCE_PREFIX_SIZE)
        )
        self.plaintext_length = 0  # bytes written so far
        self._layout = Layout(segment_size)
        self._cipher = StreamCipher(data_key.secret, stream_header=self.stream_header, binding=self.header.binding)
        self._index = 0
        self._plain = memoryview(bytearray(self._layout.capacity))
        self._held = 0  # plaintext bytes in _plain: the segment that may turn out to be the last
        self._out = memoryview(bytearray(batch(segment_size)))
        self._out[:STREAM_HEADER_SIZE] = self.stream_header
        self._out_used = STREAM_HEADER_SIZE
        self._failed: CloisterError | None = None
        self._file = (
            AtomicFile(target, mode=_FILE_MODE, durable_name=durable_name) if isinstance(target, Path) else None
        )
        self._target: AtomicFile | BinaryIO = target if self._file is None else self._file  # type: ignore[assignment]
        try:
            self._write_out(memoryview(self.header.to_bytes()))
        except BaseException:
            self.discard()
            raise

    @property
    def stream_length(self) -> int:
        """Bytes of the stream for what was written so far, its 40-byte header included."""
        return self._layout.stream_length(self.plaintext_length)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self.plaintext_length

    def write(self, data: ReadableBuffer, /) -> int:
        """Encrypt all of the bytes; raise CloisterError when the file cannot be written."""
        if self.closed:
            raise ValueError("write to a closed sealed file")
        view = bytes_of(data)
        size = len(view)
        while view:
            room = self._layout.capacity_of(self._index) - self._held
            if segments := self._to_spread(len(view)):
                room = segments * self._layout.capacity
                self._seal_spread(segments, _memory_source(view))
            elif not self._held and len(view) > room:
                # More follows, so this segment is not the last: no need to hold a copy of it.
                self._seal(view[:room], last=False)
            elif not room:
                self._seal(self._plain[: self._held], last=False)
                self._held = room = 0
            else:
                room = min(room, len(view))
                self._plain[self._held : self._held + room] = view[:room]
                self._held += room
            view = view[room:]
        self.plaintext_length += size
        return size

    def write_from(self, descriptor: int, length: int, *, progress: Callable[[int], None] | None = None) -> None:
        """Encrypt the first `length` bytes of an open file, with several threads when it is large.

        `progress` is called with the number of bytes done since the last call, from any thread; what it raises ends
        the work. Raises CloisterError: IO_FAILED when the file is shorter.
        """
        buffer, done = memoryview(bytearray(min(BATCH_SIZE, length))), 0
        while done < length:
            if segments := self._to_spread(length - done):
                size = segments * self._layout.capacity
                self._seal_spread(segments, self._file_source(descriptor, done, progress))
                self.plaintext_length += size
            else:
                size = min(length - done, len(buffer))
                if length - done >= SPREAD_SIZE:
                    # Up to the end of a segment: what comes behind it can be spread.
                    size = min(size, self._layout.capacity_of(self._index) - self._held or size)
                self.write(read_at(descriptor, done, buffer[:size], name=self._name))
                if progress:
                    progress(size)
            done += size

    def _file_source(self, descriptor: int, offset: int, progress: Callable[[int], None] | None) -> Source:
        def source() -> Callable[[int, int], memoryview]:
            buffer = memoryview(bytearray(batch(self._layout.segment_size)))

            def read(start: int, length: int) -> memoryview:
                view = read_at(descriptor, offset + start, buffer[:length], name=self._name)
                if progress:
                    progress(length)
                return view

            return read

        return source

    def _to_spread(self, length: int) -> int:
        """Return how many segments of so many bytes to spread over threads: whole ones, none of them the last."""
        if self._workers < 2 or not self._file or length < SPREAD_SIZE:
            return 0
        if self._held == self._layout.capacity_of(self._index):
            self._seal(self._plain[: self._held], last=False)  # more follows
            self._held = 0
        return 0 if self._held or not self._index else (length - 1) // self._layout.capacity

    def _seal_spread(self, segments: int, source: Source) -> None:
        """Seal whole segments; each thread asks its `source` for plaintext by offset and length."""
        self._check_room(segments)
        self._flush_out()
        size, capacity, first = self._layout.segment_size, self._layout.capacity, self._index
        each = batch(size) // size
        file, base = self._file, self.header.size
        if file is None:
            raise ValueError("only files with a path are written by several threads")

        def worker() -> Job:
            read, out = source(), memoryview(bytearray(each * size))

            def job(number: int) -> None:
                start = number * each
                count = min(each, segments - start)
                plain = read(start * capacity, count * capacity)
                for i in range(count):
                    self._cipher.seal(
                        first + start + i,
                        plain[i * capacity : (i + 1) * capacity],
                        out[i * size : (i + 1) * size],
                        last=False,
                    )
                file.write_at(base + (first + start) * size, out[: count * size])

            return job

        try:
            spread(-(-segments // each), worker, workers=self._workers)
        except CloisterError as error:
            self._failed = error
            raise
        self._index += segments
        file.seek(base + self._index * size)

    @property
    def _name(self) -> str:
        return self.header.associated.path

    def _check_room(self, segments: int) -> None:
        if self._index + segments > MAX_SEGMENTS:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"{self._name} is too large to be sealed",
                why=f"a sealed file has at most 2^32 segments of {self._layout.segment_size} bytes",
                todo="use a larger segment size, or split the file",
            )

    def _seal(self, plain: memoryview, *, last: bool) -> None:
        self._check_room(1)
        size = len(plain) + TAG_SIZE
        if self._out_used + size > len(self._out):
            self._flush_out()
        self._cipher.seal(self._index, plain, self._out[self._out_used : self._out_used + size], last=last)
        self._out_used += size
        self._index += 1

    def _flush_out(self) -> None:
        self._write_out(self._out[: self._out_used])
        self._out_used = 0

    def _write_out(self, view: memoryview) -> None:
        # The first failure sticks: callers such as torch hide a failed write and go on, which would leave a gap.
        if self._failed:
            raise self._failed
        try:
            while view:
                written = self._target.write(view)
                # A raw non-blocking file says None; that it did not take the bytes must not be lost.
                if not written:
                    raise BlockingIOError("the file took no bytes")
                view = view[written:]
        except OSError as error:
            self._failed = file_error(error, what=f"cannot write {self.header.associated.path}")
            raise self._failed from error
        except CloisterError as error:
            self._failed = error
            raise

    def raise_failure(self) -> None:
        """Raise what made a write fail, if one did: for callers that met another error because of it."""
        if self._failed:
            raise self._failed

    def close(self) -> None:
        """Seal the last segment and put the file in place; raise CloisterError when that fails."""
        if self.closed:
            return
        try:
            self._seal(self._plain[: self._held], last=True)
            self._flush_out()
            if self._file:
                self._file.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        """Drop what was written; does nothing after `close`."""
        if not self.closed:
            self._plain[:] = bytes(len(self._plain))
            if self._file:
                self._file.discard()
            super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def __del__(self) -> None:
        # io's own would close, and closing means that the content is complete.
        if hasattr(self, "_target"):
            self.discard()


def _memory_source(view: memoryview) -> Source:
    return lambda: lambda start, length: view[start : start + length]
