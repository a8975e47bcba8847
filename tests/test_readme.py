"""What the README says is so: its output is a run's, its numbers are the tests'."""

import re
import tomllib
from typing import Any

from conftest import MAIN
from test_crash import KILLS
from test_search import FAULTY, STATES

README = MAIN.with_name("README.md").read_text()


def test_its_output_is_that_of_a_run(cli: Any) -> None:
    block = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert block
    assert block[1].strip() == cli().out.strip()


def test_its_numbers_are_those_of_the_tests() -> None:
    first, second = (sum(kills[index] for kills in KILLS.values()) for index in (0, 1))
    for said in (f"{sum(STATES):,} states", f"{len(FAULTY)} of {len(FAULTY)}", f"{first} kills", f"{second} kills"):
        assert f"| {said} |" in README


def test_the_commands_it_shows_are_commands(cli: Any) -> None:
    shown = set(re.findall(r"uv run main\.py ([a-z]+)", README))
    assert shown == {"transfer", "journal", "recover", "worker"}
    text = cli("--help").out
    assert all(command in text for command in shown)


def test_the_size_it_speaks_of() -> None:
    assert "some 400 lines" in README
    assert len(MAIN.read_text().splitlines()) <= 410


def test_the_pin_is_the_same_everywhere() -> None:
    project = tomllib.loads(MAIN.with_name("pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["resonate-sdk>=0.6.7,<0.7"]
    assert '"resonate-sdk>=0.6.7,<0.7"' in README


def test_the_names_it_speaks_of_exist() -> None:
    import main

    layout = README[README.index("## How main.py is laid out") : README.index("## What it promises")]
    names = [name for name in re.findall(r"`([a-z_]+)`", layout) if name != "main"]
    assert len(names) > 10
    for name in names:
        assert callable(getattr(main, name)), name
