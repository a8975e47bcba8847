"""The command line: every result, every exit status, every error."""

import os
import resource
import shlex
import signal
import sqlite3
import sys
import time
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen
from unittest.mock import Mock

import pytest
from conftest import MAIN, debited, opened, settled

import main

T1 = ["transfer", "t1", "alice", "bob"]


def refused(run, said):
    """One line says what is wrong: after the usage, if the command is none."""
    assert (run.status, run.out) == (2, "")
    assert said in run.err
    assert "error: " in run.err.splitlines()[-1]
    assert run.err.count("\n") == 1 or run.err.startswith("usage: main.py")


AMOUNTS = {"0.01": 1, "01.10": 110, "30": 3000, "30.5": 3050, "9" * 15 + ".99": 10**17 - 1}


@pytest.mark.parametrize("text", AMOUNTS)
def test_an_amount_is_what_people_write(text):
    assert main.cents(text) == AMOUNTS[text]
    assert main.money(AMOUNTS[text]) == f"{Decimal(text):.2f}"


def test_recover_finishes_what_it_can_and_the_journal_shows_what_is_left(inside, ledger):
    debited(ledger, "a.1", "t2")
    run = inside("recover")
    assert (run.status, run.err) == (1, "")
    assert [result["status"] for result in run.results] == ["in flight", "committed"]
    assert "a transfer id is" in run.results[0]["error"]
    ledger.execute("BEGIN IMMEDIATE")  # who only reads need not wait
    run = inside("journal")
    assert (run.status, run.err) == (0, "")
    lines = run.out.splitlines()
    assert lines == [
        "  alice-opening  alice          100.00",
        "  bob-opening    bob             50.00",
        "  a.1-debit      alice           -5.00",
        "  t2-debit       alice           -5.00",
        "  t2-credit      bob              5.00",
        "  a.1            in flight        5.00  from alice to bob",
        "  balance        alice           90.00",
        "  balance        bob             55.00",
        "  145.00 in accounts + 5.00 in flight, 150.00 opened: every cent is somewhere",
    ]
    assert inside("journal", "t2").out.splitlines() == [*lines[3:5], lines[-1]]


TAMPERED = {
    "a cent in the wrong account": "UPDATE accounts SET balance = iif(account = 'bob', 5001, 9999)",
    "a cent that came in past the guard": """
        DROP TRIGGER entry_moves_balance;
        INSERT INTO operations VALUES ('x-credit', 'x', 'credit', 'bob', 1, 'alice', NULL);
        UPDATE accounts SET balance = 5001 WHERE account = 'bob'
    """,
}


@pytest.mark.parametrize("how", TAMPERED)
def test_the_journal_of_a_ledger_that_somebody_tampered_with_says_so(inside, tmp_path, how):
    ledger = opened(os.fspath(tmp_path / "ledger.db"))
    ledger.set_authorizer(None)
    ledger.executescript(TAMPERED[how])
    ledger.close()
    run = inside("journal")
    assert run.status == 1
    assert "IT DOES NOT ADD UP" in run.out


@pytest.mark.parametrize("name", ["\x1b[31mred", "two\nlines", "\u202eleft", "žofie"], ids=ascii)
def test_names_and_reasons_cannot_drive_the_terminal(inside, ledger, name):
    shown = name if name.isprintable() else ascii(name)[1:-1]
    assert inside("open", name, "100").result["account"] == name
    assert inside("transfer", "t1", name, "bob", "1").result["source"] == name
    run = inside("transfer", "t1", name, "bob", "2")
    refused(run, f"transfer id 't1' is already used: 1.00 from {shown} to bob\n")
    voided = main.Operation("v-debit", "v", "debit", "alice", -1, "bob")
    main.settle(ledger, voided, void=name)
    journal = inside("journal").out
    assert f"void: {shown}\n" in journal
    assert all(line.isprintable() for line in journal.splitlines())


NO_AMOUNTS = ["1e3", "NaN", "0.001", "-1", "1,00", ".5", "5.", "٣", "", "1 ", "1\n", "9" * 16]


@pytest.mark.parametrize("text", NO_AMOUNTS, ids=ascii)
def test_what_is_no_amount_is_refused(inside, ledger, text):
    refused(inside(*T1, "--", text), "Write 30 or 30.00\n")


