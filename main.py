"""A money transfer that loses no money and makes none, whatever crashes: all of it in this one file.

The usual saga (debit; credit; if that fails, reverse the debit) makes money: the credit lands but reports a failure (a
timeout, a frozen worker, lost memory), and the reversal pays back what was paid out. One law closes every such gap:

    An op id settles once, as an entry or as a void. Whoever gives up on an op must first take its op id.

    debit -- entry --> credit -- entry -----------------> committed
      |                  `------ void --> reversal -----> compensated
      `----- void --------------------------------------> rejected

entry      one final row of the ledger, in cents: an opening, a debit (below zero), a credit or a reversal (above zero)
op id      the key of an entry, its transfer's id and its kind: `t1-debit`
void       a row of amount zero under an op id: that entry never happened and never will; it keeps the reason
in flight  debited, and neither credited nor reversed yet

Resonate's promise store decides when work is done, the ledger what happened. What the first forgets, repeats or does
too late, the second answers the same way. `python main.py` shows it; `python main.py --help` lists the commands.
"""

import argparse
import contextlib
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
from collections import Counter
from collections.abc import Generator
from decimal import Decimal
from typing import Any

if __name__ == "__main__":  # Ctrl-C is quiet from here on: the next import takes a moment
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import resonate.resonate as sdk
from resonate import Context, Resonate
from resonate.encoders import JsonEncoder
from resonate.errors import ResonateCanceledError, ResonateTimedoutError
from resonate.retry_policies import Constant, Never
from resonate.stores import LocalStore, RemoteStore

# ---- The ledger: what happened ---------------------------------------------------------------------------------------
SCHEMA = """
-- The balance, in cents, is the sum of the account's entries, kept by entry_moves_balance alone.
CREATE TABLE IF NOT EXISTS accounts (account TEXT PRIMARY KEY, balance INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (
  op_id TEXT PRIMARY KEY, transfer_id TEXT, -- NULL for an opening
  account TEXT NOT NULL, counterparty TEXT,
  amount ANY CHECK (typeof(amount) = 'integer'), -- cents; as INTEGER, STRICT would let 30.0 in
  kind TEXT CONSTRAINT "op id, kind and amount agree" CHECK (CASE kind
    WHEN 'opening'  THEN op_id = account || '-opening' AND transfer_id IS NULL
    WHEN 'debit'    THEN amount < 0 AND op_id = transfer_id || '-debit'
    WHEN 'credit'   THEN amount > 0 AND op_id = transfer_id || '-credit'
    WHEN 'reversal' THEN amount > 0 AND op_id = transfer_id || '-reversal'
    WHEN 'void'     THEN amount = 0 AND op_id IN (transfer_id || '-debit', transfer_id || '-credit')
  END IS TRUE),
  reason TEXT CHECK ((reason IS NOT NULL) = (kind = 'void'))
) STRICT, WITHOUT ROWID;
-- By MIN(amount), account and counterparty are those of the debit: https://sqlite.org/lang_select.html#bareagg
CREATE VIEW IF NOT EXISTS in_flight (transfer_id, source, target, amount) AS SELECT transfer_id, account, counterparty,
  -SUM(amount) FROM entries WHERE kind <> 'opening' GROUP BY transfer_id HAVING SUM(amount) < 0 AND MIN(amount) < 0;
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
LOCK = threading.RLock()  # steps run on several threads over one connection: none reads back the row of another


class OperationConflict(Exception):
    """An op id, or a transfer's id, is used again for something else. Never compensated, never silent."""


class TransferRejected(Exception):
    """A business refusal: unknown account, insufficient funds, a target that says no. Not retried; compensated."""


