"""Every schedule of a transfer, tried on the real saga, the real steps and a real ledger.

Three executors run the same transfer: two at once, and one that was started again from nothing. In
each state every choice that the world has is taken: a step lands, fails, lands and then fails,
lands later than anybody expects, is refused, is run again. What the SDK would do is modelled: it
runs a step again, or tells the saga, as the step's options say.

Nothing is lost by what is left out. The executors are alike, so only how many are where counts, and
not which. A dead executor is one that is never chosen again. What a step does to a ledger, and what
a saga does with what it has heard, is computed once by the real code, and then remembered.
"""

import sqlite3
from collections import deque
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, NamedTuple

import pytest
from conftest import check
from resonate.retry_policies import Exponential, Never

import main
from main import Operation, apply_entry, credit_target, give_up

CENTS = 3000
EXECUTORS = "ABC"


class Step(NamedTuple):
    """What the saga yields: a function to run on an operation, and when to run it again."""

    func: Callable[..., Any]
    operation: Operation
    why: str | None = None
    retried: bool = True
    for_ever: bool = True
    final: tuple[type[Exception], ...] = ()

    def options(self, retry_policy=None, non_retryable_exceptions=()):
        policy = retry_policy or Exponential()
        return self._replace(
            retried=policy.next(1) is not None,
            for_ever=policy.next(1000) is not None,
            final=non_retryable_exceptions,
        )

    def may_run_again(self, error):
        return self.retried and error not in self.final

    def may_be_told(self, error):
        """Whether the failure can reach the saga: not if the SDK retries for ever."""
        return not (self.for_ever and self.may_run_again(error))

    def __str__(self):
        return self.operation.op_id if self.why is None else f"gives up on {self.operation.op_id}"


class Context:
    """As much of the SDK's context as the saga and its steps see."""

    def __init__(self, db=None):
        self.db = db

    def run(self, func, operation, why=None, **_simulate):
        return Step(func, operation, None if why is None else str(why))

    def get_dependency(self, _name):
        return self.db


class World(NamedTuple):
    """What is searched. `change` makes of each step what another saga would do."""

    change: Callable[[Step], Step] = lambda step: step
    poor: bool = False
    target: str = "bob"
    schema: str = main.SCHEMA


class Heard(NamedTuple):
    """What an executor has heard of a step: an exception and its text, or a value."""

    error: type[Exception] | None
    value: str | None


class Ledger:
    """What a ledger holds. There is one object for each content, so that they compare fast."""

    def __init__(self, schema, rows):
        self.schema, self.rows = schema, rows

    def open(self):
        db = sqlite3.connect(":memory:", autocommit=True)
        db.executescript(self.schema)
        db.executemany("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)", self.rows)
        return db

    @cached_property
    def problem(self):
        """What is wrong with the money, if anything is."""
        db = self.open()
        try:
            check(db)
        except AssertionError as error:
            return str(error).splitlines()[0]
        finally:
            db.close()
        return None


LEDGERS = {}


def ledger_in(db, schema):
    rows = db.execute("SELECT * FROM operations ORDER BY rowid").fetchall()
    db.close()
    return LEDGERS.setdefault((schema, frozenset(rows)), Ledger(schema, rows))


class History:
    """What an executor has heard, and what it does next. `tell` has one for each content, too."""

    def __init__(self, world, heard=()):
        self.world, self.heard = world, heard
        self.step = None
        self.result = None
        saga = main.transfer_money(Context(), "t", "alice", world.target, CENTS)
        try:
            step = next(saga)
            for error, value in heard:
                step = saga.throw(error(value)) if error else saga.send(value)
            self.step = world.change(step)
        except StopIteration as end:
            shown = {key: end.value[key] for key in ("status", "error") if key in end.value}
            self.result = str(shown)
        except Exception as error:
            self.result = repr(error)


ENDED = {}


@cache
def tell(history, heard):
    after = History(history.world, (*history.heard, heard))
    return ENDED.setdefault((after.world, after.result), after) if after.result else after


