"""The saga through the real SDK. The ledger is the witness of what a result says."""

import random
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPMethod, HTTPStatus
from itertools import count, product
from unittest.mock import Mock

import pytest
from conftest import check, debited, in_a_process, opened, settled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from resonate.resonate import Function

import main
from main import Operation, OperationConflict, TransferRejected, submit

REFUSE = {"simulate_credit_failure": True}
LOSE = {"simulate_lost_answer": True}
REFUSED = "the target refused (simulated)"
NO_MONEY = "insufficient funds"


def request(name, source, target, amount):
    return {"transfer_id": name, "source": source, "target": target, "amount": amount}


def claimed(results):
    """What results claim to be settled in the ledger, written as `settled` writes it."""
    rows = {}
    for result in results:
        name, source, target, amount, status = list(result.values())[:5]
        error = result.get("error")
        if status == "rejected":
            rows[f"{name}-debit"] = (source, -amount, error)
        else:
            rows[f"{name}-debit"] = (source, -amount, None)
            rows[f"{name}-credit"] = (target, amount, error)
        if status == "compensated":
            rows[f"{name}-reversal"] = (source, amount, None)
    return rows


def test_a_transfer_that_fails_logs_why(db, transfer, caplog):
    caplog.set_level("INFO", main.LOG.name)
    submit(db, transfer, "t1", "alice", "bob", 2000, **REFUSE)
    submit(db, transfer, "t2", "alice", "bob", 50000)
    assert caplog.messages == [
        f"t1: the credit failed: {REFUSED}",
        f"t1 compensated: {REFUSED}",
        f"t2 rejected: {NO_MONEY}",
    ]


IDS = st.sampled_from(["t1", "t1-debit", "_" * 64])
ACCOUNTS = ["alice", "o'neil; --\x00", "alice-opening"]
AMOUNTS = st.sampled_from([3000, 10000, 2**63 - 1])
FAULTS = st.sampled_from([{}, REFUSE, LOSE])
REQUESTS = st.tuples(IDS, st.permutations(ACCOUNTS), AMOUNTS, FAULTS)
OPENINGS = st.dictionaries(st.sampled_from(ACCOUNTS), st.integers(0, 15000), min_size=1)


def modelled(balances, source, target, amount, simulate):
    """What a transfer does, in plain Python."""
    if source not in balances:
        return {"status": "rejected", "error": "unknown account"}
    if balances[source] < amount:
        return {"status": "rejected", "error": NO_MONEY}
    if simulate == REFUSE:
        return {"status": "compensated", "error": REFUSED}
    if target not in balances:
        return {"status": "compensated", "error": "unknown account"}
    balances[source] -= amount
    balances[target] += amount
    return {"status": "committed"}


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(balances=OPENINGS, requests=st.lists(REQUESTS, max_size=15))
def test_any_sequence_of_transfers_does_what_a_model_says(engine, balances, requests):
    """An id that comes again has the same result, or is a conflict, whatever has changed since."""
    db = main.open_ledger()
    resonate, transfer = engine
    resonate.set_dependency("db", db)
    for account, opening in balances.items():
        main.open_account(db, account, opening)
    results = {}
    for name, (source, target, _), amount, simulate in requests:
        asked = request(name, source, target, amount)
        if name not in results:
            results[name] = asked | modelled(balances, source, target, amount, simulate)
        if asked.items() <= results[name].items():
            assert submit(db, transfer, **asked, **simulate) == results[name]
        else:
            with pytest.raises(OperationConflict, match="already used"):
                submit(db, transfer, **asked, **simulate)
    assert settled(db) == claimed(list(results.values()))
    assert {account: main.balance(db, account) for account in balances} == balances
    check(db)
    db.close()


NOT_VALID = {  # HTTPMethod.GET is also a str, and HTTPStatus.OK an int
    "transfer_id": ["", "a.1", "a b", "é", "a\n", "x" * 65, None, HTTPMethod.GET],
    "source": ["", None, b"carol", "\ud800", HTTPMethod.GET],
    "target": ["", None, b"carol", "\ud800", HTTPMethod.GET, "alice"],
    "amount": [0, -1, 1.0, True, "30", None, 2**63, HTTPStatus.OK],
}


