"""A money transfer that neither loses nor creates money, whatever crashes: this file is all of it.

Money moves between two accounts that no single transaction can change together, as at two banks.
(Here one SQLite file plays both, but no step changes both accounts.) The usual answer is a saga:
take the money from the source (debit), pay the target (credit); if that fails, reverse the debit.

That saga can create money, because an error does not prove that nothing happened. A credit can fail
for its caller and yet have happened (its answer was lost), or happen later (it was slow). If the
debit is then reversed, source and target both have the money.

operation  one change of one account: a debit, a credit, a reversal, or the opening of an account
op id      the name of an operation: its transfer id and its kind, for example `t1-debit`
entry      a row of the ledger: the operation has happened, and has changed the balance
void       a row of the ledger: the operation has not happened and never will; the row says why
settle     to write an operation as an entry or as a void; if it has a row already, that row stays
in flight  a transfer that is debited, and neither credited nor reversed yet

    The rule: before you give up on an operation, settle it as a void.

The op id is the primary key of the ledger, so whichever row comes first stays. If a credit is a
void, it can never happen (if it comes late, it finds the void, and does nothing), and the debit can
be reversed. If it is an entry, it has happened, whatever its caller was told. The ledger refuses
what breaks the rule: it pays out only what a debit took, and it reverses a debit only if the credit
is a void. So balances + amounts in flight = all the money that the accounts opened with.

    debit -- entry --> credit -- entry -----------------> committed
      |                  `------ void --> reversal -----> compensated
      `----- void --------------------------------------> rejected

Resonate (SDK 0.6.7, Python 3.12 or newer) runs the saga. It may run a step twice, or late. After a
crash, `recover` or a Resonate server runs it again from the top, perhaps beside an older run. That
is safe: a step that runs again finds its row in the ledger, and moves nothing. `python main.py` is
a tour of all this, and `python main.py --help` lists the commands.
"""

import argparse
import contextlib
import io
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
import traceback
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

if __name__ == "__main__":  # the next imports take a moment: Ctrl-C ends them without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import resonate.resonate as sdk
from resonate import Context, Resonate
from resonate.message_sources import Poller
from resonate.retry_policies import Constant, Never
from resonate.stores import RemoteStore

# ---- The saga, and its steps: each step settles one operation ----------------------------------


class Operation(NamedTuple):
    """A row of the ledger, without the column that says whether it is an entry or a void."""

    op_id: str
    transfer_id: str
    kind: str  # "debit", "credit", "reversal" or "opening"
    account: str
    amount: int  # cents; below zero for a debit
    counterparty: str = ""  # the other account of the transfer


def transfer_money(
    ctx: Context,
    transfer_id: str,
    source: str,
    target: str,
    amount: int,
    *,
    simulate_credit_failure: bool = False,
    simulate_lost_answer: bool = False,
) -> Generator[Any, Any, str]:
    """Moves `amount` cents. Returns how it ended: "committed", "compensated" or "rejected".
    `yield ctx.run(f, x)` runs the step f(ctx, x), and gives its result or raises its error here."""
    debit = Operation(f"{transfer_id}-debit", transfer_id, "debit", source, -amount, target)
    credit = Operation(f"{transfer_id}-credit", transfer_id, "credit", target, amount, source)
    reversal = Operation(f"{transfer_id}-reversal", transfer_id, "reversal", source, amount, target)

    # Step 1: debit the source. After an error, Resonate runs it again, unless the error is FINAL.
    reason = yield ctx.run(apply_entry, debit).options(non_retryable_exceptions=FINAL)
    if reason is not None:
        return "rejected"

    # Step 2: credit the target, and do not retry: after one error, `give_up` decides.
    try:
        yield ctx.run(
            credit_target, credit, fail=simulate_credit_failure, lose_answer=simulate_lost_answer
        ).options(retry_policy=Never())
    except Exception as error:
        # It may have happened all the same, or happen later. Only a void proves that it never will.
        reason = yield ctx.run(give_up, credit, str(error)).options(non_retryable_exceptions=FINAL)
        if reason is not None:
            # Step 3: reverse the debit. There is no reason to check: a reversal is never a void.
            yield ctx.run(apply_entry, reversal).options(non_retryable_exceptions=FINAL)
            return "compensated"
    return "committed"


