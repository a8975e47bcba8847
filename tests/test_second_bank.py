"""The case for which the rule exists: the target is another bank, with a ledger of its own.

Only `credit_target` and `give_up` are others, as main.py tells. That bank promises two things: it
settles an op id only once, and it can settle it as a void.
"""

import sqlite3
import sys
import threading
from contextlib import closing

from conftest import check, in_a_folder, kill_everywhere

import main

LOCK = threading.Lock()


class OtherBank:
    def __init__(self, path):
        self.db = sqlite3.connect(path, check_same_thread=False, autocommit=True)
        columns = "op_id TEXT PRIMARY KEY, account TEXT, amount INTEGER, void TEXT"
        self.db.execute(f"CREATE TABLE IF NOT EXISTS operations ({columns})")

    def settle(self, credit, void=None):
        row = (credit.op_id, credit.account, credit.amount, void)
        select = "SELECT void FROM operations WHERE op_id = ?"
        with LOCK:
            self.db.execute("INSERT OR IGNORE INTO operations VALUES (?, ?, ?, ?)", row)
            [reason] = self.db.execute(select, (credit.op_id,)).fetchone()
        return reason


def credit_target(ctx, credit, *, fail=False, lose_answer=False):
    if fail:
        raise RuntimeError("no answer")
    reason = ctx.get_dependency("other").settle(credit)
    if lose_answer:
        raise RuntimeError("no answer")
    reason = main.settle(ctx.get_dependency("db"), credit, void=reason)
    if reason is not None:
        raise RuntimeError(reason)


def give_up(ctx, credit, why):
    reason = ctx.get_dependency("other").settle(credit, void=why)
    return main.settle(ctx.get_dependency("db"), credit, void=reason)


def transfer(folder, words="transfer t1 alice bob 30 --lose-answer"):
    """A command of main.py, but that bank is the target's."""
    start = main.start

    def start_with_other_bank(db, **options):
        bank = start(db, **options)
        bank.resonate.set_dependency("other", OtherBank(f"{folder}/other.db"))
        return bank

    main.start, main.credit_target, main.give_up = start_with_other_bank, credit_target, give_up
    sys.argv = ["main.py", *words.split(), "--ledger", f"{folder}/ledger.db"]
    assert main.main() in (0, 1)


def recover(folder):
    transfer(folder, "recover")


def state_of(folder):
    """What is in both files: all the money, and once. And what is in flight."""
    rows = []
    for name in ("ledger.db", "other.db"):
        with closing(sqlite3.connect(f"{folder}/{name}")) as db:
            db.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)
            rows.append(tuple(db.iterdump()))
            if name == "ledger.db":
                flying = check(db)
                balances = dict(db.execute("SELECT * FROM accounts"))
            elif "operations" in str(rows[-1]):
                query = "SELECT op_id, amount FROM operations WHERE void IS NULL"
                theirs = dict(db.execute(query))
            else:
                theirs = {}
    # What is in flight here may be there already. All else that is there, we have booked, too.
    arrived = sum(theirs.get(f"{name}-credit", 0) for name in flying)
    assert balances["bob"] == sum(theirs.values()) - arrived
    assert balances["alice"] + sum(flying.values()) - arrived + sum(theirs.values()) == 10000
    return tuple(rows), *flying


def kill(words, folder):
    with closing(main.open_ledger(f"{folder}/ledger.db")) as db:
        main.open_account(db, "alice", 10000)
        main.open_account(db, "bob")  # stands for what that bank has
    print(kill_everywhere(lambda folder: transfer(folder, words), recover, state_of, folder))


def test_money_is_whole_in_both_files_wherever_the_process_is_killed(record_property):
    for fault in ("--lose-answer", "--fail-credit"):
        words = f"transfer t1 alice bob 30 {fault}"
        kills = int(in_a_folder(f"import test_second_bank as t; t.kill({words!r}, folder)"))
        assert kills > 30
        record_property("SIGKILLs of real processes at a statement: 0 lost or created", kills)