class State(NamedTuple):
    ledger: Ledger
    executors: tuple[History, ...]
    late: frozenset[Step]  # steps that were reported as failed, and that will still land

    @property
    def key(self):
        """Equal for states in which only the names of the executors differ."""
        return self.ledger, tuple(sorted(map(id, self.executors))), self.late


class Move(NamedTuple):
    """What can happen to one executor, and what that changes."""

    words: str
    ledger: Ledger
    history: History
    late: frozenset[Step] = frozenset()


def beginning(world):
    """Alice can pay or, in a poor world, can pay when a gift has landed."""
    db = Ledger(world.schema, []).open()
    alice = 100 if world.poor else 3100
    for account, opening in (("alice", alice), ("bob", 0), ("bank", CENTS)):
        main.open_account(db, account, opening)
    main.settle(db, Operation("gift-debit", "gift", "debit", "bank", -CENTS, "alice"))
    gift = Step(apply_entry, Operation("gift-credit", "gift", "credit", "alice", CENTS, "bank"))
    late = frozenset([gift] if world.poor else [])
    return State(ledger_in(db, world.schema), (History(world),) * len(EXECUTORS), late)


@cache
def lands(ledger, step, **simulate):
    """The ledger once a step has run on it, and what the step has answered."""
    db = ledger.open()
    why = () if step.why is None else (Exception(step.why),)
    try:
        heard = Heard(None, step.func(Context(db), step.operation, *why, **simulate))
    except Exception as error:
        heard = Heard(type(error), str(error))
    return ledger_in(db, ledger.schema), heard


@cache
def moves(ledger, history):
    """Everything that can happen next to one executor."""
    step = history.step
    after, heard = lands(ledger, step)
    late = frozenset([step])
    found = []
    if heard.error is None or step.may_be_told(heard.error):
        said = f" ({heard.value})" if heard.value else ""
        found.append(Move(f"{step}{said}", after, tell(history, heard)))
    if step.may_run_again(TimeoutError):
        found += [
            Move(f"{step} lands, but fails, and is run again", after, history),
            Move(f"{step} will land late, and is run again", ledger, history, late),
        ]
    if step.may_be_told(TimeoutError):
        told = tell(history, Heard(TimeoutError, "no answer"))
        found += [
            Move(f"{step} fails", ledger, told),
            Move(f"{step} lands, but fails", after, told),
            Move(f"{step} fails, and will land late", ledger, told, late),
        ]
    if step.func is credit_target:
        refused, no = lands(ledger, step, fail=True)
        landed, lost = lands(ledger, step, lose_answer=True)
        found += [
            Move(f"{step} is refused", refused, tell(history, no)),
            Move(f"{step} lands, and its answer is lost", landed, tell(history, lost)),
        ]
    return found


def choices(state):
    """Everything that can happen next, and the state after it."""
    ledger, executors, late = state
    for step in late:
        after, _ = lands(ledger, step)
        yield f"{step} lands, late", State(after, executors, late - {step})
    for place, history in enumerate(executors):
        if history.step is None or history in executors[:place]:
            continue  # it has ended; or what it can do, one before it can do
        for move in moves(ledger, history):
            after_it = (*executors[:place], move.history, *executors[place + 1 :])
            words = f"{EXECUTORS[place]}: {move.words}"
            yield words, State(move.ledger, after_it, late | move.late)


@cache
def alone(ledger, history):
    """How a run ends if it is left alone: its result, or what is wrong."""
    for _ in range(20):
        if history.result is not None:
            unpaid = sum(row[4] for row in ledger.rows if row[1] == "t" and row[6] is None)
            return "money stays in flight" if unpaid else history.result
        ledger, heard = lands(ledger, history.step)
        if heard.error is None or history.step.may_be_told(heard.error):
            history = tell(history, heard)
    return "a step is run again for ever"


def wrong(state, from_nothing):
    """What is wrong with a state, if anything is."""
    result = alone(state.ledger, from_nothing)
    if not result.startswith("{"):
        return result
    for history in state.executors:
        if history.result not in (None, result):
            return f"one run returns {history.result}, the next {result}"
    return None


