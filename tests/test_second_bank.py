"""The case for which the rule exists: the target is another bank, with a ledger of its own. It
settles an op id only once, as an entry or as a void, and answers with the row that stands. Only
`credit_target` and `give_up` are others, as main.py tells."""

import os
import sqlite3
from contextlib import closing

import pytest
from conftest import check, command, in_a_process, kill_everywhere, left_at

import main


def ask_other_bank(ctx, credit, void=None):
    """Lets that bank settle the credit, and copies its answer into our ledger. Returns whether it
    has happened. That bank's key holds the id of our ledger: others may use the same op id."""
    db = ctx.get_dependency("db")
    [(ledger_id,)] = main.read(db, "SELECT id FROM ledger")
    row = (f"{ledger_id}-{credit.op_id}", credit.account, credit.amount, void)
    with closing(sqlite3.connect("other.db", autocommit=True)) as other:
        other.execute("INSERT OR IGNORE INTO operations VALUES (?, ?, ?, ?)", row)
        find = "SELECT account, amount, void FROM operations WHERE op_id = ?"
        *terms, reason = other.execute(find, row[:1]).fetchone()
    if terms != [credit.account, credit.amount]:
        raise main.OperationConflict(f"the other bank has {terms} as {credit.op_id}")
    return main.settle(db, credit, void=reason)


def credit_target(ctx, credit, *, fail):
    try:
        credited = fail != "late" and ask_other_bank(ctx, credit)
        if fail or not credited:
            raise TimeoutError("no answer, or a void")
    except BaseException as error:  # as in main.py
        raise RuntimeError(str(error)) from None


def give_up(ctx, credit, why):
    return ask_other_bank(ctx, credit, void=why)


def in_folder(words, folder):
    os.chdir(folder)
    main.credit_target, main.give_up = credit_target, give_up
    return command(words, folder)


def make_both(folder):
    with closing(sqlite3.connect(folder / "other.db")) as db:
        db.execute("CREATE TABLE operations (op_id TEXT PRIMARY KEY, account, amount, void)")
    with closing(main.open_ledger(folder / "ledger.db")) as db:
        main.open_account(db, "alice", 10000)
        main.open_account(db, "bob")  # stands for what that bank has


def state_of(folder):
    """What is in both files: all the money, and once. And what is in flight."""
    with left_at(folder / "ledger.db") as ours, left_at(folder / "other.db") as theirs:
        flying, state = check(ours), (*ours.iterdump(), *theirs.iterdump())
        balances = dict(ours.execute("SELECT * FROM accounts"))
        paid = dict(theirs.execute("SELECT op_id, amount FROM operations WHERE void IS NULL"))
        [(ledger_id,)] = ours.execute("SELECT id FROM ledger")
    # What is in flight with us may have arrived. All else that has arrived, we have booked, too.
    arrived = sum(paid.get(f"{ledger_id}-{name}-credit", 0) for name in flying)
    assert balances["bob"] == sum(paid.values()) - arrived
    assert balances["alice"] + sum(flying.values()) - arrived + sum(paid.values()) == 10000
    return state, *flying


@pytest.mark.parametrize("fault", ["lost", "late"])
def test_money_is_whole_in_both_files_wherever_we_are_killed(fault, tmp_path, record_property):
    make_both(tmp_path)
    words = f"transfer t1 alice bob 30 --fail-credit {fault}"
    kills = in_a_process(kill_everywhere, in_folder, words, "recover", state_of, tmp_path)
    assert kills > 20
    record_property(f"SIGKILLs with two banks, {words}: 0 lost or created", kills)


def test_two_ledgers_that_use_one_id_are_both_paid_by_that_bank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "credit_target", credit_target)
    make_both(tmp_path)
    for path in ("ledger.db", ":memory:"):
        with closing(main.open_ledger(path)) as db:
            main.open_account(db, "carol", 10000)
            main.open_account(db, "dave")
            main.submit(main.start(db), "t1", "carol", "dave", 3000)
    with closing(sqlite3.connect("other.db")) as other:
        assert list(other.execute("SELECT amount, void FROM operations")) == [(3000, None)] * 2
