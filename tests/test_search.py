"""Every reachable state of a transfer, and proof that the search can fail.

The real workflow and steps on a real ledger, without the SDK: three executors of one transfer (two at once, and one for
the restart from nothing), and in each state every choice that the world has. States are visited once, breadth first: so
the search ends by itself, and a conviction is as short as can be.
"""

import re
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import pytest
from conftest import check
from resonate.retry_policies import Exponential, Never

import main
from main import UNTIL_ANSWERED, apply_entry, credit_target, give_up

FAULT = TimeoutError("no answer")
REFUSAL = main.TransferRejected("the target refused")


class Step:
    """What a workflow yields: a step to run, and what its options say of retries."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.opts = func, {}
        # An exception among the arguments (why one gives up) counts by its text, so that equal steps are equal.
        self.args = tuple(str(arg) if isinstance(arg, Exception) else arg for arg in args)
        self.key = (func, self.args, tuple(sorted(kwargs.items())))
        op_id = next(arg for arg in self.args if arg.startswith("t-"))
        self.name = f"gives up on {op_id}" if func is give_up else op_id

    def options(self, **opts: Any) -> "Step":
        self.opts = opts
        return self

    def retried(self, error: Exception) -> bool:
        """As the SDK has it: for ever, but for Never() and for these exact types."""
        policy = self.opts.get("retry_policy", Exponential())
        return not isinstance(policy, Never) and type(error) not in self.opts.get("non_retryable_exceptions", ())


class Context:
    """As much of the SDK's context as the workflow and its steps see."""

    def __init__(self, db: sqlite3.Connection | None = None) -> None:
        self.db = db

    def run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Step:
        return Step(func, args, kwargs)

    def get_dependency(self, _name: str) -> Any:
        return self.db


type Ledger = frozenset[tuple[Any, ...]]  # its rows
type History = tuple[tuple[Any, str], ...]  # what an executor has heard: (exception type or None, text or value)


class State(NamedTuple):
    ledger: Ledger
    executors: tuple[History | None, ...]  # None is gone: dead, or done
    late: frozenset[Any]  # steps that were reported as failed, and whose writes are still to land
    reported: frozenset[str]  # how the transfer ended, according to those who are done


