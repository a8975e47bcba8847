"""The commands, as processes: every result, every error in one line, kill -9 at every moment."""

import os
import resource
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, MAIN, in_a_process, kill_everywhere, opened, operation, settled
from conftest import check as check_ledger

import main

T1 = "transfer t1 alice bob"


def test_the_journal_shows_every_operation_what_is_in_flight_and_what_there_is(cli, ledger):
    for name in ("d.1", "t2", "t3"):
        main.settle(ledger, operation(f"{name}-debit"))
    main.settle(ledger, operation("t3-credit"), void="žofie\x1b[2J")
    run = cli("recover")
    assert (run.returncode, "\x1b" in run.stderr) == (1, False)  # d.1 is no valid id
    ledger.execute("BEGIN IMMEDIATE")  # who only reads need not wait
    run = cli("journal", env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"})
    lines = run.stdout.splitlines()
    assert (run.returncode, run.stderr) == (0, "")
    assert lines == [
        "  alice-opening  alice          100.00",
        "  bob-opening    bob             50.00",
        "  d.1-debit      alice           -5.00  in flight",
        "  t2-debit       alice           -5.00  committed",
        "  t2-credit      bob              5.00",
        "  t3-debit       alice           -5.00  compensated",
        "  t3-credit      bob              5.00  void: \\u017eofie\\x1b[2J",
        "  t3-reversal    alice            5.00",
        "  balance        alice           90.00",
        "  balance        bob             55.00",
        "  145.00 in accounts + 5.00 in flight, 150.00 opened: every cent is somewhere",
    ]
    assert cli("journal t2").stdout.splitlines() == [*lines[3:5], lines[-1]]


@pytest.mark.parametrize("cents", ["iif(account = 'bob', 1, -1)", "account = 'bob'"])
def test_the_journal_of_a_ledger_that_somebody_tampered_with_does_not_add_up(cli, ledger, cents):
    ledger.execute(f"UPDATE accounts SET balance = balance + ({cents})")
    run = cli("journal")
    assert (run.returncode, "IT DOES NOT ADD UP" in run.stdout) == (1, True)
    ledger.execute(f"UPDATE accounts SET balance = balance - ({cents})")


ERRORS = {
    f"{T1} 0": "an amount is 1 to 10**15 whole cents, not 0",
    f"{T1} 0.001": "Write 30 or 30.00",
    f"{T1} 1e3": "Write 30 or 30.00",
    "transfer t1 alise bob 1": "unknown account 'alise'",
    "transfer t1 alice bop 1": "unknown account 'bop'",
    "transfer t0 alice bob 6": "transfer id 't0' is already used: 5.00 from alice to bob",
    "open '' 1": "the name of an account is printable text, not ''",
    "open bob 1": "'bob-opening' is already used",
    "open carol 1 --ledger ''": "unable to open",
    "open carol 1 --ledger :memory:": "`open` an account in a file",
    "open carol 1 --ledger no/folder": "unable to open",
    "open carol 1 --ledger text": "not a ledger",
    "journal t9": "t9",
    "journal --ledger empty": "`open` an account",
    "worker --ledger typo.db": "`open` an account",
    f"{T1} 1 --crash-after lunch": "invalid choice: 'lunch'",
}


@pytest.mark.parametrize("words", ERRORS)
def test_bad_input_gets_one_clear_line_and_changes_nothing(cli, ledger, tmp_path, words):
    main.settle(ledger, operation("t0-debit"))
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("x")
    before = {path: path.stat().st_size for path in tmp_path.iterdir()}
    run = cli(shlex.split(words))
    assert (run.returncode, run.stdout) == (2, "")
    *usage, line = run.stderr.splitlines()
    assert "error: " in line and ERRORS[words] in line
    assert usage == [] or usage[0].startswith("usage: ")
    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_a_ledger_that_may_not_be_written_is_refused_at_once(ledger, monkeypatch, capsys):
    """Only said to be so, because root may write to any file."""
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    monkeypatch.setattr(sys, "argv", ["main.py", "recover"])
    assert main.main() == 2
    assert "no ledger to write to at" in capsys.readouterr().err


def imports_the_sdk(child):
    """That brings ssl, which nothing else here does."""
    while "_ssl" not in Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.002)