class OperationConflict(Exception):
    """An op id, or the id of a transfer, is already used for something else."""


# Errors that no retry cures. (Resonate compares exact types: an OperationalError is retried.)
FINAL = (OperationConflict, sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DatabaseError)


def apply_entry(ctx: Context, operation: Operation) -> str | None:
    """Settles an operation as an entry. Returns None, or the reason why it is a void."""
    return settle(ctx.get_dependency("db"), operation)  # the ledger that `start` was given


def credit_target(ctx: Context, credit: Operation, *, fail: bool, lose_answer: bool) -> None:
    """Credits the target. With `fail` it is not paid, with `lose_answer` it is, and the saga sees
    the same RuntimeError, as for all that goes wrong: Resonate cannot carry every exception."""
    try:
        problem = None if fail else apply_entry(ctx, credit)
        if fail or lose_answer:
            raise TimeoutError("no answer from the target (simulated)")
    except BaseException as error:  # a SystemExit would end a thread of Resonate in silence
        problem = "".join(traceback.format_exception_only(error))
    if problem is not None:
        raise RuntimeError(printable(problem.strip()[:300]))


def give_up(ctx: Context, operation: Operation, why: str) -> str | None:
    """Settles an operation as a void, unless it is an entry already. Returns the reason, or None.
    If the target is at another bank, that bank must settle the op id: in `credit_target` as an
    entry, here as a void. Then settle it as that bank has answered, on an account of our ledger
    that stands for the target. A bank that cannot promise a void cannot take part."""
    return settle(ctx.get_dependency("db"), operation, void=why)


def printable(text: str) -> str:
    """The text, with what could drive a terminal escaped."""
    escaped = [char if char.isprintable() else ascii(char)[1:-1] for char in text]
    return "".join(escaped)


# ---- The ledger: what has happened --------------------------------------------------------------

LOG = logging.getLogger("money-transfer")
# Steps run on several threads, which share one connection. Hold LOCK for each use of it: if not,
# they lose inserts and read each other's rows (CPython issue 118172).
LOCK = threading.Lock()


def settle(db: sqlite3.Connection, operation: Operation, void: str | None = None) -> str | None:
    """Settles an operation, unless it is settled: as an entry or, if `void` is a reason, as a void.
    An entry that the ledger refuses is settled as a void. Returns None for an entry, and the reason
    of a void: the same for ever. Raises OperationConflict if the op id is another operation's, and
    sqlite3.IntegrityError if not even a void fits. OperationalError: state unknown; call again."""
    insert = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (op_id) DO NOTHING"
    select = "SELECT * FROM operations WHERE op_id = ?"
    with LOCK:
        try:  # with autocommit, a statement is a transaction: row, balance and checks, or nothing
            db.execute(insert, (*operation, void))
        except sqlite3.IntegrityError as refusal:
            # If another process settles it between these two inserts, the other's row stays.
            db.execute(insert, (*operation, str(refusal)))
        row = db.execute(select, (operation.op_id,)).fetchone()
    reason: str | None
    *columns, reason = row
    settled = Operation(*columns)
    if settled != operation:
        raise OperationConflict(f"{operation.op_id!r} is already used: {settled}")
    outcome = "an entry" if reason is None else printable(f"a void: {reason}")
    LOG.info("%s is %s", operation.op_id, outcome)  # --crash-after looks for this text
    return reason


