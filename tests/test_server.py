"""With a real Resonate server: who finishes what, whatever is killed, frozen, wrong or missing."""

import base64
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import ENVIRONMENT, MAIN, check, opened, settled

import main

pytestmark = pytest.mark.xdist_group("server")  # they share the scenarios below
RESONATE = shutil.which("resonate") or ""
VERSION = RESONATE and subprocess.check_output([RESONATE, "--version"], text=True).strip()
HAS_SERVER = VERSION.endswith(" 0.8.2")

# A process forked from one that has imported the SDK starts in 10 ms, and not in 500.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_server"])
ONE_AT_A_TIME = threading.Lock()  # multiprocessing is not made for several threads


def become(words: tuple[Any, ...], folder: Path, environ: dict[str, str], output: str) -> None:
    """Makes of this process a function of this file, another program, or `main.py WORDS`."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY), number)
    if callable(words[0]):
        sys.exit(words[0](*words[1:]))
    if os.path.isabs(words[0]):
        os.execv(words[0], words)
    sys.argv = ["main.py", *words]
    sys.exit(main.main())


def until(condition: Callable[[], Any]) -> Any:
    """What the condition says, as soon as that is true. The limit is for what never comes."""
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.1)
    return value


class Child:
    """A process that writes into files, so that it waits for no reader."""

    def __init__(self, words: tuple[Any, ...], folder: Path, environ: dict[str, str], output: str):
        self.words, self.environ = words, environ
        self.files = Path(f"{output}.out"), Path(f"{output}.err")
        for file in self.files:
            file.touch()
        with ONE_AT_A_TIME:
            arguments = (words, folder, environ, output)
            self.process = FORKS.Process(target=become, args=arguments, daemon=True)
            self.process.start()

    def __str__(self) -> str:
        return f"{self.words}: {self.status()}\n{self.out}{self.err}"

    def status(self) -> int | None:
        """Its exit status, or None while it runs."""
        with ONE_AT_A_TIME:
            return self.process.exitcode

    def wait(self) -> int | None:
        until(lambda: self.status() is not None)
        return self.status()

    def send(self, number: int) -> None:
        if self.status() is None:
            with suppress(ProcessLookupError):
                os.kill(int(str(self.process.pid)), number)

    @property
    def out(self) -> str:
        return self.files[0].read_text()

    @property
    def err(self) -> str:
        return self.files[1].read_text()

    def says(self, words: str) -> list[str]:
        """The lines of its stdout that hold these words."""
        return [line for line in self.out.splitlines() if words in line]

    def result(self) -> Any:
        """The result that it printed, or None."""
        lines = self.says('{"transfer_id"')
        return json.loads(lines[0]) if lines else None

    def error(self) -> str:
        """The line with which it ended. It said no more, but what it waited for."""
        assert self.wait() == 2, self
        waited = ("Waiting for ", "Networking. ", "RuntimeError. ")  # the last: for the ledger
        [line] = [line for line in self.err.splitlines() if not line.startswith(waited)]
        assert line.startswith("error: ")
        return line


def answers(port: str, host: str = "127.0.0.1") -> bool:
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def free_port() -> str:
    """A port that nobody listens on, below those that the kernel gives to connections."""
    ports = (str(random.randrange(10000, 30000)) for _ in iter(int, 1))
    return next(port for port in ports if not answers(port))


PORTS = ("RESONATE_PORT_STORE", "RESONATE_PORT_MESSAGE_SOURCE")


def environment(folder: Path) -> dict[str, str]:
    """What a process is told: to live in the folder, and where the server is."""
    usual = {name: value for name, value in ENVIRONMENT.items() if "RESONATE_" not in name}
    ports = {port: free_port() for port in PORTS}
    return usual | {"HOME": str(folder), "RESONATE_HOST": "http://127.0.0.1"} | ports


class Stage:
    """A folder with a ledger of alice and bob, a server on free ports, and all that runs there."""

    def __init__(
        self, folder: Path, *flags: str, host: str = "127.0.0.1", serve: bool = True
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.flags, self.host = folder, flags, host
        self.children: list[Child] = []
        self.env = environment(folder)
        while serve and not self.serve():
            self.env = environment(folder)
        self.open_ledger("ledger.db")

    def open_ledger(self, name: str) -> None:
        opened(str(self.folder / name)).close()

    def serve(self) -> bool:
        """Starts the server. Returns whether it got its ports: somebody may have been faster."""
        ports = [self.env[port] for port in PORTS]
        bind = f"[{self.host}]" if ":" in self.host else self.host
        flags = ["--api-http-addr", f"{bind}:{ports[0]}", "--aio-poll-addr", f"{bind}:{ports[1]}"]
        flags += ["--metrics-addr", "127.0.0.1:0", "--api-grpc-enable=false"]
        # How soon it hands out again what nobody took, and what was handed out and not claimed.
        flags += ["--aio-poll-ttr", "1s", "--aio-poll-ttc", "10s"]
        server = self.server = self.start(RESONATE, "serve", *flags, *self.flags)
        until(lambda: server.status() or all(answers(port, self.host) for port in ports))
        return server.status() is None

    def start(self, *words: Any, **changes: str) -> Child:
        """Starts `main.py WORDS`, with changes to its environment."""
        output = str(self.folder / str(len(self.children)))
        self.children.append(Child(words, self.folder, self.env | changes, output))
        return self.children[-1]

    def run(self, *words: Any, **changes: str) -> Child:
        child = self.start(*words, **changes)
        child.wait()
        return child

    def worker(self, *words: Any) -> Child:
        child = self.start(*(words or ("worker",)))
        until(lambda: child.says("worker on "))
        return child

    def leave(self, *transfer_ids: str, **ledgers: str) -> None:
        """Leaves transfers of 1.00 to the workers."""
        requests = ledgers or dict.fromkeys(transfer_ids, "ledger.db")
        assert self.run(leave, requests).wait() == 0

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """What the server answers, or None if it answers with an error."""
        url = f"http://127.0.0.1:{self.env['RESONATE_PORT_STORE']}/promises{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)
        with suppress(OSError), urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def result(self, transfer_id: str) -> Any:
        """What the server keeps as the result of a transfer, or None."""
        value = (self.ask("GET", f"/{transfer_id}") or {}).get("value", {})
        return json.loads(base64.b64decode(value.get("data", "")) or "null")

    def read(
        self, question: Callable[[sqlite3.Connection], Any] = settled, ledger: str = "ledger.db"
    ) -> Any:
        """An answer of a ledger, which adds up at any time."""
        with closing(main.open_ledger(str(self.folder / ledger))) as db:
            db.execute("BEGIN")
            check(db)
            return question(db)

    @contextmanager
    def held(self, ledger: str = "ledger.db") -> Iterator[None]:
        """Nothing settles meanwhile: the processes wait up to 5 s for the ledger."""
        with closing(sqlite3.connect(self.folder / ledger, autocommit=True)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield
            db.execute("ROLLBACK")

    def until_at_their_debits(self, *transfer_ids: str) -> None:
        until(lambda: all(self.ask("GET", f"/{name}.1") for name in transfer_ids))

    def close(self) -> None:
        for child in self.children:
            child.send(signal.SIGKILL)
            child.wait()
        for file in self.folder.glob("*.db"):
            if file.name != "resonate.db":
                self.read(ledger=file.name)


def leave(requests: dict[str, str]) -> None:
    """A client of each ledger, which leaves a transfer of 1.00 to the workers, and goes."""
    for name, ledger in requests.items():
        handle = main.start(main.open_ledger(ledger), remote=True, client=True)[1]
        handle.begin_rpc(name, transfer_id=name, source="alice", target="bob", amount=100)


def transfer(transfer_id: str, amount: str = "1", *flags: str) -> tuple[str, ...]:
    return ("transfer", transfer_id, "alice", "bob", amount, "--server", *flags)


def committed(transfer_id: str, amount: int = 100) -> dict[str, Any]:
    """The result of such a transfer."""
    request = {"transfer_id": transfer_id, "source": "alice", "target": "bob", "amount": amount}
    return request | {"status": "committed"}


def op_ids(*transfer_ids: str) -> set[str]:
    """Those of committed transfers."""
    return {f"{name}-{kind}" for name in transfer_ids for kind in ("debit", "credit")}


SCENARIOS: dict[str, Callable[[Stage], int | None]] = {}


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[int | None]]]:
    """Plays the scenarios that were selected, ten at a time, those at the end of this file first:
    they take the ten seconds of a lease."""

    def play(name: str, folder: Path) -> int | None:
        with closing(Stage(folder)) as stage:
            try:
                return SCENARIOS[name](stage)
            except BaseException as error:
                error.add_note("\n".join(map(str, stage.children)))
                raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        forkserver.ensure_running()
    items = request.session.items if HAS_SERVER else []
    selected = [item.name for item in items if item.name in SCENARIOS]
    with ThreadPoolExecutor(10) as pool:
        yield {
            name: pool.submit(play, name, tmp_path_factory.mktemp(name))
            for name in reversed(selected)
        }


def scenario(play: Callable[[Stage], int | None]) -> Callable[..., None]:
    """Makes a test of what happens on a stage. Several of these run at the same time."""
    name = SCENARIOS.setdefault(play.__name__, play).__name__

    @pytest.mark.skipif(not HAS_SERVER, reason=f"needs resonate 0.8.2 on PATH, not {VERSION!r}")
    def test(running: dict[str, Future[int | None]], record_property: Any) -> None:
        if wrong := running[name].result():
            record_property("requests to the server answered wrongly", wrong)

    test.__doc__ = play.__doc__
    return test


# ---- A server, clients and workers --------------------------------------------------------------

REFUSED = "the target refused (simulated)"
REQUESTS = {  # id: amount and flags, exit status, what is said besides the request
    "t1": (("30",), 0, {}),
    "t2": (("5", "--lose-answer"), 0, {}),
    "t3": (("20", "--fail-credit"), 1, {"status": "compensated", "error": REFUSED}),
    "t4": (("500",), 1, {"status": "rejected", "error": "insufficient funds"}),
}


@scenario
def test_a_client_gets_its_result_and_the_same_again(stage: Stage) -> None:
    """No worker is needed. The id of another transfer is an error."""
    assert stage.run(sys.executable, str(MAIN), *transfer("t1", "30")).wait() == 0
    for _ in range(2):
        for name, (words, status, said) in REQUESTS.items():
            client = stage.run(*transfer(name, *words))
            assert client.wait() == status
            assert client.result() == committed(name, int(words[0]) * 100) | said
    conflict = stage.run(*transfer("t1", "31"))
    assert "'t1' is already used: 30.00 from alice to bob" in conflict.error()
    assert stage.read(lambda db: main.balance(db, "alice")) == 6500


@scenario
def test_workers_share_the_work(stage: Stage) -> None:
    """Each transfer is finished by one of them, and said once."""
    workers = [stage.worker() for _ in range(4)]
    transfer_ids = [f"t{number}" for number in range(16)]
    stage.leave(*transfer_ids)
    until(lambda: all(stage.result(name) for name in transfer_ids))
    said = [line for worker in workers for line in worker.says(" committed")]
    assert sorted(said) == sorted(f"{name} committed" for name in transfer_ids)
    assert sum(bool(worker.says(" committed")) for worker in workers) > 1
    assert stage.read().keys() == op_ids(*transfer_ids)


@scenario
def test_a_worker_says_where_it_works_and_stops_when_told(stage: Stage) -> None:
    """Ctrl-C and SIGTERM end it with status 0, and in silence: so they end the loop round it."""
    url = f"http://127.0.0.1:{stage.env['RESONATE_PORT_STORE']}"
    for number in (signal.SIGINT, signal.SIGTERM):
        worker = stage.worker(sys.executable, str(MAIN), "worker")
        worker.send(number)
        assert (worker.wait(), worker.err) == (0, "")
        assert worker.out == f"worker on {stage.folder / 'ledger.db'} at {url}\n"


@scenario
def test_a_worker_on_another_ledger_takes_none_of_our_transfers(stage: Stage) -> None:
    """It would move its own money, and say committed."""
    stage.open_ledger("theirs.db")
    theirs = stage.worker("worker", "--ledger", "theirs.db")
    stage.leave("ours")
    stage.leave(theirs="theirs.db")
    until(lambda: stage.result("theirs"))
    assert (stage.result("ours"), theirs.says("ours ")) == (None, [])
    stage.worker()
    until(lambda: stage.result("ours"))
    assert stage.read().keys() == op_ids("ours")
    assert stage.read(ledger="theirs.db").keys() == op_ids("theirs")


CONTRADICTED = "the ledger.* says 'unknown'.* use another id$"


@scenario
def test_a_ledger_started_over_is_not_answered_for_by_old_promises(stage: Stage) -> None:
    """The result of the deleted ledger is refused, and the line says what to do."""
    assert stage.run(*transfer("t1")).wait() == 0
    for file in stage.folder.glob("ledger.db*"):
        file.unlink()
    stage.open_ledger("ledger.db")
    again = stage.run(*transfer("t1"))
    assert re.search(CONTRADICTED, again.error()) and again.result() is None
    assert stage.read() == {}
    assert stage.run(*transfer("t2")).result() == committed("t2")


def settled_as(state: str, data: bytes = b"") -> dict[str, Any]:
    return {"state": state, "value": {"data": base64.b64encode(data).decode()}}


# What somebody else may make of the promise of a transfer.
SETTLEMENTS: dict[str, dict[str, Any]] = {
    "canceled": settled_as("REJECTED_CANCELED"),
    "rejected": settled_as("REJECTED", b'"no"'),
    "nothing": settled_as("RESOLVED"),
    "unreadable": settled_as("RESOLVED", b"\xff{"),
    "untrue": settled_as("RESOLVED", json.dumps(committed("untrue")).encode()),
}


def strange(stage: Stage, name: str, key: str) -> None:
    """Somebody else's promise. With our key, which is the id, the server takes it for ours."""
    promise = {"id": name, "timeout": 2**52, "param": {}, "tags": {}}
    assert stage.ask("POST", "", promise, **{"Idempotency-Key": key})


