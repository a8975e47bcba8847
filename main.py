"""A money transfer that neither loses money nor makes any, whatever crashes: all of it in this one file.

    python main.py                                    a tour, on a real ledger, with a real crash
    python main.py transfer ID SOURCE TARGET AMOUNT   one transfer, and its result as JSON
    python main.py recover                            finish what is in flight
    python main.py journal                            entries, balances, what is in flight, and whether it all adds up
    python main.py worker                             finish what a Resonate server hands out, until told to stop

Debit one account, credit another, and if the credit is refused, reverse the debit: a saga, for two writes that share no
transaction. As usually written it makes money: the credit lands but reports a failure (a timeout, a frozen worker, a
promise store that forgot), and the reversal pays back what has already been paid out. One law closes every such gap:

    An op id settles once, as an entry or as a void. Whoever gives up on an op must first take its op id.

    debit -- entry --> credit -- entry -----------------> committed
      |                  `------ void --> reversal -----> compensated
      `----- void --------------------------------------> rejected

entry      one final row of the ledger, in cents: an opening, a debit (below zero), a credit or a reversal (above zero)
op id      the key of an entry, its transfer's id and its kind: `t1-debit`
void       a row of amount zero under an op id: that entry never happened and never will; it keeps the reason
in flight  debited, and neither credited nor reversed yet

Two layers. Resonate's promise store decides when work is done: it runs steps, repeats them, remembers what they said.
The ledger decides what happened. What the first forgets or repeats, or does too late, the second answers the same way.
"""

import argparse
import contextlib
import functools
import inspect
import itertools
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from typing import Any, NoReturn
from urllib.parse import urlsplit

if __name__ == "__main__":  # Ctrl-C is quiet from here on: the next import takes a moment
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import resonate.resonate as sdk
from resonate import Context, Resonate
from resonate.errors import ResonateError
from resonate.message_sources import Poller
from resonate.retry_policies import Constant, Never
from resonate.stores import RemoteStore

# ---- The ledger: what happened ---------------------------------------------------------------------------------------

type Ledger = sqlite3.Connection
type Saga = sdk.Function[Any, Any]
type Result = dict[str, Any]

SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
  account TEXT PRIMARY KEY,
  balance INTEGER NOT NULL -- cents: the sum of the account's entries, kept by entry_moves_balance alone
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS entries (
  op_id        TEXT PRIMARY KEY,
  transfer_id  TEXT, -- NULL for an opening
  account      TEXT NOT NULL,
  counterparty TEXT,
  amount       ANY CHECK (typeof(amount) = 'integer'), -- cents; as INTEGER, STRICT would let 30.0 in
  kind         TEXT,
  reason       TEXT CHECK ((reason IS NOT NULL) = (kind = 'void')),
  CONSTRAINT "op id, kind and amount agree" CHECK (CASE kind
    WHEN 'opening'  THEN op_id = account || '-opening' AND transfer_id IS NULL
    WHEN 'debit'    THEN amount < 0 AND op_id = transfer_id || '-debit'
    WHEN 'credit'   THEN amount > 0 AND op_id = transfer_id || '-credit'
    WHEN 'reversal' THEN amount > 0 AND op_id = transfer_id || '-reversal'
    WHEN 'void'     THEN amount = 0 AND op_id IN (transfer_id || '-debit', transfer_id || '-credit')
  END IS TRUE)
) STRICT, WITHOUT ROWID;

-- AFTER: a BEFORE trigger would fire for an entry that is already there, and refuse its retry.
CREATE TRIGGER IF NOT EXISTS entry_moves_balance AFTER INSERT ON entries WHEN NEW.kind <> 'void' BEGIN
  INSERT INTO accounts SELECT NEW.account, 0 WHERE NEW.kind = 'opening';
  UPDATE accounts SET balance = balance + NEW.amount WHERE account = NEW.account;
  SELECT RAISE(ABORT, 'unknown account') WHERE changes() = 0;
  SELECT RAISE(ABORT, 'insufficient funds') FROM accounts WHERE account = NEW.account AND balance < 0;
  SELECT RAISE(ABORT, 'a transfer never pays out more than it took') WHERE 0 < (SELECT SUM(amount) FROM entries
    WHERE op_id IN (NEW.transfer_id || '-debit', NEW.transfer_id || '-credit', NEW.transfer_id || '-reversal'));
