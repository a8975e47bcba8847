"""With a real Resonate server: who finishes what, whatever is killed, frozen, wrong or missing."""

import os
import random
import re
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM, raise_signal
from subprocess import PIPE, Popen, check_output

import pytest
import requests
from conftest import ENVIRONMENT, MAIN, opened

import main

RESONATE = shutil.which("resonate")
VERSION = check_output([RESONATE, "--version"], text=True) if RESONATE else "none"
README = MAIN.with_name("README.md").read_text()
[COMMAND] = re.findall(r"^resonate serve(?:.*\\\n)*.*$", README, re.MULTILINE)
NEVER = 2**52  # in milliseconds since 1970
TRANSFER = "transfer t1 alice bob 1 --server"
REQUEST = {"source": "alice", "target": "bob", "amount": 100}


def until(condition):
    """Returns as soon as the condition is true. If it never is, the limit of the test ends this."""
    while not condition():
        time.sleep(0.1)


def answers(port, host="127.0.0.1"):
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False


def free_port():
    """A port that nobody listens on, below those that the kernel gives to connections."""
    while answers(port := str(random.randrange(10000, 30000))):
        pass
    return port


def end(process, number=0):
    """Its exit status after this signal, and what it has said that nobody has read yet."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


class Engine:
    def __init__(self, ledger, client):
        self.ledger = ledger
        self.resonate, self.transfer = main.start(ledger, remote=True, client=client)
        self.promises = self.resonate.promises

    def submit(self, transfer_id, **changes):
        """Runs a transfer, or waits until somebody else has run it. Returns its status."""
        request = REQUEST | changes
        return main.submit(self.ledger, self.transfer, transfer_id, **request)["status"]

    def leave(self, transfer_id, **changes):
        [ledger_id] = self.ledger.execute("PRAGMA user_version").fetchone()
        workers = self.resonate.options(target=f"money-transfer-{ledger_id}")
        request = REQUEST | changes
        workers.begin_rpc(transfer_id, "transfer_money", transfer_id=transfer_id, **request)


class Stage:
    """A ledger, a server, clients and workers. All of them end with the test."""

    def __init__(self, ledger, patch):
        self.ledger, self.patch = ledger, patch
        self.processes, self.engines = ExitStack(), ExitStack()
        self.ports = {port: free_port() for port in ("8001", "8002", "9090")}
        patch.setenv("RESONATE_HOST", "http://localhost")
        patch.setenv("RESONATE_PORT_STORE", self.ports["8001"])
        patch.setenv("RESONATE_PORT_MESSAGE_SOURCE", self.ports["8002"])
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        self.gave_up = []  # when the SDK gives up, it would end this process
        patch.setattr(os, "_exit", self.gave_up.append)

    def run(self, words, **options):
        process = self.processes.enter_context(Popen(words, text=True, **options))
        self.processes.callback(process.kill)
        return process

    def serve(self, *flags, host="127.0.0.1"):
        """Starts the README's server, on our ports. It has the promises of the one before it."""
        command = COMMAND.replace("\\\n", "").replace("127.0.0.1", host)
        for port, ours in self.ports.items():
            command = command.replace(f":{port}", f":{ours}")
        command += " --aio-poll-ttc 3s"  # so long may a worker take to claim what it was handed
        self.server = self.run([*command.split(), *flags])
        ports, host = self.ports.values(), host.strip("[]")
        until(lambda: all(answers(port, host) for port in ports))

    def start(self, command, odd=""):
        """Starts `main.py COMMAND`, or a function of this file that does so in an odd way."""
        program = ["-c", f"import test_server; test_server.{odd}()"] if odd else [str(MAIN)]
        words = [sys.executable, *program, *command.split()]
        return self.run(words, stdout=PIPE, stderr=PIPE)

    def worker(self, ledger="ledger.db", odd=""):
        """A worker, as soon as it says where it works."""
        process = self.start(f"worker --ledger {ledger}", odd)
        line = f"worker on {os.path.abspath(ledger)} at http://localhost:{self.ports['8001']}\n"
        assert process.stdout.readline() == line
        return process

    def engine(self, ledger=None, client=True):
        engine = Engine(ledger or self.ledger, client)
        self.engines.callback(engine.resonate.stop)
        return engine


