# /// script
# requires-python = ">=3.12"
# dependencies = ["resonate-sdk>=0.6.7,<0.7"]
# ///
"""A money transfer that neither loses nor creates money, whatever crashes: this file is all of it.

Money moves between two accounts that no single transaction can change together, as at two banks.
(Here one SQLite file plays both, but no step changes both accounts.) The usual answer is a saga:
take money from the source (debit), pay the target (credit); if the credit fails, reverse the debit.

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

Resonate (SDK 0.6.7) runs the saga, and remembers the result of each step, in memory or on a server.
If the process dies, the saga must start again from the top. In memory nothing restarts it: run the
same command again, or `recover`. With a server, a worker does it once a lease has ended, perhaps
while the old run still goes on. That is safe: a step whose op id has a row moves nothing.

    main.py                                   a tour of all this
    main.py open ACCOUNT AMOUNT               open an account; the first one makes the ledger
    main.py transfer ID SOURCE TARGET AMOUNT  move money; the same ID is the same transfer
    main.py recover                           finish what is in flight
    main.py journal [ID]                      show the ledger, and whether it adds up
    main.py worker                            finish what clients of a Resonate server have left
"""

import argparse
import contextlib
import json
import logging
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

import resonate.resonate as sdk
from resonate import Context, Resonate
from resonate.models.commands import Function, Retry
from resonate.retry_policies import Constant, Never
from resonate.stores import LocalStore, RemoteStore

# ---- The saga, and its steps: each step settles one operation ----------------------------------


class Operation(NamedTuple):
    """A row of the ledger, without the column that says whether it is an entry or a void."""

    op_id: str
    transfer_id: str
    kind: str  # "debit", "credit", "reversal" or "opening"
    account: str
    amount: int  # cents; below zero for a debit
    counterparty: str = ""  # the other account of the transfer


def operations(transfer_id: str, source: str, target: str, amount: int) -> tuple[Operation, ...]:
    """The debit, the credit and the reversal of a transfer. The same id has the same op ids."""
    debit = Operation(f"{transfer_id}-debit", transfer_id, "debit", source, -amount, target)
    credit = Operation(f"{transfer_id}-credit", transfer_id, "credit", target, amount, source)
    reversal = Operation(f"{transfer_id}-reversal", transfer_id, "reversal", source, amount, target)
    return debit, credit, reversal


def transfer_money(
    ctx: Context,
    transfer_id: str,
    source: str,
    target: str,
    amount: int,
    *,
    simulate_credit_failure: str = "",
) -> Generator[Any, Any, str]:
    """Moves `amount` cents. Returns how it ended: "committed", "compensated" or "rejected".
    `yield ctx.run(f, x)` runs the step f(ctx, x), and gives its result here. If it raises an error,
    Resonate waits and runs it again, until it succeeds; with Never(), the error is raised here."""
    debit, credit, reversal = operations(transfer_id, source, target, amount)

    # Step 1: debit the source.
    debited = yield ctx.run(apply_entry, debit)
    if not debited:
        return "rejected"

    # Step 2: try the credit once. (To retry is safe, but keeps the money in flight for longer.)
    try:
        attempt = ctx.run(credit_target, credit, fail=simulate_credit_failure)
        yield attempt.options(retry_policy=Never())
    except Exception as error:
        # It may have happened all the same, or happen later. Only a void proves that it never will.
        credited = yield ctx.run(give_up, credit, str(error))
        if not credited:
            # Step 3: reverse the debit. A reversal is never a void: it would lose the money.
            yield ctx.run(apply_entry, reversal)
            return "compensated"
    return "committed"


def apply_entry(ctx: Context, operation: Operation) -> bool:
    """Settles an operation as an entry. Returns whether it has happened."""
    return settle(ctx.get_dependency("db"), operation)  # the ledger that `start` was given


