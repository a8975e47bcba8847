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
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
from conftest import check
from resonate.retry_policies import Exponential, Never

import main
from main import ANSWERS, Operation, apply_entry, credit_target, give_up

FAULT = TimeoutError("no answer")
CENTS = 3000


class Step:
    """What the saga yields: a function to run on an operation, and its options."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.func = func
        self.operation = args[0]
        self.why = str(args[1]) if len(args) > 1 else None  # equal steps are equal
        self.options_given: dict[str, Any] = {}

    def options(self, **options: Any) -> "Step":
        self.options_given = options
        return self

    @property
    def write(self) -> "Write":
        return Write(self.func, self.operation, self.why)

    def may_run_again(self, error: Exception) -> bool:
        policy = self.options_given.get("retry_policy", Exponential())
        final = self.options_given.get("non_retryable_exceptions", ())
        return not isinstance(policy, Never) and type(error) not in final

    def may_be_told(self, error: Exception) -> bool:
        """Whether the failure can reach the saga: not if the SDK retries for ever."""
        policy = self.options_given.get("retry_policy", Exponential())
        return not self.may_run_again(error) or policy.next(1000) is None


class Context:
    """As much of the SDK's context as the saga and its steps see."""

    def __init__(self, db: sqlite3.Connection | None = None) -> None:
        self.db = db

    def run(self, func: Callable[..., Any], *args: Any, **_simulate: Any) -> Step:
        return Step(func, args)

    def get_dependency(self, _name: str) -> Any:
        return self.db


class Write(NamedTuple):
    """What a step does to a ledger."""

    func: Callable[..., Any]
    operation: Operation
    why: str | None = None
    simulate: str | None = None

    def __str__(self) -> str:
        return ("gives up on " if self.func is give_up else "") + self.operation.op_id


class Heard(NamedTuple):
    """What an executor has heard of a step."""

    error: type[Exception] | None
    value: str | None


class Move(NamedTuple):
    """What can happen to one executor, and what that changes."""

    words: str
    ledger: int
    history: int
    late: int = 0
    reported: int = 0


class State(NamedTuple):
    """Ledgers and histories by their numbers; sets of writes and of reports as bits."""

    ledger: int
    executors: tuple[int, ...]
    late: int  # writes of steps that were reported as failed, and that will still land
    reported: int  # the results that executors have returned


GONE = -1


class Numbers[T]:
    """Small numbers for things that are slow to compare."""

    def __init__(self) -> None:
        self.things: list[T] = []
        self.numbers: dict[T, int] = {}

    def __getitem__(self, number: int) -> T:
        return self.things[number]

    def of(self, thing: T) -> int:
        if thing not in self.numbers:
            self.numbers[thing] = len(self.things)
            self.things.append(thing)
        return self.numbers[thing]

    def at(self, bits: int) -> list[T]:
        return [thing for number, thing in enumerate(self.things) if bits >> number & 1]


