"""A money transfer that neither loses nor creates money, whatever crashes: this file is all of it.

Money moves between two accounts that cannot be changed in one transaction, like accounts at two
banks. (Here both are in one SQLite file, so that you can run it, but no step changes both.) The
usual answer is a saga: debit the source, then credit the target. If the credit fails, reverse the
debit.

That saga can create money. A credit can report a failure although it has happened, because its
answer was lost. Or the credit happens after the failure was reported, because the process that
runs it was only slow. If the debit is then reversed, the source gets back money that the target
also gets. This file prevents that.

operation  one change to one account: the debit, the credit or the reversal of a transfer, or the
           opening of an account
op id      the unique name of an operation: transfer id and kind, for example `t1-debit`
settle     to decide an operation in the ledger, once and for ever: as an entry or as a void
entry      an operation that has happened: to settle it as an entry also changes the balance
void       an operation that has not happened and never will. Its row keeps the reason
in flight  a transfer is in flight if it is debited, and neither credited nor reversed yet

    The rule: before you give up on an operation, settle it as a void.
    If it is an entry already, it has happened: go on.

    debit -- entry --> credit -- entry -----------------> committed
      |                  `------ void --> reversal -----> compensated
      `----- void --------------------------------------> rejected

Two parts share the work. Resonate is a library that runs `transfer_money` as a workflow, step by
step. It keeps the result of each step in its promise store: in memory, or on a server. After a
crash it runs the workflow again, but not the steps whose results it still has. It decides when a
step runs, and may run a step twice or late. The ledger, a SQLite file, decides what has happened:
a step that runs again gets the same answer as before.

`python main.py` shows it all; `python main.py --help` lists the commands.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import re
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import wait
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

if __name__ == "__main__":  # to import Resonate takes a moment: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import resonate.resonate as sdk
from resonate import Context, Resonate
from resonate.coroutine import LFC
from resonate.errors import (
    ResonateCanceledError,
    ResonateShutdownError,
    ResonateStoreError,
    ResonateTimedoutError,
)
from resonate.retry_policies import Constant, Never
from resonate.scheduler import More
from resonate.stores import LocalStore, RemoteStore

# ---- The ledger: what has happened --------------------------------------------------------------

SCHEMA = """
-- Every operation that has settled, in the order in which they settled.
CREATE TABLE IF NOT EXISTS operations (
  op_id        TEXT PRIMARY KEY,
  transfer_id  TEXT NOT NULL,      -- for an opening: the name of the account
  kind         TEXT NOT NULL,
  account      TEXT NOT NULL,
  amount       INTEGER NOT NULL,   -- cents; below zero for a debit
  counterparty TEXT,               -- the other account; NULL for an opening
  void         TEXT,               -- NULL for an entry; for a void, the reason
  CHECK (op_id = transfer_id || '-' || kind),
  CHECK ((counterparty IS NULL) = (kind = 'opening')),
  CHECK (counterparty <> account),
  CHECK (CASE kind WHEN 'opening' THEN transfer_id = account AND void IS NULL
                   WHEN 'debit' THEN amount < 0
                   WHEN 'credit' THEN amount > 0
                   WHEN 'reversal' THEN amount > 0 AND void IS NULL  -- no void: it must happen
                   ELSE FALSE END)
) STRICT;

CREATE VIEW IF NOT EXISTS entries AS SELECT * FROM operations WHERE void IS NULL;

CREATE VIEW IF NOT EXISTS in_flight AS
  SELECT transfer_id, account AS source, counterparty AS target, -amount AS amount
  FROM entries AS debit
  WHERE kind = 'debit' AND NOT EXISTS (SELECT 1 FROM entries
    WHERE op_id IN (debit.transfer_id || '-credit', debit.transfer_id || '-reversal'));

CREATE TABLE IF NOT EXISTS accounts (
  account TEXT PRIMARY KEY,
  balance INTEGER NOT NULL         -- cents: the sum of the account's entries
) STRICT, WITHOUT ROWID;

-- Each new entry changes the balance of its account, unless one of these checks refuses the entry.
-- `settle`, below, inserts with INSERT OR IGNORE: if the op id exists, no row is inserted.
-- Why an AFTER trigger: a BEFORE trigger would run even if no row is inserted.
-- Why RAISE and not CHECK: OR IGNORE hides a failed CHECK, but not a RAISE.
CREATE TRIGGER IF NOT EXISTS entry_moves_balance AFTER INSERT ON operations WHEN NEW.void IS NULL
BEGIN
  -- A trigger has no IF. Here, `SELECT ... WHERE condition` does its work if that is true.
  INSERT INTO accounts SELECT NEW.account, 0 WHERE NEW.kind = 'opening';
  UPDATE accounts SET balance = balance + NEW.amount WHERE account = NEW.account;
  SELECT RAISE(ABORT, 'unknown account')
    WHERE NOT EXISTS (SELECT 1 FROM accounts WHERE account = NEW.account);
  SELECT RAISE(ABORT, 'insufficient funds')
    FROM accounts WHERE account = NEW.account AND balance < 0;
  -- The sum has this entry in it, and must be 0. So a credit or a reversal needs a debit of the
  -- same amount, and a transfer cannot have both a credit and a reversal.
  SELECT RAISE(ABORT, 'a transfer pays out what it took, and only once')
    WHERE NEW.kind IN ('credit', 'reversal') AND 0 <> (SELECT sum(amount) FROM entries
      WHERE op_id IN (NEW.transfer_id || '-debit', NEW.transfer_id || '-credit',
                      NEW.transfer_id || '-reversal'));
