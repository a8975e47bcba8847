"""Every schedule of a transfer, tried on the real saga, the real steps and a real ledger.

Three executors run the same transfer. In each state every choice that the world has is taken: a
step lands, fails, lands and then fails, is reported as failed and lands late; an executor dies and
starts from nothing; money arrives. What the SDK would do is modelled: it tells the saga of a
failure, or runs the step again, as the options of the step say.
"""

import inspect
import re
import sqlite3
from collections import deque
from contextlib import closing
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from conftest import MAIN, adds_up
from resonate.retry_policies import Never

import main
from main import Operation, apply_entry, credit_target


class Step(NamedTuple):
    """What the saga yields. `final` are the errors that end it; all do, if it is None."""

    func: Any
    args: tuple[Any, ...]
    faults: tuple[tuple[str, bool], ...] = ()
    final: tuple[type[Exception], ...] | None = ()

    def options(self, retry_policy=None, non_retryable_exceptions=()):
        return self._replace(final=None if retry_policy else non_retryable_exceptions)

    def tells(self, error):
        return error is None or self.final is None or error in self.final

    def __str__(self):
        return f"{self.func.__name__} {self.args[0].op_id}"


def yields(func, *args, **faults):
    return Step(func, args, tuple(faults.items()))


class World(NamedTuple):
    saga: Any = main.transfer_money
    schema: str = main.SCHEMA
    gift: bool = False  # alice cannot pay before a gift has landed


class State(NamedTuple):
    """The rows of the ledger, what each executor has heard, and the steps that will land late."""

    rows: frozenset[tuple]
    heard: tuple[tuple, ...] = ((), (), ())
    late: frozenset[Step] = frozenset()


