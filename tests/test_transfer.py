"""The workflow through the real SDK, and the ledger as the witness of what it reports."""

import gc
import sqlite3
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import check, entries, in_a_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
from main import OperationConflict, submit

REQUEST = {"transfer_id": "t1", "source": "alice", "target": "bob", "amount": 3000}


def test_a_commit(db: sqlite3.Connection, transfer: Any) -> None:
    assert submit(transfer, "t1", "alice", "bob", 3000) == REQUEST | {"status": "committed"}
    assert entries(db) == {"t1-debit": ("alice", -3000, "debit"), "t1-credit": ("bob", 3000, "credit")}
    assert (main.balance(db, "alice"), main.balance(db, "bob")) == (7000, 8000)


def test_a_refused_credit_is_compensated(db: sqlite3.Connection, transfer: Any) -> None:
    result = submit(transfer, "t1", "alice", "bob", 3000, simulate_credit_failure=True)
    error = "credit of 30.00: the target refused (simulated)"
    assert result == REQUEST | {"status": "compensated", "error": error}
    assert entries(db) == {
        "t1-debit": ("alice", -3000, "debit"),
        "t1-credit": ("bob", 0, "void"),
        "t1-reversal": ("alice", 3000, "reversal"),
    }


def test_an_unknown_target_is_compensated(db: sqlite3.Connection, transfer: Any) -> None:
    result = submit(transfer, "t1", "alice", "carol", 3000)
    assert (result["status"], result["error"]) == ("compensated", "credit of 30.00: unknown account")
    assert main.balance(db, "alice") == 10000


@pytest.mark.parametrize(
    ("source", "amount", "error"),
    [("alice", 10001, "debit of 100.01: insufficient funds"), ("carol", 1, "debit of 0.01: unknown account")],
)
def test_a_refused_debit_is_rejected(db: sqlite3.Connection, engine: Any, source: str, amount: int, error: str) -> None:
    """And stays so, though the account is opened and funded later, and the promise store has forgotten."""
    result = submit(engine(), "t1", source, "bob", amount)
    assert (result["status"], result["error"]) == ("rejected", error)
    assert entries(db) == {"t1-debit": (source, 0, "void")}
    main.open_account(db, "rich", 10**6)
    submit(engine(), "gift", "rich", "alice", 10**6)
    assert submit(engine(), "t1", source, "bob", amount) == result


def test_all_that_an_account_has_can_be_moved(db: sqlite3.Connection, transfer: Any) -> None:
    assert submit(transfer, "t1", "alice", "bob", 10000)["status"] == "committed"
    assert main.balance(db, "alice") == 0


def test_a_commit_takes_exactly_two_durable_steps(db: sqlite3.Connection) -> None:
    resonate, transfer = main.start(db)
    submit(transfer, "t1", "alice", "bob", 3000)
    found = []
    for promise in ("t1", "t1.1", "t1.2", "t1.3"):
        try:
            found.append(resonate.promises.get(promise).id)
        except Exception as error:
            assert "not found" in str(error)
    assert found == ["t1", "t1.1", "t1.2"]
    resonate.stop()


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("amount", [3000, 20000])
def test_the_same_id_again_reports_the_same_and_moves_nothing(
    db: sqlite3.Connection, engine: Any, amount: int, fail: bool
) -> None:
    """While the promise is remembered and after it is forgotten, and whatever the target would say this time."""
    transfer = engine()
    first = submit(transfer, "t1", "alice", "bob", amount, simulate_credit_failure=fail)
    before = entries(db)
    for again in (transfer, engine()):
        for now in (False, True):
            assert submit(again, "t1", "alice", "bob", amount, simulate_credit_failure=now) == first
    assert entries(db) == before


OTHERS = [("alice", "bob", 3001), ("alice", "carol", 3000), ("bob", "alice", 3000), ("carol", "bob", 3000)]


@pytest.mark.parametrize("amount", [3000, 20000])
def test_an_id_used_again_for_another_transfer_is_a_conflict(db: sqlite3.Connection, engine: Any, amount: int) -> None:
    """Of a commit and of a rejection; remembered and forgotten; and the first keeps its result."""
    main.open_account(db, "carol", 9000)
    transfer = engine()
    first = submit(transfer, "t1", "alice", "bob", amount)
    before = entries(db)
    for again in (transfer, engine()):
        for other in [*OTHERS, ("alice", "bob", amount - 1)]:
            with pytest.raises(OperationConflict, match="t1"):
                submit(again, "t1", *other)
        assert submit(again, "t1", "alice", "bob", amount) == first
    assert entries(db) == before


