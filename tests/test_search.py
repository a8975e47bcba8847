"""Every schedule of a transfer by three executors, on the real saga, steps and ledger: a step
lands, fails, lands and then fails, fails and lands late; an executor dies and starts from nothing;
money arrives. What the SDK does is modelled: it tells the saga of a failure, or runs the step
again, as the options of the step say."""

import inspect
import re
import sqlite3
from collections import namedtuple
from contextlib import closing
from functools import cache
from types import SimpleNamespace

import pytest
from conftest import MAIN, adds_up, opened, operation

import main


class Step(namedtuple("Step", "func args faults final", defaults=[(), ()])):
    """What the saga yields. `final` are the errors that end it; all do, if it is None."""

    def options(self, retry_policy=None, non_retryable_exceptions=()):
        return self._replace(final=None if retry_policy else non_retryable_exceptions)

    def tells(self, error):
        return error is None or self.final is None or error in self.final

    def __call__(self, db):
        ctx = SimpleNamespace(get_dependency={"db": db}.get)
        return self.func(ctx, *self.args, **dict(self.faults))

    def __str__(self):
        return f"{self.func.__name__} {self.args[0].op_id}"


@cache
def on(schema, rows, work):
    """The rows once this work is done on a ledger that holds `rows`, and its error and result."""
    kinds = ("opening", "debit", "credit", "reversal")
    with closing(sqlite3.connect(":memory:", autocommit=True)) as db:
        db.executescript(schema)
        for row in sorted(rows, key=lambda row: (row[1] == "t", kinds.index(row[2]))):
            db.execute("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        try:
            answer = (None, work(db))
        except Exception as error:
            answer = (type(error), str(error))
        return frozenset(db.execute("SELECT * FROM operations")), answer


def status_if_it_adds_up(db):
    flying, said = adds_up(db), main.lookup(db, "t")["status"]
    assert ("t" in flying) == (said == "in flight")
    return said


@cache
def hears(saga, heard):
    """What the saga does when it has heard this: it yields a step, or it has a result."""
    ctx = SimpleNamespace(run=lambda func, *args, **faults: Step(func, args, (*faults.items(),)))
    run = saga(ctx, "t", "alice", "bob", 10500)
    try:
        for error, value in ((None, None), *heard):
            step = run.throw(error(value)) if error else run.send(value)
        return step
    except StopIteration as end:
        return str(end.value)
    except Exception as error:
        return repr(error)


@cache
def alone(saga, schema, rows):
    """How one undisturbed run ends: its result, or what is wrong then."""
    heard = ()
    while isinstance(step := hears(saga, heard), Step):
        rows, answer = on(schema, rows, step)
        if not step.tells(answer[0]):
            return f"{step} is run again for ever"
        heard = (*heard, answer)
    _, (_, said) = on(schema, rows, status_if_it_adds_up)
    return step if step == said else f"{step}, but {said}"


def choices(saga, schema, before, executors, late):
    """What can happen, in words; then the rows, what each executor has heard, what is late."""
    for step in late:
        yield f"{step} lands, late", (on(schema, before, step)[0], executors, late - {step})
    for number, heard in enumerate(executors):
        happens = [("dies, and starts from nothing", before, (), set())]
        if isinstance(step := hears(saga, heard), Step):
            after, answer = on(schema, before, step)
            told = (*heard, (TimeoutError, "")) if step.tells(TimeoutError) else heard
            if step.tells(answer[0]):
                happens.append((f"{step}: {answer[1] or 'done'}", after, (*heard, answer), set()))
            happens.append((f"{step} fails", before, told, set()))
            happens.append((f"{step} lands, but fails", after, told, set()))
            happens.append((f"{step} fails, and will land late", before, told, {step}))
        for words, rows, hearing, more in happens:
            everybody = (*executors[:number], hearing, *executors[number + 1 :])
            yield f"{'ABC'[number]}: {words}", (rows, everybody, late | more)


def search(saga=main.transfer_money, schema=main.SCHEMA):
    """How many states there are and, if one is wrong, the shortest story that ends in one."""
    gift = Step(main.apply_entry, (operation("gift-credit", account="alice", counterparty="bob"),))
    with closing(opened()) as db:
        main.settle(db, operation("gift-debit", account="bob", counterparty="alice"))
        start = (frozenset(db.execute("SELECT * FROM operations")), ((), (), ()), frozenset([gift]))
    queue, seen = [((), start)], {start}
    for story, (rows, executors, late) in queue:
        _, (error, problem) = on(schema, rows, status_if_it_adds_up)
        heard = [hears(saga, heard) for heard in executors]
        ends = {alone(saga, schema, rows), *(end for end in heard if isinstance(end, str))}
        if error or ends not in ({"committed"}, {"compensated"}, {"rejected"}):
            return len(seen), [*story, problem if error else f"ends as {ends}"]
        for words, after in choices(saga, schema, rows, executors, late):
            if after not in seen:
                seen.add(after)
                queue.append(((*story, words), after))
    return len(seen), []


def test_no_schedule_loses_creates_or_strands_money(record_property):
    states, story = search()
    assert not story, "\n  ".join(["this schedule breaks the saga:", *story])
    record_property("states of a transfer searched: 0 lose, create or strand money", states)
    assert f"| {states:,} |" in MAIN.with_name("README.md").read_text()


GIVE_UP = "yield ctx.run(give_up, credit, str(error)).options(non_retryable_exceptions=FINAL)"
AGAIN = 'apply_entry, credit._replace(op_id="again-credit", transfer_id="again")'
FAULTY = {  # name: what stands in the place of GIVE_UP, and a step of the story that convicts it
    "without the void": ("str(error)", "credit_target t-credit fails"),
    "reverses on any error": (f"({GIVE_UP}) or 'error'", "credit_target t-credit lands, but fails"),
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
