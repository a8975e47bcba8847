"""What it costs, measured: `uv run tests/benchmark.py` prints a table in Markdown.

It compares this project's saga, "ours", with "published": the saga of
https://github.com/resonatehq-examples/example-money-transfer-py for SDK 0.6. Each measurement has a
process of its own, with a new ledger and a warm-up. The two take turns, in five rounds: a row gives
the medians, and the median of the rounds' ratios.

The published saga runs on the SDK as it is. There, each transfer is slower than the last, and in
time the SDK shuts down or ends the process. So a measurement makes only a few hundred transfers, of
both alike, and "dies" stands in the table where the published saga does not survive even those.

--quick takes less than 30 seconds, and its figures are rough. Progress goes to stderr. All files
are in a temporary folder, which TMPDIR should have on a real disk.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest
import test_postgres
from resonate import Resonate
from resonate.errors import ResonateShutdownError
from resonate.retry_policies import Never

import main

STARTED = time.monotonic()
AT_ONCE = {1: "one at a time", 16: "16 at once"}  # by the number of threads

# ---- The two sagas ------------------------------------------------------------------------------

# A saga on a new ledger is two functions: one makes the transfer of an id, and returns its status;
# the other returns the cents that bob has.


def ours(path, open_ledger=main.open_ledger):
    db = open_ledger(path)
    main.open_account(db, "alice", 10**12)
    main.open_account(db, "bob")
    bank = main.start(db)
    return (
        lambda transfer_id: main.submit(bank, transfer_id, "alice", "bob", 1)["status"],
        lambda: main.balance(db, "bob"),
    )


def published(path):
    """The idiom of the examples. WAL makes it faster; the lock keeps it from losing inserts."""
    db = sqlite3.connect(path, check_same_thread=False, autocommit=True)
    db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE entries (op_id TEXT PRIMARY KEY, account TEXT, amount INTEGER)")
    insert = "INSERT OR IGNORE INTO entries VALUES (?, ?, ?)"
    lock = threading.Lock()

    def apply_entry(ctx, op_id, account, amount):
        with lock:
            ctx.get_dependency("db").execute(insert, (op_id, account, amount))
        return op_id

    def transfer_money(ctx, transfer_id, source, target, amount):
        yield ctx.run(apply_entry, f"{transfer_id}-debit", source, -amount)
        try:
            credit = ctx.run(apply_entry, f"{transfer_id}-credit", target, amount)
            yield credit.options(retry_policy=Never())
        except Exception as error:
            yield ctx.run(apply_entry, f"{transfer_id}-reversal", source, amount)
            return {"transfer_id": transfer_id, "status": "compensated", "error": str(error)}
        return {"transfer_id": transfer_id, "status": "committed", "amount": amount}

    logging.getLogger("resonate.utils").disabled = True  # when the SDK dies, it says so on a page
    resonate = Resonate.local(log_level="CRITICAL")  # not mended: only `main.start` does that
    resonate.set_dependency("db", db)
    saga = resonate.register(transfer_money)
    resonate.start()  # or else the first transfers do it: several at once fail
    query = "SELECT sum(amount) FROM entries WHERE account = 'bob'"
    return (
        lambda transfer_id: saga.run(transfer_id, transfer_id, "alice", "bob", 1)["status"],
        lambda: db.execute(query).fetchone()[0],
    )


# ---- In a child process: a measurement ----------------------------------------------------------


def measure(saga, folder, threads, sizes):
    """Makes so many transfers, then so many more, and so on; without a folder, in memory. Returns
    for each size the transfers per second, and the memory of this process after them."""
    path = f"{folder}/{uuid.uuid4().hex}" if folder else ":memory:"
    if saga == "postgres":
        transfer, bobs_cents = ours(folder, test_postgres.open_ledger)
    else:
        transfer, bobs_cents = {"ours": ours, "published": published}[saga](path)
    figures = [(speed(transfer, threads, size), resident()) for size in sizes]
    assert bobs_cents() == sum(sizes), "the ledger does not have each transfer once"
    return figures


def speed(transfer, threads, count):
    """Transfers per second."""
    ids = [uuid.uuid4().hex for _ in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        statuses = set(pool.map(transfer, ids) if threads > 1 else map(transfer, ids))
        seconds = time.perf_counter() - started
    assert statuses == {"committed"}
    return count / seconds


def resident():
    """The memory of this process in KiB; not a number where the system does not tell."""
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else float("nan")
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def child(arguments):
    """Prints what `measure` returns. The exit status is 1 if the SDK dies, 2 after an error."""
    try:
        print(json.dumps(measure(*json.loads(arguments))), flush=True)
    except ResonateShutdownError:
        sys.exit(1)  # as where the SDK itself ends the process
    except Exception:
        traceback.print_exc()
        sys.exit(2)


# ---- The rows of the table ----------------------------------------------------------------------


def progress(text):
    print(f"{time.monotonic() - STARTED:4.0f} s  {text}", file=sys.stderr, flush=True)


def row(title, ours, published="", ratio=""):
    print(f"| {title} | {ours} | {published} | {ratio} |", flush=True)


def python(*words, **options):
    """Runs Python as a process, which ends with this call, and which a Ctrl-C does not reach."""
    command = [sys.executable, *words]
    return subprocess.run(command, text=True, timeout=120, process_group=0, **options)


def measured(saga, *where_and_what):
    """What `measure` returns in a child process, or None if the published saga has died there."""
    arguments = json.dumps([saga, *where_and_what])
    done = python(__file__, "--child", arguments, stdout=subprocess.PIPE)
    if saga == "published" and done.returncode == 1:
        return None
    done.check_returncode()
    return json.loads(done.stdout)


def comparison(where, folder, threads, rounds, sizes):
    """Prints the row of both sagas. The first of two sizes is a warm-up."""
    title = f"{where}, {AT_ONCE[threads]}"
    our_speeds, their_speeds, ratios = [], [], []
    for number in range(rounds):
        progress(f"{title}: round {number + 1} of {rounds}")
        our_speeds.append(measured("ours", folder, threads, sizes)[-1][0])
        if survived := measured("published", folder, threads, sizes):
            their_speeds.append(survived[-1][0])
            ratios.append(our_speeds[-1] / their_speeds[-1])
    cells = [f"{statistics.median(our_speeds):,.0f}", "dies"]
    if ratios:
        deaths = f" (dies in {rounds - len(ratios)} of {rounds})" if len(ratios) < rounds else ""
        cells[1] = f"{statistics.median(their_speeds):,.0f}{deaths}"
        cells.append(f"{statistics.median(ratios):.2f}")
    row(f"{title}, transfers/s", *cells)


def long_run(folder, threads, size):
    """Prints the rows of ten times `size` transfers: does our saga get slower, or larger?"""
    title = f"{10 * size:,} in one process, {AT_ONCE[threads]}"
    progress(title)
    (first, small), *_, (last, large) = measured("ours", folder, threads, [size] * 10)
    row(f"{title}: the first {size:,}, transfers/s", f"{first:,.0f}")
    row(f"{title}: the last {size:,}, transfers/s", f"{last:,.0f}")
    row(f"{title}: memory, KiB a transfer", f"{(large - small) / (9 * size):.1f}")


def on_postgres(rounds, sizes):
    """Prints the rows of our saga on PostgreSQL, on a server of its own."""
    with contextlib.contextmanager(conftest.postgres)() as server:
        for threads in AT_ONCE:
            title = f"on PostgreSQL, {AT_ONCE[threads]}"
            speeds = []
            for number in range(rounds):
                progress(f"{title}: round {number + 1} of {rounds}")
                url = conftest.new_database(server)
                speeds.append(measured("postgres", url, threads, sizes)[-1][0])
            row(f"{title}, transfers/s", f"{statistics.median(speeds):,.0f}")


def command(folder, rounds):
    """Prints the row of a transfer from the shell."""
    ledger = f"{folder}/command"
    with contextlib.closing(main.open_ledger(ledger)) as db:
        main.open_account(db, "alice", 10000)
        main.open_account(db, "bob")
    transfers = []
    for number in range(rounds):
        progress(f"a command: round {number + 1} of {rounds}")
        request = ["transfer", f"t{number}", "alice", "bob", "0.01", "--ledger", ledger]
        transfers.append(milliseconds(main.__file__, *request))
    row("`python main.py transfer ...`, ms", f"{statistics.median(transfers):,.0f}")


def milliseconds(*words):
    """From start to finish of a process."""
    started = time.perf_counter()
    python(*words, check=True, capture_output=True)
    return (time.perf_counter() - started) * 1000


def facts():
    """When and where this ran."""
    cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = cpu.partition("model name")[2].partition(": ")[2].partition("\n")[0]
    machine = f"{os.cpu_count()} cores ({model or platform.machine()})"
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return f"{time.strftime('%Y-%m-%d')}, {machine}, {versions}"


def run():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, and small numbers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the child and the folder go
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    rounds, sizes, tenth = (1, [20, 50], 100) if args.quick else (5, [50, 300], 1000)
    with tempfile.TemporaryDirectory() as folder:
        row("", "ours", "published", "median of the rounds' ours / published")
        print("|---|---|---|---|", flush=True)
        for where, files in (("in memory", None), ("in a file", folder)):
            for threads in AT_ONCE:
                comparison(where, files, threads, rounds, sizes)
        if conftest.PG_CTL:
            on_postgres(rounds, sizes)
        for threads in AT_ONCE:
            long_run(folder, threads, tenth)
        command(folder, rounds)
    print(f"\n{facts()}; the whole run: {time.monotonic() - STARTED:.0f} s")


if __name__ == "__main__":
    run()
