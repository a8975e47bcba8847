"""The command line, as real processes: every result, every exit status, every error."""

import json
import os
import pty
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import MAIN, Run, entries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main

Cli = Callable[..., Run]


@pytest.fixture(autouse=True)
def nothing_of_a_command_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `main` puts on the log, so that a fault ends a command, and the tour's Ctrl-C go when the test does."""
    monkeypatch.setattr(main.LOG, "filters", main.LOG.filters[:])
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Cli:
    """As `cli`, but in this process: for speed, where the words are what matters."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | bytes) -> Run:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(os.fsdecode, words)])
        try:
            status: Any = main.main()
        except SystemExit as end:
            status = end.code
        return Run(subprocess.CompletedProcess(words, status, *capsys.readouterr()))

    return run


def refused(run: Run, *words: str) -> None:
    """Bad input: one clear line on stderr, status 2, no traceback, and no result."""
    assert (run.status, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert run.err.isascii() or run.err.strip().isprintable()
    for word in words:
        assert word in run.err


def test_results_and_their_status(cli: Cli, ledger: Any) -> None:
    request = {"source": "alice", "target": "bob", "amount": 3000}
    run = cli("transfer", "t1", "alice", "bob", "30")
    assert (run.status, run.err, run.result) == (0, "", {"transfer_id": "t1", "status": "committed", **request})
    assert cli("transfer", "t1", "alice", "bob", "30.00").out == run.out
    run = cli("transfer", "t2", "alice", "bob", "30.0", "--fail-credit")
    error = "credit of 30.00: the target refused (simulated)"
    expected = {"transfer_id": "t2", "status": "compensated", **request, "error": error}
    assert (run.status, run.err, run.result) == (1, "", expected)
    run = cli("transfer", "t3", "alice", "bob", "70.01")
    assert (run.status, run.err, run.result["status"]) == (1, "", "rejected")
    db = ledger()
    assert (main.balance(db, "alice"), main.balance(db, "bob")) == (7000, 8000)


def test_an_id_that_is_taken(cli: Cli, ledger: Any) -> None:
    cli("transfer", "t1", "alice", "bob", "30")
    for other in (("alice", "bob", "31"), ("bob", "alice", "30"), ("alice", "carol", "30")):
        refused(cli("transfer", "t1", *other), "t1")
    assert len(entries(ledger())) == 2


AMOUNTS = {"0.01": 1, "1": 100, "01.10": 110, "30.5": 3050, "99.99": 9999}
BAD_AMOUNTS = ["1e3", "NaN", "Infinity", "inf", "0.001", "1.001", "-1", "+1", "1,00", "1_000", ".5", "5.", "."]
BAD_AMOUNTS += ["0", "0.00"]
BAD_AMOUNTS += ["9223372036854775808", "92233720368547758.08", "1.2.3", "٣", "²", "0x10"]
BAD_AMOUNTS += ["", " 1", "1 ", "30.00\n", "9" * 5000]


def test_amounts(inside: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as `submit`."""
    monkeypatch.setattr(main, "start", lambda *_, **__: (None, None))
    monkeypatch.setattr(main, "submit", lambda *request, **_: {"status": "committed", "amount": request[4]})
    for text, amount in AMOUNTS.items():
        run = inside("transfer", "t1", "alice", "bob", text)
        assert (run.status, run.result["amount"]) == (0, amount)