@cache
def on(schema, rows, work):
    """The rows once this work is done on a ledger that holds `rows`, and its result or error."""
    kinds = ("opening", "debit", "credit", "reversal")
    with closing(sqlite3.connect(":memory:", autocommit=True)) as db:
        db.executescript(schema)
        for row in sorted(rows, key=lambda row: (row[1] == "t", kinds.index(row[2]))):
            db.execute("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        try:
            if isinstance(work, Step):
                ctx = SimpleNamespace(get_dependency={"db": db}.get)
                answer = (None, work.func(ctx, *work.args, **dict(work.faults)))
            else:
                answer = (None, work(db))
        except Exception as error:
            answer = (type(error), str(error))
        return frozenset(db.execute("SELECT * FROM operations")), answer


@cache
def hears(saga, heard):
    """What the saga does when it has heard this: it yields a step, or it has a result."""
    run = saga(SimpleNamespace(run=yields), "t", "alice", "bob", 3000)
    try:
        step = next(run)
        for error, value in heard:
            step = run.throw(error(value)) if error else run.send(value)
        return step
    except StopIteration as end:
        return str(end.value)
    except Exception as error:
        return repr(error)


def choices(world, state):
    """Everything that can happen next, and the state after it."""
    for step in state.late:
        rows, _ = on(world.schema, state.rows, step)
        yield f"{step} lands, late", state._replace(rows=rows, late=state.late - {step})
    for number, heard in enumerate(state.heard):

        def after(heard, rows=state.rows, late=(), number=number):
            everybody = (*state.heard[:number], heard, *state.heard[number + 1 :])
            return State(rows, everybody, state.late.union(late))

        yield f"{'ABC'[number]} dies, and starts from nothing", after(())
        step = hears(world.saga, heard)
        if isinstance(step, str):
            continue
        rows, answer = on(world.schema, state.rows, step)
        words = f"{'ABC'[number]}: {step}"
        if step.tells(answer[0]):
            yield f"{words}: {answer[1] or 'done'}", after((*heard, answer), rows)
        told = (*heard, (TimeoutError, "no answer")) if step.tells(TimeoutError) else heard
        yield f"{words} fails", after(told)
        yield f"{words} lands, but fails", after(told, rows)
        yield f"{words} fails, and will land late", after(told, late=[step])


@cache
def alone(world, rows):
    """How one undisturbed run ends: its result, or what is wrong then with the money."""
    heard = ()
    while not isinstance(step := hears(world.saga, heard), str):
        rows, answer = on(world.schema, rows, step)
        if not step.tells(answer[0]):
            return f"{step} is run again for ever"
        heard = (*heard, answer)
    _, (error, flying) = on(world.schema, rows, adds_up)
    if error:
        return flying
    status = on(world.schema, rows, lambda db: main.lookup(db, "t")["status"])[1][1]
    return step if "t" not in flying and step == status else f"{step}, but {status}"


def search(world):
    """How many states there are and, if one is wrong, the shortest story that ends in one."""
    gift = Operation("gift-credit", "gift", "credit", "alice", 3000, "bank")

    def prepare(db):
        for account, cents in (("alice", 100 if world.gift else 3000), ("bob", 0), ("bank", 3000)):
            main.open_account(db, account, cents)
        main.settle(db, Operation("gift-debit", "gift", "debit", "bank", -3000, "alice"))

    rows, _ = on(world.schema, frozenset(), prepare)
    late = frozenset([Step(apply_entry, (gift,))] if world.gift else [])
    stories = {State(rows, late=late): ()}
    queue = deque(stories)
    while queue:
        state = queue.popleft()
        _, (error, problem) = on(world.schema, state.rows, adds_up)
        results = {hears(world.saga, heard) for heard in state.heard}
        results = {result for result in results if isinstance(result, str)}
        results.add(alone(world, state.rows))
        if error or len(results) > 1 or not results <= {"committed", "compensated", "rejected"}:
            return len(stories), [*stories[state], problem if error else f"ends as {results}"]
        for words, after in choices(world, state):
            if after not in stories:
                stories[after] = (*stories[state], words)
                queue.append(after)
    return len(stories), []


@pytest.mark.parametrize("gift", [False, True], ids=["can pay", "can pay later"])
def test_no_schedule_loses_creates_or_strands_money(gift, record_property):
    states, story = search(World(gift=gift))
    if story:
        pytest.fail("\n  ".join(["This schedule breaks the saga:", *story]), pytrace=False)
    record_property("states of a transfer searched: 0 lose, create or strand money", states)
    assert f"{states:,}" in MAIN.with_name("README.md").read_text()


def again(ctx, credit):
    """What looks like a retry, and is a second credit, because its op id is another."""
    credit = credit._replace(op_id="again-credit", transfer_id="again")
    return ctx.run(credit_target, credit, fail=False, lose_answer=False).options(Never())


GIVE_UP = "yield ctx.run(give_up, credit, str(error)).options(non_retryable_exceptions=FINAL)"
# name: (what stands in the place of GIVE_UP, a step of the story that convicts it)
FAULTY = {
    "without the void": ("str(error)", "credit_target t-credit fails"),
    "reverses on any error": (f"({GIVE_UP}) or 'error'", "credit_target t-credit lands, but fails"),
    "retries under another id": ("yield again(ctx, credit)", "credit_target again-credit"),
}


def faulty(name):
    """The saga of main.py with this fault in it."""
    source = inspect.getsource(main.transfer_money)
    assert GIVE_UP in source
    names = vars(main) | {"again": again}
    exec(source.replace(GIVE_UP, FAULTY[name][0]), names)
    return names["transfer_money"]


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_saga_is_convicted_by_a_story_and_yet_creates_no_money(name):
    _, story = search(World(faulty(name)))
    assert FAULTY[name][1] in "\n".join(story)
    assert "the credit is not a void" in story[-1] or "no such debit" in story[-1]


GUARD = r"  SELECT RAISE\(ABORT, 'the credit is not a void'\)[^;]*;\n"
UNGUARDED = re.sub(GUARD, "", main.SCHEMA)


@pytest.mark.parametrize("name", list(FAULTY)[:2])
def test_without_the_guard_of_the_ledger_a_saga_without_the_void_creates_money(name):
    _, story = search(World(faulty(name), UNGUARDED))
    assert "a transfer pays out more than it took" in story[-1]


def test_without_the_guard_of_the_ledger_the_void_still_holds_the_money():
    assert search(World(schema=UNGUARDED))[1] == []