class World:
    """A saga and a ledger, and everything that can happen to the two."""

    def __init__(
        self,
        saga: Callable[..., Any],
        poor: bool = False,
        target: str = "bob",
        schema: str = main.SCHEMA,
    ) -> None:
        self.saga, self.poor, self.target, self.schema = saga, poor, target, schema
        self.ledgers = Numbers[frozenset[tuple[Any, ...]]]()
        self.histories = Numbers[tuple[Heard, ...]]()
        self.writes = Numbers[Write]()
        self.reports = Numbers[str]()
        self.lands = cache(self._lands)
        self.next = cache(self._next)
        self.moves = cache(self._moves)
        self.alone = cache(self._alone)
        self.wrong = cache(self._wrong)
        self.money = cache(self._money)

        db = self.open([])
        for account, opening in (("alice", 100 if poor else 3100), ("bob", 0), ("bank", CENTS)):
            main.open_account(db, account, opening)
        gift = Operation("gift-debit", "gift", "debit", "bank", -CENTS, "alice")
        main.settle(db, gift)
        gift_lands = Operation("gift-credit", "gift", "credit", "alice", CENTS, "bank")
        self.gift = self.writes.of(Write(apply_entry, gift_lands))
        self.start = State(self.number_of(db), (self.histories.of(()),) * 3, 0, 0)

    def open(self, rows: Iterable[tuple[Any, ...]]) -> sqlite3.Connection:
        """A real ledger with these rows, put in again in an order that its guards accept."""
        kinds = ["opening", "debit", "credit", "reversal"]

        def order(row: tuple[Any, ...]) -> tuple[bool, bool, int]:
            return row[2] != "opening", row[1] != "gift", kinds.index(row[2])

        db = sqlite3.connect(":memory:", autocommit=True)
        db.executescript(self.schema)
        insert = "INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"
        db.executemany(insert, sorted(rows, key=order))
        return db

    def number_of(self, db: sqlite3.Connection) -> int:
        rows = frozenset(db.execute("SELECT * FROM operations"))
        db.close()
        return self.ledgers.of(rows)

    # What follows from what, by the real code: each of these is computed once.

    def _lands(self, ledger: int, write: Write) -> tuple[int, Heard]:
        """The ledger once a step has run on it, and what the step has answered."""
        db = self.open(self.ledgers[ledger])
        more: dict[str, Any] = {write.simulate: True} if write.simulate else {}
        why = () if write.why is None else (Exception(write.why),)
        try:
            heard = Heard(None, write.func(Context(db), write.operation, *why, **more))
        except Exception as error:
            heard = Heard(type(error), str(error))
        return self.number_of(db), heard

    def _next(self, history: int) -> Step | str:
        """The step that an executor with this history runs next, or what its saga returned."""
        saga = self.saga(Context(), "t", "alice", self.target, CENTS)
        try:
            step = next(saga)
            for error, value in self.histories[history]:
                step = saga.throw(error(value)) if error else saga.send(value)
        except StopIteration as end:
            return str({key: end.value[key] for key in ("status", "error") if key in end.value})
        except Exception as error:
            return repr(error)
        return step

    def _moves(self, ledger: int, history: int) -> list[Move]:
        """Everything that can happen next to one executor."""
        return list(self._happen(ledger, history))

    def _happen(self, ledger: int, history: int) -> Iterator[Move]:
        step = self.next(history)
        assert isinstance(step, Step)
        write = step.write
        after, heard = self.lands(ledger, write)
        fault = Heard(type(FAULT), str(FAULT))

        def told(words: str, ledger: int, heard: Heard, late: int = 0) -> Move:
            known = self.histories.of((*self.histories[history], heard))
            end = self.next(known)
            if isinstance(end, str):
                return Move(words, ledger, GONE, late, 1 << self.reports.of(end))
            return Move(words, ledger, known, late)

        said = f" ({heard.value})" if heard.value else ""
        if heard.error is None or step.may_be_told(heard.error(heard.value)):
            yield told(f"{write}{said}", after, heard)
        late = 1 << self.writes.of(write)
        if step.may_run_again(FAULT):
            yield Move(f"{write} lands, but fails, and is run again", after, history)
            yield Move(f"{write} will land late, and is run again", ledger, history, late)
        if step.may_be_told(FAULT):
            yield told(f"{write} fails", ledger, fault)
            yield told(f"{write} lands, but fails", after, fault)
            yield told(f"{write} fails, and will land late", ledger, fault, late)
        if step.func is credit_target:
            refused, no = self.lands(ledger, write._replace(simulate="fail"))
            yield told(f"{write} is refused", refused, no)
            landed, lost = self.lands(ledger, write._replace(simulate="lose_answer"))
            yield told(f"{write} lands, and its answer is lost", landed, lost)

    def _alone(self, ledger: int) -> tuple[str, int]:
        """How a run from nothing ends if it is left alone, and the ledger that it leaves."""
        history = self.histories.of(())
        for _ in range(20):
            step = self.next(history)
            if isinstance(step, str):
                return step, ledger
            ledger, heard = self.lands(ledger, step.write)
            if heard.error is None or step.may_be_told(heard.error(heard.value)):
                history = self.histories.of((*self.histories[history], heard))
        return "a step that is run again for ever", ledger

    # What must not be.

    def _money(self, ledger: int, _reported: int = 0) -> str | None:
        """What is wrong with the money in a ledger, if anything is."""
        entries = [row for row in self.ledgers[ledger] if row[6] is None]
        net = sum(row[4] for row in entries if row[1] == "t")
        if net > 0:
            return f"{net} cents were created"
        for account in {row[3] for row in entries}:
            if sum(row[4] for row in entries if row[3] == account) < 0:
                return f"the balance of {account} is below zero"
        if self.schema == main.SCHEMA:
            db = self.open(self.ledgers[ledger])
            check(db)
            db.close()
        return None

    def _wrong(self, ledger: int, reported: int) -> str | None:
        """What is wrong with a state, if anything is."""
        if problem := self.money(ledger):
            return problem
        end, after = self.alone(ledger)
        for report in self.reports.at(reported):
            if report != end:
                return f"one run returns {report}, the next {end}"
        if not end.startswith("{"):
            return f"a run ends in {end}"
        if sum(row[4] for row in self.ledgers[after] if row[1] == "t" and row[6] is None):
            return "money stays in flight"
        return None

    # The search: breadth first, so that what convicts a saga is as short as can be.

    def search(self, wrong: Callable[[int, int], str | None] | None = None) -> "Verdict":
        came: dict[State, tuple[State, int, Move] | None] = {self.start: None}
        queue = deque([self.start])
        wrong = wrong or self.wrong
        while queue:
            state = queue.popleft()
            if problem := wrong(state.ledger, state.reported):
                return Verdict(len(came), problem, self.story(came, state))
            for executor, move, after in self.choices(state):
                if after not in came:
                    came[after] = state, executor, move
                    queue.append(after)
        return Verdict(len(came), None, [])

    def choices(self, state: State) -> Iterator[tuple[int, Move, State]]:
        """Everything that can happen next: to which executor, what, and the state after it."""
        ledger, executors, late, reported = state
        if self.poor:
            after, _ = self.lands(ledger, self.writes[self.gift])
            yield GONE, Move("alice gets 30.00", after, GONE), state._replace(ledger=after)
        for write in self.writes.at(late):
            after, _ = self.lands(ledger, write)
            left = late & ~(1 << self.writes.of(write))
            yield (
                GONE,
                Move(f"{write} lands, late", after, GONE),
                State(after, executors, left, reported),
            )
        for number, history in enumerate(executors):
            if history == GONE or (number and executors[number - 1] == history):
                continue
            for move in self.moves(ledger, history):
                moved = self.sorted((*executors[:number], move.history, *executors[number + 1 :]))
                after_it = State(move.ledger, moved, late | move.late, reported | move.reported)
                yield number, move, after_it

    @staticmethod
    def sorted(executors: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(executors, reverse=True))

    def story(self, came: dict[Any, Any], state: State) -> list[str]:
        """What happened on the way to a state, in words, an executor keeping its name."""
        way = []
        while step := came[state]:
            state, executor, move = step
            way.append((executor, move))
        names = [(history, name) for history, name in zip(state.executors, "ABC", strict=True)]
        lines = []
        for executor, move in reversed(way):
            if executor == GONE:
                lines.append(move.words)
                continue
            name = names[executor][1]
            lines.append(f"{name}: {move.words}")
            names[executor] = (move.history, name)
            names.sort(key=lambda one: -one[0])
        return lines


