"""Every schedule of a transfer by three executors, on the real saga, steps and ledger: a step
lands, fails, lands and then fails, fails and lands late; an executor dies and starts from nothing;
one of them wants other terms under the same id; money arrives; another transfer wants the same
money. What the SDK does is modelled: it tells the saga of an error only if the step is run once.

What this does not contain, other tests do: `submit`, `recover` and promises (test_saga); another
process between the two inserts of `settle` (test_ledger); a result that a server has recorded, and
replays (test_server); more than these transfers at once, with threads and locks (test_saga); files,
and processes that are killed (test_commands)."""

import inspect
import re
import sqlite3
from collections import namedtuple
from contextlib import closing
from functools import cache
from types import SimpleNamespace

import pytest
from conftest import MAIN, adds_up, opened

import main

AMOUNTS = (10500, 10500, 400)  # what the executors A, B and C want to move from alice to bob


class Step(namedtuple("Step", "func args faults once", defaults=[(), False])):
    """What the saga yields."""

    def options(self, retry_policy):
        return self._replace(once=True)

    def __call__(self, db):
        ctx = SimpleNamespace(get_dependency={"db": db}.get)
        return self.func(ctx, *self.args, **dict(self.faults))

    def __str__(self):
        return f"{self.func.__name__} {self.args[0].op_id}"


State = namedtuple("State", "operations accounts")


def state_of(db):
    tables = (frozenset(db.execute(f"SELECT * FROM {table}")) for table in State._fields)
    return State(*tables)


@cache
def on(schema, state, work):
    """The state once this work is done on a ledger in this state, and its error and result."""
    with closing(sqlite3.connect(":memory:", autocommit=True)) as db:
        tables, triggers = schema.split("CREATE TRIGGER", 1)
        db.executescript(tables)
        db.executemany("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", state.operations)
        db.executemany("INSERT INTO accounts VALUES (?, ?)", state.accounts)
        db.executescript(f"CREATE TRIGGER {triggers}")
        try:
            answer = (None, work(db))
        except Exception as error:
            answer = (type(error), str(error))
        return state_of(db), answer


@cache
def truth(amount):
    """How the transfer of this amount has ended, by a ledger that adds up."""

    def ask(db):
        flying = adds_up(db)
        try:
            said = main.lookup(db, "t", "alice", "bob", amount)["status"]
        except main.OperationConflict:
            return "rejected"  # the id is another's
        assert ("t" in flying) == (said == "in flight")
        return said

    return ask


@cache
def hears(saga, amount, heard):
    """What the saga does when it has heard this: it yields a step, or it has a result."""
    ctx = SimpleNamespace(run=lambda func, *args, **faults: Step(func, args, (*faults.items(),)))
    run = saga(ctx, "t", "alice", "bob", amount)
    try:
        for error, value in ((None, None), *heard):
            step = run.throw(error(value)) if error else run.send(value)
        return step
    except StopIteration as end:
        return str(end.value)
    except Exception as error:
        return repr(error)


@cache
def alone(saga, schema, state, amount, heard):
    """How a run that has heard this ends if nothing disturbs it: its result, or what is wrong."""
    while isinstance(step := hears(saga, amount, heard), Step):
        state, answer = on(schema, state, step)
        if answer[0] and not step.once:
            return f"{step} is run again for ever: {answer[1]}"
        heard = (*heard, answer)
    _, (_, said) = on(schema, state, truth(amount))
    return step if step == said else f"{step}, but {said}"


def choices(saga, schema, before, executors, late):
    """What can happen, in words; then the state, what each executor has heard, what is late."""
    for step in late:
        yield f"{step} lands, late", (on(schema, before, step)[0], executors, late - {step})
    for number, heard in enumerate(executors):
        happens = [("dies, and starts from nothing", before, (), set())]
        if isinstance(step := hears(saga, AMOUNTS[number], heard), Step):
            after, answer = on(schema, before, step)
            told = (*heard, (TimeoutError, "")) if step.once else heard
            if step.once or not answer[0]:
                happens.append((f"{step}: {answer[1]}", after, (*heard, answer), set()))
            happens.append((f"{step} fails", before, told, set()))
            happens.append((f"{step} lands, but fails", after, told, set()))
            happens.append((f"{step} fails, and will land late", before, told, {step}))
        for words, state, hearing, more in happens:
            everybody = (*executors[:number], hearing, *executors[number + 1 :])
            yield f"{'ABC'[number]}: {words}", (state, everybody, late | more)


