"""The saga through the real SDK in memory, with threads and faults. The ledger is the witness."""

import json
import sqlite3
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import check, operation

import main
from main import OperationConflict, submit

sys.setswitchinterval(1e-5)  # threads interrupt one another everywhere
LATE, LOST = {"simulate_credit_failure": "late"}, {"simulate_credit_failure": "lost"}
T1 = ("t1", "alice", "bob", 500)


@pytest.fixture
def soon(monkeypatch):
    """Resonate waits only a moment before it runs a step again."""
    monkeypatch.setattr("resonate.retry_policies.Exponential.next", lambda *_: 0.001)


@pytest.fixture
def fast_minute(monkeypatch):
    """The minute that `submit` waits is over at its third look."""
    clock = SimpleNamespace(monotonic=count(0, 25).__next__, sleep=time.sleep)
    monkeypatch.setattr(main, "time", clock)


# ---- What a transfer is --------------------------------------------------------------------------


def test_what_is_no_valid_transfer_is_refused_before_anything_is_written(db):
    no_bank = main.Bank(db, "", None)  # any use of Resonate fails
    text = type("Text", (str,), {})  # is a str, and is not: what JSON makes of it is another type
    names = ["", " a", "a ", None, b"carol", "\ud800", "a\x1b[2J", text("alice")]
    not_valid = {
        "transfer_id": ["", "a.1", "a b", "é", "a\n", "x" * 65, None, text("t1")],
        "source": names,
        "target": names,
        "amount": [0, -1, 1.0, True, "30", None, 10**15 + 1],
    }
    for field, values in not_valid.items():
        for value in values:
            terms = {"transfer_id": "t1", "source": "alice", "target": "bob", "amount": 1}
            with pytest.raises(ValueError, match=r"transfer id|account|amount"):
                submit(no_bank, **terms | {field: value})
    with pytest.raises(ValueError, match="amount"):
        main.open_account(db, "carol", -1)
    with pytest.raises(TypeError, match="simulate"):
        submit(no_bank, *T1, simulate_credit="late")


def test_ids_and_amounts_at_their_edges_are_accepted(bank):
    main.open_account(bank.db, "rich", 10**15)
    for transfer_id, amount in (("x", 1), ("X_-" + "9" * 61, 10**15 - 1)):
        assert submit(bank, transfer_id, "rich", "bob", amount)["status"] == "committed"


@pytest.mark.parametrize("change", [{1: "carol"}, {2: "carol"}, {3: 501}, {1: "bob", 2: "alice"}])
def test_an_id_with_another_account_or_amount_is_a_conflict(bank, change):
    main.open_account(bank.db, "carol", 5000)
    submit(bank, *T1)
    terms = [change.get(place, value) for place, value in enumerate(T1)]
    with pytest.raises(OperationConflict, match=r"'t1' is already used: 5\.00 from alice to bob"):
        submit(bank, *terms)


def test_recover_goes_on_after_what_it_cannot_finish(bank):
    for op_id in ("d.1-debit", "t2-debit", "t3-debit"):
        main.settle(bank.db, operation(op_id))
    main.settle(bank.db, operation("t2-credit"), void="gone")
    results = list(main.recover(bank))
    assert [result["status"] for result in results] == ["in flight", "compensated", "committed"]
    assert "a transfer id is" in results[0]["error"]


def test_what_has_ended_is_answered_without_resonate(bank):
    ended = submit(bank, *T1)
    resonate = Mock()
    assert submit(bank._replace(resonate=resonate), *T1) == ended
    assert resonate.mock_calls == []


# ---- Faults --------------------------------------------------------------------------------------


def test_a_step_that_fails_though_it_settled_says_so_and_is_run_again(
    bank, soon, monkeypatch, caplog
):
    settle, faults = main.settle, [OSError("disk"), sqlite3.OperationalError("locked")]

    def faulty(*operation, **void):
        happened = settle(*operation, **void)
        if faults:
            raise faults.pop()
        return happened

    monkeypatch.setattr(main, "settle", faulty)
    assert submit(bank, *T1)["status"] == "committed"
    assert "apply_entry" in caplog.text and "locked" in caplog.text and "disk" in caplog.text


