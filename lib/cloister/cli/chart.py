# SPDX-License-Identifier: Apache-2.0
"""Line charts as inline SVG: no script, no font, no file; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final
from xml.sax.saxutils import escape, quoteattr

_WIDTH: Final = 640
_HEIGHT: Final = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 16, 34
_MAX_POINTS: Final = 400  # more cannot be told apart at this width

Points = Sequence[tuple[float, float]]


def line_chart(
    points: Points,
    *,
    title: str,
    x_label: str,
    y_format: Callable[[float], str],
    y_from_zero: bool = False,
    markers: bool = False,
) -> str:
    """Return an SVG element with one line; a note instead of a line when there are no points."""
    usable = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not usable:
        return f'<p class="muted">{escape(title)}: no points were recorded.</p>'
    shown = _thinned(usable)
    x_ticks = ticks(0.0, max(x for x, _ in shown), 6)
    low = 0.0 if y_from_zero else min(y for _, y in shown)
    y_ticks = ticks(low, max(y for _, y in shown), 5)
    scale = _Scale(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    first, last = shown[0], shown[-1]
    summary = f"{title}: from {y_format(first[1])} at {first[0]:,.0f} to {y_format(last[1])} at {last[0]:,.0f}"
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label={quoteattr(summary)} class="chart">',
        f"<title>{escape(summary)}</title>",
    ]
    for tick in y_ticks:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(y_format(tick))}</text>'
        )
    for tick in x_ticks:
        x = scale.x(tick)
        label = f"{tick:,.0f}" if tick.is_integer() else f"{tick:,.2f}"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x_label)}</text>'
    )
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in shown)
    parts.append(f'<polyline class="line" points="{path}"/>')
    for x, y in shown if markers else shown[-1:]:
        parts.append(f'<circle class="dot" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.5"/>')
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round values at equal distances that enclose low and high."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


class _Scale:
    """From values to positions in the drawing."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self._x_low, self._y_low = x_low, y_low
        self._x_factor = (_WIDTH - _LEFT - _RIGHT) / (x_high - x_low)
        self._y_factor = (_HEIGHT - _TOP - _BOTTOM) / (y_high - y_low)

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x_low) * self._x_factor

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self._y_low) * self._y_factor


def _thinned(points: Points) -> list[tuple[float, float]]:
    """Return at most `_MAX_POINTS` of the points, the first and the last among them."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stride = (len(points) - 1) / (_MAX_POINTS - 1)
    return [points[round(number * stride)] for number in range(_MAX_POINTS)]
