"""The ledger guards itself: hostile SQL at its connection, many threads, files of every kind."""

import os
import re
import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check, in_a_process, opened, settled

import main
from main import (
    Operation,
    OperationConflict,
    TransferRejected,
    apply_entry,
    credit_target,
    give_up,
    settle,
)

INSERT = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"
NO = Exception("no")


class Context:
    """A context for a step that is called by hand."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def get_dependency(self, name: str) -> sqlite3.Connection:
        assert name == "db"
        return self.db


def operation(op_id: str, account: str, amount: int, other: str | None) -> Operation:
    transfer_id, _, kind = op_id.rpartition("-")
    return Operation(op_id, transfer_id, kind, account, amount, other)


T1_CREDIT = operation("t1-credit", "bob", 1000, "alice")
T2_DEBIT = operation("t2-debit", "alice", -1000, "bob")
T2_CREDIT = operation("t2-credit", "bob", 1000, "alice")
T3_CREDIT = operation("t3-credit", "bob", 1000, "alice")
T4_DEBIT = operation("t4-debit", "alice", -1000, "bob")


@pytest.fixture
def ctx(db: sqlite3.Connection) -> Any:
    """A ledger on which t1 is committed, t2 in flight, t3 compensated and t4 rejected."""
    ctx: Any = Context(db)
    for name in ("t1", "t2", "t3"):
        apply_entry(ctx, operation(f"{name}-debit", "alice", -1000, "bob"))
    apply_entry(ctx, T1_CREDIT)
    give_up(ctx, T3_CREDIT, NO)
    apply_entry(ctx, operation("t3-reversal", "alice", 1000, "bob"))
    give_up(ctx, T4_DEBIT, NO)
    return ctx


def dump(db: sqlite3.Connection) -> list[Any]:
    return [db.execute(f"SELECT * FROM {table}").fetchall() for table in ("operations", "accounts")]


def test_the_outcome_of_a_transfer_is_what_the_ledger_says(ctx: Any) -> None:
    names = ("t1", "t2", "t3", "t4", "t5", "alice")
    assert [main.outcome(ctx.db, name) for name in names] == [
        "committed",
        "in flight",
        "compensated",
        "rejected",
        "unknown",
        "unknown",
    ]


# ---- Hostile SQL ---------------------------------------------------------------------------------

# What a statement tries: op_id, transfer_id, kind, account, amount, counterparty, void
ROWS: dict[str, tuple[Any, ...]] = {
    "a float": ("x-debit", "x", "debit", "alice", -1.5, "bob", None),
    "an amount that is text": ("x-debit", "x", "debit", "alice", "much", "bob", None),
    "no amount": ("x-debit", "x", "debit", "alice", None, "bob", None),
    "no op id": (None, "x", "debit", "alice", -100, "bob", None),
    "no transfer id": ("x-debit", None, "debit", "alice", -100, "bob", None),
    "no account": ("x-debit", "x", "debit", None, -100, "bob", None),
    "no kind": ("x-debit", "x", None, "alice", -100, "bob", None),
    "an unknown kind": ("x-gift", "x", "gift", "alice", 100, "bob", None),
    "a kind in capitals": ("x-DEBIT", "x", "DEBIT", "alice", -100, "bob", None),
    "an overdraft": ("x-debit", "x", "debit", "alice", -10001, "bob", None),
    "an overdraft of all that fits": ("x-debit", "x", "debit", "alice", -(2**63), "bob", None),
    "a debit of an unknown account": ("x-debit", "x", "debit", "carol", -100, "bob", None),
    "a credit to an unknown account": ("t2-credit", "t2", "credit", "carol", 1000, "alice", None),
    "a credit with no debit": ("x-credit", "x", "credit", "bob", 100, "alice", None),
    "a credit of a rejected transfer": ("t4-credit", "t4", "credit", "bob", 1000, "alice", None),
    "a reversal with no debit": ("x-reversal", "x", "reversal", "alice", 100, "bob", None),
    "a reversal beside a credit": ("t1-reversal", "t1", "reversal", "alice", 1000, "bob", None),
    "a credit of more than the debit": ("t2-credit", "t2", "credit", "bob", 1001, "alice", None),
    "a credit of less than the debit": ("t2-credit", "t2", "credit", "bob", 999, "alice", None),
    "a reversal of less": ("t2-reversal", "t2", "reversal", "alice", 1, "bob", None),
    "a second reversal": ("t3-reversal2", "t3", "reversal", "alice", 1000, "bob", None),
    "a reversal as a credit": ("t2-credit", "t2", "reversal", "alice", 1000, "bob", None),
    "another transfer's op id": ("t2-credit", "t1", "credit", "bob", 1000, "alice", None),
    "an op id in capitals": ("T2-credit", "t2", "credit", "bob", 1000, "alice", None),
    "an op id of bytes": (b"t2-credit", "t2", "credit", "bob", 1000, "alice", None),
    "a debit that gives": ("x-debit", "x", "debit", "alice", 100, "bob", None),
    "a credit that takes": ("t2-credit", "t2", "credit", "bob", -1, "alice", None),
    "a reversal that takes": ("t2-reversal", "t2", "reversal", "alice", -1, "bob", None),
    "an opening below zero": ("carol-opening", "carol", "opening", "carol", -1, None, None),
    "an opening of another name": ("x-opening", "x", "opening", "carol", 100, None, None),
    "a second opening": ("alice-opening2", "alice", "opening", "alice", 100, None, None),
    "a second opening as another": ("x-opening", "x", "opening", "alice", 100, None, None),
    "a debit for nobody": ("x-debit", "x", "debit", "alice", -100, None, None),
    "a debit for its own account": ("x-debit", "x", "debit", "alice", -100, "alice", None),
    "an opening with a counterparty": ("x-opening", "x", "opening", "x", 100, "bob", None),
    "a debit of nothing": ("x-debit", "x", "debit", "alice", 0, "bob", None),
    "a credit of nothing": ("t2-credit", "t2", "credit", "bob", 0, "alice", None),
    "a reversal of nothing": ("t2-reversal", "t2", "reversal", "alice", 0, "bob", None),
    "a reversal of nothing for nobody": ("x-reversal", "x", "reversal", "alice", 0, "bob", None),
    "a void of no amount": ("t2-credit", "t2", "credit", "bob", None, "alice", "no"),
    "a void of a wrong sign": ("t2-credit", "t2", "credit", "bob", -1000, "alice", "no"),
    "a void of a reversal": ("t2-reversal", "t2", "reversal", "alice", 1000, "bob", "no"),
    "a void of an opening": ("carol-opening", "carol", "opening", "carol", 100, None, "no"),
    "a void with no account": ("x-debit", "x", "debit", None, -100, "bob", "no"),
    "a reason of bytes": ("x-debit", "x", "debit", "alice", -100, "bob", b"no"),
}


@pytest.mark.parametrize("verb", ["INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE"])
@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_would_make_or_strand_money_does_not_go_in(
    ctx: Any, row: str, verb: str, record_property: Any
) -> None:
    before = dump(ctx.db)
    try:
        ctx.db.execute(INSERT.replace("INSERT", verb), ROWS[row])
    except sqlite3.IntegrityError:
        pass
    else:
        assert verb == "INSERT OR IGNORE"
    assert dump(ctx.db) == before
    record_property("hostile statements, none of which moved a cent", 1)


STATEMENTS = (
    "UPDATE operations SET amount = 1 WHERE op_id = 't1-credit'",
    "UPDATE OR IGNORE operations SET void = 'x'",
    "UPDATE OR REPLACE operations SET op_id = 't2-credit' WHERE op_id = 't1-credit'",
    "UPDATE operations SET void = NULL WHERE op_id = 't3-credit'",
    "DELETE FROM operations WHERE op_id = 't1-debit'",
    "DELETE FROM operations",
    "REPLACE INTO operations VALUES ('t2-debit', 't2', 'debit', 'alice', -1, 'bob', NULL)",
    "REPLACE INTO operations VALUES ('t2-debit', 't2', 'debit', 'alice', -1, 'bob', 'x')",
    "INSERT INTO operations VALUES ('t2-debit', 't2', 'debit', 'alice', -1, 'bob', NULL)"
    " ON CONFLICT (op_id) DO UPDATE SET amount = excluded.amount",
    "REPLACE INTO operations (rowid, op_id, transfer_id, kind, account, amount)"
    " VALUES (3, 'x-opening', 'x', 'opening', 'x', 1)",
    "INSERT INTO operations"
    " VALUES ('x-opening', 'x', 'opening', 'x', 9223372036854775808, NULL, NULL)",
    "UPDATE accounts SET balance = balance + 1",
    "UPDATE accounts SET balance = CASE account WHEN 'bob' THEN 15000 ELSE 0 END",
    "UPDATE accounts SET account = 'mallory' WHERE account = 'bob'",
    "INSERT INTO accounts VALUES ('mallory', 1000000)",
    "REPLACE INTO accounts VALUES ('alice', 1000000)",
    "DELETE FROM accounts WHERE account = 'bob'",
    "DROP TABLE accounts",
    "DROP TRIGGER entry_moves_balance",
    "ALTER TABLE accounts RENAME TO riches",
    "CREATE TEMP TRIGGER entry_moves_balance AFTER INSERT ON operations"
    " BEGIN UPDATE accounts SET balance = 1; END",
    "CREATE TEMP TABLE operations (op_id)",
    "PRAGMA recursive_triggers = OFF",
    "PRAGMA ignore_check_constraints = ON",
    "PRAGMA writable_schema = ON",
    "ATTACH ':memory:' AS other",
)


@pytest.mark.parametrize("sql", STATEMENTS)
def test_hostile_sql_moves_no_money(ctx: Any, sql: str, record_property: Any) -> None:
    before = dump(ctx.db)
    with pytest.raises(sqlite3.DatabaseError):
        ctx.db.execute(sql)
    assert dump(ctx.db) == before
    record_property("hostile statements, none of which moved a cent", 1)


def test_a_credit_that_does_not_fit_into_the_balance_is_refused(db: sqlite3.Connection) -> None:
    ctx: Any = Context(db)
    main.open_account(db, "full", 2**63 - 1)
    apply_entry(ctx, operation("x-debit", "alice", -1, "full"))
    with pytest.raises(TransferRejected):
        apply_entry(ctx, operation("x-credit", "full", 1, "alice"))
    assert main.in_flight(db) == [("x", "alice", "full", 1)]


# ---- An op id settles once -----------------------------------------------------------------------


def test_the_same_entry_again_moves_no_money(ctx: Any) -> None:
    before = dump(ctx.db)
    for _ in range(3):
        apply_entry(ctx, T2_DEBIT)
    assert dump(ctx.db) == before


def test_a_debit_that_has_happened_is_not_refused_when_it_comes_again(ctx: Any) -> None:
    """Although there is nothing left in the account by then."""
    everything = operation("all-debit", "alice", -main.balance(ctx.db, "alice"), "bob")
    apply_entry(ctx, everything)
    assert main.balance(ctx.db, "alice") == 0
    apply_entry(ctx, everything)


CONFLICTS = {
    "another account than the entry": operation("t2-debit", "bob", -1000, "alice"),
    "another amount than the entry": operation("t2-debit", "alice", -1001, "bob"),
    "another counterparty than the entry": operation("t2-debit", "alice", -1000, "carol"),
    "no counterparty": operation("t2-debit", "alice", -1000, None),
    "less than the credit": operation("t1-credit", "bob", 999, "alice"),
    "another amount than the void": operation("t3-credit", "bob", 999, "alice"),
    "another account than the void": operation("t3-credit", "alice", 1000, "bob"),
    "another amount than the debit's void": operation("t4-debit", "alice", -2000, "bob"),
}


@pytest.mark.parametrize("difference", CONFLICTS)
def test_an_op_id_used_again_for_something_else_is_a_conflict(ctx: Any, difference: str) -> None:
    before = dump(ctx.db)
    with pytest.raises(OperationConflict):
        apply_entry(ctx, CONFLICTS[difference])
    with pytest.raises(OperationConflict):
        give_up(ctx, CONFLICTS[difference], NO)
    assert dump(ctx.db) == before


def test_giving_up_takes_the_op_id_or_says_that_the_entry_has_it(ctx: Any) -> None:
    assert give_up(ctx, T1_CREDIT, NO) is None
    assert give_up(ctx, T2_CREDIT, Exception("no answer")) == "no answer"
    assert give_up(ctx, T2_CREDIT, Exception("other")) == "no answer"
    with pytest.raises(TransferRejected, match=r"^no answer$"):
        credit_target(ctx, T2_CREDIT)
    assert main.balance(ctx.db, "bob") == 6000


@pytest.mark.parametrize("said", ["", "\ud800 not text", "\x00\x1b[2J", "x" * 100_000])
def test_nothing_that_a_target_says_keeps_the_void_out(ctx: Any, said: str) -> None:
    assert give_up(ctx, T2_CREDIT, Exception(said))
    account, amount, void = settled(ctx.db)["t2-credit"]
    assert (account, amount, bool(void)) == ("bob", 1000, True)


def test_a_failure_without_text_still_has_a_reason(ctx: Any) -> None:
    assert give_up(ctx, T2_CREDIT, TimeoutError()) == "TimeoutError()"


@pytest.mark.parametrize("reason", ["stopped by hand: this credit of bob is fraud", "", "NULL"])
def test_a_void_written_by_hand_stops_a_transfer_whatever_its_reason(ctx: Any, reason: str) -> None:
    ctx.db.execute(INSERT, (*T2_CREDIT, reason))
    assert give_up(ctx, T2_CREDIT, NO) == reason
    with pytest.raises(TransferRejected, match=f"^{reason}$"):
        apply_entry(ctx, T2_CREDIT)
    apply_entry(ctx, operation("t2-reversal", "alice", 1000, "bob"))
    assert main.outcome(ctx.db, "t2") == "compensated"


def test_operations_are_kept_in_the_order_in_which_they_settled(ctx: Any) -> None:
    query = "SELECT op_id FROM operations WHERE kind <> 'opening' ORDER BY rowid"
    assert " ".join(op_id for (op_id,) in ctx.db.execute(query)) == (
        "t1-debit t2-debit t3-debit t1-credit t3-credit t3-reversal t4-debit"
    )


@pytest.mark.parametrize("amount", [100, 0, -1.5])
def test_a_step_that_asks_for_what_is_not_valid_is_refused_in_words(ctx: Any, amount: Any) -> None:
    with pytest.raises(TransferRejected):
        apply_entry(ctx, operation("x-debit", "alice", amount, "bob"))
    with pytest.raises(TransferRejected, match="not a valid operation"):
        apply_entry(ctx, operation("x-gift", "alice", 100, "bob"))
    assert "x-debit" not in settled(ctx.db)


def test_a_transfer_may_be_called_what_an_account_is_called(db: sqlite3.Connection) -> None:
    ctx: Any = Context(db)
    apply_entry(ctx, operation("alice-debit", "alice", -100, "bob"))
    with pytest.raises(TransferRejected):
        apply_entry(ctx, operation("bob-credit", "bob", 100, "alice"))
    assert main.in_flight(db) == [("alice", "alice", "bob", 100)]


def test_an_account_opens_once(db: sqlite3.Connection) -> None:
    main.open_account(db, "alice", 10000)
    main.open_account(db, "empty")
    assert main.balance(db, "empty") == 0
    for account, opening in (("alice", 10001), ("empty", 1)):
        with pytest.raises(OperationConflict):
            main.open_account(db, account, opening)
    for opening in (-1, 2**63, "5", 1.5, True):
        with pytest.raises(ValueError, match="an amount is"):
            main.open_account(db, "poor", opening)  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="poor"):
        main.balance(db, "poor")


def test_settle_says_nothing_inside_a_transaction_that_could_be_rolled_back(ctx: Any) -> None:
    ctx.db.execute("BEGIN")
    with pytest.raises(sqlite3.ProgrammingError, match="transaction"):
        settle(ctx.db, T2_CREDIT)
    ctx.db.execute("ROLLBACK")
    assert settle(ctx.db, T2_CREDIT) is None


def test_rows_may_have_any_shape_that_the_user_has_set(ctx: Any) -> None:
    ctx.db.row_factory = sqlite3.Row
    assert settle(ctx.db, T2_CREDIT) is None
    assert settle(ctx.db, T3_CREDIT) == "no"
    assert main.outcome(ctx.db, "t2") == "committed"
    assert main.balance(ctx.db, "bob") == 7000
    ctx.db.row_factory = None


def test_an_entry_and_a_balance_cost_the_same_however_long_the_history(
    db: sqlite3.Connection,
) -> None:
    """By the plan of every statement that a step or a balance runs, also of those in the trigger:
    each searches by a primary key."""
    seen: list[str] = []
    db.set_trace_callback(seen.append)
    apply_entry(Context(db), operation("t-debit", "alice", -100, "bob"))  # type: ignore[arg-type]
    main.balance(db, "alice")
    main.outcome(db, "t")
    db.set_trace_callback(None)
    body = re.search(r"entry_moves_balance.*?BEGIN(.*?)\nEND;", main.SCHEMA, re.DOTALL)
    assert body
    inner = re.sub(r"NEW\.\w+", "'t'", re.sub(r"--.*", "", body[1]))
    inner = re.sub(r"RAISE\(ABORT, ('.*?')\)", r"\1", inner)
    db.set_authorizer(None)
    statements = {*seen, *(sql for sql in inner.split(";") if sql.strip())}
    plans = [row[3] for sql in statements for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")]
    assert any("SEARCH operations USING INDEX" in plan for plan in plans)
    assert not [plan for plan in plans if plan.startswith("SCAN") and "CONSTANT ROW" not in plan]


# ---- Threads -------------------------------------------------------------------------------------


def hammer(what: str) -> None:
    """Eight threads on one connection. In a process of its own: without the lock some never end."""
    sys.setswitchinterval(1e-6)
    db = main.open_ledger()
    ctx: Any = Context(db)
    for number in range(8):
        main.open_account(db, f"a{number}", 10**6 + number)
    apply_entry(ctx, operation("flight-debit", "a7", -1, "a0"))
    expected = main.in_flight(db)
    start = threading.Barrier(8)

    def write(thread: int, number: int) -> None:
        """Half of the threads write entries, half of them voids of the same op ids."""
        debit = operation(f"{number}-debit", f"a{number % 4}", -number - 1, "a5")
        try:
            if thread % 2:
                assert give_up(ctx, debit, Exception(str(number))) in (None, str(number))
            else:
                apply_entry(ctx, debit)
        except TransferRejected as refusal:
            assert str(refusal) == str(number)

    def look(thread: int, number: int) -> None:
        assert main.balance(db, f"a{thread}") == 10**6 + thread - (thread == 7)
        assert main.outcome(db, "flight") == "in flight"
        if number % 10 == 0:
            assert main.in_flight(db) == expected
        if number % 50 == 0:
            assert main.journal(db)

    def work(thread: int) -> None:
        start.wait()
        for number in range(300 if what == "writes" else 2000):
            write(thread, number) if what == "writes" else look(thread, number)

    with ThreadPoolExecutor(8) as pool, redirect_stdout(None):
        list(pool.map(work, range(8)))
    check(db)
    assert len(settled(db)) == (301 if what == "writes" else 1)
    db.close()


@pytest.mark.parametrize("what", ["writes", "reads"])
def test_many_threads_share_a_connection_and_none_loses_or_misreads_a_row(what: str) -> None:
    in_a_process(f"import test_ledger; test_ledger.hammer({what!r})")


@pytest.mark.parametrize("reader", [main.balance, main.outcome, main.in_flight, main.journal])
def test_no_function_uses_the_connection_while_a_step_does(
    db: sqlite3.Connection, reader: Callable[..., Any]
) -> None:
    with main.LOCK, ThreadPoolExecutor(1) as pool:
        arguments = ("alice",) if reader in (main.balance, main.outcome) else ()
        reading = pool.submit(reader, db, *arguments)
        assert not reading.done()
        with pytest.raises(TimeoutError):
            reading.result(timeout=0.2)
        main.LOCK.release()
        reading.result(timeout=30)
        main.LOCK.acquire()


# ---- The file ------------------------------------------------------------------------------------


def test_a_ledger_is_durable_and_opens_again(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "a.db")
    opened(path).close()
    with closing(main.open_ledger(path)) as db:
        assert main.balance(db, "alice") == 10000
        names = ("journal_mode", "synchronous", "busy_timeout", "application_id")
        settings = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
        assert settings == ["wal", 2, 5000, 0x6D6F6E65]
        check(db)


class Hasty(sqlite3.Connection):
    """As SQLite may have been built, and in a hurry."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.executescript("PRAGMA synchronous = OFF; PRAGMA busy_timeout = 20")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sqlite3.connect

    def connect(path: str, **options: Any) -> sqlite3.Connection:
        return real(path, factory=Hasty, **options)

    monkeypatch.setattr(main.sqlite3, "connect", connect)


