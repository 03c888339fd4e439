# SPDX-License-Identifier: Apache-2.0
"""Write and read one sealed file: a header, then a stream of authenticated segments.

The reader checks, in this order (docs/sealed-format.md has the reasons):
    1. the header parses;  2. the key's URI is the header's;  3. the commitment fits the key;
    4. the stream's length is one that a writer makes;  5. the last segment authenticates: nothing was cut off,
    appended, or forged as empty;  6. every segment authenticates before a byte of it is handed out.
"""

from __future__ import annotations

import io
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Final

from cloister.atomicfile import AtomicFile, file_error
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.format import DATA_SEGMENT_SIZE, MAGIC, AssociatedData, Header, invalid
from cloister.sealed.segments import (
    MAX_SEGMENTS,
    NONCE_PREFIX_SIZE,
    SALT_SIZE,
    STREAM_HEADER_SIZE,
    TAG_SIZE,
    Layout,
    SegmentRejected,
    StreamCipher,
)
from cloister.secret import SecretBytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

# Ciphertext goes to and comes from the file in pieces of about this size, whatever the segment size.
_BATCH_SIZE: Final = 1024 * 1024
_FILE_MODE: Final = 0o644  # ciphertext, on storage that others may read


def is_sealed(path: Path) -> bool:
    """Say whether a file begins like a sealed file; whether it is one takes the key."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise file_error(error, what=f"cannot read {path}") from error


def _bytes_of(buffer: ReadableBuffer) -> memoryview:
    view = memoryview(buffer)
    # An empty view cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def _batch(segment_size: int) -> int:
    return max(1, _BATCH_SIZE // segment_size) * segment_size


class SealedWriter(io.RawIOBase):
    """A writable binary file whose content is encrypted before it leaves memory.

    With a path the file appears whole when the writer is closed (temporary name, sync, rename); an exception in the
    `with` block, `discard`, or forgetting to close leaves what stood there before. With a file object, closing
    writes the last segment and leaves the file object open. Holds about 1 MiB and one segment.
    """

    def __init__(
        self,
        target: Path | BinaryIO,
        *,
        data_key: DataKey,
        associated: AssociatedData,
        segment_size: int = DATA_SEGMENT_SIZE,
    ) -> None:
        super().__init__()
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
        self._out = memoryview(bytearray(_batch(segment_size)))
        self._out[:STREAM_HEADER_SIZE] = self.stream_header
        self._out_used = STREAM_HEADER_SIZE
        self._failed: CloisterError | None = None
        self._file = AtomicFile(target, mode=_FILE_MODE) if isinstance(target, Path) else None
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

    def write(self, data: ReadableBuffer, /) -> int:
        """Encrypt all of the bytes; raise CloisterError when the file cannot be written."""
        if self.closed:
            raise ValueError("write to a closed sealed file")
        view = _bytes_of(data)
        size = len(view)
        while view:
            room = self._layout.capacity_of(self._index) - self._held
            if not self._held and len(view) > room:
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

    def _seal(self, plain: memoryview, *, last: bool) -> None:
        if self._index >= MAX_SEGMENTS:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"{self.header.associated.path} is too large to be sealed",
                why=f"a sealed file has at most 2^32 segments of {self._layout.segment_size} bytes",
                todo="use a larger segment size, or split the file",
            )
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


class SealedReader(io.RawIOBase):
    """A readable, seekable binary file over a sealed one; hands out authenticated bytes only.

    `data_key` is the key, or a function that gets the DEK for a header (which is not authenticated at that moment).
    Raises CloisterError(SEALED_FILE_INVALID) that names the file, at opening or at the read that meets the damage.
    Holds at most about 1 MiB and one segment. Not for several threads at once.
    """

    def __init__(
        self,
        source: Path | BinaryIO,
        *,
        data_key: DataKey | Callable[[Header], SecretBytes],
        name: str = "",
    ) -> None:
        super().__init__()
        self.name = name or (str(source) if isinstance(source, Path) else str(getattr(source, "name", "the file")))
        self._owned = isinstance(source, Path)
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
        self._sealed = memoryview(bytearray(min(_batch(self._layout.segment_size), self.stream_length)))
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
        view = _bytes_of(buffer)
        view = view[: max(0, self.size - self._position)]
        done = 0
        while done < len(view):
            index, within = self._layout.place_of(self._position)
            whole = 0 if within or index == self._cached else self._whole_segments(index, len(view) - done)
            if whole:
                taken = self._open_into(index, whole, view[done:])
            else:
                self._load(index)
                taken = min(self._length_of(index) - within, len(view) - done)
                view[done : done + taken] = self._plain[within : within + taken]
            done += taken
            self._position += taken
        return done

    def readall(self) -> bytes:
        """Return the rest of the file."""
        rest = bytearray(max(0, self.size - self._position))
        self.readinto(rest)
        return bytes(rest)

    def close(self) -> None:
        """Close; a file object that was passed in stays open."""
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
        before = self._layout.first_capacity + (index - 1) * self._layout.capacity if index else 0
        return self.size - before

    def _whole_segments(self, index: int, room: int) -> int:
        """How many segments from this one on can be decrypted straight into `room` bytes, in one read of the file."""
        count = 0
        limit = len(self._sealed) // self._layout.segment_size
        while index + count < self._segments and count < limit and room >= self._length_of(index + count):
            room -= self._length_of(index + count)
            count += 1
        return count

    def _open_into(self, index: int, count: int, out: memoryview) -> int:
        """Decrypt `count` segments to the front of `out`; return the number of bytes."""
        start = self._layout.start_of(index)
        end = min((index + count) * self._layout.segment_size, self.stream_length)
        sealed = self._sealed[: end - start]
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
            self._open_into(index, 1, self._plain)
            self._cached = index

    def _rejected(self, segment: int) -> str:
        return (
            f"segment {segment} of {self._segments} does not authenticate: the file was cut, extended, changed, "
            "put together from others, or sealed under another key"
        )

    def _read_stream(self, start: int, target: memoryview) -> None:
        """Read ciphertext at an offset of the stream into all of `target`."""
        try:
            self._file.seek(self._stream_start + start)
            while target:
                count = self._file.readinto(target)  # type: ignore[attr-defined]  # BinaryIO does not promise it
                if not count:
                    raise invalid(self.name, "it became shorter while it was read")
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
