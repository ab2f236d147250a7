"""Checks of the files of a checkout: OpenEnv's manifest, Dockerfile, lock, README, weight of the import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from checks import Check, Problem, expect
from openenv.validation import Level, Verdict, run_validation
from openenv.validation.manifest import NormalizedManifestV2
from openenv.validation.parsers.openenv_yaml import OpenEnvYamlParser
from openenv.validation.runtime.contracts import RuntimePlan, load_runtime_plan
from openenv.validation.types import CheckStatus
from packaging.requirements import Requirement

import llmserve_env

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
_FRONT_MATTER = ("title", "emoji", "colorFrom", "colorTo", "sdk", "app_port", "license", "tags")
_HEAVY = ("numba", "scipy", "matplotlib", "torch", "openenv", "fastapi", "gradio")


def checkout_checks(root: Path) -> list[Check]:
    """All of them, for the checkout in a folder."""
    return [
        ("openenv.yaml and its plan", lambda: check_manifest(root)),
        ("openenv validate", lambda: check_validate(root)),
        ("Dockerfile", lambda: check_dockerfile(root)),
        ("requirements-server.lock", lambda: check_lock(root)),
        ("README.md front matter", lambda: check_front_matter(root)),
        ("import llmserve_env is light", lambda: check_light_import(root)),
    ]


def read_manifest(root: Path) -> tuple[NormalizedManifestV2, RuntimePlan]:
    """OpenEnv's manifest of a checkout and the plan that it names."""
    manifest = OpenEnvYamlParser().parse(root)
    if not isinstance(manifest, NormalizedManifestV2):
        raise Problem("openenv.yaml: expected validation.execution")
    return manifest, load_runtime_plan(root, manifest.execution)


def check_manifest(root: Path) -> str:
    """The manifest is valid, speaks of this package and version, and its plan has actions that can be."""
    manifest, plan = read_manifest(root)
    top = yaml.safe_load((root / "openenv.yaml").read_text(encoding="utf-8"))
    wanted = {"spec_version": 1, "type": "space", "runtime": "fastapi", "app": "server.app:app", "port": 8000}
    wanted |= {"name": "llmserve_env", "version": llmserve_env.__version__}
    for key, value in wanted.items():
        expect(top.get(key) == value, f"openenv.yaml: {key}: expected {value!r}, found {top.get(key)!r}")
    for action in plan.actions:
        llmserve_env.ServeAction.model_validate(action)
    return f"reward {list(manifest.reward.range)}, {len(plan.actions)} actions"


def check_validate(root: Path) -> str:
    """`openenv validate --skip-build`, of a copy: it takes no links, and virtual environments have them."""
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(root, Path(folder))
        report = run_validation(Path(folder), max_level=Level.SEMANTIC, skip_build=True)
    of = {status: [found for found in report.results if found.status is status] for status in CheckStatus}
    bad = of[CheckStatus.FAIL] + of[CheckStatus.ERROR]
    expect(not bad, "; ".join(f"{found.check_id}: {', '.join(found.evidence)}" for found in bad))
    expect(report.verdict is not Verdict.FAIL, f"verdict {report.verdict.value}")
    passed = ", ".join(found.check_id for found in of[CheckStatus.PASS])
    return f"{passed}; skipped without a container: {len(of[CheckStatus.SKIP])}"