def test_a_wrong_request_does_not_spoil_the_answer_to_the_right_one(db: sqlite3.Connection, engine: Any) -> None:
    """The promise store hears the wrong request first, and would remember its conflict for ever."""
    db.execute("INSERT INTO entries VALUES ('t1-debit', 't1', 'alice', 'bob', -3000, 'debit', NULL)")
    transfer = engine()
    with pytest.raises(OperationConflict):
        submit(transfer, "t1", "alice", "bob", 1)
    assert [result["status"] for result in main.recover(db, transfer)] == ["committed"]
    assert submit(transfer, "t1", "alice", "bob", 3000)["status"] == "committed"


BAD: list[tuple[Any, Any, Any, Any]] = [
    *(
        (name, "alice", "bob", 1)
        for name in ("", "a.1", "a b", "a?b", "a/b", "%2F", "é", "a\n", "x" * 65, None, 1, b"a")
    ),
    *(("t", "alice", "bob", amount) for amount in (0, -1, 1.0, 30.5, True, "30", None, 2**63, float("nan"))),
    *(("t", account, "bob", 1) for account in ("", None, 1, b"alice", "\ud800")),
    *(("t", "alice", account, 1) for account in ("", None, 1, b"bob", "\udfff", "alice")),
]


@pytest.mark.parametrize("request_", BAD, ids=repr)
def test_what_can_be_no_transfer_is_refused_before_anything_is_written(
    db: sqlite3.Connection, request_: tuple[Any, ...]
) -> None:
    class Untouched:
        """Any use of it fails: no promise is made either."""

    with pytest.raises(ValueError, match=r"transfer id|account|amount"):
        submit(Untouched(), *request_)
    assert entries(db) == {}


@pytest.mark.parametrize("name", ["a", "x" * 64, "-", "_", "t-debit", "0", "alice"])
def test_every_id_that_is_allowed_works(db: sqlite3.Connection, transfer: Any, name: str) -> None:
    assert submit(transfer, name, "alice", "bob", 1)["status"] == "committed"
    assert submit(transfer, f"{name[:-1]}Z", "alice", "bob", 1)["status"] == "committed"


