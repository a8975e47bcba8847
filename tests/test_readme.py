"""What the README says is so. Who copies main.py for a saga of their own may delete this file."""

import re
import subprocess
import sys
import tomllib

from conftest import MAIN
from test_ledger import HOSTILE
from test_search import GIVE_UP, GUARD

import main

README = MAIN.with_name("README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_output_that_it_shows_is_that_of_a_run_of_main_py_alone(cli, tmp_path):
    (tmp_path / "alone").mkdir()
    program = tmp_path / "alone" / "main.py"
    program.write_text(MAIN.read_text())
    tour = cli("", program=program)
    assert (tour.returncode, tour.stderr) == (0, "")
    scenes = tour.stdout.strip().split("\n\n")
    shown = blocks("text")[0].strip().split("\n\n")
    assert set(shown) <= set(scenes) and (len(shown), len(scenes)) == (4, 11)
    told = re.findall(r'"(?:account|status)": "(\w+)"', tour.stdout)
    assert set(told) == {"alice", "bob", "committed", "compensated", "rejected"}
    assert tour.stdout.count("(killed)") == 2
    assert [path.name for path in tmp_path.rglob("*.db*")] == []


def test_without_give_up_the_tour_waits_and_unguarded_it_creates_money(cli, tmp_path):
    naive = MAIN.read_text().replace(GIVE_UP, "False")
    (tmp_path / "naive.py").write_text(naive)
    with subprocess.Popen([sys.executable, "naive.py"], stdout=subprocess.PIPE, text=True) as tour:
        assert any("the credit is not a void" in line for line in tour.stdout)
        tour.terminate()
    (tmp_path / "naive.py").write_text(re.sub(GUARD, "", naive))
    tour = cli("", program="naive.py")
    creates = "170.00 in accounts + 0.00 in flight, 150.00 opened: IT DOES NOT ADD UP"
    assert (tour.returncode, creates in tour.stdout) == (2, True)


def test_the_lines_that_it_shows_run_on_the_part_that_it_says_to_copy(cli, tmp_path):
    copied, _ = MAIN.read_text().split("# ---- The command line")
    (tmp_path / "main.py").write_text(copied)
    (tmp_path / "own.py").write_text(blocks("python")[0])
    run = cli("", program="own.py")
    assert (run.returncode, re.findall(r"'status': '(\w+)'", run.stdout)) == (
        0,
        ["committed", "compensated"],
    )
    assert "gift-credit is a void" in run.stderr


def test_the_commands_names_requirements_and_numbers_in_it_are_right():
    assert [line in main.__doc__ for line in blocks("text")[2].splitlines()] == [True] * 6
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", README):
        assert name in MAIN.read_text(), name
    project = tomllib.loads(MAIN.with_name("pyproject.toml").read_text())
    for need in project["project"]["dependencies"] + project["dependency-groups"]["dev"]:
        assert need.split(">")[0] in README
    assert f"| {len(HOSTILE):,} |" in README


def test_the_script_block_and_the_project_have_the_same_requirements():
    block = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", MAIN.read_text())[1]
    script = tomllib.loads(re.sub("^# ", "", block, flags=re.MULTILINE))
    project = tomllib.loads(MAIN.with_name("pyproject.toml").read_text())["project"]
    assert script == {name: project[name] for name in ("requires-python", "dependencies")}