@scenario
def test_a_strangers_promise_under_our_id_is_not_believed(stage: Stage) -> None:
    """Whatever is in it. If it is pending for ever, the client says that it waits."""
    for name, settlement in SETTLEMENTS.items():
        strange(stage, name, name)
        assert stage.ask("PATCH", f"/{name}", settlement)
    strange(stage, "of-another-key", "another key")
    strange(stage, "pending", "pending")
    waiting = stage.start(*transfer("pending"))
    clients = [stage.start(*transfer(name)) for name in (*SETTLEMENTS, "of-another-key")]
    for client in clients:
        assert re.search(CONTRADICTED, client.error()) and client.result() is None
    until(lambda: "Waiting for pending. " in waiting.err)
    assert stage.read() == {}


def client_that_stops() -> int:
    """A program that stops its engine when it is told to, while it waits for a transfer."""
    with closing(main.open_ledger("ledger.db")) as db:
        resonate, handle = main.start(db, remote=True, client=True)
        signal.signal(signal.SIGTERM, lambda *_: resonate.stop())
        try:
            main.submit(db, handle, "pending", "alice", "bob", 100)
        except ConnectionError as error:
            return main.failed(error)
    return 0


@scenario
def test_who_waits_is_told_that_the_engine_has_stopped(stage: Stage) -> None:
    """The SDK leaves some of its futures pending for ever."""
    strange(stage, "pending", "pending")
    client = stage.start(client_that_stops)
    until(lambda: "Waiting for pending. " in client.err)
    client.send(signal.SIGTERM)
    assert "stopped" in client.error()


