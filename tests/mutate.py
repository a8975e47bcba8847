"""Takes out or weakens each guard of main.py in turn, and tells which test fails: `uv run
tests/mutate.py`. Takes about an hour. Words select guards by their text. The tests on a server need
`resonate` on PATH. A test that fails is run again: twice convicts, once is a flake."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "main.py").read_text()
NAMES = "guarantees ledger search saga commands second_bank readme server"  # the fast ones first
FILES = [f"tests/test_{name}.py" for name in NAMES.split()]
# A pattern, and what stands without the guard, or with a weaker one, in the place of each match.
GUARDS = r"""
yield ctx\.run\(give_up.* => False
if not (debited|credited):(?=\n +(return|#)) => if False:
(?<=attempt)\.options\(.*\) =>
\.options\(target=workers\)|\.strip\(\)(?=\[:300)|\[:300\] =>
\[:300\] => [:30]
except BaseException => except Exception
except sqlite3\.IntegrityError => except OSError
except sqlite3\.IntegrityError => except (sqlite3.IntegrityError, sqlite3.OperationalError)
except sqlite3\.IntegrityError => except sqlite3.DatabaseError
except Exception(?= as error:\n +(yield|problem)) => except OSError
(?<!def )printable\((?=[vf]) => (
with LOCK: => if True:
if .*:(?=(  #.*)?\n +(raise|used|LOG\.warn)) => if False:
type\(\w+\) is not \w+ or =>
(?<!x) != \(source, target, amount\) => [2:] != (amount,)
(?<!x) != \(source, target, amount\) => [:2] != (source, target)
(?<!x) != \(source, target, amount\) => [::2] != (source, amount)
(?s)BEGIN IMMEDIATE;(.*)COMMIT; => \1
(?<=op_id        TEXT )PRIMARY KEY => , n INTEGER PRIMARY KEY
 NOT NULL(?=,)|STRICT, (?=WITHOUT ROWID;\n--)|CHECK \(op_id .*, =>
transfer_id = account AND =>
 AND void IS NULL(?=\n) =>
(?<=THEN |ELSE )(amount < 0|kind IN \(.*'\)|\(account, counterparty\) = \([^)]*\)) => TRUE
UPDATE accounts .*; =>
balance < 0 => balance <= 0
balance < 0 => balance < -1
 SELECT RAISE\(ABORT, '(?!operations)[^;]*; =>
NEW\.account NOT IN \(SELECT account FROM accounts\)\n +OR =>
\n +OR NEW\.kind = 'debit' AND .*accounts\) =>
(?<='-debit') AND void IS NULL| AND amount = -NEW\.amount =>
amount = -NEW\.amount => amount <= -NEW.amount
'-credit' AND void IS NOT NULL => '-credit'
EXISTS \(SELECT 1 FROM operations WHERE op_id = NEW\.op_id\) => FALSE
BEFORE (UPDATE|DELETE) ON operations => \g<0> WHEN FALSE
BEFORE (UPDATE|DELETE) ON operations => \g<0> WHEN OLD.void IS NULL
BEFORE (UPDATE|DELETE) ON operations => \g<0> WHEN OLD.void IS NOT NULL
BEFORE (UPDATE|DELETE) ON operations => \g<0> WHEN OLD.kind <> 'reversal'
BEFORE UPDATE ON operations => BEFORE UPDATE OF amount, account, void ON operations
(?s)(WHEN reversal\.op_id.*?compensated')(.*?)(WHEN credit\.op_id.*?committed') => \3\2\1
AND credit\.void IS NULL THEN 'committed' => THEN 'committed'
autocommit=True, uri => autocommit=True, timeout=0, uri
db\.execute\("PRAGMA.*\)|db\.close\(\)(?=\n +raise) => pass
with contextlib\.suppress\([\w.]+\): => if True:
<= objects\(db\) => is None
\(--\.\*\|\\s\)\+ => \\s+
held \+ moving == opened(?= and)|not wrong_balance => True
db\.autocommit is not True or =>
 or db\.in_transaction =>
time\.monotonic\(\) < deadline => True
timeout=2 => timeout=None
os\.urandom\(16\)\.hex\(\) => promise
time\.sleep\(pause\) => pass
if handle\.done\(\): => if False:
vars\(sdk\)\["ContextLogger"\] => vars(sdk)["Unused"]
item\.__lt__ = => item.unused =
ttl=10\*\*6 => ttl=10
(?<=        )with lock: => if True:
records\.(scan|transition) = => records.unused =
del unfinished\[id\] => pass
if not name\.startswith => if not name
"Function credit_target\(" not in => "Function" not in
if client else workers => if False else workers
-\{ledger_id\}|\{bank\.ledger_id\}- =>
check_server\(\)(?=\n +#)|bank\.resonate\.start\(\)(?=  # does) => pass
if mode == "rb": => if False:
"mode=ro" if .*-wal"\) else =>
transfer_money\(Any.* => pass
open\(file, mode\)\.close\(\) => pass
read\(db, "(BEGIN|COMMIT)"\) => pass
"""


def failing_test(source):
    """The first test that fails, twice, with this in the place of main.py; None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
        Path(folder, "main.py").write_text(source)
        failed = run(folder, *FILES)
        again = failed and run(folder, failed)
    return failed if again else f"{failed} (A FLAKE)" if failed else None


def run(folder, *tests):
    """The first test that fails, or crashes."""
    options = ["-xq", "-n2", "--timeout=30", "--dist=load", "--maxschedchunk=1"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::\S+(?: .*?\])?)", ended.stdout, re.MULTILINE)
    if "crashed while running" in ended.stdout:
        print("A CRASH:", end=" ")
    return (failed or ["no test"])[0] if ended.returncode in (1, 2) else None


failed = failing_test(SOURCE)
assert not failed, f"it fails as it is: {failed}"
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
            survived += [] if failed and "FLAKE" not in failed else [words]
sys.exit(f"survived: {survived}" if survived else 0)
