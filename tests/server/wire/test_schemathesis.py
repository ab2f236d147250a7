"""Whatever fits or breaks the published schema gets an answer that the schema announces, and never a 5xx."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server._playing import BEGIN, client, ok

OURS = {"/reset", "/step", "/step_n", "/state", "/log", "/session", "/grader", "/tasks"}
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


NOT_HERE = {"/baseline"}
"""Plays for seconds; it is tested with the agents."""


@pytest.fixture(scope="module")
def operations(tight_url):
    schema = schemathesis.openapi.from_url(f"{tight_url}/openapi.json")
    found = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path not in NOT_HERE:
            found[f"{operation.method.upper()} {operation.path}"] = operation
    return found


def test_every_route_answers_as_its_schema_says(operations, tight_url):
    assert {operation.path for operation in operations.values()} >= OURS
    with client(tight_url) as http:
        faults = {name: fault for name, operation in operations.items() if (fault := attack(operation, http))}
        assert ok(http.get("/health")) == {"status": "healthy"}
    assert faults == {}


def attack(operation, http) -> str | None:
    """The fault that was found, in an operation that is sent what fits its schema and what does not."""
    # OpenEnv's own routes do not announce all of their statuses.
    checks = [not_a_server_error, *(CHECKS if operation.path in OURS else ())]
    right, wrong = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)

    @settings(
        max_examples=40,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=right | wrong)
    def answers(case) -> None:
        http.cookies.clear()
        ok(http.post("/reset", json=BEGIN))
        named = {"X-Session-Id": http.cookies["llmserve_session"]}
        try:
            case.call_and_validate(checks=checks, headers=named, timeout=60)
        finally:
            http.delete("/session")

    try:
        answers()
    except FailureGroup as failures:
        return str(failures)
    return None