def credit_target(ctx: Context, credit: Operation, *, fail: str) -> None:
    """Credits the target. If `fail` is "late", nothing is credited yet; if "lost", it is, but the
    answer is lost. The saga sees the same in all that goes wrong: a RuntimeError."""
    try:
        credited = fail != "late" and apply_entry(ctx, credit)
        if fail:
            raise TimeoutError("no answer from the target (simulated)")
        if not credited:
            raise ValueError("the credit is a void")
    except BaseException as error:  # the SDK cannot encode every one, and some end the process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def give_up(ctx: Context, operation: Operation, why: str) -> bool:
    """Settles an operation as a void. Returns whether it has happened all the same.
    If the target is at another bank, that bank must do as `settle` does, for `credit_target` and
    `give_up`: what comes first stands, and is the answer. Book the answer here, too, on an account
    that stands for the target. That bank must key it by this ledger's id and the op id: another
    ledger may use the same op id. A bank that cannot promise a void cannot take part."""
    return settle(ctx.get_dependency("db"), operation, void=why)


# ---- The ledger: what has happened --------------------------------------------------------------

LOG = logging.getLogger("money-transfer")
LOG.addFilter(lambda record: "Function credit_target(" not in record.getMessage())  # it is handled
# Steps run on several threads, which share one connection. Each use of it holds LOCK: without that,
# inserts are lost, and threads read each other's rows (CPython issue 118172).
LOCK = threading.Lock()


def settle(db: sqlite3.Connection, operation: Operation, void: str | None = None) -> bool:
    """Settles an operation, unless it is settled: as an entry or, if `void` is a reason, as a void.
    A debit that the ledger refuses becomes a void. Returns whether the operation has happened: this
    never changes. After an sqlite3.Error it is unknown: call again. ValueError: no operation."""
    insert = "INSERT OR IGNORE INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"
    select = "SELECT * FROM operations WHERE op_id = ?"
    void = void and printable(void.strip()[:300])
    with LOCK:
        try:  # with autocommit, a statement is a transaction: row, balance and checks, or nothing
            db.execute(insert, (*operation, void))
        except sqlite3.IntegrityError as refusal:
            # If another process has settled it since that insert, its row stays.
            db.execute(insert, (*operation, str(refusal)))
        row = db.execute(select, (operation.op_id,)).fetchone()
    if row is None:  # OR IGNORE also ignores what breaks a CHECK
        raise ValueError(f"no operation: {operation}")
    *columns, reason = row
    if Operation(*columns) != operation:
        LOG.warning("%s will never happen: its op id is already used", operation.op_id)
        return False
    outcome = "an entry" if reason is None else printable(f"a void: {reason}")
    LOG.info("%s is %s", operation.op_id, outcome)
    return reason is None


