# SPDX-License-Identifier: Apache-2.0
"""The bodies of quotes: TD reports 1.0, 1.5 and 1.5 extended, and SGX reports. Bytes <-> values, byte for byte.

Layouts: `sgx_report.h`, `sgx_quote_4.h`, `sgx_quote_5.h` of Intel's DCAP; numbers in them are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

SGX_REPORT_SIZE: Final = 384
TD_10_SIZE: Final = 584
TD_15_SIZE: Final = 648
TD_15_EX_SIZE: Final = 885


class _FixedFields:
    """A dataclass of byte strings with fixed sizes, and its packed form."""

    __slots__ = ()
    SIZES: ClassVar[tuple[int, ...]]

    def _require_sizes(self, values: tuple[bytes, ...]) -> None:
        if tuple(map(len, values)) != self.SIZES:
            raise ValueError(f"{type(self).__name__}: fields of {self.SIZES} bytes, not {tuple(map(len, values))}")


@dataclass(frozen=True, slots=True)
class SgxReport(_FixedFields):
    """An SGX report (384 bytes), of a quoting enclave or a quoted one; reserved fields too, because they are signed."""

    SIZES: ClassVar[tuple[int, ...]] = (16, 4, 12, 16, 16, 32, 32, 32, 32, 64, 2, 2, 2, 42, 16, 64)
    _STRUCT: ClassVar[struct.Struct] = struct.Struct("".join(f"{size}s" for size in SIZES))

    cpu_svn: bytes
    misc_select: bytes
    reserved_1: bytes
    isv_ext_prod_id: bytes
    attributes: bytes  # 16: flags u64 (bit 1 is debug), xfrm u64
    mr_enclave: bytes
    reserved_2: bytes
    mr_signer: bytes
    reserved_3: bytes
    config_id: bytes
    isv_prod_id: bytes  # u16
    isv_svn: bytes  # u16
    config_svn: bytes  # u16
    reserved_4: bytes
    isv_family_id: bytes
    report_data: bytes  # 64

    def __post_init__(self) -> None:
        self._require_sizes(self._values())

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read exactly 384 bytes."""
        return cls(*cls._STRUCT.unpack(data))

    def to_bytes(self) -> bytes:
        return b"".join(self._values())

    @property
    def debug(self) -> bool:
        return bool(self.attributes[0] & 0x02)

    def _values(self) -> tuple[bytes, ...]:
        return (
            self.cpu_svn,
            self.misc_select,
            self.reserved_1,
            self.isv_ext_prod_id,
            self.attributes,
            self.mr_enclave,
            self.reserved_2,
            self.mr_signer,
            self.reserved_3,
            self.config_id,
            self.isv_prod_id,
            self.isv_svn,
            self.config_svn,
            self.reserved_4,
            self.isv_family_id,
            self.report_data,
        )


QeReport = SgxReport  # what it is called where it is the quoting enclave's


@dataclass(frozen=True, slots=True)
class TdBody(_FixedFields):
    """What the TDX module says about a TD (TD report 1.0, 584 bytes)."""

    TYPE: ClassVar[int] = 2  # of a version 5 quote
    SIZES: ClassVar[tuple[int, ...]] = (16, 48, 48, 8, 8, 8, 48, 48, 48, 48, 48, 48, 48, 48, 64)
    _STRUCT: ClassVar[struct.Struct] = struct.Struct("".join(f"{size}s" for size in SIZES))

    tee_tcb_svn: bytes  # 16: of the TDX module and SEAM loader at the TD's launch
    mr_seam: bytes  # 48: SHA-384 of the TDX module
    mr_signer_seam: bytes  # 48: zero for a module of Intel
    seam_attributes: bytes  # 8
    td_attributes: bytes  # 8: bit 0 is debug
    xfam: bytes  # 8
    mr_td: bytes  # 48: initial contents of the TD
    mr_config_id: bytes  # 48
    mr_owner: bytes  # 48
    mr_owner_config: bytes  # 48
    rtmrs: tuple[bytes, bytes, bytes, bytes]  # 48 each
    report_data: bytes  # 64

    def __post_init__(self) -> None:
        self._require_sizes(self._values())

    @classmethod
    def parse(cls, data: bytes, offset: int = 0) -> Self:
        """Read the body's bytes at `offset`; the caller has made sure that they are there."""
        v = cls._STRUCT.unpack_from(data, offset)
        values: list[Any] = [*v[:10], v[10:14], *v[14:]]
        return cls(*values)

    def to_bytes(self) -> bytes:
        return b"".join(self._values())

    def _values(self) -> tuple[bytes, ...]:
        return (
            self.tee_tcb_svn,
            self.mr_seam,
            self.mr_signer_seam,
            self.seam_attributes,
            self.td_attributes,
            self.xfam,
            self.mr_td,
            self.mr_config_id,
            self.mr_owner,
            self.mr_owner_config,
            *self.rtmrs,
            self.report_data,
        )


@dataclass(frozen=True, slots=True)
class TdBody15(TdBody):
    """TD report 1.5 (648 bytes): the TDX module can be updated under a running TD."""

    TYPE: ClassVar[int] = 3
    SIZES: ClassVar[tuple[int, ...]] = (*TdBody.SIZES, 16, 48)
    _STRUCT: ClassVar[struct.Struct] = struct.Struct("".join(f"{size}s" for size in SIZES))

    tee_tcb_svn2: bytes  # 16: of the module that runs now
    mr_service_td: bytes  # 48: zero without a service TD

    def _values(self) -> tuple[bytes, ...]:
        return (*TdBody._values(self), self.tee_tcb_svn2, self.mr_service_td)


@dataclass(frozen=True, slots=True)
class TdBody15Ex(TdBody15):
    """TD report 1.5, extended (885 bytes): partitions, devices, and where a migrated TD began."""

    TYPE: ClassVar[int] = 4
    SIZES: ClassVar[tuple[int, ...]] = (*TdBody15.SIZES, 1, 32, 48, 48, 8, 16, 16, 12, 48, 8)
    _STRUCT: ClassVar[struct.Struct] = struct.Struct("".join(f"{size}s" for size in SIZES))

    vm_id: bytes  # u8
    td_id: bytes  # 32
    device_info: bytes  # 48
    initial_service_td_hash: bytes  # 48
    initial_service_td_attributes: bytes  # 8
    initial_cpu_svn: bytes  # 16
    initial_tee_tcb_svn: bytes  # 16
    initial_tee_fmspc: bytes  # 12
    current_service_td_hash: bytes  # 48
    current_service_td_attributes: bytes  # 8

    def _values(self) -> tuple[bytes, ...]:
        return (
            *TdBody15._values(self),
            self.vm_id,
            self.td_id,
            self.device_info,
            self.initial_service_td_hash,
            self.initial_service_td_attributes,
            self.initial_cpu_svn,
            self.initial_tee_tcb_svn,
            self.initial_tee_fmspc,
            self.current_service_td_hash,
            self.current_service_td_attributes,
        )


TD_BODIES: Final[dict[int, tuple[type[TdBody], int]]] = {
    TdBody.TYPE: (TdBody, TD_10_SIZE),
    TdBody15.TYPE: (TdBody15, TD_15_SIZE),
    TdBody15Ex.TYPE: (TdBody15Ex, TD_15_EX_SIZE),
}
SGX_BODY_TYPE: Final = 1