class World:
    """A saga and a ledger, and everything that can happen to the two."""

    def __init__(
        self, saga: Callable[..., Any], poor: bool = False, target: str = "bob", schema: str = main.SCHEMA
    ) -> None:
        self.saga, self.target, self.schema, self.poor = saga, target, schema, poor
        self.rank: dict[History | None, int] = {}
        with_rows = self.open([])
        for account, cents in (("alice", 100 if poor else 3100), ("bob", 0), ("bank", 3000)):
            main.open_account(with_rows, account, cents)
        apply_entry(Context(with_rows), "fund-debit", "bank", -3000, "debit", counterparty="alice")
        self.start = self.rows(with_rows)
        self.write, self.goes_on, self.ends, self.money = map(
            cache, (self._write, self._goes_on, self._ends, self._money)
        )

    def open(self, ledger: Iterable[tuple[Any, ...]]) -> sqlite3.Connection:
        """A real ledger with these rows, put in again in an order that its guards accept."""
        db = sqlite3.connect(":memory:", autocommit=True)
        db.executescript(self.schema)
        kinds = ["opening", "debit", "void", "credit", "reversal"]
        rows = sorted(ledger, key=lambda row: (row[5] != "opening", not row[0].startswith("fund"), kinds.index(row[5])))
        db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        return db

    def rows(self, db: sqlite3.Connection) -> Ledger:
        rows = frozenset(db.execute("SELECT * FROM entries"))
        db.close()
        return rows

    # What follows from what: pure functions, each computed once, by the real code.

    def _write(self, ledger: Ledger, key: Any) -> tuple[Ledger, tuple[Any, str]]:
        """The ledger once a step has run on it, and what the step answered."""
        func, args, kwargs = key
        db = self.open(ledger)
        try:
            heard = (None, func(Context(db), *args, **dict(kwargs)))
        except Exception as error:
            heard = (type(error), str(error))
        return self.rows(db), heard

    def _goes_on(self, history: History) -> Step | str:
        """The step that an executor with this history runs next, or how its workflow ended."""
        workflow = self.saga(Context(), "t", "alice", self.target, 3000)
        try:
            step = next(workflow)
            for error, text in history:
                step = workflow.throw(error(text)) if error else workflow.send(text)
        except StopIteration as end:
            return repr(end.value)
        except Exception as error:
            return repr(error)
        assert isinstance(step, Step)
        return step

    def _ends(self, ledger: Ledger) -> tuple[str, Ledger]:
        """How a run from here ends if it is left alone, and the ledger that it leaves."""
        history: History = ()
        for _ in range(20):
            step = self.goes_on(history)
            if isinstance(step, str):
                return step, ledger
            ledger, (error, text) = self.write(ledger, step.key)
            if not (error and step.retried(error(text))):
                history += ((error, text),)
        return "a step that is retried for ever", ledger

    def _money(self, ledger: Ledger) -> str | None:
        """What is wrong with the money, if anything is."""
        entries = [(op_id, account, amount) for op_id, _, account, _, amount, *_ in ledger]
        net = sum(amount for op_id, _, amount in entries if op_id.startswith("t-"))
        if net > 0:
            return f"{net} cents were made"
        for account in {account for _, account, _ in entries}:
            if sum(amount for _, name, amount in entries if name == account) < 0:
                return f"{account} is below zero"
        db = self.open(ledger)
        if self.schema == main.SCHEMA:
            check(db)
        db.close()
        return None

    # The search.

    def choices(self, state: State) -> Iterable[tuple[str, State]]:
        """Everything that can happen next, in words, and the state after it."""
        fund = (apply_entry, ("fund-credit", "alice", 3000, "credit"), (("counterparty", "bank"),))
        if self.poor:
            yield "alice is funded", state._replace(ledger=self.write(state.ledger, fund)[0])
        for key in state.late:
            after, _ = self.write(state.ledger, key)
            name = next(arg for arg in key[1] if arg.startswith("t-"))
            yield f"{name} lands, late", state._replace(ledger=after, late=state.late - {key})
        for number, history in enumerate(state.executors):
            if history is not None:
                yield from self.choices_of(state, number, history)

    def choices_of(self, state: State, number: int, history: History) -> Iterable[tuple[str, State]]:
        """Everything that can happen next to one executor."""
        step, name = self.goes_on(history), "ABC"[number]
        assert isinstance(step, Step)

        def hears(error: Any, text: Any, **more: Any) -> State:
            known: History | None = (*history, (error, text))
            reported = state.reported
            if isinstance(end := self.goes_on(known), str):
                known, reported = None, reported | {end}
            return state._replace(executors=self.put(state, number, known), reported=reported, **more)

        yield f"{name} dies", state._replace(executors=self.put(state, number, None))
        after, (error, text) = self.write(state.ledger, step.key)
        if error is None or not step.retried(error(text)):
            yield f"{name}: {step.name}{f' ({text})' if text else ''}", hears(error, text, ledger=after)
        late = state.late | {step.key}
        if step.retried(FAULT):  # the SDK asks again, and the executor is none the wiser
            yield f"{name}: {step.name} lands, fails, is retried", state._replace(ledger=after)
            yield f"{name}: {step.name} is late, is retried", state._replace(late=late)
        else:
            fault = (type(FAULT), str(FAULT))
            yield f"{name}: {step.name} fails", hears(*fault)
            yield f"{name}: {step.name} lands, then fails", hears(*fault, ledger=after)
            yield f"{name}: {step.name} fails, and is yet to land", hears(*fault, late=late)
        if step.func is credit_target:
            yield f"{name}: {step.name} is refused", hears(type(REFUSAL), str(REFUSAL))

    def put(self, state: State, number: int, history: History | None) -> tuple[History | None, ...]:
        """The executors, one of them changed. They are all alike, so their order is no part of the state."""
        executors = (*state.executors[:number], history, *state.executors[number + 1 :])
        return tuple(sorted(executors, key=lambda one: self.rank.setdefault(one, -len(self.rank))))

    def wrong(self, state: State) -> str | None:
        """What is wrong with a state, if anything is."""
        if money := self.money(state.ledger):
            return money
        end, after = self.ends(state.ledger)
        if any(report != end for report in state.reported):
            return f"one reports {' and '.join(sorted(state.reported))}, the next {end}"
        if not end.startswith("{"):
            return f"a run ends in {end}"
        if sum(row[4] for row in after if row[0].startswith("t-")):
            return "money stays in flight"
        return None

    def search(self, wrong: Callable[[State], str | None] | None = None) -> tuple[int, str | None, list[str]]:
        """How many states there are; what is wrong with the nearest bad one, and the schedule that leads to it."""
        first = State(self.start, ((), (), ()), frozenset(), frozenset())
        came: dict[State, tuple[State, str] | None] = {first: None}
        queue = deque([first])
        while queue:
            state = queue.popleft()
            if problem := (wrong or self.wrong)(state):
                schedule = []
                while before := came[state]:
                    state, choice = before
                    schedule.append(choice)
                return len(came), problem, schedule[::-1]
            for choice, after in self.choices(state):
                if after not in came:
                    came[after] = state, choice
                    queue.append(after)
        return len(came), None, []


# Said in the README, too: a source that can pay, one too poor at first and funded midway, a target that does not exist.
STATES = (19234, 166964, 49320)


@pytest.mark.parametrize(
    ("world", "states"), list(zip(({}, {"poor": True}, {"target": "nobody"}), STATES, strict=True))
)
def test_no_schedule_loses_makes_or_strands_money(world: dict[str, Any], states: int) -> None:
    assert World(main.transfer_money, **world).search() == (states, None, [])


