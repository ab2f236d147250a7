"""Profiles as files: what is written is read back, and what cannot be used is refused by place."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llmserve_env.cli import main
from llmserve_env.errors import InputError
from llmserve_env.hardware import list_profiles, load_profile
from llmserve_env.hardware.profile import TIERS, parse_profile, profile_toml, save_profile

NAME = "rtx4090-llama-3.1-8b"


@pytest.mark.parametrize("name", list_profiles())
def test_a_shipped_profile_survives_writing_and_reading(name, tmp_path):
    profile = load_profile(name)
    path = tmp_path / "copy.toml"
    save_profile(profile, path)
    assert load_profile(path) == profile
    assert profile.name == name
    assert profile.tier_names[0] == TIERS[0]


def test_texts_with_quotes_and_lines_survive():
    profile = load_profile(NAME).model_copy(update={"notes": ('a "quoted" \\ note', "two\nlines, one\ttab")})
    assert parse_profile(profile_toml(profile), "x.toml") == profile


def test_unknown_name_lists_the_shipped_ones():
    with pytest.raises(InputError, match=f"unknown profile 'h900'.*{NAME}"):
        load_profile("h900")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.toml: cannot be read"):
        load_profile(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("old", "new", "field", "reason"),
    [
        ("layers = 32", "", "model.layers", "required"),
        ("layers = 32", "layers = 0", "model.layers", "greater than 0, found 0"),
        ("layers = 32", 'layers = "many"', "model.layers", "valid integer.*found 'many'"),
        ("layers = 32", "layers = 32\nlayer = 32", "model.layer", "not permitted"),
        ("count = 1", "count = 2", None, r"\[link\] table is needed"),
        (
            "gpu_memory_utilization = 0.9",
            "gpu_memory_utilization = 1.5",
            "engine.gpu_memory_util",
            "equal to 1",
        ),
        ("head_sequences = [1, ", "head_sequences = [999, ", "latency.head_sequences", "ascending"),
        ("head_sequences = [1, ", "head_sequences = [", "latency", "head_us has .* along head_sequences"),
        ("head_us = [", "head_us = [-", "latency.head_us.0", "greater than or equal to 0"),
        ("head_us = [", "head_us = [inf, ", "latency.head_us.0", "finite"),
        ("  [298.", "  [1.0, 298.", "latency", r"decode_us\[0\] has 9 entries along decode_kv_tokens"),
    ],
)
def test_a_broken_profile_is_refused_by_file_and_field(old, new, field, reason, tmp_path):
    text = profile_toml(load_profile(NAME))
    assert old in text
    path = tmp_path / "broken.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=reason) as caught:
        load_profile(path)
    assert caught.value.file == str(path)
    assert (caught.value.field or "").startswith(field or "")


def test_broken_syntax_names_the_line():
    with pytest.raises(InputError, match=r"x\.toml:2: is not TOML"):
        parse_profile('name = "x"\n= 3\n', "x.toml")


def test_the_package_imports_no_heavy_library():
    code = (
        "import sys, llmserve_env.hardware; print(sorted({'pydantic', 'scipy', 'numba'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_command_lists_the_shipped_profiles(capsys, tmp_path):
    assert main(["profiles", "--json", str(tmp_path / "all.json")]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "all.json").read_text())
    assert [row["name"] for row in figures] == list_profiles()
    for row in figures:
        assert row["name"] in printed
        assert 0 < row["decode_ms_batch_1"] < row["decode_ms_batch_32"] < row["decode_ms_batch_128"]
        assert row["kv_tokens"] > 0


def test_the_command_shows_one_with_its_sources(capsys):
    assert main(["profiles", NAME]) == 0
    printed = capsys.readouterr().out
    profile = load_profile(NAME)
    for table in (profile.gpu, profile.model, profile.engine, profile.tiers.FP16, profile.latency):
        assert table.source in printed
    assert main(["profiles", "h900"]) == 2