def open_ledger(path: str = ":memory:", factory: type[sqlite3.Connection] = sqlite3.Connection) -> sqlite3.Connection:
    """The ledger at `path`, created if there is none. Raises sqlite3.Error if it cannot be used."""
    with contextlib.closing(sqlite3.connect(path)) as there, contextlib.closing(sqlite3.connect(":memory:")) as model:
        found, ours = ({*db.execute("SELECT sql FROM sqlite_schema")} for db in (there, model.executescript(SCHEMA)))
    if (found and not found >= ours) or (os.path.exists(path) and 0 < os.path.getsize(path) < 512):
        raise sqlite3.DatabaseError("not a ledger of this program, or without one of its guards")
    db = sqlite3.connect(path, timeout=5, check_same_thread=False, autocommit=True, factory=factory)
    if not found:
        db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT")
    with contextlib.suppress(sqlite3.OperationalError):  # busy with another process: the next open sets it
        db.executescript("PRAGMA journal_mode = WAL")
    # FULL: a commit survives power loss. Without recursive_triggers, INSERT OR REPLACE would pass by no_delete.
    db.executescript("PRAGMA synchronous = FULL; PRAGMA recursive_triggers = ON")
    # A balance moves by an entry: True denies what else would write to accounts, and is no trigger.
    db.set_authorizer(lambda act, on, _, __, trigger: on == "accounts" and act != sqlite3.SQLITE_READ and not trigger)
    return db


def settle(
    db: sqlite3.Connection, op_id: str, account: str, amount: int, kind: str, other: str | None, void: str | None = None
) -> str | None:
    """None if the entry of `amount` cents stands, or the reason of its void; writes the one asked for if neither does.
    Raises OperationConflict if another row stands, IntegrityError if refused, another sqlite3.Error: nobody knows."""
    transfer_id = None if kind == "opening" else op_id.removesuffix(f"-{kind}")
    entry = (op_id, transfer_id, account, other, amount, kind, None)
    forbids = f"{kind} of {Decimal(abs(amount)).scaleb(-2)}: "
    row = entry if void is None else (*entry[:4], 0, "void", forbids + void)
    with LOCK:
        # What went in stands; else read who has the op id. INSERT OR IGNORE would pass over a broken CHECK, too.
        done = db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (op_id) DO NOTHING", row)
        stands: Any = row if done.rowcount else db.execute("SELECT * FROM entries WHERE op_id = ?", (op_id,)).fetchone()
    if stands == entry:
        return None
    # A void forbids the amount that it names, or, written by hand without one, any.
    if stands[:6] == (*entry[:4], 0, "void") and (stands[6].startswith(forbids) or f"{kind} of " not in stands[6]):
        return str(stands[6])
    raise OperationConflict(f"{op_id!r} stands for something else, {stands[1:]}: see the journal, or take a new id")


def open_account(db: sqlite3.Connection, account: str, opening: int = 0) -> None:
    """Opens an account with `opening` cents, once. Raises OperationConflict if it was opened with another amount."""
    settle(db, f"{account}-opening", account, opening, "opening", None)


def balance(db: sqlite3.Connection, account: str) -> int:
    """Cents in an account. Raises LookupError if there is no such account."""
    with LOCK:
        for (cents,) in db.execute("SELECT balance FROM accounts WHERE account = ?", (account,)):
            return int(cents)
    raise LookupError(f"unknown account {account!r}")


def in_flight(db: sqlite3.Connection) -> list[tuple[str, str, str, int]]:
    """(transfer_id, source, target, cents) of each transfer debited, and neither credited nor reversed."""
    with LOCK:
        return db.execute("SELECT * FROM in_flight").fetchall()


# ---- The steps: each settles one op ----------------------------------------------------------------------------------
def apply_entry(
    ctx: Context, op_id: str, account: str, amount: int, kind: str, *, counterparty: str | None = None
) -> None:
    """Writes an entry of `amount` cents, once however often it runs. Raises TransferRejected if the ledger refuses it
    or its void stands, and OperationConflict as `settle` does."""
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
# A refusal, of exactly these types, is an answer. What else such a step raises is a fault, and the SDK runs it again.
UNTIL_ANSWERED: dict[str, Any] = {"non_retryable_exceptions": (TransferRejected, OperationConflict)}


def transfer_money(
    ctx: Context, transfer_id: str, source: str, target: str, amount: int, *, simulate_credit_failure: bool = False
) -> Generator[Any, Any, dict[str, Any]]:
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
        # Not again: after a failure, the ledger answers. JSON makes text of it: what cannot be unpickled ends the SDK.
        yield attempt.options(retry_policy=Never(), encoder=JsonEncoder())
    except Exception as failure:  # any: what failed to answer may have landed
        reason = yield ctx.run(give_up, failure, *credit, source).options(**UNTIL_ANSWERED)
        if reason is not None:
            yield ctx.run(apply_entry, *reversal, counterparty=target).options(**UNTIL_ANSWERED)
            return result | {"status": "compensated", "error": reason}
    return result


