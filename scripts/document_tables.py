"""Write the tables of controls, window figures and features into the documents, from their declarations.

A table stands between `<!-- NAME: made by scripts/document_tables.py -->` and `<!-- end of NAME -->`.

    python scripts/document_tables.py
"""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path

from llmserve_env.backend import FIGURES, figure_meanings
from llmserve_env.controls import SPECS
from llmserve_env.observation import FEATURES
from llmserve_env.schema import GROUPS

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"

_TABLE = re.compile(
    r"(<!-- (\w+): made by scripts/document_tables\.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL
)


def controls() -> list[str]:
    """The controls, in the order of an action's entries; those of extra groups have no fixed number."""
    rows = ["| number | control | values | unit | scale | what it sets |", "|---|---|---|---|---|---|"]
    numbers = count()
    for name, spec in SPECS.items():
        unit, scale = spec.declared.unit or "–", spec.declared.scale
        number = next(numbers) if spec.declared.group in GROUPS else "–"
        rows.append(f"| {number} | `{name}` | {spec.range_text} | {unit} | {scale} | {spec.meaning} |")
    return rows


def features() -> list[str]:
    """The features, those of tenants once for all slots; those of extra groups have no fixed number."""
    of_all = [feature.name for feature in FEATURES if feature.group in GROUPS]
    slot = sum(feature.slot == 0 for feature in FEATURES)
    rows = ["| number | feature | group | meaning | scaling |", "|---|---|---|---|---|"]
    for feature in FEATURES:
        if feature.slot:
            continue
        number = of_all.index(feature.name) if feature.group in GROUPS else "–"
        scaling = f"x / (x + {feature.half:g})" if feature.half else "as it is"
        place, name, meaning = str(number), feature.name, feature.meaning
        if feature.slot is not None:
            place, name = f"{number} + {slot} k", name.replace("tenant_0_", "tenant_k_")
            meaning = meaning.replace("tenant 0: ", "")
        rows.append(f"| {place} | `{name}` | {feature.group} | {meaning} | {scaling} |")
    return [f"float32[{len(of_all)}]:", "", *rows]


def figures() -> list[str]:
    """The window figures, in the order of their record."""
    rows = ["| figure | group | kind | unit | axes | meaning |", "|---|---|---|---|---|---|"]
    meanings = figure_meanings()
    for name, figure in FIGURES.items():
        unit, axes = figure.unit or "–", ", ".join(figure.axes) or "–"
        rows.append(f"| `{name}` | {figure.group} | {figure.kind} | {unit} | {axes} | {meanings[name]} |")
    return rows


_MAKERS = {"controls": controls, "features": features, "figures": figures}


def with_tables(text: str) -> str:
    """A document with its tables made anew."""
    return _TABLE.sub(
        lambda found: f"{found[1]}\n" + "\n".join(_MAKERS[found[2]]()) + f"\n\n{found[3]}", text
    )


if __name__ == "__main__":
    for path in sorted(DOCUMENTS.rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(DOCUMENTS.parent))