def search(saga=main.transfer_money, schema=main.SCHEMA):
    """How many states there are and, if one is wrong, the shortest story that ends in one."""
    gift = main.operations("gift", "bob", "alice", 500)
    rival, *_ = main.operations("rival", "alice", "bob", 9700)
    with closing(opened()) as db:
        main.settle(db, gift[0])
        late = frozenset(Step(main.apply_entry, (entry,)) for entry in (gift[1], rival))
        start = (state_of(db), ((), (), ()), late)
    queue, seen = [((), start)], {start}
    for story, (state, executors, late) in queue:
        runs = {(amount, ()) for amount in AMOUNTS} | set(zip(AMOUNTS, executors, strict=True))
        for amount, heard in runs:
            _, (error, problem) = on(schema, state, truth(amount))
            end = problem if error else alone(saga, schema, state, amount, heard)
            if end not in ("committed", "compensated", "rejected"):
                return len(seen), [*story, end]
        for words, after in choices(saga, schema, state, executors, late):
            if after not in seen:
                seen.add(after)
                queue.append(((*story, words), after))
    return len(seen), []


def test_no_schedule_loses_creates_or_strands_money(record_property):
    states, story = search()
    assert not story, "\n  ".join(["this schedule breaks the saga:", *story])
    record_property("states of a transfer searched: 0 lose, create or strand money", states)
    assert f"| {states:,} |" in MAIN.with_name("README.md").read_text()


GIVE_UP = "yield ctx.run(give_up, credit, str(error))"
AGAIN = 'apply_entry, credit._replace(op_id="again-credit", transfer_id="again")'
FAULTY = {  # name: what stands in the place of GIVE_UP, and a step of the story that convicts it
    "without the void": ("False", "credit_target t-credit fails"),
    "reverses on any error": (f"({GIVE_UP}) and False", "credit_target t-credit lands, but fails"),
    "retries under another id": (GIVE_UP.replace("give_up, credit, str(error)", AGAIN), "again-"),
}
GUARD = r" SELECT RAISE\(ABORT, 'the credit is not a void'\)[^;]*;"  # of the ledger
UNGUARDED = re.sub(GUARD, "", main.SCHEMA)


def faulty(name):
    source, names = inspect.getsource(main.transfer_money), dict(vars(main))
    exec(source.replace(GIVE_UP, FAULTY[name][0]), names)
    return names["transfer_money"]


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_saga_is_convicted_by_a_story_and_refused_by_the_ledger(name):
    _, story = search(faulty(name))
    assert FAULTY[name][1] in "\n".join(story)
    assert "the credit is not a void" in story[-1] or "no such debit" in story[-1]


def test_without_the_guard_of_the_ledger_only_the_void_holds_the_money():
    assert search(schema=UNGUARDED)[1] == []
    for name in ("without the void", "reverses on any error"):
        _, story = search(faulty(name), UNGUARDED)
        assert "a transfer pays out more than it took" in story[-1]


@pytest.mark.parametrize("settled", ["entry", "void"])
def test_a_ledger_that_pays_a_settled_credit_is_convicted_in_four_steps(
    settled, monkeypatch, request
):
    settle = main.settle

    def pay_again(db, operation, void=None):
        query = "SELECT iif(void IS NULL, 'entry', 'void') FROM operations WHERE op_id = ?"
        if (settled,) in db.execute(query, operation[:1]) and operation.kind == "credit":
            pay = "UPDATE accounts SET balance = balance + ? WHERE account = ?"
            db.execute(pay, (operation.amount, operation.account))
        return settle(db, operation, void)

    monkeypatch.setattr(main, "settle", pay_again)
    for forget in (on.cache_clear, alone.cache_clear):
        forget()
        request.addfinalizer(forget)
    _, story = search()
    assert "a balance is not the sum of its entries" in story[-1] and len(story) <= 5
