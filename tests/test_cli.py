"""The command line: every result, every exit status, every error."""

import fcntl
import functools
import json
import os
import pty
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, MAIN, Run, debited, settled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main

Cli = Callable[..., Run]
T1 = ["transfer", "t1", "alice", "bob"]


def refused(run: Run, *words: str) -> None:
    """Bad input: one clear line on stderr, status 2, no traceback, and no result."""
    assert (run.status, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert run.err.isascii() or run.err.strip().isprintable()
    for word in words:
        assert word in run.err


def misused(run: Run, word: str) -> None:
    """A wrong use of the commands, as argparse says it."""
    assert (run.status, run.out) == (2, "")
    assert run.err.startswith("usage: main.py")
    assert re.search(r"^main.py.*: error: ", run.err, re.MULTILINE)
    assert word in run.err


# ---- Results -------------------------------------------------------------------------------------


def test_a_result_is_a_line_of_json_and_its_status_the_exit_status(
    cli: Cli, inside: Cli, ledger: sqlite3.Connection
) -> None:
    request = {"source": "alice", "target": "bob", "amount": 3000}
    run = cli(*T1, "30")
    committed = {"transfer_id": "t1", **request, "status": "committed"}
    assert (run.status, run.err, run.result) == (0, "", committed)
    assert inside(*T1, "30.00").out == run.out
    run = cli("transfer", "t2", "alice", "bob", "30.0", "--fail-credit")
    error = "the target refused (simulated)"
    compensated = {"transfer_id": "t2", **request, "status": "compensated", "error": error}
    assert (run.status, run.err, run.result) == (1, "", compensated)
    run = inside("transfer", "t3", "alice", "bob", "70.01")
    assert (run.status, run.err, run.result["status"]) == (1, "", "rejected")
    run = inside("transfer", "t4", "alice", "bob", "5", "--lose-answer")
    assert (run.status, run.err, run.result["status"]) == (0, "", "committed")
    assert (main.balance(ledger, "alice"), main.balance(ledger, "bob")) == (6500, 8500)


def test_verbose_tells_what_the_saga_does(cli: Cli, ledger: sqlite3.Connection) -> None:
    run = cli(*T1, "5", "--lose-answer", "-v")
    assert run.out.splitlines()[:-1] == [
        "t1: the credit failed: TimeoutError: no answer from the target (simulated)",
        "t1 committed",
    ]
    assert run.result["status"] == "committed"


def test_opening_an_account_makes_the_ledger_and_is_done_once(inside: Cli, tmp_path: Path) -> None:
    for _ in range(2):
        run = inside("open", "alice", "100")
        assert (run.status, run.result) == (0, {"account": "alice", "opening": 10000})
    refused(inside("open", "alice", "100.01"), "alice", "100.00")
    assert inside("open", "poor", "0").status == 0
    assert "100.00 in accounts" in inside("journal").out


def test_only_open_makes_a_ledger(inside: Cli, tmp_path: Path) -> None:
    for words in ([*T1, "1"], ["recover"], ["journal"], ["worker"]):
        refused(inside(*words, "--ledger", "typo.db"), "typo.db", "open")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "typo.db").touch()
    refused(inside("journal", "--ledger", "typo.db"), "typo.db", "open")
    assert (tmp_path / "typo.db").read_bytes() == b""


def test_an_unknown_account_is_refused_before_the_id_is_used(
    inside: Cli, ledger: sqlite3.Connection
) -> None:
    refused(inside("transfer", "t1", "alise", "bob", "1"), "unknown account 'alise'")
    refused(inside("transfer", "t1", "alice", "bop", "1"), "unknown account 'bop'")
    assert settled(ledger) == {}
    assert inside(*T1, "1").status == 0


def test_an_id_that_is_used_says_for_what_in_the_unit_that_was_typed(
    inside: Cli, ledger: sqlite3.Connection
) -> None:
    main.open_account(ledger, "carol")
    inside(*T1, "30")
    for other in (("alice", "bob", "31"), ("bob", "alice", "30"), ("alice", "carol", "30")):
        run = inside("transfer", "t1", *other)
        refused(run, "transfer id 't1' is already used: 30.00 from alice to bob\n")
    assert len(settled(ledger)) == 2


