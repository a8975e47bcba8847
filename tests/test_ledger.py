"""The ledger guards itself: hostile SQL, the same operations again, any file."""

import sqlite3
from contextlib import closing, suppress
from itertools import product
from types import SimpleNamespace

import pytest
from conftest import check, opened, operation

import main
from main import OperationConflict, settle

INSERT = "INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"


@pytest.fixture
def db(db):
    """A ledger on which t1 is committed, t2 in flight, t3 compensated and t4 rejected."""
    for name in ("t1", "t2", "t3"):
        settle(db, operation(f"{name}-debit"))
    settle(db, operation("t1-credit"))
    settle(db, operation("t3-credit"), void="no")
    settle(db, operation("t3-reversal"))
    settle(db, operation("t4-debit"), void="no")
    return db


def test_what_became_of_a_transfer_is_what_the_ledger_says(db):
    statuses = [main.lookup(db, name)["status"] for name in ("t1", "t2", "t3", "t4", "alice")]
    assert statuses == ["committed", "in flight", "compensated", "rejected", "unknown"]


NAMES = ("t2", "t3", "t4", "x", "alice", "carol", None)
KINDS = ("reversal", "credit", "debit", "opening", "gift", None)
ACCOUNTS = ("alice", "bob", "carol", None)
AMOUNTS = (-500, 0, 500, -10001, -0.5, None)
HOSTILE = list(product(NAMES, KINDS, ACCOUNTS, AMOUNTS, ACCOUNTS))


@pytest.mark.parametrize("verb", ["INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE"])
@pytest.mark.parametrize("credit", ["that may still happen", "that is a void"])
def test_no_row_goes_in_that_breaks_the_law_or_replaces_another(db, credit, verb, record_property):
    if credit == "that is a void":
        settle(db, operation("t2-credit"), void="no")
    before = set(db.execute("SELECT * FROM operations"))
    for name, kind, *columns in HOSTILE:
        for op_id, void in ((f"{name}-{kind}", None), (f"{name}-{kind}", "no"), ("x-debit", None)):
            db.execute("BEGIN")
            with suppress(sqlite3.IntegrityError):
                db.execute(f"{verb} {INSERT}", (op_id, name, kind, *columns, void))
            rows = set(db.execute("SELECT * FROM operations"))
            assert before <= rows
            if before != rows:
                check(db)
            db.execute("ROLLBACK")
    record_property("hostile statements: none breaks the law of the ledger", 3 * len(HOSTILE))


def test_what_has_settled_is_neither_changed_nor_deleted(db):
    for sql in ("UPDATE operations SET amount = 1", "DELETE FROM operations"):
        with pytest.raises(sqlite3.IntegrityError, match="final"):
            db.execute(sql)


def test_an_entry_or_a_void_that_comes_again_stays_what_it_is(db):
    for _ in range(3):
        assert settle(db, operation("all-debit", amount=-9000)) is None
        assert settle(db, operation("all-debit", amount=-9000), void="too late") is None
        assert settle(db, operation("more-debit")) == "insufficient funds"
        assert settle(db, operation("t3-credit")) == "no"
        main.open_account(db, "alice", 10000)
    assert main.balance(db, "alice") == 0


def test_an_op_id_used_again_for_something_else_is_a_conflict(db):
    changes = ({"amount": 7}, {"account": "carol"}, {"counterparty": "carol"})
    for op_id, change, void in product(("t3-debit", "t3-credit"), changes, (None, "no")):
        with pytest.raises(OperationConflict, match="already used"):
            settle(db, operation(op_id, **change), void)
    with pytest.raises(OperationConflict, match="already used"):
        main.open_account(db, "alice", 1)


def test_if_another_process_settles_it_between_a_refusal_and_its_void_that_row_stays(db):
    debit = operation("big-debit", amount=-9200)
    meanwhile = [(*operation("t2-credit"), "no"), (*operation("t2-reversal"), None), (*debit, None)]

    def execute(sql, row):
        try:
            return db.execute(sql, row)
        except sqlite3.IntegrityError:  # money arrives, and another process debits it
            db.executemany(f"INSERT {INSERT}", meanwhile)
            raise

    assert settle(SimpleNamespace(execute=execute), debit) is None


def test_what_the_ledger_refuses_even_as_a_void_is_raised_with_its_reason(db):
    reasons = {"t2-reversal": "the credit is not a void", "x-credit": "no such debit"}
    for op_id, reason in (reasons | {"x-gift": "CHECK"}).items():
        with pytest.raises(sqlite3.IntegrityError, match=reason):
            settle(db, operation(op_id))


def test_every_use_of_the_connection_holds_the_lock(db):
    """Asked at each instruction of SQLite: threads share the connection."""
    locked = []
    db.set_progress_handler(lambda: locked.append(main.LOCK.locked()), 1)
    settle(db, operation("big-debit", amount=-9999))
    main.journal(db)
    assert len(locked) > 200 and all(locked)


def connecting(prepare, connect=sqlite3.connect):
    """`sqlite3.connect`, but it prepares each new connection."""

    def connect_and_prepare(*args, **options):
        db = connect(*args, **options)
        prepare(db)
        return db

    return connect_and_prepare


def test_a_ledger_opens_beside_a_reader_or_a_writer_and_is_durable(tmp_path, monkeypatch):
    """With SQLite as it may have been built, and in a hurry. The reader keeps it from WAL."""
    hasty = "PRAGMA synchronous = OFF; PRAGMA busy_timeout = 20"
    monkeypatch.setattr(sqlite3, "connect", connecting(lambda db: db.executescript(hasty)))
    path = tmp_path / "a.db"
    opened(path).close()
    with closing(sqlite3.connect(path, autocommit=True)) as other:
        other.executescript("PRAGMA journal_mode = DELETE; BEGIN; SELECT * FROM accounts")
        main.open_ledger(path).close()
        other.executescript("ROLLBACK; BEGIN")
        with closing(main.open_ledger(path)) as again:
            assert again.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert again.execute("PRAGMA synchronous").fetchone() == (2,)
        other.executescript("ROLLBACK; BEGIN IMMEDIATE")
        with closing(main.open_ledger(path)) as again:
            assert main.balance(again, "alice") == 10000


def test_two_processes_that_create_a_ledger_at_once_create_one(tmp_path, monkeypatch):
    """Another one tries to at each statement of the first."""
    other = sqlite3.connect(tmp_path / "a.db", timeout=0, autocommit=True)
    ids = set()

    def meanwhile(_sql):
        with suppress(sqlite3.OperationalError):
            other.executescript(main.SCHEMA)
            ids.update(other.execute("SELECT id FROM ledger"))

    monkeypatch.setattr(sqlite3, "connect", connecting(lambda db: db.set_trace_callback(meanwhile)))
    with closing(main.open_ledger(tmp_path / "a.db")) as db:
        assert set(db.execute("SELECT id FROM ledger")) == ids
    other.close()


@pytest.mark.parametrize(
    "content",
    [
        "CREATE TABLE x (y)",  # the database of another program
        "PRAGMA user_version = 7; CREATE TABLE operations (op_id)",  # our second edition
        b"D",
        b"Dear diary, " * 99,
    ],
)
def test_a_file_that_is_something_else_is_refused_and_left_as_it_was(tmp_path, content):
    pass
