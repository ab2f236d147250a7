"""The `llmserve` command.

Each command is a function in a module of its own: `llmserve simulate` calls
`llmserve_env.commands.simulate.simulate`, `llmserve calibrate kernels` calls
`llmserve_env.commands.calibrate.kernels.kernels`. tyro turns the function's signature and docstring into
flags and help. Only the module of the chosen command is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from llmserve_env.errors import InputError
from llmserve_env.report.version import __version__

COMMANDS = {
    "demo": "play the tasks with reference agents and trained policies: scores and a picture",
    "run": "play an episode with an agent, before running vLLM servers or in the simulator",
    "simulate": "serve a workload in the simulator and say what its users got",
    "tasks": "list the tasks, or tell everything about one",
    "doctor": "say whether vLLM servers are ready for a live run, and what to mend",
    "gateway": "stand before vLLM servers: limit, order and route their requests, steered by an agent",
    "grade": "replay an episode's log and say what it scores",
    "dataset": "record an agent's episodes for offline reinforcement learning (Minari)",
    "workload": "describe a workload: a trace or a generator",
    "servegen": "join ServeGen's published chunks to the tables that servegen:// reads",
    "profiles": "list the hardware and model profiles with their sources",
    "validate": "compare the simulator with measurements of real engines",
    "bench": "measure the speed of the simulator and of the environments",
    "compare": "play one trace on a vLLM server and in the simulator, side by side",
    "calibrate live": "fit a profile to a running vLLM server, from closed-loop load",
    "calibrate kernels": "fit a profile's latency model to measured kernel times",
    "calibrate predictions": "fit a profile's latency model to a predictor's iterations",
}
"""What `llmserve --help` says of each command, in the order in which it lists them."""

_HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `llmserve`; those of the process when None.

    Returns:
        The exit status: 0, or what the command's function returned; 2 when the user gave something that
        cannot be used; 130 when interrupted; 141 when the reader of the output went away, as with `| head`.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # a reader that has gone is found here, not in the interpreter's shutdown
    except InputError as error:
        print(f"llmserve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except MemoryError:
        print("llmserve: it takes more memory than there is", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in _HELP:
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"llmserve {__version__}")
        return 0
    for words in (1, 2):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return _call(name, argv[words:])
    group = argv[0]
    if any(name.startswith(f"{group} ") for name in COMMANDS):
        if len(argv) == 1 or argv[1] in _HELP:
            print(_overview(group))
            return 0
        raise InputError(_unknown(" ".join(argv[:2]), within=group))
    raise InputError(_unknown(group))


def _call(name: str, args: list[str]) -> int:
    from llmserve_env.commands.shared.parsing import parse

    words = name.split()
    module = import_module(".".join(["llmserve_env.commands", *words]))
    command: Callable[..., int | None] = getattr(module, words[-1])
    return parse(command, f"llmserve {name}", args) or 0


def _overview(group: str = "") -> str:
    known = _known(group)
    width = max(map(len, known))
    return "\n".join(
        [
            f"usage: llmserve {f'{group} ' if group else ''}COMMAND [arguments]",
            "",
            *(f"  {name:<{width}}  {COMMANDS[name]}" for name in known),
            "",
            "llmserve COMMAND --help tells a command's arguments; llmserve --version the version.",
        ]
    )


def _unknown(name: str, within: str = "") -> str:
    known = _known(within)
    close = get_close_matches(name, known, n=1)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return f"unknown command '{name}'.{guess} The commands are: {', '.join(known)}"


def _known(group: str = "") -> list[str]:
    return [name for name in COMMANDS if name.startswith(f"{group} " if group else "")]