def test_recover_prints_each_result_and_says_what_it_cannot_finish(
    inside: Cli, ledger: sqlite3.Connection
) -> None:
    debited(ledger, "a.1", "b\x1b[2J", "c")
    run = inside("recover")
    assert (run.status, run.err) == (1, "")
    assert [result["status"] for result in run.results] == ["in flight", "in flight", "committed"]
    assert "a transfer id is" in run.results[0]["error"]
    assert "\x1b" not in run.out
    assert "\x1b" not in inside("journal").out
    assert inside("recover").status == 1


# ---- The journal ---------------------------------------------------------------------------------


def test_the_journal_shows_the_ledger_and_whether_it_adds_up(
    cli: Cli, inside: Cli, ledger: sqlite3.Connection
) -> None:
    inside(*T1, "30")
    inside("transfer", "t2", "alice", "bob", "20", "--fail-credit")
    debited(ledger, "t3")
    run = cli("journal")
    total = "  145.00 in accounts + 5.00 in flight, 150.00 opened: every cent is somewhere"
    assert (run.status, run.err) == (0, "")
    assert run.out.splitlines() == [
        "  alice-opening  alice          100.00",
        "  bob-opening    bob             50.00",
        "  t1-debit       alice          -30.00",
        "  t1-credit      bob             30.00",
        "  t2-debit       alice          -20.00",
        "  t2-credit      bob             20.00  void: the target refused (simulated)",
        "  t2-reversal    alice           20.00",
        "  t3-debit       alice           -5.00",
        "  t3             in flight        5.00  from alice to bob",
        "  balance        alice           65.00",
        "  balance        bob             80.00",
        total,
    ]
    assert inside("journal", "t3").out.splitlines() == [
        "  t3-debit       alice           -5.00",
        "  t3             in flight        5.00  from alice to bob",
        total,
    ]


CENT = "UPDATE accounts SET balance = balance + {} WHERE account = 'bob';"
TAMPERED = {
    "a balance that is not the sum of its entries": CENT.format(1),
    "a cent in the wrong account": CENT.format(1)
    + "UPDATE accounts SET balance = balance - 1 WHERE account = 'alice'",
    "a cent that came in past the guard": "DROP TRIGGER entry_moves_balance;"
    + CENT.format(1)
    + "INSERT INTO operations VALUES ('x-credit', 'x', 'credit', 'bob', 1, 'alice', NULL)",
}


@pytest.mark.parametrize("how", TAMPERED)
def test_the_journal_of_a_ledger_that_somebody_tampered_with_says_so(
    inside: Cli, tmp_path: Path, how: str
) -> None:
    inside("open", "alice", "100")
    inside("open", "bob", "50")
    assert inside("journal").status == 0
    with sqlite3.connect(tmp_path / "ledger.db") as other:
        other.executescript(TAMPERED[how])
    other.close()
    run = inside("journal")
    assert (run.status, "IT DOES NOT ADD UP" in run.out) == (1, True)


def test_names_and_reasons_cannot_drive_the_terminal(
    inside: Cli, ledger: sqlite3.Connection
) -> None:
    for number, name in enumerate(["\x1b[31mred", "two\nlines", "\u202eleft", "žofie"]):
        assert inside("open", name, "100").status == 0
        assert inside("transfer", f"t{number}", name, "bob", "1").result["source"] == name
        refused(inside("transfer", f"t{number}", name, "bob", "2"), "already used")
    voided = main.Operation("v-debit", "v", "debit", "alice", -1, "bob")
    main.settle(ledger, voided, void="\x1b[2J")
    out = inside("journal").out
    assert "žofie" in out
    assert all(line.isprintable() for line in out.splitlines())


# ---- Bad input -----------------------------------------------------------------------------------

