"""Takes out each guard of main.py in turn, and tells which test fails: `uv run tests/mutate.py`.
Takes half an hour. Words select guards by their text. The server's need `resonate` on PATH."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "main.py").read_text()
NAMES = "ledger search saga commands second_bank readme server"  # the fast ones first
FILES = [f"tests/test_{name}.py" for name in NAMES.split()]
# A pattern, and what stands without the guard in the place of each match.
GUARDS = r"""
yield ctx\.run\(give_up.* => "no"
is not None:(?=\n +# Step 3) => or True:
(?<=FINAL\)\n    )if reason is not None: => if False:
\.strip\(\)\[:300\]|\.options\(\w+=(Never\(\)|workers|FINAL)\) =>
OperationConflict, (?=sqlite)|sqlite3\.\w+, (?=sqlite)|sqlite3\.DatabaseError(?=\)\n\n) =>
except (BaseException|sqlite3\.IntegrityError|Exception(?= as error:\n +result)) => except OSError
except BaseException => except Exception
(?<!def )printable\((?=[pfl]) => (
with LOCK: => if True:
\*columns, reason = row => *columns, reason = (*operation, void)
if .*:(?=(  #.*)?\n +(raise|used)) => if False:
type\(\w+\) is not \w+ or =>
(?s)BEGIN IMMEDIATE;(.*)COMMIT; => \1
(?<=op_id        TEXT )PRIMARY KEY => , n INTEGER PRIMARY KEY
 NOT NULL(?=,)|STRICT, (?=WITHOUT ROWID;\n--)|CHECK \(op_id .*, =>
transfer_id = account AND =>
 AND void IS NULL(?=\n) =>
(?<=THEN |ELSE )(amount < 0|kind IN \(.*'\)|\(account, counterparty\) = \([^)]*\)) => TRUE
UPDATE accounts .*; =>
 SELECT RAISE\(ABORT, '(?!operations)[^;]*; =>
(?<='-debit') AND void IS NULL| AND amount = -NEW\.amount =>
EXISTS \(SELECT 1 FROM operations WHERE op_id = NEW\.op_id\) => FALSE
BEFORE (UPDATE|DELETE) ON operations => \g<0> WHEN FALSE
db\.execute\("PRAGMA.*\)|db\.close\(\)(?=\n +raise) => pass
with contextlib\.suppress\([\w.]+\): => if True:
held \+ moving == opened(?= and)|not wrong_balance|os\.path\.getsize\(args\.ledger\) > 0 => True
in unfinished:(?=\n +promise_id = f) => in unfinished or 1:
promise_id = secrets.token_hex\(16\) => return lookup(bank.db, *request)
timeout=2 => timeout=None
vars\(sdk\)\["ContextLogger"\] => vars(sdk)["Unused"]
store\.promises\.scan = store\.tasks\.scan => store.scan
if client: => if False:
-\{ledger_id\}|\{bank\.ledger_id\}- =>
check_server\(\)(?=\n +#)|socket\.create_connection.*|bank\.resonate\.start\(\)(?=  # does) => pass
"""


def failing_test(source):
    """The first test that fails with this in the place of main.py; None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        Path(folder, "main.py").write_text(source)
        options = ["-xq", "--timeout=60", "--dist=load", "--maxschedchunk=1"]
        command = [sys.executable, "-m", "pytest", *options, *FILES]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", run.stdout, re.MULTILINE)
    return (failed or ["a warning"])[0] if run.returncode else None


assert not failing_test(SOURCE), "the tests fail as it is"
survived = []
for rule in GUARDS.strip().splitlines():
    pattern, _, instead = rule.partition(" =>")
    matches = list(re.finditer(pattern, SOURCE))
    assert matches, f"not in main.py: {pattern}"
    for match in matches:
        before, after = SOURCE[: match.start()], SOURCE[match.end() :]
        words = f"{before.count(chr(10)) + 1}: {match[0].strip().splitlines()[0]} =>{instead}"
        if any(word in words for word in sys.argv[1:] or [""]):
            failed = failing_test(before + match.expand(instead[1:]) + after)
            print(f"{words:60} {failed or 'SURVIVED'}", flush=True)
            survived += [] if failed else [words]
sys.exit(f"survived: {survived}" if survived else 0)
