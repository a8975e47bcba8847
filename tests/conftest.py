"""What the tests share: ledgers, banks, commands, kills, the oracle, and the closing count."""

import itertools
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest

import main

MAIN = Path(main.__file__)
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{MAIN.parent}{os.pathsep}{MAIN.parent / 'tests'}"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)


def adds_up(db):
    """The oracle: all the money is there. Uses no view or trigger. Returns what is in flight."""
    balances, flying = Counter(), Counter()
    query = "SELECT transfer_id, kind, account, amount FROM operations WHERE void IS NULL"
    for transfer_id, kind, account, amount in db.execute(query):
        balances[account] += amount
        flying[transfer_id] -= amount if kind != "opening" else 0
    assert min(flying.values(), default=0) >= 0, "a transfer pays out more than it took"
    assert min(balances.values(), default=0) >= 0, "a balance is below zero"
    assert dict(balances) == dict(db.execute("SELECT account, balance FROM accounts"))
    return +flying


def check(db):
    """The oracle, and that each row is as the law of the ledger has it."""
    accounts = {account for (account,) in db.execute("SELECT account FROM accounts")}
    rows = {row[0]: row for row in db.execute("SELECT * FROM operations")}
    for op_id, transfer_id, kind, account, amount, counterparty, void in rows.values():
        types = [type(column) for column in rows[op_id][:6]]
        assert types == [str, str, str, str, int, str]
        assert op_id == f"{transfer_id}-{kind}"
        debit = rows.get(f"{transfer_id}-debit", ())
        if kind == "opening":
            assert transfer_id == account and void is None
        elif kind == "debit":
            assert amount < 0 and (void or accounts >= {account, counterparty})
        elif kind == "credit":
            assert debit[3:] == (counterparty, -amount, account, None)
        else:
            assert kind == "reversal" and void is None and rows[f"{transfer_id}-credit"][6]
            assert debit[3:] == (account, -amount, counterparty, None)
    return adds_up(db)


def settled(db):
    """op id -> (account, amount, void) of all that has settled, but the openings."""
    query = "SELECT op_id, account, amount, void FROM operations WHERE kind <> 'opening'"
    return {op_id: (account, amount, void) for op_id, account, amount, void in db.execute(query)}


def opened(path=":memory:"):
    """A ledger in which alice has 100.00 and bob 50.00."""
    ledger = main.open_ledger(os.fspath(path))
    main.open_account(ledger, "alice", 10000)
    main.open_account(ledger, "bob", 5000)
    return ledger


def operation(op_id, **changes):
    """An operation of a transfer of 5.00 from alice to bob."""
    transfer_id, _, kind = op_id.rpartition("-")
    account, counterparty = ("bob", "alice") if kind == "credit" else ("alice", "bob")
    row = (op_id, transfer_id, kind, account, -500 if kind == "debit" else 500, counterparty)
    return main.Operation(*row)._replace(**changes)


@pytest.fixture
def db():
    """A ledger in memory, of alice and bob. Whatever a test does to it, it still adds up."""
    ledger = opened()
    yield ledger
    check(ledger)
    ledger.close()


@pytest.fixture
def bank(db):
    bank = main.start(db)
    yield bank
    threading.Thread(target=bank.resonate.stop).start()  # it takes the SDK 0.3 s


@pytest.fixture
def ledger(tmp_path):
    """The ledger of `cli`, of alice and bob; it adds up when the test ends."""
    connection = opened(tmp_path / "ledger.db")
    yield connection
    check(connection)
    connection.close()


@pytest.fixture
def cli(tmp_path):
    """Runs `python main.py ...` as a process, in a folder of its own."""

    def run(words, **options):
        command = [sys.executable, str(MAIN), *(words.split() if isinstance(words, str) else words)]
        usual = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True}
        return subprocess.run(command, **usual | options)

    return run


def in_a_process(code):
    """Runs code that may hang, or end its process, if what is tested is broken. What it prints.

    It has a `folder`, in memory if there is such a disk: a kill spares it.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as new:
        code = f"import os; folder = {new!r} + '/0'; os.mkdir(folder)\n{code}"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def is_killed(work, folder, number):
    """Whether a process that does this work, and kills itself at the n-th statement, gets there."""
    numbers = itertools.count(1)
    connect = sqlite3.connect

    def kill_at_number(_sql):
        if next(numbers) == number:
            signal.raise_signal(signal.SIGKILL)

    def connect_and_trace(*args, **options):
        db = connect(*args, **options)
        db.set_trace_callback(kill_at_number)
        return db

    def run():
        sqlite3.connect = connect_and_trace
        work(folder)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def kill_everywhere(work, again, state_of, folder, known=None):
    """Kills the work at every statement, each time in a copy of the folder. Returns how often.

    If that leaves a state that is not yet known, what finishes it is killed everywhere, and so on.
    """
    known = known or set()
    known.add(state_of(folder))
    kills = 0
    for number in itertools.count(1):
        copy = f"{folder}-{number}"
        shutil.copytree(folder, copy)
        if not is_killed(work, copy, number):
            assert len(state_of(copy)) == 1, "a transfer stays in flight"
            return kills
        kills += 1
        if state_of(copy) not in known:
            kills += kill_everywhere(again, again, state_of, copy, known)


TRIED = Counter()  # a test adds to it by `record_property(words, number)`


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        TRIED.update(dict(report.user_properties))


def pytest_terminal_summary(terminalreporter):
    for words, number in TRIED.items():
        terminalreporter.line(f"{number:>9,} {words}")