SCHEMA = """
BEGIN IMMEDIATE;  -- all or nothing, also if several processes create the ledger at once
CREATE TABLE IF NOT EXISTS operations (
  op_id        TEXT PRIMARY KEY,   -- so an operation settles only once
  transfer_id  TEXT NOT NULL,      -- of an opening: the account
  kind         TEXT NOT NULL,
  account      TEXT NOT NULL,
  amount       INTEGER NOT NULL,   -- cents; below zero for a debit
  counterparty TEXT NOT NULL,      -- the other account; of an opening: empty
  void         TEXT,               -- of an entry: NULL; of a void: the reason
  CHECK (op_id = transfer_id || '-' || kind),
  CHECK (CASE kind WHEN 'opening' THEN transfer_id = account AND void IS NULL
                   WHEN 'debit' THEN amount < 0
                   ELSE kind IN ('credit', 'reversal') END)
) STRICT, WITHOUT ROWID;
-- The balance of an account, in cents, is the sum of its entries. A RAISE undoes the whole INSERT.
CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY, balance INTEGER NOT NULL)
  STRICT, WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS entry_moves_balance AFTER INSERT ON operations WHEN NEW.void IS NULL
BEGIN
  INSERT INTO accounts SELECT NEW.account, 0 WHERE NEW.kind = 'opening';
  UPDATE accounts SET balance = balance + NEW.amount WHERE account = NEW.account;
  SELECT RAISE(ABORT, 'insufficient funds')
    FROM accounts WHERE account = NEW.account AND balance < 0;
  -- A debit needs two accounts, both open, so that its credit and reversal can always happen.
  SELECT RAISE(ABORT, 'unknown account') WHERE NEW.kind = 'debit' AND 2 > (
    SELECT count(*) FROM accounts WHERE account IN (NEW.account, NEW.counterparty));
END;
CREATE TRIGGER IF NOT EXISTS rule AFTER INSERT ON operations WHEN NEW.kind IN ('credit', 'reversal')
BEGIN
  -- "It pays out only what a debit took": the same amount and accounts (for a credit, swapped).
  SELECT RAISE(ABORT, 'no such debit') WHERE NOT EXISTS (SELECT 1 FROM operations
    WHERE op_id = NEW.transfer_id || '-debit' AND void IS NULL AND amount = -NEW.amount
      AND CASE NEW.kind WHEN 'credit' THEN (account, counterparty) = (NEW.counterparty, NEW.account)
                        ELSE (account, counterparty) = (NEW.account, NEW.counterparty) END);
  -- "It reverses a debit only if the credit is a void."
  SELECT RAISE(ABORT, 'the credit is not a void') WHERE NEW.kind = 'reversal' AND NOT EXISTS (
    SELECT 1 FROM operations WHERE op_id = NEW.transfer_id || '-credit' AND void IS NOT NULL);
  SELECT RAISE(ABORT, 'a reversal is never a void')
    WHERE NEW.kind = 'reversal' AND NEW.void IS NOT NULL;
END;
-- What has settled is final. (INSERT OR REPLACE would delete a row without a DELETE trigger.)
CREATE TRIGGER IF NOT EXISTS no_replace BEFORE INSERT ON operations
  WHEN EXISTS (SELECT 1 FROM operations WHERE op_id = NEW.op_id)
BEGIN SELECT RAISE(IGNORE); END;
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON operations
BEGIN SELECT RAISE(ABORT, 'operations are final'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON operations
BEGIN SELECT RAISE(ABORT, 'operations are final'); END;

CREATE VIEW IF NOT EXISTS transfers AS  -- the state of each; look it up by debit_id
  SELECT debit.op_id AS debit_id, debit.transfer_id, debit.account AS source,
    debit.counterparty AS target, -debit.amount AS amount,
    CASE WHEN debit.void IS NOT NULL THEN 'rejected'
         WHEN reversal.op_id IS NOT NULL THEN 'compensated'
         WHEN credit.op_id IS NOT NULL AND credit.void IS NULL THEN 'committed'
         ELSE 'in flight' END AS status,
    coalesce(debit.void, credit.void) AS error
  FROM operations AS debit
  LEFT JOIN operations AS credit ON credit.op_id = debit.transfer_id || '-credit'
  LEFT JOIN operations AS reversal ON reversal.op_id = debit.transfer_id || '-reversal'
  WHERE debit.kind = 'debit';
CREATE TABLE IF NOT EXISTS ledger AS SELECT hex(randomblob(8)) AS id;  -- ledgers may share a server
COMMIT;
"""


