"""The saga through the real SDK, with threads and faults. The ledger is the witness of a result."""

import json
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from sqlite3 import DatabaseError, IntegrityError, OperationalError, ProgrammingError
from unittest.mock import Mock

import pytest
from conftest import check, operation

import main
from main import OperationConflict, submit

sys.setswitchinterval(1e-5)  # threads interrupt one another everywhere
FAIL, LOSE = {"simulate_credit_failure": True}, {"simulate_lost_answer": True}


def test_what_is_no_valid_transfer_is_refused_before_anything_is_written(db):
    no_bank = main.Bank(db, "", None)  # any use of Resonate fails
    text = type("Text", (str,), {})  # is a str, and is not: what JSON makes of it is another type
    names = ["", None, b"carol", "\ud800", "a\x1b[2J", text("alice")]
    not_valid = {
        "transfer_id": ["", "a.1", "a b", "é", "a\n", "x" * 65, None, text("t1")],
        "source": names,
        "target": [*names, "alice"],
        "amount": [0, -1, 1.0, True, "30", None, 10**15 + 1],
    }
    for field, values in not_valid.items():
        for value in values:
            terms = {"transfer_id": "t1", "source": "alice", "target": "bob", "amount": 1}
            with pytest.raises(ValueError, match=r"transfer id|account|amount"):
                submit(no_bank, **terms | {field: value})
    with pytest.raises(ValueError, match="amount"):
        main.open_account(db, "carol", -1)


def test_recover_goes_on_after_what_it_cannot_finish(bank):
    for op_id in ("d.1-debit", "t2-debit", "t3-debit"):
        main.settle(bank.db, operation(op_id))
    main.settle(bank.db, operation("t2-credit"), void="gone")
    results = list(main.recover(bank))
    assert [result["status"] for result in results] == ["in flight", "compensated", "committed"]
    assert "a transfer id is" in results[0]["error"]
    resonate = Mock()  # what is finished needs it no more
    assert submit(bank._replace(resonate=resonate), "t3", "alice", "bob", 500) == results[2]
    assert resonate.mock_calls == []


def test_an_error_that_would_never_end_is_told_and_recover_finishes_later(bank, monkeypatch):
    def broken(*_):
        raise error("broken")

    monkeypatch.setattr(main, "give_up", broken)
    for error in (DatabaseError, ProgrammingError, IntegrityError, OperationConflict):
        with pytest.raises(error, match="broken"):
            submit(bank, error.__name__, "alice", "bob", 500, **FAIL)
        assert [result["status"] for result in main.recover(bank)] == ["committed"]


def test_a_bank_that_was_stopped_says_so_and_does_not_wait(bank, monkeypatch):
    stop = bank.resonate.stop
    monkeypatch.setattr(main, "give_up", lambda *_: threading.Thread(target=stop).start())
    with pytest.raises(RuntimeError, match="started once"):
        for number in range(100):
            submit(bank, f"t{number}", "alice", "bob", 1, **FAIL)


def test_a_step_that_fails_though_it_settled_says_so_and_is_run_again(bank, monkeypatch, caplog):
    monkeypatch.setattr("resonate.retry_policies.Exponential.next", lambda *_: 0.001)
    settle, faults = main.settle, [OSError("disk"), OperationalError("locked")]

    def faulty(*operation):
        settle(*operation)
        if faults:
            raise faults.pop()

    monkeypatch.setattr(main, "settle", faulty)
    assert submit(bank, "t1", "alice", "bob", 500)["status"] == "committed"
    assert "locked" in caplog.text and "disk" in caplog.text


ODD = {
    "SystemExit: 3": SystemExit(3),
    "OSError: <unlocked": OSError(threading.Lock()),  # cannot be pickled
    "ValueError: \\ud800\\x1b[2J": ValueError("\ud800\x1b[2J"),
    "main.OperationConflict: xxx": OperationConflict("x" * 10**7),
}


@pytest.mark.parametrize("reason", ODD)
def test_whatever_a_credit_raises_its_transfer_is_compensated(bank, monkeypatch, reason):
    def raise_if_credit(_ctx, operation):
        if operation.kind == "credit":
            raise ODD[reason]
        return main.settle(bank.db, operation)

    monkeypatch.setattr(main, "apply_entry", raise_if_credit)
    result = submit(bank, "t1", "alice", "bob", 1)
    assert result["status"] == "compensated"
    assert result["error"].startswith(reason) and len(result["error"]) <= 300


def test_thousands_at_once_in_threads_and_processes_are_all_told_the_same_truth(db, bank, cli):
    """They do the same, or another thing under the same id, or want what is left of the money."""
    banks = (bank, main.start(db))
    ways = [({}, 40), (FAIL, 40), (LOSE, 40), ({}, 70)]

    def ask(number, way):
        simulate, amount = ways[way]
        with suppress(OperationConflict):
            return submit(banks[way % 2], f"t{number}", "alice", "bob", amount, **simulate)

    pool = ThreadPoolExecutor(64)
    runs = pool.map(cli, [f"transfer t{number} alice bob 0.40" for number in range(0, 500, 199)])
    asked = [pool.submit(ask, number, way) for number in range(500) for way in range(4)]
    looks = [pool.submit(main.journal, db, "alice") for _ in range(99)]
    assert all(look.result() for look in looks)
    results = [future.result() for future in asked if future.result()]
    told = Counter((result["transfer_id"], result["amount"]) for result in results)
    assert len(told) == 500 and all(n == {40: 3, 70: 1}[amount] for (_, amount), n in told.items())
    results += [json.loads(run.stdout) for run in runs if "already used" not in run.stderr]
    assert {result["status"] for result in results} == {"committed", "compensated", "rejected"}
    assert all(result == main.lookup(db, result["transfer_id"]) for result in results)
    assert check(db) == {}
