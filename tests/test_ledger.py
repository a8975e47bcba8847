"""The ledger guards itself: hostile SQL at its connection, the same operations again, any file."""

import sqlite3
from contextlib import closing, redirect_stdout, suppress
from types import SimpleNamespace

import pytest
from conftest import check, connecting, opened

import main
from main import Operation, OperationConflict, TransferRejected, apply_entry, give_up, settle

NO = Exception("no")


def operation(op_id, **changes):
    """An operation of a transfer of 10.00 from alice to bob."""
    transfer_id, _, kind = op_id.rpartition("-")
    columns = {"account": "alice", "amount": 1000, "counterparty": "bob"}
    if kind == "debit":
        columns["amount"] = -1000
    if kind == "credit":
        columns |= {"account": "bob", "counterparty": "alice"}
    return Operation(op_id, transfer_id, kind, **columns | changes)


@pytest.fixture
def ctx(db):
    """A ledger on which t1 is committed, t2 in flight, t3 compensated and t4 rejected."""
    ctx = SimpleNamespace(db=db, get_dependency={"db": db}.get)
    for name in ("t1", "t2", "t3"):
        apply_entry(ctx, operation(f"{name}-debit"))
    apply_entry(ctx, operation("t1-credit"))
    give_up(ctx, operation("t3-credit"), NO)
    apply_entry(ctx, operation("t3-reversal"))
    give_up(ctx, operation("t4-debit"), NO)
    return ctx


def dump(db):
    operations = db.execute("SELECT * FROM operations").fetchall()
    return operations + db.execute("SELECT * FROM accounts").fetchall()


def test_the_outcome_of_a_transfer_is_what_the_ledger_says(ctx):
    names = ("t1", "t2", "t3", "t4", "alice")
    outcomes = [main.outcome(ctx.db, name) for name in names]
    assert outcomes == ["committed", "in flight", "compensated", "rejected", "unknown"]


# What a statement tries: op_id, transfer_id, kind, account, amount, counterparty, void
ROWS = {
    "no transfer id": ("x-debit", None, "debit", "alice", -100, "bob", None),
    "an overdraft": ("x-debit", "x", "debit", "alice", -10001, "bob", None),
    "a credit to an unknown account": ("t2-credit", "t2", "credit", "carol", 1000, "alice", None),
    "a credit with no debit": ("x-credit", "x", "credit", "bob", 100, "alice", None),
    "a reversal with no debit": ("x-reversal", "x", "reversal", "alice", 100, "bob", None),
    "a reversal beside a credit": ("t1-reversal", "t1", "reversal", "alice", 1000, "bob", None),
    "a credit of more than the debit": ("t2-credit", "t2", "credit", "bob", 1001, "alice", None),
    "a credit of less than the debit": ("t2-credit", "t2", "credit", "bob", 999, "alice", None),
    "a second reversal": ("t3-reversal2", "t3", "reversal", "alice", 1000, "bob", None),
    "another transfer's op id": ("t2-credit", "t1", "credit", "bob", 1000, "alice", None),
    "an opening of another name": ("x-opening", "x", "opening", "carol", 100, None, None),
    "a debit for nobody": ("x-debit", "x", "debit", "alice", -100, None, None),
    "a debit for its own account": ("x-debit", "x", "debit", "alice", -100, "alice", None),
    "an opening with a counterparty": ("x-opening", "x", "opening", "x", 100, "bob", None),
    "a debit of nothing": ("x-debit", "x", "debit", "alice", 0, "bob", None),
    "a reversal of nothing": ("x-reversal", "x", "reversal", "alice", 0, "bob", None),
    "a void with no account": ("x-debit", "x", "debit", None, -100, "bob", "no"),
    "a void of no amount": ("t2-credit", "t2", "credit", "bob", None, "alice", "no"),
    "a void of a wrong sign": ("t2-credit", "t2", "credit", "bob", -1000, "alice", "no"),
    "a void of a reversal": ("t2-reversal", "t2", "reversal", "alice", 1000, "bob", "no"),
    "a void of an opening": ("carol-opening", "carol", "opening", "carol", 100, None, "no"),
    "a reason of bytes": ("x-debit", "x", "debit", "alice", -100, "bob", b"no"),
}