# ---- Running it ------------------------------------------------------------------------------------------------------
type Saga = sdk.Function[..., dict[str, Any]]
GROUP = "money-transfer"  # whose workers get our transfers, and nothing else: a stranger's task would end them
LOG = logging.getLogger(GROUP)  # what the SDK says of steps, less the refusals: the saga answers for those
LOG.addFilter(lambda record: not re.search(r"failed with (TransferRejected|OperationConflict)\(", record.getMessage()))


def start(
    db: sqlite3.Connection, *, remote: bool = False, group: str = GROUP, workflow: Any = transfer_money
) -> tuple[Resonate, Saga]:
    """The SDK, started on this ledger, and the workflow as `submit` and `recover` take it. Promises are in memory or,
    with `remote`, on the server that RESONATE_HOST and so on name: raises ConnectionError if there is none."""
    vars(sdk)["ContextLogger"] = lambda *_: LOG  # the SDK would make one for each step, and slow down threefold
    resonate: Any = Resonate.remote(group=group) if remote else Resonate.local(group=group)
    store = resonate._store
    if remote:
        messages = resonate._message_source.url.rsplit("/", 2)[0]
        try:  # both ports, once, where the SDK would try for ever
            socket.create_connection(re.findall("//(.+):([0-9]+)", messages)[0], timeout=2).close()
            RemoteStore(timeout=2, retry_policy=Constant(max_retries=-1)).tasks.heartbeat(pid="nobody")
        except Exception as error:
            problem = f"no Resonate server at {store.url} and {messages} ({error!r:.60})"
            raise ConnectionError(f"{problem}: start `resonate serve`, version 0.8.2") from error
    else:  # its threads share the store, and only one takes its lock: at hundreds of transfers at once the process died
        store._cond = type("Lock", (threading.Condition, contextlib.ContextDecorator), {})()  # can wrap a method
        for part in (store.promises, store.tasks):
            for name, method in inspect.getmembers(part, inspect.ismethod):
                setattr(part, name, store._cond(method))
    resonate.set_dependency("db", db)
    transfer = resonate.register(workflow, name="transfer_money").options(target=GROUP)
    resonate.start()
    return resonate, transfer


def submit(
    transfer: Saga, transfer_id: str, source: str, target: str, amount: int, *, simulate_credit_failure: bool = False
) -> dict[str, Any]:
    """Runs a transfer of `amount` cents under its id and returns its result, the same one each time it is asked. Raises
    ValueError before anything is written if this can be no transfer, OperationConflict if its id is another's."""
    # To the SDK, the steps of `a` are called `a.1` and `a.2`, and it puts ids into URLs as they are.
    if not (isinstance(transfer_id, str) and re.fullmatch("[A-Za-z0-9_-]{1,64}", transfer_id)):
        raise ValueError(f"a transfer id is 1 to 64 of A-Z a-z 0-9 _ -, not {transfer_id!r:.80}")
    named = (isinstance(name, str) and name and not re.search("[\ud800-\udfff]", name) for name in (source, target))
    if not all(named) or source == target:
        raise ValueError(f"source and target are the names of two accounts, not {source!r:.80} and {target!r:.80}")
    if type(amount) is not int or not 0 < amount < 2**63:
        raise ValueError(f"an amount is a whole number of cents above 0 and below 2**63, not {amount!r:.80}")
    request = {"transfer_id": transfer_id, "source": source, "target": target, "amount": amount}
    with contextlib.suppress(OperationConflict, TransferRejected, ResonateCanceledError, ResonateTimedoutError):
        result = transfer.run(transfer_id, **request, simulate_credit_failure=simulate_credit_failure)
        if request.items() <= result.items():
            return result
    fresh = f"{transfer_id}~{os.urandom(8).hex()}"  # that promise keeps another answer: by a new one, the ledger's
    return transfer.run(fresh, **request, simulate_credit_failure=simulate_credit_failure)