END;

CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are final'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are final'); END;
"""

# Steps run on several threads over one connection: under this lock, none reads back the row of another.
LOCK = threading.RLock()
WRITES = (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE)


class OperationConflict(Exception):
    """An op id, or a transfer's id, is used again for something else. Never compensated, never silent."""


class TransferRejected(Exception):
    """A business refusal: unknown account, insufficient funds, a target that says no. Not retried; compensated."""


def open_ledger(path: str = ":memory:", factory: type[Ledger] = sqlite3.Connection) -> Ledger:
    """The ledger at `path`, created if there is none. Raises sqlite3.Error if it cannot be used.

    A commit survives power loss: WAL with synchronous = FULL (https://sqlite.org/pragma.html#pragma_synchronous).
    """
    db = sqlite3.connect(path, timeout=5, check_same_thread=False, autocommit=True, factory=factory)
    try:
        schema = "SELECT sql FROM sqlite_schema"
        if not (found := set(db.execute(schema))):
            if os.path.exists(path) and 0 < os.path.getsize(path) < 512:
                raise sqlite3.DatabaseError("file is not a database")  # so short a file, SQLite would overwrite
            db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT")
        with contextlib.closing(sqlite3.connect(":memory:")) as model:
            if found and not found >= set(model.executescript(SCHEMA).execute(schema)):
                raise sqlite3.DatabaseError("not a ledger of this program, or without one of its guards")
        with contextlib.suppress(sqlite3.OperationalError):  # if another process is at it, the next open will do
            db.execute("PRAGMA journal_mode = WAL")
        # Without recursive_triggers, INSERT OR REPLACE would delete an entry past no_delete.
        db.executescript("PRAGMA synchronous = FULL; PRAGMA recursive_triggers = ON")
        # A balance moves by an entry: no statement writes to accounts unless a trigger makes it.
        db.set_authorizer(lambda act, table, _, __, trigger: int(table == "accounts" and act in WRITES and not trigger))
    except BaseException:
        db.close()
        raise
    return db


def settle(
    db: Ledger, op_id: str, account: str, amount: int, kind: str, counterparty: str | None, void: str | None = None
) -> str | None:
    """None if the entry of `amount` cents stands, or the reason of its void; writes the one asked for if neither does.

    Raises OperationConflict if the op id stands for something else, sqlite3.IntegrityError if the ledger refuses the
    entry, and another sqlite3.Error if it cannot be asked: then nobody knows, and whoever needs to must ask again.
    """
    transfer_id = None if kind == "opening" else op_id.removesuffix(f"-{kind}")
    entry = (op_id, transfer_id, account, counterparty, amount, kind, None)
    forbids = f"{kind} of {cents(abs(amount))}: "
    row = entry if void is None else (*entry[:4], 0, "void", forbids + void)
    with LOCK:
        # What went in stands; else read who has the op id. INSERT OR IGNORE would pass over a broken CHECK, too.
        done = db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (op_id) DO NOTHING", row)
        stands: Any = row if done.rowcount else db.execute("SELECT * FROM entries WHERE op_id = ?", (op_id,)).fetchone()
    if stands == entry:
        return None
    if stands[:6] == (*entry[:4], 0, "void") and stands[6].startswith(forbids):
        return str(stands[6])
    raise OperationConflict(f"{op_id} stands for something else: {stands[1:]}, not {entry[1:]}")


def open_account(db: Ledger, account: str, opening: int = 0) -> None:
    """Opens an account with `opening` cents, once. Raises OperationConflict if it was opened with another amount."""
    settle(db, f"{account}-opening", account, opening, "opening", None)


def balance(db: Ledger, account: str) -> int:
    """Cents in an account. Raises LookupError if there is no such account."""
    with LOCK:
        row = db.execute("SELECT balance FROM accounts WHERE account = ?", (account,)).fetchone()
    if row is None:
        raise LookupError(f"unknown account {account!r}")
    return int(row[0])


def in_flight(db: Ledger) -> list[tuple[str, str, str, int]]:
    """(transfer_id, source, target, cents) of each transfer debited, and neither credited nor reversed."""
    with LOCK:
        return db.execute("""
            SELECT transfer_id, account, counterparty, -net FROM (
              SELECT *, (SELECT SUM(amount) FROM entries WHERE op_id IN
                (debit.op_id, debit.transfer_id || '-credit', debit.transfer_id || '-reversal')) AS net
              FROM entries AS debit WHERE kind = 'debit') WHERE net < 0""").fetchall()


