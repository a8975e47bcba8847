"""What the tests share: ledgers, engines, the command line as a child process, and the oracle."""

import json
import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import main

MAIN = Path(main.__file__)


def check(db: sqlite3.Connection) -> None:
    """The oracle: every cent is somewhere, no balance is below zero, and each is the sum of its entries."""
    entries = db.execute("SELECT op_id, transfer_id, account, amount, kind FROM entries").fetchall()
    balances = dict(db.execute("SELECT account, balance FROM accounts").fetchall())
    sums: Counter[str] = Counter()
    transfers: Counter[str] = Counter()
    for _, transfer_id, account, amount, kind in entries:
        if kind != "void":
            sums[account] += amount
        if transfer_id is not None:
            transfers[transfer_id] += amount
    openings = sum(amount for *_, amount, kind in entries if kind == "opening")
    assert balances == dict(sums)
    assert all(amount >= 0 for amount in balances.values())
    assert all(net <= 0 for net in transfers.values()), "a transfer paid out more than it took"
    flying = {transfer_id: -net for transfer_id, net in transfers.items() if net}
    assert flying == {transfer_id: amount for transfer_id, _, _, amount in main.in_flight(db)}
    assert sum(balances.values()) + sum(flying.values()) == openings


def entries(db: sqlite3.Connection) -> dict[str, tuple[Any, ...]]:
    """op id -> (account, amount, kind) of every entry but the openings."""
    rows = db.execute("SELECT op_id, account, amount, kind FROM entries WHERE kind <> 'opening'")
    return {op_id: tuple(rest) for op_id, *rest in rows}


def in_a_process(code: str) -> None:
    """Runs code that may hang, or end its process, if what is tested is broken."""
    environment = os.environ | {"PYTHONPATH": f"{MAIN.parent}{os.pathsep}{MAIN.parent / 'tests'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr[-500:]) == (0, "")


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    """A ledger in memory: alice has 100.00, bob 50.00. Whatever a test did to it, it still adds up."""
    ledger = main.open_ledger()
    main.open_account(ledger, "alice", 10000)
    main.open_account(ledger, "bob", 5000)
    yield ledger
    check(ledger)
    ledger.close()


@pytest.fixture
def engine(db: sqlite3.Connection) -> Iterator[Callable[[], Any]]:
    """A function that starts the SDK on the ledger, with a promise store that remembers nothing."""
    started = []

    def start() -> Any:
        resonate, transfer = main.start(db)
        started.append(resonate)
        return transfer

    yield start
    for resonate in started:
        resonate.stop()


@pytest.fixture
def transfer(engine: Callable[[], Any]) -> Any:
    return engine()


class Run:
    """What a command did."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def result(self) -> Any:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Run]:
    """Runs `python main.py ...` in an empty folder of its own."""

    def run(*words: str | bytes, **options: Any) -> Run:
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "errors": "replace", "timeout": 60} | options
        return Run(subprocess.run([sys.executable, str(MAIN), *words], check=False, **options))

    return run


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Callable[[], sqlite3.Connection]]:
    """Opens the ledger that `cli` uses; it adds up when the test ends."""
    opened = []

    def open_it() -> sqlite3.Connection:
        opened.append(main.open_ledger(os.fspath(tmp_path / "ledger.db")))
        return opened[-1]

    yield open_it
    for connection in opened:
        check(connection)
        connection.close()