def recover(db: sqlite3.Connection, transfer: Saga) -> list[dict[str, Any]]:
    """Finishes what is in flight, of which a debit tells all. Returns the results; names on stderr what stays there."""
    results, in_memory = [], isinstance(transfer._resonate._store, LocalStore)
    for number, batch in enumerate(itertools.batched(in_flight(db), 200)):  # a store in memory slows down as it fills
        resonate, saga = start(db, workflow=transfer.func) if in_memory and number else (None, transfer)
        for request in batch:
            try:
                results.append(submit(saga, *request))
            except Exception as error:
                print(f"error: {request[0]!r} stays in flight: {error}", file=sys.stderr, flush=True)
        if resonate is not None:
            resonate.stop()
            vars(resonate._bridge).clear()  # a thread of it never ends, and would keep it all
    return results


# ---- The command line ------------------------------------------------------------------------------------------------
def command_ledger(path: str, crash_after: str | None) -> sqlite3.Connection:
    """The ledger of a command. A new one has two demo accounts. After an entry of that kind, it dies as by kill -9."""

    class Ledger(sqlite3.Connection):
        def execute(self, sql: str, row: Any = (), /) -> sqlite3.Cursor:
            cursor = super().execute(sql, row)
            if crash_after in row[5:6]:
                os.kill(os.getpid(), signal.SIGKILL)
            return cursor

    db = open_ledger(os.path.abspath(path), Ledger)
    if not db.execute("SELECT 1 FROM entries").fetchone():  # one statement: it gets both accounts, or neither
        db.execute("""INSERT INTO entries VALUES ('alice-opening', NULL, 'alice', NULL, 10000, 'opening', NULL),
            ('bob-opening', NULL, 'bob', NULL, 5000, 'opening', NULL) ON CONFLICT (op_id) DO NOTHING""")
    return db


def journal(db: sqlite3.Connection, only: str | None = None) -> bool:
    """Prints entries (of one transfer, or all), what is in flight, and balances. Returns whether it all adds up."""
    with LOCK:  # one statement is one snapshot, whatever others write meanwhile
        rows = db.execute("""
            SELECT 1, transfer_id, op_id, kind, account, amount, reason FROM entries UNION ALL
            SELECT 0, transfer_id, transfer_id, 'in flight', source, amount, 'to ' || target FROM in_flight UNION ALL
            SELECT -1, account, '', 'balance', account, balance, NULL FROM accounts ORDER BY 1 DESC, 2, 6""").fetchall()
    total, off = Counter[str](), Counter[str]()  # by kind; by account, how far its balance is from its entries
    for sign, transfer_id, op_id, kind, account, amount, note in rows:
        total[kind] += amount
        off[account] += sign * amount
        if sign < 1 or only in (None, transfer_id):
            line = f"  {op_id:13} {kind:9} {account:9} {Decimal(amount).scaleb(-2):>9}  {note or ''}".rstrip()
            print(line if line.isprintable() else ascii(line))  # a name must not drive the terminal
    held, flying, opened = (Decimal(total[kind]).scaleb(-2) for kind in ("balance", "in flight", "opening"))
    true = held + flying == opened and not any(off.values())
    verdict = "every cent is somewhere" if true else "IT DOES NOT ADD UP"
    print(f"  balances {held} + in flight {flying}, openings {opened}: {verdict}", flush=True)
    return true


