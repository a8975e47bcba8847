"""What the tests share: ledgers, engines, the command line, the oracle, and the closing count."""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import main

MAIN = Path(main.__file__)
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{MAIN.parent}{os.pathsep}{MAIN.parent / 'tests'}"}


def check(db):
    """The oracle: every cent is somewhere, and each balance is the sum of its entries.

    It adds up the table of operations by itself, and uses no view of the schema.
    """
    query = "SELECT transfer_id, kind, account, amount FROM operations WHERE void IS NULL"
    balances = Counter()
    flying = Counter()
    for transfer_id, kind, account, amount in db.execute(query).fetchall():
        balances[account] += amount
        if kind != "opening":
            flying[transfer_id] -= amount
    assert dict(balances) == dict(db.execute("SELECT account, balance FROM accounts"))
    assert min(balances.values(), default=0) >= 0, "a balance is below zero"
    assert min(flying.values(), default=0) >= 0, "a transfer paid out more than it took"
    assert +flying == {transfer_id: amount for transfer_id, *_, amount in main.in_flight(db)}


def settled(db):
    """op id -> (account, amount, void) of all that has settled, but the openings."""
    query = "SELECT op_id, account, amount, void FROM operations WHERE kind <> 'opening'"
    return {op_id: (account, amount, void) for op_id, account, amount, void in db.execute(query)}


def opened(path=":memory:"):
    """A ledger in which alice has 100.00 and bob 50.00."""
    ledger = main.open_ledger(path)
    main.open_account(ledger, "alice", 10000)
    main.open_account(ledger, "bob", 5000)
    return ledger


def debited(db, *transfer_ids):
    """Leaves transfers of 5.00 from alice to bob in flight."""
    for name in transfer_ids:
        main.settle(db, main.Operation(f"{name}-debit", name, "debit", "alice", -500, "bob"))


def connecting(prepare):
    """`sqlite3.connect`, but it prepares each new connection."""
    connect = sqlite3.connect

    def connect_and_prepare(*args, **options):
        db = connect(*args, **options)
        prepare(db)
        return db

    return connect_and_prepare


def in_a_process(code):
    """Runs code that may hang, or end its process, if what is tested is broken. What it prints."""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr[-500:]) == (0, "")
    return done.stdout


@pytest.fixture
def db():
    """A ledger in memory, of alice and bob. Whatever a test did to it, it still adds up."""
    ledger = opened()
    yield ledger
    check(ledger)
    ledger.close()


@pytest.fixture
def engine(db):
    """The SDK on that ledger, with a promise store that knows nothing."""
    resonate, transfer = main.start(db)
    yield resonate, transfer
    threading.Thread(target=resonate.stop).start()  # it takes the SDK 0.3 s


@pytest.fixture
def transfer(engine):
    return engine[1]


class Run(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def results(self):
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]

    @property
    def result(self):
        return self.results[-1]


@pytest.fixture
def ledger(tmp_path):
    """The ledger of `cli`, of alice and bob; it adds up when the test ends."""
    connection = opened(os.fspath(tmp_path / "ledger.db"))
    yield connection
    check(connection)
    connection.close()


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs `python main.py ...` as a process, in a folder of its own."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def run(*words, **options):
        usual = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run([sys.executable, str(MAIN), *words], **usual | options)
        return Run(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def inside(monkeypatch, tmp_path, capsys):
    """As `cli`, but in this process, which is faster. What a command sets is put back."""
    monkeypatch.chdir(tmp_path)
    handler, level = signal.getsignal(signal.SIGINT), main.LOG.level
    root = logging.getLogger()

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["main.py", *words])
        handlers = root.handlers[:]
        try:
            status = main.main()
        except SystemExit as end:
            status = end.code
        root.handlers[:] = handlers
        return Run(status, *capsys.readouterr())

    yield run
    signal.signal(signal.SIGINT, handler)
    main.LOG.setLevel(level)
    logging.getLogger("resonate.utils").handlers.clear()


# What this very run has tried: a test adds to it by `record_property(words, number)`.
TRIED = Counter()


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        for words, number in report.user_properties:
            TRIED[words] += number


def pytest_terminal_summary(terminalreporter):
    if not TRIED:
        return
    terminalreporter.section("tried in this run")
    for words, number in TRIED.items():
        terminalreporter.line(f"{number:>9,} {words}")
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        why = str(skipped[0].longrepr[2]).removeprefix("Skipped: ")
        terminalreporter.line(f"{len(skipped):>9,} tests skipped: {why}")
