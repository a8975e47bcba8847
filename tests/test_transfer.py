"""The saga through the real SDK. The ledger is the witness of what a result says."""

import sqlite3
import sys
import threading
import time
from asyncio import CancelledError
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
from conftest import check, debited, in_a_process, opened, settled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main
from main import Operation, OperationConflict, Transfer, TransferRejected, submit

Engine = Callable[[], Transfer]
REQUEST = {"transfer_id": "t1", "source": "alice", "target": "bob", "amount": 3000}
REFUSED = "the target refused (simulated)"


# ---- What a transfer does ------------------------------------------------------------------------


def test_a_commit_moves_the_money(db: sqlite3.Connection, transfer: Transfer) -> None:
    assert submit(db, transfer, "t1", "alice", "bob", 3000) == REQUEST | {"status": "committed"}
    assert settled(db) == {"t1-debit": ("alice", -3000, None), "t1-credit": ("bob", 3000, None)}
    assert (main.balance(db, "alice"), main.balance(db, "bob")) == (7000, 8000)


def test_a_refused_credit_is_compensated(db: sqlite3.Connection, transfer: Transfer) -> None:
    result = submit(db, transfer, "t1", "alice", "bob", 3000, simulate_credit_failure=True)
    assert result == REQUEST | {"status": "compensated", "error": REFUSED}
    assert settled(db) == {
        "t1-debit": ("alice", -3000, None),
        "t1-credit": ("bob", 3000, REFUSED),
        "t1-reversal": ("alice", 3000, None),
    }


def test_a_credit_that_lands_and_loses_its_answer_is_committed(
    db: sqlite3.Connection, transfer: Transfer, caplog: pytest.LogCaptureFixture
) -> None:
    """The case that the file is about. The saga hears of the failure, and says so."""
    caplog.set_level("INFO", main.LOG.name)
    result = submit(db, transfer, "t1", "alice", "bob", 3000, simulate_lost_answer=True)
    assert result == REQUEST | {"status": "committed"}
    assert settled(db) == {"t1-debit": ("alice", -3000, None), "t1-credit": ("bob", 3000, None)}
    assert caplog.messages == [
        "t1: the credit failed: TimeoutError: no answer from the target (simulated)",
        "t1 committed",
    ]


def test_an_unknown_target_is_compensated(db: sqlite3.Connection, transfer: Transfer) -> None:
    result = submit(db, transfer, "t1", "alice", "carol", 3000)
    assert (result["status"], result["error"]) == ("compensated", "unknown account")
    assert main.balance(db, "alice") == 10000


@pytest.mark.parametrize(
    ("source", "amount", "error"),
    [("alice", 10001, "insufficient funds"), ("carol", 1, "unknown account")],
)
def test_a_refused_debit_is_rejected_and_stays_so(
    db: sqlite3.Connection, engine: Engine, source: str, amount: int, error: str
) -> None:
    """Though the account could pay later, and the promise store has forgotten."""
    result = submit(db, engine(), "t1", source, "bob", amount)
    assert (result["status"], result["error"]) == ("rejected", error)
    assert settled(db) == {"t1-debit": (source, -amount, error)}
    main.open_account(db, "rich", 10**6)
    submit(db, engine(), "gift", "rich", "alice", 10**6)
    assert submit(db, engine(), "t1", source, "bob", amount) == result


def test_all_that_an_account_has_can_be_moved(db: sqlite3.Connection, transfer: Transfer) -> None:
    assert submit(db, transfer, "t1", "alice", "bob", 10000)["status"] == "committed"
    assert main.balance(db, "alice") == 0


