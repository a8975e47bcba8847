"""The saga through the real SDK, with threads and faults. The ledger is the witness of a result."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from sqlite3 import DatabaseError, IntegrityError, OperationalError, ProgrammingError
from unittest.mock import Mock

import pytest
from conftest import check, in_a_process, opened, operation, settled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
from main import OperationConflict, submit

FAIL, LOSE = {"simulate_credit_failure": True}, {"simulate_lost_answer": True}
NAMES = ["alice", "o'neil; --", "alice-opening"]
OPENINGS = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 15000), min_size=1)
IDS, AMOUNTS = st.sampled_from(["t1", "t1-debit", "_" * 64]), st.sampled_from([3000, 10**4, 10**15])
ASKED = st.tuples(IDS, st.permutations(NAMES), AMOUNTS, st.sampled_from([{}, FAIL, LOSE]))


def modelled(balances, source, target, amount, simulate):
    """What a transfer does, in plain Python: its status and error."""
    if balances.get(source, amount) < amount:
        return "rejected", "insufficient funds"
    if not {source, target} <= balances.keys():
        return "rejected", "unknown account"
    if simulate == FAIL:
        return "compensated", "TimeoutError: no answer from the target (simulated)"
    balances[source] -= amount
    balances[target] += amount
    return "committed", None


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(balances=OPENINGS, asked=st.lists(ASKED, max_size=15))
def test_any_sequence_of_transfers_does_what_a_model_says(bank, balances, asked):
    """An id that comes again has the same result, or is a conflict, whatever has changed since."""
    with closing(main.open_ledger()) as db:
        bank = main.Bank(db, *db.execute("SELECT id FROM ledger").fetchone(), bank.resonate)
        bank.resonate.set_dependency("db", db)
        for account, opening in balances.items():
            main.open_account(db, account, opening)
        told = {}
        for name, (source, target, _), amount, simulate in asked:
            terms = (name, source, target, amount)
            if name not in told:
                told[name] = (*terms, *modelled(balances, source, target, amount, simulate))
            conflict = pytest.raises(OperationConflict, match="already used")
            with nullcontext() if told[name][:4] == terms else conflict:
                assert tuple(submit(bank, *terms, **simulate).values()) == told[name]
        assert dict(db.execute("SELECT * FROM accounts")) == balances
        assert check(db) == {}


def test_what_is_no_valid_transfer_is_refused_before_anything_is_written(db):
    no_bank = main.Bank(db, "", None)  # any use of Resonate fails
    text = type("Text", (str,), {})  # is a str, and is not: what JSON makes of it is another type
    valid = {"transfer_id": "t1", "source": "alice", "target": "bob", "amount": 1}
    not_valid = {
        "transfer_id": ["", "a.1", "a b", "é", "a\n", "x" * 65, None, text("t1")],
        "source": ["", None, b"carol", "\ud800", "a\x1b[2J", text("alice")],
        "target": ["", None, b"carol", "\ud800", "a\x1b[2J", text("bob"), "alice"],
        "amount": [0, -1, 1.0, True, "30", None, 10**15 + 1],
        "simulate_lost_anwser": [True],
    }
    for field, values in not_valid.items():
        for value in values:
            with pytest.raises((ValueError, TypeError), match=r"transfer id|account|amount|anwser"):
                submit(no_bank, **valid | {field: value})
    with pytest.raises(ValueError, match="amount"):
        main.open_account(db, "carol", -1)
    assert settled(db) == {}


def test_what_is_in_flight_keeps_its_terms_and_recover_goes_on_after_what_it_cannot_finish(bank):
    for op_id in ("d.1-debit", "t2-debit", "t3-debit"):
        main.settle(bank.db, operation(op_id))
    main.settle(bank.db, operation("t2-credit"), void="gone")
    with pytest.raises(OperationConflict, match=r"'t3' is already used: 5\.00 from alice to bob"):
        submit(bank, "t3", "alice", "bob", 501)
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
    settle, faults = main.settle, [OSError("disk"), OperationalError("locked"), None] * 3

    def faulty(*operation, **void):
        reason = settle(*operation, **void)
        if fault := faults.pop(0):
            raise fault
        return reason

    monkeypatch.setattr(main, "settle", faulty)
    assert submit(bank, "t1", "alice", "bob", 500, **FAIL)["status"] == "compensated"
    for said, fault in zip(caplog.messages, ["disk", "locked"] * 3, strict=True):
        assert fault in said


class Odd(Exception):
    def __str__(self):
        raise SystemExit("no text")


ODD = [
    (SystemExit(3), "SystemExit: 3"),
    (Odd(threading.Lock()), "test_saga.Odd: <exception str() failed>"),  # cannot be pickled
    (ValueError("\ud800\x1b[2J"), "ValueError: \\ud800\\x1b[2J"),
    (OperationConflict("x" * 10**7), "main.OperationConflict: xxx"),
]


@pytest.mark.parametrize(("odd", "reason"), ODD)
def test_whatever_a_credit_raises_its_transfer_ends_as_it_landed(bank, monkeypatch, odd, reason):
    apply_entry = main.apply_entry

    def apply_and_raise(ctx, operation):
        void = None if operation.op_id == "fails-credit" else apply_entry(ctx, operation)
        if operation.kind == "credit":
            raise odd
        return void

    monkeypatch.setattr(main, "apply_entry", apply_and_raise)
    assert submit(bank, "lands", "alice", "bob", 1)["status"] == "committed"
    result = submit(bank, "fails", "alice", "bob", 1)
    assert result["status"] == "compensated"
    assert result["error"].startswith(reason) and len(result["error"]) <= 300


def storm():
    db = opened()
    banks = (main.start(db), main.start(db))
    ways = [({}, 5), (FAIL, 5), (LOSE, 5), ({}, 7)]  # succeeds, fails, seems to fail, is another

    def ask(number, way):
        simulate, amount = ways[way]
        with suppress(OperationConflict):
            return submit(banks[way % 2], f"t{number}", "alice", "bob", amount, **simulate)

    sys.setswitchinterval(1e-5)  # threads interrupt one another everywhere
    with ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(ask, number, way) for number in range(500) for way in range(4)]
    results = [future.result() for future in asked if future.result()]
    assert len({result["transfer_id"] for result in results}) == 500
    assert all(result == main.lookup(db, result["transfer_id"]) for result in results)
    assert check(db) == {}


def test_thousands_at_once_on_two_banks_are_all_told_the_same_truth():
    in_a_process("import test_saga; test_saga.storm()")  # that hangs or ends, if it is broken