def test_a_give_up_that_fails_says_so_and_an_error_of_the_credit_does_not(
    bank, soon, monkeypatch, caplog
):
    give_up, faults = main.give_up, [sqlite3.DatabaseError("damaged")]

    def give_up_later(*args):
        if faults:
            raise faults.pop()
        return give_up(*args)

    monkeypatch.setattr(main, "give_up", give_up_later)
    assert submit(bank, *T1, **LATE)["status"] == "compensated"
    assert "damaged" in caplog.text and "credit_target" not in caplog.text


ODD = {
    "SystemExit: 3": SystemExit(3),
    "OSError: <unlocked": OSError(threading.Lock()),  # cannot be pickled
    "ValueError: \\ud800\\x1b[2J": ValueError("\ud800\x1b[2J"),
    "OperationConflict: xxx": OperationConflict("x" * 10**6),
}


@pytest.mark.parametrize("reason", ODD)
def test_whatever_a_credit_raises_its_transfer_is_compensated(bank, monkeypatch, reason):
    def raise_if_credit(_ctx, operation):
        if operation.kind == "credit":
            raise ODD[reason]
        return main.settle(bank.db, operation)

    monkeypatch.setattr(main, "apply_entry", raise_if_credit)
    result = submit(bank, *T1)
    assert result["status"] == "compensated"
    assert result["error"].startswith(reason) and len(result["error"]) <= 300


def test_what_cannot_be_written_is_told_and_is_a_timeout_after_a_minute(
    bank, soon, fast_minute, caplog
):
    bank.db.execute("PRAGMA query_only = ON")
    with pytest.raises(TimeoutError, match="t1 has not ended in a minute: ask again"):
        submit(bank, *T1)
    assert "readonly database" in caplog.text and "t1 has not ended" in caplog.text
    bank.db.execute("PRAGMA query_only = OFF")
    assert submit(bank, *T1)["status"] == "committed"


@pytest.mark.parametrize("end", ["returns", "raises"])
def test_a_run_that_ends_though_the_ledger_does_not_know_is_run_anew(bank, end):
    """So it is after a ledger was restored from a copy, and if somebody cancels a promise."""
    promise = f"{bank.ledger_id}-t1"
    bank.resonate.promises.create(promise, 2**52, ikey=promise, tags={})
    if end == "raises":
        bank.resonate.promises.cancel(promise)
    else:
        bank.resonate.promises.resolve(promise, headers={}, data='"committed"')
    assert submit(bank, *T1)["status"] == "committed"


def test_a_bank_that_was_stopped_says_so_and_does_not_wait(bank):
    bank.resonate.stop()
    with pytest.raises(RuntimeError, match="started once"):
        submit(bank, *T1)


# ---- What `mend` mends, and what it leaves as it is ----------------------------------------------


@pytest.mark.parametrize("jump", [11, 3600, -3600])
def test_a_clock_that_jumps_amid_a_transfer_ends_no_process(bank, monkeypatch, jump):
    """So it is if a laptop sleeps, or if a bank takes longer than the SDK's lease of 10 s."""
    clock, credit_target = time.time, main.credit_target

    def jump_and_credit(*args, **options):
        monkeypatch.setattr(time, "time", lambda: clock() + jump)
        return credit_target(*args, **options)

    monkeypatch.setattr(main, "credit_target", jump_and_credit)
    for transfer_id in ("t1", "t2"):
        assert submit(bank, transfer_id, "alice", "bob", 1)["status"] == "committed"