def printable(text: str) -> str:
    """The text, with control characters escaped: they could drive a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# If you edit this, start a new ledger: `open_ledger` refuses one that was made by another schema.
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
CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY, balance INTEGER NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS entry_moves_balance AFTER INSERT ON operations WHEN NEW.void IS NULL
BEGIN
  INSERT INTO accounts SELECT NEW.account, 0 WHERE NEW.kind = 'opening';
  UPDATE accounts SET balance = balance + NEW.amount WHERE account = NEW.account;
  SELECT RAISE(ABORT, 'insufficient funds')
    FROM accounts WHERE account = NEW.account AND balance < 0;
  -- Both accounts of a debit are open, so that its credit and reversal can always happen.
  SELECT RAISE(ABORT, 'unknown account') WHERE NEW.account NOT IN (SELECT account FROM accounts)
    OR NEW.kind = 'debit' AND NEW.counterparty NOT IN (SELECT account FROM accounts);
END;
CREATE TRIGGER IF NOT EXISTS rule AFTER INSERT ON operations WHEN NEW.kind IN ('credit', 'reversal')
BEGIN
  -- "It pays out only what a debit took": the same amount and accounts (for a credit, swapped).
  SELECT RAISE(ABORT, 'no such debit') WHERE NOT EXISTS (SELECT 1 FROM operations
    WHERE op_id = NEW.transfer_id || '-debit' AND void IS NULL AND amount = -NEW.amount
      AND CASE NEW.kind WHEN 'credit' THEN (account, counterparty) = (NEW.counterparty, NEW.account)
                        ELSE (account, counterparty) = (NEW.account, NEW.counterparty) END);
  -- "It reverses a debit only if the credit is a void": without `give_up`, a saga gets stuck here.
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
CREATE VIEW IF NOT EXISTS transfers AS  -- a row for each debit; look it up by debit_id
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
    db = sqlite3.connect(path, check_same_thread=False, autocommit=True, uri=True)
    try:
        if not objects(db):
            with contextlib.suppress(sqlite3.OperationalError):  # busy: another process creates it
                db.execute("PRAGMA journal_mode = WAL")  # who reads and who writes do not wait
            db.executescript(SCHEMA)
        with contextlib.closing(sqlite3.connect(":memory:")) as model:
            model.executescript(SCHEMA)
            if not objects(model) <= objects(db):
                raise sqlite3.DatabaseError("its schema is another than SCHEMA: make a new ledger")
        db.execute("PRAGMA synchronous = FULL")  # a commit survives a loss of power
    except sqlite3.Error as error:
        db.close()
        raise type(error)(f"{path}: {error}") from error
    return db


def objects(db: sqlite3.Connection) -> set[str]:
    """The tables, triggers and views of a database, as they were made, but without comments."""
    rows = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")
    return {re.sub(r"(--.*|\s)+", " ", sql) for (sql,) in rows}


class OperationConflict(Exception):
    """An account, or the id of a transfer, is already used for something else."""


def open_account(db: sqlite3.Connection, account: str, opening: int = 0) -> None:
    """Opens an account that holds `opening` cents, once. Raises ValueError or OperationConflict."""
    check(opening, account, least=0)
    if not settle(db, Operation(f"{account}-opening", account, "opening", account, opening)):
        raise OperationConflict(f"account {account!r} was opened with another amount")


def check(cents: int, *accounts: str, least: int = 1) -> None:
    """Raises ValueError unless these are a number of cents, and names of accounts."""
    for name in accounts:
        if type(name) is not str or not name.isprintable() or not re.fullmatch(r"\S(.*\S)?", name):
            raise ValueError(f"an account is printable text, no space at its ends, not {name!r}")
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


def lookup(db: sqlite3.Connection, transfer_id: str, *terms: Any) -> dict[str, Any]:
    """What the ledger says about a transfer: its status is "unknown" if no debit has settled.
    Raises OperationConflict if it is not of the `terms` (source, target, amount) that are given."""
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


def totals(db: sqlite3.Connection) -> tuple[int, int, int, bool]:
    """Cents in accounts, in flight and opened at one moment; whether every cent is somewhere."""
    query = """
        SELECT (SELECT coalesce(sum(balance), 0) FROM accounts),
               (SELECT coalesce(sum(amount), 0) FROM transfers WHERE status = 'in flight'),
               (SELECT coalesce(sum(amount), 0) FROM operations WHERE kind = 'opening'),
               EXISTS (SELECT account, balance FROM accounts EXCEPT SELECT account, sum(amount)
                       FROM operations WHERE void IS NULL GROUP BY account)
    """
    [(held, moving, opened, wrong_balance)] = read(db, query)
    return held, moving, opened, held + moving == opened and not wrong_balance


def money(cents: int) -> str:
    """Cents as people write them: 3000 is 30.00."""
    return f"{Decimal(cents) / 100:.2f}"


# ---- Running it ---------------------------------------------------------------------------------


class Bank(NamedTuple):
    """A ledger, its id, and Resonate, which runs `transfer_money` on it."""

    db: sqlite3.Connection
    ledger_id: str
    resonate: Resonate


def start(db: sqlite3.Connection, *, remote: bool = False, client: bool = False) -> Bank:
    """Starts Resonate on this ledger: in memory or, if `remote`, with a server. A client runs its
    own transfers, a worker what dead clients have left. Raises ValueError or ConnectionError."""
    if db.autocommit is not True or db.in_transaction:
        raise ValueError("the connection does not commit each statement: use open_ledger")
    [(ledger_id,)] = read(db, "SELECT id FROM ledger")
    store = mend()
    if remote:
        check_server()
        # The runs of dead clients are sent to the workers. A client is in a group of its own.
        workers = f"money-transfer-{ledger_id}"
        group = f"client-{os.urandom(8).hex()}" if client else workers
        resonate = Resonate.remote(group=group).options(target=workers)
    else:
        messages = store.message_source(group="default", id="memory")
        resonate = Resonate(store=store, message_source=messages, ttl=10**6)  # a lease of days
    resonate.set_dependency("db", db)
    resonate.register(transfer_money)
    resonate.start()
    return Bank(db, ledger_id, resonate)


def submit(
    bank: Bank, transfer_id: str, source: str, target: str, amount: int, **options: str
) -> dict[str, Any]:
    """Runs a transfer of `amount` cents. Returns what the ledger says about it. Raises ValueError,
    OperationConflict, TimeoutError (ask again), or RuntimeError (Resonate has stopped)."""
    if type(transfer_id) is not str or not re.fullmatch("[A-Za-z0-9_-]{1,64}", transfer_id):
        raise ValueError(f"a transfer id is 1 to 64 of A-Z a-z 0-9 _ -, not {transfer_id!r:.80}")
    check(amount, source, target)
    request = (transfer_id, source, target, amount)
    transfer_money(Any, *request, **options)  # type: ignore[arg-type]  # a wrong option raises here
    promise = f"{bank.ledger_id}-{transfer_id}"  # calls with the same id share it, and so one run
    pause, deadline = 0.0, time.monotonic() + 60
    while time.monotonic() < deadline:
        result = lookup(bank.db, *request)
        if result["status"] not in ("unknown", "in flight"):
            return result
        if pause:
            time.sleep(pause)
        # It runs here or, if another process has begun it, there. A server may lose it: ask again.
        handle = bank.resonate.begin_run(promise, "transfer_money", *request, **options)
        try:
            handle.result(timeout=2)
        except Exception as error:
            problem = str(error) or "a worker or `recover` finishes it if its client is dead"
            LOG.warning("%s has not ended: %s", transfer_id, problem)
        if handle.done():  # but the ledger may be a restored copy, and not know that
            promise, pause = os.urandom(16).hex(), 1.0  # then the next turn runs it anew
    raise TimeoutError(f"{transfer_id} has not ended in a minute: ask again")


def recover(bank: Bank) -> Iterator[dict[str, Any]]:
    """Finishes each transfer in flight from the ledger alone. Yields each result, or its error."""
    query = "SELECT transfer_id, source, target, amount FROM transfers WHERE status = 'in flight'"
    for transfer_id, *terms in read(bank.db, query):
        try:
            yield submit(bank, transfer_id, *terms)
        except Exception as error:
            yield lookup(bank.db, transfer_id) | {"error": str(error)}


# ---- What the SDK gets wrong: nothing here is part of the pattern --------------------------------


def mend() -> LocalStore:
    """Mends SDK 0.6.7: it gets slower, and races end the process. Returns a store in memory."""
    vars(sdk)["ContextLogger"] = lambda *_: LOG  # it makes a logger for each step, and keeps it
    for item in (Function, Retry):  # its queue compares those that are due at once
        item.__lt__ = lambda *_: False  # type: ignore[operator]  # they have none yet
    store = LocalStore()
    for records in (store.promises, store.tasks):
        share(records, store._cond)
    return store


def share(records: Any, lock: Any) -> None:
    """Lets threads share these records of a store: each method holds the lock of the store's own
    thread, and `scan` returns only what can still change, not all that the store keeps."""
    transition = records.transition
    unfinished: dict[str, Any] = {}

    def transition_and_note(id: str, *args: Any, **options: Any) -> Any:
        result = transition(id, *args, **options)
        unfinished[id] = result[0]
        if result[0].state not in ("PENDING", "INIT", "ENQUEUED", "CLAIMED"):
            del unfinished[id]
        return result

    def call_alone(method: Any, *args: Any, **options: Any) -> Any:
        with lock:
            return method(*args, **options)

    records.transition = transition_and_note
    records.scan = lambda: list(unfinished.values())
    for name in dir(records):
        if not name.startswith("_"):
            setattr(records, name, partial(call_alone, getattr(records, name)))


def check_server() -> None:
    """Raises ConnectionError if no Resonate server answers: the SDK would try for ever."""
    store = RemoteStore(retry_policy=Constant(max_retries=-1))  # -1: it tries once
    try:
        store.tasks.heartbeat(pid="nobody")  # any call will do
    except Exception as error:
        hint = "RESONATE_HOST is http://HOST; RESONATE_USERNAME and RESONATE_PASSWORD if it asks"
        raise ConnectionError(f"no Resonate server at {store.url}: {error} ({hint})") from error


# ---- The command line ---------------------------------------------------------------------------

TOUR = """
An account | alice | open alice 100 | 0
Another account | bob | open bob 50 | 0
alice pays bob | t1 | transfer t1 alice bob 30 | 0
The credit comes late | t2 | transfer t2 alice bob 20 --fail-credit late | 1
The answer is lost | t3 | transfer t3 alice bob 7.5 --fail-credit lost | 0
alice has no 500.00 | t4 | transfer t4 alice bob 500 | 1
t1 again: nothing moves | t1 | transfer t1 alice bob 30 | 0
Killed after the debit | t5 | transfer t5 alice bob 10 --crash-after debit | 137
Finished from the ledger alone | t5 | recover | 0
Killed after the void | t6 | transfer t6 alice bob 5 --fail-credit late --crash-after credit | 137
Finished from the ledger alone | t6 | recover | 0
"""


def tour() -> None:
    """Runs TOUR and checks it. A line: title, id whose rows are shown, command, exit status."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = f"{folder}/ledger.db"
        for scene in TOUR.strip().splitlines():
            title, name, command, expected = scene.split(" | ")
            print(f"\n# {title}\n$ python main.py {command}")
            words = [sys.executable, __file__, *command.split(), "--ledger", ledger]
            status = subprocess.call(words, stderr=subprocess.STDOUT)
            if status == 137:
                print("  (killed)")
            with contextlib.closing(open_ledger(ledger)) as db:
                adds_up = journal(db, name)
            if status != int(expected) or not adds_up:
                raise AssertionError(f"{title}: exit status {status}")


