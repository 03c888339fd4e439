# SPDX-License-Identifier: Apache-2.0
"""Read one sealed file.

The reader checks, in this order (docs/sealed-format.md has the reasons):
    1. the header parses;  2. the key's URI is the header's;  3. the commitment fits the key;
    4. the stream's length is one that a writer makes;  5. the last segment authenticates: nothing was cut off,
    appended, or forged as empty;  6. every segment authenticates before a byte of it is handed out.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cloister.atomicfile import file_error
from cloister.sealed.batches import SHRUNK, SPREAD_SIZE, batch, bytes_of, read_at, write_at
from cloister.sealed.datakey import DataKey
from cloister.sealed.format import MAGIC, Header, invalid
from cloister.sealed.segments import STREAM_HEADER_SIZE, TAG_SIZE, Layout, SegmentRejected, StreamCipher
from cloister.sealed.spread import Job, cores, spread
from cloister.secret import SecretBytes

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def is_sealed(path: Path) -> bool:
    """Say whether a file begins like a sealed file; whether it is one takes the key."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise file_error(error, what=f"cannot read {path}") from error


class SealedReader(io.RawIOBase):
    """A readable, seekable binary file over a sealed one; hands out authenticated bytes only.

    `data_key` is the key, or a function that gets the DEK for a header (which is not authenticated at that moment).
    Raises CloisterError(SEALED_FILE_INVALID) that names the file, at opening or at the read that meets the damage.
    Holds at most about 1 MiB and one segment. Large reads from a path are spread over `workers` threads (0: one for
    each core), of which each holds as much. Not for several threads of the caller's at once.
    """

    def __init__(
        self,
        source: Path | BinaryIO,
        *,
        data_key: DataKey | Callable[[Header], SecretBytes],
        name: str = "",
        workers: int = 0,
        owned: bool = False,
    ) -> None:
        """`owned`: a file object that is passed in is closed with the reader, as a path's file always is."""
        super().__init__()
        self._workers = workers or cores()
        self.name = name or (str(source) if isinstance(source, Path) else str(getattr(source, "name", "the file")))
        self._at_path = isinstance(source, Path)
        self._owned = owned or self._at_path
        try:
            self._file: BinaryIO = _open_regular(source, name=self.name) if isinstance(source, Path) else source
            self._open(data_key)
        except OSError as error:
            self.close()
            raise file_error(error, what=f"cannot read {self.name}") from error
        except BaseException:
            self.close()
            raise

    def _open(self, data_key: DataKey | Callable[[Header], SecretBytes]) -> None:
        start = self._file.tell()
        self.header = Header.read(self._file, name=self.name)
        if isinstance(data_key, DataKey):
            if data_key.key_uri != self.header.key_uri:
                raise invalid(self.name, f"it is sealed under {self.header.key_uri}, not under {data_key.key_uri}")
            secret = data_key.secret
        else:
            secret = data_key(self.header)
        self.header.verify(secret, name=self.name)
        self._stream_start = start + self.header.size
        self.stream_length = self._file.seek(0, os.SEEK_END) - self._stream_start
        self._layout = Layout(self.header.segment_size)
        try:
            self._segments = self._layout.segments(self.stream_length)
            self.size = self._layout.plaintext_length(self.stream_length)  # bytes of plaintext
            header = bytearray(STREAM_HEADER_SIZE)
            self._read_stream(0, memoryview(header))
            self.stream_header = bytes(header)
            self._cipher = StreamCipher(secret, stream_header=self.stream_header, binding=self.header.binding)
        except ValueError as error:
            raise invalid(self.name, f"it is cut or damaged: {error}") from None
        self._position = 0
        self._batch = batch(self._layout.segment_size) // self._layout.segment_size  # segments
        self._sealed = memoryview(bytearray(min(batch(self._layout.segment_size), self.stream_length)))
        self._plain = memoryview(bytearray(min(self._layout.capacity, self.size)))
        self._cached = -1  # index of the segment in _plain
        self._load(self._segments - 1)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to a plaintext offset; behind the end is allowed, and reads nothing."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}.get(whence)
        if base is None or base + offset < 0:
            raise ValueError("a seek goes to a position from 0, relative to start, position or end")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer, or what of it the file's rest fills; return the number of bytes."""
        if self.closed:
            raise ValueError("read of a closed sealed file")
        view = bytes_of(buffer)
        view = view[: max(0, self.size - self._position)]
        done = 0
        while done < len(view):
            index, within = self._layout.place_of(self._position)
            whole = 0 if within or index == self._cached else self._whole_segments(index, len(view) - done)
            if whole * self._layout.segment_size >= SPREAD_SIZE and self._at_path and self._workers > 1:
                taken = self._open_spread(index, whole, view[done:])
            elif whole:
                taken = self._open_into(index, min(whole, self._batch), view[done:], self._sealed)
            else:
                self._load(index)
                taken = min(self._length_of(index) - within, len(view) - done)
                view[done : done + taken] = self._plain[within : within + taken]
            done += taken
            self._position += taken
        return done

    def copy_to(self, descriptor: int, *, progress: Callable[[int], None] | None = None) -> None:
        """Write the whole content to an open file from its beginning on, with several threads when it is large.

        `progress` is called with the number of bytes done since the last call, from any thread; what it raises ends
        the work. Raises CloisterError: SEALED_FILE_INVALID, or IO_FAILED and DISK_FULL for the target.
        """

        def worker() -> Job:
            plain = memoryview(bytearray(self._batch * self._layout.capacity))
            sealed = memoryview(bytearray(self._batch * self._layout.segment_size))

            def job(number: int) -> None:
                first = number * self._batch
                count = min(self._batch, self._segments - first)
                size = self._open_into(first, count, plain, sealed)
                write_at(descriptor, self._layout.offset_of(first), plain[:size], name=self.name)
                if progress:
                    progress(size)

            return job

        workers = self._workers if self._at_path else 1
        spread(-(-self._segments // self._batch), worker, workers=workers)

    def readall(self) -> bytes:
        """Return the rest of the file."""
        rest = bytearray(max(0, self.size - self._position))
        self.readinto(rest)
        return bytes(rest)

    def close(self) -> None:
        """Close; a file object that was passed in stays open, unless it was passed to be owned."""
        if not self.closed:
            super().close()
            if hasattr(self, "_plain"):
                self._plain[:] = bytes(len(self._plain))
            if self._owned and hasattr(self, "_file"):
                self._file.close()

    def _length_of(self, index: int) -> int:
        """Plaintext bytes of a segment."""
        if index < self._segments - 1:
            return self._layout.capacity_of(index)
        return self.size - self._layout.offset_of(index)

    def _whole_segments(self, index: int, room: int) -> int:
        """How many segments from this one on fit whole into `room` bytes."""
        end = self._layout.offset_of(index) + room
        if end >= self.size:
            return self._segments - index
        return self._layout.place_of(end)[0] - index

    def _open_spread(self, index: int, count: int, out: memoryview) -> int:
        """Decrypt `count` segments to the front of `out` with several threads; return the number of bytes."""
        base = self._layout.offset_of(index)

        def worker() -> Job:
            sealed = memoryview(bytearray(self._batch * self._layout.segment_size))

            def job(number: int) -> None:
                first = index + number * self._batch
                many = min(self._batch, index + count - first)
                self._open_into(first, many, out[self._layout.offset_of(first) - base :], sealed)

            return job

        spread(-(-count // self._batch), worker, workers=self._workers)
        return self._layout.offset_of(index + count - 1) + self._length_of(index + count - 1) - base

    def _open_into(self, index: int, count: int, out: memoryview, sealed: memoryview) -> int:
        """Decrypt `count` segments to the front of `out`, by way of `sealed`; return the number of bytes."""
        start = self._layout.start_of(index)
        end = min((index + count) * self._layout.segment_size, self.stream_length)
        sealed = sealed[: end - start]
        self._read_stream(start, sealed)
        done = offset = 0
        for segment in range(index, index + count):
            size = self._length_of(segment)
            target = out[done : done + size]
            try:
                self._cipher.open(
                    segment, sealed[offset : offset + size + TAG_SIZE], target, last=segment == self._segments - 1
                )
            except SegmentRejected:
                raise invalid(self.name, self._rejected(segment)) from None
            done += size
            offset += size + TAG_SIZE
        return done

    def _load(self, index: int) -> None:
        if index != self._cached:
            self._cached = -1
            self._open_into(index, 1, self._plain, self._sealed)
            self._cached = index

    def _rejected(self, segment: int) -> str:
        return (
            f"segment {segment} of {self._segments} does not authenticate: the file was cut, extended, changed, "
            "put together from others, or sealed under another key"
        )

    def _read_stream(self, start: int, target: memoryview) -> None:
        """Read ciphertext at an offset of the stream into all of `target`."""
        if self._at_path:
            # Without a position, so that several threads can.
            read_at(self._file.fileno(), self._stream_start + start, target, name=self.name)
            return
        try:
            self._file.seek(self._stream_start + start)
            while target:
                count = self._file.readinto(target)  # type: ignore[attr-defined]  # BinaryIO does not promise it
                # A raw non-blocking file says None: it has nothing at this moment.
                if not count:
                    raise invalid(self.name, SHRUNK)
                target = target[count:]
        except OSError as error:
            raise file_error(error, what=f"cannot read {self.name}") from error


def _open_regular(path: Path, *, name: str) -> BinaryIO:
    # Not a name that blocks or acts when it is opened, such as a pipe that someone put there.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise invalid(name, "it is not a regular file")
    return io.FileIO(descriptor, "rb")
