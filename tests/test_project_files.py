"""The files that package indexes, GitHub and citation managers read agree with the project."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

import versions
from fullattn.attention import native
from helpers import ROOT

tomllib = pytest.importorskip("tomllib")  # Python 3.11
yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.skipif(
    (ROOT / "PKG-INFO").exists(), reason="a source distribution has only some of these files"
)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAGES = ("SECURITY.md", "CONTRIBUTING.md")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def steps(workflow: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of all jobs, and jobs that are another workflow."""
    for job in workflow["jobs"].values():
        yield from job.get("steps", [job])


def pythons() -> list[str]:
    """Return the versions of Python in the classifiers."""
    found = (re.fullmatch(r".* :: Python :: (3\.\d+)", line) for line in PROJECT["classifiers"])
    return [match[1] for match in found if match]


# Metadata


def test_the_metadata_name_authors_and_links() -> None:
    assert PROJECT["authors"] == [{"name": "The fullattn authors"}]
    urls = PROJECT["urls"]
    assert set(urls) == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    for name in ("Documentation", "Changelog"):
        path = re.sub(r".*/(?:tree|blob)/main/", "", urls[name])
        assert (ROOT / path).exists(), path


def test_classifiers_agree_with_the_versions_of_python() -> None:
    assert len(set(PROJECT["classifiers"])) == len(PROJECT["classifiers"])
    assert not any(line.startswith("License ::") for line in PROJECT["classifiers"])  # SPDX has it
    assert PROJECT["license"] == "MIT"
    required = SpecifierSet(PROJECT["requires-python"])
    assert str(required) == f">={pythons()[0]}"
    assert all(version in required for version in pythons())


# Citation


def test_the_citation_is_of_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == PROJECT["authors"]
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Repository"]
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text("utf-8")
    bibtex = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", readme, re.MULTILINE))
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert bibtex == {
        "title": paper["title"],
        "author": " and ".join(names),
        "booktitle": paper["collection-title"],
        "volume": str(paper["volume"]),
        "number": str(paper["issue"]),
        "pages": f"{paper['start']}--{paper['end']}",
        "year": str(paper["year"]),
        "doi": paper["doi"],
    }


# Workflows and hooks


def test_there_are_workflows_and_templates() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "publish.yml", "wheels.yml"]
    assert [path.name for path in TEMPLATES] == ["bug.yml", "config.yml", "feature.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_pin_actions_and_may_write_nothing(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used
    for action in used:
        if action.startswith("./"):
            assert (ROOT / action).is_file(), action
        else:
            assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+(\.\d+)*", action), action


def test_ci_runs_the_targets_of_make() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "ci.yml")
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert set(workflow[True]) == {"push", "pull_request"}  # `on` is a boolean of YAML 1.1
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for name in ("lint", "test"):
        assert name in targets
        assert {"run": f"make {name}"} in workflow["jobs"][name]["steps"]
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    # On others `make versions` runs the core suite.
    assert set(pythons()) <= {*tested, *(each.python for each in versions.MATRIX)}
    assert all(version in SpecifierSet(PROJECT["requires-python"]) for version in tested)


def test_only_the_job_that_publishes_has_a_token() -> None:
    jobs = {
        f"{path.stem}/{name}": job["permissions"]
        for path in WORKFLOWS
        for name, job in read(path)["jobs"].items()
        if "permissions" in job
    }
    assert jobs == {"publish/publish": {"id-token": "write"}}
    assert read(ROOT / ".github/workflows/publish.yml")["jobs"]["publish"]["environment"] == "pypi"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_issues(path: Path) -> None:
    template = read(path)
    if path.stem == "config":
        homepage = PROJECT["urls"]["Homepage"]
        assert all(link["url"].startswith(homepage) for link in template["contact_links"])
        return
    names = [field["id"] for field in template["body"] if "id" in field]
    assert len(set(names)) == len(names)


def test_hooks_are_those_of_make_lint() -> None:
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    repos = {
        each["repo"].rpartition("/")[2]: each
        for each in read(ROOT / ".pre-commit-config.yaml")["repos"]
    }
    assert repos["ruff-pre-commit"]["rev"] == f"v{pinned['ruff']}"
    assert repos["codespell"]["rev"] == f"v{pinned['codespell']}"
    (hook,) = repos["codespell"]["hooks"]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert f"/codespell {' '.join(hook['args'])} " in makefile


# What the pages name


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text("utf-8"))
    links = [link for link in links if not link.startswith("https://")]
    assert links
    for link in links:
        assert (ROOT / link.partition("#")[0]).exists(), link


def test_pages_have_the_flags_and_the_environment_variables() -> None:
    page = (ROOT / "SECURITY.md").read_text("utf-8")
    assert " ".join((*native._FLAGS, "-march=native")) in page
    switches = {
        name
        for path in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"\bFULLATTN_[A-Z]+\b", path.read_text("utf-8"))
    }
    stability = (ROOT / "docs" / "stability.md").read_text("utf-8")
    for name in switches:
        assert name in page
        assert name in stability