@pytest.mark.parametrize("fault", [sqlite3.OperationalError("database is locked"), TimeoutError(), OSError(28, "full")])
@pytest.mark.parametrize("lands", [False, True])
def test_a_credit_that_reports_a_fault_settles_as_the_ledger_has_it(
    db: sqlite3.Connection, engine: Any, fault: Exception, lands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first way to make money, as usually written: the credit lands and then reports failure."""
    real = main.apply_entry

    def faulty(ctx: Any, op_id: str, account: str, amount: int, kind: str, **rest: Any) -> None:
        if lands or kind != "credit":
            real(ctx, op_id, account, amount, kind, **rest)
        if kind == "credit":
            raise fault

    monkeypatch.setattr(main, "apply_entry", faulty)
    result = submit(engine(), "t1", "alice", "bob", 3000)
    assert result["status"] == ("committed" if lands else "compensated")
    monkeypatch.undo()
    assert submit(engine(), "t1", "alice", "bob", 3000) == result


class Unpicklable(Exception):
    """As those of some libraries: it cannot be made again from what it says."""

    def __init__(self, *, response: str) -> None:
        super().__init__(response)


def test_whatever_a_target_raises_is_given_up() -> None:
    """The SDK would end the process of an exception that it cannot unpickle."""
    script = """
import main, test_transfer

def refuses(*_args, **_rest):
    raise test_transfer.Unpicklable(response="gone")

main.credit_target, main.LOG.disabled = refuses, True
db = main.open_ledger()
main.open_account(db, "alice", 10000)
main.open_account(db, "bob")
result = main.submit(main.start(db)[1], "t1", "alice", "bob", 3000)
assert (result["status"], result["error"]) == ("compensated", "credit of 30.00: gone"), result
db.close()
"""
    in_a_process(script)


def test_a_promise_that_was_canceled_keeps_nobody_from_the_money(db: sqlite3.Connection, engine: Any) -> None:
    db.execute("INSERT INTO entries VALUES ('t1-debit', 't1', 'alice', 'bob', -3000, 'debit', NULL)")
    transfer = engine()
    promises = transfer._resonate.promises
    promises.create(id="t1", timeout=2**53, ikey="t1")
    promises.cancel(id="t1", ikey="t1")
    assert [result["status"] for result in main.recover(db, transfer)] == ["committed"]


@pytest.mark.parametrize("step", ["debit", "void", "reversal"])
def test_a_fault_elsewhere_is_retried_until_there_is_an_answer(
    db: sqlite3.Connection, engine: Any, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fault before the write and one after it; the SDK's delays are taken out."""
    real, left = main.settle, ["before", "after"]

    def faulty(*args: Any, **rest: Any) -> str | None:
        hit = left and step == ("void" if rest.get("void") else args[4])
        if hit and left.pop(0) == "before":
            raise sqlite3.OperationalError("database is locked")
        reason = real(*args, **rest)
        if hit and not left:
            raise sqlite3.OperationalError("disk I/O error")
        return reason

    monkeypatch.setattr(main, "settle", faulty)
    monkeypatch.setattr("resonate.retry_policies.Exponential.next", lambda _self, attempt: 0.001 * attempt)
    result = submit(engine(), "t1", "alice", "bob", 3000, simulate_credit_failure=True)
    assert (result["status"], left) == ("compensated", [])
    assert main.balance(db, "alice") == 10000


def test_faults_are_logged_and_refusals_are_not(
    db: sqlite3.Connection, engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    submit(engine(), "t1", "alice", "bob", 3000, simulate_credit_failure=True)
    submit(engine(), "t2", "alice", "bob", 300000)
    with pytest.raises(OperationConflict):
        submit(engine(), "t2", "alice", "bob", 1)
    assert caplog.text == ""
    monkeypatch.setattr(main, "credit_target", lambda *_args, **_rest: 1 / 0)
    assert submit(engine(), "t3", "alice", "bob", 3000)["error"] == "credit of 30.00: division by zero"
    assert "ZeroDivisionError" in caplog.text


def test_recover_finishes_what_is_in_flight_and_only_that(db: sqlite3.Connection, engine: Any) -> None:
    done = submit(engine(), "done", "alice", "bob", 100)
    for name, target in (("a", "bob"), ("b", "nobody")):
        db.execute(
            "INSERT INTO entries VALUES (?, ?, 'alice', ?, -500, 'debit', NULL)", (f"{name}-debit", name, target)
        )
    db.execute("INSERT INTO entries VALUES ('c-debit', 'c', 'bob', 'alice', -700, 'debit', NULL)")
    db.execute("INSERT INTO entries VALUES ('c-credit', 'c', 'alice', 'bob', 0, 'void', 'credit of 7.00: gone')")
    assert main.in_flight(db) == [("a", "alice", "bob", 500), ("b", "alice", "nobody", 500), ("c", "bob", "alice", 700)]
    results = main.recover(db, engine())
    assert [(result["transfer_id"], result["status"], result.get("error")) for result in results] == [
        ("a", "committed", None),
        ("b", "compensated", "credit of 5.00: unknown account"),
        ("c", "compensated", "credit of 7.00: gone"),
    ]
    assert main.in_flight(db) == main.recover(db, engine()) == []
    assert submit(engine(), "done", "alice", "bob", 100) == done


def test_recover_goes_on_past_what_it_cannot_finish_and_names_it(
    db: sqlite3.Connection, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, target in (("a.1", "bob"), ("b", "alice"), ("c", None), ("d", "bob")):
        db.execute(
            "INSERT INTO entries VALUES (?, ?, 'alice', ?, -500, 'debit', NULL)", (f"{name}-debit", name, target)
        )
    db.execute("INSERT INTO entries VALUES ('e-debit', 'e', 'alice', 'bob', -500, 'debit', NULL)")
    db.execute("INSERT INTO entries VALUES ('e-credit', 'e', 'bob', 'alice', 200, 'credit', NULL)")
    assert [result["transfer_id"] for result in main.recover(db, engine())] == ["d"]
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["'a.1'", "'b'", "'c'", "'e'"]
    assert [flight[0] for flight in main.in_flight(db)] == ["a.1", "b", "c", "e"]


def test_more_in_flight_than_one_promise_store_is_good_for(
    db: sqlite3.Connection, transfer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """450 in three batches: the first by the store that is there, the others by new ones, of which nothing is left."""
    rows = [(f"t{number}-debit", f"t{number}", "alice", "bob", -1, "debit", None) for number in range(450)]
    db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    real, stores = main.start, []

    def start(ledger: sqlite3.Connection, workflow: Any) -> Any:
        assert workflow is main.transfer_money
        resonate, saga = real(ledger)
        stores.append(weakref.ref(resonate._store))
        return resonate, saga

    monkeypatch.setattr(main, "start", start)
    assert len(main.recover(db, transfer)) == 450
    assert main.in_flight(db) == []
    gc.collect()
    assert [store() for store in stores] == [None, None]


def test_two_recover_at_once(db: sqlite3.Connection, engine: Any) -> None:
    rows = [(f"t{number}-debit", f"t{number}", "alice", "bob", -1, "debit", None) for number in range(60)]
    db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: main.recover(db, engine()), range(3)))
    assert main.in_flight(db) == []
    assert main.balance(db, "bob") == 5060


def test_hundreds_at_once_over_shared_accounts(db: sqlite3.Connection, transfer: Any) -> None:
    """300 threads, one engine: a ring of accounts, some credits refused, some sources too poor."""
    for number in range(6):
        main.open_account(db, f"a{number}", 2000)

    def one(number: int) -> dict[str, Any]:
        source, target = f"a{number % 6}", f"a{(number + 1 + number // 7 % 4) % 6}"
        return submit(
            transfer, f"t{number}", source, target, number % 50 * 4 + 1, simulate_credit_failure=number % 5 == 0
        )

    with ThreadPoolExecutor(300) as pool:
        results = list(pool.map(one, range(300)))
    assert main.in_flight(db) == []
    told_and_true(entries(db), results)


def storm() -> None:
    """200 threads ask eight times each for 150 transfers. In a process of its own: the SDK would end it."""
    sys.setswitchinterval(1e-6)
    db = main.open_ledger()
    main.open_account(db, "alice", 10**6)
    main.open_account(db, "bob")
    resonate, transfer = main.start(db)
    with ThreadPoolExecutor(200) as pool:
        results = list(pool.map(lambda number: submit(transfer, f"t{number // 8}", "alice", "bob", 1), range(1200)))
    resonate.stop()
    told_and_true(entries(db), results[::8])
    check(db)
    db.close()


def test_the_store_in_memory_stands_a_storm() -> None:
    in_a_process("import test_transfer; test_transfer.storm()")


def told_and_true(rows: dict[str, tuple[Any, ...]], results: list[dict[str, Any]]) -> None:
    """Each result is true of the entries, and each entry is told of by a result."""
    for result in results:
        name, source, target, amount = (result[key] for key in ("transfer_id", "source", "target", "amount"))
        debit, credit, reversal = (rows.pop(f"{name}-{kind}", None) for kind in ("debit", "credit", "reversal"))
        match result["status"]:
            case "committed":
                assert (debit, credit) == ((source, -amount, "debit"), (target, amount, "credit"))
                assert reversal is None
            case "compensated":
                assert (debit, credit) == ((source, -amount, "debit"), (target, 0, "void"))
                assert reversal == (source, amount, "reversal")
            case "rejected":
                assert (debit, credit, reversal) == ((source, 0, "void"), None, None)
            case other:
                raise AssertionError(other)
    assert rows == {}


@pytest.mark.parametrize("engines", [1, 3])
def test_the_same_id_at_the_same_time_from_many_threads(db: sqlite3.Connection, engine: Any, engines: int) -> None:
    """To one promise store, and to several that know nothing of each other."""
    started = [engine() for _ in range(engines)]
    for number in range(10):
        barrier = threading.Barrier(24)

        def one(thread: int, number: int = number, barrier: threading.Barrier = barrier) -> dict[str, Any]:
            barrier.wait()
            fail = number % 2 == 1 and thread % 2 == 1
            return submit(started[thread % engines], f"t{number}", "alice", "bob", 100, simulate_credit_failure=fail)

        with ThreadPoolExecutor(24) as pool:
            results = list(pool.map(one, range(24)))
        assert all(result == results[0] for result in results)
    assert main.in_flight(db) == []


def test_different_transfers_under_one_id_at_the_same_time(db: sqlite3.Connection, engine: Any) -> None:
    """One of them has it, the others hear of the conflict."""
    started = [engine(), engine()]
    for number in range(10):
        barrier = threading.Barrier(8)

        def one(thread: int, number: int = number, barrier: threading.Barrier = barrier) -> Any:
            barrier.wait()
            try:
                return submit(started[thread % 2], f"t{number}", "alice", "bob", thread + 1)
            except OperationConflict:
                return None

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(one, range(8)))
        assert [result["status"] for result in results if result] == ["committed"]


ACCOUNTS = st.sampled_from(["alice", "bob", "žofie", "o'neil; --", " ", "alice-opening", "\x00nul", "🏦"])
TRANSFERS = st.lists(
    st.tuples(st.integers(0, 5), ACCOUNTS, ACCOUNTS, st.integers(1, 12000) | st.just(2**63 - 1), st.booleans()),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(openings=st.dictionaries(ACCOUNTS, st.integers(0, 15000), min_size=2), requests=TRANSFERS, forget=st.booleans())
def test_any_sequence_of_transfers_does_what_a_model_says(
    openings: dict[str, int], requests: list[tuple[int, str, str, int, bool]], forget: bool
) -> None:
    """The model is plain Python: balances in a dict, and what each id was first used for."""
    db = main.open_ledger()
    for account, opening in openings.items():
        main.open_account(db, account, opening)
    model, known = dict(openings), {}
    resonate, transfer = main.start(db)
    for number, source, target, amount, fail in requests:
        name = f"t{number}"
        if forget:
            threading.Thread(target=resonate.stop).start()  # it may take the SDK 0.3 s
            resonate, transfer = main.start(db)
        if source == target:
            with pytest.raises(ValueError, match="two accounts"):
                submit(transfer, name, source, target, amount, simulate_credit_failure=fail)
            continue
        request = (source, target, amount)
        if name in known and known[name][0] != request:
            with pytest.raises(OperationConflict):
                submit(transfer, name, *request, simulate_credit_failure=fail)
            continue
        if name not in known:
            status = "committed"
            if model.get(source, -1) < amount:
                status = "rejected"
            elif fail or target not in model:
                status = "compensated"
            else:
                model[source] -= amount
                model[target] += amount
            known[name] = request, status
        result = submit(transfer, name, *request, simulate_credit_failure=fail)
        assert result["status"] == known[name][1]
        assert {account: main.balance(db, account) for account in model} == model
    threading.Thread(target=resonate.stop).start()
    check(db)
    db.close()


def test_the_model_is_not_the_only_witness(db: sqlite3.Connection, engine: Callable[[], Any]) -> None:
    """The oracle of every test here can fail: a balance that was tampered with is seen."""
    submit(engine(), "t1", "alice", "bob", 1)
    db.set_authorizer(None)
    db.execute("UPDATE accounts SET balance = balance + 1 WHERE account = 'bob'")
    with pytest.raises(AssertionError):
        check(db)
    db.execute("UPDATE accounts SET balance = balance - 1 WHERE account = 'bob'")


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70) | st.binary(max_size=5)
NAMES = st.text(st.characters(exclude_categories=[]), max_size=70) | st.sampled_from(
    ["alice", "bob", "--", "a.1", "\x00"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=NAMES | ANYTHING | st.from_regex("[A-Za-z0-9_-]{1,64}", fullmatch=True),
    source=st.just("alice") | NAMES | ANYTHING,
    target=st.just("bob") | NAMES | ANYTHING,
    amount=st.integers(1, 300) | ANYTHING,
)
def test_whatever_is_submitted_is_refused_clearly_or_is_a_correct_transfer(
    db: sqlite3.Connection, transfer: Any, name: Any, source: Any, target: Any, amount: Any
) -> None:
    before = entries(db)
    try:
        result = submit(transfer, name, source, target, amount)
    except ValueError as error:
        assert str(error).isprintable()
        assert entries(db) == before
    except OperationConflict:
        assert f"{name}-debit" in before
    else:
        assert [result[key] for key in ("transfer_id", "source", "target", "amount")] == [name, source, target, amount]
        told_and_true({op_id: row for op_id, row in entries(db).items() if op_id.rpartition("-")[0] == name}, [result])
    check(db)