@pytest.mark.parametrize("text", BAD_AMOUNTS, ids=ascii)
def test_an_amount_that_is_none(inside: Cli, text: str) -> None:
    refused(inside("transfer", "t1", "alice", "bob", "--", text), "amount")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["transfer", "t1", "alice", "bob", "1e3"], "30.00"),
        (["transfer", "t1", "alice", "bob", "-5"], "-5"),
        (["transfer", "a.1", "alice", "bob", "1"], "a.1"),
        (["transfer", "", "alice", "bob", "1"], "id"),
        (["transfer", "t1", "alice", "alice", "1"], "two accounts"),
        (["transfer", "t1", "", "bob", "1"], "account"),
        (["transfer", "t1", b"\xff\xfe", "bob", "1"], "account"),
        (["transfer", "t1", "alice"], "transfer t1 alice"),
        (["transfer", "t1", "alice", "bob", "1", "--crash-after", "lunch"], "lunch"),
        (["transfer", "t1", "alice", "bob", "1", "--fail"], "--fail"),
        (["transfer", "t1", "alice", "bob", "1", "more"], "more"),
        (["journal", "more\x1b[2J"], "more"),
        (["lunch"], "lunch"),
        (["--ledger", "x.db"], "x.db"),
        (["journal", "--fail-credit"], "--fail-credit"),
        (["recover", "--ledger"], "--ledger"),
        (["journal", "--ledger", ""], "unable to open"),
        (["journal", "--ledger", "."], "unable to open"),
        (["journal", "--ledger", "no/such/folder.db"], "no/such/folder.db"),
        (["journal", "--ledger", b"no/\xff\x1b.db"], "unable to open"),
    ],
    ids=ascii,
)
def test_bad_input_gets_one_clear_line(inside: Cli, tmp_path: Path, words: list[Any], said: str) -> None:
    refused(inside(*words), said)
    assert {path.name for path in tmp_path.iterdir()} <= {"ledger.db"}


def test_bad_input_to_a_real_process(cli: Cli, tmp_path: Path) -> None:
    refused(cli("transfer", "t1", b"\xff\xfe", "bob", "1"), "account")
    refused(cli("lunch"), "lunch")
    refused(cli("recover", "--ledger"), "--ledger")