@pytest.fixture
def stage(ledger, tmp_path, monkeypatch):
    if "version 0.8.2" not in VERSION:
        pytest.skip(f"needs resonate 0.8.2 on PATH, not {VERSION.strip()}")
    monkeypatch.chdir(tmp_path)
    stage = Stage(ledger, monkeypatch)
    with stage.processes, stage.engines:
        yield stage
    assert stage.gave_up == []


@pytest.fixture
def client(stage):
    stage.serve()
    return stage.engine()


def frozen_worker():
    """A worker that freezes right before its credit."""
    settle = main.settle

    def settle_late(db, operation, void=None):
        if operation.kind != "credit" or void is not None:
            return settle(db, operation, void)
        print("at the credit", flush=True)
        raise_signal(SIGSTOP)
        reason = settle(db, operation)
        print("the credit is void:", reason, flush=True)
        return reason

    vars(main)["settle"] = settle_late
    # The SDK would end who has lost the lease, perhaps before the credit.
    vars(os)["_exit"] = lambda _status: threading.Event().wait()
    sys.exit(main.main())


@pytest.mark.timeout(300)
def test_a_thawed_workers_late_credit_is_refused(stage, client):
    """It has lost the lease, and another has compensated. Without the void, it creates money."""
    frozen = stage.worker(odd="frozen_worker")
    client.leave("t1", target="carol")
    assert frozen.stdout.readline() == "at the credit\n"
    stage.worker()
    assert client.submit("t1", target="carol") == "compensated"
    main.open_account(stage.ledger, "carol")  # what the credit lacked
    frozen.send_signal(SIGCONT)
    assert frozen.stdout.readline() == "the credit is void: unknown account\n"


def test_what_the_killed_have_left_is_finished_by_a_worker(stage, client):
    """Though the server was killed, too. Whoever waits says so, and gets the worker's result."""
    client.leave("t2")
    for command in ("worker", TRANSFER):
        assert stage.start(f"{command} --crash-after debit").wait() == -SIGKILL
    again = stage.start(TRANSFER)
    line = again.stderr.readline()
    assert re.fullmatch("Waiting for t1. .* worker .* 15 seconds: .*main.py worker\n", line)
    worker = stage.worker()
    end(stage.server, SIGKILL)
    stage.serve()
    _, out, err = end(again)
    assert '"status": "committed"' in out
    assert "Waiting" not in err
    assert client.submit("t2") == "committed"
    assert end(worker, SIGTERM)[0] == 0


def test_nobody_waits_for_ever_for_a_promise_that_nobody_keeps(stage, client):
    """Who waits runs it if the server has lost it, and is told if the SDK has stopped."""

    def lose_the_store(*_):
        end(stage.server, SIGKILL)
        stage.serve("--aio-store-sqlite-path", "another.db")

    client.promises.create("t1", NEVER, ikey="t1")
    stage.patch.setattr(main.LOG, "warning", lose_the_store)  # says that the client waits
    assert client.submit("t1") == "committed"
    client.promises.create("t2", NEVER, ikey="t2")
    stage.patch.setattr(main.LOG, "warning", lambda *_: client.resonate.stop())
    with pytest.raises(ConnectionError, match="the SDK has stopped"):
        client.submit("t2")


def answered(wrongly):
    """How `requests` sends, if some requests, say "POST /promises", have this wrong status."""
    send = requests.Session.send

    def send_or_fail(session, request, **options):
        response = requests.Response()
        response.status_code = wrongly(f"{request.method} {request.path_url}") or 0
        return response if response.status_code else send(session, request, **options)

    return send_or_fail


def test_wrong_answers_are_outlasted(stage, client):
    asked = Counter()

    def wrongly(request):
        asked[request] += 1
        if request in ("POST /tasks/complete", "POST /tasks/heartbeat"):
            return 404
        return 503 if asked[request] == 1 else 0

    stage.engine(client=False)
    client.leave("left")
    stage.patch.setattr(requests.Session, "send", answered(wrongly))
    assert client.submit("t1") == "committed"
    assert client.submit("left") == "committed"
    until(lambda: asked["POST /tasks/heartbeat"] > 3)


