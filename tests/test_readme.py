"""What the README says is so. Who copies main.py for a saga of their own may delete this file."""

import re
import tomllib

from conftest import MAIN
from test_ledger import HOSTILE
from test_search import GIVE_UP, GUARD

README = MAIN.with_name("README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_output_that_it_shows_is_that_of_a_run(cli):
    tour = cli("")
    assert (tour.returncode, tour.stderr) == (0, "")
    shown = blocks("text")[0].strip().split("\n\n")
    assert set(shown) <= set(tour.stdout.strip().split("\n\n")) and len(shown) == 4
    told = re.findall(r'"(?:account|status)": "(\w+)"', tour.stdout)
    assert set(told) == {"alice", "bob", "committed", "compensated", "rejected"}


def test_without_give_up_the_tour_stops_and_without_the_guard_it_creates_money(cli, tmp_path):
    naive = MAIN.read_text().replace(GIVE_UP, "str(error)")
    stops = "error: the credit is not a void\n  t2-debit       alice          -20.00  in flight"
    creates = "170.00 in accounts + 0.00 in flight, 150.00 opened: IT DOES NOT ADD UP"
    for source, says in ((naive, stops), (re.sub(GUARD, "", naive), creates)):
        (tmp_path / "naive.py").write_text(source)
        tour = cli("", program="naive.py")
        assert (tour.returncode, says in tour.stdout) == (2, True)


def test_the_lines_that_it_shows_run_on_the_part_that_it_says_to_copy(cli, tmp_path):
    copied, _ = MAIN.read_text().split("# ---- The command line")
    (tmp_path / "main.py").write_text(copied)
    (tmp_path / "own.py").write_text(blocks("python")[0])
    assert "'status': 'committed'" in cli("", program="own.py").stdout


def test_the_commands_names_requirements_and_numbers_in_it_are_right(cli):
    commands = re.findall("^main.py ([a-z]+)", README, re.MULTILINE)
    assert commands == re.findall("^    ([a-z]+) ", cli("--help").stdout, re.MULTILINE)
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", README):
        assert name in MAIN.read_text(), name
    project = tomllib.loads(MAIN.with_name("pyproject.toml").read_text())
    for need in project["project"]["dependencies"] + project["dependency-groups"]["dev"]:
        assert need.split(">")[0] in README
    assert f"| {2 * 3 * len(HOSTILE):,} |" in README  # in two states, three rows of each
