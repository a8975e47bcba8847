"""The ledger guards itself: hostile SQL, straight at the connection, and many threads on it."""

import re
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from conftest import check, entries, in_a_process

import main
from main import OperationConflict, TransferRejected, apply_entry, credit_target, give_up

INSERT = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)"


class Context:
    """A context for a step that is called by hand."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def get_dependency(self, name: str) -> sqlite3.Connection:
        assert name == "db"
        return self.db


@pytest.fixture
def ctx(db: sqlite3.Connection) -> Any:
    """A ledger on which t1 is committed, t2 in flight, t3 compensated and t4 rejected."""
    ctx = Context(db)
    for number in (1, 2, 3):
        apply_entry(ctx, f"t{number}-debit", "alice", -1000, "debit", counterparty="bob")
    apply_entry(ctx, "t1-credit", "bob", 1000, "credit", counterparty="alice")
    give_up(ctx, Exception("no"), "t3-credit", "bob", 1000, "credit", "alice")
    apply_entry(ctx, "t3-reversal", "alice", 1000, "reversal", counterparty="bob")
    give_up(ctx, Exception("no"), "t4-debit", "alice", -1000, "debit", "bob")
    return ctx


def dump(db: sqlite3.Connection) -> list[Any]:
    return [db.execute(f"SELECT * FROM {table}").fetchall() for table in ("entries", "accounts")]


ROWS = {
    "a float": ("x-debit", "x", "alice", "bob", -1.5, "debit", None),
    "a float that is whole": ("x-debit", "x", "alice", "bob", -100.0, "debit", None),
    "an amount that is text": ("x-debit", "x", "alice", "bob", "-100", "debit", None),
    "no amount": ("x-debit", "x", "alice", "bob", None, "debit", None),
    "no op id": (None, "x", "alice", "bob", -100, "debit", None),
    "no transfer id": ("x-debit", None, "alice", "bob", -100, "debit", None),
    "no account": ("x-debit", "x", None, "bob", -100, "debit", None),
    "no kind": ("x-debit", "x", "alice", "bob", -100, None, None),
    "an unknown kind": ("x-gift", "x", "alice", "bob", 100, "gift", None),
    "an overdraft": ("x-debit", "x", "alice", "bob", -10001, "debit", None),
    "an overdraft of all that fits": ("x-debit", "x", "alice", "bob", -(2**63), "debit", None),
    "an unknown account": ("x-debit", "x", "carol", "bob", -100, "debit", None),
    "a credit to an unknown account": ("t2-credit", "t2", "carol", "alice", 1000, "credit", None),
    "a credit with no debit": ("x-credit", "x", "bob", "alice", 100, "credit", None),
    "a reversal with no debit": ("x-reversal", "x", "alice", "bob", 100, "reversal", None),
    "a reversal beside a credit": ("t1-reversal", "t1", "alice", "bob", 1000, "reversal", None),
    "a credit of more than the debit": ("t2-credit", "t2", "bob", "alice", 1001, "credit", None),
    "a second reversal": ("t3-reversal2", "t3", "alice", "bob", 1000, "reversal", None),
    "a reversal under the op id of a credit": ("t2-credit", "t2", "alice", "bob", 1000, "reversal", None),
    "an entry under another transfer's op id": ("t2-credit", "t1", "bob", "alice", 1000, "credit", None),
    "a credit after its void": ("t3-credit", "t3", "bob", "alice", 1000, "credit", None),
    "a debit after its void": ("t4-debit", "t4", "alice", "bob", -1000, "debit", None),
    "a negative credit": ("t2-credit", "t2", "bob", "alice", -100, "credit", None),
    "a positive debit": ("x-debit", "x", "alice", "bob", 100, "debit", None),
    "a negative reversal": ("t2-reversal", "t2", "alice", "bob", -100, "reversal", None),
    "a negative opening": ("carol-opening", None, "carol", None, -100, "opening", None),
    "an opening that is part of a transfer": ("carol-opening", "x", "carol", None, 100, "opening", None),
    "a second opening": ("alice-opening2", None, "alice", None, 100, "opening", None),
    "a debit of nothing": ("x-debit", "x", "alice", "bob", 0, "debit", None),
    "a credit of nothing": ("t2-credit", "t2", "bob", "alice", 0, "credit", None),
    "a reversal of nothing": ("t2-reversal", "t2", "alice", "bob", 0, "reversal", None),
    "a void with an amount": ("t2-credit", "t2", "bob", "alice", 100, "void", "no"),
    "a void with no reason": ("t2-credit", "t2", "bob", "alice", 0, "void", None),
    "a void of a reversal, which would strand the money": ("t2-reversal", "t2", "alice", "bob", 0, "void", "no"),
    "a void with no account": ("x-debit", "x", None, "bob", 0, "void", "no"),
    "a void with no transfer id": ("x-debit", None, "alice", "bob", 0, "void", "no"),
    "a void of an opening": ("carol-opening", None, "carol", None, 0, "void", "no"),
    "an entry with a reason": ("x-debit", "x", "alice", "bob", -100, "debit", "why not"),
}


@pytest.mark.parametrize("verb", ["INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE"])
@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_what_should_not_go_in_does_not(ctx: Any, row: tuple[Any, ...], verb: str) -> None:
    before = dump(ctx.db)
    try:
        ctx.db.execute(INSERT.replace("INSERT", verb), row)
    except sqlite3.IntegrityError:
        pass
    else:
        assert verb == "INSERT OR IGNORE"
    assert dump(ctx.db) == before


HOSTILE = {
    "update": "UPDATE entries SET amount = 1 WHERE op_id = 't1-credit'",
    "update or ignore": "UPDATE OR IGNORE entries SET reason = 'x'",
    "update or replace": "UPDATE OR REPLACE entries SET op_id = 't2-credit' WHERE op_id = 't1-credit'",
    "delete": "DELETE FROM entries WHERE op_id = 't1-debit'",
    "delete all": "DELETE FROM entries",
    "replace": "REPLACE INTO entries VALUES ('t2-debit', 't2', 'alice', 'bob', -1, 'debit', NULL)",
    "replace an entry by its void": "REPLACE INTO entries VALUES ('t2-debit', 't2', 'alice', 'bob', 0, 'void', 'x')",
    "upsert": "INSERT INTO entries VALUES ('t2-debit', 't2', 'alice', 'bob', -1, 'debit', NULL) "
    "ON CONFLICT (op_id) DO UPDATE SET amount = excluded.amount",
    "an amount beyond 64 bits": "INSERT INTO entries "
    "VALUES ('x-opening', NULL, 'x', NULL, 9223372036854775808, 'opening', NULL)",
    "a balance by hand": "UPDATE accounts SET balance = balance + 1",
    "a balance moved": "UPDATE accounts SET balance = CASE account WHEN 'bob' THEN 15000 ELSE 0 END",
    "a new account with money": "INSERT INTO accounts VALUES ('mallory', 1000000)",
    "an account replaced": "REPLACE INTO accounts VALUES ('alice', 1000000)",
    "an account deleted": "DELETE FROM accounts WHERE account = 'bob'",
    "an account renamed": "UPDATE accounts SET account = 'mallory' WHERE account = 'bob'",
}


@pytest.mark.parametrize("sql", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_sql_changes_nothing(ctx: Any, sql: str) -> None:
    before = dump(ctx.db)
    with pytest.raises(sqlite3.DatabaseError):
        ctx.db.execute(sql)
    assert dump(ctx.db) == before


def test_a_credit_that_overflows_the_balance_is_refused(db: sqlite3.Connection) -> None:
    ctx: Any = Context(db)
    main.open_account(db, "full", 2**63 - 1)
    apply_entry(ctx, "x-debit", "alice", -1, "debit", counterparty="full")
    with pytest.raises(TransferRejected):
        apply_entry(ctx, "x-credit", "full", 1, "credit", counterparty="alice")
    assert main.in_flight(db) == [("x", "alice", "full", 1)]


def test_the_same_entry_again_is_one_entry(ctx: Any) -> None:
    before = dump(ctx.db)
    for _ in range(3):
        apply_entry(ctx, "t2-debit", "alice", -1000, "debit", counterparty="bob")
    assert dump(ctx.db) == before


def test_a_debit_that_landed_is_not_refused_when_it_is_repeated_on_an_empty_account(ctx: Any) -> None:
    apply_entry(ctx, "all-debit", "alice", -main.balance(ctx.db, "alice"), "debit", counterparty="bob")
    amount = main.in_flight(ctx.db)[0][3]
    assert main.balance(ctx.db, "alice") == 0
    apply_entry(ctx, "all-debit", "alice", -amount, "debit", counterparty="bob")


@pytest.mark.parametrize(
    "other",
    [
        ("t2-debit", "bob", -1000, "debit", "alice"),
        ("t2-debit", "alice", -1001, "debit", "bob"),
        ("t2-debit", "alice", -1000, "debit", "carol"),
        ("t2-debit", "alice", -1000, "debit", None),
        ("t1-credit", "bob", 999, "credit", "alice"),
        ("t3-credit", "bob", 999, "credit", "alice"),
        ("t3-credit", "alice", 1000, "credit", "bob"),
        ("t4-debit", "alice", -2000, "debit", "bob"),
        ("t4-debit", "bob", -1000, "debit", "alice"),
    ],
)
def test_an_op_id_used_again_for_something_else_is_a_conflict(ctx: Any, other: tuple[Any, ...]) -> None:
    """An account, an amount or a counterparty that differs, be it from an entry or from a void."""
    before = dump(ctx.db)
    op_id, account, amount, kind, counterparty = other
    with pytest.raises(OperationConflict):
        apply_entry(ctx, op_id, account, amount, kind, counterparty=counterparty)
    with pytest.raises(OperationConflict):
        give_up(ctx, Exception("no"), op_id, account, amount, kind, counterparty)
    assert dump(ctx.db) == before


def test_giving_up_takes_the_op_id_or_learns_that_the_entry_has_it(ctx: Any) -> None:
    assert give_up(ctx, Exception("no"), "t1-credit", "bob", 1000, "credit", "alice") is None
    assert give_up(ctx, Exception("no answer"), "t2-credit", "bob", 1000, "credit", "alice") == (
        "credit of 10.00: no answer"
    )
    assert give_up(ctx, Exception("other"), "t2-credit", "bob", 1000, "credit", "alice") == "credit of 10.00: no answer"
    with pytest.raises(TransferRejected, match=r"^credit of 10.00: no answer$"):
        credit_target(ctx, "t2-credit", "bob", 1000, counterparty="alice")


@pytest.mark.parametrize("said", ["", "\ud800 not text", "\x00\x1b[2J", "x" * 100_000])
def test_nothing_that_a_target_says_keeps_the_void_out(ctx: Any, said: str) -> None:
    assert give_up(ctx, Exception(said), "t2-credit", "bob", 1000, "credit", "alice")
    assert entries(ctx.db)["t2-credit"] == ("bob", 0, "void")


def test_a_fault_that_says_nothing_still_has_a_reason(ctx: Any) -> None:
    reason = give_up(ctx, TimeoutError(), "t2-credit", "bob", 1000, "credit", "alice")
    assert reason == "credit of 10.00: TimeoutError()"


@pytest.mark.parametrize("amount", [100, 0, -1.5])
def test_a_step_that_asks_for_what_cannot_be_is_refused(ctx: Any, amount: Any) -> None:
    """Not ignored: a broken CHECK is no used op id."""
    with pytest.raises(TransferRejected):
        apply_entry(ctx, "x-debit", "alice", amount, "debit", counterparty="bob")
    with pytest.raises(TransferRejected, match="op id, kind and amount agree"):
        apply_entry(ctx, "x-gift", "alice", 100, "gift", counterparty="bob")
    assert "x-debit" not in entries(ctx.db)


def test_openings_belong_to_no_transfer(db: sqlite3.Connection) -> None:
    """A transfer may be called what an account is called."""
    apply_entry(Context(db), "alice-debit", "alice", -100, "debit", counterparty="bob")
    with pytest.raises(TransferRejected):
        apply_entry(Context(db), "bob-credit", "bob", 100, "credit")
    assert main.in_flight(db) == [("alice", "alice", "bob", 100)]


def test_an_account_opens_once(db: sqlite3.Connection) -> None:
    main.open_account(db, "alice", 10000)
    main.open_account(db, "empty")
    assert main.balance(db, "empty") == 0
    for account, opening in (("alice", 10001), ("empty", 1)):
        with pytest.raises(OperationConflict):
            main.open_account(db, account, opening)
    with pytest.raises(sqlite3.IntegrityError):
        main.open_account(db, "poor", -1)
    with pytest.raises(LookupError, match="poor"):
        main.balance(db, "poor")


@pytest.mark.parametrize(
    ("amount", "said"), [(1, "0.01"), (99, "0.99"), (100, "1.00"), (3000, "30.00"), (2**63 - 1, "92233720368547758.07")]
)
def test_a_void_says_which_amount_it_forbids(ctx: Any, amount: int, said: str) -> None:
    reason = give_up(ctx, Exception("no"), "x-debit", "alice", -amount, "debit", "bob")
    assert reason == f"debit of {said}: no"


def test_a_void_that_names_no_amount_forbids_them_all(ctx: Any) -> None:
    """As somebody may write it by hand, to stop a transfer for good."""
    ctx.db.execute(INSERT, ("t2-credit", "t2", "bob", "alice", 0, "void", "stopped by hand"))
    assert give_up(ctx, Exception("no"), "t2-credit", "bob", 1000, "credit", "alice") == "stopped by hand"
    with pytest.raises(TransferRejected, match=r"^stopped by hand$"):
        apply_entry(ctx, "t2-credit", "bob", 1000, "credit", counterparty="alice")


def test_balances_and_checks_use_the_primary_key_alone(db: sqlite3.Connection) -> None:
    """O(log n), by the plan of every statement that a step or a balance runs, those in the trigger too."""
    seen: list[str] = []
    db.set_trace_callback(seen.append)
    apply_entry(Context(db), "t-debit", "alice", -100, "debit", counterparty="bob")
    main.balance(db, "alice")
    db.set_trace_callback(None)
    trigger = re.search(r"entry_moves_balance.*?BEGIN(.*?)\nEND;", main.SCHEMA, re.DOTALL)
    assert trigger
    inner = [re.sub(r"NEW\.\w+", "'t'", sql) for sql in trigger[1].split(";") if sql.strip()]
    inner = [re.sub(r"RAISE\(ABORT, ('.*?')\)", r"\1", sql) for sql in inner]
    db.set_authorizer(None)
    plans = [row[3] for sql in {*seen, *inner} for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")]
    assert any("SEARCH entries USING PRIMARY KEY" in plan for plan in plans)
    assert not [plan for plan in plans if plan.startswith("SCAN") and "CONSTANT ROW" not in plan]


def hammer(what: str) -> None:
    """Eight threads on one connection. Runs in a process of its own, since without the lock some never come back."""
    sys.setswitchinterval(1e-6)
    db = main.open_ledger()
    ctx: Any = Context(db)
    for number in range(8):
        main.open_account(db, f"a{number}", 10**6 + number)
    apply_entry(ctx, "flight-debit", "a7", -1, "debit", counterparty="a0")
    expected = main.in_flight(db)
    start = threading.Barrier(8)

    def write(thread: int, number: int) -> None:
        """Half of them write entries, half of them voids of the same op ids."""
        debit = (f"{number}-debit", f"a{number % 4}", -number - 1, "debit")
        reason = f"debit of {(number + 1) / 100:.2f}: {number}"
        try:
            if thread % 2:
                assert give_up(ctx, Exception(str(number)), *debit, "a5") in (None, reason)
            else:
                apply_entry(ctx, *debit, counterparty="a5")
        except TransferRejected as refusal:
            assert str(refusal) == reason

    def work(thread: int) -> None:
        start.wait()
        for number in range({"writes": 300, "balance": 10000, "in_flight": 1000, "journal": 200}[what]):
            if what == "writes":
                write(thread, number)
            elif what == "journal":
                assert main.journal(db)
            elif what == "balance":
                assert main.balance(db, f"a{thread}") == 10**6 + thread - (thread == 7)
            else:
                assert main.in_flight(db) == expected

    with ThreadPoolExecutor(8) as pool, redirect_stdout(None):
        list(pool.map(work, range(8)))
    check(db)
    assert len(entries(db)) == (301 if what == "writes" else 1)
    db.close()


@pytest.mark.parametrize("what", ["writes", "balance", "in_flight", "journal"])
def test_many_threads_share_a_connection_and_none_misreads(what: str) -> None:
    in_a_process(f"import test_ledger; test_ledger.hammer({what!r})")


def test_a_file_is_durable_and_reopens(tmp_path: Path) -> None:
    path = str(tmp_path / "a.db")
    db = main.open_ledger(path)
    main.open_account(db, "alice", 5)
    db.close()
    db = main.open_ledger(path)
    assert main.balance(db, "alice") == 5
    settings = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "busy_timeout")]
    assert settings == ["wal", 2, 5000]
    check(db)
    db.close()


class Lax(sqlite3.Connection):
    """As SQLite may have been built, and in a hurry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.executescript("PRAGMA synchronous = OFF; PRAGMA busy_timeout = 20")