class Verdict(NamedTuple):
    states: int
    problem: str | None
    story: list[str]

    def __str__(self) -> str:
        steps = [f"  {number}. {line}" for number, line in enumerate(self.story, 1)]
        return "\n".join(["This schedule breaks the saga:", *steps, f"  => {self.problem}"])


WORLDS: dict[str, dict[str, Any]] = {
    "a source that can pay": {},
    "a source that gets its money meanwhile": {"poor": True},
    "a target that does not exist": {"target": "nobody"},
}


@cache
def searched(world: str) -> Verdict:
    return World(main.transfer_money, **WORLDS[world]).search()


@pytest.mark.xdist_group("search")
@pytest.mark.parametrize("world", WORLDS)
def test_no_schedule_loses_creates_or_strands_money(world: str, record_property: Any) -> None:
    verdict = searched(world)
    if verdict.problem:
        pytest.fail(str(verdict), pytrace=False)
    assert verdict.states > 1000, "so few states that the search cannot have tried what it says"
    record_property("states of a transfer searched: 0 lose, create or strand money", verdict.states)


def saga(
    *,
    debit_void: bool = True,
    reversal_first: bool = False,
    void: bool = True,
    heed: bool = True,
    reversal_policy: dict[str, Any] | None = None,
    own_error: bool = False,
) -> Callable[..., Any]:
    """The saga on the same steps, with one thing done as it is usually done."""
    answered = {"non_retryable_exceptions": ANSWERS}

    def transfer(ctx: Any, transfer_id: str, source: str, target: str, amount: int) -> Any:
        debit = Operation(f"{transfer_id}-debit", transfer_id, "debit", source, -amount, target)
        credit = Operation(f"{transfer_id}-credit", transfer_id, "credit", target, amount, source)
        back = Operation(f"{transfer_id}-reversal", transfer_id, "reversal", source, amount, target)
        undo = ctx.run(apply_entry, back).options(**reversal_policy or answered)
        try:
            yield ctx.run(apply_entry, debit).options(**answered)
        except Exception as failure:
            reason = "debit refused"
            if debit_void:
                reason = yield ctx.run(give_up, debit, failure).options(**answered)
            if reason is not None:
                return {"status": "rejected", "error": reason}
        try:
            yield ctx.run(credit_target, credit).options(retry_policy=Never())
        except Exception as failure:
            reason = "credit refused"
            if reversal_first:
                yield undo
            if void:
                reason = yield ctx.run(give_up, credit, failure).options(**answered)
            if reason is not None or not heed:
                if not reversal_first:
                    yield undo
                error = str(failure) if own_error else reason
                return {"status": "compensated", "error": error}
        return {"status": "committed"}

    return transfer


