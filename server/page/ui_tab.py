"""The tab Play: a visitor chooses an episode, sets the configuration or lets an agent, watches, grades."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from enum import Enum
from html import escape
from math import floor, log10
from typing import TYPE_CHECKING, Any

import gradio as gr
from pydantic import ValidationError

from llmserve_env.agents import lacks_weights
from llmserve_env.controls import CONTROLS, SPECS, ControlSpec
from llmserve_env.errors import InputError
from llmserve_env.schema import EpisodeLog, ServeAction
from llmserve_env.tasks import EVALUATION_SEEDS, TRAINING_SEEDS
from llmserve_env.tasks.catalog import TaskInfo, catalog
from server.baseline_suites import BASELINES
from server.hosted import DEFAULT_TASK
from server.messages.errors import message
from server.messages.refusals import Refusal
from server.messages.requests import ResetRequest
from server.page import plots
from server.page.ui_trace import replay

if TYPE_CHECKING:
    from server.page.ui_visitors import Visitor, Visitors
    from server.service import Service

_REFUSED = (Refusal, InputError, ValidationError)
_PACES: dict[str, float | None] = {
    "10 windows/s": 10.0,
    "50 windows/s": 50.0,
    "200 windows/s": 200.0,
    "full speed": None,
}
_FIRST_AGENT = "reactive"
_EVENT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of every event: the plots do not fade while they follow."""
_PICK_LOG = """(_) => new Promise((resolve) => {
  const input = document.createElement('input');
  input.type = 'file'; input.accept = '.json,application/json';
  input.addEventListener('cancel', () => resolve(''));
  input.addEventListener('change', async () => {
    const file = input.files[0];
    if (!file) resolve('');
    else if (file.size > MOST) resolve(`!expected a log of at most MOST bytes, found ${file.size}`);
    else resolve(await file.text());
  });
  input.click();
})"""
_SAVE_LOG = """(text) => {
  const end = text.indexOf(String.fromCharCode(10));
  if (end > 0) {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text.slice(end + 1)], {type: 'application/json'}));
    link.download = text.slice(0, end);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }
  return '';
}"""


