"""What the README says is so. Who copies main.py for a saga of their own may delete this file."""

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, MAIN, Run
from test_crash import AT_LEAST
from test_ledger import ROWS, STATEMENTS
from test_search import FAULTY, WORLDS, searched

import main

pytestmark = pytest.mark.xdist_group("search")  # it uses what the search has found

README = MAIN.with_name("README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tour")
    environment = os.environ | {"TMPDIR": os.fspath(folder)}
    command = [sys.executable, str(MAIN)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert list(folder.iterdir()) == []
    return Run(done)


def scenes(text: str) -> list[str]:
    return sorted(scene.strip() for scene in re.split(r"^(?=# )", text, flags=re.MULTILINE))


def test_the_output_that_it_shows_is_that_of_a_run(tour: Run) -> None:
    """All of it: what it says first and what it hides in details."""
    assert (tour.status, tour.err) == (0, "")
    assert scenes("".join(blocks("text"))) == scenes(tour.out)


def test_the_tour_ends_as_it_says_and_fits_the_screen(tour: Run) -> None:
    statuses = [result["status"] for result in tour.results if "status" in result]
    assert statuses == [
        "committed",
        "compensated",
        "committed",
        "rejected",
        "committed",
        "committed",
    ]
    assert tour.out.count("every cent is somewhere") == len(main.TOUR)
    assert "\nKilled\n" in tour.out
    for line in tour.out.splitlines():
        assert len(line) <= 80 or line.startswith("{")


def test_the_saga_that_it_shows_is_that_of_main_py() -> None:
    [saga] = [block for block in blocks("python") if "# Step 1" in block]
    assert textwrap.indent(saga, "    ") in MAIN.read_text()
    assert "# Step 3" in saga


def test_the_lines_that_call_it_run(tmp_path: Path) -> None:
    [lines] = [block for block in blocks("python") if "import main" in block]
    done = subprocess.run(
        [sys.executable, "-c", lines],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.count("'status': 'committed'"), done.stderr) == (1, "")


def test_the_numbers_of_what_was_tried_are_those_of_the_tests() -> None:
    states = sum(searched(world).states for world in WORLDS)
    statements = 3 * len(ROWS) + len(STATEMENTS)
    kills = sum(AT_LEAST.values())
    said = (f"{states:,}", f"{len(FAULTY)} of {len(FAULTY)}", f"over {kills}", f"{statements}")
    for number in said:
        assert f"| {number} |" in README


def test_the_commands_that_it_shows_are_commands(inside: Callable[..., Run]) -> None:
    shown = set(re.findall(r"uv run main\.py ([a-z]+)", README))
    assert shown == {"open", "transfer", "recover", "journal", "worker"}
    text = inside("--help").out
    assert all(command in text for command in shown)


def test_the_pin_is_the_same_everywhere() -> None:
    project = tomllib.loads(MAIN.with_name("pyproject.toml").read_text())
    assert project["project"]["dependencies"] == ["resonate-sdk>=0.6.7,<0.7"]
    assert '"resonate-sdk>=0.6.7,<0.7"' in README


def test_the_packages_that_it_names_for_pip_are_those_of_the_tests() -> None:
    project = tomllib.loads(MAIN.with_name("pyproject.toml").read_text())
    [line] = re.findall(r"pip install \"resonate.*?\" (.*)", README)
    dev: list[Any] = project["dependency-groups"]["dev"]
    named = [name.strip('"').partition("<")[0] for name in line.split()]
    assert sorted(named) == sorted(name.partition(">")[0] for name in dev)
    assert '"pytest<9.2"' in line and "pytest>=8,<9.2" in dev


def test_the_names_that_it_speaks_of_exist() -> None:
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", README):
        assert hasattr(main, name), name