def test_a_commit_takes_exactly_two_durable_steps(
    db: sqlite3.Connection, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def step(name: str) -> Any:
        real = getattr(main, name)
        return lambda *args, **rest: (taken.append(name), real(*args, **rest))[1]

    for name in ("apply_entry", "give_up"):
        monkeypatch.setattr(main, name, step(name))
    submit(db, transfer, "t1", "alice", "bob", 3000)
    assert taken == ["apply_entry", "apply_entry"]  # the second is in credit_target


# ---- The same id, and the wrong one --------------------------------------------------------------


@pytest.mark.parametrize("simulate", [{}, {"simulate_credit_failure": True}])
@pytest.mark.parametrize("amount", [3000, 20000])
def test_the_same_id_again_reports_the_same_and_moves_nothing(
    db: sqlite3.Connection, engine: Engine, amount: int, simulate: dict[str, bool]
) -> None:
    """By an engine that knows of it or not, and whatever the target would say this time."""
    first_engine = engine()
    first = submit(db, first_engine, "t1", "alice", "bob", amount, **simulate)
    before = settled(db)
    for again in (first_engine, engine()):
        for now in ({}, {"simulate_credit_failure": True}, {"simulate_lost_answer": True}):
            assert submit(db, again, "t1", "alice", "bob", amount, **now) == first
    assert settled(db) == before


OTHERS = [("alice", "bob", 3001), ("alice", "carol", 3000), ("bob", "alice", 3000)]


@pytest.mark.parametrize("amount", [3000, 20000])
def test_an_id_used_again_for_another_transfer_is_a_conflict_that_names_the_first(
    db: sqlite3.Connection, engine: Engine, amount: int
) -> None:
    main.open_account(db, "carol", 9000)
    first_engine = engine()
    first = submit(db, first_engine, "t1", "alice", "bob", amount)
    before = settled(db)
    says = f"'t1' is already used: {amount // 100}.00 from alice to bob$"
    for again in (first_engine, engine()):
        for other in [*OTHERS, ("alice", "bob", amount - 1)]:
            with pytest.raises(OperationConflict, match=says):
                submit(db, again, "t1", *other)
        assert submit(db, again, "t1", "alice", "bob", amount) == first
    assert settled(db) == before


def test_a_wrong_request_does_not_spoil_the_answer_to_the_right_one(
    db: sqlite3.Connection, transfer: Transfer
) -> None:
    debited(db, "t1")
    with pytest.raises(OperationConflict):
        submit(db, transfer, "t1", "alice", "bob", 1)
    assert [result["status"] for result in main.recover(db, transfer)] == ["committed"]


class Lie:
    """A promise store that answers what it is told to."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def run(self, *_args: Any, **_rest: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


LIES = (
    REQUEST | {"status": "committed", "amount": 500},
    REQUEST | {"status": "rejected", "amount": 500, "error": "no"},
    REQUEST | {"status": "in flight", "amount": 1},
    {"status": "in flight"},
    "committed",
    None,
    OperationConflict("no"),
    main.ResonateCanceledError("t1"),
    main.ResonateTimedoutError("t1", 0),
)


@pytest.mark.parametrize("answer", LIES)
def test_no_answer_is_believed_that_the_ledger_contradicts(
    db: sqlite3.Connection, answer: object
) -> None:
    debited(db, "t1")
    lie: Any = Lie(answer)
    with pytest.raises(OperationConflict, match="'in flight'"):
        submit(db, lie, "t1", "alice", "bob", 500)


def test_a_reversal_that_conflicts_ends_its_transfer_and_does_not_hang(
    db: sqlite3.Connection, transfer: Transfer
) -> None:
    debited(db, "t1")
    other = Operation("t1-reversal", "t1", "reversal", "alice", 500, "carol")
    main.settle(db, other)
    with pytest.raises(OperationConflict):
        submit(db, transfer, "t1", "alice", "bob", 500)


def test_a_mistyped_option_is_an_error_of_its_caller(
    db: sqlite3.Connection, transfer: Transfer
) -> None:
    with pytest.raises(TypeError):
        submit(db, transfer, "t1", "alice", "bob", 1, simulate_typo=True)  # type: ignore[call-arg]
    assert submit(db, transfer, "t1", "alice", "bob", 1)["status"] == "committed"


class Text(str):
    pass


class Number(int):
    pass


BAD: list[tuple[Any, Any, Any, Any]] = [
    *((name, "alice", "bob", 1) for name in ("", "a.1", "a b", "a?b", "a/b", "%2F", "é", "a\n")),
    *((name, "alice", "bob", 1) for name in ("x" * 65, None, 1, b"a", Text("a"))),
    *(("t", "alice", "bob", amount) for amount in (0, -1, 1.0, 30.5, True, "30", None, 2**63)),
    *(("t", "alice", "bob", amount) for amount in (float("nan"), Number(1))),
    *(("t", account, "bob", 1) for account in ("", None, 1, b"alice", "\ud800", Text("alice"))),
    *(("t", "alice", account, 1) for account in ("", None, 1, b"bob", "\udfff", "alice")),
]


@pytest.mark.parametrize("bad", BAD, ids=ascii)
def test_what_is_no_valid_transfer_is_refused_before_anything_is_written(
    db: sqlite3.Connection, bad: tuple[Any, ...]
) -> None:
    untouched: Any = object()  # any use of it fails: no promise is made either
    with pytest.raises(ValueError, match=r"transfer id|account|amount"):
        submit(db, untouched, *bad)
    assert settled(db) == {}


@pytest.mark.parametrize("name", ["a", "x" * 64, "-", "_", "t-debit", "0", "alice"])
def test_every_id_that_is_allowed_works(
    db: sqlite3.Connection, transfer: Transfer, name: str
) -> None:
    assert submit(db, transfer, name, "alice", "bob", 1)["status"] == "committed"
    assert submit(db, transfer, f"{name[:-1]}Z", "alice", "bob", 1)["status"] == "committed"


# ---- Faults --------------------------------------------------------------------------------------


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")

    __repr__ = __str__


class KeywordOnly(Exception):
    """As those of some libraries: it cannot be made again from what it says."""

    def __init__(self, *, response: str) -> None:
        super().__init__(response)


class Holder(Exception):
    """It cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())


