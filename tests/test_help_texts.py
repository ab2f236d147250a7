"""Every option of a command says what it is: its text reads alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve_env.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "evaluate", "examples", "llmserve_env/commands", "scripts", "server", "train")
WITHOUT_SUBJECT = re.compile(r"(of|that|as|where|its|it|at|by|for|in|to|also|the same)\b", re.IGNORECASE)


def options(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and text of all options that tyro makes of a file's dataclasses and functions."""
    asked = {
        node.args[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tyro.cli" and node.args
        if isinstance(node.args[0], ast.Name)
    }
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    yield f"{node.name}.{ast.unparse(field.target)}", ast.literal_eval(text.value)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in {
            *asked,
            "Arguments",
            "Settings",
        }:
            yield from _described(node)


def _described(node: ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, str]]:
    section = re.search(r"^(?:Args|Attributes):\n((?:(?: .*)?\n?)+)", ast.get_docstring(node) or "", re.M)
    for name, text in re.findall(r"^    (\w+): (.*)", section[1] if section else "", re.M):
        yield f"{node.name}.{name}", text


def files() -> list[str]:
    """Files with options, or which commands are made of."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        str(path.relative_to(ROOT))
        for path in paths
        if "commands" in path.parts or "tyro" in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("file", files())
def test_options_have_a_subject(file):
    tree = ast.parse((ROOT / file).read_bytes())
    found = list(options(tree))
    if file.startswith("llmserve_env/commands"):
        commands = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        found += [each for node in commands if node.name == Path(file).stem for each in _described(node)]
    assert not [each for each in found if WITHOUT_SUBJECT.match(each[1])]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_default_is_said_once(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    text = " ".join(re.sub(r"[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    assert not re.findall(r"default: [^()]*(?:\([^()]*\))?[^()]*\)\.? \(default: [^)]*\)", text)
    assert "(default: )" not in text
