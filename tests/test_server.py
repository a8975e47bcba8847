"""By way of a real Resonate server: who finishes what, whatever is killed, frozen or missing."""

import base64
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import MAIN, check, entries

import main

RESONATE = shutil.which("resonate") or ""
VERSION = subprocess.run([RESONATE, "--version"], capture_output=True, text=True).stdout if RESONATE else "not on PATH"
pytestmark = pytest.mark.xdist_group("server")  # they share the stages that take long
needs_server = pytest.mark.skipif(not VERSION.endswith(" 0.8.2\n"), reason=f"needs resonate 0.8.2: {VERSION!r}")

COMMANDS = (("transfer", "t1", "alice", "bob", "30", "--server"), ("recover", "--server"), ("worker",))

# A worker that comes as far as a credit, and there is killed, or freezes, or hears that the target refuses.
ODD_WORKER = """
import os, signal, sqlite3, sys, threading
import main

how, path = sys.argv[1:]
tried, leave = threading.Event(), os._exit

class OddLedger(sqlite3.Connection):
    def execute(self, sql, row=(), /):
        if "credit" not in row[5:6]:
            return super().execute(sql, row)
        print("at the credit", flush=True)
        if how == "refuse":
            raise sqlite3.IntegrityError("the target refused")
        signal.raise_signal(getattr(signal, how))
        cursor = super().execute(sql, row)
        print("credit tried", flush=True)
        tried.set()
        return cursor

if how == "SIGSTOP":  # the SDK ends a worker that lost its lease: let it, but not before the late credit was tried
    os._exit = lambda status: (tried.wait(), leave(status))
main.start(main.open_ledger(path, OddLedger), remote=True)
print("worker", flush=True)
while True:
    signal.pause()
"""

# A client that leaves transfers of 1.00 to the workers, and goes.
LEAVE = """
import sys
import main

transfer = main.start(None, remote=True, group="client-x")[1]
for name in sys.argv[1:]:
    transfer.begin_rpc(name, transfer_id=name, source="alice", target="bob", amount=100, simulate_credit_failure=False)
"""


def until(condition: Callable[[], Any], what: object) -> Any:
    """What the condition says, as soon as that is true. The deadline is for what will never come."""
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within a minute: {what}"
        time.sleep(0.05)
    return value


def answers(port: str) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=5):
        return True
    return False


def free_port() -> str:
    """A port that nobody listens on, below those that the kernel gives to connections."""
    ports = (str(random.randrange(10000, 30000)) for _ in iter(int, 1))
    return next(port for port in ports if not answers(port))