class PlayTab:
    """The tab.

    Args:
        service: that plays.
        visitors: who plays.
    """

    def __init__(self, service: Service, visitors: Visitors) -> None:
        self._service = service
        self._visitors = visitors
        self._tasks = {info.id: info for info in catalog()}

    def build(self, leave: Callable[[str], None]) -> gr.Blocks:
        """The tab's components and events.

        Args:
            leave: called with the name of a visitor who has left the page.
        """
        live = self._service.live
        with gr.Blocks() as tab:
            gr.HTML(_title(live), elem_classes="ls-flush")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=300):
                    chosen = self._episode_card()
                    controls, stretch = self._action_card()
                with gr.Column(scale=8, min_width=320):
                    with gr.Row(elem_classes=["ls-buttons", "ls-four"]):
                        begin = gr.Button("Begin anew", min_width=0, elem_id="begin")
                        one = gr.Button("Play 1 window", variant="primary", min_width=0, elem_id="play-one")
                        many = gr.Button("Play 10", min_width=0, elem_id="play-many")
                        stop = gr.Button("Stop", interactive=False, min_width=0, elem_id="stop")
                    with gr.Row(elem_classes="ls-agent", visible=not live):
                        agent, pace, let_play = _agent_row()
                    refused = gr.HTML(elem_id="message", elem_classes="ls-flush")
                    board = gr.HTML(plots.empty_board(), elem_id="board", elem_classes="ls-flush")
                    with gr.Row(elem_classes="ls-buttons"):
                        grade = gr.Button("Grade", min_width=0, elem_id="grade")
                        download = gr.Button("Download log", min_width=0, elem_id="download")
                        upload = gr.Button("Upload log", min_width=0, visible=not live, elem_id="upload")
                    result = gr.HTML(elem_id="result", elem_classes="ls-flush")
                    carried = gr.Textbox(visible=False)  # a log on its way from or to the visitor
            task, seeds, seed, draw, horizon, about = chosen
            form = [task, seed, horizon, *controls]
            shown = [board, refused, result, stop]
            task.input(self._on_task, [task, agent], [agent, about, horizon, *controls], **_EVENT)
            seeds.input(_first_seed, seeds, seed, **_EVENT)
            draw.click(_draw_seed, seeds, seed, **_EVENT)
            begin.click(self._on_begin, [task, seed, horizon], shown, **_EVENT)
            one.click(self._on_one, form, shown, **_EVENT)
            many.click(self._on_many, [stretch, *form], shown, **_EVENT)
            stretch.change(_stretch_label, stretch, many, **_EVENT)
            let_play.click(self._on_agent, [agent, pace, task, seed, horizon], shown, **_EVENT)
            stop.click(self._on_stop, **_EVENT)
            grade.click(self._on_grade, None, [refused, result], **_EVENT)
            download.click(self._on_download, None, [carried, refused], **_EVENT).then(
                None, carried, carried, js=_SAVE_LOG
            )
            most = str(
                self._service.settings.max_body_bytes * 3 // 4
            )  # sent as text within JSON, which is longer
            upload.click(
                self._on_upload,
                carried,
                [board, refused, result],
                js=_PICK_LOG.replace("MOST", most),
                **_EVENT,
            )

            def unload(request: gr.Request) -> None:
                leave(str(request.session_hash))

            tab.unload(unload)
        made: gr.Blocks = tab
        return made

    def _episode_card(self) -> tuple[Any, ...]:
        info = self._tasks[DEFAULT_TASK]
        with gr.Column(elem_classes="ls-card"):
            gr.HTML("<h2>Episode</h2>", elem_classes="ls-flush")
            names = [(f"{each.id} ({each.difficulty})", each.id) for each in self._tasks.values()]
            task = gr.Dropdown(names, value=info.id, label="Task", elem_id="task")
            about = gr.HTML(_about(info), elem_classes="ls-flush")
            seeds = gr.Radio(
                ["training", "evaluation"],
                value="training",
                label="Seeds",
                info="A seed fixes the traffic. Results are reported on seeds of evaluation, from "
                "2147483648 on: nothing is trained or tuned on them.",
            )
            with gr.Row(elem_classes="ls-beside"):
                seed = gr.Textbox("0", label="Seed", max_lines=1, elem_id="seed")
                draw = gr.Button("Draw", scale=0, min_width=72)
            horizon = gr.Slider(**_horizon(info), elem_id="horizon")
        return task, seeds, seed, draw, horizon, about

    def _action_card(self) -> tuple[list[Any], Any]:
        info = self._tasks[DEFAULT_TASK]
        with gr.Column(elem_classes="ls-card"):
            gr.HTML("<h2>Configuration</h2>", elem_classes="ls-flush")
            controls = []
            for name in CONTROLS:
                controls.append(_form(name)(**_control(info, name), elem_id=name))
            stretch = gr.Slider(
                2, 100, 10, step=1, label="Stretch (windows)", info="Played one after the other like this."
            )
        return controls, stretch

    def _on_task(self, task_id: str, agent: str) -> list[Any]:
        info = self._tasks[task_id]
        return [
            gr.update(**_agents(task_id, agent)),
            _about(info),
            gr.update(**_horizon(info)),
            *(gr.update(**_control(info, name)) for name in CONTROLS),
        ]

    async def _on_begin(self, task_id: str, seed: str, horizon_s: float, request: gr.Request) -> Any:
        try:
            visitor = await self._visitors.begin(_name(request), self._wanted(task_id, seed, horizon_s))
        except _REFUSED as error:
            return _refusal(error)
        return _frame(visitor)

    async def _on_one(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        async for frame in self._play(1, values, request):
            yield frame

    async def _on_many(self, request: gr.Request, windows: float, *values: Any) -> AsyncIterator[Any]:
        async for frame in self._play(int(windows), values, request):
            yield frame

    async def _play(self, windows: int, values: tuple[Any, ...], request: gr.Request) -> AsyncIterator[Any]:
        task_id, seed, horizon_s, *settings = values
        try:
            action = self._action(task_id, settings)
            visitor = await self._ready(request, task_id, seed, horizon_s)
            async for frame in _frames(visitor, visitor.play(action, windows)):
                yield frame
        except _REFUSED as error:
            yield _refusal(error)

    async def _on_agent(self, request: gr.Request, name: str, pace: str, *chosen: Any) -> AsyncIterator[Any]:
        try:
            visitor = await self._ready(request, *chosen)
            async for frame in _frames(visitor, visitor.play_agent(name, _PACES[pace])):
                yield frame
        except _REFUSED as error:
            yield _refusal(error)

    def _on_stop(self, request: gr.Request) -> None:
        self._visitors.stop(_name(request))

    async def _on_grade(self, request: gr.Request) -> Any:
        try:
            result = await self._visitors.get(_name(request)).grade()
        except _REFUSED as error:
            return plots.message(_text(error)), gr.skip()
        return "", plots.grade_table(result)

    def _on_download(self, request: gr.Request) -> Any:
        try:
            log = self._visitors.get(_name(request)).session.log()
        except _REFUSED as error:
            return "", plots.message(_text(error))
        task_id = self._visitors.get(_name(request)).session.state.task_id
        return f"{task_id}-{log.seed}.json\n{log.model_dump_json()}", ""

    async def _on_upload(self, text: str, request: gr.Request) -> Any:
        if not text:  # the visitor chose no file
            return gr.skip(), gr.skip(), gr.skip()
        if text.startswith("!"):
            return gr.skip(), plots.message(text[1:]), gr.skip()
        try:
            log = EpisodeLog.model_validate_json(text)
            result = await self._service.grade_log(log)
            trace = await self._service.guard.run(replay, text.encode())
        except _REFUSED as error:
            return gr.skip(), plots.message(f"The log is refused. {_text(error)}"), ""
        return plots.board(trace, f"Uploaded log: {trace.title}"), "", plots.grade_table(result)

    async def _ready(self, request: gr.Request, task_id: str, seed: str, horizon_s: float) -> Visitor:
        """The visitor, whose episode is begun if it is not the one that is chosen."""
        wanted = self._wanted(task_id, seed, horizon_s)
        try:
            visitor = self._visitors.get(_name(request))
        except Refusal:
            return await self._visitors.begin(_name(request), wanted)
        if not visitor.has_begun(wanted):
            await visitor.begin(wanted)
        return visitor

    def _wanted(self, task_id: str, seed: str, horizon_s: float) -> ResetRequest:
        whole = self._tasks[task_id].horizon_s if task_id in self._tasks else None
        shorter = None if horizon_s == whole else horizon_s
        try:
            number = int(seed)
        except ValueError:
            raise InputError(f"expected a whole number, found {seed[:40]!r}", field="seed") from None
        return ResetRequest(task_id=task_id, seed=number, horizon_s=shorter)

    def _action(self, task_id: str, settings: list[Any]) -> ServeAction:
        """What the form says; controls that the task does not grant stay as the cell starts."""
        info = self._tasks[task_id]
        asked = {
            name: None if SPECS[name].optional and value == SPECS[name].declared.unset else value
            for name, value in zip(CONTROLS, settings, strict=True)
            if name in info.controls
        }
        return ServeAction.model_validate({**info.start.model_dump(), **asked})


def _agent_row() -> tuple[Any, Any, Any]:
    agent = gr.Dropdown(**_agents(DEFAULT_TASK, _FIRST_AGENT), label="Agent", elem_id="agent")
    pace = gr.Dropdown(list(_PACES), value="50 windows/s", label="Pace", elem_id="pace")
    return agent, pace, gr.Button("Let it play", elem_id="let-play")


def _agents(task_id: str, chosen: str) -> dict[str, Any]:
    """Who plays a task; the one that was chosen if it does."""
    names = [name for name in BASELINES if not lacks_weights(name, task_id)]
    return {"choices": names, "value": chosen if chosen in names else _FIRST_AGENT}


def _title(live: bool) -> str:
    how = "real engines" if live else "a simulator"
    return (
        '<div class="ls-title"><h1>LLMServe</h1><p>Run an LLM inference service, window by window, on '
        f"{how}: keep latency within what its users were promised.</p></div>"
    )


def _about(info: TaskInfo) -> str:
    promises = "; ".join(
        f"<b>{escape(tenant.name)}</b> {tenant.ttft_slo_ms:g}, {tenant.tpot_slo_ms:g}"
        for tenant in info.tenants
    )
    size = f"{info.windows} windows of {info.window_s:g} s on {info.engines} × {escape(info.profile)}"
    first = f"<p><b>{escape(info.title)}.</b> {size}.</p>"
    second = f"<p>SLO (ms to the first token, per further token): {promises}.</p>"
    return f'<div class="ls-text">{first}{second}</div>'


def _horizon(info: TaskInfo) -> dict[str, Any]:
    return {
        "minimum": 10 * info.window_s,
        "maximum": info.horizon_s,
        "step": info.window_s,
        "value": info.horizon_s,
        "label": "Length (s)",
        "info": "A shortened episode is graded as a task of its own.",
    }


def _form(name: str) -> Any:
    """The kind of input that a control has."""
    spec = SPECS[name]
    if spec.type is bool:
        return gr.Checkbox
    return gr.Dropdown if spec.options or spec.optional else gr.Slider


def _control(info: TaskInfo, name: str) -> dict[str, Any]:
    """How a control is shown for a task."""
    spec, values, start = SPECS[name], info.controls.get(name), getattr(info.start, name)
    if isinstance(start, Enum):
        start = start.value
    shown: dict[str, Any] = {"label": spec.title, "value": start, "interactive": values is not None}
    if values is None:
        stays = {True: "on", False: "off"}.get(start, start) if isinstance(start, bool) else start
        stays = spec.declared.unset if start is None else stays
        shown["info"] = f"Not granted by this task: stays {stays}."
    else:  # never empty: an update to nothing would leave the text of the task before
        shown["info"] = spec.meaning if spec.options else f"Agents choose from {', '.join(map(str, values))}."
    if spec.optional:
        # A list has no value of nothing.
        unset = spec.declared.unset
        shown["choices"] = [
            (unset, unset) if value is None else (f"{value:g}", value) for value in values or [start]
        ]
        shown["value"] = unset if start is None else start
    elif _form(name) is gr.Dropdown:
        shown["choices"] = values or [start]
    elif _form(name) is gr.Slider:
        low, high = (values[0], values[-1]) if values else (spec.low, spec.high)
        shown |= {"minimum": low, "maximum": high, "step": 1 if spec.type is int else _step(spec)}
    lost = info.unavailable.get(name)
    if lost:
        shown["info"] = f"{shown['info']} No effect on this cell: {', '.join(map(str, lost))}."
    return shown


def _step(spec: ControlSpec) -> float:
    """A round step of a slider, of which the range has twenty or so."""
    rough = (spec.high - spec.low) / 16
    unit = 10.0 ** floor(log10(rough))
    return max(unit * factor for factor in (1, 2, 5) if unit * factor <= rough)


def _first_seed(kind: str) -> str:
    return str((EVALUATION_SEEDS if kind == "evaluation" else TRAINING_SEEDS).start)


def _draw_seed(kind: str) -> str:
    seeds = EVALUATION_SEEDS if kind == "evaluation" else TRAINING_SEEDS
    return str(seeds.start + secrets.randbelow(seeds.stop - seeds.start))


def _stretch_label(windows: float) -> Any:
    return gr.update(value=f"Play {windows:g}")


def _name(request: gr.Request) -> str:
    return str(request.session_hash)


def _frame(visitor: Visitor) -> tuple[Any, ...]:
    """The episode as it stands; what was graded or refused before has passed."""
    assert visitor.trace is not None
    return plots.board(visitor.trace), "", "", gr.update(interactive=visitor.playing)


async def _frames(visitor: Visitor, played: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The episode as it goes on; what is refused meanwhile stays to be read."""
    kept: tuple[Any, ...] = ()
    async for _ in played:
        board, refused, result, stop = _frame(visitor)
        yield (board, *(kept or (refused, result)), stop)
        kept = (gr.skip(), gr.skip())


def _refusal(error: Exception) -> Any:
    return gr.skip(), plots.message(_text(error)), gr.skip(), gr.skip()


def _text(error: Any) -> str:
    text: str = message(error)["data"]["message"]
    return text.removeprefix("body.")