# ---- Where the server is, and where none is -----------------------------------------------------

COMMANDS = (transfer("t1", "30"), ("worker",))


def finds_no_server(child: Child) -> bool:
    """Whether it ends with a line that says where there is no server, and what to start."""
    urls = [f"{child.environ['RESONATE_HOST']}:{child.environ[port]}" for port in PORTS]
    line = rf"error: no Resonate server at {' and '.join(urls)} \(.*\): start `resonate serve`, .*"
    return bool(re.fullmatch(line, child.error()))


def refused(stage: Stage, **changes: str) -> bool:
    """Whether no command finds a server, and none writes anything."""
    children = [stage.start(*words, **changes) for words in COMMANDS]
    return all(map(finds_no_server, children)) and stage.read() == {}


def works(stage: Stage) -> bool:
    """Whether a client and a worker do their work."""
    stage.worker()
    stage.leave("left")
    done = stage.run(*transfer("asked")).wait() == 0
    return done and until(lambda: stage.read().keys() == op_ids("left", "asked"))


@scenario
def test_credentials(stage: Stage) -> None:
    """The right ones work; wrong ones or none are refused."""
    auth = ("--api-http-auth", "ann=sesame", "--aio-poll-auth", "ann=sesame")
    with closing(Stage(stage.folder / "guarded", *auth)) as guarded:
        assert refused(guarded)
        guarded.env |= {"RESONATE_USERNAME": "ann", "RESONATE_PASSWORD": "simsim"}
        assert refused(guarded)
        guarded.env["RESONATE_PASSWORD"] = "sesame"
        assert works(guarded)