def test_steps_that_fail_at_the_same_tick_of_a_coarse_clock_are_run_again(bank, soon, monkeypatch):
    settle, clock, failed = main.settle, time.time, set()

    def fail_once(db, operation, **void):
        if operation.op_id not in failed:
            failed.add(operation.op_id)
            raise OSError("busy")
        return settle(db, operation, **void)

    monkeypatch.setattr(main, "settle", fail_once)
    monkeypatch.setattr(time, "time", lambda: clock() // (1 / 64) / 64)
    with ThreadPoolExecutor(16) as pool:
        results = pool.map(lambda n: submit(bank, f"t{n}", "alice", "bob", 1), range(64))
    assert {result["status"] for result in results} == {"compensated"}


def test_a_copiers_saga_may_sleep_and_call_others_beside_transfers(bank):
    def child(ctx, number):
        yield ctx.sleep(0.001)
        return number

    def saga(ctx, number):
        yield ctx.sleep(0.01)
        local = yield ctx.run(child, number)
        other = yield ctx.rfc("child", number)
        return local + other

    bank.resonate.register(child)
    run = bank.resonate.register(saga).run
    with ThreadPoolExecutor(16) as pool:
        sums = [pool.submit(run, f"saga{number}", number) for number in range(64)]
        moved = [pool.submit(submit, bank, f"t{n}", "alice", "bob", 1) for n in range(64)]
    assert [each.result() for each in sums] == [2 * number for number in range(64)]
    assert {each.result()["status"] for each in moved} == {"committed"}


def test_the_store_in_memory_looks_only_through_what_can_still_change(bank, monkeypatch):
    looked = []
    store = main.mend()
    monkeypatch.setattr(main, "mend", lambda: store)
    other = main.start(bank.db)
    for number in range(50):
        submit(other, f"t{number}", "alice", "bob", 1)
        looked.append(len(store.promises.scan()) + len(store.tasks.scan()))
    assert max(looked) <= 2


def test_a_store_in_memory_sees_no_task_that_its_creator_will_claim(deaths):
    store = main.mend()
    sent = threading.Event()
    store.message_source("default", "me").enqueue = lambda message: sent.set()
    store.start()
    transition = store.tasks.transition

    def transition_and_look(*args, **options):
        done = transition(*args, **options)
        threading.Thread(target=store.notify).start()
        sent.wait(0.2)
        return done

    store.tasks.transition = transition_and_look
    tags = {"resonate:invoke": "default"}
    store.promises.create_with_task("p", 2**52, "me", 10**6, ikey="p", tags=tags)
    assert not sent.is_set()


# ---- Many at once --------------------------------------------------------------------------------


def test_thousands_at_once_are_all_told_the_same_truth(db, bank, cli):
    """They do the same, or another thing under the same id, or want what is left of the money."""
    banks = (bank, main.start(db))
    ways = [({}, 40), (LATE, 40), (LOST, 40), ({}, 70)]

    def ask(number):
        """The ways take turns: each is the first for a quarter of the ids, in each of the banks."""
        transfer, turn = divmod(number, 4)
        simulate, amount = ways[(turn + transfer) % 4]
        with suppress(OperationConflict):
            bank = banks[(turn + transfer // 4) % 2]
            return submit(bank, f"t{transfer}", "alice", "bob", amount, **simulate)

    with ThreadPoolExecutor(64) as pool:
        commands = [f"transfer t{number} alice bob 0.40" for number in range(0, 500, 199)]
        runs = pool.map(cli, commands)
        looks = [pool.submit(main.totals, db) for _ in range(99)]
        results = [result for result in pool.map(ask, range(2000)) if result]
    assert all(look.result()[3] for look in looks)
    asked = Counter((result["transfer_id"], result["amount"]) for result in results)
    assert len(asked) == 500 and all(
        n == {40: 3, 70: 1}[amount] for (_, amount), n in asked.items()
    )
    results += [json.loads(run.stdout) for run in runs if "already used" not in run.stderr]
    assert {result["status"] for result in results} == {"committed", "compensated", "rejected"}
    assert all(result == main.lookup(db, result["transfer_id"]) for result in results)
    assert check(db) == {}