def wrongly_answered():
    """A process that is always answered wrongly when it asks the server for one thing."""
    vars(requests)["Session"].send = answered({os.environ["WRONG"]: 404}.get)
    sys.exit(main.main())


@pytest.mark.parametrize(
    ("command", "wrong", "says"),
    [
        (TRANSFER, "POST /promises/task", f"says 'unknown' of 't1'. {main.ASK_AGAIN}"),
        (TRANSFER, "POST /promises", f"says 'unknown' of 't1'. {main.ASK_AGAIN}"),
        ("worker", "POST /tasks/claim", f"the SDK has stopped: .*{main.ASK_AGAIN}"),
        ("worker", "POST /promises", "the SDK has stopped: start the worker again"),
    ],
)
def test_what_cannot_be_outlasted_ends_a_process_in_a_line(stage, client, command, wrong, says):
    client.leave("of-the-worker")
    stage.patch.setenv("WRONG", wrong)
    status, out, err = end(stage.start(command, odd="wrongly_answered"))
    assert status == 2
    assert "committed" not in out
    assert re.fullmatch(f"error: .*{says}.*\n", err)


def test_a_client_needs_no_worker_and_gets_the_same_result_again(stage):
    """On IPv6 and with a password, too. The id of another transfer is an error."""
    host = "[::1]" if os.path.exists("/proc/net/if_inet6") else "127.0.0.1"
    stage.serve("--api-http-auth", "ann=sesame", "--aio-poll-auth", "ann=sesame", host=host)
    stage.patch.setenv("RESONATE_HOST", f"http://{host}")
    stage.patch.setenv("RESONATE_USERNAME", "ann")
    stage.patch.setenv("RESONATE_PASSWORD", "sesame")
    client = stage.engine()
    for _ in range(2):
        assert client.submit("t1") == "committed"
        assert client.submit("t2", simulate_lost_answer=True) == "committed"
        assert client.submit("t3", simulate_credit_failure=True) == "compensated"
    with pytest.raises(main.OperationConflict, match=r"'t1' is already used: 1\.00 from alice to"):
        client.submit("t1", amount=101)


def test_a_worker_on_another_ledger_takes_nothing_of_ours(stage, client):
    """It would move its own money, and say committed."""
    with closing(opened("theirs.db")) as theirs:
        worker = stage.worker("theirs.db")
        they = stage.engine(theirs)
        client.leave("ours")
        they.leave("t1")
        assert they.submit("t1") == "committed"
    assert end(worker, SIGINT) == (0, "t1 committed\n", "")


def test_a_promise_that_the_ledger_denies_is_not_believed(stage, client):
    """Those of a ledger that was started over, or of somebody else. The line says what to do."""
    with closing(opened()) as deleted:
        assert stage.engine(deleted).submit("deleted") == "committed"
    client.promises.create("of-another-key", NEVER, ikey="another key")
    client.promises.create("unreadable", NEVER, ikey="unreadable")
    client.promises.resolve("unreadable", data="{")
    for name in ("unreadable", "of-another-key", "deleted"):
        contradicted = f"transfer '{name}': the ledger.* says 'unknown'.* use another id$"
        with pytest.raises(main.OperationConflict, match=contradicted):
            client.submit(name)


@pytest.mark.parametrize("port", ["PORT_STORE", "PORT_MESSAGE_SOURCE"])
def test_half_a_server_is_none(stage, client, port):
    stage.patch.setenv(f"RESONATE_{port}", free_port())
    with pytest.raises(ConnectionError, match=r"^no Resonate server at .*: start `resonate serve`"):
        stage.engine()


def test_a_host_that_is_not_one_is_refused_and_says_how_to_write_it(db, monkeypatch):
    for host in ("localhost", "ftp://host", "http://", "http://::1", "http://h/", "http://[h]"):
        monkeypatch.setenv("RESONATE_HOST", host)
        with pytest.raises(ValueError, match=r"^RESONATE_HOST is written http://HOST, not '"):
            main.start(db, remote=True)


def test_the_readmes_server_opens_loopback_only(stage):
    stage.serve()
    assert not any(answers(port, "127.0.0.2") for port in stage.ports.values())
    assert "--api-grpc-enable=false" in COMMAND