@scenario
def test_half_a_server_is_none(stage: Stage) -> None:
    """Nobody listens on the port for messages."""
    assert refused(stage, RESONATE_PORT_MESSAGE_SOURCE=free_port())


def serve(handler: type[BaseHTTPRequestHandler]) -> None:
    ThreadingHTTPServer.request_queue_size = 100  # of 5, a crowd of clients is refused
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


def test_no_server(running: object, tmp_path: Path) -> None:
    """Nobody listens, or somebody is silent, or a web server is there. Nothing is written."""
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, closing(Stage(tmp_path, serve=False)) as stage:
        web = stage.start(serve, BaseHTTPRequestHandler)
        until(lambda: web.out.endswith("\n"))
        ports = (free_port(), str(silent.getsockname()[1]), web.out.strip())
        changes = [dict.fromkeys(PORTS, port) for port in ports]
        children = [stage.start(*words, **there) for there in changes for words in COMMANDS]
        assert all(map(finds_no_server, children)) and stage.read() == {}


RIGHT = ("http://127.0.0.1", "http://localhost")
WRONG = (
    *("127.0.0.1", "localhost", "http://", "", "[::1]", "http://::1", "ftp://127.0.0.1"),
    *("http://127.0.0.1/", "http://127.0.0.1:8001", "http://127.0.0.1/api", "http:/127.0.0.1"),
)


