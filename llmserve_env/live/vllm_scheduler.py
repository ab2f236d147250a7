"""A scheduler for vLLM whose batch cap, KV budget and speculation depth change while it serves.

    vllm serve MODEL --scheduler-cls llmserve_env.live.vllm_scheduler.LiveScheduler \
        --additional-config '{"llmserve_control": "FOLDER"}'

`engine_settings` says what FOLDER holds. This module runs inside vLLM's engine process and is the only one
that imports vLLM. It changes fields of vLLM's scheduler that are not public, so it takes only versions whose
scheduler it was tried with.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import vllm

from llmserve_env.errors import InputError
from llmserve_env.live.servers.engine_settings import (
    SCHEDULER_VERSIONS,
    SETTINGS_FILE,
    AppliedSettings,
    EngineSettings,
    EngineStatus,
    control_folder,
    read_settings,
    write_status,
)

POLL_S = 0.05

if vllm.__version__.split("+")[0] not in SCHEDULER_VERSIONS:
    raise ImportError(
        f"LiveScheduler does not know the scheduler of vLLM {vllm.__version__}: "
        f"it was tried with {', '.join(SCHEDULER_VERSIONS)}"
    )

from vllm.logger import init_logger  # noqa: E402 - these move from version to version
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402

# A name below vllm's, whose loggers are the ones that it sets up.
logger = init_logger("vllm.llmserve")


class LiveScheduler(Scheduler):
    """vLLM's scheduler, with settings from a folder.

    A thread reads them, also while the engine is idle, and answers what it made of them; the next iteration
    keeps to them. Content that cannot be used is logged and answered, and the last good settings stay.

    Raises:
        InputError: the server was started without a folder, or the engine cannot write there.
    """

    dynamic_sd_lookup: list[int] | None  # draft tokens by batch size

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> LiveScheduler:
        """The one for asynchronous scheduling where vLLM schedules so: it takes a class as it is."""
        asynchronous = vllm_config.scheduler_config.async_scheduling
        return object.__new__(LiveAsyncScheduler if asynchronous else LiveScheduler)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._folder = control_folder(vllm_config.additional_config)
        self._engine = vllm_config.parallel_config.data_parallel_index
        self._start_lookup = self.dynamic_sd_lookup
        self._start_watermark = self.kv_cache_manager.watermark_blocks
        self._blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null block
        self._started = AppliedSettings(
            batch_cap=self.max_num_active_reqs,
            kv_budget_fraction=1 - self._start_watermark / self._blocks,
            speculation_depth=self.num_spec_tokens,
        )
        self._in_force = self._wanted = self._started
        self._asked = EngineSettings()
        self._seen: object = ()
        self._read()  # what holds already, before the first request
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="llmserve settings", daemon=True).start()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule an iteration under the settings of now."""
        wanted = self._wanted  # the thread may set another meanwhile
        if wanted is not self._in_force:
            self._apply(wanted)
            self._in_force = wanted
        return super().schedule(*args, **kwargs)

    def shutdown(self) -> None:
        """Stop watching."""
        self._closing.set()
        super().shutdown()

    def _apply(self, settings: AppliedSettings) -> None:
        self.max_num_active_reqs = settings.batch_cap
        # Admission needs the blocks of the request and the watermark to be free, unless nothing runs.
        budget = int(settings.kv_budget_fraction * self._blocks)
        self.kv_cache_manager.watermark_blocks = max(self._start_watermark, self._blocks - budget)
        if self._start_lookup is not None:
            self.dynamic_sd_lookup = [min(depth, settings.speculation_depth) for depth in self._start_lookup]

    def _watch(self) -> None:
        while not self._closing.wait(POLL_S):
            try:
                self._read()
            except Exception:  # the engine serves on under the last settings; the next change is tried again
                logger.exception("LiveScheduler could not take over its settings")

    def _read(self) -> None:
        """Take over the settings file, if it has changed, and answer."""
        seen = _signature(self._folder / SETTINGS_FILE)
        if seen == self._seen:
            return
        self._seen = seen
        refused = None
        try:
            self._asked = read_settings(self._folder)
        except InputError as error:
            refused = str(error)
            logger.error("LiveScheduler keeps its settings, these cannot be used: %s", refused)
        applied, not_applied = self._asked.within(self._started, fixed_depth=self._start_lookup is None)
        self._wanted = applied
        status = EngineStatus(
            engine=self._engine,
            pid=os.getpid(),
            vllm_version=vllm.__version__,
            started=self._started,
            fixed_depth=self._start_lookup is None,
            asked=self._asked,
            applied=applied,
            not_applied=not_applied,
            refused=refused,
        )
        write_status(self._folder, status)
        if refused is None:
            logger.info("LiveScheduler keeps to %s", applied)


class LiveAsyncScheduler(LiveScheduler, AsyncScheduler):
    """`LiveScheduler` for asynchronous scheduling, vLLM's default on GPUs."""


def _signature(path: Path) -> object:
    """Changes with a file's content, where it is replaced whole; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
