# SPDX-License-Identifier: Apache-2.0
"""gRPC channel arguments, in one place for both ends: names here are C-core's, values come from Limits."""

from __future__ import annotations

from typing import TypeAlias

from cloister.runtime.limits import Limits

Options: TypeAlias = list[tuple[str, int | str]]


def server_options(limits: Limits) -> Options:
    """Return the arguments of a server."""
    return [
        *_common(limits, limits.server_keepalive_s, limits.server_ping_timeout_s),
        ("grpc.max_receive_message_length", limits.max_request_bytes or limits.max_message_bytes),
        # Without this a second server on the same port starts, and takes half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        ("grpc.max_connection_age_ms", _ms(limits.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _ms(limits.connection_grace_s)),
        # Our clients ping every second; the default would answer that with GOAWAY "too many pings".
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(limits.keepalive_s / 2)),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def channel_options(limits: Limits, target_name: str) -> Options:
    """Return the arguments of a channel to the server whose certificate names `target_name`."""
    return [
        *_common(limits, limits.keepalive_s, limits.ping_timeout_s),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.ssl_target_name_override", target_name),
        ("grpc.default_authority", target_name),
        # A proxy named in the environment would be the operator's, and breaks loopback.
        ("grpc.enable_http_proxy", 0),
        # Subchannels are shared by target otherwise: a rebuilt channel must shake hands with its own certificate.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", _ms(limits.max_reconnect_backoff_s)),
        ("grpc.min_reconnect_backoff_ms", _ms(limits.connect_timeout_s)),  # C-core's name for the connect timeout
        # A call that the server never saw is sent again by gRPC itself; nothing else is ever sent twice.
        ("grpc.enable_retries", 1),
    ]


def _common(limits: Limits, keepalive_s: float, ping_timeout_s: float) -> Options:
    return [
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        # keepalive_timeout alone noticed a black-holed peer after 60 s; with ping_timeout it is the sum of these.
        ("grpc.keepalive_time_ms", _ms(keepalive_s)),
        ("grpc.keepalive_timeout_ms", _ms(ping_timeout_s)),
        ("grpc.http2.ping_timeout_ms", _ms(ping_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