@scenario
def test_the_host_as_users_write_it(stage: Stage) -> None:
    """It is right, or one line says how to write it."""
    for number, host in enumerate(RIGHT):
        assert stage.run(*transfer(f"t{number}"), RESONATE_HOST=host).wait() == 0
    for host in WRONG:
        for child in [stage.start(*words, RESONATE_HOST=host) for words in COMMANDS]:
            assert child.error().startswith("error: RESONATE_HOST is written http://HOST, not '")


@scenario
def test_a_server_on_ipv6(stage: Stage) -> None:
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("needs IPv6")
    with closing(Stage(stage.folder / "other", host="::1")) as other:
        other.env["RESONATE_HOST"] = "http://[::1]"
        assert works(other)


def listening(pid: object) -> dict[int, str]:
    """port -> address, in the kernel's hexadecimal, of what a process listens on."""
    links = [os.path.realpath(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    sockets = [link.rpartition("socket:")[2] for link in links]
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    ours = [row[1].split(":") for row in rows if row[3] == "0A" and f"[{row[9]}]" in sockets]
    return {int(port, 16): address for address, port in ours}


@scenario
def test_the_readmes_server_opens_loopback_only(stage: Stage) -> None:
    """The operating system is asked. The ports are others: those of the README may be taken."""
    if not os.path.exists("/proc/net/tcp6"):
        pytest.skip("needs /proc/net")
    readme = MAIN.with_name("README.md").read_text()
    block = re.search(r"^resonate serve(?:.*\\\n)*.*$", readme, re.MULTILINE)
    assert block
    command = block[0].replace("\\\n", " ")
    ports = {port: free_port() for port in ("8001", "8002", "9090")}
    for port, free in ports.items():
        assert f" 127.0.0.1:{port}" in command
        command = command.replace(f":{port}", f":{free}")
    server = stage.start(RESONATE, *shlex.split(command, comments=True)[1:])
    until(lambda: server.status() or all(map(answers, ports.values())))
    assert listening(server.process.pid) == {int(port): "0100007F" for port in ports.values()}


# ---- Wrong answers ------------------------------------------------------------------------------


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on to the server, and answers one of them wrongly.

    The name of the user says which: 404-3 is the third request of that user, 404-0 each of its
    heartbeats. `lost` is an answer that gets lost after the server has done what it was asked.
    What a client asks again after 2 s, because this machine is busy, does not count.
    """

    seen: ClassVar[Counter[str]] = Counter()

    def do_POST(self) -> None:
        user = base64.b64decode(self.headers["Authorization"].split()[1]).decode().split(":")[0]
        wrong, number = user.split("-")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/tasks/heartbeat":
            hit = number == "0" and b"nobody" not in body
        elif self.path == "/promises/task" and self.seen[user] > 1:
            hit = False
        else:
            self.seen[user] += 1
            hit = self.seen[user] == int(number)
        if hit and wrong != "lost":
            return self.answer(int(wrong), b"{}")
        with closing(HTTPConnection("127.0.0.1", os.environ["RESONATE_PORT_STORE"])) as server:
            server.request(self.command, self.path, body, dict(self.headers))
            response = server.getresponse()
            if not hit:
                self.answer(response.status, response.read())

    do_PATCH = do_POST

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def by_proxy(stage: Stage) -> dict[str, dict[str, str]]:
    """For each case, how the environment of a process changes that hears that wrong answer."""
    proxy = stage.start(serve, Proxy)
    port = until(lambda: proxy.out.strip())
    return {case: {"RESONATE_USERNAME": case, "RESONATE_PORT_STORE": port} for case in CASES}


# Each of the 7 requests that make a transfer (0: the heartbeats), answered wrongly in each way.
WAYS = ("503", "500", "404", "lost")
CASES = [f"{way}-{number}" for way in WAYS for number in range(8)]
FATAL = [f"404-{number}" for number in range(1, 7)]  # the last request no longer matters


@scenario
def test_a_client_outlasts_a_wrong_answer_or_says_to_ask_again(stage: Stage) -> int:
    """It never says what is not so. The same command, straight to the server, finds out."""
    stage.worker()
    clients, changes = {}, by_proxy(stage)
    for way in WAYS:
        eight = [case for case in CASES if case.startswith(way)]
        clients |= {case: stage.start(*transfer(case), **changes[case]) for case in eight}
        for client in clients.values():
            client.wait()
    assert [case for case in CASES if clients[case].wait() != 0] == FATAL
    for case in FATAL:
        assert "Nothing is lost. Run the same command again" in clients[case].error()
        assert clients[case].result() is None
        clients[case] = stage.start(*transfer(case))
    for case in CASES:
        assert (clients[case].wait(), clients[case].result()) == (0, committed(case))
    assert stage.read().keys() == op_ids(*CASES)
    return len(CASES)


@scenario
def test_a_worker_outlasts_a_wrong_answer_or_ends_in_a_line(stage: Stage) -> int:
    """It does not live on without working: the loop starts it again, and the money arrives."""
    ledgers, changes = {case: f"{case}.db" for case in CASES}, by_proxy(stage)
    workers = {}
    for case, ledger in ledgers.items():
        stage.open_ledger(ledger)
        workers[case] = stage.start("worker", "--ledger", ledger, **changes[case])
    until(lambda: all(worker.says("worker on ") for worker in workers.values()))
    stage.leave(**ledgers)
    until(lambda: all(workers[case].status() or stage.result(case) for case in CASES))
    ended = [case for case in CASES if workers[case].status()]
    assert ended == [*FATAL, "lost-1"]  # lost-1: the server does not hand out a task twice
    for case in ended:
        assert workers[case].err == f"{workers[case].error()}\n"
        stage.start("worker", "--ledger", ledgers[case])
    until(lambda: all(stage.result(case) == committed(case) for case in CASES))
    assert ended == [case for case in CASES if workers[case].status() is not None]
    for case, ledger in ledgers.items():
        assert stage.read(ledger=ledger).keys() == op_ids(case)
    return len(CASES)


@scenario
def test_a_promise_settled_from_outside_leaves_the_money_to_the_ledger(stage: Stage) -> None:
    """The promise of a transfer in flight, or of its debit. The worker goes on or ends in a line;
    the client says what the ledger says, or nothing; `recover` needs no promises."""
    ledgers = {f"{how}-{of}": f"{how}-{of}.db" for how in SETTLEMENTS for of in ("all", "debit")}
    workers, clients = {}, {}
    for case, ledger in ledgers.items():
        stage.open_ledger(ledger)
        workers[case] = stage.worker("worker", "--ledger", ledger)
    with ExitStack() as stack:
        for ledger in ledgers.values():
            stack.enter_context(stage.held(ledger))
        stage.leave(**ledgers)
        stage.until_at_their_debits(*ledgers)
        for case, ledger in ledgers.items():
            how, of = case.split("-")
            promise = f"/{case}" if of == "all" else f"/{case}.1"
            assert stage.ask("PATCH", promise, SETTLEMENTS[how])
            clients[case] = stage.start(*transfer(case), "--ledger", ledger)
        for how in SETTLEMENTS:
            assert re.search(CONTRADICTED, clients[f"{how}-all"].error())
    until(lambda: all(workers[case].status() or workers[case].says(f"{case} ") for case in ledgers))
    for ledger in ledgers.values():
        assert stage.run("recover", "--ledger", ledger).wait() == 0
    for case, ledger in ledgers.items():
        assert stage.read(ledger=ledger).keys() == op_ids(case)
        assert clients[case].result() in (None, committed(case))
        assert workers[case].status() is None or workers[case].error()


# ---- A server that goes away --------------------------------------------------------------------


def restarted(stage: Stage, number: int) -> None:
    """Ends the server while twelve transfers are at their debits, which land while it is away."""
    asked, left = [f"c{n}" for n in range(8)], [f"w{n}" for n in range(4)]
    workers = [stage.worker(), stage.worker()]
    with stage.held():
        clients = [stage.start(*transfer(name)) for name in asked]
        stage.leave(*left)
        stage.until_at_their_debits(*asked, *left)
        stage.server.send(number)
        stage.server.wait()
    until(lambda: stage.read(main.in_flight))
    assert stage.serve()
    assert [client.wait() for client in clients] == [0] * len(asked)
    assert [client.result() for client in clients] == [committed(name) for name in asked]
    until(lambda: all(stage.result(name) == committed(name) for name in left))
    assert [worker.status() for worker in workers] == [None, None]
    assert stage.read().keys() == op_ids(*asked, *left)


@scenario
def test_a_server_killed_and_started_again_is_outlasted(stage: Stage) -> None:
    """All transfers resume by themselves."""
    restarted(stage, signal.SIGKILL)


@scenario
def test_a_graceful_restart_loses_no_client(stage: Stage) -> None:
    """Eight clients and two workers go on."""
    restarted(stage, signal.SIGTERM)


@scenario
def test_a_server_that_has_lost_its_store_leaves_nobody_waiting(stage: Stage) -> None:
    """Who waited for another's transfer runs it; who ran one goes on, or ends in a line."""
    stage.open_ledger("other.db")
    other = (*transfer("killed"), "--ledger", "other.db")
    assert stage.run(*other, "--crash-after", "debit").wait() == -signal.SIGKILL
    waiting = stage.start(*other)
    until(lambda: "Waiting for killed. " in waiting.err)
    worker = stage.worker()
    with stage.held():
        client = stage.start(*transfer("asked"))
        stage.leave("left")
        stage.until_at_their_debits("asked", "left")
        stage.server.send(signal.SIGKILL)
        stage.server.wait()
        for file in stage.folder.glob("resonate.db*"):
            file.unlink()
        assert stage.serve()
    assert (waiting.wait(), waiting.result()) == (0, committed("killed"))
    assert client.wait() == 0 or "Nothing is lost. " in client.error()
    until(lambda: worker.status() or stage.result("left"))
    assert worker.status() is None or worker.error()
    assert stage.run("recover").wait() == 0
    assert stage.read().keys() == op_ids("asked", "left")


# ---- Killed and frozen processes ----------------------------------------------------------------

CRASHES = {  # id: amount and flags, after which operation the client is killed, the status
    "t1": (("1",), "debit", "committed"),
    "t2": (("1",), "credit", "committed"),
    "t3": (("1", "--fail-credit"), "credit", "compensated"),
    "t4": (("1", "--fail-credit"), "reversal", "compensated"),
    "t5": (("500",), "debit", "rejected"),
}


@scenario
def test_a_killed_clients_transfer_is_finished_by_a_worker(stage: Stage) -> None:
    """Automatically, wherever it was killed; whoever asks again gets the worker's result."""
    worker = stage.worker()
    for name, (words, kind, _) in CRASHES.items():
        killed = stage.run(*transfer(name, *words), "--crash-after", kind)
        assert (killed.wait(), killed.out) == (-signal.SIGKILL, "")
    until(lambda: all(stage.result(name) for name in CRASHES))
    for name, (words, _, status) in CRASHES.items():
        result = stage.result(name)
        assert result["status"] == status and worker.says(f"{name} {status}")
        assert stage.run(*transfer(name, *words)).result() == result
    assert stage.read(main.in_flight) == []


@scenario
def test_whoever_waits_says_what_for_and_how_to_help(stage: Stage) -> None:
    """A client was killed, and no worker runs. The same command waits until one does."""
    assert stage.run(*transfer("t1"), "--crash-after", "debit").wait() == -signal.SIGKILL
    again = stage.start(*transfer("t1"))
    until(lambda: again.err)
    assert re.fullmatch("Waiting for t1. .* worker .* 15 seconds: .*main.py worker\n", again.err)
    worker = stage.worker()
    assert (again.wait(), again.result()) == (0, committed("t1"))
    assert worker.says("t1 committed")


@scenario
def test_a_killed_workers_transfer_is_finished_by_another(stage: Stage) -> None:
    """Killed between debit and credit."""
    killed = stage.worker("worker", "--crash-after", "debit")
    stage.leave("t1")
    assert killed.wait() == -signal.SIGKILL
    assert stage.read(main.in_flight) == [("t1", "alice", "bob", 100)]
    worker = stage.worker()
    assert until(lambda: stage.result("t1")) == committed("t1")
    assert worker.says("t1 committed") and stage.read().keys() == op_ids("t1")


def odd_worker(freezes: bool) -> int:
    """A worker that freezes right before its credit, or else hears that the target refuses."""
    settle, leave, tried = main.settle, os._exit, threading.Event()

    def settle_oddly(
        db: sqlite3.Connection, operation: main.Operation, void: str | None = None
    ) -> str | None:
        if operation.kind != "credit" or void is not None:
            return settle(db, operation, void)
        if not freezes:
            raise sqlite3.IntegrityError("the target refused")
        print("at the credit", flush=True)
        signal.raise_signal(signal.SIGSTOP)
        try:
            return settle(db, operation)
        finally:
            print("credit tried", flush=True)
            tried.set()

    main.settle = settle_oddly
    if freezes:  # the SDK ends who has lost the lease: let it, but not before the credit was tried
        os._exit = lambda status: (tried.wait(), leave(status))  # type: ignore[assignment]
    sys.argv = ["main.py", "worker"]
    return main.main()


@scenario
def test_a_thawed_workers_late_credit_is_refused(stage: Stage) -> None:
    """It has lost the lease, and another has compensated. Without the void, it creates money."""
    # The server may hand the task to the frozen worker once more, and wait for its claim.
    with closing(Stage(stage.folder / "impatient", "--aio-poll-ttc", "3s")) as impatient:
        thaw_too_late(impatient)


def thaw_too_late(stage: Stage) -> None:
    frozen = stage.worker(odd_worker, True)
    stage.leave("t1")
    until(lambda: frozen.says("at the credit"))
    stage.worker(odd_worker, False)
    result = until(lambda: stage.result("t1"))
    assert result == committed("t1") | {"status": "compensated", "error": "the target refused"}
    void, reversal = ("bob", 100, "the target refused"), ("alice", 100, None)
    expected = {"t1-debit": ("alice", -100, None), "t1-credit": void, "t1-reversal": reversal}
    assert stage.read() == expected and not frozen.says("credit tried")
    frozen.send(signal.SIGCONT)
    until(lambda: frozen.says("credit tried"))
    assert stage.run(*transfer("t1")).result() == result
    assert stage.read() == expected
    assert frozen.status() is None or frozen.error()
