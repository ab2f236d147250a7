"""Metrics of several servers as one text."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\]|\\.)*"'
_SAMPLE = re.compile(
    r"(?P<metric>[a-zA-Z_:][a-zA-Z0-9_:]*)[ \t]*"
    rf"(?:(?<=[ \t])|\{{[ \t]*(?P<labels>(?:{_LABEL}(?:[ \t]*,[ \t]*{_LABEL})*)?)[ \t]*,?[ \t]*\}}[ \t]*)"
    r"(?P<rest>(?P<value>[-+.0-9a-zA-Z]+)(?:[ \t]+-?[0-9]+)?)[ \t\r]*"
)
_LABELS = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_HEAD = re.compile(
    r"# (?:(HELP) ([a-zA-Z_:][a-zA-Z0-9_:]*)(?: .*)?"
    r"|(TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (?:counter|gauge|histogram|summary|untyped))\r?"
)

Families = dict[str, dict[str, list[str]]]
"""Lines of metrics by family and by what they are: HELP, TYPE or samples."""


def merge_metrics(texts: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """One text of several, each sample with a label `upstream` that says whose it is.

    A label `upstream` that a sample has already is renamed to `exported_upstream`, as Prometheus does it.

    Args:
        texts: in Prometheus' text format, by what the label shall say.

    Returns:
        The text, and what could not be read, by what the label says. A line that is of no such text is left
        out: Prometheus would refuse all of the text for it.
    """
    families: Families = {}  # a family's lines stand together: its head, its samples
    unread = {}
    for upstream, text in texts.items():
        samples, strange = _add(families, upstream, text)
        if not samples:
            unread[upstream] = "no metrics"
        elif strange:
            unread[upstream] = f"{strange} line(s) of no metrics"
    lines = [
        line
        for family in families.values()
        for part in ("HELP", "TYPE", "samples")
        for line in family.get(part, ())
    ]
    return "\n".join(lines) + "\n", unread


def _add(families: Families, upstream: str, text: str) -> tuple[int, int]:
    """Add a text; returns how many samples and how many lines of another kind it has."""
    said = upstream.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    kept: Families = {}
    name, samples, strange = None, 0, 0
    for line in text.split("\n"):
        if head := _HEAD.fullmatch(line):
            kind, named = (each for each in head.groups() if each is not None)
            name = named
            kept.setdefault(name, {"samples": []}).setdefault(kind, [line.rstrip("\r")])
        elif (sample := _SAMPLE.fullmatch(line)) and _is_number(sample["value"]):
            metric, labels, rest = sample["metric"], sample["labels"] or "", sample["rest"]
            if name is None or not metric.startswith(name):
                name = metric
            if "upstream=" in labels:
                labels = _renamed(labels)
            labels = f'upstream="{said}"' + (f",{labels}" if labels else "")
            family = kept.setdefault(name, {"samples": []})
            family["samples"].append(f"{metric}{{{labels}}} {rest}")
            samples += 1
        elif line.strip() and not line.startswith("#"):
            strange += 1
    for name, family in kept.items() if samples else ():
        there = families.setdefault(name, {"samples": []})
        there["samples"] += family.pop("samples")
        for kind, lines in family.items():
            there.setdefault(kind, lines)
    return samples, strange


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _renamed(labels: str) -> str:
    """Labels of a sample without one that is called `upstream`."""
    found = _LABELS.findall(labels)
    names = {name for name, _ in found}
    new = "upstream"
    while new in names:
        new = f"exported_{new}"
    return ",".join(f'{new if name == "upstream" else name}="{value}"' for name, value in found)
