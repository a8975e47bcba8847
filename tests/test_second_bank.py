"""The case for which the rule exists: the target is another bank, with a ledger of its own. It
settles an op id only once, and it can settle it as a void. Only `credit_target` and `give_up` are
others, as main.py tells."""

import os
import sqlite3
from contextlib import closing

import pytest
from conftest import check, in_a_process, kill_everywhere, left_at
from test_commands import command

import main


def ask_other_bank(credit, void=None):
    """That bank settles the credit, in its own file. What it answers: the reason of a void."""
    row = (credit.op_id, credit.account, credit.amount, void)
    with closing(sqlite3.connect("other.db", autocommit=True)) as db:
        db.execute("INSERT OR IGNORE INTO operations VALUES (?, ?, ?, ?)", row)
        return db.execute("SELECT void FROM operations WHERE op_id = ?", row[:1]).fetchone()[0]


def credit_target(ctx, credit, *, fail, lose_answer):
    reason = None if fail else ask_other_bank(credit)
    if fail or lose_answer:
        raise RuntimeError("no answer")
    if main.settle(ctx.get_dependency("db"), credit, void=reason) is not None:
        raise RuntimeError(reason)


def give_up(ctx, credit, why):
    reason = ask_other_bank(credit, void=why)
    return main.settle(ctx.get_dependency("db"), credit, void=reason)


def command_with_other_bank(words, folder):
    os.chdir(folder)
    main.credit_target, main.give_up = credit_target, give_up
    return command(words, folder)


def state_of(folder):
    """What is in both files: all the money, and once. And what is in flight."""
    with left_at(folder / "ledger.db") as ours, left_at(folder / "other.db") as theirs:
        flying, state = check(ours), (*ours.iterdump(), *theirs.iterdump())
        balances = dict(ours.execute("SELECT * FROM accounts"))
        paid = dict(theirs.execute("SELECT op_id, amount FROM operations WHERE void IS NULL"))
    # What is in flight with us may have arrived. All else that has arrived, we have booked, too.
    arrived = sum(paid.get(f"{name}-credit", 0) for name in flying)
    assert balances["bob"] == sum(paid.values()) - arrived
    assert balances["alice"] + sum(flying.values()) - arrived + sum(paid.values()) == 10000
    return state, *flying


@pytest.mark.parametrize("fault", ["--lose-answer", "--fail-credit"])
def test_money_is_whole_in_both_files_wherever_we_are_killed(fault, tmp_path, record_property):
    with closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE operations (op_id TEXT PRIMARY KEY, account, amount, void)")
    with closing(main.open_ledger(tmp_path / "ledger.db")) as db:
        main.open_account(db, "alice", 10000)
        main.open_account(db, "bob")  # stands for what that bank has
    job = (command_with_other_bank, f"transfer t1 alice bob 30 {fault}", "recover", state_of)
    kills = in_a_process(kill_everywhere, *job, tmp_path)
    assert kills > 20
    record_property("SIGKILLs of real processes at a statement: 0 lost or created", kills)
