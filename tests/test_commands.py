"""The commands: results, errors in one line, SIGKILL at every statement."""

import os
import sys
from signal import SIGINT, alarm
from subprocess import PIPE, STDOUT, Popen

import pytest
from conftest import MAIN, check, in_a_process, kill_everywhere, left_at, opened, operation

import main

T1 = "transfer t1 alice bob"


def test_the_journal_shows_all_that_has_settled_and_whether_it_adds_up(cli, db):
    for name in ("d.1", "t1"):
        main.settle(db, operation(f"{name}-debit"))
    main.settle(db, operation("t1-credit"), void="žofie\x1b[2J")
    run = cli("recover")
    assert (run.returncode, "\x1b" in run.stderr) == (1, False)  # d.1 is no valid id
    for cents in ("iif(account = 'bob', 1, -1)", "account = 'bob'"):
        db.execute(f"UPDATE accounts SET balance = balance + ({cents})")
        run = cli("journal")
        assert (run.returncode, "IT DOES NOT ADD UP" in run.stdout) == (1, True)
        db.execute(f"UPDATE accounts SET balance = balance - ({cents})")
    db.execute("BEGIN IMMEDIATE")  # who only reads need not wait
    run = cli("journal", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    lines = run.stdout.splitlines()
    assert (run.returncode, run.stderr) == (0, "")
    assert lines == [
        "  alice-opening  alice          100.00",
        "  bob-opening    bob             50.00",
        "  d.1-debit      alice           -5.00  in flight",
        "  t1-debit       alice           -5.00  compensated",
        "  t1-credit      bob              5.00  void: \\u017eofie\\x1b[2J",
        "  t1-reversal    alice            5.00",
        "  balance        alice           95.00",
        "  balance        bob             50.00",
        "  145.00 in accounts + 5.00 in flight, 150.00 opened: every cent is somewhere",
    ]
    assert cli("journal d.1").stdout.splitlines() == [lines[2], lines[-1]]


ERRORS = {
    f"{T1} 0": "an amount is 1 to 10**15 whole cents, not 0",
    f"{T1} 0.001": "Write 30 or 30.00",
    "transfer t1 alise bob 1": "unknown account 'alise'",
    "transfer t1 alice bop 1": "unknown account 'bop'",
    "transfer t0 alice bob 6": "transfer id 't0' is already used: 5.00 from alice to \\nbob",
    "open '' 1": "the name of an account is printable text, not ''",
    "open bob 1": "'bob-opening' is already used",
    "open carol 1 --ledger :memory:": "`open` an account in a file",
    "open carol 1 --ledger no/folder": "unable to open",
    "open carol 1 --ledger text": "not a ledger",
    "journal t9": "no transfer 't9' in this ledger",
    "journal --ledger empty": "`open` an account",
    "worker --ledger typo.db": "`open` an account",
    f"{T1} 1 --crash-after lunch": "invalid choice: 'lunch'",
}


@pytest.mark.parametrize("words", ERRORS)
def test_bad_input_gets_one_clear_line_and_changes_nothing(cli, db, tmp_path, words):
    main.settle(db, operation("t0-debit", counterparty="\nbob"), void="no")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("x")
    before = {path: path.stat().st_size for path in tmp_path.iterdir()}
    run = cli(words)
    assert (run.returncode, run.stdout) == (2, "")
    *usage, line = run.stderr.splitlines()
    assert "error: " in line and ERRORS[words] in line
    assert usage == [] or usage[0].startswith("usage: ")
    assert {path: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_a_ledger_that_may_not_be_written_is_refused_at_once(db, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to any file
    assert command("recover", tmp_path) == 2
    assert "no ledger to write to at" in capsys.readouterr().err


@pytest.mark.parametrize("words,then", [("journal", " _ssl"), ("", "# An"), (f"{T1} 1", "waiting")])
def test_ctrl_c_leaves_no_traceback_and_no_folder(db, tmp_path, monkeypatch, words, then):
    db.execute("BEGIN IMMEDIATE")  # for this the transfer waits
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = [sys.executable, "-X", "importtime", MAIN, *words.split()]
    options = {"stdout": PIPE, "stderr": STDOUT, "preexec_fn": lambda: alarm(60)}  # then it dies
    with Popen(program, cwd=tmp_path, text=True, **options) as child:
        next(line for line in child.stdout if then in line)
        child.send_signal(SIGINT)
        said = child.stdout.read()
    assert (child.returncode, "Traceback" in said, [*tmp_path.glob("tmp*")]) == (130, False, [])


def test_an_output_that_nobody_can_read_is_an_error_without_a_traceback(cli, db):
    with open("/dev/full", "w") as full:
        for words in ("", f"{T1} 1"):
            run = cli(words, stdout=full)
            assert (run.returncode, "Traceback" in run.stderr) == (2, False)
        assert cli("journal", stdout=full, stderr=full).returncode == 2


def command(words, folder):
    sys.argv = ["main.py", *words.split(), "--ledger", f"{folder}/ledger.db"]
    return main.main()


def state_of(folder):
    """What is in the ledger (but its random id), which adds up, and what is in flight."""
    with left_at(folder / "ledger.db") as db:
        state = "".join(line for line in db.iterdump() if "ledger" not in line)
        return state, *(check(db) if "-opening" in state else ["no account"])


@pytest.mark.parametrize("words", [f"{T1} 1 --lose-answer", f"{T1} 1 --fail-credit", "open a 1"])
def test_what_is_killed_anywhere_is_finished_by_the_next_process(words, tmp_path, record_property):
    (tmp_path / "ledger.db").touch()
    again = "recover" if T1 in words else words
    if again == "recover":
        opened(tmp_path / "ledger.db").close()
    kills = in_a_process(kill_everywhere, command, words, again, state_of, tmp_path)
    assert kills > 20
    record_property("SIGKILLs of real processes at a statement: 0 lost or created", kills)
