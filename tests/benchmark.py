"""What it costs, measured: `uv run tests/benchmark.py`, under four minutes on two cores.

--quick takes less than a minute, and its figures are rough. --long makes 100,000 transfers in one
process, twice, where the default makes 10,000: that takes about eight minutes more. --others adds
DBOS and LangGraph, installed from the package index outside the project.

What is compared takes turns, in several rounds. A row gives the minimum, the median and the maximum
over the rounds of its first column divided by its second, and the median of both columns. Progress
goes to stderr. All files are in a temporary folder, which TMPDIR should have on a real disk.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the next import takes a moment: Ctrl-C is quiet from here on
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resonate import Resonate
from resonate.retry_policies import Never

import main

MAIN = str(Path(main.__file__).resolve())
STARTED = float(os.environ.setdefault("BENCHMARK_STARTED", str(time.monotonic())))
NUMBERS = itertools.count(os.getpid() << 32)

# ---- Measuring and printing ---------------------------------------------------------------------


def new_id() -> str:
    """An id that no other call returns. They come in no order, as UUIDs do."""
    return f"{next(NUMBERS) * 0x9E3779B97F4A7C15 % 2**64:016x}"


def progress(text: str) -> None:
    print(f"{time.monotonic() - STARTED:4.0f} s  {text}", file=sys.stderr, flush=True)


def race[T](
    label: str, rounds: int, runs: dict[T, Callable[[], float]], turns: int = 2
) -> dict[T, list[float]]:
    """What each measures in each round, as they take turns, forwards and then backwards."""
    measured: dict[T, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        progress(f"{label}: round {number + 1} of {rounds}")
        figures: dict[T, list[float]] = {name: [] for name in runs}
        for name in [*runs, *reversed(runs)] * turns:
            figures[name].append(runs[name]())
        for name in runs:
            measured[name].append(statistics.median(figures[name]))
    return measured


def table(title: str, unit: str, first: str = "ours", second: str = "theirs") -> None:
    print(f"\n{title}, {unit}")
    print(f"{'':56}{'min':>8}{'median':>8}{'max':>8}{first:>12}{second:>12}", flush=True)


def row(title: str, first: list[float], second: list[float]) -> None:
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    shown = [min(ratios), statistics.median(ratios), max(ratios)]
    columns = "".join(f"{ratio:8.2f}" if ratio < 100 else f"{ratio:8,.0f}" for ratio in shown)
    figures = "".join(f"{statistics.median(column):12,.0f}" for column in (first, second))
    print(f"  {title:54}{columns}{figures}", flush=True)


def answer(*command: str) -> Any:
    """What another process prints last, as JSON. It and its children end with this call."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(MAIN).parent, process_group=0
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode != 0:
        raise ChildProcessError(f"{Path(command[0]).name} ended with {process.returncode}")
    return json.loads(output.splitlines()[-1])


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of this file returns in a process whose memory and threads are its own."""
    return answer(sys.executable, __file__, "--child", json.dumps([function.__name__, args]))


# ---- What it is compared with -------------------------------------------------------------------

COLUMNS = "transfer_id TEXT, kind TEXT, account TEXT, amount INTEGER, counterparty TEXT, void TEXT"
BARE = f"CREATE TABLE operations (op_id TEXT, {COLUMNS})"
USUAL = f"""
CREATE TABLE operations (op_id TEXT PRIMARY KEY, {COLUMNS});
CREATE INDEX by_account ON operations (account, amount)
"""
INSERT = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, NULL)"
LOCK = threading.Lock()  # without it, INSERTs of threads that share a connection are lost


def ours(path: str) -> sqlite3.Connection:
    """A ledger in which alice has a lot."""
    db = main.open_ledger(path)
    main.open_account(db, "alice", 10**12)
    main.open_account(db, "bob")
    return db


def theirs(path: str, schema: str) -> sqlite3.Connection:
    """A table in which alice has a lot: as durable as the ledger, and nothing guards it."""
    db = sqlite3.connect(path, check_same_thread=False, autocommit=True)
    db.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; {schema}")
    db.execute(INSERT, ("alice-opening", "alice", "opening", "alice", 10**12, None))
    return db


def fill(path: str, entries: Iterable[main.Operation]) -> None:
    """Puts entries into a file, all in one transaction: that is faster than one by one."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA cache_size = -500000")
        db.executemany(INSERT, entries)
        # The log (WAL) is now as long as it gets. While it still grows, each commit takes longer.
        db.execute("CREATE TABLE hole AS SELECT zeroblob(5000000)")
        db.execute("DROP TABLE hole")


