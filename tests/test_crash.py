"""kill -9 for real, two processes at once, and a ledger file that lets one down."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import MAIN, Run, check, entries

import main

Cli = Callable[..., Run]

# path: (kills, kills of what recovers from the first, how it ends). Said in the README, too.
KILLS = {"commit": (41, 158, "committed"), "compensate": (48, 92, "compensated"), "reject": (35, 17, "rejected")}


@pytest.mark.parametrize("path", KILLS)
def test_killed_at_every_statement(path: str, tmp_path: Path) -> None:
    """And then, where the ledger is in a new state, whatever recovers it is killed at every statement as well."""
    first, second, status = KILLS[path]
    command = [sys.executable, str(MAIN.parent / "tests" / "killer.py"), path, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(MAIN.parent)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    *fired, end = map(json.loads, done.stdout.splitlines())
    assert (end["points"], end["answer"]["status"]) == (first, status)
    assert {kill["first"] for kill in fired} == set(range(1, first + 1))
    assert sum(kill["second"] > 0 for kill in fired) == second
    for kill in fired:
        results, flying, again = kill["answer"]
        assert again == end["answer"], kill
        assert flying == []
        assert results in ([], [end["answer"]])
        with closing(sqlite3.connect(f"{kill['folder']}/ledger.db")) as db:
            check(db)
            assert dict(db.execute("SELECT account, balance FROM accounts")) == (
                {"alice": 7000, "bob": 8000} if status == "committed" else {"alice": 10000, "bob": 5000}
            )


def together(*commands: tuple[Any, ...], cwd: Path) -> list[Run]:
    """Runs commands at the same time."""
    children = [
        subprocess.Popen(
            [sys.executable, str(MAIN), *map(str, words)],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in commands
    ]
    done = [(child, *child.communicate(timeout=60)) for child in children]
    return [Run(subprocess.CompletedProcess((), child.returncode, out, err)) for child, out, err in done]


def test_the_same_transfer_in_two_processes(cli: Cli, ledger: Any, tmp_path: Path) -> None:
    """On a ledger that they have to create at the same time, too; one of them is told that the target refuses."""
    words = ("transfer", "t1", "alice", "bob", "10")
    one, two = together(words, (*words, "--fail-credit"), cwd=tmp_path)
    assert one.result == two.result == cli(*words).result
    assert one.result["status"] in ("committed", "compensated")


def test_an_account_that_cannot_pay_for_all_of_them(ledger: Any, tmp_path: Path) -> None:
    """Six at once, and it can pay for three."""
    runs = together(*(("transfer", f"t{number}", "alice", "bob", "30") for number in range(6)), cwd=tmp_path)
    assert sorted(run.status for run in runs) == [0, 0, 0, 1, 1, 1]
    assert main.balance(ledger(), "alice") == 1000


def test_recover_beside_a_live_one(cli: Cli, ledger: Any, tmp_path: Path) -> None:
    cli("transfer", "t0", "alice", "bob", "1", "--crash-after", "debit")
    runs = together(
        ("recover",),
        ("transfer", "t1", "alice", "bob", "1"),
        ("transfer", "t0", "alice", "bob", "1"),
        ("recover",),
        cwd=tmp_path,
    )
    assert [run.status for run in runs[1:3]] == [0, 0]
    assert cli("recover").status == 0
    assert main.balance(ledger(), "bob") == 5200


# Storage faults while a transfer runs. The SDK's delays are taken out; a fault is cleared when a retry has been seen.


@pytest.fixture
def retried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Callable[[], bool]:
    monkeypatch.setattr("resonate.retry_policies.Exponential.next", lambda _self, attempt: 0.001 * attempt)
    return lambda: "(retrying in" in caplog.text


def fill(db: sqlite3.Connection) -> None:
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count = {pages}")


FAULTS: dict[str, tuple[Callable[[sqlite3.Connection], Any], Callable[[sqlite3.Connection], Any]]] = {
    "disk full": (fill, lambda db: db.execute("PRAGMA max_page_count = 100000")),
    "locked": (lambda db: db.execute("PRAGMA busy_timeout = 20"), lambda db: db.execute("PRAGMA busy_timeout = 5000")),
    "turned read-only": (
        lambda db: db.execute("PRAGMA query_only = ON"),
        lambda db: db.execute("PRAGMA query_only = OFF"),
    ),
}


@pytest.mark.parametrize("after", ["nothing", "debit", "void"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_it_runs(
    fault: str, after: str, tmp_path: Path, retried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not reported as done until it is; when the fault clears, the saga goes on as if nothing had been."""
    db = main.open_ledger(str(tmp_path / "ledger.db"))
    other = sqlite3.connect(tmp_path / "ledger.db", autocommit=True, check_same_thread=False)
    main.open_account(db, "alice", 10000)
    main.open_account(db, "x" * 4000)  # names so long that each entry needs pages of its own
    request = ("t1", "alice", "x" * 4000, 3000)
    breaks, clears = FAULTS[fault]
    real, hit = main.settle, threading.Event()

    def settle(db: Any, op_id: str, account: str, amount: int, kind: str, *rest: Any, **more: Any) -> Any:
        reason = real(db, op_id, account, amount, kind, *rest, **more)
        if not hit.is_set() and after == ("void" if more.get("void") else kind):
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
    thread = threading.Thread(
        target=lambda: results.append(main.submit(transfer, *request, simulate_credit_failure=after == "void"))
    )
    thread.start()
    while not retried():
        assert thread.is_alive()
        thread.join(0.01)
    assert results == []
    with main.LOCK:
        if fault == "locked":
            other.execute("COMMIT")
        clears(db)
    thread.join(30)
    (result,) = results
    assert result["status"] in ("committed", "compensated")
    resonate.stop()
    resonate, transfer = main.start(db)
    assert main.submit(transfer, *request) == result
    assert main.in_flight(db) == []
    check(db)
    resonate.stop()
    other.close()
    db.close()