def cents(amount: int) -> str:
    """An amount of cents as people write it: -3000 is '-30.00'."""
    return f"{'-' if amount < 0 else ''}{abs(amount) // 100}.{abs(amount) % 100:02}"


# ---- The steps: each settles one op ----------------------------------------------------------------------------------


def apply_entry(
    ctx: Context, op_id: str, account: str, amount: int, kind: str, *, counterparty: str | None = None
) -> None:
    """Writes an entry of `amount` cents, once however often it runs.

    Raises TransferRejected if the ledger refuses the entry or its void stands, OperationConflict as `settle` does.
    """
    try:
        reason = settle(ctx.get_dependency("db"), op_id, account, amount, kind, counterparty)
    except sqlite3.IntegrityError as refusal:
        reason = str(refusal)
    if reason is not None:
        raise TransferRejected(reason)


def credit_target(
    ctx: Context, op_id: str, account: str, amount: int, *, counterparty: str | None = None, fail: bool = False
) -> None:
    """Credits the target with `amount` cents; `fail` simulates a target that refuses. Raises as `apply_entry` does."""
    if fail:
        raise TransferRejected("the target refused (simulated)")
    apply_entry(ctx, op_id, account, amount, "credit", counterparty=counterparty)


def give_up(ctx: Context, why: Exception, op_id: str, account: str, amount: int, kind: str, other: str) -> str | None:
    """Why the entry never happened and never will, or None: it happened, whatever its caller heard."""
    reason = (str(why) or repr(why)).encode(errors="backslashreplace").decode()  # nothing said may keep the void out
    return settle(ctx.get_dependency("db"), op_id, account, amount, kind, other, void=reason)


# ---- The saga --------------------------------------------------------------------------------------------------------

# A refusal is an answer. Whatever else a step raises is a fault, and the SDK runs it again until there is an answer.
UNTIL_ANSWERED: dict[str, Any] = {"non_retryable_exceptions": (TransferRejected, OperationConflict)}


def transfer_money(
    ctx: Context, transfer_id: str, source: str, target: str, amount: int, *, simulate_credit_failure: bool = False
) -> Generator[Any, Any, Result]:
    """Moves `amount` cents. Its result, committed, compensated or rejected, is what the ledger says, whoever asks."""
    result = {"transfer_id": transfer_id, "status": "committed", "source": source, "target": target, "amount": amount}
    debit = (f"{transfer_id}-debit", source, -amount, "debit")
    credit = (f"{transfer_id}-credit", target, amount, "credit")
    reversal = (f"{transfer_id}-reversal", source, amount, "reversal")

    try:
        yield ctx.run(apply_entry, *debit, counterparty=target).options(**UNTIL_ANSWERED)
    except Exception as failure:
        reason = yield ctx.run(give_up, failure, *debit, target).options(**UNTIL_ANSWERED)
        if reason is not None:
            return result | {"status": "rejected", "error": reason}

    try:
        attempt = ctx.run(credit_target, *credit[:3], counterparty=source, fail=simulate_credit_failure)
        yield attempt.options(retry_policy=Never())  # the target is asked once; then the ledger is
    except Exception as failure:  # any: what failed to answer may have landed
        reason = yield ctx.run(give_up, failure, *credit, source).options(**UNTIL_ANSWERED)
        if reason is not None:
            yield ctx.run(apply_entry, *reversal, counterparty=target).options(**UNTIL_ANSWERED)
            return result | {"status": "compensated", "error": reason}
    return result


# ---- Running it ------------------------------------------------------------------------------------------------------

GROUP = "money-transfer"  # whose workers get our transfers, and nothing else: a stranger's task would end them
LOG = logging.getLogger(GROUP)  # what the SDK says of steps, less the refusals: the saga answers for those
LOG.addFilter(lambda record: not re.search(r"failed with (TransferRejected|OperationConflict)\(", record.getMessage()))


