"""Prometheus text of several servers as one."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?(\s.*)")


def merged(texts: Mapping[str, str]) -> str:
    """One text of several, each sample with a label `upstream` that says whose it is.

    Args:
        texts: in Prometheus' text format, by what the label shall say.
    """
    families: dict[str, dict[str, list[str]]] = {}  # a family's lines stand together: its head, its samples
    for upstream, text in texts.items():
        said = upstream.replace("\\", r"\\").replace('"', r"\"")
        family: dict[str, list[str]] = {}
        name = None
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, named, *_ = line.split(" ", 3)
                if named != name:
                    name = named
                    family = families.setdefault(name, {"samples": []})
                family.setdefault(kind, [line])
            elif sample := _SAMPLE.fullmatch(line):
                metric, labels, rest = sample.groups()
                if name is None or not metric.startswith(name):
                    name = metric
                    family = families.setdefault(name, {"samples": []})
                labels = f'upstream="{said}"' + (f",{labels}" if labels else "")
                family["samples"].append(f"{metric}{{{labels}}}{rest}")
    lines = [
        line
        for family in families.values()
        for part in ("HELP", "TYPE", "samples")
        for line in family.get(part, ())
    ]
    return "\n".join(lines) + "\n"
