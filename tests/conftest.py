"""What the tests share: ledgers, engines, the command line, the oracle, and the closing count."""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import main

MAIN = Path(main.__file__)
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{MAIN.parent}{os.pathsep}{MAIN.parent / 'tests'}"}


def check(db: sqlite3.Connection) -> None:
    """The oracle: every cent is somewhere, and each balance is the sum of its entries.

    It adds up the table of operations by itself, and uses no view of the schema.
    """
    operations = db.execute("SELECT transfer_id, kind, account, amount, void FROM operations")
    balances = dict(db.execute("SELECT account, balance FROM accounts").fetchall())
    sums: Counter[str] = Counter()
    transfers: Counter[str] = Counter()
    openings = 0
    for transfer_id, kind, account, amount, void in operations.fetchall():
        if void is not None:
            continue
        sums[account] += amount
        if kind == "opening":
            openings += amount
        else:
            transfers[transfer_id] += amount
    flying = {transfer_id: -net for transfer_id, net in transfers.items() if net}
    assert balances == dict(sums)
    assert all(amount >= 0 for amount in balances.values()), "a balance is below zero"
    assert all(amount >= 0 for amount in flying.values()), "a transfer paid out more than it took"
    assert flying == {transfer_id: amount for transfer_id, *_, amount in main.in_flight(db)}
    assert sum(balances.values()) + sum(flying.values()) == openings


def settled(db: sqlite3.Connection) -> dict[str, tuple[str, int, str | None]]:
    """op id -> (account, amount, void) of all that has settled, but the openings."""
    query = "SELECT op_id, account, amount, void FROM operations WHERE kind <> 'opening'"
    return {op_id: (account, amount, void) for op_id, account, amount, void in db.execute(query)}


def opened(path: str = ":memory:") -> sqlite3.Connection:
    """A ledger in which alice has 100.00 and bob 50.00."""
    ledger = main.open_ledger(path)
    main.open_account(ledger, "alice", 10000)
    main.open_account(ledger, "bob", 5000)
    return ledger


def debited(db: sqlite3.Connection, *transfer_ids: str, target: str = "bob") -> None:
    """Leaves transfers of 5.00 from alice in flight."""
    for name in transfer_ids:
        main.settle(db, main.Operation(f"{name}-debit", name, "debit", "alice", -500, target))


def in_a_process(code: str) -> None:
    """Runs code that may hang, or end its process, if what is tested is broken."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr[-500:]) == (0, "")


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    """A ledger in memory, of alice and bob. Whatever a test did to it, it still adds up."""
    ledger = opened()
    yield ledger
    check(ledger)
    ledger.close()


@pytest.fixture(scope="session")
def stopping() -> Iterator[ThreadPoolExecutor]:
    """Stops engines while other tests run: it takes the SDK 0.3 s."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def engine(
    db: sqlite3.Connection, stopping: ThreadPoolExecutor
) -> Iterator[Callable[[], main.Transfer]]:
    """A function that starts the SDK on the ledger, with a promise store that knows nothing."""
    started = []

    def start() -> main.Transfer:
        resonate, transfer = main.start(db)
        started.append(resonate)
        return transfer

    yield start
    for resonate in started:
        stopping.submit(resonate.stop)


@pytest.fixture
def transfer(engine: Callable[[], main.Transfer]) -> main.Transfer:
    return engine()


class Run:
    """What a command did."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.status, self.out, self.err = done.returncode, done.stdout, done.stderr

    @property
    def results(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]

    @property
    def result(self) -> Any:
        return self.results[-1]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """The ledger of `cli`, of alice and bob; it adds up when the test ends."""
    connection = opened(os.fspath(tmp_path / "ledger.db"))
    yield connection
    check(connection)
    connection.close()


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Run]:
    """Runs `python main.py ...` as a process, in a folder of its own."""

    def run(*words: str | bytes, **options: Any) -> Run:
        usual = {"cwd": tmp_path, "capture_output": True, "text": True, "errors": "replace"}
        command = [sys.executable, str(MAIN), *words]
        return Run(subprocess.run(command, check=False, **usual | {"timeout": 60} | options))

    return run


@pytest.fixture
def inside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Run]]:
    """As `cli`, but in this process, which is faster. What a command sets is put back."""
    monkeypatch.chdir(tmp_path)
    handler, level = signal.getsignal(signal.SIGINT), main.LOG.level
    sdk = logging.getLogger("resonate.utils")
    root = logging.getLogger()

    def run(*words: str | bytes) -> Run:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(os.fsdecode, words)])
        handlers = root.handlers[:]
        try:
            status: Any = main.main()
        except SystemExit as end:
            status = end.code
        root.handlers[:] = handlers
        return Run(subprocess.CompletedProcess(words, status, *capsys.readouterr()))

    yield run
    signal.signal(signal.SIGINT, handler)
    main.LOG.setLevel(level)
    sdk.handlers.clear()
    sdk.propagate = True


# ---- What this very run has tried: a test adds to it by `record_property(words, number)` --------

TRIED: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        for words, number in report.user_properties:
            TRIED[words] += int(str(number))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not TRIED:
        return
    terminalreporter.section("tried in this run")
    for words, number in TRIED.items():
        terminalreporter.line(f"{number:>9,} {words}")
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        why = str(skipped[0].longrepr[2]).removeprefix("Skipped: ")
        terminalreporter.line(f"{len(skipped):>9,} tests skipped: {why}")