def journal(db: sqlite3.Connection, only: str = "") -> bool:
    """Prints the ledger, or its rows of one transfer. Returns whether every cent is somewhere."""
    operations = """
        SELECT op_id, operations.account, operations.amount, coalesce('void: ' || void, status, '')
        FROM operations LEFT JOIN transfers ON debit_id = op_id
        WHERE ? IN (operations.transfer_id, '')
        ORDER BY operations.transfer_id, kind <> 'debit', kind  -- the debit, the credit, the rest
    """
    balances = "SELECT 'balance', account, balance, '' FROM accounts WHERE ? = ''"
    read(db, "BEGIN")  # until COMMIT, all that is read is of one moment
    rows = read(db, operations, only) + read(db, balances, only)
    held, moving, opened, adds_up = totals(db)
    read(db, "COMMIT")
    width = max((len(text) for row in rows for text in row[:2]), default=0)
    for name, account, cents, note in rows:
        line = f"{name}\t{account}\t{money(cents):>10}  {note}"
        print("  " + printable(line.expandtabs(width + 2).rstrip()))
    verdict = "every cent is somewhere" if adds_up else "IT DOES NOT ADD UP"
    print(f"  {money(held)} in accounts + {money(moving)} in flight,", end=" ")
    print(f"{money(opened)} opened: {verdict}")
    return adds_up