REFUSED = (
    ("transfer t1 alice bob 0", "an amount is a whole number of cents, 1 to 2**63 - 1, not 0\n"),
    ("transfer t1 alise bob 1", "unknown account 'alise'\n"),
    ("transfer t1 alice bop 1", "unknown account 'bop'\n"),
    ("transfer t1 \udcff bob 1", r"the name of an account is some text, not '\udcff'"),
    ("open '' 1", "the name of an account is some text, not ''\n"),
    ("open carol 1 --ledger ''", f"unable to open database file. {main.ASK_AGAIN}\n"),
    ("open carol 1 --ledger text", "text: this file is not a ledger"),
    ("journal --ledger empty", "no ledger at empty: `open` an account to make one\n"),
    ("worker --ledger typo.db", "no ledger at typo.db"),
    ("transfer t1 alice bob 1 --fail", "unrecognized arguments: --fail\n"),
    ("transfer t1 alice bob 1 --crash-after lunch", "invalid choice: 'lunch'"),
    ("--hel", "unrecognized arguments: --hel\n"),
)


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=ascii)
def test_bad_input_gets_one_clear_line_and_changes_nothing(inside, ledger, words, said, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("x")
    before = {path: path.stat().st_size for path in tmp_path.iterdir()}
    refused(inside(*shlex.split(words)), said)
    assert settled(ledger) == {}
    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_a_read_only_ledger_is_refused_at_once(inside, ledger, monkeypatch):
    """Only said to be so, because root may write to any file."""
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)
    refused(inside(*T1, "1"), "ledger.db is read-only\n")


@contextmanager
def started_on_a_full_disk(folder, *words):
    """A process that runs a command. In a file, it has room for the 4 bytes of `tempfile`."""
    no_room = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4, resource.RLIM_INFINITY))
    command = [sys.executable, str(MAIN), *words]
    pipes = {"stdout": PIPE, "stderr": PIPE, "text": True}
    with Popen(command, cwd=folder, preexec_fn=no_room, process_group=0, **pipes) as child:
        try:
            yield child
        finally:
            child.kill()


def test_a_full_disk_makes_a_transfer_wait_and_say_so_until_there_is_room(ledger, tmp_path):
    with started_on_a_full_disk(tmp_path, *T1, "1") as child:
        assert "disk" in child.stderr.readline()
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert '"committed"' in child.stdout.readline()
        assert child.wait() == 0


@pytest.mark.parametrize("words", ["", "journal", "transfer t1 alice bob 1 -v"])
def test_a_closed_pipe_is_silent(cli, ledger, words):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        run = cli(*words.split(), capture_output=False, stdout=closed, stderr=PIPE)
    assert (run.status, run.err) == (2, "")


def test_a_full_output_is_an_error(cli, ledger):
    with open("/dev/full", "w") as full:
        run = cli("journal", capture_output=False, stdout=full, stderr=PIPE)
    assert (run.status, run.err) == (2, "error: [Errno 28] No space left on device\n")


def imports_the_sdk(child):
    """That brings ssl, which nothing else here does."""
    while "_ssl" not in Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.002)


BEGUN = {
    "a command that starts": ("journal", imports_the_sdk),
    "a transfer that waits for room": ("transfer t1 alice bob 1", lambda c: c.stderr.readline()),
    "the tour": ("", lambda child: child.stdout.readline()),
}


@pytest.mark.parametrize("what", BEGUN)
def test_ctrl_c_leaves_no_traceback_and_nothing_half_done(ledger, tmp_path, monkeypatch, what):
    words, has_begun = BEGUN[what]
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    with started_on_a_full_disk(tmp_path, *words.split()) as child:
        has_begun(child)
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate()
    assert (child.returncode, "Traceback" in err) == (130, False)
    assert settled(ledger) == {}
    assert list(tmp_path.glob("tmp*")) == []


SCENE = main.TOUR[1]._replace(alice=10000, bob=5000)
LIES = {
    "status": ("TOUR", [SCENE._replace(status=0)]),
    "alice": ("TOUR", [SCENE._replace(alice=1)]),
    "bob": ("TOUR", [SCENE._replace(bob=1)]),
    "journal": ("journal", lambda *_: False),
    "disk": ("journal", Mock(side_effect=sqlite3.OperationalError("disk full"))),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_tour_fails_if_a_claim_is_not_so(inside, monkeypatch, lie):
    def run_command(command, ledger):
        return int(inside(*command.split(), "--ledger", ledger).status)

    monkeypatch.setattr(main, "run_command", run_command)
    monkeypatch.setattr(main, "TOUR", [SCENE])
    assert inside().status == 0
    monkeypatch.setattr(main, *LIES[lie])
    run = inside()
    assert (run.status, run.err[:7]) == (2, "error: ")