RAISED: dict[str, tuple[BaseException, str]] = {
    "a timeout": (TimeoutError("no answer"), "TimeoutError: no answer"),
    "one with no text": (TimeoutError(), "TimeoutError"),
    "a locked ledger": (sqlite3.OperationalError("locked"), "OperationalError: locked"),
    "a full disk": (OSError(28, "full"), "OSError: [Errno 28] full"),
    "an end of the process": (SystemExit(3), "SystemExit: 3"),
    "a Ctrl-C": (KeyboardInterrupt(), "KeyboardInterrupt"),
    "a canceled task": (CancelledError("late"), "CancelledError: late"),
    "a closed generator": (GeneratorExit(), "GeneratorExit"),
    "a stopped iterator": (StopIteration(), "StopIteration"),
    "a group": (BaseExceptionGroup("two", [SystemExit()]), "BaseExceptionGroup: two (1 sub-except"),
    "one whose text raises": (Mute(), "Mute"),
    "one that cannot be made again": (KeywordOnly(response="gone"), "KeywordOnly: gone"),
    "one that cannot be pickled": (Holder(), "Holder: <unlocked"),
    "half a character": (ValueError("\ud800"), "ValueError: \\ud800"),
    "a refusal whose text raises": (TransferRejected(Mute()), "TransferRejected('')"),
    "a conflict": (OperationConflict("mine"), "mine"),
}


def raises_and_returns_everything() -> None:
    """In a process of its own: what is not mended hangs or ends it."""
    db = opened()
    _, transfer = main.start(db)
    names = (f"t{number}" for number in count())
    for raised, error in RAISED.values():
        for lands in (False, True):

            def credit(
                ctx: Any, operation: Any, *, raised: Any = raised, lands: Any = lands, **_: Any
            ) -> None:
                if lands:
                    main.apply_entry(ctx, operation)
                raise raised

            main.credit_target = credit
            name = next(names)
            result = submit(db, transfer, name, "alice", "bob", 1)
            assert result["status"] == ("committed" if lands else "compensated"), (raised, result)
            assert lands or str(result["error"]).startswith(error), result
    values = [object(), {(1, 2): 3}, threading.Lock(), float("nan"), {"py/object": "os.abort"}, sys]
    values += [10**5000, "text", Text("text"), b"text", [1], None]
    for number, value in enumerate(values):

        def credit(ctx: Any, operation: Any, *, value: Any = value, **_: Any) -> object:
            main.apply_entry(ctx, operation)
            return value

        main.credit_target = credit  # type: ignore[assignment]
        result = submit(db, transfer, f"value-{number}", "alice", "bob", 1)
        assert result["status"] == "committed", (value, result)
    check(db)
    db.close()


