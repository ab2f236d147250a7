"""OpenEnv's validator, runtime level, on an image that is already built."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

from checks import expect
from container_engines import Engine, command
from openenv.validation import Level, Verdict, run_validation
from openenv.validation.manifest import ExecutionDeclaration
from openenv.validation.providers._netns import HELPER_IMAGE
from openenv.validation.providers.docker import DockerValidationProvider
from openenv.validation.types import CheckStatus


class BuiltImage(DockerValidationProvider):  # type: ignore[misc] # OpenEnv is untyped here
    """OpenEnv's provider, with an image in the place of its build.

    Args:
        image: id, with its sha256.
        helper: image that looks at the network, by its digest.
    """

    def __init__(self, image: str, helper: str) -> None:
        super().__init__(helper_image=helper)
        self._image = image

    def build(self, root: Path, execution: ExecutionDeclaration) -> str:
        """The image."""
        return self._image


def validate_image(engine: Engine, image: str, checkout: Path, helper: str | None) -> str:
    """Validate an image.

    Args:
        engine: docker or podman; the validator calls `docker`, which it finds to be either.
        image: its name.
        checkout: with the manifest and its plan.
        helper: image that looks at the network, by its digest (default: OpenEnv's, which is pulled).

    Returns:
        Which checks passed, and how many are not implemented in OpenEnv or were skipped.

    Raises:
        Problem: one failed.
    """
    found = command(engine.name, "image", "inspect", "--format={{.Id}}", image)
    identity = found if found.startswith("sha256:") else f"sha256:{found}"
    provider = BuiltImage(identity, helper or HELPER_IMAGE)
    with tempfile.TemporaryDirectory() as folder:
        program = shutil.which(engine.name)
        assert program is not None
        (Path(folder) / "docker").symlink_to(program)
        with patch.dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}"):
            report = run_validation(checkout, max_level=Level.RUNTIME, provider=provider)
    by_status = {
        status: [result for result in report.results if result.status is status] for status in CheckStatus
    }
    bad = by_status[CheckStatus.FAIL] + by_status[CheckStatus.ERROR]
    expect(not bad, "; ".join(f"{result.check_id}: {', '.join(result.evidence)}" for result in bad))
    expect(report.verdict is not Verdict.FAIL, f"verdict {report.verdict.value}")
    skipped = [
        result.check_id
        for result in by_status[CheckStatus.SKIP]
        if "grader not implemented in this build" not in result.evidence
    ]
    expect(not skipped, f"skipped: {', '.join(skipped)}")
    passed = ", ".join(result.check_id for result in by_status[CheckStatus.PASS])
    return f"{passed}; not implemented in OpenEnv: {len(by_status[CheckStatus.SKIP])}"