@pytest.mark.parametrize("field", NOT_VALID)
def test_what_is_no_valid_transfer_is_refused_before_anything_is_written(db, field):
    untouched = object()  # any use of it fails: no promise is made either
    for value in NOT_VALID[field]:
        asked = request("t1", "alice", "bob", 1) | {field: value}
        with pytest.raises(ValueError, match=r"transfer id|account|amount"):
            submit(db, untouched, **asked)
    assert settled(db) == {}


LIES = (
    request("t1", "alice", "bob", 500) | {"status": "committed"},
    request("t1", "alice", "bob", 1) | {"status": "in flight"},
    "committed",
    OperationConflict("no"),
    main.ResonateCanceledError("t1"),
    main.ResonateTimedoutError("t1", 0),
)


@pytest.mark.parametrize("lie", LIES)
def test_no_answer_is_believed_that_the_ledger_contradicts(db, lie):
    debited(db, "t1")
    transfer = main.Transfer(Mock(side_effect=[lie]), remote=True)
    with pytest.raises(OperationConflict, match="the ledger, which is right, says 'in flight'"):
        submit(db, transfer, "t1", "alice", "bob", 500)


def test_a_reversal_that_was_there_before_is_the_one_or_a_conflict(db, transfer):
    debited(db, "t1", "t2")
    for name, other in (("t1", "bob"), ("t2", "carol")):
        main.settle(db, Operation(f"{name}-reversal", name, "reversal", "alice", 500, other))
    assert submit(db, transfer, "t1", "alice", "bob", 500)["status"] == "compensated"
    with pytest.raises(OperationConflict):
        submit(db, transfer, "t2", "alice", "bob", 500)


class Mute(Exception):
    def __str__(self):
        raise SystemExit("no text")


# What a credit raises or returns. If it raises, and has not landed: the error of its transfer.
ANSWERS = [
    (TimeoutError(), "TimeoutError"),
    (SystemExit(3), "SystemExit: 3"),
    (Mute(), "Mute"),
    (ValueError("\ud800"), "ValueError: \\ud800"),
    (ImportError("gone", name=threading.Lock()), "ImportError: gone"),  # it cannot be pickled
    (TransferRejected(Mute()), "TransferRejected('')"),
    (OperationConflict("mine"), "mine"),
    ({(1, 2): 3}, None),  # the SDK cannot encode these two
    (10**5000, None),
]


def any_answer():
    """In a process of its own: what is not mended hangs or ends it."""
    db = opened()
    _, transfer = main.start(db)

    def credit(ctx, operation, **_):
        if operation.transfer_id.startswith("lands"):
            main.apply_entry(ctx, operation)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    main.credit_target = credit
    for number, (answer, error) in enumerate(ANSWERS):
        result = submit(db, transfer, f"lands-{number}", "alice", "bob", 1)
        assert result["status"] == "committed", answer
        if error:
            result = submit(db, transfer, f"fails-{number}", "alice", "bob", 1)
            assert result["status"] == "compensated", answer
            assert result["error"] == error
    check(db)


def test_whatever_a_credit_raises_or_returns_its_transfer_ends_as_the_ledger_has_it():
    """And no other is touched: it is one process for all of them."""
    in_a_process("import test_transfer; test_transfer.any_answer()")


@pytest.mark.parametrize("step", ["debit", "void", "reversal"])
def test_a_step_that_fails_says_so_and_is_run_again(db, transfer, step, monkeypatch, caplog):
    """Though it has settled before the fault, and though another fault follows."""
    monkeypatch.setattr("resonate.retry_policies.Exponential.next", lambda *_: 0.001)
    faults = [SystemExit(), sqlite3.OperationalError("database is locked")]
    real = main.settle

    def faulty(db, operation, void=None):
        reason = real(db, operation, void)
        if faults and step == ("void" if void else operation.kind):
            raise faults.pop()
        return reason

    monkeypatch.setattr(main, "settle", faulty)
    result = submit(db, transfer, "t1", "alice", "bob", 3000, **REFUSE)
    assert result["status"] == "compensated"
    assert settled(db) == claimed([result])
    for said, fault in zip(caplog.messages, ("database is locked", "SystemExit"), strict=True):
        assert fault in said