@pytest.fixture
def history(cli: Cli, tmp_path: Path) -> list[Any]:
    """The state of a ledger after each of some transfers, and the ledger as a kill leaves it: all of it in the WAL."""
    db = main.open_ledger(str(tmp_path / "ledger.db"))
    states: list[Any] = [{}]
    main.open_account(db, "alice", 10000)
    main.open_account(db, "bob", 5000)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    resonate, transfer = main.start(db)
    db.set_trace_callback(lambda _sql: None)
    real = main.settle

    def settle(*args: Any, **rest: Any) -> Any:
        reason = real(*args, **rest)
        states.append(entries(db))
        return reason

    main.settle = settle
    try:
        for number in range(3):
            main.submit(transfer, f"t{number}", "alice", "bob", 100 + number, simulate_credit_failure=number == 1)
    finally:
        main.settle = real
    (tmp_path / "killed").mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"ledger.db{suffix}", tmp_path / "killed")
    resonate.stop()
    db.close()
    return states


def test_a_wal_cut_off_anywhere_leaves_a_prefix_of_history(history: list[Any], tmp_path: Path, cli: Cli) -> None:
    """And each of these can be finished."""
    wal = (tmp_path / "killed" / "ledger.db-wal").read_bytes()
    found = []
    for size in range(len(wal), -1, -997):
        folder = tmp_path / str(size)
        folder.mkdir()
        shutil.copy(tmp_path / "killed" / "ledger.db", folder)
        (folder / "ledger.db-wal").write_bytes(wal[:size])
        with closing(main.open_ledger(str(folder / "ledger.db"))) as db:
            check(db)
            found.append(history.index(entries(db)))
            flying = main.in_flight(db)
            resonate, transfer = main.start(db)
            assert len(main.recover(db, transfer)) == len(flying)
            for number in range(3):
                main.submit(transfer, f"t{number}", "alice", "bob", 100 + number, simulate_credit_failure=number == 1)
            resonate.stop()
            check(db)
            assert main.balance(db, "alice") + main.balance(db, "bob") == 15000
            assert main.in_flight(db) == []
    assert found == sorted(found, reverse=True)
    assert set(found) == set(range(len(history)))


def test_a_corrupt_page(history: list[Any], cli: Cli, tmp_path: Path) -> None:
    """One clear line and status 2, or, where the damage is beside the point, a journal that adds up; no traceback."""
    path = tmp_path / "ledger.db"
    good = path.read_bytes()
    seen = set()
    for page in range(len(good) // 4096):
        path.write_bytes(good[: page * 4096] + b"\xa5" * 4096 + good[(page + 1) * 4096 :])
        for words in (["journal"], ["transfer", "new", "alice", "bob", "1"], ["recover"]):
            run = cli(*words)
            assert "Traceback" not in run.err
            assert run.err.count("\n") == (run.status == 2)
            seen.add((words[0], run.status))
    assert {("journal", 2), ("transfer", 2), ("recover", 2)} <= seen
    path.write_bytes(good)
    assert cli("journal").status == 0


def test_the_ledger_is_deleted_between_commands(cli: Cli, ledger: Any, tmp_path: Path) -> None:
    """A new one starts, with all its money, also if the WAL of the old one is still there."""
    cli("transfer", "t1", "alice", "bob", "1", "--crash-after", "debit")
    assert (tmp_path / "ledger.db-wal").stat().st_size > 0
    (tmp_path / "ledger.db").unlink()
    assert cli("recover").status == 0
    assert "balances 150.00 + in flight 0.00, openings 150.00" in cli("journal").out
    assert cli("transfer", "t1", "alice", "bob", "1").status == 0


def test_a_ledger_that_grows_too_large_for_its_disk_in_a_command(cli: Cli, ledger: Any) -> None:
    """The fault of a step ends the command at once, in one line; the same command finishes the job."""
    cli("journal")
    script = (
        "import main, sys; real = main.open_ledger\n"
        "def full(*how):\n"
        "    db = real(*how); pages = db.execute('PRAGMA page_count').fetchone()[0]\n"
        "    db.execute(f'PRAGMA max_page_count = {pages}'); return db\n"
        "main.open_ledger = full; sys.exit(main.main())"
    )
    name = "x" * 9000
    environment = os.environ | {"PYTHONPATH": str(MAIN.parent)}
    words = ["transfer", "t1", "alice", name, "1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=Path(ledger().execute("PRAGMA database_list").fetchone()[2]).parent,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: ledger.db: OperationalError('database or disk is full'). "
        "Nothing is lost: mend that, and run the same command again\n"
    )
    assert entries(ledger()) == {}
    assert cli(*words).result["error"] == "credit of 1.00: unknown account"
