"""What the tests share: ledgers, banks, commands, kills, the oracle, and the closing count."""

import glob
import multiprocessing
import os
import random
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from signal import SIGKILL, alarm, raise_signal

import pytest

import main

MAIN = Path(main.__file__)


def adds_up(db):
    """The oracle: all the money is there. Uses no view or trigger. Returns what is in flight."""
    balances, flying = Counter(), Counter()
    query = "SELECT transfer_id, kind, account, amount FROM operations WHERE void IS NULL"
    for transfer_id, kind, account, amount in db.execute(query):
        balances[account] += amount
        flying[transfer_id] -= amount if kind != "opening" else 0
    assert min(flying.values(), default=0) >= 0, "a transfer pays out more than it took"
    assert min(balances.values(), default=0) >= 0, "a balance is below zero"
    stored = dict(db.execute("SELECT account, balance FROM accounts"))
    assert dict(balances) == stored, "a balance is not the sum of its entries"
    return +flying


def check(db):
    """The oracle, and that each row is as the law of the ledger has it."""
    known = {account for (account,) in db.execute("SELECT account FROM accounts")}
    rows = {op_id: columns for op_id, *columns in db.execute("SELECT * FROM operations")}
    for op_id, (transfer_id, kind, account, amount, counterparty, void) in rows.items():
        assert [type(column) for column in rows[op_id][:5]] == [str, str, str, int, str]
        assert op_id == f"{transfer_id}-{kind}"
        debit = rows.get(f"{transfer_id}-debit", ())
        if kind == "opening":
            assert transfer_id == account and void is None
        elif kind == "debit":
            assert amount < 0 and (void is not None or known >= {account, counterparty})
        elif kind == "credit":
            assert debit[2:] == [counterparty, -amount, account, None]
        else:
            assert kind == "reversal" and void is None
            assert rows[f"{transfer_id}-credit"][5] is not None
            assert debit[2:] == [account, -amount, counterparty, None]
    return adds_up(db)


def opened(path=":memory:"):
    """A ledger in which alice has 100.00 and bob 50.00."""
    ledger = main.open_ledger(path)
    main.open_account(ledger, "alice", 10000)
    main.open_account(ledger, "bob", 5000)
    return ledger


def operation(op_id, **changes):
    """An operation of a transfer of 5.00 from alice to bob."""
    transfer_id, _, kind = op_id.rpartition("-")
    three = main.operations(transfer_id, "alice", "bob", 500)
    return {operation.kind: operation for operation in three}[kind]._replace(**changes)


@pytest.fixture
def db(tmp_path):
    """The ledger of alice and bob. Whatever a test does to it, it adds up in the end."""
    with closing(opened(tmp_path / "ledger.db")) as ledger:
        yield ledger
        check(ledger)


@pytest.fixture
def deaths(monkeypatch):
    """How often the SDK has ended the process: here it goes on, and the test sees it."""
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    yield statuses
    assert statuses == []