def environment(folder: Path, store: str, messages: str) -> dict[str, str]:
    """What a process is told: to live in the folder, and where the server is."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RESONATE_")}
    ports = {"RESONATE_PORT_STORE": store, "RESONATE_PORT_MESSAGE_SOURCE": messages}
    return environ | {"HOME": str(folder), "PYTHONPATH": str(MAIN.parent), "RESONATE_HOST": "http://127.0.0.1"} | ports


class Child(subprocess.Popen[bytes]):
    """A process that writes into files, so that it waits for no reader."""

    def __init__(self, stage: "Stage", *command: str | Path) -> None:
        self.out, self.err = (stage.folder / f"{len(stage.children)}.{name}" for name in ("out", "err"))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            super().__init__(command, cwd=stage.folder, env=stage.env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        stage.children.append(self)

    def says(self, start: str) -> list[str]:
        """The lines of its stdout that start so."""
        return [line for line in self.out.read_text().splitlines() if line.startswith(start)]

    def results(self) -> list[Any]:
        return [json.loads(line) for line in self.says("{")]


class Stage:
    """A folder with a ledger (alice has 100.00, bob 50.00), a server on ports of its own, and all that runs there."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder, self.flags, self.children = folder, flags, list[Child]()
        self.env = environment(folder, free_port(), free_port())
        while not self.serve():
            self.env = environment(folder, free_port(), free_port())
        main.command_ledger(str(folder / "ledger.db"), None).close()

    def serve(self) -> bool:
        """Starts the server, and returns whether it got its ports: somebody may have been faster."""
        store, messages = self.env["RESONATE_PORT_STORE"], self.env["RESONATE_PORT_MESSAGE_SOURCE"]
        flags = ("--api-http-addr", f"127.0.0.1:{store}", "--aio-poll-addr", f"127.0.0.1:{messages}", *self.flags)
        flags += ("--metrics-addr", "127.0.0.1:0", "--api-grpc-enable=false", "--aio-store-sqlite-path", "promises.db")
        # ttr: how soon it hands out again what there was nobody to take
        self.server = Child(self, RESONATE, "serve", *flags, "--aio-poll-ttr", "1s")
        until(lambda: self.server.poll() is not None or (answers(store) and answers(messages)), self.server.err)
        return self.server.poll() is None

    def start(self, *words: str) -> Child:
        """Starts `python main.py ...`."""
        return Child(self, sys.executable, MAIN, *words)

    def run(self, *words: str) -> tuple[int, list[Any]]:
        """The exit status of `python main.py ...`, and the results that it printed."""
        child = self.start(*words)
        return child.wait(60), child.results()

    def worker(self, how: str | None = None) -> Child:
        """Starts `python main.py worker`, or an odd one."""
        child = Child(self, sys.executable, "-c", ODD_WORKER, how, "ledger.db") if how else self.start("worker")
        until(lambda: child.says("worker"), child.err)
        return child

    def leave(self, *transfer_ids: str) -> None:
        """Leaves transfers of 1.00 to the workers."""
        assert Child(self, sys.executable, "-c", LEAVE, *transfer_ids).wait(60) == 0

    def refused(self) -> None:
        """Each command ends, and says in one line where there is no server, and what to start; nothing is written."""
        for child in [self.start(*words) for words in COMMANDS]:
            assert child.wait(60) == 2
            says_where(child.err.read_text(), self.env)
        assert self.read() == {}

    def promise(self, promise_id: str) -> Any:
        """The promise that the server keeps, with the result in it, or None."""
        url = f"{self.env['RESONATE_HOST']}:{self.env['RESONATE_PORT_STORE']}/promises/{promise_id}"
        with suppress(OSError), urllib.request.urlopen(url, timeout=10) as response:
            promise = json.load(response)
            return promise | {"result": json.loads(base64.b64decode(promise["value"].get("data", "")) or "null")}

    def read(self, question: Callable[[sqlite3.Connection], Any] = entries) -> Any:
        """An answer of the ledger, which adds up at any time."""
        with closing(main.open_ledger(str(self.folder / "ledger.db"))) as db:
            db.execute("BEGIN")
            check(db)
            return question(db)

    def close(self) -> None:
        for child in self.children:
            if child is not self.server:
                child.kill()
                child.wait()
        self.server.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.server.wait(5)
        self.server.kill()
        self.server.wait()
        self.read()


def says_where(text: str, env: dict[str, str]) -> None:
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")
    for port in ("STORE", "MESSAGE_SOURCE"):
        assert f"{env['RESONATE_HOST']}:{env[f'RESONATE_PORT_{port}']}" in text
    assert "start `resonate serve`, version 0.8.2" in text


SCENARIOS: dict[str, Callable[[Stage], None]] = {}


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """Starts every scenario that was selected, each on a stage of its own."""

    def play(name: str, folder: Path) -> None:
        # ttc: how soon it hands out again what was handed to somebody who is frozen
        with closing(Stage(folder, "--aio-poll-ttc", "3s")) as stage:
            SCENARIOS[name](stage)

    selected = {item.name for item in request.session.items}
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        yield {name: pool.submit(play, name, tmp_path_factory.mktemp(name)) for name in SCENARIOS if name in selected}


def scenario(play: Callable[[Stage], None]) -> Callable[..., None]:
    """Makes a test of it: what it says is what came of it."""
    name = SCENARIOS.setdefault(play.__name__, play).__name__

    def test(running: dict[str, Future[None]]) -> None:
        running[name].result()

    test.__doc__ = play.__doc__
    return needs_server(test)


@pytest.fixture
def stage(running: object, tmp_path: Path) -> Iterator[Stage]:
    """A stage, once what takes long is under way."""
    with closing(Stage(tmp_path)) as stage:
        yield stage


# ---- A server, clients and workers -----------------------------------------------------------------------------------


