"""What a code host reads: the workflow and the form for reports."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def read(path: Path) -> Any:
    # YAML 1.1 takes the key `on` for true, GitHub does not.
    return yaml.load(path.read_text(), yaml.BaseLoader)


def test_workflow_runs_ci_on_both_debians() -> None:
    """By the same command as everywhere, and nothing for a pull request of a stranger."""
    workflow = read(GITHUB / "workflows/ci.yaml")
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"] == {"debian": ["debian-12", "debian-13"]}
    assert [step["run"] for step in job["steps"] if "run" in step] == ["sudo .ci/run"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o100
    assert workflow["on"] == ["push", "workflow_dispatch"]


@pytest.mark.parametrize("page", ["docs/troubleshooting.md", "docs/security.md", "SECURITY.md"])
def test_form_names_pages_that_exist(page: str) -> None:
    assert page in (GITHUB / "ISSUE_TEMPLATE/fault.yaml").read_text()
    assert (ROOT / page).exists()


def test_form_asks_for_what_doctor_prints() -> None:
    """Each field has a label of its own, and what kabpf finds out itself must be there."""
    fields = read(GITHUB / "ISSUE_TEMPLATE/fault.yaml")["body"][1:]
    labels = [field["attributes"]["label"] for field in fields]
    assert len(set(labels)) == len(labels)
    (doctor,) = (field for field in fields if field["id"] == "doctor")
    assert doctor["attributes"]["label"] == "kabpfctl doctor --json"
    assert doctor["validations"]["required"] == "true"