@pytest.fixture
def bank(db, deaths):
    return main.start(db)


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs `python main.py ...` as a process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)

    def run(words, program=MAIN, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.run([sys.executable, program, *shlex.split(words)], text=True, **options)

    return run


def command(words, folder):
    """Runs a command in this process, in which it may not crash. Returns its exit status."""
    sys.argv = ["main.py", *shlex.split(words), "--ledger", f"{folder}/ledger.db"]
    return main.main()


def in_a_process(work, *args):
    """What the work returns, in a process of one thread: only such a process may fork."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def left_at(path):
    """A connection to what a kill has left: it changes no file."""
    return closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True))


def is_killed(do, words, folder, number):
    """Does this in a process that kills itself at its n-th statement. Whether it gets that far."""
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 1, -SIGKILL)
        return status < 0
    alarm(60)  # ends it if it hangs
    numbers, connect = count(1), sqlite3.connect

    def connect_and_trace(*args, **options):
        db = connect(*args, **options)
        db.set_trace_callback(lambda _: next(numbers) == number and raise_signal(SIGKILL))
        return db

    sqlite3.connect = connect_and_trace
    os._exit(do(words, folder))


def kill_everywhere(do, words, again, state_of, folder):
    """Kills a command at every statement, each time in a copy of the folder. In each new state that
    this leaves, what finishes it is killed everywhere, too, and so on. Returns how often."""
    queue, known, kills = [(words, folder)], {state_of(folder)}, 0
    for job, before in queue:
        for number in count(1):
            copy = before.with_name(f"{before.name}-{number}")
            shutil.copytree(before, copy)
            if not is_killed(do, job, copy, number):
                assert len(state_of(copy)) == 1, "a transfer stays in flight"
                break
            kills += 1
            if (state := state_of(copy)) not in known:
                known.add(state)
                queue.append((again, copy))
    return kills


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


SOME = random.sample(range(10000, 30000), 9)  # below those that the kernel gives to connections
API, POLL, METRICS, NOBODY = [port for port in SOME if not answers(port)][:4]
SERVE = f"""serve --api-http-addr 127.0.0.1:{API} --aio-poll-addr 127.0.0.1:{POLL} --metrics-addr
    127.0.0.1:{METRICS} --api-grpc-enable=false --aio-poll-ttr 1s --aio-poll-ttc 3s"""


class Stage(ExitStack):
    """A server, and what uses it. All of it ends with the test."""

    server = None

    def start(self, words, *program):
        command = [*(program or [sys.executable, MAIN]), *words.split()]
        process = self.enter_context(subprocess.Popen(command, stdout=-1, stderr=-1, text=True))
        self.callback(process.kill)
        return process

    def serve(self, options=""):
        """Starts the server. If it runs, it is killed, and finds its data again."""
        if self.server:
            self.server.kill()
            self.server.wait()
        self.server = self.start(f"{SERVE} {options}", "resonate")
        while not all(map(answers, (API, POLL, METRICS))):
            assert self.server.poll() is None
            time.sleep(0.05)

    def leave(self, transfer_id):
        """Leaves a transfer to workers. Returns what gives its result."""
        name = f"{self.bank.ledger_id}-{transfer_id}"
        return self.bank.resonate.begin_rpc(
            name, "transfer_money", transfer_id, "alice", "bob", 100
        )


@pytest.fixture
def stage(db, deaths, tmp_path, monkeypatch):
    if (version := subprocess.getoutput("resonate --version")) != "resonate version 0.8.2":
        pytest.skip(f"needs resonate 0.8.2 on PATH: {version}")
    monkeypatch.chdir(tmp_path)
    ports = {"HOST": "http://127.0.0.1", "PORT_STORE": API, "PORT_MESSAGE_SOURCE": POLL}
    for name, value in ports.items():
        monkeypatch.setenv(f"RESONATE_{name}", str(value))
    with Stage() as stage:
        stage.serve()
        stage.bank = main.start(db, remote=True, client=True)
        yield stage
        stage.bank.resonate.stop()


PATHS = [os.environ["PATH"], *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
PG_CTL = shutil.which("pg_ctl", path=os.pathsep.join(PATHS))
USER = {"user": "nobody", "extra_groups": []} if os.getuid() == 0 else {}  # it refuses root


def pg_ctl(folder, *words):
    command = [PG_CTL, "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", *words]
    subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, **USER)


def postgres():
    """A server of PostgreSQL, on a socket in a folder of its own."""
    if not PG_CTL:
        pytest.skip("needs PostgreSQL, for example by `apt-get install postgresql`")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        pg_ctl(folder, "init", "-o", "-A trust -U ledger")
        pg_ctl(folder, "start", "-o", f"-c listen_addresses= -c unix_socket_directories={folder}")
        try:
            yield folder
        finally:
            pg_ctl(folder, "stop", "-m", "immediate")


def new_database(folder):
    """A database whose settings are not ours."""
    import psycopg

    name = "x" + os.urandom(8).hex()
    with psycopg.connect(f"host={folder} user=ledger dbname=postgres", autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}")
        db.execute(f"ALTER DATABASE {name} SET client_encoding = SQL_ASCII")
        db.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
        db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = serializable")
    return f"host={folder} user=ledger dbname={name}"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The tests run on all cores if pytest-xdist is there, and -n does not say otherwise."""
    is_worker = hasattr(config, "workerinput")
    if getattr(config.option, "numprocesses", 0) is None and not is_worker:
        config.option.numprocesses = os.cpu_count() + 1  # some of them only wait
        config.option.dist = "worksteal"


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("passed", ()):
        for words, number in report.user_properties:
            terminalreporter.line(f"{number:>9,} {words}")
