"""The case for which the rule exists: the target is another bank, with a ledger of its own.

Only `credit_target` and `give_up` are others, as main.py tells. That bank promises two things: it
settles an op id only once, and it can settle it as a void.
"""

import sqlite3
import threading
from contextlib import closing
from functools import partial

from conftest import check, in_a_process, kill_everywhere
from test_commands import command

import main


class OtherBank:
    def __init__(self, path):
        self.db = sqlite3.connect(path, check_same_thread=False, autocommit=True)
        columns = "op_id TEXT PRIMARY KEY, account TEXT, amount INTEGER, void TEXT"
        self.db.execute(f"CREATE TABLE IF NOT EXISTS operations ({columns})")
        self.lock = threading.Lock()

    def settle(self, credit, void=None):
        row = (credit.op_id, credit.account, credit.amount, void)
        select = "SELECT void FROM operations WHERE op_id = ?"
        with self.lock:
            self.db.execute("INSERT OR IGNORE INTO operations VALUES (?, ?, ?, ?)", row)
            return self.db.execute(select, (credit.op_id,)).fetchone()[0]


def credit_target(ctx, credit, *, fail, lose_answer):
    if fail:
        raise RuntimeError("no answer")
    reason = ctx.get_dependency("other bank").settle(credit)
    if lose_answer:
        raise RuntimeError("no answer")
    if main.settle(ctx.get_dependency("db"), credit, void=reason) is not None:
        raise RuntimeError(reason)


def give_up(ctx, credit, why):
    reason = ctx.get_dependency("other bank").settle(credit, void=why)
    return main.settle(ctx.get_dependency("db"), credit, void=reason)


def with_other_bank(words, folder, start=main.start):
    """A command of main.py, but that bank is the target's."""

    def start_with_other_bank(db, **options):
        bank = start(db, **options)
        bank.resonate.set_dependency("other bank", OtherBank(f"{folder}/other.db"))
        return bank

    main.start, main.credit_target, main.give_up = start_with_other_bank, credit_target, give_up
    command(words, folder)


def state_of(folder):
    """What is in both files: all the money, and once. And what is in flight."""
    with (
        closing(sqlite3.connect(f"{folder}/ledger.db")) as ours,
        closing(sqlite3.connect(f"{folder}/other.db")) as theirs,
    ):
        for db in (ours, theirs):
            db.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)
        state = (*ours.iterdump(), *theirs.iterdump())
        balances = dict(ours.execute("SELECT * FROM accounts"))
        flying = check(ours)
        paid = {}
        if theirs.execute("SELECT * FROM sqlite_schema").fetchone():
            query = "SELECT op_id, amount FROM operations WHERE void IS NULL"
            paid = dict(theirs.execute(query))
    # What is in flight with us may have arrived. All else that has arrived, we have booked, too.
    arrived = sum(paid.get(f"{name}-credit", 0) for name in flying)
    assert balances["bob"] == sum(paid.values()) - arrived
    assert balances["alice"] + sum(flying.values()) - arrived + sum(paid.values()) == 10000
    return state, *flying


def kill(words, folder):
    with closing(main.open_ledger(f"{folder}/ledger.db")) as db:
        main.open_account(db, "alice", 10000)
        main.open_account(db, "bob")  # stands for what that bank has
    work, again = (partial(with_other_bank, each) for each in (words, "recover"))
    print(kill_everywhere(work, again, state_of, folder))


def test_money_is_whole_in_both_files_wherever_the_process_is_killed(record_property):
    for fault in ("--lose-answer", "--fail-credit"):
        words = f"transfer t1 alice bob 30 {fault}"
        out = in_a_process(f"import test_second_bank; test_second_bank.kill({words!r}, folder)")
        kills = int(out.split()[-1])
        assert kills > 30
        record_property("SIGKILLs of real processes at a statement: 0 lost or created", kills)