def clock_jumps() -> None:
    """The clock of the store goes on by an hour at each step, as when a computer has slept."""
    db = opened()
    resonate, transfer = main.start(db)
    store: Any = transfer._resonate._store  # type: ignore[attr-defined]
    real, hours = time.time, count()
    real_settle = main.settle

    class Clock:
        now = 0.0

        def time(self) -> float:
            return real() + self.now

    clock = store._clock = Clock()

    def settle_later(*args: Any, **rest: Any) -> Any:
        clock.now = 3600.0 * next(hours)
        store.notify()  # it looks after its leases
        return real_settle(*args, **rest)

    main.settle = settle_later
    for number in range(100):
        result = submit(db, transfer, f"t{number}", "alice", "bob", 1)
        assert result["status"] == "committed"
    resonate.stop()
    db.close()


def stopped_meanwhile() -> None:
    """An engine that is stopped while a transfer runs tells its caller."""
    db = opened()
    resonate, transfer = main.start(db)
    reached, goes_on = threading.Event(), threading.Event()

    def slow(ctx: Any, operation: Any, **_: Any) -> None:
        reached.set()
        assert goes_on.wait(30)
        main.apply_entry(ctx, operation)

    main.credit_target = slow
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(submit, db, transfer, "t1", "alice", "bob", 1)
        assert reached.wait(30)
        stopping = pool.submit(resonate.stop)
        goes_on.set()
        with suppress(ConnectionError):
            waiting.result(30)
        stopping.result(30)
    db.close()


@pytest.mark.parametrize("what", ["clock_jumps", "stopped_meanwhile"])
def test_a_transfer_ends_or_its_caller_is_told(what: str) -> None:
    in_a_process(f"import test_transfer; test_transfer.{what}()")


def test_whatever_a_credit_raises_or_returns_its_transfer_ends_as_the_ledger_has_it() -> None:
    """And no other is touched: it is one process for all of them."""
    in_a_process("import test_transfer; test_transfer.raises_and_returns_everything()")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the pauses out of the SDK's retries."""
    pause = "resonate.retry_policies.Exponential.next"
    monkeypatch.setattr(pause, lambda _self, attempt: 0.001 * attempt)


