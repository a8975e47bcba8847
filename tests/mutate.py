"""Takes out each guard of main.py in turn, and tells which test fails: `uv run tests/mutate.py`.
Takes a quarter of an hour. Words select guards by name. The server's need `resonate` on PATH."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "main.py").read_text()
# A guard: what stands in main.py => what stands there without it
GUARDS = r"""
the void: yield ctx.run(give_up, credit, str(error)).options(non_retryable_exceptions=FINAL) => "no"
the answer of give_up: is not None:\n            # Step 3 => or True:\n            # Step 3
Never() for the credit: .options(retry_policy=Never()) =>
the answer of the debit: FINAL)\n    if reason is not None: => FINAL)\n    if False:
FINAL, conflict: = (OperationConflict, => = (
FINAL, refused: OperationConflict, sqlite3.IntegrityError, => OperationConflict,
FINAL, closed: sqlite3.ProgrammingError, =>
FINAL, damaged: , sqlite3.DatabaseError) => )
the boundary: except BaseException as error: => except ZeroDivisionError as error:
the boundary, SystemExit: except BaseException as error: => except Exception as error:
a reason is short: .strip()[:300] =>
a reason is printable: printable(problem.strip()[:300]) => problem.strip()[:300]
a log is printable: printable(f"a void: {reason}") => f"a void: {reason}"
LOCK, settle: with LOCK:\n        try: => if True:\n        try:
LOCK, read: with LOCK:\n        return => if True:\n        return
the void of a refused entry: except sqlite3.IntegrityError as => except ZeroDivisionError as
the read-back: *columns, reason = row => columns, reason = operation, void
the comparison: if settled != operation: => if False:
one transaction: executescript(SCHEMA) => executescript(re.sub("BEGIN IMM.*;|COMMIT;", "", SCHEMA))
the primary key: op_id        TEXT PRIMARY KEY, => op_id TEXT, n INTEGER PRIMARY KEY,
NOT NULL, transfer_id: transfer_id  TEXT NOT NULL => transfer_id TEXT
NOT NULL, kind: kind         TEXT NOT NULL => kind TEXT
NOT NULL, account: account      TEXT NOT NULL => account TEXT
NOT NULL, amount: amount       INTEGER NOT NULL => amount INTEGER
NOT NULL, counterparty: counterparty TEXT NOT NULL => counterparty TEXT
STRICT: ) STRICT, WITHOUT ROWID;\n-- => ) WITHOUT ROWID;\n--
CHECK, op id: CHECK (op_id = transfer_id || '-' || kind), =>
CHECK, opening: transfer_id = account AND void IS NULL => void IS NULL
CHECK, an opening is no void: transfer_id = account AND void IS NULL => transfer_id = account
CHECK, debit: THEN amount < 0 => THEN TRUE
CHECK, kinds: ELSE kind IN ('credit', 'reversal') END => ELSE TRUE END
balance: UPDATE accounts SET balance = balance + NEW.amount WHERE account = NEW.account; =>
no update: BEFORE UPDATE ON operations\nBEGIN => BEFORE UPDATE ON operations WHEN FALSE\nBEGIN
no delete: BEFORE DELETE ON operations\nBEGIN => BEFORE DELETE ON operations WHEN FALSE\nBEGIN
no replace: WHEN EXISTS (SELECT 1 FROM operations WHERE op_id = NEW.op_id) => WHEN FALSE
same amount:  AND amount = -NEW.amount =>
a debit that is an entry: '-debit' AND void IS NULL => '-debit'
accounts of a credit: (account, counterparty) = (NEW.counterparty, NEW.account) => TRUE
accounts of a reversal: (account, counterparty) = (NEW.account, NEW.counterparty) => TRUE
one byte: os.path.getsize(path) == 1 => False
foreign databases: elif not {"ledger", "operations"} <= names: => elif False:
synchronous: db.execute("PRAGMA synchronous = FULL") => pass
WAL: db.execute("PRAGMA journal_mode = WAL") => pass
WAL, later: with contextlib.suppress(sqlite3.OperationalError): => if True:
close: db.close()\n        raise => raise
names of accounts: for name in accounts: => for name in ():
amounts: not least <= cents <= 10**15 => False
amounts are int: type(cents) is not int or =>
transfer ids: not re.fullmatch("[A-Za-z0-9_-]{1,64}", transfer_id) => False
transfer ids are str: type(transfer_id) is not str or =>
two accounts: if source == target: => if False:
terms: if terms and terms != (source, target, amount): => if False:
ledger first: in unfinished:\n        promise_id = f => in unfinished or 1:\n        promise_id = f
an old error: promise_id = secrets.token_hex(16) => return lookup(bank.db, *request)
recover goes on: Exception as error:\n            result => ValueError as _:\n            result
mend, logger: vars(sdk)["ContextLogger"] => vars(sdk)["Unused"]
mend, scan: store.promises.scan = store.tasks.scan = => store.scan =
server, is there: check_server()\n        # => #
server, messages: socket.create_connection(address, timeout=5).close() => pass
server, workers of a ledger: f"money-transfer-{ledger_id}" => "money-transfer"
server, a client is alone: if client: => if False:
server, what a client leaves: .options(target=workers) =>
server, promises of a ledger: f"{bank.ledger_id}-{transfer_id}" => transfer_id
server, asking again: timeout=2 => timeout=None
server, a worker that has stopped: bank.resonate.start()  # does => pass  # does
"""


def guards():
    for line in GUARDS.strip().splitlines():
        name, _, rest = line.partition(": ")
        guard, _, instead = rest.replace(r"\n", "\n").partition(" =>")
        yield name, guard, instead[1:]
    for match in re.finditer(r" SELECT RAISE\(ABORT, '((?!operations)[^']*)'\)[^;]*;", SOURCE):
        yield f"RAISE, {match[1]}", match[0], ""


def failing_test(source):
    """The first test that fails with this in the place of main.py; None if none does."""
    fast = ["tests/test_ledger.py", "tests/test_search.py", "tests/test_saga.py"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout=60"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        Path(folder, "main.py").write_text(source)
        for files in (fast, []):
            run = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True)
            failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", run.stdout, re.MULTILINE)
            if run.returncode:
                return (failed or ["a warning"])[0]
    return None


def main():
    survived = []
    for name, guard, instead in guards():
        if any(word in name for word in sys.argv[1:] or [""]):
            assert SOURCE.count(guard) == 1, f"{name}: {SOURCE.count(guard)} times in main.py"
            failed = failing_test(SOURCE.replace(guard, instead))
            print(f"{name:32} {failed or 'SURVIVED'}", flush=True)
            survived += [] if failed else [name]
    sys.exit(f"survived: {survived}" if survived else 0)


if __name__ == "__main__":
    main()
