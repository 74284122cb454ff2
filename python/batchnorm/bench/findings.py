"""What the rows say: this library over the copy, peers over this library, and where it is slower."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from batchnorm.bench.session import OURS, TENSORS

Row = dict[str, Any]
# Whom a peer is compared with: a call from Python costs microseconds, whoever is called.
IN_PYTHON = "batchnorm in Python"
ONEDNN = "oneDNN"
ONEDNN_SAME = "oneDNN, same layout"


class Place(NamedTuple):
    """One pass of one case in one layout."""

    case: str
    layout: str
    dtype: str
    pass_name: str


class Times:
    """The best time of each library at each place."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.ours: dict[Place, Row] = {}
        self.peers: dict[str, dict[Place, float]] = {}
        for row in rows:
            place = Place(row["case"], row["layout"], row["dtype"], row["pass"])
            if row.get("peer", OURS) == OURS:
                self.ours[place] = row
            else:
                peer = ONEDNN_SAME if row["peer"] == ONEDNN else row["peer"]
                self._note(peer, place, row["seconds"])
        self._best_layouts_of_onednn()

    def _note(self, peer: str, place: Place, seconds: float) -> None:
        times = self.peers.setdefault(peer, {})
        times[place] = min(seconds, times.get(place, math.inf))

    def _best_layouts_of_onednn(self) -> None:
        """Let each of our layouts be compared with the fastest that oneDNN has for the case, its own included."""
        same = self.peers.get(ONEDNN_SAME, {})
        for ours in self.ours:
            theirs = [t for p, t in same.items() if (p.case, p.pass_name) == (ours.case, ours.pass_name)]
            if theirs:
                self._note(ONEDNN, ours, min(theirs))

    def columns(self) -> list[str]:
        """List the peers in the order of the table."""
        names = [name for name in self.peers if name not in (ONEDNN, ONEDNN_SAME, IN_PYTHON)]
        return [name for name in (ONEDNN, ONEDNN_SAME) if name in self.peers] + names

    def over_ours(self, peer: str, place: Place) -> float | None:
        """Give the peer's time over this library's: above 1 this library is faster. None where one is missing."""
        in_cpp = peer in (ONEDNN, ONEDNN_SAME) or IN_PYTHON not in self.peers
        ours = self.ours[place]["seconds"] if in_cpp else self.peers[IN_PYTHON].get(place)
        theirs = self.peers[peer].get(place)
        return theirs / ours if ours and theirs else None


def table(rows: Sequence[Row]) -> list[str]:
    """Make the lines of the table: a line for each pass of each case in each layout."""
    times = Times(rows)
    columns = times.columns()
    lines = [
        f"{'case':34s} {'layout':6s} {'dtype':7s} {'MB':>8s} {'pass':15s} {'us':>10s} {'+-%':>5s} {'x copy':>7s}"
        + "".join(f" {_short(name):>12s}" for name in columns)
    ]
    for place, row in times.ours.items():
        if place.pass_name not in TENSORS:
            continue
        megabytes = row["bytes"] / TENSORS[place.pass_name] / 1e6
        line = f"{place.case:34s} {place.layout:6s} {place.dtype:7s} {megabytes:8.2f} {place.pass_name:15s}"
        line += f" {1e6 * row['seconds']:10.1f} {100 * row['mad'] / row['seconds']:5.1f} {row['ratio']:7.2f}"
        lines.append(line + "".join(f" {_text(times.over_ours(name, place)):>12s}" for name in columns))
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """Make the lines of the geometric means, then name the places where this library is slower than a peer."""
    times = Times(rows)
    lines = [
        "",
        "geometric means: this library over the copy; peers over this library (above 1: it is faster)",
    ]
    for pass_name in TENSORS:
        places = [place for place in times.ours if place.pass_name == pass_name]
        if not places:
            continue
        mean = geometric_mean([times.ours[place]["ratio"] for place in places])
        lines.append(f"  {pass_name:15s} {mean:6.2f} x copy, {len(places)} rows")
        lines += [f"    {line}" for line in _peer_means(times, places)]
    lines += _not_alone(rows)
    slower = list(_slower(times))
    if times.columns():
        lines += ["", f"slower than a peer: {len(slower) or 'nowhere'}", *(f"  {line}" for line in slower)]
    return lines


def _not_alone(rows: Sequence[Row]) -> list[str]:
    """Say how many rows other processes have spoiled."""
    quiet = 0.2  # processors; an idle system's own work stays below
    spoiled = sum(row.get("others", 0) > quiet for row in rows)
    text = f"NOT ALONE: other processes kept processors busy during {spoiled} of {len(rows)} rows; measure again"
    return ["", text] if spoiled else []


def _peer_means(times: Times, places: Sequence[Place]) -> Iterator[str]:
    for peer in times.columns():
        found = [ratio for place in places if (ratio := times.over_ours(peer, place))]
        if found:
            least = f"least {min(found):.2f}"
            yield f"{_long(peer):24s} {geometric_mean(found):6.2f} x ours, {least}, {len(found)} rows"


def _slower(times: Times) -> Iterator[str]:
    """Worst first."""
    found = [
        (ratio, peer, place)
        for peer in times.columns()
        for place in times.ours
        if place.pass_name in TENSORS and (ratio := times.over_ours(peer, place)) and ratio < 1
    ]
    for ratio, peer, place in sorted(found):
        yield f"{ratio:5.2f} {_long(peer):24s} {place.pass_name:15s} {place.layout:4s} {place.case}"


def changes(new: Sequence[Row], old: Sequence[Row]) -> list[str]:
    """Compare this library's rows in two files: ratios to the copy, and the new over the old."""
    news, olds = Times(new).ours, Times(old).ours
    lines = ["", "against the baseline: ratios to the copy, each with its spread"]
    quotients: dict[str, list[float]] = {}
    for place in news:
        if place not in olds or place.pass_name in ("copy", "stream"):
            continue
        n, o = news[place], olds[place]
        quotient = n["ratio"] / o["ratio"]
        quotients.setdefault(place.pass_name, []).append(quotient)
        spread = n["ratio_mad"] / n["ratio"] + o["ratio_mad"] / o["ratio"]
        verdict = "" if abs(quotient - 1) <= 2 * spread else " slower" if quotient > 1 else " faster"
        text = f"{o['ratio']:7.2f} +-{o['ratio_mad']:5.2f}  -> {n['ratio']:7.2f} +-{n['ratio_mad']:5.2f}"
        lines.append(f"{place.case:34s} {place.layout:4s} {place.pass_name:15s} {text}  {quotient:5.2f}{verdict}")
    for pass_name, values in quotients.items():
        lines.append(f"  {pass_name:15s} {geometric_mean(values):5.2f} x the baseline, {len(values)} rows")
    return lines if quotients else [*lines, "  no row in common"]


def geometric_mean(values: Sequence[float]) -> float:
    """Give the root of the product."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _short(peer: str) -> str:
    return _NAMES.get(peer, (peer, peer))[0]


def _long(peer: str) -> str:
    return _NAMES.get(peer, (peer, peer))[1]


_NAMES: Mapping[str, tuple[str, str]] = {
    ONEDNN: ("oneDNN best", "oneDNN, its best layout"),
    ONEDNN_SAME: ("oneDNN same", ONEDNN_SAME),
}


def _text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