def waits_for_room(child):
    said = [child.stderr.readline(), child.stderr.readline()]
    assert sorted(line.split()[0] for line in said) == ["RuntimeError.", "waiting"]


BEGUN = {
    "journal": imports_the_sdk,
    f"{T1} 1": waits_for_room,
    "": lambda child: [child.stdout.readline(), child.stdout.readline()],
}


@pytest.mark.parametrize("words", BEGUN)
def test_ctrl_c_leaves_no_traceback_and_nothing_half_done(ledger, tmp_path, words):
    """On a disk that is full. A transfer says that it waits for room."""
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4, resource.RLIM_INFINITY))
    options = {"cwd": tmp_path, "env": ENVIRONMENT | {"TMPDIR": os.fspath(tmp_path)}}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(MAIN), *words.split()]
    with subprocess.Popen(command, preexec_fn=full, process_group=0, **options) as child:
        BEGUN[words](child)
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate()
    assert (child.returncode, "Traceback" in err) == (130, False)
    assert settled(ledger) == {}
    assert list(tmp_path.glob("tmp*")) == []


@pytest.mark.parametrize("words", ["", f"{T1} 1"])
def test_an_output_that_nobody_can_read_is_an_error_without_a_traceback(cli, ledger, words):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, open("/dev/full", "w") as full:
        for out, err in ((closed, subprocess.PIPE), (full, full)):
            run = cli(words, capture_output=False, stdout=out, stderr=err)
            assert (run.returncode, "Traceback" in str(run.stderr)) == (2, False)
    run = cli(words, preexec_fn=partial(os.close, 1))
    assert (run.returncode, "Traceback" in run.stderr) == (0 if words else 2, False)


def test_processes_that_do_the_same_or_want_the_same_money_agree(cli, ledger):
    """There is money for t1 or t2, but not for both."""
    t0 = "transfer t0 alice bob 5"
    commands = (t0, f"{t0} --fail-credit", f"{T1} 60", "transfer t2 alice bob 60", "recover")
    with ThreadPoolExecutor(len(commands)) as pool:
        runs = list(pool.map(cli, commands))
    assert runs[0].stdout == runs[1].stdout == cli(t0).stdout
    assert sorted(run.returncode for run in runs[2:4]) == [0, 1]


def command(words, folder):
    sys.argv = ["main.py", *words.split(), "--ledger", f"{folder}/ledger.db"]
    assert main.main() in (0, 1)


def state_of(folder):
    """What is in the ledger, which adds up, and what is in flight. Its files stay as they are."""
    db = sqlite3.connect(f"{folder}/ledger.db")
    db.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)
    state = "\n".join(db.iterdump())
    flying = check_ledger(db) if "CREATE" in state else {}
    db.close()
    return state, *flying


def kill(words, again, folder):
    """In a process of its own, because it forks, and must have one thread."""
    if again == "recover":
        opened(f"{folder}/ledger.db").close()
    print(kill_everywhere(partial(command, words), partial(command, again), state_of, folder))


KILLED = {f"{T1} 30 --lose-answer": "recover", f"{T1} 30 --fail-credit": "recover"}
KILLED["open alice 100"] = "open alice 100"


@pytest.mark.parametrize("words", KILLED)
def test_what_is_killed_at_any_statement_is_finished_by_the_next_process(words, record_property):
    """Also if what finishes it is killed at any statement."""
    kill = f"test_commands.kill({words!r}, {KILLED[words]!r}, folder)"
    kills = int(in_a_process(f"import test_commands; {kill}").split()[-1])
    assert kills > 30
    record_property("SIGKILLs of real processes at a statement: 0 lost or created", kills)
