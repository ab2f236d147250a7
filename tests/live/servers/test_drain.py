"""Upstreams that get nothing by command."""

from __future__ import annotations

import logging

import pytest

from llmserve_env.errors import InputError
from llmserve_env.live.servers.drain import DrainFile
from llmserve_env.live.servers.upstreams import Upstream


def draining(upstreams):
    return [each.health.draining for each in upstreams]


def test_a_file_drains_and_brings_back(tmp_path, caplog):
    path = tmp_path / "drained"
    upstreams = [Upstream("http://a:1"), Upstream("http://user:secret@b:2/v1")]
    drain = DrainFile(path, upstreams)
    drain.look()
    assert draining(upstreams) == [False, False]
    upstreams[1].running = 2
    path.write_text("# maintenance\n\n  http://b:2/v1/  # until noon\n")
    with caplog.at_level(logging.WARNING):
        drain.look()
        drain.look()
        upstreams[1].running = 0
        drain.look()
        drain.look()
        path.unlink()
        drain.look()
    assert [each.message for each in caplog.records] == [
        "http://b:2 drains: 2 under way",
        "http://b:2 has drained",
        "http://b:2 gets requests again",
    ]
    assert draining(upstreams) == [False, False]


def test_a_line_that_names_nobody_is_told_and_the_others_count(tmp_path):
    path = tmp_path / "drained"
    upstreams = [Upstream("http://a:1"), Upstream("http://b:2")]
    path.write_text("http://a:1\nhttp://c:3\nnone\n")
    with pytest.raises(InputError, match="line 2") as caught:
        DrainFile(path, upstreams).look()
    assert caught.value.file == str(path)
    assert draining(upstreams) == [True, False]


def test_a_file_that_cannot_be_read_changes_nothing(tmp_path):
    path = tmp_path / "drained"
    upstreams = [Upstream("http://a:1")]
    drain = DrainFile(path, upstreams)
    path.write_text("http://a:1")
    drain.look()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        drain.look()
    assert draining(upstreams) == [True]