@pytest.mark.parametrize("verb", ["INSERT", "INSERT OR IGNORE", "INSERT OR REPLACE"])
@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_would_make_or_strand_money_does_not_go_in(ctx, row, verb, record_property):
    before = dump(ctx.db)
    with suppress(sqlite3.IntegrityError):
        ctx.db.execute(f"{verb} INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", ROWS[row])
    assert dump(ctx.db) == before
    record_property("hostile statements, none of which moved a cent", 1)


STATEMENTS = (
    "UPDATE operations SET amount = 1 WHERE op_id = 't1-credit'",
    "REPLACE INTO operations VALUES ('t2-debit', 't2', 'debit', 'alice', -1, 'bob', NULL)",
    "DELETE FROM operations",
    "UPDATE accounts SET balance = balance + 1",
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
def test_hostile_sql_moves_no_money(ctx, sql, record_property):
    before = dump(ctx.db)
    with pytest.raises(sqlite3.DatabaseError):
        ctx.db.execute(sql)
    assert dump(ctx.db) == before
    record_property("hostile statements, none of which moved a cent", 1)


def test_what_is_not_valid_or_does_not_fit_into_a_balance_is_refused(ctx):
    with pytest.raises(TransferRejected, match="not a valid operation"):
        apply_entry(ctx, operation("x-gift"))
    main.open_account(ctx.db, "full", 2**63 - 1)
    apply_entry(ctx, operation("x-debit", counterparty="full"))
    with pytest.raises(TransferRejected):
        apply_entry(ctx, operation("x-credit", account="full"))


def test_an_entry_that_comes_again_or_is_given_up_stays_though_no_money_is_left(ctx):
    everything = operation("all-debit", amount=-8000)
    for _ in range(3):
        apply_entry(ctx, everything)
        assert give_up(ctx, everything, NO) is None
        assert main.balance(ctx.db, "alice") == 0


CONFLICTS = {
    "another account than the entry": operation("t2-debit", account="carol"),
    "another amount than the entry": operation("t2-debit", amount=-1001),
    "another counterparty than the entry": operation("t2-debit", counterparty="carol"),
    "another account than the void": operation("t3-credit", account="carol"),
}


@pytest.mark.parametrize("difference", CONFLICTS)
def test_an_op_id_used_again_for_something_else_is_a_conflict(ctx, difference):
    before = dump(ctx.db)
    with pytest.raises(OperationConflict):
        apply_entry(ctx, CONFLICTS[difference])
    with pytest.raises(OperationConflict):
        give_up(ctx, CONFLICTS[difference], NO)
    assert dump(ctx.db) == before


def test_a_void_written_by_hand_stops_a_credit_for_good(ctx):
    credit = operation("t2-credit")
    settle(ctx.db, credit, void="")
    assert give_up(ctx, credit, NO) == ""
    with pytest.raises(TransferRejected, match=r"^$"):
        apply_entry(ctx, credit)
    apply_entry(ctx, operation("t2-reversal"))
    assert main.outcome(ctx.db, "t2") == "compensated"


def test_the_reason_of_a_void_is_text_whatever_the_failure_says(ctx):
    assert give_up(ctx, operation("t2-credit"), TimeoutError()) == "TimeoutError()"
    assert give_up(ctx, operation("x-debit"), Exception("\ud800 no")) == "\\ud800 no"


def test_an_account_opens_once(db):
    main.open_account(db, "alice", 10000)
    main.open_account(db, "empty")
    assert main.balance(db, "empty") == 0
    with pytest.raises(OperationConflict):
        main.open_account(db, "empty", 1)
    with pytest.raises(ValueError, match="an amount is"):
        main.open_account(db, "poor", -1)
    with pytest.raises(LookupError, match="poor"):
        main.balance(db, "poor")


def test_settle_says_nothing_inside_a_transaction_that_could_be_rolled_back(ctx):
    ctx.db.execute("BEGIN")
    with pytest.raises(sqlite3.ProgrammingError, match="transaction"):
        settle(ctx.db, operation("t2-credit"))


def use(ctx, name):
    """What a transfer asks the ledger."""
    apply_entry(ctx, operation(f"{name}-debit", amount=-1))
    give_up(ctx, operation(f"{name}-credit", amount=1), NO)
    apply_entry(ctx, operation(f"{name}-reversal", amount=1))
    apply_entry(ctx, operation(f"{name}-reversal", amount=1))
    assert main.outcome(ctx.db, name) == "compensated"
    main.balance(ctx.db, "alice")


def test_a_transfer_costs_the_same_however_long_the_history_and_all_use_the_lock(ctx):
    """Counted in instructions of SQLite, and asked at each. Threads share the connection."""
    locked = []

    def ask():
        locked.append(main.LOCK.locked())

    ctx.db.set_progress_handler(ask, 1)
    use(ctx, "first")
    cost = len(locked)
    for number in range(100):
        main.open_account(ctx.db, f"account{number}")
        use(ctx, f"x{number}")
    main.in_flight(ctx.db)
    with redirect_stdout(None):
        main.journal(ctx.db)
    assert all(locked)
    locked.clear()
    use(ctx, "last")
    assert len(locked) == cost


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.db"


def get(db, pragma):
    return db.execute(f"PRAGMA {pragma}").fetchone()[0]


def test_a_ledger_opens_again_beside_a_reader_or_a_writer_too_and_is_durable(path, db, monkeypatch):
    """With SQLite as it may have been built, and in a hurry. The reader keeps it from WAL."""
    hasty = "PRAGMA synchronous = OFF; PRAGMA busy_timeout = 20"
    monkeypatch.setattr(sqlite3, "connect", connecting(lambda db: db.executescript(hasty)))
    opened(path).close()
    with closing(sqlite3.connect(path, autocommit=True)) as other:
        other.executescript("PRAGMA journal_mode = DELETE; BEGIN; SELECT * FROM entries")
        with closing(main.open_ledger(path)) as again:
            assert get(again, "journal_mode") == "delete"
        other.execute("ROLLBACK")
        with closing(main.open_ledger(path)) as again:
            assert get(again, "journal_mode") == "wal"
            assert get(again, "synchronous") == 2
            assert get(again, "user_version") != get(db, "user_version")
        other.execute("BEGIN IMMEDIATE")
        with closing(main.open_ledger(path)) as again:
            assert main.balance(again, "alice") == 10000


@pytest.mark.parametrize("moment", ["BEGIN", "PRAGMA application_id ="])
def test_two_processes_that_create_a_ledger_at_once_create_one(path, moment, monkeypatch):
    """Another creates it right before this one begins. When this one has begun, it cannot."""
    other = sqlite3.connect(path, timeout=0, autocommit=True)
    settings = f"PRAGMA application_id = {main.APPLICATION_ID}; PRAGMA user_version = 7"

    def meanwhile(sql):
        if sql.startswith(moment):
            with suppress(sqlite3.OperationalError):
                other.execute("BEGIN IMMEDIATE")
                other.executescript(f"{settings}; {main.SCHEMA}; COMMIT")

    monkeypatch.setattr(sqlite3, "connect", connecting(lambda db: db.set_trace_callback(meanwhile)))
    with closing(main.open_ledger(path)) as db:
        assert (get(db, "user_version") == 7) == (moment == "BEGIN")
    other.close()


OTHERS = {
    "one that looks like a ledger": main.SCHEMA,
    "one that marks itself as another's": "PRAGMA application_id = 7; CREATE TABLE x (y)",
    "a letter": b"D",
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_that_is_something_else_is_refused_and_left_as_it_was(path, other):
    content = OTHERS[other]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with closing(sqlite3.connect(path)) as db:
            db.executescript(content)
    before = path.read_bytes()
    with pytest.raises(sqlite3.DatabaseError, match="not a ledger"):
        main.open_ledger(path)
    assert path.read_bytes() == before


def test_triggers_that_somebody_has_dropped_are_back_and_one_that_was_added_moves_no_money(path):
    opened(path).close()
    with closing(sqlite3.connect(path)) as other:
        triggers = "SELECT name FROM sqlite_schema WHERE type = 'trigger'"
        for (name,) in other.execute(triggers).fetchall():
            other.execute(f"DROP TRIGGER {name}")
        gift = "BEGIN UPDATE accounts SET balance = balance + 1; END"
        other.execute(f"CREATE TRIGGER gift AFTER INSERT ON operations {gift}")
    with closing(main.open_ledger(path)) as db:
        names = {name for (name,) in db.execute(triggers)}
        assert names == {"entry_moves_balance", "no_delete", "no_update", "gift"}
        with pytest.raises(sqlite3.DatabaseError, match=r"prohibited|not authorized"):
            settle(db, operation("t1-debit"))
        check(db)
