"""What a server counts and times, and the little web page on this machine that shows it.

``/metrics`` is for Prometheus, ``/health`` answers 200 with a line of JSON while the server can answer and
503 when it cannot. Labels come from fixed sets: no client can make up new ones.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from policy_server.protocol import ServerTiming
from simplevla.errors import MissingExtraError, UnavailableError

_BUCKETS_S = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)
_STAGES = ("receive", "queue", "preprocess", "inference", "decode", "send")
_REQUEST_S = 5.0

_log = logging.getLogger(__name__)


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self) -> None:
        """Make them, in a registry of their own.

        Raises:
            MissingExtraError: prometheus-client is not installed.
        """
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise MissingExtraError("prometheus-client", "serve") from error
        self.registry = prometheus.CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self._answered = prometheus.Counter("simplevla_answers", "Chunks sent", **own)
        self._refused = prometheus.Counter("simplevla_refusals", "Requests refused", ["code"], **own)
        self._swaps = prometheus.Counter("simplevla_swaps", "Bundles promoted or not", ["result"], **own)
        stages = prometheus.Histogram(
            "simplevla_stage_seconds", "Where an answer's time went", ["stage"], buckets=_BUCKETS_S, **own
        )
        self._stages = [stages.labels(stage) for stage in _STAGES]
        self._total = prometheus.Histogram(
            "simplevla_answer_seconds", "From arrival to the answer", buckets=_BUCKETS_S, **own
        )
        self._batch = prometheus.Histogram(
            "simplevla_batch_size", "Requests answered at once", buckets=(1, 2, 4, 8, 16), **own
        )
        self._waiting = prometheus.Gauge("simplevla_waiting", "Requests that wait", **own)
        self._policy = prometheus.Gauge("simplevla_policy", "The served policy", ["id"], **own)
        self._served = ""

    def answered(self, timing: ServerTiming, send_s: float) -> None:
        """Count a chunk that was sent; ``send_s`` is from its encoding until the system had it."""
        self._answered.inc()
        values = (
            timing.receive_ms,
            timing.queue_ms,
            timing.preprocess_ms,
            timing.inference_ms,
            timing.decode_ms,
            1e3 * send_s,
        )
        for histogram, value in zip(self._stages, values, strict=True):
            histogram.observe(1e-3 * value)
        self._total.observe(1e-3 * sum(values))

    def refused(self, code: str) -> None:
        """Count a refusal; ``code`` is one of our error classes'."""
        self._refused.labels(code).inc()

    def batch(self, size: int, waiting: int) -> None:
        """Count a batch, and note how many still wait."""
        self._batch.observe(size)
        self._waiting.set(waiting)

    def serves(self, policy_id: str) -> None:
        """Note which policy answers now."""
        if self._served:
            self._policy.remove(self._served)
        self._served = policy_id
        self._policy.labels(policy_id).set(1)

    def swap(self, result: str) -> None:
        """Count a hot swap that was ``promoted`` or ``refused``."""
        self._swaps.labels(result).inc()


class MetricsPage:
    """Shows ``/metrics`` and ``/health`` on loopback. A context manager."""

    def __init__(
        self, metrics: Metrics, port: int, health: Callable[[], tuple[bool, dict[str, Any]]]
    ) -> None:
        """Prepare to listen.

        Args:
            metrics: what ``/metrics`` shows.
            port: 0 for a free one.
            health: whether the server can answer, and what else ``/health`` says.
        """
        self._metrics = metrics
        self._port = port
        self._health = health

    def __enter__(self) -> MetricsPage:
        """Listen.

        Raises:
            UnavailableError: the port is in use.
        """
        from prometheus_client import make_wsgi_app

        metrics = make_wsgi_app(self._metrics.registry)

        def page(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            path, method = environ.get("PATH_INFO"), environ.get("REQUEST_METHOD")
            if method not in ("GET", "HEAD") or path not in ("/metrics", "/health"):
                start("404 Not Found", [("Content-Type", "text/plain")])
                return [b"there is /metrics and /health\n"]
            if path == "/metrics":
                return metrics(environ, start)  # type: ignore[no-any-return]
            well, says = self._health()
            status = "200 OK" if well else "503 Service Unavailable"
            start(status, [("Content-Type", "application/json")])
            return [json.dumps(says).encode() + b"\n"]

        try:
            self._server = make_server(
                "127.0.0.1", self._port, page, server_class=_PageServer, handler_class=_PageHandler
            )
        except OSError as error:
            raise UnavailableError(
                f"port {self._port} is in use already", "choose another --metrics-port"
            ) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _PageHandler(WSGIRequestHandler):
    timeout = _REQUEST_S  # whoever opens a connection and says nothing is hung up on

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


class _PageServer(WSGIServer):
    """One request at a time: this page is for one Prometheus and for people."""

    def handle_error(self, *_: Any) -> None:
        _log.debug("a request to the metrics page failed", exc_info=True)

    def server_bind(self) -> None:
        # WSGIServer asks the name service for this machine's name, which may take seconds.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", int(self.server_address[1])
        self.setup_environ()
