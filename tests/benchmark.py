"""What it costs, measured: `uv run tests/benchmark.py`, four minutes (`--quick`: under a minute, and rough).

Two things at a time, in turn and then in the opposite order, in several rounds. A row gives the minimum, the median and
the maximum of their ratio in each round, and the median of both. Progress goes to stderr. Everything is in a temporary
folder, and if that is no real disk (see TMPDIR), `in a file` says nothing.
"""

import argparse
import contextlib
import datetime
import itertools
import os
import platform
import re
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main  # noqa: E402

MAIN = str(ROOT / "main.py")
NUMBERS = itertools.count(os.getpid() << 32)
IDS = (f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in NUMBERS)  # all different, in no order, as UUIDs are
REQUEST = {"source": "alice", "target": "bob", "amount": 1}

# ---- What it is compared with ----------------------------------------------------------------------------------------

COLUMNS = "transfer_id TEXT, account TEXT, counterparty TEXT, amount INTEGER, kind TEXT, reason TEXT"
BARE = f"CREATE TABLE IF NOT EXISTS entries (op_id TEXT, {COLUMNS})"
USUAL = BARE.replace("op_id TEXT", "op_id TEXT PRIMARY KEY") + "; CREATE INDEX IF NOT EXISTS i ON entries (account)"
INSERT = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)"
LOCK = threading.Lock()  # bare INSERTs need one too: threads that share a connection without it lose rows


def grown(db: sqlite3.Connection) -> sqlite3.Connection:
    """With a WAL as long as it gets: to lengthen the file would cost more than to write to it."""
    db.executescript("CREATE TABLE hole AS SELECT zeroblob(5000000); DROP TABLE hole; PRAGMA wal_checkpoint(RESTART)")
    return db


def plain(path: str, schema: str) -> sqlite3.Connection:
    """A table without guards, as durable as the ledger."""
    db = sqlite3.connect(path, timeout=5, check_same_thread=False, autocommit=True)
    db.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; {schema}")
    return grown(db)


def bare(ctx: Any, op_id: str, account: str, amount: int, kind: str, *, counterparty: str) -> None:
    """The entry as a bare INSERT."""
    with LOCK:
        row = (op_id, op_id.removesuffix(f"-{kind}"), account, counterparty, amount, kind, None)
        ctx.get_dependency("db").execute(INSERT, row)


def usual(ctx: Any, op_id: str, account: str, amount: int, kind: str, *, counterparty: str) -> None:
    """The entry as a bare INSERT, once the sum of the account's entries allows it."""
    total = "SELECT SUM(amount) FROM entries WHERE account = ?"
    if amount < 0 and ctx.get_dependency("db").execute(total, (account,)).fetchone()[0] + amount < 0:
        raise ValueError("insufficient funds")
    bare(ctx, op_id, account, amount, kind, counterparty=counterparty)


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """No entry: what is left is the SDK."""


def two_steps(step: Callable[..., None]) -> Callable[..., Any]:
    """The saga as it would be if nothing ever went wrong."""

    def workflow(ctx, transfer_id, source, target, amount, *, simulate_credit_failure=False):
        yield ctx.run(step, f"{transfer_id}-debit", source, -amount, "debit", counterparty=target)
        yield ctx.run(step, f"{transfer_id}-credit", target, amount, "credit", counterparty=source)
        return {"transfer_id": transfer_id, "status": "committed", "source": source, "target": target, "amount": amount}

    return workflow


# ---- Measuring and printing ------------------------------------------------------------------------------------------


def progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def race[T](label: str, rounds: int, runs: dict[T, Callable[[], float]], passes: int = 1) -> dict[T, list[float]]:
    """The median of what each measures in each round, where all run in turn and again in the opposite order."""
    rows: dict[T, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        progress(f"{label}: round {number + 1} of {rounds}")
        measured = [(name, runs[name]()) for name in [*runs, *reversed(runs)] * passes]
        for name in runs:
            rows[name].append(statistics.median(value for other, value in measured if other == name))
    return rows


def head(title: str) -> None:
    print(f"\n{title:64}{'min':>8}{'median':>8}{'max':>8}{'first':>12}{'second':>12}", flush=True)


def row(title: str, first: list[float], second: list[float], show: str = "time") -> None:
    """The ratio of two times, of the rates that they make (`show` is `rate`) or of two sizes (`MiB`)."""

    def figure(values: list[float]) -> str:
        value = statistics.median(values)
        short = f"{value * 1e6:,.1f} us" if value < 1e-3 else f"{value * 1e3:,.1f} ms"
        return {"time": short, "rate": f"{1 / value:,.0f} /s", "MiB": f"{value:,.0f} MiB"}[show]

    ratios = [b / a if show == "rate" else a / b for a, b in zip(first, second, strict=True)]
    three = (f"{r:8.2f}" if r < 100 else f"{r:8,.0f}" for r in (min(ratios), statistics.median(ratios), max(ratios)))
    print(f"  {title:62}{''.join(three)}{figure(first):>12}{figure(second):>12}", flush=True)


def in_child[T](function: Callable[..., T], *args: Any) -> T:
    """What the function returns, in a process of its own: its memory and its threads are no other row's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def funded(path: str) -> sqlite3.Connection:
    db = grown(main.open_ledger(path))
    main.open_account(db, "alice", 10**12)
    main.open_account(db, "bob")
    return db


def transfers(transfer: Any, threads: int, count: int) -> float:
    """Seconds per transfer."""
    ids = list(itertools.islice(IDS, count))
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        results = list((pool.map if threads > 1 else map)(partial(main.submit, transfer, **REQUEST), ids))
        seconds = time.perf_counter() - started
    assert [(result["transfer_id"], result["status"]) for result in results] == [(id, "committed") for id in ids]
    return seconds / count


# ---- The rows --------------------------------------------------------------------------------------------------------


def facts(folder: str) -> None:
    """What it runs on, and what one committed transfer makes of a ledger in a file."""
    info = Path("/proc/cpuinfo")
    model = re.search("model name\\s*: (.*)", info.read_text() if info.exists() else "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    sdk = version("resonate-sdk")
    print(f"{datetime.date.today()}: {os.cpu_count()} cores, {model[1] if model else '?'}, {memory:.0f} GiB of memory,")
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, resonate-sdk {sdk}")
    db, count, statements = filled("ours", f"{folder}/facts", 1000), 50, []
    resonate, transfer = main.start(db)
    db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
    db.set_trace_callback(statements.append)  # inside a trigger it is given the statement that set off the trigger
    transfers(transfer, 1, count)
    db.set_trace_callback(None)
    resonate.stop()
    sent, pages = len(set(statements)) / count, db.execute("PRAGMA wal_checkpoint").fetchone()[1] / count
    inside = len(statements) / count - sent
    print(f"A committed transfer: {sent:.1f} SQL statements, {inside:.1f} more in triggers, {pages:.1f} WAL pages")


def saga(folder: str, rounds: int, count: int) -> None:
    def run(db: Any, workflow: Any, threads: int) -> float:
        resonate, transfer = main.start(db, workflow=workflow)
        transfers(transfer, 1, 1)
        seconds = transfers(transfer, threads, count)
        resonate.stop()
        vars(resonate._bridge).clear()  # one of its threads never ends, and would keep it all
        return seconds

    head(f"The saga in process (the SDK started anew for every {count})")
    for where, paths in {"in memory": [":memory:"] * 2, "in a file": [f"{folder}/saga", f"{folder}/bare"]}.items():
        sides = [(funded(paths[0]), main.transfer_money), (plain(paths[1], BARE), two_steps(bare))]
        for threads in (1, 16):
            runs = {n: partial(run, *side, threads) for n, side in enumerate([*sides, (None, two_steps(nothing))])}
            ours, unguarded, empty = race(f"the saga {where}, {threads} at once", rounds, runs, passes=3).values()
            row(f"the saga / the same unguarded, {where}, {threads} at once", ours, unguarded, "rate")
            row(f"the saga / two empty steps, {where}, {threads} at once", ours, empty, "rate")


def opened(name: str, path: str) -> sqlite3.Connection:
    """A ledger, or the table in its place."""
    return grown(main.open_ledger(path)) if name == "ours" else plain(path, USUAL if name == "usual" else BARE)


def filled(name: str, path: str, size: int) -> sqlite3.Connection:
    """One with `size` entries of alice: debits and their reversals."""
    db = opened(name, path)
    db.executescript("PRAGMA synchronous = OFF; PRAGMA cache_size = -1000000; BEGIN")
    for account, amount in (("alice", 10**12), ("bob", 0)):
        db.execute(INSERT, (f"{account}-opening", None, account, None, amount, "opening", None))
    for id in itertools.islice(IDS, size // 2):
        debit = (f"{id}-debit", id, "alice", "bob", -1, "debit", None)
        db.executemany(INSERT, [debit, (f"{id}-reversal", id, "alice", "bob", 1, "reversal", None)])
    db.executescript("COMMIT; PRAGMA wal_checkpoint(RESTART); PRAGMA synchronous = FULL; PRAGMA cache_size = -2000")
    return db


def files(folder: str, name: str, size: int) -> None:
    filled(name, f"{folder}/{name}-{size}", size).close()


def entries(folder: str, rounds: int, sizes: tuple[int, ...]) -> None:
    """One hot account. In memory, where it is large, SQLite walks its page cache (pcache1Truncate) as it commits."""
    steps = {"ours": main.apply_entry, "bare": bare, "usual": usual}
    on_disk, in_memory = {}, {}
    for name, size in itertools.product(steps, sizes):
        progress(f"the ledger: {size:,} entries, {name}")
        in_child(files, folder, name, size)  # with a cache that this process need not have had
        on_disk[name, size] = opened(name, f"{folder}/{name}-{size}")
        in_memory[name, size] = opened(name, ":memory:")
        on_disk[name, size].backup(in_memory[name, size])

    def entry(ledgers: dict[Any, sqlite3.Connection], name: str, size: int) -> float:
        """Seconds per entry, of 250 pairs or what there is time for. The smallest ledger is made anew each time."""
        with tempfile.TemporaryDirectory(dir=folder) as new:
            path = f"{new}/ledger" if ledgers is on_disk else ":memory:"
            db = filled(name, path, size) if size == sizes[0] else ledgers[name, size]
            ctx, step, count, started = (
                SimpleNamespace(get_dependency=lambda _: db),
                steps[name],
                0,
                time.perf_counter(),
            )
            for id in itertools.islice(IDS, 250):
                step(ctx, f"{id}-debit", "alice", -1, "debit", counterparty="bob")
                step(ctx, f"{id}-credit", "bob", 1, "credit", counterparty="alice")
                count, seconds = count + 2, time.perf_counter() - started
                if seconds > 0.1:
                    break
        return seconds / count

    def read(size: int) -> float:
        return timeit.timeit(lambda: main.balance(on_disk["ours", size], "alice"), number=2000) / 2000

    for where, ledgers in {"in memory": in_memory, "in a file": on_disk}.items():
        runs = {(name, size): partial(entry, ledgers, name, size) for name in steps for size in sizes}
        seconds = race(f"the ledger {where}", rounds, runs, passes=3)
        head(f"The ledger alone, {where}: an entry of an account with n")
        for size in sizes:
            row(f"an entry / a bare INSERT, n = {size:,}", seconds["ours", size], seconds["bare", size])
        for size in sizes:
            row(f"the usual SUM, then INSERT / an entry, n = {size:,}", seconds["usual", size], seconds["ours", size])
        for size in sizes[1:]:
            row(f"an entry, n = {size:,} / n = {sizes[0]:,}", seconds["ours", size], seconds["ours", sizes[0]])
    small, *_, large = race("balance()", rounds, {size: partial(read, size) for size in sizes}, passes=3).values()
    row(f"balance(), n = {sizes[-1]:,} / n = {sizes[0]:,}", large, small)


def commands(folder: str, rounds: int) -> None:
    def run(*words: str) -> float:
        words = tuple(next(IDS) if word == "ID" else word for word in words)
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started

    funded(f"{folder}/commands").close()
    transfer = partial(run, MAIN, "transfer", "ID", "alice", "bob", "1", "--ledger", f"{folder}/commands")
    runs = {"import": partial(run, "-c", "import resonate"), "transfer": transfer, "tour": partial(run, MAIN)}
    floor, one, tour = race("start to finish", rounds, runs).values()
    head("Start to finish of a process")
    row("main.py transfer / python -c 'import resonate'", one, floor)
    row("main.py, the tour / python -c 'import resonate'", tour, floor)


def peak() -> float:
    """The most memory that this process has held, in MiB, where the system tells."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024 if status.exists() else float("nan")


def recovery(folder: str, count: int) -> list[float]:
    """Seconds per transfer in the last and the first third of a recovery; peak memory at the end, the first third."""
    db, submit, third, marks = funded(tempfile.mktemp(dir=folder)), main.submit, count // 3, []
    db.execute("BEGIN")
    for id in itertools.islice(IDS, count):
        main.settle(db, f"{id}-debit", "alice", -1, "debit", "bob")
    db.execute("COMMIT")

    def watched(*request: Any) -> Any:
        result = submit(*request)
        marks.append((time.perf_counter(), peak()))
        return result

    main.submit, start = watched, peak()
    started = time.perf_counter()
    main.recover(db, main.start(db)[1])
    assert len(marks) == count and not main.in_flight(db)
    last, first = (marks[-1][0] - marks[-1 - third][0]) / third, (marks[third - 1][0] - started) / third
    return [last, first, marks[-1][1], marks[third - 1][1], start]


def recover(folder: str, rounds: int, count: int) -> None:
    progress(f"recover: {rounds} rounds")
    runs = [in_child(recovery, folder, count) for _ in range(rounds)]
    head(f"main.recover of {count:,} transfers in flight, in a file")
    last, first, memory_last, memory_first, memory_start = map(list, zip(*runs, strict=True))
    row("transfers, the last third / the first third", last, first, "rate")
    row("peak memory, at the end / after the first third", memory_last, memory_first, "MiB")
    row("peak memory, at the end / before it starts", memory_last, memory_start, "MiB")


@contextlib.contextmanager
def serving(folder: str) -> Iterator[None]:
    """A Resonate server, where RESONATE_HOST and so on say. Raises ConnectionError if it cannot be had."""
    if not shutil.which("resonate"):
        raise ConnectionError("`resonate` is not on PATH")
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        api, poll, metrics = (str(each.getsockname()[1]) for each in sockets)
    os.environ.update(RESONATE_HOST="http://127.0.0.1", RESONATE_PORT_STORE=api, RESONATE_PORT_MESSAGE_SOURCE=poll)
    ports = {"api-http": api, "aio-poll": poll, "metrics": metrics}
    flags = [*(f"--{name}-addr=127.0.0.1:{port}" for name, port in ports.items()), "--api-grpc-enable=false"]
    command = ["resonate", "serve", *flags, f"--aio-store-sqlite-path={folder}/promises"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(ConnectionError):
                    main.start(sqlite3.connect(":memory:"), remote=True, group="nobody")
                    break
                time.sleep(0.1)
            else:
                raise ConnectionError("the server does not answer")
            yield
        finally:
            process.terminate()


def server(folder: str, rounds: int, count: int) -> None:
    """The rows of a server, which now and then does nothing for a second: hence passes, for a median without that."""
    db, sides = funded(f"{folder}/served"), {}
    for name, workflow in {"saga": main.transfer_money, "empty": two_steps(nothing)}.items():
        _, sides[name] = main.start(db, remote=True, group=f"client-{name}", workflow=workflow)

    def drain(workers: int) -> float:
        """Seconds per transfer, handed in while the workers are held, from their release to the last in the ledger."""
        command, pipes = [sys.executable, MAIN, "worker", "--ledger", f"{folder}/served"], {"stdout": subprocess.PIPE}
        processes = [subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes) for _ in range(workers)]
        try:
            assert all(process.stdout.readline() for process in processes), "a worker does not say that it is there"
            time.sleep(0.5)
            for process in processes:
                process.send_signal(signal.SIGSTOP)
            ids = list(itertools.islice(IDS, 2 * count))
            for id in ids:
                sides["saga"].begin_rpc(id, transfer_id=id, **REQUEST)
            started = time.perf_counter()
            for process in processes:
                process.send_signal(signal.SIGCONT)
            while not {f"{id}-credit" for id in ids} <= {id for (id,) in db.execute("SELECT op_id FROM entries")}:
                assert time.perf_counter() < started + 120, "the workers do not come to an end"
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            while not all(sides["saga"]._resonate.promises.get(id).completed for id in ids):
                time.sleep(0.1)
            return seconds / len(ids)
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    head("On a Resonate server, in a file")
    for threads in (1, 16):
        runs = {name: partial(transfers, transfer, threads, count) for name, transfer in sides.items()}
        ours, empty = race(f"on a server, {threads} at once", rounds, runs, passes=3).values()
        row(f"the saga / two empty steps, run by the client, {threads} at once", ours, empty, "rate")
    seconds = race("workers", rounds, {workers: partial(drain, workers) for workers in (1, 2, 4)}, passes=2)
    for workers in (2, 4):
        row(f"{workers} workers / one, {2 * count} transfers", seconds[workers], seconds[1], "rate")


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds of smaller sizes")
    quick = parser.parse_args().quick
    rounds = 2 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        facts(folder)
        saga(folder, rounds, 20 if quick else 100)
        entries(folder, rounds, (1000, 10_000) if quick else (1000, 100_000, 1_000_000))
        commands(folder, rounds)
        recover(folder, 1 if quick else 3, 600 if quick else 3000)
        try:
            with serving(folder):
                in_child(server, folder, 1 if quick else 3, 10 if quick else 20)
        except ConnectionError as reason:
            print(f"\nOn a Resonate server: skipped, {reason}")


if __name__ == "__main__":
    run()