def tour() -> int:
    """The story: each scene is a command that anybody can type, checked against its claim. Returns the exit status."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # leaves by way of the folder's clean-up
    scenes = (  # the transfer, what happens, the command, its exit status, and the cents of alice and bob
        ("t1", "alice pays bob", "transfer t1 alice bob 30", 0, 7000, 8000),
        ("t2", "The credit is refused, the debit reversed", "transfer t2 alice bob 20 --fail-credit", 1, 7000, 8000),
        ("t3", "alice has no 500.00: the debit is made void", "transfer t3 alice bob 500", 1, 7000, 8000),
        ("t1", "The first again, by a process that remembers nothing", "transfer t1 alice bob 30", 0, 7000, 8000),
        ("t4", "kill -9 right after a debit", "transfer t4 alice bob 10 --crash-after debit", -9, 6000, 8000),
        ("t4", "Finished from the ledger alone", "recover", 0, 6000, 9000),
    )
    with tempfile.TemporaryDirectory() as folder:
        for only, title, words, *claim in scenes:
            print(f"\n# {title}\n$ python main.py {words}", flush=True)
            status = subprocess.call([sys.executable, __file__, *words.split(), "--ledger", f"{folder}/ledger.db"])
            with contextlib.closing(open_ledger(f"{folder}/ledger.db")) as db:
                if not journal(db, only) or claim != [status, balance(db, "alice"), balance(db, "bob")]:
                    return failed(f"the tour claims {claim}, and that is not so")
    return 0


def worker(db: sqlite3.Connection) -> int:
    """Works for GROUP until SIGINT or SIGTERM, which end it with status 0, and prints what it finishes."""

    def announced(*request: Any, **more: Any) -> Generator[Any, Any, dict[str, Any]]:
        result = yield from transfer_money(*request, **more)
        print(json.dumps(result), flush=True)
        return result

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
    store: Any = start(db, remote=True, workflow=announced)[0]._store
    print(f"worker of {GROUP} at {store.url}", flush=True)
    return threading.Event().wait()


def failed(error: object, ledger: str = "") -> int:
    """Says on stderr, in one line, what is wrong, and with a ledger, what to do. Returns the exit status, 2."""
    line = f"{ledger}: {error}. Nothing is lost: mend that, and run the same command again" if ledger else str(error)
    print("error:", line if line.isprintable() else ascii(line), file=sys.stderr, flush=True)
    return 2


def main() -> int:
    """Runs a command. Returns the exit status: 0 well, 1 not well (compensated, rejected, in flight), 2 an error."""
    cli = argparse.ArgumentParser("python main.py", exit_on_error=False, allow_abbrev=False)
    cli.add_argument("command", nargs="*", help="transfer ID SOURCE TARGET AMOUNT, recover, journal, worker")
    cli.add_argument("--ledger", metavar="FILE", default="ledger.db", help="default: %(default)s")
    cli.add_argument("--server", action="store_true", help="transfer, recover: by way of a Resonate server")
    cli.add_argument("--fail-credit", action="store_true", help="transfer: let the target refuse")
    cli.add_argument("--crash-after", choices=("debit", "credit", "void", "reversal"), help="kill -9 after such a row")
    try:
        args, unknown = cli.parse_known_intermixed_args()
        if len(sys.argv) == 1:
            return tour()
        command, *request = [*args.command, *unknown] or [""]
        takes = {"transfer": 4, "recover": 0, "journal": 0, "worker": 0}.get(command)
        if len(request) != takes or (args.fail_credit and command != "transfer"):
            raise ValueError(f"not a command: {' '.join(sys.argv[1:])!r:.80}; see python main.py --help")
        if request and not re.fullmatch(r"[0-9]{1,17}(\.[0-9]{1,2})?", request[3]):
            raise ValueError(f"an amount is written 30 or 30.00, not {request[3]!r:.80}")
        request[3:] = [int(Decimal(text).scaleb(2)) for text in request[3:]]  # cents
        with contextlib.closing(command_ledger(args.ledger, args.crash_after)) as db:
            # A fault in a step ends a command: every crash is safe, so it need not wait.
            LOG.addFilter(lambda record: os._exit(failed(vars(record)["args"][2], args.ledger)))  # what it failed with
            if command == "journal":
                return not journal(db)
            if command == "worker":
                return worker(db)
            # A client has a group of its own: in that of the workers it would be handed transfers, and leave.
            _, transfer = start(db, remote=args.server, group=f"client-{os.urandom(8).hex()}")
            if command == "recover":
                for result in recover(db, transfer):
                    print(json.dumps(result), flush=True)
                return bool(in_flight(db))
            result = submit(transfer, *request, simulate_credit_failure=args.fail_credit)
            print(json.dumps(result), flush=True)
            return 0 if result["status"] == "committed" else 1
    except Exception as error:  # who closed the pipe, as `| head` does, knows
        ledger = args.ledger if isinstance(error, sqlite3.Error) else ""
        return 2 if isinstance(error, BrokenPipeError) else failed(error, ledger)


if __name__ == "__main__":
    sys.exit(main())
