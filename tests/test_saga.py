"""The saga through the real SDK, with threads and faults. The ledger is the witness of a result."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import product

import pytest
from conftest import check, in_a_process, opened, operation, settled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
from main import OperationConflict, submit

T1 = ("t1", "alice", "bob", 500)
FAIL = {"simulate_credit_failure": True}
LOSE = {"simulate_lost_answer": True}
NO_ANSWER = "TimeoutError: no answer from the target (simulated)"


def rows_of(results):
    """What results claim to be settled in the ledger, as `settled` tells it."""
    rows = {}
    for name, source, target, amount, status, error in map(dict.values, results):
        rows[f"{name}-debit"] = (source, -amount, error if status == "rejected" else None)
        if status != "rejected":
            rows[f"{name}-credit"] = (target, amount, error)
        if status == "compensated":
            rows[f"{name}-reversal"] = (source, amount, None)
    return rows


def modelled(balances, source, target, amount, simulate):
    """What a transfer does, in plain Python: its status and error."""
    if balances.get(source, amount) < amount:
        return "rejected", "insufficient funds"
    if not {source, target} <= balances.keys():
        return "rejected", "unknown account"
    if simulate == FAIL:
        return "compensated", NO_ANSWER
    balances[source] -= amount
    balances[target] += amount
    return "committed", None


NAMES = ["alice", "o'neil; --", "alice-opening"]
ACCOUNTS = st.permutations(NAMES)
FAULTS = st.sampled_from([{}, FAIL, LOSE])
IDS, AMOUNTS = st.sampled_from(["t1", "t1-debit", "_" * 64]), st.sampled_from([3000, 10**4, 10**15])
OPENINGS = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 15000), min_size=1)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(balances=OPENINGS, asked=st.lists(st.tuples(IDS, ACCOUNTS, AMOUNTS, FAULTS), max_size=15))
def test_any_sequence_of_transfers_does_what_a_model_says(bank, balances, asked):
    """An id that comes again has the same result, or is a conflict, whatever has changed since."""
    with closing(main.open_ledger()) as db:
        [ledger_id] = db.execute("SELECT id FROM ledger").fetchone()
        bank = bank._replace(db=db, ledger_id=ledger_id)
        bank.resonate.set_dependency("db", db)
        for account, opening in balances.items():
            main.open_account(db, account, opening)
        results = {}
        for name, (source, target, _), amount, simulate in asked:
            terms = {"transfer_id": name, "source": source, "target": target, "amount": amount}
            if name not in results:
                status, error = modelled(balances, source, target, amount, simulate)
                results[name] = terms | {"status": status, "error": error}
            if terms.items() <= results[name].items():
                assert submit(bank, **terms, **simulate) == results[name]
            else:
                with pytest.raises(OperationConflict, match=r"already used: [0-9.]+ from .* to"):
                    submit(bank, **terms, **simulate)
        assert settled(db) == rows_of(results.values())
        assert {account: main.balance(db, account) for account in balances} == balances
        check(db)


class Text(str):
    """Is a str, and is not: what JSON makes of it is another type."""


NOT_VALID = {
    "transfer_id": ["", "a.1", "a b", "é", "a\n", "x" * 65, None, Text("t1")],
    "source": ["", None, b"carol", "\ud800", "a\x1b[2J", Text("alice")],
    "target": ["", None, b"carol", "\ud800", "a\x1b[2J", Text("bob"), "alice"],
    "amount": [0, -1, 1.0, True, "30", None, 10**15 + 1],
}


@pytest.mark.parametrize("field", NOT_VALID)
def test_what_is_no_valid_transfer_is_refused_before_anything_is_written(db, field):
    no_bank = main.Bank(db, "", None)  # any use of Resonate fails
    terms = {"transfer_id": "t1", "source": "alice", "target": "bob", "amount": 1}
    for value in NOT_VALID[field]:
        with pytest.raises(ValueError, match=r"transfer id|account|amount"):
            submit(no_bank, **terms | {field: value})
    with pytest.raises(TypeError):
        submit(no_bank, **terms, simulate_lost_anwser=True)
    with pytest.raises(ValueError, match="amount"):
        main.open_account(db, "carol", -1)
    assert settled(db) == {}


def test_an_id_in_flight_asked_for_with_other_terms_is_a_conflict_and_recover_finishes_it(bank):
    main.settle(bank.db, operation("t1-debit"))
    with pytest.raises(OperationConflict, match=r"'t1' is already used: 5\.00 from alice to bob"):
        submit(bank, "t1", "alice", "bob", 501)
    assert [result["status"] for result in main.recover(bank)] == ["committed"]


ERRORS = [
    sqlite3.DatabaseError,
    sqlite3.ProgrammingError,
    sqlite3.IntegrityError,
    OperationConflict,
]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_that_would_never_end_is_told_and_recover_finishes_later(bank, monkeypatch, error):
    """On the same bank, though Resonate keeps the error."""

    def broken(*_):
        raise error("broken")

    with monkeypatch.context() as patch, pytest.raises(error, match="broken"):
        patch.setattr(main, "give_up", broken)
        submit(bank, *T1, **FAIL)
    assert [result["status"] for result in main.recover(bank)] == ["committed"]


def test_a_bank_that_was_stopped_says_so_and_does_not_wait(bank, monkeypatch):
    stop = bank.resonate.stop
    monkeypatch.setattr(main, "give_up", lambda *_: threading.Thread(target=stop).start())
    with pytest.raises(RuntimeError, match="started once"):
        for number in range(100):
            submit(bank, f"t{number}", "alice", "bob", 1, **FAIL)


def test_recover_goes_on_after_a_transfer_that_it_cannot_finish(bank):
    for name in ("d.1", "t2", "t3"):
        main.settle(bank.db, operation(f"{name}-debit"))
    main.settle(bank.db, operation("t2-credit"), void="gone")
    first, *others = main.recover(bank)
    assert (first["status"], "a transfer id is" in first["error"]) == ("in flight", True)
    assert [result["status"] for result in others] == ["compensated", "committed"]


@pytest.mark.parametrize("step", ["debit", "void", "reversal"])
def test_a_step_that_fails_says_so_and_is_run_again(bank, step, monkeypatch, caplog):
    """Though it has settled before the fault, and though another fault follows."""
    monkeypatch.setattr("resonate.retry_policies.Exponential.next", lambda *_: 0.001)
    faults = [OSError("disk"), sqlite3.OperationalError("database is locked")]
    settle = main.settle

    def faulty(db, operation, void=None):
        reason = settle(db, operation, void)
        if faults and step == ("void" if void else operation.kind):
            raise faults.pop()
        return reason

    monkeypatch.setattr(main, "settle", faulty)
    result = submit(bank, *T1, **FAIL)
    assert settled(bank.db) == rows_of([result])
    for said, fault in zip(caplog.messages, ("database is locked", "disk"), strict=True):
        assert fault in said


class Odd(Exception):
    """Cannot be pickled, and has no text."""

    def __init__(self, number, text):
        super().__init__(threading.Lock())

    def __str__(self):
        raise SystemExit("no text")


# What a credit raises, and how the reason of its void begins.
RAISED = [
    (TimeoutError(), "TimeoutError"),
    (SystemExit(3), "SystemExit: 3"),
    (Odd(1, ""), "test_saga.Odd: <exception str() failed>"),
    (ValueError("\ud800\x1b[2J"), "ValueError: \\ud800\\x1b[2J"),
    (OperationConflict("x" * 10**7), "main.OperationConflict: xxx"),
]


def any_fault():
    """In a process of its own: what is not mended hangs or ends it."""
    bank = main.start(opened())
    apply_entry = main.apply_entry

    def apply_and_raise(ctx, operation):
        lands = not operation.transfer_id.startswith("fails")
        reason = apply_entry(ctx, operation) if lands or operation.kind != "credit" else None
        if operation.kind == "credit":
            raise RAISED[int(operation.transfer_id[5:])][0]
        return reason

    main.apply_entry = apply_and_raise
    for number, (_, reason) in enumerate(RAISED):
        assert submit(bank, f"lands{number}", "alice", "bob", 1)["status"] == "committed"
        result = submit(bank, f"fails{number}", "alice", "bob", 1)
        assert result["status"] == "compensated"
        assert result["error"].startswith(reason) and len(result["error"]) <= 300
    check(bank.db)


def test_whatever_a_credit_raises_its_transfer_ends_as_the_ledger_has_it():
    in_a_process("import test_saga; test_saga.any_fault()")


def storm():
    """Four threads at once ask two banks on one ledger for each of 500 transfers. Of the four, one
    hears of a failure, one loses its answer, and one means another transfer."""
    db = opened()
    banks = (main.start(db), main.start(db))

    def ask(which):
        number, thread = which
        simulate, amount = [{}, FAIL, LOSE, {}][thread], number % 9 + (2 if thread == 3 else 1)
        with suppress(OperationConflict):
            return submit(banks[thread % 2], f"t{number}", "alice", "bob", amount, **simulate)

    with ThreadPoolExecutor(64) as pool:
        results = list(filter(None, pool.map(ask, product(range(500), range(4)))))
    told = {result["transfer_id"]: result for result in results}
    assert all(result == told[result["transfer_id"]] for result in results)
    assert settled(db) == rows_of(told.values())
    check(db)


def test_thousands_at_once_are_all_told_the_same_truth():
    """In a process: the unmended SDK ends it."""
    in_a_process("import test_saga; test_saga.storm()")
