# SPDX-License-Identifier: Apache-2.0
"""Limits on everything a process receives or waits for, with units and reasons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one server or channel. A service that needs another value says so where it builds its server."""

    # The largest message of the wire is evidence: a 64 KiB quote and a 1 MiB event log. A message is decoded before
    # the caller table is consulted (gRPC Python offers no earlier place), so a bigger default would be a gift.
    max_message_bytes: int = 4 * 1024 * 1024
    # What a server takes in, where that is less than what it may answer with; None: the same.
    max_request_bytes: int | None = None
    # Default of gRPC's soft limit; rich errors and request ids fit many times over.
    max_metadata_bytes: int = 16 * 1024
    # Beyond this the server answers RESOURCE_EXHAUSTED at once instead of queueing without end.
    max_concurrent_rpcs: int = 256
    # Streams that one connection may hold open.
    max_streams_per_connection: int = 128

    # A unary call of ours without a deadline would hang with its peer.
    default_deadline_s: float = 30.0
    # What a server grants a unary call at most, whatever the caller asked for (long polls included).
    max_unary_s: float = 600.0
    # What a server grants a stream at most. Watchers resume; the caller was authenticated when it began.
    max_stream_s: float = 12 * 3600.0

    # A dead peer is noticed after keepalive + ping timeout. Both are needed: keepalive_timeout alone took 60 s.
    keepalive_s: float = 1.0
    ping_timeout_s: float = 1.8
    # The same from the server's side, with patience: clients in other languages answer pings on the thread that also
    # does their work, and a client that is gone costs no more than its streams.
    server_keepalive_s: float = 5.0
    server_ping_timeout_s: float = 10.0

    # Below the life of a certificate (an hour at most), so that a connection is authenticated anew in time.
    max_connection_age_s: float = 900.0
    # After that age a connection takes no new call, and what is in flight may end within this time.
    connection_grace_s: float = 12 * 3600.0

    # A reconnect is tried this often at least: peers restart, and users watch.
    max_reconnect_backoff_s: float = 2.0
    # Connecting and shaking hands takes longer than this only on a broken path.
    connect_timeout_s: float = 5.0