@needs_server
def test_a_client_gets_its_result_and_the_same_again(stage: Stage) -> None:
    """Committed, compensated, rejected; the id of another transfer is an error. No worker is needed."""
    request = {"source": "alice", "target": "bob"}
    committed = {"transfer_id": "t1", "status": "committed", **request, "amount": 3000}
    error = "credit of 20.00: the target refused (simulated)"
    compensated = {"transfer_id": "t2", "status": "compensated", **request, "amount": 2000, "error": error}
    error = "debit of 500.00: insufficient funds"
    rejected = {"transfer_id": "t3", "status": "rejected", **request, "amount": 50000, "error": error}
    for _ in range(2):
        assert stage.run("transfer", "t1", "alice", "bob", "30", "--server") == (0, [committed])
        assert stage.run("transfer", "t2", "alice", "bob", "20", "--server", "--fail-credit") == (1, [compensated])
        assert stage.run("transfer", "t3", "alice", "bob", "500", "--server") == (1, [rejected])
    conflict = stage.start("transfer", "t1", "alice", "bob", "31", "--server")
    assert conflict.wait(60) == 2
    assert re.fullmatch("error: 't1-debit' stands for something else.*\n", conflict.err.read_text())
    assert stage.read(lambda db: [main.balance(db, "alice"), main.balance(db, "bob")]) == [7000, 8000]


@needs_server
@pytest.mark.parametrize("count", [2, 4])
def test_workers_share_the_work(stage: Stage, count: int) -> None:
    """Each transfer is finished by one of them, and said once."""
    workers = [stage.worker() for _ in range(count)]
    transfer_ids = [f"t{number}" for number in range(16)]
    stage.leave(*transfer_ids)
    until(lambda: all(stage.promise(name)["result"] for name in transfer_ids), stage.folder)
    results = [result for worker in workers for result in worker.results()]
    assert Counter(result["transfer_id"] for result in results) == Counter(transfer_ids)
    assert {result["status"] for result in results} == {"committed"}
    assert sum(bool(worker.results()) for worker in workers) > 1
    assert set(stage.read()) == {f"{name}-{kind}" for name in transfer_ids for kind in ("debit", "credit")}


@needs_server
def test_a_worker_stops_when_told(stage: Stage) -> None:
    """By SIGINT and by SIGTERM, with status 0 and in silence."""
    for number in (signal.SIGINT, signal.SIGTERM):
        worker = stage.worker()
        worker.send_signal(number)
        assert worker.wait(60) == 0
        assert worker.err.read_text() == ""


@needs_server
def test_recover_needs_no_worker_if_the_server_has_forgotten(stage: Stage) -> None:
    """The ledger alone is enough: the server has never heard of these transfers."""
    for name in ("t1", "t2"):
        assert stage.run("transfer", name, "alice", "bob", "10", "--crash-after", "debit") == (-9, [])
    status, results = stage.run("recover", "--server")
    assert (status, [result["status"] for result in results]) == (0, ["committed"] * 2)
    assert stage.read(main.in_flight) == []
    assert [stage.promise(result["transfer_id"])["result"] for result in results] == results


@needs_server
def test_a_server_killed_and_started_again_is_survived(stage: Stage) -> None:
    """It dies while five transfers are at their debits, which land while it is away: all resume by themselves."""
    clients, left = ("c1", "c2"), ("w1", "w2", "w3")
    worker = stage.worker()
    with closing(main.open_ledger(str(stage.folder / "ledger.db"))) as db:
        db.execute("BEGIN IMMEDIATE")  # holds the debits: main.py waits 5 s for the ledger
        asking = [stage.start("transfer", name, "alice", "bob", "1", "--server") for name in clients]
        stage.leave(*left)
        until(lambda: all(stage.promise(f"{name}.1") for name in clients + left), worker.err)
        stage.server.kill()
        stage.server.wait()
        db.execute("ROLLBACK")
    until(lambda: stage.read(main.in_flight), worker.err)
    assert stage.serve()
    assert [client.wait(60) for client in asking] == [0, 0]
    until(lambda: len(worker.results()) == len(left), worker.err)
    assert worker.poll() is None
    assert set(stage.read()) == {f"{name}-{kind}" for name in clients + left for kind in ("debit", "credit")}


@needs_server
def test_credentials(running: object, tmp_path: Path) -> None:
    """The right ones work, for a worker too; with wrong ones or none it ends at once, and says so."""
    with closing(Stage(tmp_path, "--api-http-auth", "ann=sesame", "--aio-poll-auth", "ann=sesame")) as stage:
        for credentials in ({}, {"RESONATE_USERNAME": "ann", "RESONATE_PASSWORD": "simsim"}):
            stage.env |= credentials
            stage.refused()
        stage.env["RESONATE_PASSWORD"] = "sesame"
        worker = stage.worker()
        assert stage.run("transfer", "t1", "alice", "bob", "30", "--server")[0] == 0
        stage.leave("t2")
        until(worker.results, worker.err)


@needs_server
def test_half_a_server_is_none(stage: Stage) -> None:
    """Nobody listens on the port for messages."""
    stage.env["RESONATE_PORT_MESSAGE_SOURCE"] = free_port()
    stage.refused()


