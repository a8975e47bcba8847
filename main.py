"""A money transfer that cannot lose money, nor make any: all of it in this one file.

    python main.py                  a tour: five transfers and a kill -9, on a real ledger
    python main.py transfer -h      one transfer; also: recover, journal

Debit one account, credit another, and reverse the debit when the credit is refused: a saga, for two writes that share no
transaction. The usual saga creates money: its credit lands, then reports a failure (a timeout, a stalled worker, a lost
promise store), and the reversal refunds what was already paid. This one cannot, because of one law:

    An op id settles once, as an entry or as a void. Whoever gives up on an op must first take its op id.

    debit ──entry──> credit ──entry──────────────────> committed
      │                └─────void──> reversal ───────> compensated
      └─────void─────────────────────────────────────> rejected

account   holds a balance in cents, never below zero.
entry     one row of the ledger, final: an opening, a debit (below zero), a credit or a reversal (above zero).
op id     the key of an entry: its transfer's id and its kind, 't1-debit'. Writing it twice writes it once.
void      a row of amount zero under the op id of an entry: it did not happen, and now never will. It keeps the reason.
in flight debited, and neither credited nor reversed. Not lost: the ledger knows, and `recover` finishes it.

Two layers. The promise store of Resonate decides when work is done: it runs the steps, retries them, remembers results.
The ledger decides what happened. Whatever the first forgets, repeats or delays, the second gives the same answer.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, NoReturn

if __name__ == "__main__":  # Ctrl-C is quiet from the start, also while the SDK is being imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from resonate import Context, Resonate
from resonate.resonate import Function
from resonate.retry_policies import Never

# ---- The ledger: what happened ---------------------------------------------------------------------------------------

SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
  account TEXT PRIMARY KEY,
  balance INTEGER NOT NULL  -- cents: always the sum of the account's entries, kept by the trigger below
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS entries (
  op_id        TEXT PRIMARY KEY,
  transfer_id  TEXT,  -- NULL for an opening
  account      TEXT NOT NULL,
  counterparty TEXT,
  amount       ANY NOT NULL CHECK (typeof(amount) = 'integer'),  -- cents; a STRICT INTEGER would let 30.0 pass as 30
  kind         TEXT NOT NULL,
  reason       TEXT CHECK ((reason IS NOT NULL) = (kind = 'void')),
  CONSTRAINT "op id, kind and amount must agree" CHECK (
    CASE kind
      WHEN 'opening'  THEN amount >= 0 AND op_id = account || '-opening' AND transfer_id IS NULL
      WHEN 'debit'    THEN amount < 0 AND op_id = transfer_id || '-debit'
      WHEN 'credit'   THEN amount > 0 AND op_id = transfer_id || '-credit'
      WHEN 'reversal' THEN amount > 0 AND op_id = transfer_id || '-reversal'
      WHEN 'void'     THEN amount = 0 AND op_id IN (transfer_id || '-debit', transfer_id || '-credit')
    END IS TRUE)
) STRICT, WITHOUT ROWID;

-- After, not before: a BEFORE trigger would also fire for an entry that is already there, and refuse its retry.
CREATE TRIGGER IF NOT EXISTS entry_moves_balance AFTER INSERT ON entries WHEN NEW.kind <> 'void' BEGIN
  INSERT INTO accounts SELECT NEW.account, 0 WHERE NEW.kind = 'opening';
  UPDATE accounts SET balance = balance + NEW.amount WHERE account = NEW.account;
  SELECT RAISE(ABORT, 'unknown account') WHERE changes() = 0;
  SELECT RAISE(ABORT, 'insufficient funds') FROM accounts WHERE account = NEW.account AND balance < 0;
  SELECT RAISE(ABORT, 'a transfer never pays out more than it took') WHERE 0 < (
    SELECT SUM(amount) FROM entries WHERE op_id IN
      (NEW.transfer_id || '-debit', NEW.transfer_id || '-credit', NEW.transfer_id || '-reversal'));
END;

CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'entries are final'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'entries are final'); END;
"""

