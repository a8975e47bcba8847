"""Runs transfers in processes that SIGKILL themselves at the n-th statement, for every n; a line of JSON for each.

A process of its own, because it forks: it imports the SDK once, has one thread, and each child is a real process with
the real SDK on a real file. A statement counts each time that SQLite traces it: also inside, once for every statement
of the trigger that it fires, so that some of these kills are in the middle of a write.
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

import main

REQUESTS: dict[str, tuple[str, str, int]] = {
    "commit": ("alice", "bob", 3000),
    "compensate": ("alice", "nobody", 3000),
    "reject": ("alice", "bob", 300000),
}


def child(work: Callable[[], Any], kill_at: int | None = None) -> tuple[bool, Any, int]:
    """Forks. Whether the child was killed at that statement; else its answer, and how many statements it ran."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        seen = 0

        def trace(_sql: str) -> None:
            nonlocal seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        real = sqlite3.connect

        def connect(path: str, *args: Any, **kwargs: Any) -> sqlite3.Connection:
            db = real(path, *args, **kwargs)
            db.set_trace_callback(None if path == ":memory:" else trace)
            return db

        sqlite3.connect = connect  # type: ignore[assignment]
        try:
            answer = work()
            trace("the end")
            os.write(writer, json.dumps([answer, seen]).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answers:
        text = answers.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True, None, 0
    answer, seen = json.loads(text)
    return False, answer, seen


def transfer(folder: str, request: tuple[str, str, int]) -> Any:
    """What `python main.py transfer` does."""
    _, saga = main.start(main.command_ledger(f"{folder}/ledger.db", None))
    return main.submit(saga, "t1", *request)


def recover(folder: str, request: tuple[str, str, int]) -> Any:
    """What `python main.py recover` does, and then the same id again with a promise store that knows of neither."""
    db = main.command_ledger(f"{folder}/ledger.db", None)
    results = main.recover(db, main.start(db)[1])
    return results, main.in_flight(db), transfer(folder, request)


def copy(folder: str, to: str) -> str:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    return to


def held(folder: str) -> str:
    """What is on disk."""
    try:
        with contextlib.closing(sqlite3.connect(f"{folder}/ledger.db")) as db:
            return repr(sorted(db.execute("SELECT op_id, kind FROM entries")))
    except sqlite3.OperationalError:
        return "no ledger yet"


def run(path: str, root: str) -> None:
    """Kills a transfer at every statement. The first time that this leaves a ledger in some state, also kills what
    recovers it at every statement, and has a third process recover."""
    request, known = REQUESTS[path], set()
    for first in itertools.count(1):
        folder = f"{root}/{path}-{first}"
        os.mkdir(folder)
        killed, answer, _ = child(lambda folder=folder: transfer(folder, request), first)
        if not killed:
            print(json.dumps({"points": first - 1, "answer": answer}))
            return
        state = held(copy(folder, f"{folder}-held"))
        new = state not in known and (path == "commit" or "t1-" in state)  # all three begin by creating the ledger
        for second in itertools.count(1) if new else [0]:
            again = copy(folder, f"{folder}-{second}")
            killed, answer, _ = child(lambda again=again: recover(again, request), second)
            if killed:
                _, answer, _ = child(lambda again=again: recover(again, request))
            print(json.dumps({"first": first, "second": second * killed, "answer": answer, "folder": again}))
            if not killed:
                break
        known.add(state)


if __name__ == "__main__":
    run(*sys.argv[1:])