AMOUNTS = {"0.01": 1, "1": 100, "01.10": 110, "30.5": 3050, "99.99": 9999}
NO_AMOUNTS = ["1e3", "NaN", "Infinity", "0.001", "-1", "+1", "1,00", "1_000", ".5", "5.", "."]
NO_AMOUNTS += ["1.2.3", "٣", "²", "0x10", "", " 1", "1 ", "30.00\n", "9" * 16, "9" * 5000]


def test_amounts_are_what_people_write(inside: Cli, ledger: sqlite3.Connection) -> None:
    for number, (text, amount) in enumerate(AMOUNTS.items()):
        run = inside("transfer", f"t{number}", "alice", "bob", text)
        assert (run.result["amount"], main.money(amount)) == (amount, f"{float(text):.2f}")


@pytest.mark.parametrize("text", NO_AMOUNTS, ids=ascii)
def test_what_is_no_amount_is_refused(inside: Cli, ledger: sqlite3.Connection, text: str) -> None:
    misused(inside(*T1, "--", text), "Write 30 or 30.00")
    misused(inside("open", "--", "carol", text), "Write 30 or 30.00")


BAD = (
    (["transfer", "t1", "alice", "bob", "0"], "amount"),
    (["transfer", "a.1", "alice", "bob", "1"], "a.1"),
    (["transfer", "", "alice", "bob", "1"], "transfer id"),
    (["transfer", "t1", "alice", "alice", "1"], "same account"),
    (["transfer", "t1", "", "bob", "1"], "account"),
    (["transfer", "t1", b"\xff\xfe", "bob", "1"], "account"),
    (["open", "", "1"], "account"),
    (["open", b"\xff\xfe", "1"], "account"),
    (["open", "a", "1", "--ledger", ""], "unable to open"),
    (["open", "a", "1", "--ledger", "."], "unable to open"),
    (["open", "a", "1", "--ledger", "no/such/folder.db"], "no/such/folder.db"),
    (["journal", "--ledger", "no/such/folder.db"], "no/such/folder.db"),
    (["journal", "--ledger", b"no/\xff\x1b.db"], "no ledger at"),
    (["journal", "--ledger", ""], "no ledger at"),
)


@pytest.mark.parametrize(("words", "said"), BAD, ids=ascii)
def test_bad_input_gets_one_clear_line(
    inside: Cli, ledger: sqlite3.Connection, words: list[Any], said: str, tmp_path: Path
) -> None:
    refused(inside(*words), said)
    assert settled(ledger) == {}
    assert {path.name for path in tmp_path.iterdir()} <= {
        f"ledger.db{x}" for x in ("", "-wal", "-shm")
    }


MISUSED = (
    (["transfer", "t1", "alice"], "required"),
    (["transfer", "t1", "alice", "bob", "1", "more"], "more"),
    (["transfer", "t1", "alice", "bob", "1", "--crash-after", "lunch"], "lunch"),
    (["transfer", "t1", "alice", "bob", "1", "--fail"], "--fail"),
    (["journal", "--fail-credit"], "--fail-credit"),
    (["recover", "--server"], "--server"),
    (["recover", "--ledger"], "--ledger"),
    (["lunch"], "lunch"),
)


@pytest.mark.parametrize(("words", "said"), MISUSED, ids=ascii)
def test_a_command_that_is_none_gets_the_usage(inside: Cli, words: list[str], said: str) -> None:
    misused(inside(*words), said)


def test_bad_input_to_a_real_process(cli: Cli, ledger: sqlite3.Connection) -> None:
    refused(cli("transfer", "t1", b"\xff\xfe", "bob", "1"), "account")
    misused(cli("lunch"), "lunch")


def test_help_says_what_each_command_does(inside: Cli) -> None:
    run = inside("--help")
    assert run.status == 0
    for command in ("open", "transfer", "recover", "journal", "worker"):
        assert command in run.out
        assert inside(command, "--help").status == 0
    assert "--lose-answer" in inside("transfer", "--help").out