@pytest.mark.parametrize("raised", [sqlite3.OperationalError("locked"), SystemExit(), Mute()])
@pytest.mark.parametrize("step", ["debit", "void", "reversal"])
def test_a_fault_of_another_step_is_run_again_until_it_has_an_answer(
    db: sqlite3.Connection,
    transfer: Transfer,
    step: str,
    raised: BaseException,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One fault before the write and one after it."""
    real, left = main.settle, ["before", "after"]

    def faulty(db: Any, operation: Operation, void: str | None = None) -> str | None:
        hit = left and step == ("void" if void else operation.kind)
        if hit and left.pop(0) == "before":
            raise raised
        reason = real(db, operation, void)
        if hit and not left:
            raise raised
        return reason

    monkeypatch.setattr(main, "settle", faulty)
    result = submit(db, transfer, "t1", "alice", "bob", 3000, simulate_credit_failure=True)
    assert (result["status"], left) == ("compensated", [])
    assert main.balance(db, "alice") == 10000


def test_a_fault_that_is_run_again_is_said_and_an_answer_is_not(
    db: sqlite3.Connection,
    transfer: Transfer,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    submit(db, transfer, "t1", "alice", "bob", 3000, simulate_credit_failure=True)
    submit(db, transfer, "t2", "alice", "bob", 300000)
    with pytest.raises(OperationConflict):
        submit(db, transfer, "t2", "alice", "bob", 1)
    assert caplog.messages == []
    real, faults = main.settle, [sqlite3.OperationalError("database is locked")]

    def locked_once(*args: Any, **rest: Any) -> Any:
        if faults:
            raise faults.pop()
        return real(*args, **rest)

    monkeypatch.setattr(main, "settle", locked_once)
    assert submit(db, transfer, "t3", "alice", "bob", 3000)["status"] == "committed"
    [said] = caplog.messages
    assert "database is locked" in said
    assert "retrying" in said


def test_the_saga_tells_how_it_ends(
    db: sqlite3.Connection, transfer: Transfer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", main.LOG.name)
    submit(db, transfer, "t1", "alice", "bob", 1)
    submit(db, transfer, "t2", "alice", "bob", 1, simulate_credit_failure=True)
    submit(db, transfer, "t3", "alice", "bob", 10**6)
    assert caplog.messages == [
        "t1 committed",
        f"t2: the credit failed: {REFUSED}",
        f"t2 compensated: {REFUSED}",
        "t3 rejected: insufficient funds",
    ]


# ---- Recovery ------------------------------------------------------------------------------------


def test_recover_finishes_what_is_in_flight_and_only_that(
    db: sqlite3.Connection, engine: Engine
) -> None:
    done = submit(db, engine(), "done", "alice", "bob", 100)
    debited(db, "a", "c")
    debited(db, "b", target="nobody")
    gone = Operation("c-credit", "c", "credit", "bob", 500, "alice")
    main.settle(db, gone, void="gone")
    reported: list[Any] = []
    results = main.recover(db, engine(), reported.append)
    assert reported == results
    assert [(one["transfer_id"], one["status"], one.get("error")) for one in results] == [
        ("a", "committed", None),
        ("c", "compensated", "gone"),
        ("b", "compensated", "unknown account"),
    ]
    assert main.in_flight(db) == main.recover(db, engine()) == []
    assert submit(db, engine(), "done", "alice", "bob", 100) == done


def test_recover_reports_each_result_as_soon_as_it_is_known(
    db: sqlite3.Connection, transfer: Transfer
) -> None:
    debited(db, "a", "b", "c")
    left: list[int] = []
    main.recover(db, transfer, lambda _result: left.append(len(main.in_flight(db))))
    assert left == [2, 1, 0]


def test_recover_goes_on_past_what_it_cannot_finish_and_says_why(
    db: sqlite3.Connection, transfer: Transfer
) -> None:
    debited(db, "a.1", "d")
    debited(db, "e")
    other = Operation("e-credit", "e", "credit", "carol", 500, "alice")
    main.settle(db, other, void="not this one")
    results = {one["transfer_id"]: one for one in main.recover(db, transfer)}
    assert results["d"]["status"] == "committed"
    for name, why in (
        ("a.1", "a transfer id is"),
        ("e", "'e-credit' is already used: 5.00 on account carol"),
    ):
        assert results[name]["status"] == "in flight"
        assert why in str(results[name]["error"])
        assert results[name]["amount"] == 500
    assert [name for name, *_ in main.in_flight(db)] == ["a.1", "e"]


def test_three_recover_at_once(db: sqlite3.Connection, engine: Engine) -> None:
    main.open_account(db, "rich", 10**6)
    for number in range(60):
        name = f"t{number}"
        main.settle(db, Operation(f"{name}-debit", name, "debit", "rich", -1, "bob"))
    engines = [engine() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda one: main.recover(db, one), engines))
    assert main.in_flight(db) == []
    assert main.balance(db, "bob") == 5060


# ---- Many at once --------------------------------------------------------------------------------


def told_and_true(rows: dict[str, tuple[Any, ...]], results: list[Any]) -> None:
    """Each result is true of the ledger, and each row is told of by a result."""
    for result in results:
        name, source, target, amount = (result[key] for key in REQUEST)
        debit, credit, back = (
            rows.pop(f"{name}-{kind}", None) for kind in ("debit", "credit", "reversal")
        )
        error = result.get("error")
        debit_row = (source, -amount, error if result["status"] == "rejected" else None)
        assert debit == debit_row
        match result["status"]:
            case "committed":
                assert (credit, back) == ((target, amount, None), None)
            case "compensated":
                assert (credit, back) == ((target, amount, error), (source, amount, None))
            case "rejected":
                assert (credit, back) == (None, None)
            case other:
                raise AssertionError(other)
    assert rows == {}


def test_hundreds_at_once_over_shared_accounts(db: sqlite3.Connection, transfer: Transfer) -> None:
    """300 threads, one engine: some credits are refused, some sources too poor."""
    for number in range(6):
        main.open_account(db, f"a{number}", 2000)

    def one(number: int) -> Any:
        source, target = f"a{number % 6}", f"a{(number + 1 + number // 7 % 4) % 6}"
        amount = number % 50 * 4 + 1
        fail = number % 5 == 0
        return submit(
            db, transfer, f"t{number}", source, target, amount, simulate_credit_failure=fail
        )

    with ThreadPoolExecutor(300) as pool:
        results = list(pool.map(one, range(300)))
    assert main.in_flight(db) == []
    told_and_true(settled(db), results)


def remembered(transfer: Any) -> list[int]:
    """How many promises, tasks and computations the SDK still has in memory."""
    store, bridge = transfer._resonate._store, transfer._resonate._bridge
    return [
        len(kept)
        for kept in (
            store._promises.inner._promises,
            store._tasks.inner._tasks,
            bridge._promise_id_to_task,
            bridge._scheduler.computations,
        )
    ]


def storm() -> None:
    """200 threads ask for 300 transfers, twice each, and in the end nothing is kept of them.

    In a process of its own: the unmended SDK would end it.
    """
    sys.setswitchinterval(1e-4)
    db = opened()
    resonate, transfer = main.start(db)

    def one(number: int) -> Any:
        return submit(db, transfer, f"t{number // 2}", "alice", "bob", 1)

    with ThreadPoolExecutor(200) as pool:
        results = list(pool.map(one, range(600)))
    told_and_true(settled(db), results[::2])
    deadline = time.monotonic() + 30
    while any(remembered(transfer)):
        assert time.monotonic() < deadline, remembered(transfer)
    resonate.stop()
    check(db)
    db.close()


def test_the_store_in_memory_stands_a_storm_and_forgets_it() -> None:
    in_a_process("import test_transfer; test_transfer.storm()")


def test_a_caller_that_is_interrupted_leaves_a_transfer_that_can_be_asked_for_again(
    db: sqlite3.Connection, transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still runs while its caller is gone: to forget it then would end the process."""
    goes_on, reached = threading.Event(), threading.Event()
    real = main.credit_target

    def slow(ctx: Any, operation: Operation, **simulate: bool) -> None:
        reached.set()
        assert goes_on.wait(30)
        real(ctx, operation, **simulate)

    monkeypatch.setattr(main, "credit_target", slow)

    class Interrupted(Exception):
        pass

    def interrupt(*_: Any, **__: Any) -> Any:
        assert reached.wait(30)
        raise Interrupted

    with monkeypatch.context() as interrupted:
        interrupted.setattr(main, "wait", interrupt)
        with pytest.raises(Interrupted):
            submit(db, transfer, "t1", "alice", "bob", 1)
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(submit, db, transfer, "t1", "alice", "bob", 1)
        goes_on.set()
        assert again.result(30)["status"] == "committed"


@pytest.mark.parametrize("engines", [1, 3])
def test_the_same_id_at_the_same_time_from_many_threads_is_one_transfer(
    db: sqlite3.Connection, engine: Engine, engines: int
) -> None:
    """To one promise store, and to several that know nothing of each other."""
    started = [engine() for _ in range(engines)]
    for number in range(10):
        barrier = threading.Barrier(24)

        def one(thread: int, number: int = number, barrier: threading.Barrier = barrier) -> Any:
            barrier.wait()
            fail = number % 2 == 1 and thread % 2 == 1
            handle = started[thread % engines]
            name = f"t{number}"
            return submit(db, handle, name, "alice", "bob", 100, simulate_credit_failure=fail)

        with ThreadPoolExecutor(24) as pool:
            results = list(pool.map(one, range(24)))
        assert all(result == results[0] for result in results)
    assert main.in_flight(db) == []


def test_of_different_transfers_under_one_id_at_the_same_time_one_has_it(
    db: sqlite3.Connection, engine: Engine
) -> None:
    started = [engine(), engine()]
    for number in range(10):
        barrier = threading.Barrier(8)

        def one(thread: int, number: int = number, barrier: threading.Barrier = barrier) -> Any:
            barrier.wait()
            try:
                return submit(db, started[thread % 2], f"t{number}", "alice", "bob", thread + 1)
            except OperationConflict:
                return None

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(one, range(8)))
        assert [result["status"] for result in results if result] == ["committed"]