def test_a_name_that_looks_like_an_option(cli: Cli) -> None:
    run = cli("transfer", "--ledger", "--x.db", "--", "--t1", "--alice", "bob", "1")
    refused(run)
    run = cli("transfer", "--ledger=--x.db", "--", "--t1", "--alice", "bob", "1")
    assert (run.status, run.result["error"]) == (1, "debit of 1.00: unknown account")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"not a database, but long enough to be one" * 100, "not a database"), (b"x", "not a ledger")],
)
def test_a_file_that_is_no_database(cli: Cli, tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(content)
    for words in (["transfer", "t1", "alice", "bob", "1"], ["journal"], ["recover"]):
        refused(cli(*words), "ledger.db", said)
    assert path.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.db"]


def test_a_ledger_of_another_schema(cli: Cli, tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute("CREATE TABLE accounts (name, money)")
    db.close()
    before = (tmp_path / "ledger.db").read_bytes()
    refused(cli("transfer", "t1", "alice", "bob", "1"), "not a ledger")
    assert (tmp_path / "ledger.db").read_bytes() == before


def test_a_read_only_file(cli: Cli, ledger: Any, tmp_path: Path) -> None:
    """Root may write to any file: as root, give up that capability first."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    cli("transfer", "t1", "alice", "bob", "1")
    path = tmp_path / "ledger.db"
    path.chmod(0o444)
    before = path.read_bytes()
    command = [*drop, sys.executable, str(MAIN), "transfer", "t2", "alice", "bob", "1"]
    run = Run(subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True))
    refused(run, "ledger.db: ", "attempt to write a readonly database", "run the same command again")
    assert path.read_bytes() == before
    path.chmod(0o644)
    assert cli("transfer", "t2", "alice", "bob", "1").status == 0


def test_a_locked_ledger(cli: Cli, ledger: Any) -> None:
    """One clear line, once the busy timeout is over, and the same command works when the lock is gone."""
    cli("journal")
    db = ledger()
    db.execute("BEGIN IMMEDIATE")
    refused(
        cli("transfer", "t1", "alice", "bob", "1"), "ledger.db: ", "database is locked", "run the same command again"
    )
    assert cli("journal").status == 0  # who only reads need not wait
    db.execute("COMMIT")
    assert entries(db) == {}
    assert cli("transfer", "t1", "alice", "bob", "1").status == 0


def test_a_full_disk(cli: Cli, ledger: Any, tmp_path: Path) -> None:
    """Files may grow by no more than some bytes: each limit ends in one clear line, and then all is as it should be."""
    cli("transfer", "t0", "alice", "bob", "1")
    ledger().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    seen = set()
    for limit in (0, 4500, 13000, 21000, 30000):

        def cap(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        run = cli("transfer", f"t{limit}", "alice", "bob", "1", preexec_fn=cap)
        seen.add(run.status)
        if run.status:
            refused(run, "ledger.db", "run the same command again")
        assert cli("transfer", f"t{limit}", "alice", "bob", "1").status == 0
    assert seen == {0, 2}


CRASHES = {
    "debit": ([], ["t1-debit"], "committed"),
    "credit": ([], ["t1-credit", "t1-debit"], "committed"),
    "void": (["--fail-credit"], ["t1-credit", "t1-debit"], "compensated"),
    "reversal": (["--fail-credit"], ["t1-credit", "t1-debit", "t1-reversal"], "compensated"),
}


@pytest.mark.parametrize(
    ("kind", "by_recover"), [*((kind, True) for kind in CRASHES), ("debit", False), ("void", False)]
)
def test_a_crash_right_after_each_kind_of_entry(cli: Cli, ledger: Any, kind: str, by_recover: bool) -> None:
    """As kill -9, with just that entry on disk; then `recover`, or the same command, finishes the transfer."""
    flags, written, status = CRASHES[kind]
    words = ["transfer", "t1", "alice", "bob", "10", *flags]
    run = cli(*words, "--crash-after", kind)
    assert (run.status, run.out, run.err) == (-signal.SIGKILL, "", "")
    assert sorted(entries(ledger())) == written
    flying = kind in ("debit", "void")
    assert cli("journal").out.count("in flight alice") == flying
    if by_recover:
        run = cli("recover")
        assert [json.loads(line)["status"] for line in run.out.splitlines()] == [status] * flying
        assert run.status == 0
    assert cli(*words).result["status"] == status
    assert main.in_flight(ledger()) == []


def test_a_void_that_ends_a_rejection_can_crash_too(cli: Cli, ledger: Any) -> None:
    words = ["transfer", "t1", "alice", "bob", "1000"]
    assert cli(*words, "--crash-after", "void").status == -signal.SIGKILL
    assert entries(ledger()) == {"t1-debit": ("alice", 0, "void")}
    assert cli(*words).result["status"] == "rejected"


def test_a_crash_that_is_not_reached_does_not_happen(cli: Cli) -> None:
    for kind in ("void", "reversal"):
        assert cli("transfer", f"t-{kind}", "alice", "bob", "1", "--crash-after", kind).status == 0
    assert cli("transfer", "void", "alice", "bob", "1000", "--crash-after", "debit").status == 1


def test_a_new_ledger_gets_both_demo_accounts_and_another_neither(cli: Cli, ledger: Any) -> None:
    db = ledger()
    main.open_account(db, "carol", 700)
    cli("journal")
    assert db.execute("SELECT * FROM accounts").fetchall() == [("carol", 700)]


def test_another_command_may_be_faster_with_the_demo_accounts(
    inside: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both see an empty ledger, and each puts them in."""
    real = main.open_ledger

    def opened(path: str, factory: Any) -> sqlite3.Connection:
        class Slow(factory):  # type: ignore[misc]
            def execute(self, sql: str, row: Any = (), /) -> Any:
                cursor = super().execute(sql, row)
                if not sql.startswith("SELECT 1 FROM"):
                    return cursor
                found = cursor.fetchone()
                monkeypatch.setattr(main, "open_ledger", real)
                main.command_ledger(path, None).close()
                return SimpleNamespace(fetchone=lambda: found)

        return real(path, Slow)

    monkeypatch.setattr(main, "open_ledger", opened)
    run = inside("journal")
    assert (run.status, run.err, run.out.count(" opening ")) == (0, "", 2)


def test_the_journal(cli: Cli, inside: Cli, tmp_path: Path) -> None:
    cli("transfer", "t1", "alice", "bob", "30")
    cli("transfer", "t2", "alice", "bob", "10", "--crash-after", "debit")
    run = cli("journal")
    assert (run.status, run.err) == (0, "")
    assert run.out.splitlines() == [
        "  bob-opening   opening   bob           50.00",
        "  alice-opening opening   alice        100.00",
        "  t1-debit      debit     alice        -30.00",
        "  t1-credit     credit    bob           30.00",
        "  t2-debit      debit     alice        -10.00",
        "  t2            in flight alice         10.00  to bob",
        "                balance   alice         60.00",
        "                balance   bob           80.00",
        "  balances 140.00 + in flight 10.00, openings 150.00: every cent is somewhere",
    ]
    db = sqlite3.connect(tmp_path / "ledger.db", autocommit=True)
    for change in (1, -1):
        db.execute("UPDATE accounts SET balance = balance + ? WHERE account = 'bob'", (change,))
        run = inside("journal")
        assert (run.status, "IT DOES NOT ADD UP" in run.out) == ((1, True) if change > 0 else (0, False))
    for change in (1, -1):  # the sum is right, and yet a cent is in the wrong place
        db.execute("UPDATE accounts SET balance = balance + iif(account = 'bob', ?, ?)", (change, -change))
        assert inside("journal").status == (1 if change > 0 else 0)
    # Each balance is the sum of its entries, and yet there is a cent too many: one that went in past the guard.
    db.executescript("""DROP TRIGGER entry_moves_balance;
        UPDATE accounts SET balance = balance + 1 WHERE account = 'bob';
        INSERT INTO entries VALUES ('x-credit', 'x', 'bob', 'alice', 1, 'credit', NULL)""")
    db.executescript(main.SCHEMA)
    assert inside("journal").status == 1
    db.close()


def test_recover_names_what_it_cannot_finish(cli: Cli, ledger: Any) -> None:
    cli("journal")
    for name in ("a.1", "b\x1b[2J", "c"):
        row = (f"{name}-debit", name, "alice", "bob", -100, "debit", None)
        ledger().execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    run = cli("recover")
    assert (run.status, run.result["transfer_id"], run.out.count("\n")) == (1, "c", 1)
    assert [line.split()[1] for line in run.err.splitlines()] == ["'a.1'", "'b\\x1b[2J'"]
    assert "\x1b" not in run.err
    assert "\x1b" not in cli("journal").out


def test_names_cannot_drive_the_terminal(cli: Cli, inside: Cli, ledger: Any) -> None:
    for number, name in enumerate(["\x1b[31mred", "two\nlines", "\u202eright to left", "žofie"]):
        main.open_account(ledger(), name, 100)
        assert inside("transfer", f"t{number}", name, "bob", "1").result["source"] == name
        refused(inside("transfer", f"t{number}", name, "bob", "2")) if number < 3 else None
    out = cli("journal").out
    assert "žofie" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_a_closed_pipe_and_a_full_one(cli: Cli, tmp_path: Path) -> None:
    cli("journal")
    for words in ([], ["journal"], ["transfer", "t1", "alice", "bob", "1"], ["recover"]):
        reader, writer = os.pipe()
        os.close(reader)
        run = cli(*words, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (run.status, run.err) == (0 if words == ["recover"] else 2, "")
        with open("/dev/full", "w") as full:
            run = cli(*words, capture_output=False, stdout=full, stderr=subprocess.PIPE)
        if words != ["recover"]:
            assert (run.status, run.err) == (2, "error: [Errno 28] No space left on device\n")


def interrupt(words: list[str], tmp_path: Path, ready: Callable[[subprocess.Popen[str]], bool]) -> tuple[int, str]:
    """Runs a command in a terminal of its own and presses Ctrl-C in it, once it is ready for that."""
    terminal, inside = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, str(MAIN), *words],
        cwd=tmp_path,
        stdin=inside,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    deadline = time.monotonic() + 30
    while not ready(child):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.write(terminal, b"\x03")
    _, err = child.communicate(timeout=30)
    os.close(terminal)
    os.close(inside)
    return child.returncode, err


def test_ctrl_c(cli: Cli, ledger: Any, tmp_path: Path) -> None:
    """While a transfer waits for a lock: at once, status 130, no traceback, and nothing is half done."""
    cli("journal")
    db = ledger()
    db.execute("BEGIN IMMEDIATE")

    def waits(child: subprocess.Popen[str]) -> bool:
        """It has opened the WAL: the next thing is to write to it."""
        links = {os.path.basename(os.path.realpath(path)) for path in Path(f"/proc/{child.pid}/fd").iterdir()}
        return "ledger.db-wal" in links and len(list(Path(f"/proc/{child.pid}/task").iterdir())) > 5

    status, err = interrupt(["transfer", "t1", "alice", "bob", "1"], tmp_path, waits)
    assert (status, err) == (130, "")
    db.execute("COMMIT")
    assert entries(db) == {}


def test_ctrl_c_while_it_is_still_starting(tmp_path: Path) -> None:
    """The SDK takes a moment to import."""

    def imports(child: subprocess.Popen[str]) -> bool:
        """The SDK brings ssl, which nothing else here does."""
        return "_ssl" in Path(f"/proc/{child.pid}/maps").read_text()

    for _ in range(3):
        assert interrupt(["journal"], tmp_path, imports) == (130, "")


def test_ctrl_c_leaves_nothing_of_the_tour(tmp_path: Path) -> None:
    def begun(child: subprocess.Popen[str]) -> bool:
        return any(tmp_path.glob("tmp*/ledger.db"))

    os.environ["TMPDIR"] = str(tmp_path)
    try:
        assert interrupt([], tmp_path, begun) == (130, "")
    finally:
        del os.environ["TMPDIR"]
    assert list(tmp_path.iterdir()) == []


def test_the_tour(cli: Cli, tmp_path: Path) -> None:
    """With nothing on stderr and nothing left behind. That it is the same each time, the README's test shows."""
    run = cli(env=os.environ | {"TMPDIR": str(tmp_path)})
    assert (run.status, run.err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    results = [json.loads(line)["status"] for line in run.out.splitlines() if line.startswith("{")]
    assert results == ["committed", "compensated", "rejected", "committed", "committed"]
    assert [line for line in run.out.splitlines() if "in flight alice" in line] == [
        "  t4            in flight alice         10.00  to bob"
    ]
    assert run.out.count("every cent is somewhere") == 6


def test_a_tour_without_a_disk_to_write_to(inside: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: str) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(main, "open_ledger", full)
    monkeypatch.setattr(subprocess, "call", lambda _command: 2)
    run = inside()
    assert run.out == "\n# alice pays bob\n$ python main.py transfer t1 alice bob 30\n"
    run.out = ""
    refused(run, "disk I/O error")


@pytest.mark.parametrize("lie", ["balance", "journal", "status"])
def test_the_tour_fails_if_a_claim_is_not_so(lie: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A balance that is not as claimed, a ledger that does not add up, a command that ends in another way."""
    if lie == "balance":
        real = main.balance
        monkeypatch.setattr(main, "balance", lambda db, account: real(db, account) + (account == "bob"))
    elif lie == "journal":
        monkeypatch.setattr(main, "journal", lambda _db, _only: False)
    else:
        call = subprocess.call
        monkeypatch.setattr(subprocess, "call", lambda command: call(command) + 1)
    assert main.tour() == 2
    assert capsys.readouterr().err == "error: the tour claims [0, 7000, 8000], and that is not so\n"


WORDS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["t1", "alice", "bob", "--", "--ledger", "--fail-credit", "-h", "1e3", "NaN", "30", "0.001", "9223372036854775808"]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, max_size=6), command=st.sampled_from(["transfer", "journal", "recover", "worker", ""]))
def test_any_words_are_refused_clearly_or_do_what_they_say(
    words: list[str], command: str, inside: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the words, no traceback, and the ledger adds up."""
    monkeypatch.setattr(main, "worker", lambda _db: 0)
    monkeypatch.setattr(main, "tour", lambda: 0)
    run = inside(*([command] if command else []), *words)
    if run.status in (0, 1):
        assert run.err == ""
    else:
        refused(run)
