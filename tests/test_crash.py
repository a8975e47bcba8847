"""kill -9 for real, several processes at once, and a ledger file that lets one down."""

import itertools
import multiprocessing
import os
import shutil
import signal
import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from conftest import check, connecting, debited, in_a_process, opened, settled

import main

# Target and amount of a transfer from alice, what is simulated, and how it ends.
TRANSFERS = {
    "no answer": ("bob", 3000, {"simulate_lost_answer": True}, "committed"),
    "no target": ("nobody", 3000, {}, "compensated"),
    "no funds": ("bob", 300000, {}, "rejected"),
}


def create(ledger, trace):
    """What the first `python main.py open` does."""
    sqlite3.connect = connecting(lambda db: db.set_trace_callback(trace))
    db = main.open_ledger(ledger)
    main.open_account(db, "alice", 10000)
    check(db)


def submit(name, ledger, trace):
    """What `python main.py transfer` does. Checks how it ended."""
    target, amount, simulate, status = TRANSFERS[name]
    db = main.open_ledger(ledger)
    db.set_trace_callback(trace)
    _, transfer = main.start(db)
    result = main.submit(db, transfer, "t1", "alice", target, amount, **simulate)
    assert result["status"] == status
    paid = amount if status == "committed" else 0
    db.set_trace_callback(None)
    check(db)
    balances = dict(db.execute("SELECT * FROM accounts"))
    assert balances == {"alice": 10000 - paid, "bob": 5000 + paid}
    return result


def finish(name, ledger, trace):
    """What `python main.py recover` does; and then the transfer again, which is not traced."""
    db = main.open_ledger(ledger)
    db.set_trace_callback(trace)
    _, transfer = main.start(db)
    results = main.recover(db, transfer)
    assert main.in_flight(db) == []
    assert results in ([], [submit(name, ledger, None)])


def is_killed(work, ledger, number):
    """Whether a process that does this work, and kills itself at the n-th statement, gets there."""
    numbers = itertools.count(1)

    def trace(_sql):
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=work, args=(ledger, trace), daemon=True)
    child.start()
    child.join(timeout=60)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def kill_everywhere(work, again, folder, known):
    """Kills the work at every statement, each time in a copy of the folder. Returns how often.

    A statement counts each time that SQLite traces it, also once for each statement of the trigger
    that it fires. If a kill leaves a ledger in a state that is not yet known, what comes next,
    `again`, is also killed at every statement, and so on. In the end `again` must succeed.
    """
    known.add(state_of(f"{folder}/ledger.db"))
    kills = 0
    for number in itertools.count(1):
        copy = f"{folder}-{number}"
        ledger = f"{copy}/ledger.db"
        shutil.copytree(folder, copy)
        if not is_killed(work, ledger, number):
            break
        kills += 1
        if state_of(ledger) not in known:
            kills += kill_everywhere(again, again, copy, known)
        assert not is_killed(again, ledger, 0)
    return kills


def state_of(ledger):
    """What is in the ledger; its files stay as they are."""
    db = sqlite3.connect(ledger)
    db.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)
    state = "\n".join(db.iterdump())
    db.close()
    return state


def kill(name, folder):
    """In a process of its own, because it forks, and must have one thread."""
    os.mkdir(f"{folder}/0")
    work = again = create
    if name != "creation":
        opened(f"{folder}/0/ledger.db").close()
        work, again = partial(submit, name), partial(finish, name)
    print(kill_everywhere(work, again, f"{folder}/0", set()))


# So many kills that it cannot have left out a step. Their sum is in the README.
AT_LEAST = {"creation": 70, "no answer": 25, "no target": 50, "no funds": 8}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", AT_LEAST)
def test_what_is_killed_at_any_statement_is_finished_by_the_next_process(name, record_property):
    """Also if what finishes it is killed at any statement."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a kill spares files there
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        kills = int(in_a_process(f"import test_crash; test_crash.kill({name!r}, {folder!r})"))
    assert kills >= AT_LEAST[name]
    record_property("SIGKILLs of real processes at a statement: 0 lost or created", kills)


def test_processes_that_do_the_same_or_want_the_same_money_agree(cli, inside, ledger):
    """One is told that the target refuses t0. There is money for t1 or t2, but not for both."""
    debited(ledger, "t0")
    commands = (
        "transfer t0 alice bob 5",
        "transfer t0 alice bob 5 --fail-credit",
        "transfer t1 alice bob 60",
        "transfer t2 alice bob 60",
        "recover",
    )
    with ThreadPoolExecutor(len(commands)) as pool:
        runs = pool.map(lambda words: cli(*words.split()), commands)
        same, refused, one, two, _ = runs
    assert same.result == refused.result == inside(*commands[0].split()).result
    assert same.result["status"] in ("committed", "compensated")
    statuses = [one.result["status"], two.result["status"]]
    assert sorted(statuses) == ["committed", "rejected"]
    assert inside("recover").status == 0


def test_a_transfer_waits_for_a_locked_ledger(ledger, tmp_path, monkeypatch, caplog):
    """It goes on when the ledger is free: here, as soon as it says that it waits."""
    monkeypatch.setattr("resonate.retry_policies.Exponential.next", lambda *_: 0.001)
    other = sqlite3.connect(tmp_path / "ledger.db", autocommit=True, check_same_thread=False)
    ledger.set_authorizer(None)  # it would deny the PRAGMA
    ledger.execute("PRAGMA busy_timeout = 20")
    resonate, transfer = main.start(ledger)

    def free(record):
        if "retrying in" in record.msg and other.in_transaction:
            other.execute("ROLLBACK")
        return True

    other.execute("BEGIN IMMEDIATE")
    with caplog.filtering(free):
        result = main.submit(ledger, transfer, "t1", "alice", "bob", 3000)
    assert result["status"] == "committed"
    assert "database is locked" in caplog.text
    resonate.stop()
    other.close()


CRASHES = {
    "debit": (["debit"], "committed"),
    "credit --lose-answer": (["credit", "debit"], "committed"),
    "credit --fail-credit": (["credit", "debit"], "compensated"),
    "reversal --fail-credit": (["credit", "debit", "reversal"], "compensated"),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_command_that_crashes_after_an_operation_is_finished_by_recover_and_reports_the_same(
    cli, inside, ledger, crash
):
    kinds, status = CRASHES[crash]
    words = ["transfer", "t1", "alice", "bob", "10"]
    run = cli(*words, "--crash-after", *crash.split())
    assert run.status == -signal.SIGKILL
    assert run.out + run.err == ""
    op_ids = [f"t1-{kind}" for kind in kinds]
    assert sorted(settled(ledger)) == op_ids
    flying = len(main.in_flight(ledger))
    assert inside("journal").out.count("  in flight ") == flying
    run = inside("recover")
    assert [result["status"] for result in run.results] == [status] * flying
    assert run.status == 0
    assert inside(*words).result["status"] == status


def test_the_same_command_finishes_its_crashed_transfer_too(cli, inside, ledger):
    words = ["transfer", "t1", "alice", "bob", "1000"]
    assert cli(*words, "--crash-after", "debit").status == -signal.SIGKILL
    assert settled(ledger) == {"t1-debit": ("alice", -100000, "insufficient funds")}
    assert inside(*words).result["status"] == "rejected"