# ---- Whatever is asked ---------------------------------------------------------------------------

ACCOUNTS = st.sampled_from(
    ["alice", "bob", "žofie", "o'neil; --", " ", "alice-opening", "\x00nul", "🏦"]
)
TRANSFERS = st.lists(
    st.tuples(
        st.integers(0, 5),
        ACCOUNTS,
        ACCOUNTS,
        st.integers(1, 12000) | st.just(2**63 - 1),
        st.sampled_from([{}, {"simulate_credit_failure": True}, {"simulate_lost_answer": True}]),
    ),
    min_size=1,
    max_size=12,
)


class Model:
    """What transfers do, in plain Python: balances in a dict, and what each id was used for."""

    def __init__(self, openings: dict[str, int]) -> None:
        self.balances = dict(openings)
        self.known: dict[str, tuple[Any, str]] = {}

    def status(self, name: str, request: tuple[str, str, int], fail: bool) -> str:
        source, target, amount = request
        if name in self.known:
            first, status = self.known[name]
            return status if first == request else "conflict"
        status = "committed"
        if self.balances.get(source, -1) < amount:
            status = "rejected"
        elif fail or target not in self.balances:
            status = "compensated"
        else:
            self.balances[source] -= amount
            self.balances[target] += amount
        self.known[name] = request, status
        return status


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(openings=st.dictionaries(ACCOUNTS, st.integers(0, 15000), min_size=2), requests=TRANSFERS)
def test_any_sequence_of_transfers_does_what_a_model_says(
    openings: dict[str, int], requests: list[tuple[int, str, str, int, dict[str, bool]]]
) -> None:
    db = main.open_ledger()
    for account, opening in openings.items():
        main.open_account(db, account, opening)
    resonate, transfer = main.start(db)
    model = Model(openings)
    for number, source, target, amount, simulate in requests:
        name, request = f"t{number}", (source, target, amount)
        if source == target:
            with pytest.raises(ValueError, match="same account"):
                submit(db, transfer, name, *request, **simulate)
            continue
        expected = model.status(name, request, "simulate_credit_failure" in simulate)
        if expected == "conflict":
            with pytest.raises(OperationConflict):
                submit(db, transfer, name, *request, **simulate)
            continue
        assert submit(db, transfer, name, *request, **simulate)["status"] == expected
        balances = {account: main.balance(db, account) for account in model.balances}
        assert balances == model.balances
    threading.Thread(target=resonate.stop).start()  # it takes the SDK 0.3 s
    check(db)
    db.close()