def open_ledger(path: str = ":memory:") -> sqlite3.Connection:
    """The ledger at `path`, made if there is none. Raises sqlite3.Error if it cannot be used."""
    if os.path.isfile(path) and os.path.getsize(path) == 1:  # SQLite would overwrite it
        raise sqlite3.DatabaseError("this file is not a ledger")
    db = sqlite3.connect(path, check_same_thread=False, autocommit=True)
    try:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
        if not names:
            db.executescript(SCHEMA)
        elif not {"ledger", "operations"} <= names:
            raise sqlite3.DatabaseError("this file is not a ledger")
        db.execute("PRAGMA synchronous = FULL")  # a commit survives a loss of power
        with contextlib.suppress(sqlite3.OperationalError):  # busy: the next start does it
            db.execute("PRAGMA journal_mode = WAL")  # readers and writers do not block each other
    except sqlite3.Error:
        db.close()
        raise
    return db


def open_account(db: sqlite3.Connection, account: str, opening: int = 0) -> None:
    """Opens an account that holds `opening` cents, once. Raises ValueError or OperationConflict."""
    check(opening, account, least=0)
    op_id = f"{account}-opening"
    settle(db, Operation(op_id, account, "opening", account, opening))


def check(cents: int, *accounts: str, least: int = 1) -> None:
    """Raises ValueError unless these are a number of cents, and names of accounts."""
    for name in accounts:
        if type(name) is not str or not name or not name.isprintable():
            raise ValueError(f"the name of an account is printable text, not {name!r}")
    if type(cents) is not int or not least <= cents <= 10**15:  # far below SQLite's 64 bits
        raise ValueError(f"an amount is {least} to 10**15 whole cents, not {cents!r}")


def read(db: sqlite3.Connection, query: str, *parameters: str) -> list[Any]:
    """The rows that a query finds."""
    with LOCK:
        return db.execute(query, parameters).fetchall()


def balance(db: sqlite3.Connection, account: str) -> int:
    """The cents in an account. Raises LookupError if there is no such account."""
    rows = read(db, "SELECT balance FROM accounts WHERE account = ?", account)
    if not rows:
        raise LookupError(f"unknown account {account!r}")
    return int(rows[0][0])


def lookup(db: sqlite3.Connection, transfer_id: str, *terms: str | int) -> dict[str, Any]:
    """What the ledger says of a transfer; the status is "unknown" if no debit has settled. Raises
    OperationConflict if its source, target and amount are not these `terms`."""
    query = "SELECT source, target, amount, status, error FROM transfers WHERE debit_id = ?"
    rows = read(db, query, f"{transfer_id}-debit")
    if not rows:
        return {"transfer_id": transfer_id, "status": "unknown"}
    source, target, amount, status, error = rows[0]
    if terms and terms != (source, target, amount):
        used = f"{money(amount)} from {source} to {target}"
        raise OperationConflict(f"transfer id {transfer_id!r} is already used: {used}")
    result = dict(transfer_id=transfer_id, source=source, target=target, amount=amount)
    return result | {"status": status, "error": error}


def money(cents: int) -> str:
    """Cents as people write them: 3000 is 30.00."""
    whole, rest = divmod(abs(cents), 100)
    sign = "-" if cents < 0 else ""
    return f"{sign}{whole}.{rest:02}"


# ---- Running it ---------------------------------------------------------------------------------


class Bank(NamedTuple):
    """A ledger, its id, and Resonate, which runs `transfer_money` on it."""

    db: sqlite3.Connection
    ledger_id: str
    resonate: Resonate


def start(db: sqlite3.Connection, *, remote: bool = False, client: bool = False) -> Bank:
    """Starts Resonate on this ledger. It keeps results in memory or, if `remote`, on a server. Then
    a client runs what it submits, a worker what dead clients left. Raises ConnectionError."""
    [(ledger_id,)] = read(db, "SELECT id FROM ledger")
    if remote:
        check_server()
        # A client is alone in its group, so it gets no work. What it leaves is sent to workers.
        workers = f"money-transfer-{ledger_id}"
        group = workers
        if client:
            group = f"client-{secrets.token_hex(8)}"
        resonate = Resonate.remote(group=group)
        resonate = resonate.options(target=workers)
    else:
        resonate = Resonate.local()
    mend(resonate)
    resonate.set_dependency("db", db)
    resonate.register(transfer_money)
    resonate.start()
    return Bank(db, ledger_id, resonate)


