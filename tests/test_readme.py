"""What the README says is so. Who copies main.py for a saga of their own may delete this file."""

import re
import shlex
import subprocess
import sys
import tomllib

from conftest import MAIN, in_a_process
from test_ledger import HOSTILE

README = MAIN.with_name("README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_output_that_it_shows_is_that_of_a_run(cli):
    tour = cli("")
    assert (tour.returncode, tour.stderr) == (0, "")
    shown = blocks("text")[0].strip().split("\n\n")
    assert set(shown) <= set(tour.stdout.strip().split("\n\n"))
    assert len(shown) >= 3


def test_without_give_up_the_ledger_stops_the_tour_and_without_its_guard_money_is_created(tmp_path):
    naive = re.sub(r"yield ctx.run\(give_up, .*", "str(error)", MAIN.read_text())
    unguarded = re.sub(r"SELECT RAISE\(ABORT, 'the credit is not a void'\)[^;]*;", "", naive)
    program = tmp_path / "main.py"
    for source, says in (
        (
            naive,
            "error: the credit is not a void\n  t2-debit       alice          -20.00  in flight",
        ),
        (unguarded, "170.00 in accounts + 0.00 in flight, 150.00 opened: IT DOES NOT ADD UP"),
    ):
        program.write_text(source)
        tour = subprocess.run([sys.executable, program], capture_output=True, text=True)
        assert tour.returncode == 2
        assert says in tour.stdout


def test_the_lines_that_it_shows_run():
    [lines] = blocks("python")
    out = in_a_process(f"os.chdir(folder)\n{lines}")
    assert "'status': 'committed'" in out


def test_the_commands_that_it_shows_are_those_of_help(cli):
    shown = {line.split()[1] for line in README.splitlines() if line.startswith("main.py ")}
    overview = cli("--help").stdout
    assert shown - {"the"} == set(re.findall("^    ([a-z]+) ", overview, re.MULTILINE))


def test_what_it_installs_with_pip_is_what_the_project_needs():
    project = tomllib.loads(MAIN.with_name("pyproject.toml").read_text())
    tools = project["dependency-groups"]["dev"]
    [line] = re.findall("pip install (.*)", README)
    sdk, *others = shlex.split(line)
    assert [sdk] == project["project"]["dependencies"]
    assert others == [re.sub("[>=<].*", "", tool) for tool in tools]


def test_the_names_links_and_numbers_in_it_are_right():
    assert f"| {6 * 3 * len(HOSTILE):,} |" in README
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", README):
        assert name in MAIN.read_text(), name
    for link in re.findall(r"\]\(([^)]*)\)", README):
        assert MAIN.with_name(link).exists()
