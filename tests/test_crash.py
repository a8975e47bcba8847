"""kill -9 for real, two processes at once, and a ledger file that lets one down."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, MAIN, Run, check, debited, opened, settled
from killer import PATHS

import main

Cli = Callable[..., Run]


@pytest.fixture
def fast_folder() -> Iterator[str]:
    """A folder in memory, where there is one: a SIGKILL takes nothing from a file there either."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield folder


# So many kills that it cannot have left out a step. Their sum is in the README.
AT_LEAST = {"committed": 60, "compensated": 80, "rejected": 14}


def kills(path: str, folder: str) -> list[Any]:
    command = [sys.executable, str(MAIN.parent / "tests" / "killer.py"), path, folder]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("path", PATHS)
def test_a_transfer_killed_at_any_statement_is_finished_by_the_next_process(
    path: str, fast_folder: str, record_property: Any
) -> None:
    """Also if what finishes it is killed at any statement."""
    committed = path == "committed"
    fired = kills(path, fast_folder)
    for run in fired:
        results, flying, again = run["answer"]
        assert again["status"] == path, run
        assert flying == []
        assert results in ([], [again])
        with closing(sqlite3.connect(run["ledger"])) as db:
            check(db)
            balances = dict(db.execute("SELECT * FROM accounts"))
        expected = {"alice": 7000, "bob": 8000} if committed else {"alice": 10000, "bob": 5000}
        assert balances == expected
    number = sum(run["killed"] for run in fired)
    assert number >= AT_LEAST[path]
    record_property("SIGKILLs of real processes at a statement: 0 lost or created", number)


def test_a_ledger_whose_creation_is_killed_at_any_statement_is_created_by_the_next_process(
    fast_folder: str, record_property: Any
) -> None:
    fired = kills("creation", fast_folder)
    for run in fired:
        assert run["answer"] == [10000, 5000]
        with closing(main.open_ledger(run["ledger"])) as db:
            check(db)
    assert len(fired) > 10
    record_property("SIGKILLs of real processes at a statement: 0 lost or created", len(fired))


# ---- Several processes ---------------------------------------------------------------------------


def together(*commands: tuple[Any, ...], cwd: Path) -> list[Run]:
    """Runs commands at the same time."""
    children = []
    for words in commands:
        command = [sys.executable, str(MAIN), *map(str, words)]
        pipe = subprocess.PIPE
        children.append(subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True))
    done = [(child, *child.communicate(timeout=60)) for child in children]
    return [
        Run(subprocess.CompletedProcess((), child.returncode, out, err)) for child, out, err in done
    ]


def test_the_same_transfer_in_two_processes_is_one(
    cli: Cli, ledger: sqlite3.Connection, tmp_path: Path
) -> None:
    """One of them is told that the target refuses."""
    words = ("transfer", "t1", "alice", "bob", "10")
    one, two = together(words, (*words, "--fail-credit"), cwd=tmp_path)
    assert one.result == two.result == cli(*words).result
    assert one.result["status"] in ("committed", "compensated")


def test_six_processes_pay_no_more_than_the_account_has(
    ledger: sqlite3.Connection, tmp_path: Path
) -> None:
    commands = [("transfer", f"t{number}", "alice", "bob", "30") for number in range(6)]
    runs = together(*commands, cwd=tmp_path)
    assert sorted(run.status for run in runs) == [0, 0, 0, 1, 1, 1]
    assert main.balance(ledger, "alice") == 1000


def test_recover_beside_live_transfers_and_another_recover(
    cli: Cli, ledger: sqlite3.Connection, tmp_path: Path
) -> None:
    debited(ledger, "t0")
    runs = together(
        ("recover",),
        ("transfer", "t1", "alice", "bob", "1"),
        ("transfer", "t0", "alice", "bob", "5"),
        ("recover",),
        cwd=tmp_path,
    )
    assert [run.status for run in runs[1:3]] == [0, 0]
    assert cli("recover").status == 0
    assert main.balance(ledger, "bob") == 5600


