"""Features and figures as declared: names, groups, and what each shows, computed again one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from llmserve_env.backend import FIGURES, MAX_TENANTS, WINDOW, figure_meanings
from llmserve_env.controls import CONTROLS
from llmserve_env.errors import InputError
from llmserve_env.observation import FEATURES, TENANT_SLOTS, Observer, Reader, feature_names, features
from llmserve_env.observation.features import distinct
from llmserve_env.recording import record_bytes
from llmserve_env.schema import EXTRA_GROUPS, GROUPS
from llmserve_env.tasks import load_task

TASK = load_task("adversarial_multitenant")


def drawn(count, seed=0):
    """WINDOW[count] with anything in it, ACTION[count], and how many windows were served."""
    rng = np.random.default_rng(seed)
    windows, tenants = np.zeros(count, WINDOW), len(TASK.tenants)
    for name, figure in FIGURES.items():
        shape = windows[name].shape
        if WINDOW[name].base == np.int64:
            values = rng.integers(0, 300, shape) * (rng.random(shape) < 0.8)
        else:
            values = rng.exponential(1.0, shape)
        if figure.kind in ("mean", "percentile") and figure.unit == "s":
            values[rng.random(shape) < 0.3] = np.nan
        if "tenant" in figure.axes:
            values[..., tenants:] = 0
        windows[name] = values
    windows["output_tokens"] -= 40
    actions = TASK.grid.actions(rng.integers(TASK.grid.nvec, size=(count, len(TASK.grid.nvec))))
    return windows, actions, rng.integers(0, TASK.windows + 1, count)


def shown(feature, window, action, step):
    """What an entry of the observation is to be, in plain numbers."""
    if feature.slot is not None and feature.slot >= len(TASK.tenants):
        return 0.0
    tenant = None if feature.slot is None else TASK.tenants[feature.slot]

    def total(names):
        found = 0.0
        for name in names:
            if feature.source == "task":
                heaviest = max(each.weight for each in TASK.tenants)
                says = {"progress": step / TASK.windows}
                if tenant is not None:
                    says |= {"weight": tenant.weight / heaviest}
                    says |= {"ttft_slo_s": tenant.ttft_slo_s, "tpot_slo_s": tenant.tpot_slo_s}
                found += says[name]
            elif feature.source == "action":
                found += action[name].item()
            else:
                index = feature.index if feature.slot is None else feature.slot
                value = window[name] if index is None else window[name][index]
                found += value.sum().item()
        return found

    value = total(feature.reads)
    if feature.whole:
        whole = total(feature.whole)
        value = value / whole if whole > 0 else feature.without
    if feature.code is not None:
        value = float(value == feature.code)
    engines = TASK.cell.engines
    if feature.per == "engine":
        value /= feature.top * engines
    elif feature.per == "ttft_slo":
        value /= feature.top * tenant.ttft_slo_s
    elif feature.per == "engine_s":
        value = value / feature.top * (1.0 / (TASK.window_s * engines))
    else:
        value /= feature.top
    if math.isnan(value):
        return 0.0
    value = max(value, 0.0)
    if feature.half is None:
        return min(value, 1.0)
    return 1.0 if math.isinf(value) else value / (value + feature.half)


def test_every_entry_shows_what_its_declaration_says():
    windows, actions, steps = drawn(40)
    found = Observer(TASK).of(windows, actions, steps)
    for column, feature in enumerate(features(TASK.groups)):
        expected = [
            np.float32(shown(feature, *row)) for row in zip(windows, actions, steps.tolist(), strict=True)
        ]
        assert found[:, column].tolist() == expected, feature.name
    assert found.dtype == np.float32
    assert (found >= 0).all()
    assert (found <= 1).all()
    alone = [
        Observer(TASK).of(windows[i : i + 1], actions[i : i + 1], steps[i : i + 1])[0] for i in range(40)
    ]
    assert np.array(alone).tobytes() == found.tobytes()


def test_features_have_names_of_their_own_and_known_groups():
    names = [feature.name for feature in FEATURES]
    assert len(set(names)) == len(names)
    for feature in FEATURES:
        assert feature.group in (*GROUPS, *EXTRA_GROUPS)
        known = {"window": FIGURES, "action": CONTROLS, "task": None}[feature.source]
        assert known is None or set(feature.reads + feature.whole) <= set(known)
    assert sum(feature.slot is not None for feature in FEATURES) % TENANT_SLOTS == 0


def test_a_task_shows_the_features_of_its_groups():
    assert TASK.groups == {*GROUPS}
    assert feature_names(TASK) == [feature.name for feature in FEATURES if feature.group in GROUPS]
    few = features({"latency", "controls"})
    assert {feature.group for feature in few} == {"latency", "controls"}
    with pytest.raises(InputError, match="extra_groups"):
        load_task("static_workload", extra_groups=["mood"])
    assert "extra_groups" not in TASK.model_dump()


def test_features_are_read_by_name():
    seen = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert Reader(["c", "a"], ["a", "b", "c"]).of(seen).tolist() == [[2, 0], [5, 3]]
    assert Reader(["a", "b", "c"], ["a", "b", "c"]).of(seen) is seen
    with pytest.raises(InputError, match="does not show d, e"):
        Reader(["a", "d", "e"], ["a", "b", "c"])


def test_figures_are_declared_whole():
    meanings = figure_meanings()
    assert list(meanings) == list(FIGURES) == list(WINDOW.names)
    for name, figure in FIGURES.items():
        assert meanings[name].endswith(".")
        assert figure.group in (*GROUPS, *EXTRA_GROUPS)
        assert ("tenant" in figure.axes) == (WINDOW[name].shape[-1:] == (MAX_TENANTS,))


def test_a_digest_holds_the_figures_of_the_groups_alone():
    windows, _, _ = drawn(2)
    other = windows[0].copy()
    other["oldest_wait_s"] += 1.0
    load, memory = (
        SimpleNamespace(tenants=TASK.tenants, groups=frozenset({name})) for name in ("load", "memory")
    )
    assert record_bytes(windows[0], load) != record_bytes(other, load)
    assert record_bytes(windows[0], memory) == record_bytes(other, memory)
    count = sum(figure.group == "memory" for figure in FIGURES.values())
    assert len(record_bytes(windows[0], memory)) == 8 * count
    assert len(record_bytes(windows[0], TASK)) < WINDOW.itemsize


def test_two_features_of_one_name_are_refused_with_what_both_read():
    one = FEATURES[0]
    with pytest.raises(ValueError, match=rf"called {one.name}: of .*{one.reads[0]}.* and another_control"):
        distinct((*FEATURES, replace(one, reads=("another_control",))))