def operation(transfer_id: str, kind: str, *rest: Any) -> main.Operation:
    return main.Operation(f"{transfer_id}-{kind}", transfer_id, kind, *rest)


def bare(ctx: Any, operation: main.Operation) -> None:
    """A step: the entry as a bare INSERT."""
    with LOCK:
        ctx.get_dependency("db").execute(INSERT, operation)


def empty(ctx: Any, operation: main.Operation) -> None:
    """A step that does nothing: what is left is the SDK."""


def sum_and_insert(db: sqlite3.Connection, operation: main.Operation) -> None:
    """An entry, if the sum of the entries of its account allows it."""
    with LOCK:
        query = "SELECT sum(amount) FROM operations WHERE account = ?"
        [held] = db.execute(query, (operation.account,)).fetchone()
        if held + operation.amount < 0:
            raise ValueError("insufficient funds")
        db.execute(INSERT, operation)


def usual_saga(step: Callable[..., None]) -> Callable[..., Any]:
    """The same saga without its rule: it takes an error for proof that nothing happened. Its steps
    have the same options, because without them no refusal would ever end it."""

    def workflow(ctx: Any, transfer_id: str, source: str, target: str, amount: int) -> Any:
        result = dict(transfer_id=transfer_id, source=source, target=target, amount=amount)
        debit = operation(transfer_id, "debit", source, -amount, target)
        credit = operation(transfer_id, "credit", target, amount, source)
        yield ctx.run(step, debit).options(non_retryable_exceptions=(ValueError,))
        try:
            yield ctx.run(step, credit).options(retry_policy=Never())
        except Exception as failure:
            yield ctx.run(step, operation(transfer_id, "reversal", source, amount, target))
            return result | {"status": "compensated", "error": str(failure)}
        return result | {"status": "committed"}

    return workflow


# ---- Transfers: each is a function of its id, and moves 0.01 ------------------------------------

type Transfer = Callable[[str], dict[str, Any]]
REQUEST = {"source": "alice", "target": "bob", "amount": 1}
AT_ONCE = {1: "one at a time", 16: "16 at once"}  # threads


def our_transfer(db: sqlite3.Connection, **where: bool) -> Transfer:
    _, transfer = main.start(db, **where)
    return lambda transfer_id: main.submit(db, transfer, transfer_id, **REQUEST)


def their_transfer(db: Any, step: Callable[..., None], resonate: Resonate) -> Transfer:
    """The usual saga. The SDK is mended as it is for ours: both pay the same for that."""
    resonate.set_dependency("db", db)
    run = main.mend(resonate, resonate.register(usual_saga(step)).options(target="theirs"))
    resonate.start()
    return lambda transfer_id: run(transfer_id, transfer_id=transfer_id, **REQUEST)