def search(world, only_money=False):
    """How many states there are and, if one is wrong, the shortest story that ends in one."""
    start = beginning(world)
    seen = {start.key}
    queue = deque([(start, ())])
    while queue:
        state, story = queue.popleft()
        problem = state.ledger.problem
        if not only_money:
            problem = problem or wrong(state, start.executors[0])
        if problem:
            return len(seen), [*story, f"=> {problem}"]
        for words, after in choices(state):
            key = after.key
            if key not in seen:
                seen.add(key)
                queue.append((after, (*story, words)))
    return len(seen), []


WORLDS = {
    "a source that can pay": World(),
    "a source that gets its money meanwhile": World(poor=True),
    "a target that does not exist": World(target="nobody"),
}


@cache
def searched(world):
    return search(WORLDS[world])


@pytest.mark.xdist_group("search")
@pytest.mark.parametrize("world", WORLDS)
def test_no_schedule_loses_creates_or_strands_money(world, record_property):
    states, story = searched(world)
    if story:
        pytest.fail("\n  ".join(["This schedule breaks the saga:", *story]), pytrace=False)
    assert states > 1000, "so few states that the search cannot have tried what it says"
    record_property("states of a transfer searched: 0 lose, create or strand money", states)


def no_void(_ctx, _operation, _why):
    return "given up"


def void_ignored(ctx, operation, why):
    give_up(ctx, operation, why)
    return str(why)


def own_reason(ctx, operation, why):
    return None if give_up(ctx, operation, why) is None else str(why)


def reversal_first(ctx, credit, why):
    _, transfer_id, _, target, amount, source = credit
    back = Operation(f"{transfer_id}-reversal", transfer_id, "reversal", source, amount, target)
    apply_entry(ctx, back)
    return give_up(ctx, credit, why)


def gives_up(kind, instead):
    """The saga with this function in the place of `give_up`, for one kind of operation."""

    def change(step):
        if step.func is give_up and step.operation.kind == kind:
            return step._replace(func=instead)
        return step

    return change


def never_reverses_again(step):
    return step.options(retry_policy=Never()) if step.operation.kind == "reversal" else step


# name: (what it does, a step that its story must contain, a word of the verdict)
FAULTY = {
    "reversal on any exception": (gives_up("credit", no_void), "t-credit lands", "Rejected"),
    "reversal before the void": (gives_up("credit", reversal_first), "t-credit lands", "Rejected"),
    "void ignored": (gives_up("credit", void_ignored), "t-credit lands", "Rejected"),
    "refused debit believed": (gives_up("debit", no_void), "gift-credit lands", "rejected"),
    "reversal given up": (never_reverses_again, "t-reversal fails", "TimeoutError"),
    "error of the exception": (gives_up("credit", own_reason), "t-reversal", "compensated"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_the_usual_sagas_are_convicted_by_a_short_story(name, record_property):
    """And all the same they create no money: the guards of the ledger hold."""
    change, step, word = FAULTY[name]
    world = World(change, poor=name == "refused debit believed")
    _, story = search(world)
    assert word in story[-1]
    assert step in "\n".join(story)
    assert len(story) <= 8
    assert search(world, only_money=True)[1] == []
    record_property("usual sagas convicted, each by a story of at most 7 steps", 1)


def test_without_the_guard_of_the_ledger_usual_sagas_create_money_and_this_one_does_not():
    """The rule and the guard each hold the money alone."""
    begin = main.SCHEMA.index("  SELECT RAISE(ABORT, 'a transfer pays out")
    guard = main.SCHEMA[begin : main.SCHEMA.index("END;", begin)]
    unguarded = World(schema=main.SCHEMA.replace(guard, ""))
    assert search(unguarded, only_money=True)[1] == []
    for name in list(FAULTY)[:3]:
        _, story = search(unguarded._replace(change=FAULTY[name][0]), only_money=True)
        assert story[-1] == "=> a transfer paid out more than it took"
