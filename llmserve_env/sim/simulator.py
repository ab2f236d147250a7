"""The simulated backend: a cell of engines that serves a workload window by window."""

from __future__ import annotations

import pickle
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from llmserve_env.backend import WINDOW, WindowRecord
from llmserve_env.controls import ACTION, CONTROLS, to_array
from llmserve_env.errors import InputError
from llmserve_env.hardware.constants import constants
from llmserve_env.hardware.latency import MAX_TOKENS, compile_latency
from llmserve_env.hardware.profile import TIERS, Profile
from llmserve_env.schema import ServeAction
from llmserve_env.sim import kernel
from llmserve_env.sim.outcomes import Outcomes, outcomes_of
from llmserve_env.sim.state import (
    BLOCK_TOKENS,
    CELL,
    COLOCATED,
    DECODE,
    FAILED,
    MAX_BLOCKS,
    MAX_RUNNING,
    NEVER_PS,
    OUTCOME,
    PREFILL,
    PS_PER_S,
    REQUEST,
    RETRYING,
    RUNNING,
    SLOTS,
    SUMS,
    TIMER,
    TRANSFER,
    WAITING,
    Batch,
)
from llmserve_env.sim.tables import (
    block_records,
    cost_of,
    empty_slots,
    idle_engines,
    idle_window,
    prefix_tokens_of,
    set_link,
    set_switching,
    shortest_wait_ps,
    small_ids,
    tenant_rows,
    to_ps,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from llmserve_env.workloads.workload import Workload


_BATCH_CAP, _TIER, _SPLIT = map(CONTROLS.index, ("batch_cap", "quantization_tier", "prefill_decode_split"))
_LONGEST_S = 4e6
"""Last arrival that leaves room to serve out before NEVER_PS."""


def _longest(max_model_len: int | None, profile: Profile) -> int:
    """Tokens of the longest context; whatever is more than the kernel counts is no limit."""
    return min(max_model_len or profile.model.max_model_len or NEVER_PS, NEVER_PS)


class SimulatorBatch:
    """Independent episodes on like cells, served together by one call of the kernel: a `backend.Backend`.

    Args:
        profile: hardware and model of every engine.
        workloads: one for each episode, with the same tenants.
        engines: engines in each cell.
        prefill_engines: of those, how many prefill when prefill and decode are split (default: half).
        max_num_batched_tokens: token budget of an iteration (default: the profile's); no engine runs more
            sequences than that.
        kv_blocks: KV blocks that the requests of one engine can hold, at any precision (default: what
            `hardware.memory.kv_blocks` says of the profile).
        max_num_seqs: running sequences per engine, whatever an action's batch cap is (default: the action's).
        max_model_len: longest context (tokens; default: the profile's). As vLLM does, a prompt that leaves no
            room for an answer is refused on arrival, and an answer ends at the context.
        prefix_cache: whether freed blocks can be found again.
        action: what the cells start with, at no cost.
        threads: threads that serve the episodes (None: one for each core); results do not depend on it.

    Raises:
        InputError: something does not fit, with its name.
    """

    replayable = True
    stale: str | None = None
    excused = 0
    unmeasured: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        profile: Profile,
        workloads: Sequence[Workload],
        *,
        engines: int = 1,
        prefill_engines: int | None = None,
        max_num_batched_tokens: int | None = None,
        kv_blocks: int | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        prefix_cache: bool = True,
        action: ServeAction | None = None,
        threads: int | None = 1,
    ) -> None:
        budget = (
            profile.engine.max_num_batched_tokens
            if max_num_batched_tokens is None
            else max_num_batched_tokens
        )
        if not 1 <= budget <= MAX_TOKENS:
            raise InputError(
                f"expected 1..{MAX_TOKENS} tokens, found {budget}", field="max_num_batched_tokens"
            )
        if kv_blocks is not None and not 1 <= kv_blocks <= MAX_BLOCKS:
            raise InputError(f"expected 1..{MAX_BLOCKS}, found {kv_blocks}", field="kv_blocks")
        if max_num_seqs is not None and not 1 <= max_num_seqs <= MAX_RUNNING:
            raise InputError(f"expected 1..{MAX_RUNNING}, found {max_num_seqs}", field="max_num_seqs")
        if max_num_seqs is not None and max_num_seqs > budget:
            raise InputError(
                f"expected at most {budget}, the tokens of an iteration, found {max_num_seqs}",
                field="max_num_seqs",
            )
        if max_model_len is not None and max_model_len < 2:
            raise InputError(f"expected 2 or more tokens, found {max_model_len}", field="max_model_len")
        if not 1 <= engines <= 64:
            raise InputError(f"expected 1..64, found {engines}", field="engines")
        if profile.engine.block_tokens != BLOCK_TOKENS:
            raise InputError(
                f"expected {BLOCK_TOKENS}, found {profile.engine.block_tokens}", field="block_tokens"
            )
        if not workloads:
            raise InputError("expected at least one", field="workloads")
        self.profile = profile
        self.threads = kernel.checked_threads(threads)
        self._tenants = workloads[0].tenants
        self._records: Batch | None = None
        self.tenants, self._accept, drafting = tenant_rows(workloads[0])
        self._cost = cost_of(profile)
        if kv_blocks is not None:
            self._cost = self._cost._replace(blocks=np.full_like(self._cost.blocks, kv_blocks))
        episodes = len(workloads)
        self.workloads: list[Workload] = list(workloads)
        self._own_action = action or ServeAction()
        self.engines = idle_engines(episodes, engines, budget)
        self.engines["synchronous"] = not profile.engine.async_scheduling
        self.cells = np.zeros(episodes, CELL)
        self.cells["classes"] = len(self._accept)
        self.cells["tenants"] = len(self._tenants)
        self.cells["ranks"] = self.tenants["rank"].max() + 1
        self.cells["prefix_cache"] = prefix_cache
        self.cells["most_blocks"] = self._cost.blocks.min()
        self.cells["longest"] = self.longest = _longest(max_model_len, profile)
        self.cells["sequences"] = max_num_seqs or 0
        self.cells["prefill_engines"] = engines // 2 if prefill_engines is None else prefill_engines
        self.cells["draft_layers"] = drafting[0] * compile_latency(profile).draft_layer_fraction
        self.cells["draft_head"] = drafting[1]
        self.cells["block_bytes"] = profile.model.kv_bytes_per_token * BLOCK_TOKENS
        if engines > 1 and not 1 <= self.cells["prefill_engines"][0] < engines:
            raise InputError(f"expected 1..{engines - 1}, found {prefill_engines}", field="prefill_engines")
        self.cells["burst_ps"] = round(constants().admission.burst_s * PS_PER_S)
        self.cells["shortest_wait_ps"] = shortest_wait_ps(self.tenants)
        set_switching(self.cells, profile)
        self._no_split = set_link(self.cells, profile, engines)
        self.cells["can_split"] = not self._no_split
        self._prefix_tokens = prefix_tokens_of(workloads) if prefix_cache else 0
        self.cells["blocks_per_id"] = self._prefix_tokens // BLOCK_TOKENS
        self.slots = np.zeros(self.engines.size, SLOTS)
        self.queue, self.nodes, self.table = block_records(
            self.engines.size, self._cost, self._prefix_tokens > 0
        )
        self.sums = np.zeros(episodes, SUMS)
        self.windows = np.zeros(episodes, WINDOW)
        self.now_s = np.zeros(episodes)
        self._now_ps = np.zeros(episodes, np.int64)
        self._over = np.zeros(episodes, bool)
        self._room(
            np.array([len(workload) for workload in workloads]),
            np.array([len(workload.prefix_ids) for workload in workloads]),
        )
        for episode, workload in enumerate(workloads):
            self.reset(episode, workload)

    def _room(self, requests: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        """Make room for the requests and the prefix ids of each episode, int64[episode] both."""
        self._first = np.concatenate([[0], np.cumsum(requests)])
        self._first_id = np.concatenate([[0], np.cumsum(ids)]) if self._prefix_tokens else np.zeros(1, int)
        total = int(self._first[-1])
        self.requests = np.zeros(total, REQUEST)
        self.outcomes = np.zeros(total, OUTCOME)
        self.prefix_offsets, self.prefix_ids = np.zeros(1, np.int64), np.zeros(0, np.int64)
        if self._prefix_tokens:
            self.prefix_offsets = np.zeros(total + len(requests), np.int64)
            self.prefix_ids = np.zeros(self._first_id[-1], np.int64)
        self.transfers = np.zeros(total if self.engines.shape[1] > 1 else 0, TIMER)
        self.retries = np.zeros(total if self.tenants["retries"].any() else 0, TIMER)
        self._records = None  # they are others now

    def _grow(self, episode: int, workload: Workload) -> None:
        """Make room for a longer workload; a quarter more, as others of its kind will come."""
        first, first_id = self._first, self._first_id
        old_offsets, old_ids = self.prefix_offsets, self.prefix_ids
        by_request = ("requests", "outcomes", "transfers", "retries")
        old = [getattr(self, name) for name in by_request]
        sizes, ids = np.diff(first), np.diff(first_id)
        sizes[:] = np.maximum(sizes, len(workload) * 5 // 4)
        if self._prefix_tokens:
            ids[:] = np.maximum(ids, len(workload.prefix_ids) * 5 // 4)
        self._room(sizes, ids)
        for other in range(len(self.cells)):
            count, source, target = int(self.cells["requests"][other]), first[other], self._first[other]
            for name, records in zip(by_request, old, strict=True):
                if len(records):
                    getattr(self, name)[target : target + count] = records[source : source + count]
            if self._prefix_tokens and other != episode:
                offsets = old_offsets[source + other : source + other + count + 1]
                shift = self._first_id[other] - first_id[other]
                self.prefix_offsets[target + other : target + other + count + 1] = offsets + shift
                ids_kept = old_ids[offsets[0] : offsets[-1]]
                low = self._first_id[other]
                self.prefix_ids[low : low + len(ids_kept)] = ids_kept

    def reset(self, episode: int, workload: Workload, seed: int = 0) -> None:
        """Begin an episode anew at time 0: empty engines in the starting configuration, another workload.

        Args:
            episode: which.
            workload: its requests.
            seed: seed of the episode; nothing is drawn here.

        Raises:
            InputError: the workload has other tenants, or prefix blocks of another size, than the batch.
        """
        if workload.tenants != self._tenants:
            raise InputError("the episodes of a batch need the same tenants", field="workloads")
        if self.cells["prefix_cache"][episode] and workload.prefix_block_tokens != self._prefix_tokens:
            raise InputError("the episodes of a batch need the same prefix block size", field="workloads")
        if workload.duration_s > _LONGEST_S:
            raise InputError(
                f"its last request arrives at {workload.duration_s:,.0f} s, and an episode has room for "
                f"{_LONGEST_S:,.0f} s: duration=, limit= or scale= in its address make it shorter",
                file=workload.source or None,
                field="workload",
            )
        fits = len(workload) <= self._first[episode + 1] - self._first[episode]
        if self._prefix_tokens:
            fits = fits and len(workload.prefix_ids) <= self._first_id[episode + 1] - self._first_id[episode]
        if not fits:
            self._grow(episode, workload)
        low = int(self._first[episode])
        part = slice(low, low + len(workload))
        requests, outcomes = self.requests[part], self.outcomes[part]
        requests["arrival_ps"] = np.rint(workload.arrival_s * PS_PER_S)
        requests["prompt_tokens"] = workload.prompt_tokens
        # An answer ends at the context.
        room = np.maximum(self.longest - workload.prompt_tokens.astype(np.int64), 1)
        requests["output_tokens"] = np.minimum(workload.output_tokens, room)
        requests["tenant"] = workload.tenant
        outcomes[:] = np.zeros(1, OUTCOME)
        outcomes["sent_ps"] = requests["arrival_ps"]
        outcomes["next"] = -1
        outcomes["segment"] = -1
        if self._prefix_tokens:
            offsets = workload.prefix_offsets + self._first_id[episode]
            self.prefix_offsets[low + episode : low + episode + len(workload) + 1] = offsets
            self.prefix_ids[offsets[0] : offsets[-1]] = small_ids(workload.prefix_ids)
        cell: Any = self.cells[episode]
        cell["requests"] = len(workload)
        for name in ("begun", "next_request", "transfers", "retrying", "full_ps"):
            cell[name] = 0
        cell["tenant_in_flight"] = 0
        self.workloads[episode] = workload
        self.now_s[episode] = 0.0
        self._now_ps[episode] = 0
        self._over[episode] = False
        self._start(episode)

    def _start(self, episode: int) -> None:
        """Put a cell in the configuration that it starts with, at no cost."""
        engines, cell, action = self.engines[episode], self.cells[episode], self._own_action
        synchronous = int(engines["synchronous"][0])
        engines[:] = idle_engines(1, len(engines), int(engines["token_budget"][0]))[0]
        engines["synchronous"] = synchronous
        engines["row"] = rows = np.arange(episode * len(engines), (episode + 1) * len(engines))
        self.slots[rows] = empty_slots()
        missing = self.not_applied(action)
        cell["tier"] = 0 if "quantization_tier" in missing else TIERS.index(action.quantization_tier.value)
        cell["split"] = action.prefill_decode_split and "prefill_decode_split" not in missing
        roles = np.where(np.arange(len(engines)) < cell["prefill_engines"], PREFILL, DECODE)
        engines["role"] = engines["next_role"] = roles if cell["split"] else COLOCATED
        engines["tier"] = engines["next_tier"] = cell["tier"]
        self.windows[episode] = idle_window(cell, len(engines))

    def not_applied(self, action: ServeAction) -> dict[str, str]:
        """Fields of an action that have no effect on these cells, with the reason."""
        return self._missing(action.batch_cap, action.quantization_tier.value, action.prefill_decode_split)

    def ignored(self, episode: int, action: NDArray[np.void]) -> dict[str, str]:
        """Fields of an episode's last action that had no effect: as `not_applied`, in every window."""
        codes = action.item()  # at once: field by field takes five times as long
        return self._missing(codes[_BATCH_CAP], TIERS[codes[_TIER]], bool(codes[_SPLIT]))

    def _missing(self, batch_cap: int, tier: str, split: bool) -> dict[str, str]:
        missing = {}
        budget = int(self.engines["token_budget"][0, 0])
        if batch_cap > budget:
            missing["batch_cap"] = f"{budget} tokens an iteration are room for {budget} running sequences"
        if not self.cells["has_tier"][0, TIERS.index(tier)]:
            missing["quantization_tier"] = f"profile '{self.profile.name}' has no {tier} weights"
        if split and self._no_split:
            missing["prefill_decode_split"] = self._no_split
        return missing

    def capabilities(self) -> dict[str, str]:
        """Nothing to say: every field is applied in the cell itself."""
        return {}

    def notes(self) -> dict[str, Any]:
        """Nothing to say beside the records."""
        return {}

    def snapshot(self) -> bytes:
        """The exact state of all episodes, for `restore` on a batch like this one."""
        return pickle.dumps(self.__getstate__())

    def restore(self, snapshot: bytes) -> None:
        """Return to a state that `snapshot` of this process gave: never load one from an untrusted source."""
        vars(self).update(pickle.loads(snapshot))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs; the kernel's view of the records is of these records alone."""
        return {**vars(self), "_records": None}

    def close(self) -> None:
        """Nothing is held that needs it."""

    def serve(
        self, actions: NDArray[np.void], window_s: float, which: NDArray[np.bool_] | None = None
    ) -> NDArray[np.void]:
        """Apply one action to each episode and serve all for `window_s` seconds.

        Args:
            actions: ACTION[episode].
            window_s: length of the window (s; inf: until nothing is left).
            which: bool[episode], the episodes to serve (default: all); the others stay as they are.

        Returns:
            WINDOW[episode], the batch's own `windows`: the next call overwrites it.

        Raises:
            InputError: an episode is over, the window is not positive, or the actions are no such records.
        """
        if (self._over if which is None else self._over & which).any():
            raise InputError("the episodes are over: what was unfinished has failed")
        if not window_s > 0:
            raise InputError(f"expected seconds > 0, found {window_s}", field="window_s")
        if len(actions) != len(self.cells):
            raise InputError(f"expected {len(self.cells)}, found {len(actions)}", field="actions")
        if actions.dtype != ACTION:
            raise InputError(f"expected ACTION records, found {actions.dtype}", field="actions")
        start_ps = self._now_ps
        until_s = self.now_s + window_s
        until_ps = to_ps(until_s)
        if which is None:
            self.now_s, self._now_ps = until_s, until_ps
        else:
            self.now_s = np.where(which, until_s, self.now_s)
            self._now_ps = np.where(which, until_ps, start_ps)
            until_ps[~which] = -1
        if self._records is None:
            self._records = self._batch()
        batch = self._records
        if not actions.flags.carray:
            actions = np.array(actions)  # the kernel is compiled for one layout
        kernel.serve_batch(batch, actions, start_ps, until_ps)
        return self.windows

    def _batch(self) -> Batch:
        """The kernel's view of all records."""
        episodes = len(self.cells)
        return Batch(
            engines=self.engines,
            slots=self.slots,
            cells=self.cells,
            windows=self.windows,
            window_words=self.windows.view(np.int64).reshape(episodes, -1),
            sums=self.sums,
            sum_words=self.sums.view(np.int64).reshape(episodes, -1),
            first=self._first,
            requests=self.requests,
            outcomes=self.outcomes,
            tenants=self.tenants,
            accept=self._accept,
            queue=self.queue,
            nodes=self.nodes,
            table=self.table,
            prefix_offsets=self.prefix_offsets,
            prefix_ids=self.prefix_ids,
            transfers=self.transfers,
            retries=self.retries,
            cost=self._cost,
            actions=np.zeros(episodes, ACTION),
            start_ps=np.zeros(episodes, np.int64),
            until_ps=np.zeros(episodes, np.int64),
            board=kernel.new_board(min(self.threads, episodes), episodes),
        )

    def serve_each(self, actions: Sequence[ServeAction], window_s: float) -> list[WindowRecord]:
        """As `serve` for all episodes, with actions and records of the schema."""
        self.serve(to_array(actions), window_s)
        return [self.record(episode, action) for episode, action in enumerate(actions)]

    def record(self, episode: int, action: ServeAction) -> WindowRecord:
        """The record of an episode's last window, in which `action` was set."""
        sums = self.sums[episode]
        return WindowRecord.of(
            self.windows[episode],
            len(self._tenants),
            sums["ttft_histogram"],
            sums["gap_histogram"],
            self.not_applied(action),
        )

    def fail_unfinished(self) -> int:
        """End the episodes here: what has arrived and is not over fails; returns how many requests did."""
        total = 0
        for episode, now_s in enumerate(self.now_s):
            part = slice(self._first[episode], self._first[episode] + self.cells["requests"][episode])
            requests, outcomes = self.requests[part], self.outcomes[part]
            unfinished = np.isin(outcomes["status"], (WAITING, RUNNING, TRANSFER, RETRYING))
            # served out: the end is when the last engine stopped
            end_ps = self.engines["busy_ps"][episode].max() if np.isinf(now_s) else self._now_ps[episode]
            outcomes["status"][unfinished] = FAILED
            outcomes["finish_ps"][unfinished] = np.maximum(end_ps, requests["arrival_ps"][unfinished])
            self._over[episode] |= unfinished.any()
            total += int(unfinished.sum())
        return total

    def outcomes_of(self, episode: int) -> Outcomes:
        """What became of each request of an episode so far."""
        low = self._first[episode]
        high = low + self.cells["requests"][episode]
        return outcomes_of(self.requests[low:high], self.outcomes[low:high])


class Simulator:
    """One cell that serves one workload: a batch of one. See `SimulatorBatch` for the arguments.

    Example:
        >>> simulator = Simulator(load_profile("h100-llama-3.1-8b"), open_workload("gamma://?rate=8"))
        >>> record = simulator.serve(ServeAction(batch_cap=64), window_s=10.0)
        >>> simulator.serve_out().ttft_s.mean()
    """

    def __init__(self, profile: Profile, workload: Workload, **cell: Any) -> None:
        self.batch = SimulatorBatch(profile, [workload], **cell)
        self._action = cell.get("action") or ServeAction()

    @property
    def now_s(self) -> float:
        """Time up to which the cell has served (s)."""
        return float(self.batch.now_s[0])

    def serve(self, action: ServeAction, window_s: float) -> WindowRecord:
        """Apply an action, serve for `window_s` seconds (inf: until nothing is left), tell what happened."""
        self._action = action
        return self.batch.serve_each([action], window_s)[0]

    def serve_out(self) -> Outcomes:
        """Serve all that is left under the last action; a request that never fits its memory limit fails."""
        self.serve(self._action, float("inf"))
        self.batch.fail_unfinished()
        return self.outcomes()

    def outcomes(self) -> Outcomes:
        """What became of each request so far."""
        return self.batch.outcomes_of(0)