END;

CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON operations
BEGIN SELECT RAISE(ABORT, 'operations are final'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON operations
BEGIN SELECT RAISE(ABORT, 'operations are final'); END;
"""

# Resonate runs steps on several threads, and all share one connection. Hold LOCK for every use of
# it: otherwise inserts are lost, and one thread reads the rows of another (CPython issue 118172).
LOCK = threading.Lock()


class OperationConflict(Exception):
    """An op id, or the id of a transfer, is already used for something else."""


class TransferRejected(Exception):
    """An operation cannot be an entry: the ledger or the target refuses it, or it is a void.

    In spite of its name, it is about one operation: the transfer may end as "compensated", too.
    """


class Operation(NamedTuple):
    """A row of the table `operations`, without the column `void`."""

    op_id: str
    transfer_id: str
    kind: str
    account: str
    amount: int
    counterparty: str | None = None


def money(cents: int) -> str:
    """Cents as people write them: 3000 is 30.00."""
    return f"{Decimal(cents) / 100:.2f}"


def settle(db: sqlite3.Connection, operation: Operation, void: str | None = None) -> str | None:
    """Settles an operation: as an entry or, if `void` gives a reason, as a void.

    If the operation is settled already, nothing changes. In both cases, returns None if it is now
    an entry, and the reason if it is now a void.

    Raises OperationConflict if the op id belongs to a different operation, and
    sqlite3.IntegrityError if the ledger refuses the entry. After any other sqlite3.Error, the
    outcome is unknown: call again.
    """
    with LOCK:
        if db.in_transaction:  # its owner could roll back what we settle here
            raise sqlite3.ProgrammingError("settle() needs a connection without a transaction")
        insert = "INSERT OR IGNORE INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"
        if db.execute(insert, (*operation, void)).rowcount == 1:
            return void  # nobody had settled it before
        select = "SELECT * FROM operations WHERE op_id = ?"
        row = db.execute(select, (operation.op_id,)).fetchone()
    if row is None:  # a failed CHECK: OR IGNORE has skipped the row
        raise sqlite3.IntegrityError(f"not a valid operation: {operation}")
    *columns, reason = row
    settled = Operation(*columns)
    if settled != operation:
        used = f"{money(settled.amount)} on account {settled.account}"
        raise OperationConflict(f"{operation.op_id!r} is already used: {used}")
    return None if reason is None else str(reason)


def open_account(db: sqlite3.Connection, account: str, opening: int = 0) -> None:
    """Opens an account that holds `opening` cents. Does nothing if that was done before.

    Raises ValueError for a name or an amount that is not valid, and OperationConflict if the
    account was opened with another amount.
    """
    check_account(account)
    check_amount(opening, 0)
    settle(db, Operation(f"{account}-opening", account, "opening", account, opening))


def check_account(name: object) -> None:
    """Raises ValueError unless this is a non-empty str that can be stored as UTF-8."""
    if type(name) is not str or not name or name != name.encode(errors="ignore").decode():
        raise ValueError(f"the name of an account is some text, not {name!r:.80}")


def check_amount(cents: object, least: int) -> None:
    """Raises ValueError unless this is an int that is at least `least`, and fits into SQLite."""
    if type(cents) is not int or not least <= cents < 2**63:
        allowed = f"a whole number of cents, {least} to 2**63 - 1"
        raise ValueError(f"an amount is {allowed}, not {cents!r:.80}")


def balance(db: sqlite3.Connection, account: str) -> int:
    """The cents in an account. Raises LookupError if there is no such account."""
    rows = read(db, "SELECT balance FROM accounts WHERE account = ?", account)
    if not rows:
        raise LookupError(f"unknown account {account!r}")
    return int(rows[0][0])


def in_flight(db: sqlite3.Connection) -> list[tuple[str, str, str, int]]:
    """Each transfer in flight: its id, source, target and cents."""
    return read(db, "SELECT transfer_id, source, target, amount FROM in_flight")


def outcome(db: sqlite3.Connection, transfer_id: str) -> str:
    """What the ledger says of a transfer: "committed", "compensated", "rejected" or "in flight".

    It says "unknown" if no debit has settled.
    """
    if settled_as(db, f"{transfer_id}-credit") == "entry":
        return "committed"
    if settled_as(db, f"{transfer_id}-reversal") == "entry":
        return "compensated"
    debit = settled_as(db, f"{transfer_id}-debit")
    if debit == "entry":
        return "in flight"
    return "rejected" if debit == "void" else "unknown"


def settled_as(db: sqlite3.Connection, op_id: str) -> str | None:
    """How an operation has settled: "entry" or "void"; None if it has not."""
    query = "SELECT iif(void IS NULL, 'entry', 'void') FROM operations WHERE op_id = ?"
    rows = read(db, query, op_id)
    return str(rows[0][0]) if rows else None


def read(db: sqlite3.Connection, query: str, *parameters: str) -> list[Any]:
    """The rows that a query finds."""
    with LOCK:
        return db.execute(query, parameters).fetchall()


# ---- The ledger as a file -----------------------------------------------------------------------

APPLICATION_ID = 0x6D6F6E65  # "mone" in ASCII: marks a SQLite file as one of our ledgers


def open_ledger(path: str = ":memory:") -> sqlite3.Connection:
    """A connection to the ledger at `path`, which is created if there is none.

    Use it only through the functions of this file, because they hold LOCK. For queries of your own,
    open a second connection. Raises sqlite3.Error if the file cannot be used or is not a ledger.
    """
    # SQLite treats a file shorter than 512 bytes as an empty database, and would overwrite it.
    if os.path.isfile(path) and 0 < os.path.getsize(path) < 512:
        raise sqlite3.DatabaseError("this file is not a ledger")
    db = sqlite3.connect(path, check_same_thread=False, autocommit=True)
    try:
        create_if_empty(db)
        if db.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise sqlite3.DatabaseError("this file is not a ledger, but another program's database")
        db.executescript(SCHEMA)  # puts back a trigger that somebody has dropped
        with contextlib.suppress(sqlite3.OperationalError):  # busy: the next open_ledger does it
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # a commit survives a loss of power
        # INSERT OR REPLACE deletes the old row: only with this does no_delete stop that.
        db.execute("PRAGMA recursive_triggers = ON")
    except sqlite3.Error:
        db.close()
        raise
    db.set_authorizer(only_settle)
    return db


def create_if_empty(db: sqlite3.Connection) -> None:
    """Makes an empty database a ledger. Several processes may do this at once."""
    if db.execute("SELECT count(*) FROM sqlite_schema").fetchone() != (0,):
        return
    db.execute("BEGIN IMMEDIATE")
    if db.execute("SELECT count(*) FROM sqlite_schema").fetchone() == (0,):  # still empty
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        # SQLite leaves `user_version` to us: it holds a random id of this ledger, for `start`.
        db.execute(f"PRAGMA user_version = {secrets.randbelow(2**31)}")
        db.executescript(SCHEMA)
    db.execute("COMMIT")


ALLOWED = (
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_TRANSACTION,
)


def only_settle(
    action: int, name: str | None, value: str | None, _schema: str | None, trigger: str | None
) -> int:
    """Tells SQLite what a statement on this connection may do: read, and settle operations.

    SQLite calls this for each action of a statement. `name` is the table or the pragma, `value` the
    new value of a pragma, `trigger` the trigger that does the action. So only the trigger can
    change `accounts`.
    """
    reads = action in ALLOWED or (action == sqlite3.SQLITE_PRAGMA and value is None)
    settles = action == sqlite3.SQLITE_INSERT and name == "operations"
    if reads or settles or trigger == "entry_moves_balance":
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


# ---- The steps: each settles one operation ------------------------------------------------------

# `ctx` is Resonate's context of a step. `ctx.get_dependency("db")` is the ledger that `start` got.


def apply_entry(ctx: Context, operation: Operation) -> None:
    """Settles an operation as an entry, once, however often it runs.

    Raises TransferRejected if the ledger refuses the entry, or if the operation is a void.
    """
    try:
        reason = settle(ctx.get_dependency("db"), operation)
    except sqlite3.IntegrityError as refusal:
        reason = str(refusal)
    if reason is not None:
        raise TransferRejected(reason)


def credit_target(
    ctx: Context, operation: Operation, *, fail: bool = False, lose_answer: bool = False
) -> None:
    """Credits the target. Two simulated faults: with `fail` the target refuses; with `lose_answer`
    the target is paid, but its answer is lost.

    If your target is another bank, it needs a ledger of its own with the same rule, and you change
    two functions. This one must ask the target to settle the op id as an entry. `give_up`, if the
    operation is a credit, must ask it to settle the op id as a void, because only the target can
    say that the credit will never happen. Both then settle the credit in our ledger in the way that
    the target has answered.
    """
    if fail:
        raise TransferRejected("the target refused (simulated)")
    apply_entry(ctx, operation)
    if lose_answer:
        raise TimeoutError("no answer from the target (simulated)")


def give_up(ctx: Context, operation: Operation, why: Exception) -> str | None:
    """Settles an operation as a void, unless it has happened.

    Returns the reason of the void. Returns None if the operation is an entry: it has happened,
    whatever its caller was told.
    """
    reason = str(why) or repr(why)  # some exceptions have no text
    reason = reason.encode(errors="backslashreplace").decode()  # SQLite stores only valid UTF-8
    return settle(ctx.get_dependency("db"), operation, void=reason)


# ---- The saga -----------------------------------------------------------------------------------

LOG = logging.getLogger("money-transfer")

# A step that raises one of these exceptions has its answer. After any other exception, Resonate
# runs the step again, with growing pauses, unless the step has the retry policy Never().
ANSWERS = (TransferRejected, OperationConflict)

# How to read a workflow: `yield ctx.run(f, x)` runs the step f(ctx, x), waits, and gives its result
# or raises its exception. After a crash the workflow starts from the top, but a step whose result
# is in the promise store does not run again. So a saga yields steps (LFC is what `ctx.run`
# returns), receives their results, and returns a Result.
type Step = LFC[None] | LFC[str | None]
type Result = dict[str, str | int]
type Saga = Generator[Step, str | None, Result]


def transfer_money(
    ctx: Context,
    transfer_id: str,
    source: str,
    target: str,
    amount: int,
    *,
    simulate_credit_failure: bool = False,
    simulate_lost_answer: bool = False,
) -> Saga:
    """Moves `amount` cents. Its result has a status: "committed", "compensated" or "rejected".

    The result is what the ledger says: the same for whoever asks, and after any crash.
    """

    def operation(kind: str, account: str, amount: int, counterparty: str) -> Operation:
        return Operation(f"{transfer_id}-{kind}", transfer_id, kind, account, amount, counterparty)

    debit = operation("debit", source, -amount, target)
    credit = operation("credit", target, amount, source)
    reversal = operation("reversal", source, amount, target)
    result: Result = dict(transfer_id=transfer_id, source=source, target=target, amount=amount)

    # Step 1: debit the source. An OperationConflict ends the transfer: `give_up` raises it again.
    try:
        yield ctx.run(apply_entry, debit).options(non_retryable_exceptions=ANSWERS)
    except Exception as failure:
        reason = yield ctx.run(give_up, debit, failure).options(non_retryable_exceptions=ANSWERS)
        if reason is not None:
            LOG.info("%s rejected: %s", transfer_id, reason)
            return result | {"status": "rejected", "error": reason}
        # `reason` is None: the debit is an entry. Another run of this transfer has settled it
        # since, when there was enough money. Go on.

    # Step 2: credit the target. Never() is intentional: after one failure, `give_up` decides. If
    # your target is unreliable, use a policy with some retries.
    try:
        yield ctx.run(
            credit_target, credit, fail=simulate_credit_failure, lose_answer=simulate_lost_answer
        ).options(retry_policy=Never())
    except Exception as failure:
        # The credit has reported a failure, but it may have happened. `give_up` finds out.
        LOG.info("%s: the credit failed: %s", transfer_id, failure)
        reason = yield ctx.run(give_up, credit, failure).options(non_retryable_exceptions=ANSWERS)
        if reason is not None:
            # Step 3: the credit will never happen, so the source can have its money back.
            yield ctx.run(apply_entry, reversal).options(non_retryable_exceptions=ANSWERS)
            LOG.info("%s compensated: %s", transfer_id, reason)
            return result | {"status": "compensated", "error": reason}
        # `reason` is None: the credit is an entry. It has happened in spite of the failure.

    LOG.info("%s committed", transfer_id)
    return result | {"status": "committed"}


# ---- Running it ---------------------------------------------------------------------------------


class Transfer(NamedTuple):
    """What `submit` needs of Resonate."""

    run: Callable[..., Any]  # runs `transfer_money`, under an id, and returns its result
    remote: bool  # whether promises are kept on a server


# A process that runs a transfer has a lease on it: a time in which no other process may take it
# over. What is in our memory no other process can reach: there, the lease is too long to end.
LEASE_IN_MEMORY = 10**6  # seconds


def start(
    db: sqlite3.Connection, *, remote: bool = False, client: bool = False
) -> tuple[Resonate, Transfer]:
    """Starts Resonate for this ledger. Returns Resonate, and what `submit` needs of it.

    Promises are kept in memory or, with `remote`, on the server that RESONATE_HOST names. With
    `remote`, this process is a client or a worker. A client runs only the transfers that it
    submits. A worker also finishes those of clients that died. Raises ValueError if RESONATE_HOST
    is not valid, and ConnectionError if no server is there.
    """
    # A group is a set of processes that share work. The workers of one ledger are one group: a
    # worker of another ledger must not run our transfers.
    [(ledger_id,)] = read(db, "PRAGMA user_version")
    workers = f"money-transfer-{ledger_id}"
    # A client is alone in its group, so it gets no work of others. It runs what it submits. If it
    # dies, the workers take over, because of `options(target=workers)`, below. (That `target` is a
    # group of processes, not an account.)
    group = f"client-{secrets.token_hex(8)}" if client else workers
    if remote:
        resonate = Resonate.remote(group=group)
    else:
        resonate = Resonate.local(group=group, ttl=LEASE_IN_MEMORY)
    resonate.set_dependency("db", db)
    workflow = resonate.register(transfer_money).options(target=workers)
    run = mend(resonate, workflow)  # repairs faults of the SDK: see the last part of this file
    resonate.start()
    return resonate, Transfer(run, remote)


def submit(
    db: sqlite3.Connection,
    transfer: Transfer,
    transfer_id: str,
    source: str,
    target: str,
    amount: int,
    *,
    simulate_credit_failure: bool = False,
    simulate_lost_answer: bool = False,
) -> Result:
    """Runs a transfer of `amount` cents under its id. Returns its result, the same every time.

    Raises ValueError for a request that is not valid, before anything is written. Raises
    OperationConflict if the id is that of another transfer, or if the promise store contradicts
    the ledger.
    """
    # No dot in an id: "t1.1" and "t1.2" are the SDK's names for the steps of "t1". And nothing that
    # must be escaped in a URL: the SDK does not do that.
    if type(transfer_id) is not str or not re.fullmatch("[A-Za-z0-9_-]{1,64}", transfer_id):
        allowed = "1 to 64 letters, digits, hyphens and underscores"
        raise ValueError(f"a transfer id is {allowed}, not {transfer_id!r:.80}")
    check_account(source)
    check_account(target)
    if source == target:
        raise ValueError(f"source and target are the same account: {source!r:.80}")
    check_amount(amount, 1)

    request: Result = dict(transfer_id=transfer_id, source=source, target=target, amount=amount)
    result: Any
    try:
        # The first argument names the promise. All the others are for `transfer_money`.
        result = transfer.run(
            transfer_id,
            **request,
            simulate_credit_failure=simulate_credit_failure,
            simulate_lost_answer=simulate_lost_answer,
        )
    except (OperationConflict, ResonateCanceledError, ResonateTimedoutError) as error:
        result = error  # the promise store has no result for this request
    # A result counts only if it is of this request. One that was kept on a server may be old, or of
    # another ledger: it counts only if our ledger, which is right, agrees.
    expected = request
    if transfer.remote:
        expected = request | {"status": outcome(db, transfer_id)}
    # `<=` is true if `result` has every key of `expected`, with the same value.
    if isinstance(result, dict) and expected.items() <= result.items():
        return result
    raise OperationConflict(conflict_message(db, transfer_id, source, target, amount, result))


def conflict_message(
    db: sqlite3.Connection, transfer_id: str, source: str, target: str, amount: int, result: object
) -> str:
    """Says why `result`, from the promise store, is not the result of this request."""
    query = "SELECT account, counterparty, -amount FROM operations WHERE op_id = ?"
    rows = read(db, query, f"{transfer_id}-debit")
    if rows and tuple(rows[0]) != (source, target, amount):
        payer, payee, paid = rows[0]
        return f"transfer id {transfer_id!r} is already used: {money(paid)} from {payer} to {payee}"
    return (
        f"transfer {transfer_id!r}: the ledger, which is right, says {outcome(db, transfer_id)!r},"
        f" but the promise store says {result!r:.200}. If it is in flight, run `recover`. For"
        " another transfer, use another id"
    )


def recover(
    db: sqlite3.Connection,
    transfer: Transfer,
    report: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Finishes each transfer in flight, and needs only the ledger for it. Returns the results.

    Calls `report` with each result as soon as it is known. If a transfer cannot be finished, its
    result has the status "in flight" and the error.
    """
    results = []
    for transfer_id, source, target, amount in in_flight(db):
        try:
            result = submit(db, transfer, transfer_id, source, target, amount)
        except Exception as error:
            result = dict(transfer_id=transfer_id, source=source, target=target, amount=amount)
            result |= {"status": "in flight", "error": str(error)}
        report(result)
        results.append(result)
    return results


# ---- The command line ---------------------------------------------------------------------------

ASK_AGAIN = "Nothing is lost. Run the same command again: it finds out what happened"


def parse() -> argparse.Namespace:
    """The arguments of the command line. Ends the process with status 2 if they are not valid."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--ledger", metavar="FILE", default="ledger.db", help="default: %(default)s"
    )
    common.add_argument("-v", "--verbose", action="store_true", help="print what the saga does")
    common.add_argument(
        "--crash-after",
        choices=("debit", "credit", "reversal"),
        help="kill -9 right after that operation has settled, as an entry or as a void",
    )
    cli = argparse.ArgumentParser(
        prog="main.py", description="Without a command: a tour.", allow_abbrev=False
    )
    cli.set_defaults(ledger="ledger.db")  # `main` reads it, also without a command
    commands = cli.add_subparsers(dest="command", metavar="COMMAND")
    add = functools.partial(commands.add_parser, parents=[common], allow_abbrev=False)

    opening = add("open", help="open an account; the first one makes the ledger")
    opening.add_argument("account", metavar="ACCOUNT")
    opening.add_argument("amount", metavar="AMOUNT", type=cents, help="30 or 30.00")

    transfer = add("transfer", help="move money")
    transfer.add_argument("id", metavar="ID", help="the same id is the same transfer")
    transfer.add_argument("source", metavar="SOURCE")
    transfer.add_argument("target", metavar="TARGET")
    transfer.add_argument("amount", metavar="AMOUNT", type=cents, help="30 or 30.00")
    transfer.add_argument("--fail-credit", action="store_true", help="the target refuses")
    transfer.add_argument(
        "--lose-answer", action="store_true", help="the target is paid, but no answer comes"
    )
    transfer.add_argument("--server", action="store_true", help="use a Resonate server")

    add("recover", help="finish what is in flight")
    listing = add("journal", help="show the ledger, and whether it adds up")
    listing.add_argument("id", metavar="ID", nargs="?", help="only this transfer")
    add("worker", help="finish what clients of a Resonate server left unfinished")
    return cli.parse_args()


def cents(text: str) -> int:
    """An amount as people write it, in cents: 30 or 30.00 is 3000."""
    if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError(f"not an amount: {text!r:.80}. Write 30 or 30.00")
    return int(Decimal(text).scaleb(2))


def crash_after(kind: str) -> None:
    """From now on, this process dies as by kill -9 when an operation of that kind has settled."""
    real_settle = settle

    def settle_and_die(
        db: sqlite3.Connection, operation: Operation, void: str | None = None
    ) -> str | None:
        settled = real_settle(db, operation, void)
        if operation.kind == kind:
            os.kill(os.getpid(), signal.SIGKILL)
        return settled

    globals()["settle"] = settle_and_die  # from now on, the steps call this one


def journal(db: sqlite3.Connection, only: str | None = None) -> bool:
    """Prints the operations, the transfers in flight and the balances.

    If `only` is a transfer id, prints only the operations of that transfer, and whether it is in
    flight. Always prints the totals, and returns whether the ledger adds up: each balance is the
    sum of its entries, and all the money of the openings is in accounts or in flight.
    """
    every_operation = "SELECT op_id, transfer_id, kind, account, amount, void FROM operations"
    with LOCK:
        db.execute("BEGIN")  # one snapshot, whatever others write meanwhile
        operations = db.execute(f"{every_operation} ORDER BY rowid").fetchall()
        flights = db.execute("SELECT * FROM in_flight").fetchall()
        balances = dict(db.execute("SELECT * FROM accounts ORDER BY account"))
        sums = dict(db.execute("SELECT account, sum(amount) FROM entries GROUP BY account"))
        db.execute("COMMIT")

    opened = 0
    for op_id, transfer_id, kind, account, amount, void in operations:
        if kind == "opening":
            opened += amount
        if only in (None, transfer_id):
            show(op_id, account, amount, f"void: {void}" if void is not None else "")
    for transfer_id, source, target, amount in flights:
        if only in (None, transfer_id):
            show(transfer_id, "in flight", amount, f"from {source} to {target}")
    if only is None:
        for account, amount in balances.items():
            show("balance", account, amount)

    held = sum(balances.values())
    moving = sum(amount for *_, amount in flights)
    adds_up = balances == sums and held + moving == opened
    verdict = "every cent is somewhere" if adds_up else "IT DOES NOT ADD UP"
    where = f"{money(held)} in accounts + {money(moving)} in flight"
    print(f"  {where}, {money(opened)} opened: {verdict}")
    return adds_up


def show(name: str, account: str, amount: int, note: str = "") -> None:
    """Prints a line of the journal."""
    columns = f"  {name:14} {account:10} {money(amount):>10}"
    print(printable(f"{columns}  {note}".rstrip()))


def printable(line: str) -> str:
    """The line, with its control characters escaped: they could affect the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


class Scene(NamedTuple):
    """A command of the tour, and what it must lead to."""

    title: str
    transfer_id: str
    command: str
    status: int
    alice: int
    bob: int


# Title, transfer id and command; then what is expected: exit status, cents of alice and of bob.
TOUR = (
    Scene("alice pays bob", "t1", "transfer t1 alice bob 30", 0, 7000, 8000),
    Scene("The target refuses", "t2", "transfer t2 alice bob 20 --fail-credit", 1, 7000, 8000),
    Scene("The answer is lost", "t3", "transfer t3 alice bob 5 --lose-answer -v", 0, 6500, 8500),
    Scene("alice has no 500.00", "t4", "transfer t4 alice bob 500", 1, 6500, 8500),
    Scene("t1 again: nothing moves", "t1", "transfer t1 alice bob 30", 0, 6500, 8500),
    Scene("kill -9", "t5", "transfer t5 alice bob 10 --crash-after debit", -9, 5500, 8500),
    Scene("Finished from the ledger alone", "t5", "recover", 0, 5500, 9500),
)


def tour() -> int:
    """Runs the commands of TOUR, each in a process of its own, and checks what they leave."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # removes the folder on the way out
    with tempfile.TemporaryDirectory() as folder:
        ledger = f"{folder}/ledger.db"
        print("# Two accounts")
        for command in ("open alice 100", "open bob 50"):
            run_command(command, ledger)
        for scene in TOUR:
            print(f"\n# {scene.title}")
            status = run_command(scene.command, ledger)
            with contextlib.closing(open_ledger(ledger)) as db:
                adds_up = journal(db, scene.transfer_id)
                found = status, balance(db, "alice"), balance(db, "bob")
            if not adds_up or found != (scene.status, scene.alice, scene.bob):
                return failed(f"the tour claims {scene}, but found {found}")
    return 0


def run_command(command: str, ledger: str) -> int:
    """Runs a command as a process of its own. Returns its exit status."""
    print(f"$ python main.py {command}", flush=True)
    words = [sys.executable, __file__, *command.split(), "--ledger", ledger]
    status = subprocess.call(words, stderr=subprocess.STDOUT)
    if status == -signal.SIGKILL:
        print("Killed")
    return status


def worker(db: sqlite3.Connection, ledger: str) -> int:
    """Runs what clients have left, until SIGINT or SIGTERM. Returns 2 if the SDK stops before."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    resonate, _ = start(db, remote=True)
    server, wait_until_stopped = server_of(resonate)
    print(f"worker on {os.path.abspath(ledger)} at {server}", flush=True)
    wait_until_stopped()
    return failed("the SDK has stopped: start the worker again")


def failed(error: object) -> int:
    """Says in one line on stderr what is wrong. Returns the exit status."""
    print(printable(f"error: {error}"), file=sys.stderr, flush=True)
    return 2


def run(args: argparse.Namespace) -> int:
    """Runs a command. Returns its exit status: 0 done, 1 not done or not right, 2 an error."""
    if args.command is None:
        return tour()
    if args.verbose or args.command == "worker":
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        logging.raiseExceptions = False  # no traceback if the output is closed, as by `| head`
        LOG.setLevel(logging.INFO)
    if args.crash_after:
        crash_after(args.crash_after)
    is_new = not os.path.exists(args.ledger) or os.path.getsize(args.ledger) == 0
    if is_new and args.command != "open":
        return failed(f"no ledger at {args.ledger}: `open` an account to make one")
    if not is_new and not os.access(args.ledger, os.W_OK):
        return failed(f"{args.ledger} is read-only")
    report_sdk_failure_in_one_line()
    with contextlib.closing(open_ledger(os.path.abspath(args.ledger))) as db:
        match args.command:
            case "open":
                return run_open(db, args)
            case "transfer":
                return run_transfer(db, args)
            case "recover":
                return run_recover(db)
            case "journal":
                return 0 if journal(db, args.id) else 1
            case _:
                return worker(db, args.ledger)


def run_open(db: sqlite3.Connection, args: argparse.Namespace) -> int:
    open_account(db, args.account, args.amount)
    print_result({"account": args.account, "opening": args.amount})
    return 0


def run_transfer(db: sqlite3.Connection, args: argparse.Namespace) -> int:
    for account in (args.source, args.target):
        check_account(account)
        balance(db, account)  # raises LookupError if there is no such account
    _, transfer = start(db, remote=args.server, client=True)
    simulate = {
        "simulate_credit_failure": args.fail_credit,
        "simulate_lost_answer": args.lose_answer,
    }
    try:
        result = submit(db, transfer, args.id, args.source, args.target, args.amount, **simulate)
    except (ValueError, OperationConflict):
        raise
    except Exception as error:
        says = f"the ledger says {outcome(db, args.id)!r} of {args.id!r}"
        return failed(f"{error}: {says}. {ASK_AGAIN}")
    print_result(result)
    return 0 if result["status"] == "committed" else 1


def run_recover(db: sqlite3.Connection) -> int:
    _, transfer = start(db)
    recover(db, transfer, print_result)
    return 1 if in_flight(db) else 0


def print_result(result: Result) -> None:
    print(json.dumps(result), flush=True)


def main() -> int:
    args = parse()
    try:
        status = run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return 2  # nobody reads the output any more, as after `| head`
    except sqlite3.Error as error:
        return failed(f"{args.ledger}: {error}. {ASK_AGAIN}")
    except Exception as error:
        return failed(error)


# ---- Mending SDK 0.6.7 --------------------------------------------------------------------------

# Each function repairs a fault of the SDK. "Without it" says what happens without that function.
# The store keeps promises and tasks; the scheduler runs workflows; the processor runs steps; the
# bridge connects them, on a thread of its own. Only this part uses private names of the SDK: that
# is one reason why pyproject.toml holds it below 0.7.


def mend(resonate: Resonate, workflow: sdk.Function[..., Saga]) -> Callable[..., Any]:
    """Repairs this engine. Returns the function to call in place of `workflow.run`."""
    engine: Any = resonate
    use_one_logger()
    carry_whatever_steps_raise(engine._bridge._processor)
    if isinstance(engine._store, LocalStore):
        guard_store_in_memory(engine._store)
        return forget_what_is_finished(engine._store, engine._bridge, workflow)
    require_server(engine._store, engine._message_source)
    outlast_server_errors(engine._store)
    return watch_while_waiting(engine._bridge, workflow)


def use_one_logger() -> None:
    """Makes all steps log to LOG.

    Without it, the SDK makes a logger for each step, keeps it for ever, and slows down.
    """
    vars(sdk)["ContextLogger"] = lambda *_: LOG
    LOG.addFilter(is_worth_logging)


def is_worth_logging(record: logging.LogRecord) -> bool:
    """False if the SDK says that a step has failed for good: the saga handles that and logs it."""
    return record.msg != "RuntimeError. Function %s(%s) failed with %s"


def carry_whatever_steps_raise(processor: Any) -> None:
    """Replaces each exception of a step by one that the SDK can pass on to the saga.

    Without it, a SystemExit or a CancelledError in a step makes its transfer hang for ever, and an
    exception that cannot be pickled, or whose text cannot be made, ends the whole process.
    """
    enqueue = processor.enqueue

    def enqueue_carried(step: Callable[[], object], callback: Callable[[Any], None]) -> None:
        enqueue(functools.partial(carried, step), callback)

    processor.enqueue = enqueue_carried


def carried(step: Callable[[], object]) -> object:
    """Runs a step. Returns its value if that is text, and else None: the saga reads nothing else.

    An exception of ANSWERS keeps its type and text. Any other becomes a plain Exception whose text
    begins with the name of its type.
    """
    try:
        value = step()
    except BaseException as error:
        if type(error) in ANSWERS:
            raise type(error)(text_of(error)) from None
        fault = f"{type(error).__name__}: {text_of(error)}"
        raise Exception(fault.removesuffix(": ")) from None
    return value if type(value) is str else None


def text_of(error: BaseException) -> str:
    """What an exception says; nothing if it cannot say it."""
    try:
        return str(error)
    except BaseException:
        return ""


class Locked:
    """An object whose methods run under a lock."""

    def __init__(self, inner: object, lock: threading.Condition) -> None:
        self.inner = inner
        self._lock = lock

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.inner, name)

        def locked(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                return method(*args, **kwargs)

        return locked


def guard_store_in_memory(store: Any) -> None:
    """Lets one thread at a time use the store in memory.

    Without it, threads change dicts that others iterate, and the process ends when hundreds of
    transfers run at once.
    """
    store._promises = Locked(store._promises, store._cond)
    store._tasks = Locked(store._tasks, store._cond)


def ask(workflow: Any, transfer_id: str, arguments: dict[str, Any]) -> Any:
    """Starts a transfer, or joins one that runs. Returns the SDK's handle of its result."""
    handle = workflow.begin_run(transfer_id, **arguments)
    handle.done()  # in spite of its name, asks to be told of the result
    return handle


@dataclass
class Forget:
    """Says to the scheduler that nobody waits for transfer `cid` any more."""

    cid: str


def forget_what_is_finished(store: Any, bridge: Any, workflow: Any) -> Callable[..., Any]:
    """Removes a transfer from the store in memory when its caller has the result.

    Without it, memory grows with each transfer, and each is slower than the one before. The ledger
    remembers, so the store need not. A transfer must be removed on the bridge's thread, which runs
    the scheduler, and when the scheduler is done with it: so a caller that has its result sends a
    command there. Until that has arrived, the same transfer does not start again.
    """
    promises, tasks = store._promises.inner._promises, store._tasks.inner._tasks
    computations = bridge._scheduler.computations
    step = bridge._scheduler.step
    busy = set[str]()  # transfers that run, or are still to be forgotten
    changed = threading.Condition()

    def run_and_forget(transfer_id: str, /, **arguments: Any) -> Any:
        with changed:
            changed.wait_for(
                lambda: transfer_id not in busy or not bridge._bridge_thread.is_alive()
            )
            busy.add(transfer_id)
        try:
            handle = ask(workflow, transfer_id, arguments)
            while not wait([handle.future], timeout=2).done:
                if not bridge._bridge_thread.is_alive():
                    raise ConnectionError("Resonate was stopped")
            return handle.result()
        finally:
            bridge._cq.put(Forget(transfer_id))

    def step_or_forget(command: Any, future: Any = None) -> Any:
        if not isinstance(command, Forget):
            return step(command, future)
        forget(command.cid)
        with changed:
            busy.discard(command.cid)
            changed.notify_all()
        return More([])

    def forget(transfer_id: str) -> None:
        computation = computations.get(transfer_id)
        if computation is None or computation.result() is None:
            return  # its caller was interrupted, and it still runs
        with store._cond:
            for node in computation.graph.traverse():
                promises.pop(node.id, None)
                tasks.pop(f"__invoke:{node.id}", None)
        bridge._promise_id_to_task.pop(transfer_id, None)
        del computations[transfer_id]

    bridge._scheduler.step = step_or_forget
    return run_and_forget


def require_server(store: Any, source: Any) -> None:
    """Raises an error at once if RESONATE_HOST is not valid or no server answers there.

    Without it, the SDK tries to connect for ever.
    """
    for host in (store._host, source._host):
        if not re.fullmatch(r"https?://([^/:\[\]]+|\[[0-9A-Fa-f:.]+\])", host):
            raise ValueError(
                f"RESONATE_HOST is written http://HOST, not {host!r}. The ports are"
                " RESONATE_PORT_STORE and RESONATE_PORT_MESSAGE_SOURCE"
            )
    try:
        tries_once = RemoteStore(retry_policy=Constant(max_retries=-1))  # -1: no second try
        tries_once.tasks.heartbeat(pid="nobody")  # any call will do
        host = source._host.split("//")[1].strip("[]")
        socket.create_connection((host, source._port), timeout=5).close()
    except Exception as error:
        raise ConnectionError(
            f"no Resonate server at {store.url} and {source._host}:{source._port}"
            f" ({error!r:.60}): start `resonate serve`, version 0.8.2"
        ) from error


def outlast_server_errors(store: Any) -> None:
    """Calls a server again while it answers 503, and ignores errors of `complete` and `heartbeat`.

    Without it, a server that restarts, and answers 503 meanwhile, ends its clients and workers. And
    a process ends with an error, although its transfer is done, if only the last call fails.
    """
    call, complete, heartbeat = store.call, store._tasks.complete, store._tasks.heartbeat

    def call_until_available(request: Any) -> Any:
        while True:
            try:
                return call(request)
            except ResonateStoreError as error:
                answer = getattr(error.__cause__, "response", None)
                if answer is None or answer.status_code != 503:
                    raise
            time.sleep(1)

    def complete_if_possible(id: str, counter: int) -> bool:
        with contextlib.suppress(Exception):
            complete(id, counter)
        return True

    def heartbeat_if_possible(pid: str) -> int:
        with contextlib.suppress(Exception):
            return int(heartbeat(pid))
        return 1  # tasks may be left: go on

    store.call = call_until_available
    store._tasks.complete = complete_if_possible
    store._tasks.heartbeat = heartbeat_if_possible


WAITING = (
    "Waiting for %s. If the process that ran it has died, a worker finishes it within 15 seconds:"
    " python main.py worker"
)
PROMISE_EXISTS = 100.409  # the SDK's code for a promise that belongs to another request


def watch_while_waiting(bridge: Any, workflow: Any) -> Callable[..., Any]:
    """Lets a client that waits say so, notice that the SDK has stopped, and ask again.

    Without it, a client waits in silence. It waits for ever if the SDK has stopped, or if the
    server has lost the transfer.
    """

    def run_and_watch(transfer_id: str, /, **arguments: Any) -> Any:
        said = False
        while bridge._bridge_thread.is_alive():
            # Ask again and again: if the server has lost the transfer, this creates it again.
            handle = ask(workflow, transfer_id, arguments)
            if wait([handle.future], timeout=2).done:
                return handle.result()
            if not said:
                LOG.warning(WAITING, transfer_id)
                said = True
        raise ConnectionError("the SDK has stopped")

    def run_or_conflict(transfer_id: str, /, **arguments: Any) -> Any:
        try:
            return run_and_watch(transfer_id, **arguments)
        except (ConnectionError, ResonateShutdownError):
            raise
        except Exception as error:
            if isinstance(error, ResonateStoreError) and error.code != PROMISE_EXISTS:
                raise
            # The promise belongs to another request, was rejected, or cannot be read.
            raise OperationConflict(str(error)) from error

    return run_or_conflict


def server_of(resonate: Any) -> tuple[str, Callable[[], None]]:
    """The address of the server, and a function that waits until the SDK has stopped.

    Without that wait, a worker lives on after the SDK has stopped, and does nothing.
    """
    return resonate._store.url, resonate._bridge._bridge_thread.join


class LastWords(logging.Handler):
    """Ends the process with a line and status 2 when the SDK gives up.

    Without it, the SDK prints a page of traceback, and the process ends with status 1.
    """

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        _version, _thread, error, *_traceback = record.args
        os._exit(failed(f"the SDK has stopped: {error}. {ASK_AGAIN}"))


def report_sdk_failure_in_one_line() -> None:
    """Makes a command print one line, and no traceback, when the SDK gives up."""
    logging.getLogger("resonate.utils").addHandler(LastWords())


if __name__ == "__main__":
    os._exit(main())  # sys.exit would write again what a closed pipe or a full disk did not take