def speed(transfer: Transfer, threads: int, count: int) -> float:
    """Transfers per second."""
    ids = [new_id() for _ in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        results = list(pool.map(transfer, ids) if threads > 1 else map(transfer, ids))
        seconds = time.perf_counter() - started
    assert all(result["status"] == "committed" for result in results)
    return count / seconds


# ---- In process ---------------------------------------------------------------------------------


def sagas(folder: str, rounds: int, count: int) -> None:
    table("The saga in process", "transfers/s")
    files = {"in memory": (":memory:", ":memory:"), "in a file": (f"{folder}/a", f"{folder}/b")}
    for where, (our_path, their_path) in files.items():
        transfers = {
            "ours": our_transfer(ours(our_path)),
            "bare": their_transfer(theirs(their_path, BARE), bare, Resonate.local()),
            "empty": their_transfer(None, empty, Resonate.local()),
        }
        for transfer in transfers.values():
            speed(transfer, 1, 4 * count)  # a new file is slower
        for threads, at_once in AT_ONCE.items():
            label = f"{where}, {at_once}"
            runs = {name: partial(speed, transfers[name], threads, count) for name in transfers}
            speeds = race(f"the saga {label}", rounds, runs, turns=4)
            row(f"{label}, to bare INSERTs, no guard", speeds["ours"], speeds["bare"])
            row(f"{label}, to two empty steps", speeds["ours"], speeds["empty"])


def resident() -> float:
    """The memory of this process in MiB; not a number where the system does not tell."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return float("nan")


class Marks:
    """Called after each transfer. Keeps when the first and the last thousand were done, and what
    memory that took."""

    def __init__(self, count: int) -> None:
        self.window = min(1000, count // 4)
        self.wanted = (self.window, count - self.window, count)
        self.done = itertools.count(1)
        self.at = [(time.perf_counter(), resident())]

    def __call__(self) -> None:
        if next(self.done) in self.wanted:
            self.at.append((time.perf_counter(), resident()))

    def figures(self) -> dict[str, float]:
        """Transfers per second of the first and the last, and MiB between them."""
        (start, _), (first, small), (before, _), (last, large) = self.at
        return {
            "first": self.window / (first - start),
            "last": self.window / (last - before),
            "grown": large - small,
        }


def many(folder: str, threads: int, count: int) -> dict[str, float]:
    transfer = our_transfer(ours(f"{folder}/many-{threads}"))
    todo = itertools.count(1)
    marks = Marks(count)

    def work() -> None:
        while next(todo) <= count:
            assert transfer(new_id())["status"] == "committed"
            marks()

    with ThreadPoolExecutor(threads) as pool:
        for worker in [pool.submit(work) for _ in range(threads)]:
            worker.result()
    return marks.figures()


def recovery(folder: str, count: int) -> dict[str, float]:
    """`recover`, with each result printed as it is done."""
    db = ours(f"{folder}/recovery")
    debits = (operation(new_id(), "debit", "alice", -1, "bob") for _ in range(count))
    fill(f"{folder}/recovery", debits)
    _, transfer = main.start(db)
    marks = Marks(count)

    def report(result: dict[str, Any]) -> None:
        print(json.dumps(result), file=nowhere, flush=True)
        marks()

    with open(os.devnull, "w") as nowhere:
        results = main.recover(db, transfer, report)
    assert len(results) == count and not main.in_flight(db)
    return marks.figures()


def long_runs(folder: str, transfers: int, flying: int) -> None:
    """Does it get slower, or larger?"""
    parts = {
        f"{transfers:,} transfers, one at a time": (many, folder, 1, transfers),
        f"{transfers:,} transfers, 50 threads": (many, folder, 50, transfers),
        f"recover of {flying:,} in flight": (recovery, folder, flying),
    }
    runs = {}
    for title, part in parts.items():
        progress(title)
        runs[title] = in_child(*part)
    table("The last of many to the first, in a file", "transfers/s", "last", "first")
    for title, run in runs.items():
        row(f"{title}: {run['grown']:+.1f} MiB", [run["last"]], [run["first"]])


def debits_and_reversals(count: int) -> Iterator[main.Operation]:
    for transfer_id in (new_id() for _ in range(count // 2)):
        yield operation(transfer_id, "debit", "alice", -1, "bob")
        yield operation(transfer_id, "reversal", "alice", 1, "bob")


def debits(db: sqlite3.Connection, write: Callable[..., Any]) -> float:
    """Debits of alice per second."""
    todo = [operation(new_id(), "debit", "alice", -1, "bob") for _ in range(10)]
    started = time.perf_counter()
    for debit in todo:
        write(db, debit)
    return len(todo) / (time.perf_counter() - started)


def hot_account(folder: str, rounds: int, large: int) -> None:
    runs = {}
    for size in (1000, large):
        progress(f"a hot account: {size:,} entries")
        paths = f"{folder}/ours-{size}", f"{folder}/theirs-{size}"
        our_db, their_db = ours(paths[0]), theirs(paths[1], USUAL)
        for path in paths:
            fill(path, debits_and_reversals(size))
        runs["ours", size] = partial(debits, our_db, main.settle)
        runs["theirs", size] = partial(debits, their_db, sum_and_insert)
    speeds = race("a hot account", rounds, runs)
    table("A debit of a hot account, in a file", "debits/s")
    for size in (1000, large):
        title = f"{size:,} entries, to the SUM of them"
        row(title, speeds["ours", size], speeds["theirs", size])
    table("The same", "debits/s", f"{large:,}", "1,000")
    for name in ("ours", "theirs"):
        row(name, speeds[name, large], speeds[name, 1000])


def commands(folder: str, rounds: int) -> None:
    ledger = f"{folder}/commands"
    ours(ledger).close()

    def milliseconds(*words: str) -> float:
        """From start to finish of a process."""
        started = time.perf_counter()
        command = [sys.executable, *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, process_group=0)
        return (time.perf_counter() - started) * 1000

    def transfer() -> float:
        return milliseconds(MAIN, "transfer", new_id(), "alice", "bob", "1", "--ledger", ledger)

    runs = {"import": partial(milliseconds, "-c", "import resonate"), "transfer": transfer}
    spent = race("a command", rounds, runs, turns=1)
    progress("the tour")
    tours = [milliseconds(MAIN) for _ in range(rounds)]
    table("Start to finish, to python -c 'import resonate'", "ms")
    row("main.py transfer", spent["transfer"], spent["import"])
    row("main.py: the tour, of 9 commands", tours, spent["import"])


# ---- On a server --------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(folder: str) -> Iterator[None]:
    """A server, where the environment says. Raises ConnectionError if it cannot be had."""
    program = shutil.which("resonate")
    if program is None:
        raise ConnectionError("`resonate` is not on PATH")
    found = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip()
    if not found.endswith(" 0.8.2"):
        raise ConnectionError(f"needs version 0.8.2, not {found!r}")
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        store, messages, metrics = (each.getsockname()[1] for each in sockets)
    os.environ["RESONATE_HOST"] = "http://127.0.0.1"
    os.environ["RESONATE_PORT_STORE"] = str(store)
    os.environ["RESONATE_PORT_MESSAGE_SOURCE"] = str(messages)
    command = [
        *(program, "serve", "--api-grpc-enable=false"),
        f"--api-http-addr=127.0.0.1:{store}",
        f"--aio-poll-addr=127.0.0.1:{messages}",
        f"--metrics-addr=127.0.0.1:{metrics}",
        f"--aio-store-sqlite-path={folder}/promises",
    ]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, process_group=0)
    try:
        while not (answers(store) and answers(messages)):
            if process.poll() is not None:
                raise ConnectionError(f"it ended with status {process.returncode}")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def served(folder: str, rounds: int, count: int) -> Any:
    """Speeds of a client that runs both sagas, by threads, and of workers, by their number."""
    ledger = f"{folder}/served"
    db = ours(ledger)
    resonate, _ = main.start(db, remote=True, client=True)
    [ledger_id] = db.execute("PRAGMA user_version").fetchone()
    workers = resonate.options(target=f"money-transfer-{ledger_id}")

    def drained(number: int) -> float:
        """Transfers per second of so many workers, to whom a client leaves them."""
        ids = [new_id() for _ in range(2 * count)]
        command = [sys.executable, MAIN, "worker", "--ledger", ledger]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        processes = [subprocess.Popen(command, **pipes) for _ in range(number)]
        try:
            assert all(process.stdout.readline() for process in processes), "no worker"
            goal = main.balance(db, "bob") + len(ids)
            started = time.perf_counter()
            deadline = started + 60
            for transfer_id in ids:
                request = REQUEST | {"transfer_id": transfer_id}
                workers.begin_rpc(transfer_id, "transfer_money", **request)
            while main.balance(db, "bob") < goal:
                assert time.perf_counter() < deadline, "the workers do not come to an end"
                time.sleep(0.01)
            seconds = time.perf_counter() - started
            while not all(resonate.promises.get(transfer_id).completed for transfer_id in ids):
                assert time.perf_counter() < deadline, "the workers do not say that they are done"
                time.sleep(0.1)
            return len(ids) / seconds
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    transfers = {
        "ours": our_transfer(db, remote=True, client=True),
        "theirs": their_transfer(None, empty, Resonate.remote(group="theirs")),
    }
    clients = {}
    for threads, at_once in AT_ONCE.items():
        runs = {name: partial(speed, transfers[name], threads, count) for name in transfers}
        clients[at_once] = race(f"on a server, {at_once}", rounds, runs)
    runs = {number: partial(drained, number) for number in (1, 2, 4)}
    return clients, race("workers", rounds, runs, turns=1)


def server(folder: str, rounds: int, count: int) -> None:
    try:
        with serving(folder):
            clients, drained = in_child(served, folder, rounds, count)
    except ConnectionError as reason:
        print(f"\nOn a server: skipped, {reason}")
        return
    table("The saga on a server, to two empty steps", "transfers/s")
    for at_once, speeds in clients.items():
        row(at_once, speeds["ours"], speeds["theirs"])
    table("Workers, to one", "transfers/s", "several", "one")
    for number in ("2", "4"):
        row(f"{number} workers", drained[number], drained["1"])


# ---- What a user would pick instead -------------------------------------------------------------

# The scripts make the same transfers, each in a ledger file of its own, whose entries are durable,
# and go in once under their op id. They print transfers per second, and the cents that there are,
# of 1,000,000, after a credit of 500,000 has landed, and its answer was lost.
BEGINNING = """
import contextlib, sys
with contextlib.suppress(ImportError):
    import pysqlite3
    sys.modules["sqlite3"] = pysqlite3
import json, sqlite3, threading, time
folder, count = sys.argv[1], int(sys.argv[2])
"""
OURS = """
import main
db = main.open_ledger(f"{folder}/ledger.db")
main.open_account(db, "alice", 1_000_000)
main.open_account(db, "bob")
_, saga = main.start(db)

def transfer(state):
    request = (db, saga, state["id"], "alice", "bob", state["amount"])
    main.submit(*request, simulate_lost_answer=state["lose_answer"])
"""
STEPS = """
db = sqlite3.connect(f"{folder}/ledger.db", check_same_thread=False, isolation_level=None)
db.execute("PRAGMA journal_mode = WAL")
db.execute("PRAGMA synchronous = FULL")
db.execute("CREATE TABLE entries (op_id TEXT PRIMARY KEY, account TEXT, amount INTEGER)")
lock = threading.Lock()

def settle(*entry):
    with lock:
        db.execute("INSERT OR IGNORE INTO entries VALUES (?, ?, ?)", entry)

def debit(state):
    settle(state["id"] + "-debit", "alice", -state["amount"])

def credit(state):
    settle(state["id"] + "-credit", "bob", state["amount"])
    if state["lose_answer"]:
        raise TimeoutError("no answer from the target")

def reverse(state):
    settle(state["id"] + "-reversal", "alice", state["amount"])

settle("opening", "alice", 1_000_000)
"""
# An `except` around a step, as in https://docs.dbos.dev/python/examples/widget-store.
DBOS = """
from dbos import DBOS, SetWorkflowID
journal = f"sqlite:///{folder}/journal.db"
DBOS(config={"name": "transfers", "system_database_url": journal, "log_level": "CRITICAL"})
debit, credit, reverse = (DBOS.step()(step) for step in (debit, credit, reverse))

@DBOS.workflow()
def saga(state):
    debit(state)
    try:
        credit(state)
    except Exception:
        reverse(state)

def transfer(state):
    with SetWorkflowID(state["id"]):
        saga(state)

DBOS.launch()
"""
# An error handler, which https://docs.langchain.com/oss/python/langgraph/fault-tolerance offers for
# sagas. With "sync", a step is in the journal before the next one starts, as it is with DBOS.
LANGGRAPH = """
from typing import TypedDict
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.errors import NodeError
from langgraph.graph import START, StateGraph
from langgraph.types import Command

class State(TypedDict):
    id: str
    amount: int
    lose_answer: bool

def credit_failed(state: State, error: NodeError) -> Command:
    return Command(goto="reverse")

builder = StateGraph(State)
builder.add_node("debit", debit)
builder.add_node("credit", credit, error_handler=credit_failed)
builder.add_node("reverse", reverse)
builder.add_edge(START, "debit")
builder.add_edge("debit", "credit")
journal = sqlite3.connect(f"{folder}/journal.db", check_same_thread=False)
graph = builder.compile(checkpointer=SqliteSaver(journal))

def transfer(state):
    graph.invoke(state, {"configurable": {"thread_id": state["id"]}}, durability="sync")
"""
END = """
for number in range(50 + count):
    if number == 50:
        started = time.perf_counter()
    transfer({"id": f"t-{number}", "amount": 1, "lose_answer": False})
speed = count / (time.perf_counter() - started)
transfer({"id": "lost", "amount": 500_000, "lose_answer": True})
[money] = db.execute("SELECT sum(amount) FROM entries").fetchone()
print(json.dumps([speed, money]), flush=True)
"""
# DBOS needs SQLite 3.42. Where that of Python is older, it gets one that comes in a package.
NEW_SQLITE = ["--with=pysqlite3-binary"] if sqlite3.sqlite_version_info < (3, 42) else []
OTHERS = {
    "DBOS": (DBOS, ["--with=dbos", *NEW_SQLITE]),
    "LangGraph": (LANGGRAPH, ["--with=langgraph>=1.2", "--with=langgraph-checkpoint-sqlite"]),
}


def others(folder: str, rounds: int, count: int) -> None:
    """Each in an environment of its own, with the same Python."""
    os.environ["LANGSMITH_TRACING"] = "false"
    uv = [os.environ.get("UV", "uv"), "run", "--quiet", "--no-project", "--python", sys.executable]
    figures = {}
    for name, (script, packages) in OTHERS.items():
        sides = {
            "ours": [sys.executable, "-c", BEGINNING + OURS + END],
            "theirs": [*uv, *packages, "python", "-c", BEGINNING + STEPS + script + END],
        }
        answers = []
        try:
            for number, side in itertools.product(range(rounds), sides):
                progress(f"{name}, {side}: round {number + 1} of {rounds}")
                with tempfile.TemporaryDirectory(dir=folder) as new:
                    answers.append(answer(*sides[side], new, str(count)))
        except OSError as reason:
            print(f"\n{name}: skipped, {reason}")
            continue
        figures[name] = answers[0::2], answers[1::2]
    if not figures:
        return
    for title, unit, column in (
        ("The same transfer, in a file", "transfers/s", 0),
        ("The money that there is, of 1,000,000, after one lost answer", "cents", 1),
    ):
        table(title, unit)
        for name, answers in figures.items():
            row(name, *([figure[column] for figure in side] for side in answers))


# ---- All of it ----------------------------------------------------------------------------------


def facts() -> None:
    cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = cpu.partition("model name")[2].partition(": ")[2].partition("\n")[0]
    print(f"{datetime.date.today()}: {os.cpu_count()} cores, {model or platform.machine()}")
    packages = f"resonate-sdk {version('resonate-sdk')}"
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {packages}")


def run() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and smaller sizes")
    parser.add_argument("--long", action="store_true", help="100,000 transfers, not 10,000")
    parser.add_argument("--others", action="store_true", help="also DBOS and LangGraph")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, arguments = json.loads(args.child)
        print(json.dumps(globals()[name](*arguments)), flush=True)
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # the folder goes, and children end
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    quick = args.quick
    with tempfile.TemporaryDirectory() as folder:
        facts()
        sagas(folder, rounds=2 if quick else 5, count=16 if quick else 32)
        transfers = 500 if quick else 100_000 if args.long else 10_000
        long_runs(folder, transfers, flying=500 if quick else 10_000)
        hot_account(folder, rounds=2 if quick else 5, large=20_000 if quick else 1_000_000)
        commands(folder, rounds=1 if quick else 3)
        server(folder, rounds=1 if quick else 3, count=5 if quick else 15)
        if args.others:
            others(folder, rounds=1 if quick else 3, count=50 if quick else 200)
    progress("done")


if __name__ == "__main__":
    run()