def saga(
    *,
    debit_void: bool = True,
    reversal_first: bool = False,
    void: bool = True,
    heed: bool = True,
    reversal: dict[str, Any] = UNTIL_ANSWERED,
    own_error: bool = False,
) -> Callable[..., Any]:
    """The saga on the same steps, with one thing done as it is usually done."""

    def transfer(ctx: Any, transfer_id: str, source: str, target: str, amount: int) -> Any:
        debit = (f"{transfer_id}-debit", source, -amount, "debit")
        credit = (f"{transfer_id}-credit", target, amount, "credit")
        undo = ctx.run(apply_entry, f"{transfer_id}-reversal", source, amount, "reversal", counterparty=target)
        try:
            yield ctx.run(apply_entry, *debit, counterparty=target).options(**UNTIL_ANSWERED)
        except Exception as failure:
            reason = "debit refused"
            if debit_void:
                reason = yield ctx.run(give_up, failure, *debit, target).options(**UNTIL_ANSWERED)
            if reason is not None:
                return {"status": "rejected", "error": reason}
        try:
            yield ctx.run(credit_target, *credit[:3], counterparty=source).options(retry_policy=Never())
        except Exception as failure:
            reason = "credit refused"
            if reversal_first:
                yield undo.options(**reversal)
            if void:
                reason = yield ctx.run(give_up, failure, *credit, source).options(**UNTIL_ANSWERED)
            if reason is not None or not heed:
                if not reversal_first:
                    yield undo.options(**reversal)
                return {"status": "compensated", "error": str(failure) if own_error else reason}
        return {"status": "committed"}

    return transfer


def test_the_same_saga_with_nothing_changed_is_acquitted() -> None:
    assert World(saga()).search()[1:] == (None, [])


REFUSED = "A: t-reversal (a transfer never pays out more than it took)"
MADE = "one reports TransferRejected('a transfer never pays out more than it took'), the next {'status': 'committed'}"
GIVEN_UP = "A: gives up on t-credit (credit of 30.00: no answer)"
OURS = "{'status': 'compensated', 'error': 'credit of 30.00: no answer'}"
FAULTY = {
    "reversal on any exception": (
        saga(void=False),
        ["A: t-debit", "A: t-credit lands, then fails", REFUSED],
        MADE,
    ),
    "reversal before the void": (
        saga(reversal_first=True),
        ["A: t-debit", "A: t-credit lands, then fails", REFUSED],
        MADE,
    ),
    "the void's answer ignored": (
        saga(heed=False),
        ["A: t-debit", "A: t-credit lands, then fails", "A: gives up on t-credit", REFUSED],
        MADE,
    ),
    "a refused debit believed without a void": (
        saga(debit_void=False),
        ["A: t-debit (insufficient funds)", "alice is funded"],
        "one reports {'status': 'rejected', 'error': 'debit refused'}, the next {'status': 'committed'}",
    ),
    "retries that give up on the reversal": (
        saga(reversal={"retry_policy": Never()}),
        ["A: t-debit", "A: t-credit fails", GIVEN_UP, "A: t-reversal fails"],
        f"one reports TimeoutError('no answer'), the next {OURS}",
    ),
    "the error taken from the exception, not from the ledger": (
        saga(own_error=True),
        ["A: t-debit", "A: t-credit fails", GIVEN_UP, "A: t-reversal"],
        f"one reports {{'status': 'compensated', 'error': 'no answer'}}, the next {OURS}",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_the_search_convicts(name: str) -> None:
    """Each by a schedule that a person can follow. None of them makes money all the same: the ledger's guards hold."""
    faulty, schedule, verdict = FAULTY[name]
    world = World(faulty, poor="refused debit" in name)
    _, problem, found = world.search()
    assert (found, problem) == (schedule, verdict)
    assert world.search(lambda state: world.money(state.ledger))[1:] == (None, [])


# Without this guard, that is: the one which says what a transfer may pay out.
UNGUARDED = re.sub(r"  SELECT RAISE\(ABORT, 'a transfer never pays.*?\);\n", "", main.SCHEMA, flags=re.DOTALL)


@pytest.mark.parametrize("name", list(FAULTY)[:3])
def test_without_the_guard_the_usual_saga_makes_money(name: str) -> None:
    world = World(FAULTY[name][0], schema=UNGUARDED)
    _, problem, schedule = world.search(lambda state: world.money(state.ledger))
    assert problem == "3000 cents were made"
    assert schedule[:2] == ["A: t-debit", "A: t-credit lands, then fails"]
    assert schedule[-1] == "A: t-reversal"


def test_without_the_guard_this_saga_makes_none() -> None:
    """The law and the guard hold the money each alone."""
    assert UNGUARDED != main.SCHEMA
    world = World(main.transfer_money, schema=UNGUARDED)
    assert world.search(lambda state: world.money(state.ledger))[1:] == (None, [])
