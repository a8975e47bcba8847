"""The ledger guards itself: hostile SQL, the same operations again, any file, any connection."""

import sqlite3
from collections import Counter
from contextlib import closing
from functools import partial
from itertools import product
from unittest.mock import MagicMock

import pytest
from conftest import check, opened, operation

import main
from main import settle

VERBS = ("INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE")
NAMES = [f"{letter}{number}" for letter in "tuvw" for number in range(6)] + ["alice", "carol"]
KINDS = ("reversal", "credit", "debit", "opening", "gift")
ACCOUNTS = ("alice", "bob", "carol")
AMOUNTS = (-500, 0, 500, 501, -10001)
HOSTILE = list(product(VERBS, NAMES, KINDS, ACCOUNTS, AMOUNTS, ACCOUNTS, (None, "no")))
# Transfers in each state: debited; with a voided credit; rejected; committed; compensated.
STATES = "1-debit 2-debit 2-credit- 3-debit- 4-debit 4-credit 5-debit 5-credit- 5-reversal"


def settle_states(db, letters="t"):
    for letter, op_id in product(letters, STATES.split()):
        void = "no" if op_id.endswith("-") else None
        settle(db, operation(letter + op_id.rstrip("-")), void)


def test_no_row_goes_in_that_breaks_the_law_or_replaces_another(db, record_property):
    settle_states(db, "tuvw")
    before = set(db.execute("SELECT * FROM operations"))
    refused = Counter()
    for verb, name, *columns in HOSTILE:
        db.execute("BEGIN")
        try:
            row = (f"{name}-{columns[0]}", name, *columns)
            db.execute(f"{verb} INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as refusal:
            refused[str(refusal).partition(":")[0]] += 1
        if before != (after := set(db.execute("SELECT * FROM operations"))):
            assert before < after
            check(db)
        db.execute("ROLLBACK")
    record_property("hostile statements: none breaks the law of the ledger", len(HOSTILE))
    for reason, number in refused.most_common():
        record_property(f"of these refused: {reason}", number)
    assert min(refused.values()) > 10 and len(refused) == 6


COLUMNS = ("op_id", "transfer_id", "kind", "account", "amount", "counterparty", "void")


def test_a_row_that_is_none_of_the_law_is_refused(db):
    settle(db, operation("t1-debit"))
    row = dict(zip(COLUMNS, (*operation("t2-debit"), None), strict=True))
    changes = [{name: None} for name in COLUMNS[:-1]]
    changes += [{"amount": -0.5}, {"amount": "x"}, {"op_id": "t3-debit"}, {"kind": "gift"}]
    for change in changes:
        with pytest.raises(sqlite3.IntegrityError):
            values = tuple((row | change).values())
            db.execute("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        malformed = main.Operation(*tuple((row | change).values())[:-1])
        with pytest.raises(
            (ValueError, sqlite3.IntegrityError), match=r"no operation|constraint|cannot store"
        ):
            settle(db, malformed)
    assert db.execute("SELECT count(*) FROM operations").fetchone() == (3,)


def test_what_has_settled_comes_again_and_is_booked_once(db):
    settle_states(db)
    before = list(db.iterdump())
    for void in (None, "other", None):
        for op_id in STATES.split():
            happened = settle(db, operation("t" + op_id.rstrip("-")), void)
            assert happened is not op_id.endswith("-")
    assert list(db.iterdump()) == before


@pytest.mark.parametrize("column", COLUMNS)
def test_no_row_is_changed_or_deleted(db, column):
    settle_states(db)
    for (op_id,) in db.execute("SELECT op_id FROM operations").fetchall():
        for statement in (f"UPDATE operations SET {column} = NULL", "DELETE FROM operations"):
            with pytest.raises(sqlite3.IntegrityError, match="operations are final"):
                db.execute(f"{statement} WHERE op_id = ?", (op_id,))


def test_an_operation_under_a_used_op_id_never_happens_and_the_log_says_so(db, caplog):
    settle_states(db)
    for op_id in ("t1-debit", "t2-credit", "t3-debit", "t4-credit", "t5-reversal"):
        for change in ({"amount": 7}, {"account": "carol"}, {"counterparty": "carol"}):
            assert settle(db, operation(op_id, **change)) is False
            assert caplog.records.pop().getMessage().startswith(f"{op_id} will never happen")
    caplog.set_level("INFO")
    settle(db, operation("t3-debit"))
    assert caplog.records[-1].getMessage() == "t3-debit is a void: no"


@pytest.mark.parametrize("reason", ["\ud800", "a\x1b[2J\0", "x" * 10**6, " no\n", ""])
def test_any_reason_is_stored_and_cannot_drive_a_terminal(db, reason):
    assert not settle(db, operation("t1-debit"), reason)
    error = main.lookup(db, "t1")["error"]
    assert error.isprintable() and len(error) <= 1000
    assert error == error.strip() and error.startswith(reason.strip()[:1].strip("\ud800"))


def test_the_last_cent_can_be_spent_and_no_cent_more(db):
    assert settle(db, operation("t1-debit", amount=-10000))
    assert not settle(db, operation("t2-debit", amount=-1))
    assert main.balance(db, "alice") == 0
    with pytest.raises(LookupError, match="unknown account 'nobody'"):
        main.balance(db, "nobody")


@pytest.mark.parametrize("name", ["a", "Ann Lee", "a-b", "Jürgen", "x" * 300])
def test_valid_names_and_amounts_are_accepted(db, name):
    main.open_account(db, name)
    main.open_account(db, f"{name}2", 10**15)
    main.open_account(db, f"{name}2", 10**15)
    assert (main.balance(db, name), main.balance(db, f"{name}2")) == (0, 10**15)
    with pytest.raises(main.OperationConflict, match="was opened with another amount"):
        main.open_account(db, f"{name}2", 1)


def test_every_instruction_of_sqlite_runs_under_the_lock(db):
    locked = []
    db.set_progress_handler(lambda: locked.append(main.LOCK.locked()), 1)
    settle(db, operation("big-debit", amount=-10001))
    main.journal(db)
    main.totals(db)
    assert len(locked) > 200 and all(locked)


def test_an_account_may_have_the_name_of_a_transfer_in_flight(db):
    main.open_account(db, "t1", 700)
    settle(db, operation("t1-debit"))
    assert main.totals(db) == (15200, 500, 15700, True)


def test_a_command_closes_its_ledger_under_the_lock(tmp_path, monkeypatch):
    """A step may still use it: SQLite would end the process."""
    monkeypatch.setattr(main, "LOCK", lock := MagicMock())
    with main.ledger_in(f"{tmp_path}/a.db", "ab"):
        assert lock.__enter__.call_count == 0
    assert lock.__enter__.call_count == 1


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Two connections to one file, which wait for no lock. `open_ledger` is given the first."""
    connect = partial(sqlite3.connect, tmp_path / "a.db", timeout=0, autocommit=True)

    def give_ours(path, real=sqlite3.connect, **_):
        return real(path) if path == ":memory:" else ours

    with closing(connect()) as ours, closing(connect()) as other:
        monkeypatch.setattr(sqlite3, "connect", give_ours)
        yield ours, other
        check(ours)


def test_an_entry_that_comes_between_a_refusal_and_its_void_stays(pair):
    ours, other = pair
    settle(opened("a.db"), operation("t1-debit"))
    debit = operation("all-debit", amount=-10000)
    rows = [(*operation("t1-credit"), "no"), (*operation("t1-reversal"), None), (*debit, None)]
    insert = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"
    ours.set_trace_callback(lambda sql: "insufficient" in sql and other.executemany(insert, rows))
    assert settle(ours, debit)


def test_a_busy_ledger_is_no_refusal_and_voids_nothing(pair):
    """The other process gives the lock back when a void would be inserted."""
    ours, other = pair
    settle(opened("a.db"), operation("t1-debit"))
    other.execute("BEGIN IMMEDIATE")
    ours.set_trace_callback(lambda sql: "'database is" in sql and other.execute("ROLLBACK"))
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        settle(ours, operation("t2-debit"))
    other.execute("ROLLBACK")
    assert settle(ours, operation("t2-debit"))


def test_a_ledger_opens_beside_another_process_that_creates_it(pair):
    ours, other = pair
    ids = []

    def create(sql):
        if "BEGIN IMMEDIATE" in sql:
            other.execute("ROLLBACK")
            ids.extend(other.executescript(main.SCHEMA).execute("SELECT id FROM ledger"))

    ours.set_trace_callback(create)
    other.execute("BEGIN IMMEDIATE")  # so that ours cannot set WAL
    assert list(main.open_ledger("a.db").execute("SELECT id FROM ledger")) == ids
    ours.execute("PRAGMA synchronous = OFF")
    assert main.open_ledger("a.db").execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_new_ledger_lets_others_read_while_somebody_writes(db):
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_connection_waits_for_a_lock(db):
    assert db.execute("PRAGMA busy_timeout").fetchone() == (5000,)


def rebuilt(*statements):
    """A ledger on which somebody has run these statements."""
    with closing(opened()) as db:
        for statement in statements:
            db.executescript(statement)
        return db.serialize()


EDITED = {
    "a weaker rule": main.SCHEMA.replace("balance < 0", "balance < -50000"),
    "an edited comment": main.SCHEMA.replace("-- so an operation settles only once", "-- once"),
    "a comment less": main.SCHEMA.replace("-- so an operation settles only once", ""),
}
MINE = """CREATE VIEW mine AS SELECT * FROM accounts; CREATE INDEX mine2 ON operations (account);
    CREATE TABLE mine3 (x); CREATE TRIGGER mine4 AFTER INSERT ON operations BEGIN SELECT 1; END"""
OTHER_SCHEMA = {
    "a table without its triggers": "DROP TRIGGER rule",
    "a view less": "DROP VIEW transfers",
    "an added column": "ALTER TABLE operations ADD COLUMN note TEXT",
    "a generated column": "ALTER TABLE operations ADD COLUMN note TEXT AS (op_id || kind)",
    "another table": "DROP TABLE accounts; CREATE TABLE accounts (account, balance)",
}


@pytest.mark.parametrize("what", OTHER_SCHEMA)
def test_a_ledger_of_another_schema_is_refused_and_left_as_it_was(tmp_path, what):
    path = tmp_path / "a.db"
    path.write_bytes(before := rebuilt(OTHER_SCHEMA[what]))
    with pytest.raises(sqlite3.DatabaseError, match=r"a\.db: its schema is another"):
        main.open_ledger(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", EDITED)
def test_an_edited_rule_is_another_schema_and_an_edited_comment_is_not(tmp_path, what, monkeypatch):
    opened(tmp_path / "a.db").close()
    assert EDITED[what] != main.SCHEMA
    monkeypatch.setattr(main, "SCHEMA", EDITED[what])
    if "comment" in what:
        main.open_ledger(tmp_path / "a.db").close()
    else:
        with pytest.raises(sqlite3.DatabaseError, match="its schema is another"):
            main.open_ledger(tmp_path / "a.db")


def test_what_somebody_adds_beside_ours_is_theirs(tmp_path):
    (tmp_path / "a.db").write_bytes(rebuilt(MINE))
    with closing(main.open_ledger(tmp_path / "a.db")) as db:
        assert settle(db, operation("t1-debit"))


def test_a_file_that_is_something_else_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(":memory:")) as db:
        foreign = db.execute("CREATE TABLE x (y)").connection.serialize()
    for content in (b"Dear diary, " * 99, foreign):
        path.write_bytes(content)
        with pytest.raises(
            sqlite3.DatabaseError, match=r"a\.db: (its schema|file is not a database)"
        ):
            main.open_ledger(path)
        assert path.read_bytes() == content


@pytest.mark.parametrize("how", [{"isolation_level": ""}, {"autocommit": False}, {}])
def test_a_connection_that_does_not_commit_each_statement_is_refused(db, tmp_path, how):
    options = how or {"autocommit": True}
    with closing(sqlite3.connect(tmp_path / "ledger.db", **options)) as connection:
        if not how:
            connection.execute("BEGIN")
        with pytest.raises(ValueError, match="does not commit each statement"):
            main.start(connection)