def test_two_processes_create_a_ledger_at_once(cli: Cli, tmp_path: Path) -> None:
    runs = together(("open", "alice", "100"), ("open", "bob", "50"), cwd=tmp_path)
    assert [(run.status, run.err) for run in runs] == [(0, "")] * 2
    assert "150.00 in accounts + 0.00 in flight, 150.00 opened" in cli("journal").out


# ---- A ledger that fails while a transfer runs ---------------------------------------------------


def fill(db: sqlite3.Connection) -> None:
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")


Change = Callable[[sqlite3.Connection], Any]
FAULTS: dict[str, tuple[Change, Change]] = {
    "disk full": (fill, lambda db: db.execute("PRAGMA max_page_count = 100000")),
    "locked": (
        lambda db: db.execute("PRAGMA busy_timeout = 20"),
        lambda db: db.execute("PRAGMA busy_timeout = 5000"),
    ),
    "read-only": (
        lambda db: db.execute("PRAGMA query_only = ON"),
        lambda db: db.execute("PRAGMA query_only = OFF"),
    ),
}


@pytest.mark.parametrize("after", ["nothing", "debit", "void"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_transfer_waits_for_a_ledger_that_fails_and_goes_on_when_it_works_again(
    fault: str,
    after: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It says so, and reports nothing as done until it is."""
    pause = "resonate.retry_policies.Exponential.next"
    monkeypatch.setattr(pause, lambda _self, attempt: 0.001 * attempt)
    path = os.fspath(tmp_path / "ledger.db")
    db = opened(path)
    db.set_authorizer(None)  # it would deny the PRAGMAs
    other = sqlite3.connect(path, autocommit=True, check_same_thread=False)
    long_name = "x" * 4000  # so that each entry needs pages of its own
    main.open_account(db, long_name)
    request = ("t1", "alice", long_name, 3000)
    breaks, clears = FAULTS[fault]
    real, hit = main.settle, threading.Event()

    def settle(db: Any, operation: main.Operation, void: str | None = None) -> Any:
        reason = real(db, operation, void)
        if not hit.is_set() and after == ("void" if void else operation.kind):
            begin()
        return reason

    def begin() -> None:
        hit.set()
        with main.LOCK:
            if fault == "locked":
                other.execute("BEGIN IMMEDIATE")
            breaks(db)

    monkeypatch.setattr(main, "settle", settle)
    resonate, transfer = main.start(db)
    if after == "nothing":
        begin()
    results: list[Any] = []
    fail = {"simulate_credit_failure": after == "void"}

    def run() -> None:
        results.append(main.submit(db, transfer, *request, **fail))

    thread = threading.Thread(target=run)
    thread.start()
    while "(retrying in" not in caplog.text:
        assert thread.is_alive()
        thread.join(0.01)
    assert results == []
    with main.LOCK:
        if fault == "locked":
            other.execute("COMMIT")
        clears(db)
    thread.join(30)
    [result] = results
    assert result["status"] in ("committed", "compensated")
    assert main.submit(db, transfer, *request) == result
    assert main.in_flight(db) == []
    check(db)
    resonate.stop()
    other.close()
    db.close()


@pytest.fixture
def history(tmp_path: Path) -> list[Any]:
    """The state of a ledger after each of some operations, and, in the folder `killed`, the ledger
    as a kill leaves it: all of it in the WAL."""
    db = opened(os.fspath(tmp_path / "ledger.db"))
    db.set_authorizer(None)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    resonate, transfer = main.start(db)
    real = main.settle
    states: list[Any] = [{}]

    def settle(*args: Any, **rest: Any) -> Any:
        reason = real(*args, **rest)
        states.append(settled(db))
        return reason

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(main, "settle", settle)
        requests(db, transfer)
    (tmp_path / "killed").mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"ledger.db{suffix}", tmp_path / "killed")
    resonate.stop()
    db.close()
    return states


def requests(db: sqlite3.Connection, transfer: main.Transfer) -> None:
    for number in range(3):
        fail = {"simulate_credit_failure": number == 1}
        main.submit(db, transfer, f"t{number}", "alice", "bob", 100 + number, **fail)


def test_a_wal_cut_off_anywhere_leaves_a_prefix_of_history_that_can_be_finished(
    history: list[Any], tmp_path: Path
) -> None:
    wal = (tmp_path / "killed" / "ledger.db-wal").read_bytes()
    found = []
    for size in range(len(wal), -1, -1999):
        folder = tmp_path / str(size)
        folder.mkdir()
        shutil.copy(tmp_path / "killed" / "ledger.db", folder)
        (folder / "ledger.db-wal").write_bytes(wal[:size])
        with closing(main.open_ledger(os.fspath(folder / "ledger.db"))) as db:
            check(db)
            found.append(history.index(settled(db)))
            flying = main.in_flight(db)
            resonate, transfer = main.start(db)
            assert len(main.recover(db, transfer)) == len(flying)
            requests(db, transfer)
            threading.Thread(target=resonate.stop).start()  # it takes the SDK 0.3 s
            check(db)
            assert main.balance(db, "alice") + main.balance(db, "bob") == 15000
            assert main.in_flight(db) == []
    assert found == sorted(found, reverse=True)
    assert set(found) == set(range(len(history)))


def test_a_broken_page_is_said_in_one_line_or_the_journal_still_adds_up(
    history: list[Any], inside: Cli, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.db"
    good = path.read_bytes()
    seen = set()
    for page in range(len(good) // 4096):
        path.write_bytes(good[: page * 4096] + b"\xa5" * 4096 + good[(page + 1) * 4096 :])
        run = inside("journal")
        assert run.err.count("\n") == (run.status == 2)
        assert run.status == 2 or "every cent is somewhere" in run.out
        seen.add(run.status)
    assert 2 in seen
    path.write_bytes(good)
    assert inside("journal").status == 0


# ---- --crash-after -------------------------------------------------------------------------------

CRASHES = {
    "debit": ([], ["t1-debit"], "committed"),
    "credit": ([], ["t1-credit", "t1-debit"], "committed"),
    "credit --lose-answer": (["--lose-answer"], ["t1-credit", "t1-debit"], "committed"),
    "credit --fail-credit": (["--fail-credit"], ["t1-credit", "t1-debit"], "compensated"),
    "reversal --fail-credit": (
        ["--fail-credit"],
        ["t1-credit", "t1-debit", "t1-reversal"],
        "compensated",
    ),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_command_that_crashes_after_an_operation_is_finished_by_recover_and_reports_the_same(
    cli: Cli, inside: Cli, ledger: sqlite3.Connection, crash: str
) -> None:
    flags, written, status = CRASHES[crash]
    words = ["transfer", "t1", "alice", "bob", "10", *flags]
    run = cli(*words, "--crash-after", crash.split()[0])
    assert (run.status, run.out, run.err) == (-signal.SIGKILL, "", "")
    assert sorted(settled(ledger)) == written
    flying = len(main.in_flight(ledger))
    assert inside("journal").out.count("  in flight ") == flying
    run = inside("recover")
    assert [result["status"] for result in run.results] == [status] * flying
    assert run.status == 0
    assert inside(*words).result["status"] == status


def test_the_same_command_finishes_its_crashed_transfer_too(
    cli: Cli, ledger: sqlite3.Connection
) -> None:
    words = ["transfer", "t1", "alice", "bob", "1000"]
    assert cli(*words, "--crash-after", "debit").status == -signal.SIGKILL
    assert settled(ledger) == {"t1-debit": ("alice", -100000, "insufficient funds")}
    assert cli(*words).result["status"] == "rejected"


def test_a_crash_that_is_not_reached_does_not_happen(cli: Cli, ledger: sqlite3.Connection) -> None:
    words = ("transfer", "t1", "alice", "bob", "1", "--crash-after", "reversal")
    assert cli(*words).status == 0


def test_a_ledger_that_was_deleted_starts_anew_even_if_its_wal_is_left(
    cli: Cli, inside: Cli, tmp_path: Path
) -> None:
    for account in ("alice", "bob"):
        inside("open", account, "100")
    cli("transfer", "t1", "alice", "bob", "1", "--crash-after", "debit")
    assert (tmp_path / "ledger.db-wal").stat().st_size > 0
    (tmp_path / "ledger.db").unlink()
    assert inside("recover").status == 2
    assert inside("open", "alice", "1").status == 0
    assert "1.00 in accounts + 0.00 in flight, 1.00 opened" in inside("journal").out