LOCK = (
    threading.RLock()
)  # steps run on many threads and share one connection: a write and its read-back belong together


class TransferRejected(Exception):
    """A business refusal: unknown account, insufficient funds, a target that says no. Not retried; compensated."""


class OperationConflict(Exception):
    """An op id, or a transfer's id, is used again for something else. Never compensated, never silent."""


def open_ledger(path: str = ":memory:", factory: type[sqlite3.Connection] = sqlite3.Connection) -> sqlite3.Connection:
    """The ledger at `path`, created if it is not there. Raises sqlite3.Error if it cannot be used.

    A commit survives power loss: WAL with synchronous = FULL (https://sqlite.org/pragma.html#pragma_synchronous).
    """
    db = sqlite3.connect(path, timeout=5, check_same_thread=False, autocommit=True, factory=factory)
    schema = "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL"
    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as model:
            expected = set(model.executescript(SCHEMA).execute(schema))
        found = set(db.execute(schema))
        if not found:
            db.executescript(f"PRAGMA journal_mode = WAL; BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
        elif not expected <= found:
            raise sqlite3.DatabaseError("it is no ledger of this program: a table or a guard is missing")
        # Without recursive_triggers, INSERT OR REPLACE deletes an entry behind the back of no_delete.
        db.executescript("PRAGMA synchronous = FULL; PRAGMA recursive_triggers = ON;")
        db.set_authorizer(only_entries_move_balances)
    except BaseException:
        db.close()
        raise
    return db


def only_entries_move_balances(
    action: int, table: str | None, _column: object, _db: object, trigger: str | None
) -> int:
    """SQLITE_DENY for a write to accounts that no trigger makes (https://sqlite.org/c3ref/set_authorizer.html)."""
    writes = (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE)
    return sqlite3.SQLITE_DENY if table == "accounts" and action in writes and not trigger else sqlite3.SQLITE_OK


def settle(
    db: sqlite3.Connection,
    op_id: str,
    account: str,
    amount: int,
    kind: str,
    counterparty: str | None = None,
    void: str | None = None,
) -> str | None:
    """The reason of the void that holds `op_id`, or None: its entry does. Unless it has settled, this settles it.

    Writes the entry of `amount` cents or, given a reason in `void`, its void. Raises OperationConflict if the op id
    holds something else, and sqlite3.IntegrityError if the ledger refuses the entry. After any other sqlite3.Error
    nobody knows what holds it: ask again.
    """
    transfer_id = None if kind == "opening" else op_id.removesuffix(f"-{kind}")
    entry = (op_id, transfer_id, account, counterparty, amount, kind, None)
    voided = f"{kind} of {cents(abs(amount))}: "  # the entry that a void forbids, to the cent
    row = entry if void is None else (*entry[:4], 0, "void", voided + void)
    with LOCK:
        # DO NOTHING is for a used op id alone; INSERT OR IGNORE would also ignore a broken CHECK.
        db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (op_id) DO NOTHING", row)
        holder: tuple[Any, ...] = db.execute("SELECT * FROM entries WHERE op_id = ?", (op_id,)).fetchone()
    if holder == entry:
        return None
    if holder[:6] == (*entry[:4], 0, "void") and holder[6].startswith(voided):
        return str(holder[6])
    raise OperationConflict(f"{op_id} is taken by another: {holder[1:]}, where this is {entry[1:]}")


def open_account(db: sqlite3.Connection, account: str, opening: int = 0) -> None:
    """Opens `account` with `opening` cents, once. Raises OperationConflict if it was opened with another amount."""
    settle(db, f"{account}-opening", account, opening, "opening")


def balance(db: sqlite3.Connection, account: str) -> int:
    """Cents in `account`. Raises LookupError if there is no such account."""
    with LOCK:
        row = db.execute("SELECT balance FROM accounts WHERE account = ?", (account,)).fetchone()
    if row is None:
        raise LookupError(f"unknown account: {account!r}")
    return int(row[0])


def in_flight(db: sqlite3.Connection) -> list[tuple[str, str, str, int]]:
    """(transfer_id, source, target, cents) of each transfer debited, and neither credited nor reversed."""
    with LOCK:
        return db.execute("""
            SELECT transfer_id, account, counterparty, -net FROM (
              SELECT transfer_id, account, counterparty, (
                SELECT SUM(amount) FROM entries WHERE op_id IN
                  (debit.op_id, debit.transfer_id || '-credit', debit.transfer_id || '-reversal')) AS net
              FROM entries AS debit WHERE kind = 'debit')
            WHERE net < 0""").fetchall()


def cents(amount: int) -> str:
    """An amount of cents as people write it: -3000 is '-30.00'."""
    return f"{'-' if amount < 0 else ''}{abs(amount) // 100}.{abs(amount) % 100:02}"


# ---- The steps: each writes one row, once ----------------------------------------------------------------------------


def apply_entry(
    ctx: Context, op_id: str, account: str, amount: int, kind: str, *, counterparty: str | None = None
) -> None:
    """Writes an entry of `amount` cents, once however often it runs.

    Raises TransferRejected if the ledger refuses it or its op id is void, OperationConflict as `settle` does.
    """
    try:
        reason = settle(ctx.get_dependency("db"), op_id, account, amount, kind, counterparty)
    except sqlite3.IntegrityError as refusal:
        reason = str(refusal)
    if reason is not None:
        raise TransferRejected(reason)


def void_entry(
    ctx: Context, op_id: str, account: str, amount: int, kind: str, reason: str, *, counterparty: str | None = None
) -> str | None:
    """The reason why that entry never happened and never will, or None: it did happen, whatever its caller heard.

    Raises OperationConflict as `settle` does.
    """
    storable = reason.encode(errors="backslashreplace").decode()  # any reason will do; what matters is the void
    return settle(ctx.get_dependency("db"), op_id, account, amount, kind, counterparty, void=storable)


def credit_target(
    ctx: Context, op_id: str, account: str, amount: int, *, counterparty: str | None = None, fail: bool = False
) -> None:
    """Credits the target with `amount` cents; `fail` simulates a target that says no. Raises as `apply_entry` does."""
    if fail:
        raise TransferRejected("the target refused it (simulated)")
    apply_entry(ctx, op_id, account, amount, "credit", counterparty=counterparty)


# ---- The saga ---------------------------------------------------------------------------------------------------------

FINAL = (TransferRejected, OperationConflict)  # answers. Any other exception is a fault, and the step is retried.


def transfer_money(
    ctx: Context, transfer_id: str, source: str, target: str, amount: int, *, simulate_credit_failure: bool = False
) -> Generator[Any, Any, dict[str, Any]]:
    """Moves `amount` cents and returns how it ended, as the ledger has it: committed, compensated or rejected.

    Its body runs again on every replay, so all that it does, it does in steps. Raises OperationConflict.
    """
    result = {"transfer_id": transfer_id, "status": "committed", "source": source, "target": target, "amount": amount}
    debit = (f"{transfer_id}-debit", source, -amount, "debit")
    credit = (f"{transfer_id}-credit", target, amount)
    reversal = (f"{transfer_id}-reversal", source, amount, "reversal")

    try:
        yield ctx.run(apply_entry, *debit, counterparty=target).options(non_retryable_exceptions=FINAL)
    except TransferRejected as refusal:
        reason = yield ctx.run(void_entry, *debit, str(refusal), counterparty=target).options(
            non_retryable_exceptions=FINAL
        )
        if reason is not None:
            return result | {"status": "rejected", "error": reason}

    try:
        # Never: how often to ask a target that fails is its own affair. Ask once, and on any failure give up on the op.
        yield ctx.run(credit_target, *credit, counterparty=source, fail=simulate_credit_failure).options(
            retry_policy=Never()
        )
    except Exception as failure:  # it may have landed all the same: only the void can tell
        reason = yield ctx.run(
            void_entry, *credit, "credit", str(failure) or repr(failure), counterparty=source
        ).options(non_retryable_exceptions=FINAL)
        if reason is not None:
            yield ctx.run(apply_entry, *reversal, counterparty=target).options(non_retryable_exceptions=FINAL)
            return result | {"status": "compensated", "error": reason}
    return result


# ---- Running it -------------------------------------------------------------------------------------------------------


class SagaLogger(logging.Logger):
    """The SDK's log, less its ERROR for each step that was answered with a refusal: the saga reports those."""

    def handle(self, record: logging.LogRecord) -> None:
        if not re.search(r" failed with (TransferRejected|OperationConflict)\(", record.getMessage()):
            super().handle(record)


def start(db: sqlite3.Connection, *, remote: bool = False) -> tuple[Resonate, Function[Any, Any]]:
    """The SDK, started, and `transfer_money` registered with it: what `submit` and `recover` take as `transfer`."""
    logging.setLoggerClass(SagaLogger)
    resonate = Resonate.remote(log_level="WARNING") if remote else Resonate.local(log_level="WARNING")
    resonate.set_dependency("db", db)
    transfer = resonate.register(transfer_money)
    resonate.start()
    return resonate, transfer


def submit(
    transfer: Function[Any, Any],
    transfer_id: str,
    source: str,
    target: str,
    amount: int,
    *,
    simulate_credit_failure: bool = False,
) -> dict[str, Any]:
    """Runs a transfer of `amount` cents under its id, and returns its result: the same one however often it is asked.

    Raises ValueError for what is no transfer, before anything is written, and OperationConflict if the id is taken.
    """
    if not (isinstance(transfer_id, str) and re.fullmatch("[A-Za-z0-9_-]{1,64}", transfer_id)):
        # The SDK calls the steps of transfer 'a' 'a.1' and 'a.2', and puts ids into URLs as they are.
        raise ValueError(f"a transfer id is 1 to 64 of A-Z a-z 0-9 _ -, not {transfer_id!r:.80}")
    for account in (source, target):
        if not (isinstance(account, str) and account and not re.search("[\ud800-\udfff]", account)):
            raise ValueError(f"an account is a text that is not empty, not {account!r:.80}")
    if source == target:
        raise ValueError(f"source and target are the same account, {source!r:.80}: name two")
    if type(amount) is not int or not 0 < amount < 2**63:
        raise ValueError(f"an amount is a whole number of cents, above zero and below 2**63, not {amount!r:.80}")

    request = {"transfer_id": transfer_id, "source": source, "target": target, "amount": amount}
    with contextlib.suppress(OperationConflict):
        result = transfer.run(transfer_id, **request, simulate_credit_failure=simulate_credit_failure)
        if request.items() <= result.items():
            return result
    # The promise of this name is about another transfer. Whose the id is, the ledger says: ask it under a name that
    # holds the whole request, so that a wrong request cannot spoil the answer to the right one.
    name = f"{transfer_id}~{hashlib.sha256(json.dumps(request).encode()).hexdigest()}"
    return transfer.run(name, **request, simulate_credit_failure=simulate_credit_failure)


def recover(db: sqlite3.Connection, transfer: Function[Any, Any]) -> list[dict[str, Any]]:
    """Finishes every transfer in flight and returns their results; one that cannot be finished is named on stderr.

    The ledger alone is enough: a debit names its target and its amount.
    """
    results = []
    for transfer_id, source, target, amount in in_flight(db):
        try:
            results.append(submit(transfer, transfer_id, source, target, amount))
        except (ValueError, *FINAL) as error:
            print(f"error: {printable(transfer_id)} stays in flight: {printable(str(error))}", file=sys.stderr)
    return results


# ---- What the commands do ---------------------------------------------------------------------------------------------


class CommandLedger(sqlite3.Connection):
    """The ledger of a command. A fault in a step ends the process: every crash is safe, so there is nothing to wait for."""

    path = ""
    crash_after: str | None = None  # a kind: end as kill -9 would, right after an entry of that kind is committed

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


def open_command_ledger(path: str, crash_after: str | None = None) -> sqlite3.Connection:
    """The ledger of a command, at `path`. A new one starts with two demo accounts. Raises sqlite3.Error."""
    CommandLedger.path, CommandLedger.crash_after = path, crash_after
    db = open_ledger(os.path.abspath(path), CommandLedger)
    if db.execute("SELECT 1 FROM entries").fetchone() is None:
        # One statement: no crash can leave one of them without the other.
        db.execute("""INSERT INTO entries VALUES ('alice-opening', NULL, 'alice', NULL, 10000, 'opening', NULL),
            ('bob-opening', NULL, 'bob', NULL, 5000, 'opening', NULL) ON CONFLICT (op_id) DO NOTHING""")
    return db


def failed(error: BaseException | str) -> int:
    """Says in one line on stderr what is wrong and what to do. Returns the exit status, 2."""
    line = str(error)
    if isinstance(error, sqlite3.Error):
        line = f"{CommandLedger.path}: {error}. Nothing is lost: mend that, then run the same command again"
    print(f"error: {printable(line)}", file=sys.stderr, flush=True)
    return 2


def printable(text: str) -> str:
    """`text`, escaped if it holds what could drive a terminal."""
    return text if text.isprintable() else ascii(text)


def table(rows: Iterable[Iterable[Any]]) -> None:
    """Prints rows in aligned columns."""
    cells = [[printable(str("" if cell is None else cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())


def show_entries(db: sqlite3.Connection, transfer_id: str | None = None) -> None:
    """Prints the entries of one transfer, or of the whole ledger."""
    rows = db.execute(
        "SELECT op_id, kind, account, amount, reason FROM entries WHERE ?1 IS NULL OR transfer_id = ?1 "
        "ORDER BY transfer_id, amount, op_id",
        (transfer_id,),
    )
    table((op_id, kind, account, f"{cents(amount):>9}", reason) for op_id, kind, account, amount, reason in rows)


def adds_up(db: sqlite3.Connection) -> bool:
    """Whether every cent is somewhere, and every balance the sum of its entries. Prints the sums in one line."""
    balances = dict(db.execute("SELECT account, balance FROM accounts").fetchall())
    sums, openings = dict.fromkeys(balances, 0), 0
    for account, amount, kind in db.execute("SELECT account, amount, kind FROM entries"):
        sums[account] = sums.get(account, 0) + amount
        openings += amount if kind == "opening" else 0
    held, flying = sum(balances.values()), sum(amount for *_, amount in in_flight(db))
    true = sums == balances and min(sums.values(), default=0) >= 0 and held + flying == openings
    verdict = "every cent is somewhere" if true else "IT DOES NOT ADD UP"
    print(f"balances {cents(held)} + in flight {cents(flying)}, openings {cents(openings)}: {verdict}")
    return true


def transfer_command(args: argparse.Namespace) -> int:
    _, transfer = start(open_command_ledger(args.ledger, args.crash_after))
    result = submit(transfer, args.id, args.source, args.target, args.amount, simulate_credit_failure=args.fail_credit)
    print(json.dumps(result))
    return 0 if result["status"] == "committed" else 1


def recover_command(args: argparse.Namespace) -> int:
    db = open_command_ledger(args.ledger)
    _, transfer = start(db)
    for result in recover(db, transfer):
        print(json.dumps(result))
    return 1 if in_flight(db) else 0


def journal_command(args: argparse.Namespace) -> int:
    db = open_command_ledger(args.ledger)
    db.execute("BEGIN")  # one snapshot, whatever others write meanwhile
    print("entries")
    show_entries(db)
    print("balances")
    table((account, f"{cents(amount):>9}") for account, amount in db.execute("SELECT * FROM accounts"))
    print("in flight")
    table((name, f"{source} -> {target}", f"{cents(amount):>9}") for name, source, target, amount in in_flight(db))
    return 0 if adds_up(db) else 1


# ---- The tour ---------------------------------------------------------------------------------------------------------


def tour(_args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ledger.db")
        db = open_command_ledger(path)
        _, transfer = start(db)

        def show(transfer_id: str, status: str, *expected: int) -> None:
            show_entries(db, transfer_id)
            seen = balance(db, "alice"), balance(db, "bob"), sum(amount for *_, amount in in_flight(db))
            print("  {}: alice {}, bob {}, in flight {}\n".format(status, *map(cents, seen)))
            if seen != expected:
                raise SystemExit(f"error: the tour claims {expected} here, and the ledger says {seen}")

        print("alice has 100.00 and bob has 50.00, on a ledger in one SQLite file.\n")

        print("1. A commit: alice pays bob 30.00.")
        first = submit(transfer, "t1", "alice", "bob", 3000)
        show("t1", first["status"], 7000, 8000, 0)

        print("2. The target refuses 20.00. First its op id is made void, and only then is the debit reversed.")
        result = submit(transfer, "t2", "alice", "bob", 2000, simulate_credit_failure=True)
        show("t2", result["status"], 7000, 8000, 0)

        print("3. alice cannot pay 500.00. The void says that she has not, and never will under this id.")
        result = submit(transfer, "t3", "alice", "bob", 50000)
        show("t3", result["status"], 7000, 8000, 0)

        print("4. The first again, under the same id, with a promise store that has forgotten it: nothing moves.")
        _, forgetful = start(db)
        again = submit(forgetful, "t1", "alice", "bob", 3000)
        show("t1", again["status"], 7000, 8000, 0)

        command = ["main.py", "transfer", "t5", "alice", "bob", "10", "--crash-after", "debit"]
        print(f"5. A crash. $ python {' '.join(command)}")
        command = [sys.executable, os.path.abspath(__file__), *command[1:], "--ledger", path]
        child = subprocess.run(command, check=False)
        show("t5", str(signal.strsignal(-child.returncode)).lower(), 6000, 8000, 1000)

        print("6. $ python main.py recover. The ledger alone is enough to finish it.")
        (result,) = recover(db, transfer)
        show("t5", result["status"], 6000, 9000, 0)
        return 0 if adds_up(db) else 1


# ---- The command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(failed(f"{message}; see python main.py --help"))


def parse_amount(text: str) -> int:
    """Cents of an amount as people write it: '30' and '30.00' are 3000."""
    if not (match := re.fullmatch(r"([0-9]{1,17})(?:\.([0-9]{1,2}))?", text)):
        raise argparse.ArgumentTypeError(f"an amount is written 30 or 30.00, not {text!r:.80}")
    return int(match[1]) * 100 + int((match[2] or "").ljust(2, "0"))


def parse_arguments() -> argparse.Namespace:
    ledger = argparse.ArgumentParser(add_help=False)
    ledger.add_argument("--ledger", metavar="FILE", default="ledger.db", help="an SQLite file (default: %(default)s)")
    parser = Parser(prog="main.py", description="Without a command: a tour.", allow_abbrev=False)
    parser.set_defaults(run=tour)
    commands = parser.add_subparsers(metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        name = run.__name__.removesuffix("_command")
        added = commands.add_parser(name, help=help, description=help, parents=[ledger], allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    transfer = command(transfer_command, "run one transfer and print its result as JSON")
    transfer.add_argument("id", metavar="ID", help="1 to 64 of A-Z a-z 0-9 _ -; the same id is the same transfer")
    transfer.add_argument("source", metavar="SOURCE")
    transfer.add_argument("target", metavar="TARGET")
    transfer.add_argument("amount", metavar="AMOUNT", type=parse_amount, help="such as 30 or 30.00")
    transfer.add_argument("--fail-credit", action="store_true", help="let the target refuse the credit")
    transfer.add_argument(
        "--crash-after",
        choices=("debit", "credit", "void", "reversal"),
        help="end as kill -9 would, right after this entry is committed",
    )
    command(recover_command, "finish every transfer in flight and print their results as JSON")
    command(journal_command, "show entries, balances, what is in flight, and whether it all adds up")
    return parser.parse_args()


def main() -> int:
    """Runs the command that the command line names, and returns its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on unwind, so that the tour can clean up
    try:
        try:
            args = parse_arguments()
            return args.run(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        os._exit(130)
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (OSError, ValueError, sqlite3.Error, *FINAL) as error:
        return failed(error)


if __name__ == "__main__":
    sys.exit(main())