def test_a_commit_survives_power_loss_whatever_sqlite_was_built_for(tmp_path: Path) -> None:
    with closing(main.open_ledger(str(tmp_path / "a.db"), Lax)) as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_it_opens_beside_one_that_keeps_it_from_wal(tmp_path: Path) -> None:
    """As another process does for a moment that creates the same ledger."""
    path = str(tmp_path / "a.db")
    main.open_ledger(path).close()
    with closing(sqlite3.connect(path, autocommit=True)) as other:
        other.executescript("PRAGMA journal_mode = DELETE; BEGIN")
        other.execute("SELECT * FROM entries").fetchall()
        with closing(main.open_ledger(path, Lax)) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            assert db.execute("PRAGMA recursive_triggers").fetchone() == (1,)
    with closing(main.open_ledger(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE accounts (id INTEGER PRIMARY KEY, name TEXT)",
        "CREATE TABLE unrelated (x)",
        main.SCHEMA + "DROP TRIGGER no_delete",
        main.SCHEMA + "DROP TRIGGER entry_moves_balance",
        main.SCHEMA.replace("amount > 0 AND op_id = transfer_id || '-credit'", "op_id = transfer_id || '-credit'"),
    ],
)
def test_another_database_or_one_without_a_guard_is_refused_and_left_alone(tmp_path: Path, script: str) -> None:
    path = tmp_path / "a.db"
    other = sqlite3.connect(path)
    other.executescript(script)
    other.close()
    before = path.read_bytes()
    with pytest.raises(sqlite3.DatabaseError, match="not a ledger"):
        main.open_ledger(str(path))
    assert path.read_bytes() == before


def test_a_ledger_may_hold_more_than_this_program_needs(tmp_path: Path) -> None:
    path = str(tmp_path / "a.db")
    main.open_ledger(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE INDEX by_account ON entries (account); ANALYZE")
    main.open_ledger(path).close()


def test_many_connections_may_create_it_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ledgers = list(pool.map(lambda _: main.open_ledger(str(tmp_path / "a.db")), range(8)))
    for ledger in ledgers:
        main.open_account(ledger, "alice", 5)
        assert main.balance(ledger, "alice") == 5
        ledger.close()