def submit(
    bank: Bank,
    transfer_id: str,
    source: str,
    target: str,
    amount: int,
    *,
    simulate_credit_failure: bool = False,
    simulate_lost_answer: bool = False,
) -> dict[str, Any]:
    """Runs a transfer of `amount` cents under its id. Returns what the ledger says of it. Raises
    ValueError, OperationConflict (the id is another's), or RuntimeError (Resonate has stopped)."""
    if type(transfer_id) is not str or not re.fullmatch("[A-Za-z0-9_-]{1,64}", transfer_id):
        raise ValueError(f"a transfer id is 1 to 64 of A-Z a-z 0-9 _ -, not {transfer_id!r:.80}")
    check(amount, source, target)
    if source == target:
        raise ValueError(f"source and target are the same account: {source!r:.80}")
    request = (transfer_id, source, target, amount)
    faults: dict[str, Any] = dict(
        simulate_credit_failure=simulate_credit_failure, simulate_lost_answer=simulate_lost_answer
    )
    # Calls with the same id share a promise, and so a run. Its result may be an old error, or of a
    # copy of this ledger: so ask the ledger, and if the transfer is unfinished, run it anew.
    unfinished = ("unknown", "in flight")
    if lookup(bank.db, *request)["status"] in unfinished:
        promise_id = f"{bank.ledger_id}-{transfer_id}"
        with contextlib.suppress(Exception):
            run(bank, promise_id, *request, **faults)
    if lookup(bank.db, *request)["status"] in unfinished:
        promise_id = secrets.token_hex(16)
        run(bank, promise_id, *request, **faults)
    return lookup(bank.db, *request)


def run(bank: Bank, promise: str, transfer_id: str, *terms: Any, **faults: bool) -> None:
    """Runs a transfer under this promise id, here or in another process, until it ends."""
    said = False
    while True:
        # Ask again and again: a server may have lost the promise. If not, this joins its run.
        handle = bank.resonate.begin_run(promise, "transfer_money", transfer_id, *terms, **faults)
        try:
            handle.result(timeout=2)
            return
        except TimeoutError:
            if not said:
                LOG.warning("waiting for %s: it has not ended yet", transfer_id)
            said = True


def recover(bank: Bank) -> Iterator[dict[str, Any]]:
    """Finishes each transfer in flight from the ledger alone. Yields each result, or its error."""
    query = "SELECT transfer_id, source, target, amount FROM transfers WHERE status = 'in flight'"
    for transfer_id, source, target, amount in read(bank.db, query):
        try:
            result = submit(bank, transfer_id, source, target, amount)
        except Exception as error:
            result = lookup(bank.db, transfer_id)
            result["error"] = str(error)
        yield result


# ---- What the SDK gets wrong: nothing here is part of the pattern --------------------------------

LOG.addFilter(lambda record: record.levelno < logging.ERROR)  # the saga handles errors


def mend(resonate: Resonate) -> None:
    """Mends SDK 0.6.7. Without it, transfers get slower, and threads can end the process."""
    vars(sdk)["ContextLogger"] = lambda *_: LOG  # it makes a logger for each step, and keeps it
    # Threads add promises while its store in memory looks for some to time out: let it see none.
    store: Any = resonate._store
    store.promises.scan = store.tasks.scan = lambda: ()


def check_server() -> None:
    """Raises ConnectionError if no Resonate server answers: the SDK would try for ever."""
    store = RemoteStore(retry_policy=Constant(max_retries=-1))  # -1: tries once
    try:
        store.tasks.heartbeat(pid="nobody")  # any call will do
        poller = Poller(group="any", id="any")
        messages = urlsplit(poller.url)
        address = (messages.hostname, messages.port)
        socket.create_connection(address, timeout=5).close()
    except Exception as error:
        raise ConnectionError(
            f"no Resonate server at {store.url}: {error!s:.99}: start `resonate serve` 0.8.2,"
            " and write RESONATE_HOST as http://HOST"
        ) from error


