"""`llmserve tasks`: what an agent can be asked to do."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from llmserve_env.tasks.description import Table

_WIDTH = 100


def tasks(
    name: Annotated[str | None, tyro.conf.Positional] = None,
    *,
    markdown: bool = False,
    picture: Path | None = None,
) -> None:
    """List the shipped tasks, or tell everything about one.

    Args:
        name: a shipped task, or the path of a .toml file; all shipped ones when left out.
        markdown: whether to print Markdown tables.
        picture: picture of the task's episode of seed 1 (png, svg or pdf): its traffic, and what is
            in flight under the configuration that it starts with.

    Raises:
        InputError: the task cannot be used, or the picture cannot be written.
    """
    from llmserve_env.commands.shared.report import check_outputs
    from llmserve_env.errors import InputError
    from llmserve_env.report.figures import check_suffix
    from llmserve_env.tasks import list_tasks, load_task
    from llmserve_env.tasks.description import describe_task, overview

    form = _markdown if markdown else _plain
    if name is None:
        if picture is not None:
            raise InputError("expected a task to draw", field="picture")
        listed = overview([load_task(each) for each in list_tasks()])
        print(form(listed, titled=False))
        return
    if picture is not None:
        check_suffix(picture)
        check_outputs({"picture": picture}, task=name)
    task = load_task(name)
    tables = describe_task(task)
    print("\n\n".join([_text(task.description, markdown), *(form(table) for table in tables)]))
    if picture is not None:
        from llmserve_env.commands.shared.task_picture import draw_task

        draw_task(task, picture)


def _plain(table: Table, *, titled: bool = True) -> str:
    from llmserve_env.commands.shared.report import table as aligned

    lines = aligned(table.header, table.rows, left=table.left).splitlines()
    if not any(table.header):
        lines = lines[1:]
    note = [_text(table.note, False)] if table.note else []
    return "\n".join([*([table.title.upper()] if titled else []), *lines, *note])


def _markdown(table: Table, *, titled: bool = True) -> str:
    lines = [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
        for row in (table.header, *table.rows)
    ]
    lines.insert(1, "|" + "---|" * len(table.header))
    note = ["", _text(table.note, True)] if table.note else []
    return "\n".join([*([f"### {table.title}", ""] if titled else []), *lines, *note])


def _text(text: str, markdown: bool) -> str:
    return text if markdown else textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