# ---- No server -------------------------------------------------------------------------------------------------------


@contextmanager
def nobody() -> Iterator[str]:
    yield free_port()


@contextmanager
def silence() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


@contextmanager
def a_web_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as web, ThreadPoolExecutor() as pool:
        pool.submit(web.serve_forever)
        try:
            yield str(web.server_port)
        finally:
            web.shutdown()


@pytest.mark.parametrize("there", [nobody, silence, a_web_server])
def test_no_server(there: Any, cli: Any, ledger: Any, tmp_path: Path) -> None:
    """It ends, with one line that says where there is no server, and what to start; nothing is written."""
    db = ledger()
    with there() as port, ThreadPoolExecutor() as pool:
        env = environment(tmp_path, port, port)
        for run in pool.map(lambda words: cli(*words, env=env, timeout=10), COMMANDS):
            assert (run.status, run.out) == (2, "")
            says_where(run.err, env)
    assert entries(db) == {}


# ---- What takes the ten seconds of a lease, all of it at once --------------------------------------------------------


@scenario
def test_a_killed_clients_transfer_is_finished_by_a_worker(stage: Stage) -> None:
    """With nobody asking; and when it is asked for again, the result is there."""
    worker = stage.worker()
    assert stage.run("transfer", "t1", "alice", "bob", "30", "--server", "--crash-after", "debit") == (-9, [])
    refused = ("transfer", "t2", "alice", "bob", "20", "--server", "--fail-credit")
    assert stage.run(*refused, "--crash-after", "void") == (-9, [])
    assert len(stage.read(main.in_flight)) == 2
    until(lambda: len(worker.results()) == 2, worker.err)
    assert stage.read(main.in_flight) == []
    first, second = sorted(worker.results(), key=lambda result: result["transfer_id"])
    assert (first["status"], second["status"]) == ("committed", "compensated")
    assert stage.run("transfer", "t1", "alice", "bob", "30", "--server") == (0, [first])
    assert stage.run(*refused) == (1, [second])


@scenario
def test_whoever_asks_meanwhile_gets_the_workers_result(stage: Stage) -> None:
    """The same command again, and `recover --server`, right after a client was killed: both wait for the worker."""
    worker = stage.worker()
    command = ("transfer", "t1", "alice", "bob", "30", "--server")
    assert stage.run(*command, "--crash-after", "debit") == (-9, [])
    again, recover = stage.start(*command), stage.start("recover", "--server")
    assert (again.wait(60), recover.wait(60)) == (0, 0)
    assert again.results() == recover.results() == worker.results()
    assert worker.results()[0]["status"] == "committed"


@scenario
def test_a_killed_workers_transfer_is_finished_by_another(stage: Stage) -> None:
    """Killed between debit and credit."""
    killed = stage.worker("SIGKILL")
    stage.leave("t1")
    assert killed.wait(60) == -signal.SIGKILL
    assert stage.read(main.in_flight) == [("t1", "alice", "bob", 100)]
    worker = stage.worker()
    result = until(lambda: stage.promise("t1")["result"], worker.err)
    assert result["status"] == "committed" and worker.results() == [result]
    assert stage.read() == {"t1-debit": ("alice", -100, "debit"), "t1-credit": ("bob", 100, "credit")}


@scenario
def test_a_thawed_workers_late_credit_is_refused(stage: Stage) -> None:
    """Frozen right before its credit, it loses the lease, and another compensates. Without the void: money made."""
    frozen = stage.worker("SIGSTOP")
    stage.leave("t1")
    until(lambda: frozen.says("at the credit"), frozen.err)
    other = stage.worker("refuse")
    result = until(lambda: stage.promise("t1")["result"], other.err)
    assert result["status"] == "compensated" and "the target refused" in result["error"]
    void, reversal = {"t1-credit": ("bob", 0, "void")}, {"t1-reversal": ("alice", 100, "reversal")}
    assert stage.read() == {"t1-debit": ("alice", -100, "debit")} | void | reversal
    assert not frozen.says("credit tried")
    frozen.send_signal(signal.SIGCONT)
    until(lambda: frozen.says("credit tried"), frozen.err)
    assert stage.run("transfer", "t1", "alice", "bob", "1", "--server") == (1, [result])
    assert stage.read() == {"t1-debit": ("alice", -100, "debit")} | void | reversal
    assert frozen.poll() in (None, 1)  # the SDK may have ended it for its stale task
