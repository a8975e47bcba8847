"""The ledger guards itself: hostile SQL, the same operations again, any file."""

import sqlite3
from contextlib import closing, suppress
from functools import partial
from itertools import product

import pytest
from conftest import check, opened, operation

import main
from main import OperationConflict, settle

VERBS = ("INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE")
NAMES = ("t1", "t2", "t3", "x", "alice", "carol", None)
KINDS = ("reversal", "credit", "debit", "opening", "gift", None)
ACCOUNTS = ("alice", "bob", "carol", None)
AMOUNTS = (-500, 0, 500, -10001, -0.5, None)
HOSTILE = list(product(VERBS, NAMES, KINDS, ACCOUNTS, AMOUNTS, ACCOUNTS))


@pytest.mark.parametrize("voids", [("t2-credit",), ("t2-credit", "t1-credit")])
def test_no_row_goes_in_that_breaks_the_law_or_replaces_another(db, voids, record_property):
    for op_id in ("t1-debit", "t2-debit", "t3-debit", *voids, "t2-reversal"):
        settle(db, operation(op_id), "no" if op_id in ("t3-debit", *voids) else None)
    before = set(db.execute("SELECT * FROM operations"))
    for verb, name, kind, *columns in HOSTILE:
        for op_id, void in ((f"{name}-{kind}", None), (f"{name}-{kind}", "no"), ("x-debit", None)):
            row = (op_id, name, kind, *columns, void)
            db.execute("BEGIN")
            with suppress(sqlite3.IntegrityError):
                db.execute(f"{verb} INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            if before != (after := set(db.execute("SELECT * FROM operations"))):
                assert before < after
                check(db)
            db.execute("ROLLBACK")
    record_property("hostile statements: none breaks the law of the ledger", 3 * len(HOSTILE))


def test_what_has_settled_stays_if_it_comes_again_or_as_something_else_or_is_changed_or_deleted(db):
    entry, void = operation("all-debit", amount=-10000), operation("more-debit")
    opening = main.Operation("alice-opening", "alice", "opening", "alice", 10000)
    changes = ({"amount": -7}, {"account": "carol"}, {"counterparty": "carol"})
    for why in (None, "no", None):
        assert settle(db, entry, why) is settle(db, opening, why) is None
        assert settle(db, void, why) == main.lookup(db, "more")["error"] == "insufficient funds"
        for settled, change in product((entry, void, opening), changes):
            with pytest.raises(OperationConflict, match="already used"):
                settle(db, settled._replace(**change), why)
        for sql in ("UPDATE operations SET amount = -1", "DELETE FROM operations"):
            with pytest.raises(sqlite3.IntegrityError, match="operations are final"):
                db.execute(sql)


def test_every_instruction_of_sqlite_runs_under_the_lock(db):
    locked = []
    db.set_progress_handler(lambda: locked.append(main.LOCK.locked()), 1)
    settle(db, operation("big-debit", amount=-10001))
    main.journal(db)
    assert len(locked) > 200 and all(locked)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two connections to one file, which wait for no lock. `open_ledger` is given the first."""
    connect = partial(sqlite3.connect, tmp_path / "a.db", timeout=0, autocommit=True)
    with closing(connect()) as ours, closing(connect()) as other:
        monkeypatch.setattr(sqlite3, "connect", lambda *_, **__: ours)
        yield ours, other
        check(ours)


def test_if_money_arrives_and_is_debited_between_a_refusal_and_its_void_the_debit_stays(pair):
    ours, other = pair
    settle(opened(), operation("t1-debit"))
    debit = operation("all-debit", amount=-10000)
    rows = [(*operation("t1-credit"), "no"), (*operation("t1-reversal"), None), (*debit, None)]
    insert = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"
    ours.set_trace_callback(lambda sql: "insufficient" in sql and other.executemany(insert, rows))
    assert settle(ours, debit) is None


def test_a_ledger_opens_beside_who_creates_or_reads_it_and_is_durable(pair):
    ours, other = pair
    find, ids = "SELECT id FROM ledger", []
    create = partial(other.executescript, main.SCHEMA)
    ours.set_trace_callback(lambda sql: "BEGIN IMM" in sql and ids.extend(create().execute(find)))
    main.open_ledger().executescript("PRAGMA journal_mode = DELETE; PRAGMA synchronous = OFF")
    other.executescript(f"BEGIN; {find}")
    assert list(main.open_ledger().execute(find)) == ids  # the reader keeps it from WAL
    other.execute("ROLLBACK")
    main.open_ledger()
    assert [*ours.execute("SELECT * FROM pragma_journal_mode, pragma_synchronous")] == [("wal", 2)]


def test_a_file_that_is_something_else_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(":memory:")) as db:
        foreign = db.execute("CREATE TABLE x (y)").connection.serialize()
        second_edition = db.execute("CREATE TABLE operations (op_id)").connection.serialize()
    for content in (b"D", b"Dear diary, " * 99, foreign, second_edition):
        path.write_bytes(content)
        with pytest.raises(sqlite3.DatabaseError, match=r"not a (ledger|database)"):
            main.open_ledger(path)
        assert path.read_bytes() == content
