"""Baselines of the tasks, from the command line: `python -m server.baseline_inference --help`.

deterministic: the reference agents and the trained policy on seeds of evaluation; the same figures each time.
openai: a language model behind an OpenAI-compatible endpoint, one call every `--windows-per-call` windows.

docs/baselines.md tells the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmserve_env.agents.llm import LLMSettings
from llmserve_env.errors import InputError
from llmserve_env.tasks import EVALUATION_SEEDS
from server.baseline_http import HttpSession
from server.baseline_suites import Progress, deterministic_suite, openai_suite

__all__ = ["Arguments", "deterministic_suite", "main", "openai_suite"]


@dataclass(frozen=True)
class Arguments:
    """Play the tasks and say what they score."""

    mode: Literal["deterministic", "openai"] = "deterministic"
    """Players: the reference agents and the trained policy, or a language model."""
    task: tuple[str, ...] = ()
    """Tasks by their ids (default: all)."""
    episodes: int | None = None
    """Episodes of each task and agent (default: 5, with a language model 1)."""
    seed: int = EVALUATION_SEEDS.start
    """Seed of the first episode, the others follow; the default is the first seed of evaluation."""
    output: Path | None = None
    """JSON file of results, written after each episode. One that exists and has the same settings is gone on
    with."""
    runtime: Literal["in-process", "http"] = "in-process"
    """Place where episodes are played: here, or through the HTTP service."""
    base_url: str = "http://127.0.0.1:8000"
    """The HTTP service that --runtime http plays through."""
    endpoint: str | None = None
    """Base URL of the OpenAI-compatible endpoint, with its /v1 (default: OPENAI_BASE_URL, else OpenAI's). The
    key comes from OPENAI_API_KEY; an endpoint of your own may need none."""
    model: str | None = None
    """Name of the language model at the endpoint (default: OPENAI_MODEL)."""
    windows_per_call: int = 1
    """Windows for which an answer holds."""
    history: int = 4
    """Windows that a prompt shows, at most."""
    max_prompt_chars: int = 12_000
    """Bound of a prompt: the oldest windows are left out to keep it."""
    max_answer_tokens: int = 512
    """Bound of an answer."""
    temperature: float | None = 0.0
    """Sampling temperature; None leaves it to the endpoint."""
    timeout_s: float = 60.0
    """Bound of one attempt (s)."""
    max_retries: int = 4
    """More attempts after no connection, 408, 409, 429 or 5xx, with exponential back-off or Retry-After."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the baselines.

    Args:
        argv: the arguments; those of the process when None.

    Returns:
        The exit status: 0; 2 for what cannot be used or reached; 130 when interrupted.
    """
    import tyro

    arguments = tyro.cli(Arguments, prog="baseline_inference", args=argv)
    try:
        return _run(arguments)
    except InputError as error:
        print(f"baseline_inference: {error}{_kept(arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{_kept(arguments)}", file=sys.stderr)
        return 130


def _run(arguments: Arguments) -> int:
    from tqdm import tqdm

    if arguments.episodes is not None and arguments.episodes < 1:
        raise InputError(f"expected 1 or more, found {arguments.episodes}", field="episodes")
    if arguments.seed < 0:
        raise InputError(f"expected 0 or more, found {arguments.seed}", field="seed")
    llm = _llm(arguments) if arguments.mode == "openai" else None
    session = HttpSession(arguments.base_url) if arguments.runtime == "http" else None
    where: dict[str, Any] = {"seed": arguments.seed, "session": session, "output": arguments.output}
    try:
        with tqdm(unit="episode", bar_format="{desc}{n:.2f}/{total} episodes [{elapsed}]") as bar:
            if llm is None:
                content = deterministic_suite(
                    arguments.task, arguments.episodes or 5, _shown_on(bar), **where
                )
            else:
                content = openai_suite(
                    arguments.task, arguments.episodes or 1, _shown_on(bar), llm=llm, **where
                )
    finally:
        if session is not None:
            session.close()
    print(_report(content))
    if arguments.output is not None:
        print(f"wrote {arguments.output}")
    return 0


def _llm(arguments: Arguments) -> LLMSettings:
    return LLMSettings.from_environment(
        model=arguments.model,
        endpoint=arguments.endpoint,
        windows_per_call=arguments.windows_per_call,
        history=arguments.history,
        max_prompt_chars=arguments.max_prompt_chars,
        max_answer_tokens=arguments.max_answer_tokens,
        temperature=arguments.temperature,
        timeout_s=arguments.timeout_s,
        max_retries=arguments.max_retries,
    )


def _shown_on(bar: Any) -> Progress:
    def progress(done: float, total: int, what: str) -> None:
        bar.total, bar.n = total, done
        bar.set_description(what)

    return progress


def _report(content: dict[str, Any]) -> str:
    """The scores as a table, and what asking a model came to."""
    line = "{:<24} {:<16} {:>8} {:>11} {:>14}".format
    parts = [line("task", "agent", "episodes", "mean score", "95% interval")]
    for task_id, agents in content["summary"].items():
        for agent, found in agents.items():
            sure = "–" if found["interval"] is None else "{:.3f}..{:.3f}".format(*found["interval"])
            parts.append(line(task_id, agent, found["episodes"], f"{found['mean']:.3f}", sure))
    for agent, reason in content["settings"].get("not_played", {}).items():
        parts.append(f"not played: {agent}, which {reason}")
    asked = [entry["llm"] for entry in content["episodes"] if "llm" in entry]
    if asked:
        total = {
            name: sum(each[name] for each in asked)
            for name in ("calls", "retries", "prompt_tokens", "completion_tokens")
        }
        parts.append(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in total.items()))
        reasons: dict[str, int] = {}
        for each in asked:
            for reason, count in each["fallbacks"].items():
                reasons[reason] = reasons.get(reason, 0) + count
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
        parts.append(f"calls that left the configuration as it was: {told}")
    return "\n".join(parts)


def _kept(arguments: Arguments) -> str:
    if arguments.output is None or not arguments.output.is_file():
        return ""
    return f"; finished episodes are in {arguments.output}, the same command goes on after them"


if __name__ == "__main__":
    sys.exit(main())
