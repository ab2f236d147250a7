"""What is shipped beside the code: manifest and plan of OpenEnv, Dockerfile, lock, the front matter."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import llmserve_env

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text()
LOCKED = "numpy==2.0.0 ; python_full_version >= '3.11' \\\n    --hash=sha256:00\n"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules of scripts/, which is no package."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import checkout_checks
    import checks
    import container_engines

    return SimpleNamespace(checkout=checkout_checks, checks=checks, engines=container_engines)


def changed(tmp_path: Path, name: str, change: Callable[[str], str]) -> Path:
    """A folder with the shipped files, one of them changed."""
    for shipped in ("openenv.yaml", "README.md", "pyproject.toml", "requirements-server.lock"):
        shutil.copy(ROOT / shipped, tmp_path)
    shutil.copytree(ROOT / "validation", tmp_path / "validation")
    text = (tmp_path / name).read_text()
    assert change(text) != text
    (tmp_path / name).write_text(change(text))
    return tmp_path


def test_the_checkout_passes(scripts):
    rows = scripts.checks.run_checks(scripts.checkout.checkout_checks(ROOT))
    assert len(rows) == 6
    assert [row.note for row in rows if not row.passed] == []


def test_no_reward_can_leave_the_declared_range(scripts):
    manifest, _ = scripts.checkout.read_manifest(ROOT)
    # All of an episode's demand met in one of its windows is worth as many as it has.
    longest = max(llmserve_env.load_task(name).windows for name in llmserve_env.list_tasks())
    assert manifest.reward.range == (0.0, longest)


def test_the_plan_changes_what_it_sets_and_reaches_the_end(scripts):
    _, plan = scripts.checkout.read_manifest(ROOT)
    actions = [llmserve_env.ServeAction.model_validate(action) for action in plan.actions]
    for control in set().union(*plan.actions):
        assert len({getattr(action, control) for action in actions}) > 1, control
    task = llmserve_env.load_task(plan.reset.options["task_id"], horizon_s=plan.reset.options["horizon_s"])
    assert task.windows == len(actions)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("openenv.yaml", lambda text: text.replace("version: 0.1.0", "version: 9.9.9"), "version"),
        ("openenv.yaml", lambda text: text.replace("port: 8000", "port: 80"), "port"),
        ("openenv.yaml", lambda text: text.replace("oracle_tolerance: 0.1", "oracle: 0.1"), "oracle"),
        (
            "validation/runtime.json",
            lambda text: text.replace('"batch_cap": 64', '"batch_cap": 0'),
            "batch_cap",
        ),
        ("validation/runtime.json", lambda text: text.replace('"INT4"', '"INT2"'), "INT2"),
    ],
)
def test_a_wrong_manifest_is_found(scripts, tmp_path, name, change, reason):
    with pytest.raises(Exception, match=reason):
        scripts.checkout.check_manifest(changed(tmp_path, name, change))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("ARG BASE=python:3.11-slim", "ARG BASE", "FROM"),
        ("\nFROM ${BASE}\n", "\nFROM python:3.11\n", "FROM"),
        ("USER 65532:65532", "USER root", "USER"),
        ("USER 65532:65532", "USER 0", "USER"),
        ("USER 65532:65532\n", "", "USER"),
        ("EXPOSE 8000 7860", "EXPOSE 8000", "EXPOSE"),
        ("HEALTHCHECK --interval", "# HEALTHCHECK --interval", "HEALTHCHECK"),
        ("WORKDIR /app", "VOLUME /app", "VOLUME"),
        ("--port 7860", "", "listen"),
        ("exec python", "python", "exec"),
        ("ENV_README_PATH=/app/README.md", "A=b", "ENV_README_PATH"),
        ("--require-hashes", "", "hashes"),
        ("--no-deps --require", "--index-url=https://example.org/simple --require", "hosts"),
        ("COPY pyproject.toml", "COPY setup.py pyproject.toml", "no setup.py"),
        ("COPY server server", "COPY docs docs", "leaves out docs"),
    ],
)
def test_a_wrong_dockerfile_is_found(scripts, old, new, reason):
    assert old in DOCKERFILE
    problems = scripts.checkout.dockerfile_problems(DOCKERFILE.replace(old, new), IGNORED, ROOT)
    assert reason in "; ".join(problems)


def test_the_build_sees_what_it_copies_and_nothing_else():
    shown = {line[1:] for line in IGNORED.splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    assert shown == {source for line in copied for source in line if not source.startswith(("--", "/"))}


def test_further_arguments_reach_the_server(tmp_path):
    started = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.M)[0])
    for name in ("cp", "python"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    ran = subprocess.run(
        [*started, "--journal", "/a folder"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == [
        "cp -R /opt/numba /tmp/",
        "python -m server.app --host 0.0.0.0 --port 8000 --port 7860 --journal /a folder",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LOCKED + "torch\n", "torch: expected pin"),
        (LOCKED + "torch>=2 \\\n    --hash=sha256:00\n", "torch: expected pin"),
        (LOCKED + "torch==2.0.0\n", "torch: expected pin"),
    ],
)
def test_a_requirement_without_pin_or_hash_is_found(scripts, text, reason):
    assert scripts.checkout.read_lock(LOCKED) == {"numpy": ["2.0.0"]}
    with pytest.raises(scripts.checks.Problem, match=reason):
        scripts.checkout.read_lock(text)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("requirements-server.lock", lambda text: text + LOCKED.replace("numpy", "torch"), "torch"),
        ("pyproject.toml", lambda text: text.replace('"numba>=0.60"', '"numba>=99"'), "numba>=99"),
        ("pyproject.toml", lambda text: text.replace('"tyro>=0.9"', '"absent>=1"'), "absent>=1"),
    ],
)
def test_a_lock_out_of_step_is_found(scripts, tmp_path, name, change, reason):
    with pytest.raises(scripts.checks.Problem, match=reason):
        scripts.checkout.check_lock(changed(tmp_path, name, change))


def test_the_lock_names_no_index(scripts):
    lock = (ROOT / "requirements-server.lock").read_text()
    assert "://" not in lock
    assert "index" not in lock.replace("--index", "index-").split("\n", 3)[0]


FRONT_MATTER = {
    "title": "LLMServe",
    "emoji": "x",
    "colorFrom": "blue",
    "colorTo": "red",
    "sdk": "docker",
    "app_port": 7860,
    "license": "apache-2.0",
    "tags": ["openenv"],
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"app_port": 80}, "app_port"),
        ({"sdk": "gradio"}, "sdk"),
        ({"tags": ["rl"]}, "tags"),
        ({"colorTo": "white"}, "colorTo"),
        ({"license": None}, "license"),
        ({"short_description": "x" * 61}, "short_description"),
    ],
)
def test_wrong_front_matter_is_found(scripts, tmp_path, change, reason):
    readme = tmp_path / "README.md"
    readme.write_text(f"---\n{yaml.safe_dump(FRONT_MATTER)}---\n# Title\n")
    assert scripts.checkout.check_front_matter(tmp_path)
    readme.write_text(f"---\n{yaml.safe_dump(FRONT_MATTER | change)}---\n# Title\n")
    with pytest.raises(scripts.checks.Problem, match=reason):
        scripts.checkout.check_front_matter(tmp_path)


def test_validation_sees_what_is_tracked(scripts, tmp_path):
    scripts.checkout.copy_checkout(ROOT, tmp_path)
    assert (tmp_path / "openenv.yaml").exists()
    assert not (tmp_path / ".venv").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_without_an_engine_its_user_is_told_what_is_missing(scripts, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(scripts.checks.Problem, match=r"docker: .*podman: .*buildah: "):
        scripts.engines.find_engine("auto")