# ---- The command line ---------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """The arguments of the command line. Ends the process with status 2 if they are not valid."""
    cli = argparse.ArgumentParser(description="Without a command: a tour.")
    commands = cli.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser("open", help="open an account; the first one makes the ledger")
    command.add_argument("ACCOUNT")
    command.add_argument("AMOUNT", type=to_cents)
    command = commands.add_parser("transfer", help="move money; the same ID is the same transfer")
    for name in ("ID", "SOURCE", "TARGET"):
        command.add_argument(name)
    command.add_argument("AMOUNT", type=to_cents)
    command.add_argument("--fail-credit", action="store_true", help="the credit comes too late")
    command.add_argument("--lose-answer", action="store_true", help="it happens, and seems to fail")
    command.add_argument("--server", action="store_true", help="use a Resonate server")
    commands.add_parser("recover", help="finish what is in flight")
    command = commands.add_parser("journal", help="show the ledger, and whether it adds up")
    command.add_argument("ID", nargs="?", default="")
    commands.add_parser("worker", help="finish what clients of a Resonate server have left")
    for command in commands.choices.values():
        command.add_argument("--ledger", default="ledger.db", type=os.path.abspath)
        command.add_argument("--crash-after", choices=("opening", "debit", "credit", "reversal"))
    return cli.parse_args()


