"""What the README says is so. Who copies main.py for a saga of their own may delete this file."""

import re
import shlex
import textwrap
import tomllib

import pytest
from conftest import MAIN, in_a_process
from test_crash import AT_LEAST
from test_ledger import ROWS, STATEMENTS
from test_search import FAULTY, WORLDS, searched

import main

pytestmark = pytest.mark.xdist_group("search")  # it uses what the search has found

README = MAIN.with_name("README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def scenes(text):
    return {scene.strip() for scene in f"\n{text}".split("\n# ")}


def test_the_output_that_it_shows_is_that_of_a_run(cli):
    tour = cli()
    assert (tour.status, tour.err) == (0, "")
    assert scenes(tour.out) == scenes("".join(blocks("text")))


def test_the_saga_that_it_shows_is_that_of_main_py():
    [saga] = [block for block in blocks("python") if "# Step 1" in block]
    assert textwrap.indent(saga, "    ") in MAIN.read_text()


def test_the_lines_that_call_it_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [lines] = [block for block in blocks("python") if "import main" in block]
    in_a_process(f"{lines}\nassert main.balance(db, 'bob') == 8000")


def test_the_numbers_of_what_was_tried_are_those_of_the_tests():
    states = sum(searched(world)[0] for world in WORLDS)
    kills = sum(AT_LEAST.values())
    sagas = len(FAULTY)
    statements = 3 * len(ROWS) + len(STATEMENTS)
    for number in (f"{states:,}", f"over {kills}", f"{sagas} of {sagas}", statements):
        assert f"| {number} |" in README


def test_the_commands_that_it_shows_are_all_commands(inside):
    shown = set(re.findall(r"uv run main\.py ([a-z]+)", README))
    overview = inside("--help").out
    assert shown == set(re.findall("^    ([a-z]+) ", overview, re.MULTILINE))
    for command in shown:
        assert inside(command, "--help").status == 0


def test_what_it_installs_with_pip_is_what_the_project_needs():
    project = tomllib.loads(MAIN.with_name("pyproject.toml").read_text())
    tools = project["dependency-groups"]["dev"]
    [line] = re.findall("pip install (.*)", README)
    sdk, *others = shlex.split(line)
    assert [sdk] == project["project"]["dependencies"]
    assert others == [re.sub(">=[0-9.]+,?", "", tool) for tool in tools]


def test_the_names_that_it_speaks_of_exist():
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", README):
        assert hasattr(main, name), name