def test_the_oracle_of_these_tests_can_fail(db: sqlite3.Connection) -> None:
    db.set_authorizer(None)
    change = "UPDATE accounts SET balance = balance + ? WHERE account = 'bob'"
    db.execute(change, (1,))
    with pytest.raises(AssertionError):
        check(db)
    db.execute(change, (-1,))


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70)
NAMES = st.text(st.characters(exclude_categories=[]), max_size=70) | st.sampled_from(
    ["alice", "bob", "--", "a.1", "\x00"]
)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[sqlite3.Connection, Transfer]]:
    db = opened()
    resonate, transfer = main.start(db)
    yield db, transfer
    resonate.stop()
    check(db)
    db.close()


@settings(max_examples=150, deadline=None)
@given(
    name=NAMES | ANYTHING | st.from_regex("[A-Za-z0-9_-]{1,64}", fullmatch=True),
    source=st.just("alice") | NAMES | ANYTHING,
    target=st.just("bob") | NAMES | ANYTHING,
    amount=st.integers(1, 300) | ANYTHING,
)
def test_whatever_is_submitted_is_refused_in_words_or_is_a_correct_transfer(
    shared: tuple[sqlite3.Connection, Transfer], name: Any, source: Any, target: Any, amount: Any
) -> None:
    db, transfer = shared
    before = settled(db)
    try:
        result = submit(db, transfer, name, source, target, amount)
    except ValueError as error:
        assert str(error).isprintable()
        assert settled(db) == before
    except OperationConflict:
        assert f"{name}-debit" in before
    else:
        assert [result[key] for key in REQUEST] == [name, source, target, amount]
        rows = {key: row for key, row in settled(db).items() if key.rpartition("-")[0] == name}
        told_and_true(rows, [result])