def to_cents(text: str) -> int:
    """An amount as people write it, in cents: 30 or 30.00 is 3000."""
    if not re.fullmatch(r"[0-9]{1,13}(\.[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError(f"not an amount: {text!r}. Write 30 or 30.00")
    whole, _, fraction = text.partition(".")
    return int(whole + fraction.ljust(2, "0"))


def journal(db: sqlite3.Connection, only: str = "") -> bool:
    """Prints the ledger, or its rows of one transfer. Returns whether every cent is somewhere."""
    operations = """
        SELECT op_id, operations.account, operations.amount, coalesce('void: ' || void, status, '')
        FROM operations LEFT JOIN transfers ON debit_id = op_id
        WHERE ? IN (operations.transfer_id, '')
        ORDER BY operations.transfer_id, kind <> 'debit', kind
    """
    balances = "SELECT 'balance', account, balance, '' FROM accounts WHERE ? = ''"
    rows = read(db, operations, only)
    rows += read(db, balances, only)
    if not rows:
        raise LookupError(f"no transfer {only!r} in this ledger")
    columns = "  {:14} {:10} {:>10}  {}"
    for name, account, amount, note in rows:
        line = columns.format(name, account, money(amount), note)
        print(printable(line.rstrip()))
    # One statement sees one moment, whatever others write meanwhile.
    totals = """
        SELECT (SELECT coalesce(sum(balance), 0) FROM accounts),
               (SELECT coalesce(sum(amount), 0) FROM transfers WHERE status = 'in flight'),
               (SELECT coalesce(sum(amount), 0) FROM operations WHERE kind = 'opening'),
               EXISTS (SELECT account, balance FROM accounts EXCEPT SELECT account, sum(amount)
                       FROM operations WHERE void IS NULL GROUP BY account)
    """
    [(held, moving, opened, wrong_balance)] = read(db, totals)
    adds_up = held + moving == opened and not wrong_balance
    verdict = "every cent is somewhere" if adds_up else "IT DOES NOT ADD UP"
    print(f"  {money(held)} in accounts + {money(moving)} in flight,", end=" ")
    print(f"{money(opened)} opened: {verdict}")
    return adds_up


# Title, what to show of the ledger, command, and its exit status.
TOUR = (
    ("An account", "alice", "open alice 100", 0),
    ("Another account", "bob", "open bob 50", 0),
    ("alice pays bob", "t1", "transfer t1 alice bob 30", 0),
    ("The credit comes late", "t2", "transfer t2 alice bob 20 --fail-credit", 1),
    ("The answer is lost", "t3", "transfer t3 alice bob 7.5 --lose-answer", 0),
    ("alice has no 500.00", "t4", "transfer t4 alice bob 500", 1),
    ("t1 again: nothing moves", "t1", "transfer t1 alice bob 30", 0),
    ("Crash after a debit", "t5", "transfer t5 alice bob 10 --crash-after debit", 137),
    ("Finished from the ledger alone", "t5", "recover", 0),
)


def tour() -> bool:
    """Runs the commands of TOUR, each in a process of its own, and checks what they leave."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # on the way out, removes the folder
    with tempfile.TemporaryDirectory() as folder:
        ledger = f"{folder}/ledger.db"
        for title, name, command, expected in TOUR:
            print(f"\n# {title}")
            print(f"$ python main.py {command}")
            words = [sys.executable, __file__, *command.split(), "--ledger", ledger]
            status = subprocess.call(words, stderr=subprocess.STDOUT)
            with contextlib.closing(open_ledger(ledger)) as db:
                adds_up = journal(db, name)
            if status != expected or not adds_up:
                raise AssertionError(f"{title}: exit status {status}")
    return True


def execute(args: argparse.Namespace) -> bool:
    """Runs a command. Returns whether it is done, and all is right."""
    usable = os.access(args.ledger, os.W_OK)
    usable = usable and os.path.getsize(args.ledger) > 0
    if not usable and (args.command != "open" or args.ledger.endswith(":memory:")):
        raise LookupError(f"no ledger to write to at {args.ledger}: `open` an account in a file")
    if args.crash_after:  # as kill -9 would
        last = f"-{args.crash_after} is"
        LOG.addFilter(lambda record: last not in record.getMessage() or os._exit(137))
    with contextlib.closing(open_ledger(args.ledger)) as db:
        match args.command:
            case "open":
                open_account(db, args.ACCOUNT, args.AMOUNT)
                result = {"account": args.ACCOUNT, "opening": args.AMOUNT}
                print(json.dumps(result))
                return True
            case "transfer":
                balance(db, args.SOURCE)  # a LookupError, so that a typing error uses up no ID
                balance(db, args.TARGET)
                request = (args.ID, args.SOURCE, args.TARGET, args.AMOUNT)
                result = submit(
                    start(db, remote=args.server, client=True),
                    *request,
                    simulate_credit_failure=args.fail_credit,
                    simulate_lost_answer=args.lose_answer,
                )
                # The credit that seemed lost arrives now. It finds the void, and does nothing.
                if args.fail_credit and result["status"] == "compensated":
                    LOG.info("now the credit comes after all")
                    late = (args.ID, "credit", args.TARGET, args.AMOUNT, args.SOURCE)
                    settle(db, Operation(f"{args.ID}-credit", *late))
                print(json.dumps(result))
                return bool(result["status"] == "committed")
            case "recover":
                statuses = []
                for result in recover(start(db)):
                    print(json.dumps(result))
                    statuses.append(result["status"])
                return "in flight" not in statuses
            case "journal":
                return journal(db, args.ID)
            case _:  # worker
                bank = start(db, remote=True)
                print(f"worker on {args.ledger}")
                while True:
                    bank.resonate.start()  # does nothing, or raises RuntimeError if it has stopped
                    time.sleep(1)


def main() -> int:
    """Runs a command, or the tour. Returns the exit status: 0 done, 1 not done, 2 an error."""
    args = parse()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        done = execute(args) if args.command else tour()
        return 0 if done else 1
    except Exception as error:
        line = f"error: {error}"
        if type(error) is RuntimeError:
            line = f"error: Resonate has stopped: {error}"
        if type(error) in (RuntimeError, sqlite3.OperationalError):
            line += ". If that has passed, run the same command again"
        with contextlib.suppress(OSError):  # nobody can read it
            print(printable(line), file=sys.stderr)
        return 2


if __name__ == "__main__":
    os._exit(main())  # sys.exit would flush a closed pipe again
