"""The commands: results, errors in one line, SIGKILL at every statement."""

import json
import os
import shlex
import sys
from contextlib import closing
from itertools import count
from signal import SIGINT, alarm
from subprocess import PIPE, STDOUT, Popen

import pytest
from conftest import (
    MAIN,
    check,
    command,
    in_a_process,
    kill_everywhere,
    left_at,
    opened,
    operation,
)

import main

T1 = "transfer t1 alice bob"


def contents(folder):
    """Every file and what is in it: a command that changes nothing leaves this as it was."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_results_are_json_on_stdout_and_the_status_says_how_it_ended(cli, db):
    main.settle(db, operation("t0-debit"))
    main.settle(db, operation("t0-credit"), "no")
    terms = {"source": "alice", "target": "bob", "amount": 500}
    rejected = {"amount": 10**7, "status": "rejected", "error": "insufficient funds"}
    compensated = {"status": "compensated", "error": "no"}
    for words, status, result in (
        ("open carol 1234.56", 0, {"account": "carol", "opening": 123456}),
        ("recover", 0, terms | compensated | {"transfer_id": "t0"}),
        (f"{T1} 5", 0, terms | {"transfer_id": "t1", "status": "committed", "error": None}),
        (
            "transfer t2 alice bob 100000 --fail-credit lost",
            1,
            terms | rejected | {"transfer_id": "t2"},
        ),
    ):
        run = cli(words)
        assert (run.returncode, json.loads(run.stdout)) == (status, result)
    assert "  t2-debit  alice" in (shown := cli("journal t2").stdout) and "void: insuff" in shown
    assert cli("recover").stderr == "in flight now: 0.00\n"


def test_a_command_leaves_nothing_beside_its_ledger(tmp_path):
    opened(tmp_path / "ledger.db").close()
    for words in (f"{T1} 1", "recover", "journal"):
        assert command(words, tmp_path) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["ledger.db"]


@pytest.mark.parametrize("digits", range(1, 14))
def test_amounts_are_read_and_shown_as_people_write_them(digits):
    whole = "1234567890123"[:digits]
    for text, cents in ((whole, "00"), (f"{whole}.5", "50"), (f"{whole}.07", "07")):
        assert main.to_cents(text) == int(whole + cents)
        assert main.money(int(whole + cents)) == f"{whole}.{cents}"
        assert main.money(-int(whole + cents)) == f"-{whole}.{cents}"


def test_the_journal_shows_all_that_has_settled_and_whether_it_adds_up(cli, db):
    for name in ("d.1", "t1"):
        main.settle(db, operation(f"{name}-debit"))
    insert = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"
    db.execute(insert, (*operation("t1-credit"), "žofie\x1b[2J"))
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
        "  alice-opening  alice              100.00",
        "  bob-opening    bob                 50.00",
        "  d.1-debit      alice               -5.00  in flight",
        "  t1-debit       alice               -5.00  compensated",
        "  t1-credit      bob                  5.00  void: \\u017eofie\\x1b[2J",
        "  t1-reversal    alice                5.00",
        "  balance        alice               95.00",
        "  balance        bob                 50.00",
        "  145.00 in accounts + 5.00 in flight, 150.00 opened: every cent is somewhere",
    ]
    assert cli("journal d.1").stdout.splitlines() == [
        "  d.1-debit  alice           -5.00  in flight",
        lines[-1],
    ]


def test_the_journal_is_of_one_moment(db, tmp_path, capsys):
    """Another process debits one cent more at each statement."""
    main.settle(db, operation("t1-debit"))
    numbers = count()
    insert = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, NULL)"

    def debit(_):
        db.execute(insert, operation(f"x{next(numbers)}-debit", amount=-1))

    with closing(main.open_ledger(tmp_path / "ledger.db")) as reader:
        reader.set_trace_callback(debit)
        assert main.journal(reader)
    *rows, total = capsys.readouterr().out.splitlines()
    flying = sum(row.endswith("in flight") for row in rows)
    assert f"+ {5 + (flying - 1) / 100:.2f} in flight" in total and next(numbers) > 4


def test_a_journal_without_an_account_and_of_what_may_only_be_read(tmp_path, capsys):
    main.open_ledger(f"{tmp_path}/ledger.db").close()
    assert command("journal", tmp_path) == 0
    with closing(opened(tmp_path / "ledger.db")):
        pass
    before = contents(tmp_path)
    assert command("journal", tmp_path) == 0
    assert contents(tmp_path) == before
    (tmp_path / "ledger.db").chmod(0o444)
    tmp_path.chmod(0o555)
    assert in_a_process(journal_as_nobody, tmp_path) == 0
    assert contents(tmp_path) == before
    tmp_path.chmod(0o755)


def journal_as_nobody(folder):
    """Root may write to any file, so it becomes somebody else."""
    if os.getuid() == 0:
        for parent in folder.parents:
            parent.stat().st_mode & 0o1 or parent.chmod(0o755)
        os.setuid(65534)
    assert command("open carol 1", folder) == 2
    return command("journal", folder)


ERRORS = {
    f"{T1} 0": "an amount is 1 to 10**15 whole cents, not 0",
    f"{T1} 99999999999999": "an amount is 1 to 10**15 whole cents, not 9999999999999900",
    f"{T1} 0.001": "not an amount: '0.001': write 30 or 30.00",
    f"{T1} -5": "not an amount: '-5'",
    "transfer t0 alice bob 6": "transfer id 't0' is already used: 5.00 from alice to \\nbob",
    "open '' 1": "an account is printable text, no space at its ends, not ''",
    "open bob 1": "account 'bob' was opened with another amount",
    "open carol 1 --ledger no/folder": "No such file or directory: '",
    "open carol 1 --ledger .": "Is a directory: '",
    "open carol 1 --ledger text": "text: file is not a database",
    "open carol x --ledger new": "not an amount: 'x'",
    "open carol": "not a command: 'open carol': see --help",
    "journal --ledger empty": "empty?immutable=1: attempt to write a readonly database",
    "worker --ledger typo.db": "No such file or directory: '",
    f"{T1} 1 --crash-after lunch": "invalid choice: 'lunch'",
    f"{T1} 1 --led x": "unrecognized arguments: --led",
}


@pytest.mark.parametrize("words", ERRORS)
def test_bad_input_gets_one_clear_line_and_changes_nothing(tmp_path, monkeypatch, capsys, words):
    with closing(opened(tmp_path / "ledger.db")) as db:
        main.settle(db, operation("t0-debit", counterparty="\nbob"), void="no")
    (tmp_path / "text").write_text("Dear diary, " * 99)
    (tmp_path / "empty").touch()
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", *shlex.split(words)])
    try:
        status = main.main()
    except SystemExit as usage:
        status = usage.code
    assert status == 2
    out, error = capsys.readouterr()
    *usage, line = error.splitlines()
    assert "error: " in line and ERRORS[words] in line and "Traceback" not in error
    assert out == "" and (usage == [] or usage[0].startswith("usage: "))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("words, then", [("", "# An"), (f"{T1} 1", "has not ended")])
def test_ctrl_c_leaves_no_traceback_and_no_folder(db, tmp_path, monkeypatch, words, then):
    db.execute("BEGIN IMMEDIATE")  # for this the transfer waits
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    options = {"stdout": PIPE, "stderr": STDOUT, "preexec_fn": lambda: alarm(60)}  # then it dies
    program = [sys.executable, MAIN, *words.split()]
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


@pytest.mark.parametrize("kind", ["debit", "credit", "reversal"])
def test_a_crash_comes_right_after_the_operation_has_settled(cli, db, kind):
    assert cli(f"{T1} 1 --fail-credit late --crash-after {kind}").returncode == 137
    order = ["debit", "credit", "reversal"]
    settled = db.execute("SELECT kind FROM operations WHERE kind <> 'opening'")
    assert {kind for (kind,) in settled} == set(order[: order.index(kind) + 1])


def test_the_tour_stops_at_the_first_wrong_total(cli, tmp_path):
    wrong = MAIN.read_text().replace("SET balance = balance + NEW.amount", "SET balance = 9")
    (tmp_path / "wrong.py").write_text(wrong)
    run = cli("", program="wrong.py")
    assert run.returncode == 2 and run.stderr.startswith("error: An account: exit status 0")


def state_of(folder):
    """What is in the ledger (but its random id), which adds up, and what is in flight."""
    with left_at(folder / "ledger.db") as db:
        state = "".join(line for line in db.iterdump() if "ledger" not in line)
        return state, *(check(db) if "-opening" in state else ["no account"])


@pytest.mark.parametrize(
    "words", [f"{T1} 1 --fail-credit lost", f"{T1} 1 --fail-credit late", "open a 1"]
)
def test_what_is_killed_anywhere_is_finished_by_the_next_process(words, tmp_path, record_property):
    (tmp_path / "ledger.db").touch()
    again = "recover" if T1 in words else words
    if again == "recover":
        opened(tmp_path / "ledger.db").close()
    kills = in_a_process(kill_everywhere, command, words, again, state_of, tmp_path)
    assert kills > 20
    record_property(f"SIGKILLs of {words}, and of what finishes it: 0 lost or created", kills)
