"""Every combination of options that a normalization has: one list, for the tests and for the documentation.

Printed as a table by ``python tests/matrix.py``, which is docs/combinations.md.
"""

from itertools import product
from pathlib import Path
from typing import NamedTuple

AXES = {
    "counts": ("all", "mask", "weights", "lengths"),
    "padding": ("zero", "keep", "normalize"),
    "shares": (
        "batch",
        "segments",
        "ghosts",
        "instances",
        "groups",
        "strided groups",
        "lines",
        "lines about 0",
        "graphs",
    ),
    "statistics": ("batch", "renorm", "given"),
    "follows": ("nothing", "residual", "relu", "residual and relu"),
    "kept": ("x", "y", "y in place"),
}
VERBS = ("forward", "backward", "jvp", "double_backward", "halves", "update_running")

# How each is written.
WRITTEN = {
    ("counts", "all"): "nothing",
    ("counts", "mask"): "`mask=`",
    ("counts", "weights"): "`weights=`",
    ("counts", "lengths"): "`lengths=`",
    ("padding", "zero"): '`padding="zero"`',
    ("padding", "keep"): '`padding="keep"`',
    ("padding", "normalize"): '`padding="normalize"`',
    ("shares", "batch"): "nothing",
    ("shares", "segments"): "`segments=`",
    ("shares", "ghosts"): "`ghost_size=`",
    ("shares", "instances"): "`instance_norm`",
    ("shares", "groups"): "`group_norm`",
    ("shares", "strided groups"): '`group_norm(grouping="strided")`',
    ("shares", "lines"): "`layer_norm`",
    ("shares", "lines about 0"): "`rms_norm`",
    ("shares", "graphs"): "`graph_norm`",
    ("statistics", "batch"): "`batch_norm`",
    ("statistics", "renorm"): "`renorm=`",
    ("statistics", "given"): "`normalize`",
    ("follows", "nothing"): "nothing",
    ("follows", "residual"): "`residual=`",
    ("follows", "relu"): '`activation="relu"`',
    ("follows", "residual and relu"): "both",
    ("kept", "x"): '`keep="x"`',
    ("kept", "y"): '`keep="y"`',
    ("kept", "y in place"): '`keep="y", out=x`',
}


class Case(NamedTuple):
    """One combination: what counts, what y is elsewhere, what shares statistics, whose they are, what follows, what is kept."""

    counts: str
    padding: str
    shares: str
    statistics: str
    follows: str
    kept: str

    @property
    def id(self):
        return "-".join(word.replace(" ", "_") for word in self)


LINES = ("lines", "lines about 0")
GROUPS = ("groups", "strided groups")
OF_SAMPLES = ("instances", "graphs", *GROUPS, *LINES)  # which know no batch
TOGETHER = (*GROUPS, *LINES)  # channels that share statistics

# What has no meaning, and why: in one sentence each.
REFUSED = (
    (
        lambda c: c.counts == "all" and c.padding != "normalize",
        "padding: without a mask, weights or lengths nothing is padding",
    ),
    (
        lambda c: c.statistics == "given" and c.shares != "batch",
        "`normalize` with segments, ghosts or what has statistics of its own: they are given, one for each channel",
    ),
    (
        lambda c: c.statistics == "renorm" and c.shares in OF_SAMPLES,
        "`renorm=` of `instance_norm`, `group_norm`, `layer_norm`, `rms_norm` and `graph_norm`, which have no running statistics",
    ),
    (
        lambda c: c.kept != "x" and c.follows != "nothing",
        '`keep="y"` with a residual or ReLU: y does not tell what was normalized',
    ),
    (
        lambda c: c.kept != "x" and c.shares in (*TOGETHER, "graphs"),
        '`keep="y"` of `group_norm`, `layer_norm`, `rms_norm` and `graph_norm`: y does not tell what was taken away',
    ),
)
REFUSED_VERBS = (
    (
        lambda c, verb: c.statistics == "given" and verb in ("halves", "update_running"),
        "halves and `update_running` after `normalize`: no statistics were taken of the batch",
    ),
    (
        lambda c, verb: c.shares in TOGETHER and verb == "update_running",
        "`update_running` after `group_norm`, `layer_norm` and `rms_norm`: running statistics are those of channels",
    ),
)


def refusal(case, verb="forward"):
    """Give why a combination has no meaning; None where it has one."""
    for is_refused, text in REFUSED:
        if is_refused(case):
            return text
    return next((text for is_refused, text in REFUSED_VERBS if is_refused(case, verb)), None)


CASES = [case for case in (Case(*words) for words in product(*AXES.values())) if refusal(case) is None]
OF_LAYER = [case for case in CASES if case.shares not in (*TOGETHER, "graphs")]  # which no BatchNorm has
COMBINATIONS = [(case, verb) for case in CASES for verb in VERBS if refusal(case, verb) is None]


def table():
    """Give the documentation: the axes, what any two of their words give, and what is refused."""
    reasons = [text for _, text in REFUSED + REFUSED_VERBS]
    lines = [
        "# Combinations",
        "",
        "Any word of one row goes with any words of the others, and means the composition of its steps: s = batch_norm(x) +",
        "residual; where a position counts y = relu(s), elsewhere what `padding` says. Each combination and each verb is",
        f"tested against that composition: {len(CASES)} forward calls, {len(COMBINATIONS)} combinations with what follows",
        "them (`backward`, `jvp`, `double_backward`, the halves, `update_running`). A `BatchNorm` that is told the same gives",
        "the same bits of y, of its gradients and of its running statistics, in each of the forward calls but `group_norm`,",
        "`layer_norm`, `rms_norm` (for both of which weights are a mask) and `graph_norm`.",
        "",
        "| | |",
        "|---|---|",
    ]
    titles = {
        "counts": "what counts",
        "padding": "what y is elsewhere",
        "shares": "what shares statistics",
        "statistics": "whose statistics",
        "follows": "what follows",
        "kept": "what is kept",
    }
    lines += [
        f"| {titles[axis]} | {' · '.join(WRITTEN[axis, word] for word in words)} |" for axis, words in AXES.items()
    ]
    lines += ["", "Refused, since it has no meaning:", ""]
    lines += [f"- {text}" for text in reasons]
    return "\n".join(lines) + "\n"


PAGE = Path(__file__).parents[1] / "docs" / "combinations.md"

if __name__ == "__main__":
    PAGE.write_text(table())