def test_a_commit_survives_a_loss_of_power_whatever_sqlite_was_built_for(
    tmp_path: Path, hasty: None
) -> None:
    with closing(main.open_ledger(os.fspath(tmp_path / "a.db"))) as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_ledger_opens_beside_a_reader_that_keeps_it_from_wal_and_is_wal_the_next_time(
    tmp_path: Path, hasty: None
) -> None:
    """As another process is for a moment that creates the same ledger."""
    path = os.fspath(tmp_path / "a.db")
    opened(path).close()
    mode = "PRAGMA journal_mode"
    with closing(sqlite3.connect(path, autocommit=True)) as reader:
        reader.executescript(f"{mode} = DELETE; BEGIN")
        reader.execute("SELECT * FROM entries").fetchall()
        with closing(main.open_ledger(path)) as db:
            assert db.execute(mode).fetchone() == ("delete",)
    with closing(main.open_ledger(path)) as db:
        assert db.execute(mode).fetchone() == ("wal",)


def test_a_writer_does_not_keep_anybody_from_opening(tmp_path: Path, hasty: None) -> None:
    path = os.fspath(tmp_path / "a.db")
    with closing(opened(path)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        with closing(main.open_ledger(path)) as db:
            assert main.balance(db, "alice") == 10000
        writer.execute("ROLLBACK")


OTHERS = {
    "another program's database": "CREATE TABLE accounts (id INTEGER PRIMARY KEY, name TEXT)",
    "one in WAL mode": "PRAGMA journal_mode = WAL; CREATE TABLE unrelated (x)",
    "one that looks like a ledger": main.SCHEMA,
    "one that marks itself as another's": "PRAGMA application_id = 7; CREATE TABLE x (y)",
}


@pytest.mark.parametrize("script", OTHERS)
def test_another_program_s_database_is_refused_and_left_as_it_was(
    tmp_path: Path, script: str
) -> None:
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path)) as other:
        other.executescript(OTHERS[script])
    before = path.read_bytes()
    with pytest.raises(sqlite3.DatabaseError, match="not a ledger"):
        main.open_ledger(os.fspath(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [1, 15, 16, 100, 511, 512, 1000, 5000])
def test_a_text_file_is_refused_and_left_as_it_was(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"Dear diary! " * 500)
    os.truncate(path, size)
    before = path.read_bytes()
    with pytest.raises(sqlite3.DatabaseError, match=r"not a (ledger|database)"):
        main.open_ledger(os.fspath(path))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("guard", ["entry_moves_balance", "no_update", "no_delete"])
def test_a_trigger_that_was_dropped_is_back_at_the_next_opening(tmp_path: Path, guard: str) -> None:
    path = os.fspath(tmp_path / "a.db")
    opened(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute(f"DROP TRIGGER {guard}")
    with closing(main.open_ledger(path)) as db:
        query = "SELECT count(*) FROM sqlite_schema WHERE name = ?"
        assert db.execute(query, (guard,)).fetchone() == (1,)


def test_a_ledger_may_hold_more_than_this_program_needs(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "a.db")
    opened(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE INDEX by_account ON operations (account); ANALYZE")
    main.open_ledger(path).close()


def test_many_connections_may_create_a_ledger_at_once_and_it_is_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = [os.fspath(tmp_path / f"{number // 8}.db") for number in range(40)]
        ledgers = list(pool.map(main.open_ledger, paths))
    for path, db in zip(paths, ledgers, strict=True):
        main.open_account(db, "alice", 5)
        assert main.balance(db, "alice") == 5
        with closing(main.open_ledger(path)) as again:
            version = "PRAGMA user_version"
            assert again.execute(version).fetchone() == db.execute(version).fetchone()
        db.close()


def test_a_ledger_that_another_process_creates_meanwhile_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.fspath(tmp_path / "a.db")
    real, ids = sqlite3.connect, []

    class Late(sqlite3.Connection):
        """Between its first look at the empty file and the next statement, another is faster."""

        def execute(self, sql: str, *more: Any) -> Any:
            cursor = super().execute(sql, *more)
            if ids or not sql.startswith("SELECT count"):
                return cursor
            seen = cursor.fetchone()
            monkeypatch.setattr(main.sqlite3, "connect", real)
            with closing(main.open_ledger(path)) as other:
                ids.append(other.execute("PRAGMA user_version").fetchone())
            return SimpleNamespace(fetchone=lambda: seen)

    def connect(path: str, **options: Any) -> sqlite3.Connection:
        return real(path, factory=Late, **options)

    monkeypatch.setattr(main.sqlite3, "connect", connect)
    with closing(main.open_ledger(path)) as db:
        assert [db.execute("PRAGMA user_version").fetchone()] == ids


def test_a_trigger_that_somebody_has_added_cannot_move_a_balance(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "a.db")
    opened(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute(
            "CREATE TRIGGER gift AFTER INSERT ON operations"
            " BEGIN UPDATE accounts SET balance = balance + 1; END"
        )
    with closing(main.open_ledger(path)) as db:
        with pytest.raises(sqlite3.DatabaseError, match=r"prohibited|not authorized"):
            settle(db, T2_DEBIT)
        check(db)


def test_two_ledgers_have_different_ids(tmp_path: Path) -> None:
    ids = set()
    for name in ("a.db", "b.db"):
        with closing(main.open_ledger(os.fspath(tmp_path / name))) as db:
            ids.add(db.execute("PRAGMA user_version").fetchone())
    assert len(ids) == 2
