"""Repeated measurements of ours and of the floor, and the table that compares them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

MB = 2**20


@dataclass
class Row:
    """One comparison. Seconds, bytes where `unit` is `MB`, or plain numbers where it is empty."""

    what: str
    ours: list[float]
    floor: list[float]
    target: str = ""
    unit: str = "s"

    def cells(self) -> list[str]:
        ours, floor = median(self.ours), median(self.floor)
        ratio = f"{ours / floor:.2f}" if floor else "–"
        times = str(len(self.ours))
        return [self.what, ratio, self.target or "–", self._shown(ours), self._shown(floor), times]

    def _shown(self, value: float) -> str:
        if self.unit == "MB":
            return f"{value / MB:.1f} MB"
        if self.unit == "s":
            return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
        return f"{value:g}"


HEAD = ["What", "Ratio", "Target", "Ours", "Floor", "Repeated"]


def markdown(rows: Iterable[Row]) -> str:
    lines = [HEAD, ["---", *["--:"] * (len(HEAD) - 1)], *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def in_turn(times: int, *measured: Callable[[], object]) -> list[list[float]]:
    """Measure each that often, one after the other, so that all meet the same weather; the first changes every round.

    One that returns a float has measured by itself; the time of the others is taken.
    """
    found: list[list[float]] = [[] for _ in measured]
    for turn in range(times):
        for place in range(len(measured)):
            which = (turn + place) % len(measured)
            begun = time.perf_counter()
            told = measured[which]()
            found[which].append(told if isinstance(told, float) else time.perf_counter() - begun)
    return found
