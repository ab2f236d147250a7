"""Write docs/tasks anew after a change of a task: python -m tests.tasks.regenerate_pages.

A page says between `<!-- COMMAND -->` and `<!-- end -->` what that `llmserve` command prints. A line that
begins with `llmserve tasks` and ends with a path is the command that draws its picture.
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

from llmserve_env.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "tasks"
GENERATED = re.compile(r"(<!-- llmserve (tasks[^>\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)
PICTURE = re.compile(r"^llmserve (tasks \w+ --picture) (\S+)$", re.MULTILINE)


def printed(arguments: list[str]) -> str:
    """What an `llmserve` command prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert main(arguments) == 0
    return out.getvalue()


def regenerated(text: str) -> str:
    """A page with what its commands print now."""
    return GENERATED.sub(lambda found: f"{found[1]}\n{printed(found[2].split())}\n{found[3]}", text)


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = regenerated(before)
        path.write_text(after, encoding="utf-8")
        print(f"{path.name}: {'as before' if after == before else 'changed'}")
        for arguments, picture in PICTURE.findall(after):
            printed([*arguments.split(), str(ROOT / picture)])
