"""The table of an evaluation in Markdown, from what its report holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def markdown(report: Mapping[str, Any]) -> str:
    """Returns the table of an evaluation as read from its ``report.json``, or made by ``Evaluation.as_dict``."""
    lines = [
        f"{report['images']} images, {threat_words(report['threat'])}.",
        "",
        "| attack | threat | images | accuracy | 95% | undefended | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if row["error"] is None:
            numbers = (
                f"{row['accuracy']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['undefended']:.3f}"
            )
        else:
            numbers = "could not be made | | "
        name = row["attack"] if row["counts"] else f"{row['attack']} (not in the minimum)"
        lines.append(
            f"| {name} | {threat_words(row['threat'])} | {row['images']} | {numbers} | {row['seconds']:.1f} |"
        )
    if report["minimum"] is None:
        headline = "No headline: an attack could not be made."
    else:
        headline = (
            f"**{report['minimum']:.3f}** ({report['low']:.3f} to {report['high']:.3f}) is left when each image "
            "meets the attack that is worst for it."
        )
    lines += ["", headline, ""]
    lines += [f"- {name}: {sentence}." for name, sentence in report["warnings"].items()] or [
        "No check fired."
    ]
    return "\n".join(lines) + "\n"


def threat_words(threat: Mapping[str, Any]) -> str:
    """Returns a threat in words, such as "linf 0.3, straight_through, known"."""
    budget = "without a budget" if threat["epsilon"] is None else f"{threat['norm']} {threat['epsilon']:g}"
    return f"{budget}, {threat['gradient']}, {threat['starts']}"