def start(db: Ledger, *, remote: bool = False, group: str = GROUP, workflow: Any = None) -> tuple[Resonate, Saga]:
    """The SDK, started on this ledger, and `transfer_money` (or `workflow`) as `submit` and `recover` take it.

    Promises are in memory or, with `remote`, on the server that RESONATE_HOST and so on name. Raises ConnectionError.
    """
    vars(sdk)["ContextLogger"] = lambda *_: LOG  # the SDK would make one for each step, and slow down threefold
    if remote:
        check_server()
    resonate = Resonate.remote(group=group) if remote else Resonate.local(group=group)
    store: Any = resonate._store
    for part in () if remote else (store.promises, store.tasks):
        # Its threads share this store, and only one takes its lock: at hundreds of transfers at once the process died.
        for name, method in inspect.getmembers(part, inspect.ismethod):
            setattr(part, name, functools.partial(call_alone, store._cond, method))
    resonate.set_dependency("db", db)
    transfer = resonate.register(workflow or transfer_money, name="transfer_money").options(target=GROUP)
    resonate.start()
    return resonate, transfer


def call_alone(lock: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """What the method returns. While it runs, no other thread has the lock."""
    with lock:
        return method(*args, **kwargs)


def check_server() -> str:
    """The address of the Resonate server. Raises ConnectionError, within five seconds, if none answers there."""
    store, messages = RemoteStore(timeout=2, retry_policy=Constant(max_retries=-1)), Poller(GROUP, "check").url
    try:
        socket.create_connection((urlsplit(messages).hostname, urlsplit(messages).port), timeout=2).close()
        store.promises.get("no-such-promise")
    except Exception as error:
        if getattr(error, "code", 0) != 100.404:  # what a Resonate server says of such a promise
            problem = f"no Resonate server at {store.url} and {messages} ({error!r:.60})"
            raise ConnectionError(f"{problem}: start `resonate serve`, version 0.8.2") from error
    return store.url


def submit(
    transfer: Saga, transfer_id: str, source: str, target: str, amount: int, *, simulate_credit_failure: bool = False
) -> Result:
    """Runs a transfer of `amount` cents under its id and returns its result, the same one each time it is asked.

    Raises ValueError before anything is written if this can be no transfer, OperationConflict if its id is another's.
    """
    # The SDK calls the steps of `a` `a.1` and `a.2`, and puts ids into URLs as they are.
    if not (isinstance(transfer_id, str) and re.fullmatch("[A-Za-z0-9_-]{1,64}", transfer_id)):
        raise ValueError(f"a transfer id is 1 to 64 of A-Z a-z 0-9 _ -, not {transfer_id!r:.80}")
    for account in (source, target):
        if not (isinstance(account, str) and account and not re.search("[\ud800-\udfff]", account)):
            raise ValueError(f"an account is a text, and not empty: not {account!r:.80}")
    if source == target:
        raise ValueError(f"source and target are one account, {source!r:.80}: name two")
    if type(amount) is not int or not 0 < amount < 2**63:
        raise ValueError(f"an amount is a whole number of cents above 0 and below 2**63, not {amount!r:.80}")

    request = {"transfer_id": transfer_id, "source": source, "target": target, "amount": amount}
    # A promise keeps the answer to whoever was first to use its name, right or wrong. The ledger knows better: if the
    # answer is not ours, ask again, by a name that nobody has used.
    for promise_id in (transfer_id, f"{transfer_id}~{os.urandom(8).hex()}"):
        with contextlib.suppress(OperationConflict):
            result: Result = transfer.run(promise_id, **request, simulate_credit_failure=simulate_credit_failure)
            if request.items() <= result.items():
                return result
    raise OperationConflict(f"{transfer_id} is the id of another transfer: look it up in the journal, or take a new id")


def recover(db: Ledger, transfer: Saga) -> list[Result]:
    """Finishes what is in flight, and returns the results: a debit names its target, so the ledger alone is enough.

    What cannot be finished is named on stderr and stays in flight.
    """
    results, in_memory = [], not isinstance(transfer._resonate._store, RemoteStore)
    for number, batch in enumerate(itertools.batched(in_flight(db), 200)):
        # A promise store in memory slows down with all that it remembers: each batch gets another one.
        resonate, saga = start(db) if in_memory and number else (None, transfer)
        for transfer_id, source, target, amount in batch:
            try:
                results.append(submit(saga, transfer_id, source, target, amount))
            except (ValueError, TransferRejected, OperationConflict) as error:
                failed(f"{printable(transfer_id)} stays in flight: {error}")
        if resonate is not None:
            resonate.stop()
            vars(resonate._bridge).clear()  # a thread of it never ends, and would keep it all
    return results


# ---- The command line ------------------------------------------------------------------------------------------------


class CommandLedger(sqlite3.Connection):
    """The ledger of a command. A fault in a step ends the process: every crash is safe, so it need not wait."""

    path = ""
    crash_after: str | None = None  # a kind: end as kill -9 would, right after such an entry is committed

    def execute(self, sql: str, row: Any = (), /) -> sqlite3.Cursor:
        try:
            cursor = super().execute(sql, row)
        except sqlite3.Error as fault:
            if isinstance(fault, sqlite3.IntegrityError) or threading.current_thread() is threading.main_thread():
                raise
            os._exit(failed(fault))
        if self.crash_after in row[5:6]:
            os.kill(os.getpid(), signal.SIGKILL)
        return cursor


def open_command_ledger(path: str) -> Ledger:
    """The ledger of a command. A new one starts with two demo accounts, by one statement: both or none."""
    CommandLedger.path = path
    db = open_ledger(os.path.abspath(path), CommandLedger)
    if db.execute("SELECT 1 FROM entries").fetchone() is None:
        db.execute("""INSERT INTO entries VALUES ('alice-opening', NULL, 'alice', NULL, 10000, 'opening', NULL),
            ('bob-opening', NULL, 'bob', NULL, 5000, 'opening', NULL) ON CONFLICT (op_id) DO NOTHING""")
    return db


def failed(error: Exception | str) -> int:
    """Says on stderr, in one line, what is wrong and what to do. Returns the exit status, 2."""
    if isinstance(error, sqlite3.Error):
        error = f"{CommandLedger.path}: {error}. Nothing is lost: put that right, then run the same command again"
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
    return 2


def printable(text: object) -> str:
    """The text, escaped if it could drive a terminal."""
    return str(text) if str(text).isprintable() else ascii(text)


def journal(db: Ledger, only: str | None = None) -> bool:
    """Prints entries (of one transfer, or all), balances and what is in flight. Returns whether it all adds up."""
    db.execute("BEGIN")  # one snapshot, whatever others write meanwhile
    which = "WHERE ?1 IS NULL OR transfer_id = ?1 ORDER BY transfer_id, amount, op_id"
    rows = db.execute(f"SELECT op_id, kind, account, amount, reason FROM entries {which}", (only,)).fetchall()
    balances = db.execute("SELECT account, balance FROM accounts").fetchall()
    sums = db.execute("SELECT account, SUM(amount) FROM entries WHERE kind <> 'void' GROUP BY account").fetchall()
    openings = sum(amount for (amount,) in db.execute("SELECT amount FROM entries WHERE kind = 'opening'"))
    flights = in_flight(db)
    db.execute("COMMIT")
    rows += [("", "balance", account, amount, None) for account, amount in balances]
    rows += [(op_id, "in flight", source, amount, f"to {target}") for op_id, source, target, amount in flights]
    for op_id, kind, account, amount, note in rows:
        line = f"{printable(op_id):13} {kind:9} {printable(account):9} {cents(amount):>9}  {printable(note or '')}"
        print(f"  {line}".rstrip())
    held, flying = (sum(row[-1] for row in table) for table in (balances, flights))
    true = held + flying == openings and sums == balances
    verdict = "every cent is somewhere" if true else "IT DOES NOT ADD UP"
    print(f"  balances {cents(held)} + in flight {cents(flying)}, openings {cents(openings)}: {verdict}", flush=True)
    return true


def tour() -> int:
    """The story, on a ledger of its own, each scene checked against its claim. Returns the exit status."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # leaves by way of the folder's clean-up
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(open_command_ledger(f"{folder}/ledger.db")) as db:
        _, transfer = start(db)

        def scene(title: str, result: Result, claim: str) -> None:
            print(f"{title}: {result['status']}")
            adds_up = journal(db, result["transfer_id"])
            print()
            if not adds_up or claim != f"{result['status']} {balance(db, 'alice')} {balance(db, 'bob')}":
                raise SystemExit(f"error: the tour claims '{claim}', and that is not so")

        result = submit(transfer, "t1", "alice", "bob", 3000)
        scene("1. alice pays bob 30.00", result, "committed 7000 8000")
        result = submit(transfer, "t2", "alice", "bob", 2000, simulate_credit_failure=True)
        scene("2. The credit is refused: it is made void, then the debit reversed", result, "compensated 7000 8000")
        result = submit(transfer, "t3", "alice", "bob", 50000)
        scene("3. alice has no 500.00: the debit is made void", result, "rejected 7000 8000")
        result = submit(start(db)[1], "t1", "alice", "bob", 3000)
        scene("4. The first again, though the promise store has forgotten it", result, "committed 7000 8000")
        command = ["main.py", "transfer", "t5", "alice", "bob", "10", "--crash-after", "debit"]
        real = [sys.executable, os.path.abspath(__file__), *command[1:], "--ledger", CommandLedger.path]
        result = {"transfer_id": "t5", "status": signal.strsignal(-subprocess.run(real, check=False).returncode)}
        scene(f"5. python {' '.join(command)}", result, "Killed 6000 8000")
        (result,) = recover(db, transfer)
        scene("6. python main.py recover, which needs the ledger alone", result, "committed 6000 9000")
    return 0


def worker(db: Ledger) -> int:
    """Works for GROUP until SIGINT or SIGTERM, and prints what it finishes. Returns the exit status."""

    def announced(*args: Any, **kwargs: Any) -> Generator[Any, Any, Result]:
        result: Result = yield from transfer_money(*args, **kwargs)
        print(json.dumps(result), flush=True)
        return result

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    start(db, remote=True, workflow=announced)
    print(f"worker of {GROUP} at {check_server()}, on {CommandLedger.path}", flush=True)
    while True:
        signal.pause()


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(failed(f"{message}; see python main.py --help"))


def parse_amount(text: str) -> int:
    """Cents, of an amount as people write it: '30' and '30.00' are 3000."""
    if not (match := re.fullmatch(r"([0-9]{1,17})(?:\.([0-9]{1,2}))?", text)):
        raise argparse.ArgumentTypeError(f"an amount is written 30 or 30.00, not {text!r:.80}")
    return int(match[1]) * 100 + int((match[2] or "").ljust(2, "0"))


def main() -> int:
    """Runs a command. Returns the exit status: 0 well, 1 not well (compensated, rejected, in flight), 2 not at all."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    for name in ("transfer", "recover", "journal", "worker"):
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("--ledger", metavar="FILE", default="ledger.db", help="default: %(default)s")
        if name in ("transfer", "recover"):
            command.add_argument("--server", action="store_true", help="by way of a Resonate server")
    command = commands.choices["transfer"]
    for name in ("id", "source", "target"):
        command.add_argument(name, metavar=name.upper())
    command.add_argument("amount", metavar="AMOUNT", type=parse_amount, help="such as 30 or 30.00")
    command.add_argument("--fail-credit", action="store_true", help="let the target refuse")
    kinds = ("debit", "credit", "void", "reversal")
    command.add_argument("--crash-after", choices=kinds, help="end as kill -9 would, right after this is written")
    try:
        args = parser.parse_args()
        if args.command is None:
            return tour()
        with contextlib.closing(open_command_ledger(args.ledger)) as db:
            if args.command == "journal":
                return 0 if journal(db) else 1
            if args.command == "worker":
                return worker(db)
            # A client has a group of its own: in that of the workers it would be handed transfers, and leave.
            _, transfer = start(db, remote=args.server, group=f"client-{os.urandom(8).hex()}")
            if args.command == "recover":
                for result in recover(db, transfer):
                    print(json.dumps(result), flush=True)
                return 1 if in_flight(db) else 0
            CommandLedger.crash_after = args.crash_after
            request = (args.id, args.source, args.target, args.amount)
            result = submit(transfer, *request, simulate_credit_failure=args.fail_credit)
            print(json.dumps(result), flush=True)
            return 0 if result["status"] == "committed" else 1
    except BrokenPipeError:  # as in `| head`: who closed it knows
        return 2
    except (OSError, ValueError, sqlite3.Error, ResonateError, TransferRejected, OperationConflict) as error:
        return failed(error)


if __name__ == "__main__":
    sys.exit(main())