def to_cents(text: str) -> int:
    """An amount as people write it, in cents: 30 or 30.00 is 3000. Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,2})?", text):
        raise ValueError(f"not an amount: {text!r}: write 30 or 30.00")
    return int(Decimal(text) * 100)


@contextlib.contextmanager
def ledger_in(file: str, mode: str) -> Iterator[sqlite3.Connection]:
    """The ledger in this file. Raises OSError if the file cannot be opened in this mode."""
    open(file, mode).close()
    if mode == "rb":  # only to read: make no file beside it
        how = "mode=ro" if os.path.exists(f"{file}-wal") else "immutable=1"
        file = f"file:{quote(file)}?{how}"
    db = open_ledger(file)
    try:
        yield db
    finally:
        with LOCK:  # a step may still use it
            db.close()


def execute(args: argparse.Namespace) -> bool:
    """Runs a command, or the tour. Returns whether it is done, and all is right."""
    if args.crash_after:  # this process dies when `settle` logs such an operation
        last = f"-{args.crash_after} is "
        LOG.addFilter(lambda record: os._exit(137) if last in record.getMessage() else True)
    match args.command:
        case []:
            tour()
        case ["open", account, amount]:
            cents = to_cents(amount)
            with ledger_in(args.ledger, "ab") as db:
                open_account(db, account, cents)
            print(json.dumps({"account": account, "opening": cents}))
        case ["transfer", transfer_id, source, target, amount]:
            request = (transfer_id, source, target, to_cents(amount))
            with ledger_in(args.ledger, "r+b") as db:
                bank = start(db, remote=args.server, client=True)
                result = submit(bank, *request, simulate_credit_failure=args.fail_credit)
                if args.fail_credit == "late" and result["status"] == "compensated":
                    _, credit, *_ = operations(*request)
                    settle(db, credit)  # it comes after all, and finds its void
            print(json.dumps(result))
            return bool(result["status"] == "committed")
        case ["recover"]:
            with ledger_in(args.ledger, "r+b") as db:
                for result in recover(start(db)):
                    print(json.dumps(result))
                _, moving, _, _ = totals(db)
                LOG.info("in flight now: %s", money(moving))
                return moving == 0
        case ["journal", *only] if len(only) < 2:
            with ledger_in(args.ledger, "rb") as db:
                return journal(db, *only)
        case ["worker"]:
            with ledger_in(args.ledger, "r+b") as db:
                bank = start(db, remote=True)
                print(f"worker on {args.ledger}")
                while True:
                    bank.resonate.start()  # does nothing, or raises RuntimeError if it has stopped
                    time.sleep(1)
        case words:
            raise LookupError(f"not a command: {' '.join(words)!r}: see --help")
    return True


def main() -> int:
    """Runs a command, or the tour. Returns the exit status: 0 done, 1 not done, 2 an error."""
    raw = argparse.RawDescriptionHelpFormatter
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    cli.add_argument("command", nargs="*", help="as above; AMOUNT is 30 or 30.00")
    cli.add_argument("--ledger", type=os.path.abspath, default="ledger.db", help="else %(default)s")
    cli.add_argument("--server", action="store_true", help="transfer: use a Resonate server")
    cli.add_argument("--fail-credit", choices=("late", "lost"), default="", help="simulate that")
    cli.add_argument("--crash-after", choices=("debit", "credit", "reversal"), help="die then")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        stdout: Any = sys.stdout
        stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        return 0 if execute(cli.parse_intermixed_args()) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        stopped = "Resonate has stopped, run this again: " if type(error) is RuntimeError else ""
        print(printable(f"error: {stopped}{error}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    os._exit(main())  # sys.exit would flush a closed pipe again