def test_names_that_look_like_options(inside: Cli) -> None:
    assert inside("open", "--ledger=--x.db", "--", "--alice", "1").status == 0
    assert inside("open", "--ledger=--x.db", "bob", "1").status == 0
    run = inside("transfer", "--ledger=--x.db", "--", "--t1", "--alice", "bob", "1")
    assert run.result["status"] == "committed"


WORDS = st.text(
    st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30
) | st.sampled_from(["t1", "alice", "bob", "--", "--ledger", "--fail-credit", "-h", "1e3", "30"])
COMMANDS = st.sampled_from(["open", "transfer", "journal", "recover", "worker", ""])


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(WORDS, max_size=6), command=COMMANDS)
def test_any_words_are_refused_in_words_or_do_what_they_say(
    words: list[str],
    command: str,
    inside: Cli,
    ledger: sqlite3.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the words, there is no traceback, and the ledger adds up."""
    monkeypatch.setattr(main, "worker", lambda *_: 0)
    monkeypatch.setattr(main, "tour", lambda: 0)
    run = inside(*([command] if command else []), *words)
    if run.status in (0, 1):
        assert run.err == ""
    elif run.err.startswith("error"):
        refused(run)
    else:
        misused(run, "error")


# ---- The file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"x", b"not a database, but long enough to be one" * 100])
def test_a_file_that_is_something_else_is_refused_and_left_as_it_was(
    inside: Cli, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    for words in ([*T1, "1"], ["journal"], ["recover"], ["open", "alice", "1"]):
        refused(inside(*words), "ledger.db", "not a")
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_read_only_ledger_is_refused_at_once(cli: Cli, inside: Cli, tmp_path: Path) -> None:
    """Root may write to any file: as root, give up that capability first."""
    inside("open", "alice", "1")
    inside("open", "bob", "1")
    path = tmp_path / "ledger.db"
    path.chmod(0o444)
    before = path.read_bytes()
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    command = [*drop, sys.executable, str(MAIN), *T1, "1"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    refused(Run(done), "ledger.db is read-only")
    assert path.read_bytes() == before
    path.chmod(0o644)
    assert inside(*T1, "1").status == 0


def popen(*words: str, start: tuple[str, ...] = (str(MAIN),), **more: Any) -> Any:
    command = [sys.executable, *start, *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **more)


IN_A_HURRY = """
import sqlite3, sys, main
real = sqlite3.connect
sqlite3.connect = lambda *args, **options: real(*args, timeout=0.05, **options)
sys.exit(main.main())
"""


def test_a_locked_ledger_makes_a_transfer_wait_and_say_so_until_it_is_free(
    inside: Cli, ledger: sqlite3.Connection, tmp_path: Path
) -> None:
    ledger.execute("BEGIN IMMEDIATE")
    assert inside("journal").status == 0  # who only reads need not wait
    child = popen(*T1, "1", start=("-c", IN_A_HURRY), cwd=tmp_path, env=ENVIRONMENT)
    assert "database is locked" in child.stderr.readline()
    ledger.execute("ROLLBACK")
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, json.loads(out)["status"]) == (0, "committed")


def test_open_on_a_locked_ledger_says_that_nothing_is_lost(
    inside: Cli, ledger: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", functools.partial(real, timeout=0.05))
    ledger.execute("BEGIN IMMEDIATE")
    refused(inside("open", "carol", "1"), "ledger.db: database is locked", "same command again")
    ledger.execute("ROLLBACK")


def test_a_full_disk_makes_a_transfer_wait_and_loses_nothing(
    inside: Cli, ledger: sqlite3.Connection, tmp_path: Path
) -> None:
    """Files may not grow by more than some bytes. The same command finishes it elsewhere."""
    ledger.set_authorizer(None)
    ledger.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for limit in (0, 9000):

        def cap(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        name = f"t{limit}"
        child = popen("transfer", name, "alice", "bob", "1", cwd=tmp_path, preexec_fn=cap)
        assert re.search("disk|full", child.stderr.readline())
        child.kill()
        child.communicate(timeout=30)
        assert inside("transfer", name, "alice", "bob", "1").status == 0


def test_a_closed_pipe_is_silent_and_a_full_one_is_an_error(
    cli: Cli, inside: Cli, ledger: sqlite3.Connection
) -> None:
    for words in ([], ["journal"], [*T1, "1"], [*T1, "1", "-v"]):
        reader, writer = os.pipe()
        os.close(reader)
        run = cli(*words, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (run.status, run.err) == (2, "")
    with open("/dev/full", "w") as full:
        run = cli("journal", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (run.status, run.err) == (2, "error: [Errno 28] No space left on device\n")


# ---- Ctrl-C --------------------------------------------------------------------------------------


def interrupt(
    words: list[str], folder: Path, ready: Callable[[subprocess.Popen[str]], bool]
) -> tuple[int, str]:
    """Runs a command in a terminal of its own and presses Ctrl-C in it, once it is ready."""
    terminal, inside = pty.openpty()
    child = popen(
        *words,
        cwd=folder,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=inside,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    deadline = time.monotonic() + 60
    while not ready(child):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.write(terminal, b"\x03")
    _, err = child.communicate(timeout=60)
    os.close(terminal)
    os.close(inside)
    return child.returncode, err


def test_ctrl_c_ends_a_transfer_that_waits_for_a_lock_and_nothing_is_half_done(
    ledger: sqlite3.Connection, tmp_path: Path
) -> None:
    ledger.execute("BEGIN IMMEDIATE")

    def waits(child: subprocess.Popen[str]) -> bool:
        """It has opened the ledger, and started its threads: next, it writes."""
        threads = Path(f"/proc/{child.pid}/task")
        files = Path(f"/proc/{child.pid}/fd")
        names = {os.path.basename(os.path.realpath(path)) for path in files.iterdir()}
        return "ledger.db-wal" in names and len(list(threads.iterdir())) > 5

    assert interrupt([*T1, "1"], tmp_path, waits) == (130, "")
    ledger.execute("COMMIT")
    assert settled(ledger) == {}


def test_ctrl_c_is_silent_while_a_command_still_starts(tmp_path: Path) -> None:
    """To import the SDK takes a moment."""

    def imports(child: subprocess.Popen[str]) -> bool:
        """The SDK brings ssl, which nothing else here does."""
        return "_ssl" in Path(f"/proc/{child.pid}/maps").read_text()

    assert interrupt(["journal"], tmp_path, imports) == (130, "")


def test_ctrl_c_leaves_nothing_of_the_tour(tmp_path: Path) -> None:
    def begun(_child: subprocess.Popen[str]) -> bool:
        return any(tmp_path.glob("tmp*/ledger.db"))

    assert interrupt([], tmp_path, begun) == (130, "")
    assert list(tmp_path.iterdir()) == []


# ---- The tour ------------------------------------------------------------------------------------


def test_a_tour_without_a_disk_to_write_to_says_so(
    inside: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: str) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(main, "open_ledger", full)
    monkeypatch.setattr(subprocess, "call", lambda _command, **_: 2)
    run = inside()
    assert "error: " in run.err
    assert run.err.count("\n") == 1
    assert run.status == 2


@pytest.mark.parametrize("lie", ["balance", "journal", "status"])
def test_the_tour_fails_if_a_claim_is_not_so(
    lie: str, inside: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A balance that is not as expected, a ledger that does not add up, another exit status."""
    monkeypatch.setattr(main, "TOUR", main.TOUR[:1])

    def run_command(command: str, ledger: str) -> int:
        return int(inside(*command.split(), "--ledger", ledger).status)

    monkeypatch.setattr(main, "run_command", run_command)
    if lie == "balance":
        real = main.balance
        monkeypatch.setattr(main, "balance", lambda db, name: real(db, name) + (name == "bob"))
    elif lie == "journal":
        monkeypatch.setattr(main, "journal", lambda _db, _only: False)
    else:
        monkeypatch.setattr(main, "run_command", lambda *words: run_command(*words) + 1)
    capsys.readouterr()
    assert main.tour() == 2
    assert capsys.readouterr().err.startswith("error: the tour claims ")
