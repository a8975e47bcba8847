"""Runs transfers in processes that SIGKILL themselves at the n-th statement, for every n.

It is a process of its own, because it forks: it has imported the SDK once and has one thread, and
each child is a real process with the real SDK on a real file. A statement counts each time that
SQLite traces it, also once for each statement of the trigger that it fires, so that some of these
kills are in the middle of a write. It prints a line of JSON for each run.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from typing import Any

from conftest import opened

import main

# How a transfer ends: the request, and what the target does in each run.
PATHS: dict[str, tuple[tuple[str, str, int], list[dict[str, bool]]]] = {
    "committed": (("alice", "bob", 3000), [{}, {"simulate_lost_answer": True}]),
    "compensated": (("alice", "nobody", 3000), [{}]),
    "rejected": (("alice", "bob", 300000), [{}]),
}


class Killed(Exception):
    """The child has killed itself."""


def child(work: Callable[[Callable[[str], None]], Any], kill_at: int | None) -> Any:
    """What `work` returns in a forked process, which dies when it is traced the n-th time."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        seen = itertools.count(1)

        def trace(_sql: str) -> None:
            if next(seen) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            answer = work(trace)
            trace("the end")
            os.write(writer, json.dumps(answer).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        text = answers.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        raise Killed
    return json.loads(text)


def submit(path: str, ledger: str, trace: Callable[[str], None], simulate: dict[str, bool]) -> Any:
    """What `python main.py transfer` does."""
    request, _ = PATHS[path]
    db = main.open_ledger(ledger)
    db.set_trace_callback(trace)
    return main.submit(db, main.start(db)[1], "t1", *request, **simulate)


def recover(ledger: str, trace: Callable[[str], None]) -> Any:
    """What `python main.py recover` does."""
    db = main.open_ledger(ledger)
    db.set_trace_callback(trace)
    return main.recover(db, main.start(db)[1]), main.in_flight(db)


def recover_and_repeat(path: str, ledger: str) -> Any:
    """And then the same transfer, by another engine."""
    return *recover(ledger, str), submit(path, ledger, str, {})


def create(ledger: str, trace: Callable[[str], None]) -> Any:
    """What `python main.py open` does, twice."""
    real = sqlite3.connect

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        db = real(*args, **options)
        db.set_trace_callback(trace)
        return db

    sqlite3.connect = connect  # type: ignore[assignment]
    db = opened(ledger)
    return [main.balance(db, name) for name in ("alice", "bob")]


def copy(folder: str, to: str) -> str:
    shutil.copytree(folder, to)
    return f"{to}/ledger.db"


def held(ledger: str) -> str:
    """What is on disk."""
    with contextlib.closing(sqlite3.connect(ledger)) as db:
        return repr(db.execute("SELECT op_id, void FROM operations ORDER BY 1").fetchall())


def kill_everywhere(path: str, root: str) -> None:
    """Kills a transfer at every statement. The first time that this leaves a ledger in some state,
    kills also what recovers it at every statement, and has a third process recover.

    What recovers a ledger in which nothing has settled is the transfer itself, which is killed at
    every statement anyhow.
    """
    os.mkdir(f"{root}/new")
    opened(f"{root}/new/ledger.db").close()
    known = {held(copy(f"{root}/new", f"{root}/new-held"))}
    for run, simulate in enumerate(PATHS[path][1]):
        for first in itertools.count(1):
            folder = f"{root}/{run}-{first}"
            ledger = copy(f"{root}/new", folder)

            def work(
                trace: Callable[[str], None], ledger: Any = ledger, how: Any = simulate
            ) -> Any:
                return submit(path, ledger, trace, how)

            try:
                child(work, first)
            except Killed:
                state = held(copy(folder, f"{folder}-held"))
                kill_what_recovers(path, folder, everywhere=state not in known)
                known.add(state)
            else:
                break


def kill_what_recovers(path: str, folder: str, everywhere: bool) -> None:
    """Kills what recovers a ledger at every statement, and then lets it recover."""
    for second in itertools.count(1):
        ledger = copy(folder, f"{folder}-{second}")
        killed = False
        if everywhere:
            try:
                child(lambda trace, ledger=ledger: recover(ledger, trace), second)
            except Killed:
                killed = True
        answer = child(lambda _, ledger=ledger: recover_and_repeat(path, ledger), None)
        print(json.dumps({"ledger": ledger, "killed": 1 + killed, "answer": answer}))
        if not killed:
            return


def kill_at_creation(root: str) -> None:
    """Kills what creates a ledger at every statement, and has another process create it."""
    for first in itertools.count(1):
        os.mkdir(f"{root}/{first}")
        ledger = f"{root}/{first}/ledger.db"

        def work(trace: Callable[[str], None], ledger: str = ledger) -> Any:
            return create(ledger, trace)

        try:
            child(work, first)
        except Killed:
            print(json.dumps({"ledger": ledger, "killed": 1, "answer": child(work, None)}))
        else:
            return


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    kill_at_creation(folder) if name == "creation" else kill_everywhere(name, folder)