def copy_checkout(root: Path, folder: Path) -> None:
    """Copy what git knows of, or would: tracked files and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # else it is deleted, and that not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


def check_dockerfile(root: Path) -> str:
    """What can be said of the Dockerfile without building it."""
    text = (root / "Dockerfile").read_text(encoding="utf-8")
    ignored = (root / ".dockerignore").read_text(encoding="utf-8")
    problems = dockerfile_problems(text, ignored, root)
    expect(not problems, "; ".join(problems))
    return "no root, both ports, health check, no volume, no index"


def dockerfile_problems(text: str, ignored: str, root: Path) -> list[str]:
    """What is wrong with a Dockerfile.

    Args:
        text: of the Dockerfile.
        ignored: of the .dockerignore.
        root: the folder that it is built in.
    """
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M))
    of: dict[str, list[str]] = {}
    for line in joined.splitlines():
        instruction, _, rest = line.strip().partition(" ")
        of.setdefault(instruction.upper(), []).append(rest.strip())
    last = joined[joined.rfind("\nFROM ") :]
    froms, users = of.get("FROM", []), re.findall(r"^USER (\S+)", last, re.M)
    ports = {port for line in of.get("EXPOSE", []) for port in line.split()}
    started = " ".join(of.get("ENTRYPOINT", []) + of.get("CMD", []))
    hosts = re.findall(r"https?://(?!127\.0\.0\.1|localhost)[^\s'\"]+|--(?:extra-)?index-url\S*", joined)
    faults = {
        "FROM: expected ${BASE} and ARG BASE=python:3.*": not re.search(r"^ARG BASE=python:3\.", text, re.M)
        or not froms
        or any(name.split()[0] != "${BASE}" for name in froms),
        f"USER: expected a number other than 0, found {users}": not users
        or not re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]),
        f"EXPOSE: expected 8000 and 7860, found {sorted(ports)}": not ports >= {"8000", "7860"},
        "HEALTHCHECK is missing": "HEALTHCHECK" not in of,
        "VOLUME: OpenEnv's validator refuses persistent mounts": "VOLUME" in of,
        "the server must listen on 8000 and 7860": not {"8000", "7860"} <= set(re.findall(r"\d+", started)),
        "a shell must exec the server, or signals end with it": "/sh" in started and "exec " not in started,
        "ENV_README_PATH: expected /app/README.md": "ENV_README_PATH=/app/README.md" not in last,
        "pip: expected --require-hashes": "--require-hashes" not in joined,
        f"hosts do not belong here: {', '.join(hosts)}": bool(hosts),
    }
    return [fault for fault, is_so in faults.items() if is_so] + _copy_problems(
        of.get("COPY", []), ignored, root
    )


def _copy_problems(copies: list[str], ignored: str, root: Path) -> list[str]:
    patterns = ignored.splitlines()
    shown = [pattern[1:].rstrip("/") for pattern in patterns if pattern.startswith("!")]
    problems = []
    for line in copies:
        if "--from=" in line:
            continue
        for source in line.split()[:-1]:
            if not (root / source).exists():
                problems.append(f"COPY: there is no {source}")
            elif "*" in patterns and not any(fnmatch(source.rstrip("/"), pattern) for pattern in shown):
                problems.append(f".dockerignore leaves out {source}")
    return problems


def check_lock(root: Path) -> str:
    """Every requirement of the image is pinned with hashes, is no torch, and is what pyproject.toml wants."""
    pinned = read_lock((root / "requirements-server.lock").read_text(encoding="utf-8"))
    unwanted = [name for name in pinned if name == "torch" or name.startswith(("nvidia-", "cuda-"))]
    expect(not unwanted, f"does not belong into the image: {', '.join(unwanted)}")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for wanted in project["dependencies"] + project["optional-dependencies"]["server"]:
        requirement = Requirement(wanted)
        versions = pinned.get(_normal(requirement.name), [])
        fits = versions and all(requirement.specifier.contains(version) for version in versions)
        expect(fits, f"pyproject.toml wants {wanted}, the lock has {versions or 'none'}: make lock")
    return f"{len(pinned)} packages"


def read_lock(text: str) -> dict[str, list[str]]:
    """Versions by package of a lock file; a package has several where they depend on the Python.

    Raises:
        Problem: one has no pin, or no hashes.
    """
    pinned: dict[str, list[str]] = {}
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for block in re.split(r"\n(?=\S)", lines.strip()):
        requirement = Requirement(block.split("\\\n")[0].strip())
        pins = [part.version for part in requirement.specifier if part.operator == "=="]
        expect(len(pins) == 1 and "--hash=sha256:" in block, f"{requirement.name}: expected pin and hashes")
        pinned.setdefault(_normal(requirement.name), []).append(pins[0])
    return pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_front_matter(root: Path) -> str:
    """README.md begins with what a Docker Space needs."""
    found = re.match(r"---\n(.*?)\n---\n", (root / "README.md").read_text(encoding="utf-8"), re.S)
    if found is None:
        raise Problem("README.md: expected YAML between two lines of ---")
    header = yaml.safe_load(found[1])
    for key in _FRONT_MATTER:
        expect(header.get(key), f"README.md: {key} is missing")
    expect(header["sdk"] == "docker", f"README.md: sdk: expected docker, found {header['sdk']!r}")
    expect(header["app_port"] in (7860, 8000), f"README.md: app_port: found {header['app_port']}")
    expect("openenv" in header["tags"], "README.md: tags: expected openenv among them")
    for key in ("colorFrom", "colorTo"):
        expect(header[key] in _COLOURS, f"README.md: {key}: expected one of {', '.join(_COLOURS)}")
    short = header.get("short_description", "")
    expect(len(short) <= 60, f"README.md: short_description: at most 60 characters, found {len(short)}")
    return f"{header['title']}, port {header['app_port']}"


def check_light_import(root: Path) -> str:
    """Importing the package imports nothing heavy."""
    code = (
        "import sys, time; begun = time.perf_counter(); import llmserve_env; "
        f"print(f'{{time.perf_counter() - begun:.2f}}', *sorted({set(_HEAVY)} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    expect(ran.returncode == 0, ran.stderr[-300:])
    seconds, *heavy = ran.stdout.split()
    expect(not heavy, f"it imports {', '.join(heavy)}")
    return f"{seconds} s"
