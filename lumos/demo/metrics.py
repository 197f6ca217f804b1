"""Counts of what the server does, in the text format of Prometheus (version 0.0.4).

The format is written here instead of by the package prometheus_client, because it is a dozen lines
for the three kinds of metrics below, and the service then needs no package that the rest does not.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from lumos.demo.worker import ENDED

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600)  # seconds
METHODS = ("GET", "HEAD", "POST", "DELETE")
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """The metrics of one server. All methods may be called from any thread.

    gauges: functions that return the current value of a gauge, by the name of the metric.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]):
        self._gauges, self._lock = dict(gauges), threading.Lock()
        self._clips: Counter[str] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets: Counter[float] = Counter()
        self._seconds = self._frames = 0.0

    def request(self, method: str, status: int) -> None:
        """Count an answer. Methods that nobody needs count as one, because a client could make up thousands."""
        with self._lock:
            self._requests[method if method in METHODS else "other", status] += 1

    def clip(self, state: str, seconds: float | None = None, frames: int = 0) -> None:
        """Count a clip that has ended; `seconds` is the time that it took if it is done."""
        with self._lock:
            self._clips[state] += 1
            self._frames += frames
            if seconds is not None:
                self._seconds += seconds
                self._buckets.update(bound for bound in BUCKETS if seconds <= bound)

    def text(self) -> str:
        """Return all metrics as Prometheus reads them."""
        with self._lock:
            done = self._clips["done"]
            states = [((("state", state),), self._clips[state]) for state in ENDED]
            requests = [((("method", method), ("status", str(status))), count)
                        for (method, status), count in sorted(self._requests.items())]  # fmt: skip
            buckets = [((("le", str(bound)),), self._buckets[bound]) for bound in BUCKETS]
            seconds, frames = self._seconds, self._frames
        lines = [
            *family("lumos_clips_total", "counter", "clips that have ended, by state", states),
            *family("lumos_frames_total", "counter", "frames of clips that are done", [((), frames)]),
            *family("lumos_clip_seconds", "histogram", "seconds to make a clip, without waiting",
                    [*buckets, ((("le", "+Inf"),), done)], "_bucket"),
            sample("lumos_clip_seconds_sum", (), seconds), sample("lumos_clip_seconds_count", (), done),
            *family("lumos_requests_total", "counter", "answers to HTTP requests", requests),
        ]  # fmt: skip
        for name, (meaning, value) in self._gauges.items():
            lines += family(name, "gauge", meaning, [((), value())])
        return "\n".join(lines) + "\n"


def family(name: str, kind: str, meaning: str, samples: Iterable[tuple[Labels, float]], suffix: str = "") -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *(sample(name + suffix, *found) for found in samples)]


def sample(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{label}="{text}"' for label, text in labels)
    return f"{name}{{{inside}}} {value:.15g}" if labels else f"{name} {value:.15g}"
