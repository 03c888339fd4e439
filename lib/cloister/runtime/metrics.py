# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics under the names that gRPC dashboards know, and the plain HTTP port that serves them."""

from __future__ import annotations

import threading
from typing import Any

import prometheus_client

from cloister.runtime.address import bind_error, split_address


class RpcMetrics:
    """Counters and times of RPCs. No label ever comes from a caller: method names are those that are mounted."""

    def __init__(self, registry: prometheus_client.CollectorRegistry | None = None) -> None:
        self.registry = registry or prometheus_client.CollectorRegistry()
        labels = ("grpc_type", "grpc_service", "grpc_method")
        self._started = prometheus_client.Counter(
            "grpc_server_started_total", "RPCs begun on the server.", labels, registry=self.registry
        )
        self._handled = prometheus_client.Counter(
            "grpc_server_handled_total", "RPCs ended on the server.", (*labels, "grpc_code"), registry=self.registry
        )
        self._seconds = prometheus_client.Histogram(
            "grpc_server_handling_seconds", "Time from begin to end of an RPC.", labels, registry=self.registry
        )

        # One lookup of labels for every method and code there is: prometheus_client takes longer for it than to count.
        self._begun: dict[tuple[str, ...], prometheus_client.Counter] = {}
        self._ended: dict[tuple[str, ...], tuple[prometheus_client.Counter, prometheus_client.Histogram]] = {}

    def started(self, kind: str, service: str, method: str) -> None:
        found = self._begun.get((kind, service, method))
        if found is None:
            found = self._begun[kind, service, method] = self._started.labels(kind, service, method)
        found.inc()

    def handled(self, kind: str, service: str, method: str, code: str, seconds: float) -> None:
        """Count the end of an RPC; `code` is the camel-case name dashboards expect ("PermissionDenied")."""
        found = self._ended.get((kind, service, method, code))
        if found is None:
            camel = "OK" if code == "OK" else code.replace("_", " ").title().replace(" ", "")
            counter = self._handled.labels(kind, service, method, camel)
            found = self._ended[kind, service, method, code] = counter, self._seconds.labels(kind, service, method)
        found[0].inc()
        found[1].observe(seconds)


class MetricsServer:
    """HTTP /metrics on a port of its own: no TLS, and nothing in it that a caller sent."""

    def __init__(self, listen: str, registry: prometheus_client.CollectorRegistry) -> None:
        host, port = split_address(listen)
        try:
            server, thread = prometheus_client.start_http_server(port, host, registry)
        except OSError as error:
            raise bind_error(listen, error) from None
        self._server: Any = server
        self._thread: threading.Thread = thread
        self.endpoint = f"{host}:{server.server_port}"

    def close(self) -> None:
        """Stop serving; at once."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