def test_the_same_saga_with_nothing_changed_is_acquitted() -> None:
    assert World(saga()).search().problem is None


# name: (the saga, a step that its story must contain, a word of the verdict)
FAULTY = {
    "reversal on any exception": (saga(void=False), "t-credit lands", "TransferRejected"),
    "reversal before the void": (saga(reversal_first=True), "t-credit lands", "TransferRejected"),
    "void ignored": (saga(heed=False), "t-credit lands", "TransferRejected"),
    "refused debit believed": (saga(debit_void=False), "alice gets 30.00", "rejected"),
    "reversal given up": (
        saga(reversal_policy={"retry_policy": Never()}),
        "t-reversal fails",
        "TimeoutError",
    ),
    "error of the exception": (saga(own_error=True), "t-reversal", "compensated"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_the_usual_sagas_are_convicted_by_a_short_story(name: str, record_property: Any) -> None:
    """And all the same they create no money: the guards of the ledger hold."""
    faulty, step, word = FAULTY[name]
    world = World(faulty, poor=name == "refused debit believed")
    verdict = world.search()
    assert verdict.problem and word in verdict.problem
    assert step in "\n".join(verdict.story)
    assert len(verdict.story) <= 7
    assert world.search(world.money).problem is None
    record_property("usual sagas convicted, each by a story of at most 7 steps", 1)


def unguarded() -> str:
    """The schema without its guard of what a transfer may pay out."""
    begin = main.SCHEMA.index("  SELECT RAISE(ABORT, 'a transfer pays out")
    return main.SCHEMA[:begin] + main.SCHEMA[main.SCHEMA.index("END;", begin) :]


@pytest.mark.parametrize("name", list(FAULTY)[:3])
def test_without_the_guard_of_the_ledger_a_usual_saga_creates_money(name: str) -> None:
    world = World(FAULTY[name][0], schema=unguarded())
    verdict = world.search(world.money)
    assert verdict.problem == "3000 cents were created"
    assert "A: t-reversal" in verdict.story


def test_without_the_guard_of_the_ledger_this_saga_creates_none() -> None:
    """The law and the guard each hold the money alone."""
    world = World(main.transfer_money, schema=unguarded())
    assert world.search(world.money).problem is None