def test_an_engine_that_is_stopped_meanwhile_tells_its_caller(db, engine, monkeypatch):
    resonate, transfer = engine
    stop = resonate._bridge._cq.put  # it stops at None
    monkeypatch.setattr(main, "credit_target", lambda *_, **__: stop(None))
    for _ in range(2):
        with pytest.raises((ConnectionError, RuntimeError), match=r"stopped|started"):
            submit(db, transfer, "t1", "alice", "bob", 1)


def test_a_transfer_whose_caller_is_interrupted_can_be_asked_for_again(db, transfer, monkeypatch):
    """It still runs while its caller is gone: to forget it then would end the process."""
    goes_on = threading.Event()

    def slow(ctx, operation, **_):
        assert goes_on.wait(30)
        main.apply_entry(ctx, operation)

    monkeypatch.setattr(main, "credit_target", slow)
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(main, "wait", Mock(side_effect=KeyboardInterrupt))
        submit(db, transfer, "t1", "alice", "bob", 1)
    goes_on.set()
    assert submit(db, transfer, "t1", "alice", "bob", 1)["status"] == "committed"


def test_recover_tells_of_each_at_once_and_goes_on_after_one_that_it_cannot_finish(db, transfer):
    debited(db, "d.1", "void", "taken")
    for name, account in (("void", "bob"), ("taken", "carol")):
        credit = Operation(f"{name}-credit", name, "credit", account, 500, "alice")
        main.settle(db, credit, void="gone")
    told = []

    def report(result):
        told.append((result["transfer_id"], result["status"], len(main.in_flight(db))))

    results = main.recover(db, transfer, report)
    assert told == [("d.1", "in flight", 3), ("void", "compensated", 2), ("taken", "in flight", 2)]
    error = results[2].pop("error")
    assert "'taken-credit' is already used: 5.00 on account carol" in error
    assert results[2] == request("taken", "alice", "bob", 500) | {"status": "in flight"}


def watch_the_lock(store, guard=main.guard_store_in_memory):
    """Makes it an error if a thread uses the store in memory, and does not hold its lock."""

    class Watched(dict):
        def __getattribute__(self, name):
            store._cond.notify(0)  # the error, if so
            return super().__getattribute__(name)

    store._promises._promises, store._tasks._tasks = Watched(), Watched()
    guard(store)


def storm():
    """Four threads at once ask for each of 60 transfers. One of the four means another transfer.

    The clock goes on by 20 s at each look. In a process of its own: the unmended SDK ends it.
    """
    main.guard_store_in_memory = watch_the_lock
    db = opened()
    _, other = main.start(db)
    resonate, transfer = main.start(db)
    store, bridge = resonate._store, resonate._bridge
    store._clock = Mock(time=Mock(side_effect=count(time.time(), 20)))
    begin = Function.begin_run

    def begin_slowly(*args, **rest):
        handle = begin(*args, **rest)
        time.sleep(random.uniform(0, 0.05))
        return handle

    def ask(which):
        number, thread = which
        engine = transfer if thread < 2 else other
        amount = number * 10 + (2 if thread == 3 else 1)
        simulate = [{}, REFUSE, LOSE, {}][thread]
        with suppress(OperationConflict):
            return submit(db, engine, f"t{number}", "alice", "bob", amount, **simulate)

    Function.begin_run = begin_slowly
    with ThreadPoolExecutor(60) as pool:
        results = list(pool.map(ask, product(range(60), range(4))))
    told = {result["transfer_id"]: result for result in results if result}
    assert settled(db) == claimed(list(told.values()))
    for result in results:
        assert result is None or result == told[result["transfer_id"]]
    resonate.stop()
    assert (store._promises.inner._promises, store._tasks.inner._tasks) == ({}, {})
    assert (bridge._promise_id_to_task, bridge._scheduler.computations) == ({}, {})
    check(db)


def test_hundreds_at_once_are_told_the_truth_and_then_forgotten():
    in_a_process("import test_transfer; test_transfer.storm()")
