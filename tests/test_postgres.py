"""The ledger in PostgreSQL, under main.py as it is: for workers on several machines. The first part
is to copy. The rest tries it on a server of its own, which is killed again and again."""

import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from signal import SIGKILL

import psycopg
import pytest
from conftest import check, new_database, opened, operation, pg_ctl, postgres
from psycopg.types.numeric import IntLoader
from test_ledger import HOSTILE, settle_states

import main

# ---- Copy from here: the schema, a connection, open_ledger ---------------------------------------

SCHEMA = """
CREATE TABLE operations (
  op_id text PRIMARY KEY, transfer_id text NOT NULL, kind text NOT NULL, account text NOT NULL,
  amount bigint NOT NULL, counterparty text NOT NULL, void text,
  CHECK (op_id = transfer_id || '-' || kind),
  CHECK (CASE kind WHEN 'opening' THEN transfer_id = account AND void IS NULL
                   WHEN 'debit' THEN amount < 0
                   ELSE kind IN ('credit', 'reversal') END));
CREATE TABLE accounts (account text PRIMARY KEY, balance bigint NOT NULL);
CREATE FUNCTION refuse_if(bad boolean, why text) RETURNS void LANGUAGE plpgsql AS
  $$ BEGIN IF bad THEN RAISE integrity_constraint_violation USING MESSAGE = why; END IF; END $$;
-- A statement locks its op id first, then one account: so no two of them wait for each other.
CREATE FUNCTION entry_moves_balance() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO accounts SELECT NEW.account, 0 WHERE NEW.kind = 'opening';
  UPDATE accounts SET balance = balance + NEW.amount WHERE account = NEW.account;
  -- Each statement sees anew what is committed. Only this UPDATE knows whether the balance moved:
  -- the next statement may already see an account that was opened meanwhile.
  PERFORM refuse_if(NOT FOUND, 'unknown account');
  PERFORM refuse_if(balance < 0, 'insufficient funds') FROM accounts WHERE account = NEW.account;
  PERFORM refuse_if(NEW.kind = 'debit' AND NOT EXISTS (
    SELECT FROM accounts WHERE account = NEW.counterparty), 'unknown account');
  RETURN NULL; END $$;
CREATE TRIGGER entry_moves_balance AFTER INSERT ON operations FOR EACH ROW
  WHEN (NEW.void IS NULL) EXECUTE FUNCTION entry_moves_balance();
-- It sees only what is committed, and that stays: a void that it has seen is never an entry.
CREATE FUNCTION rule() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  PERFORM refuse_if(NOT EXISTS (SELECT FROM operations
    WHERE op_id = NEW.transfer_id || '-debit' AND void IS NULL AND amount = -NEW.amount
      AND CASE NEW.kind WHEN 'credit' THEN (account, counterparty) = (NEW.counterparty, NEW.account)
                        ELSE (account, counterparty) = (NEW.account, NEW.counterparty) END),
    'no such debit');
  PERFORM refuse_if(NEW.kind = 'reversal' AND NOT EXISTS (SELECT FROM operations
    WHERE op_id = NEW.transfer_id || '-credit' AND void IS NOT NULL), 'the credit is not a void');
  PERFORM refuse_if(NEW.kind = 'reversal' AND NEW.void IS NOT NULL, 'a reversal is never a void');
  RETURN NULL; END $$;
CREATE TRIGGER rule AFTER INSERT ON operations FOR EACH ROW
  WHEN (NEW.kind IN ('credit', 'reversal')) EXECUTE FUNCTION rule();
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN PERFORM refuse_if(true, 'operations are final'); END $$;
CREATE TRIGGER final BEFORE UPDATE OR DELETE OR TRUNCATE ON operations EXECUTE FUNCTION refuse();
CREATE TABLE ledger AS SELECT md5(random()::text) AS id;
"""
SCHEMA += re.search("CREATE VIEW.*?'debit';", main.SCHEMA, re.DOTALL)[0].replace(
    "IF NOT EXISTS", ""
)
# `settle` must see the row that another has committed meanwhile; an answer must survive a crash;
# text must come back as the text that went in (psycopg reads SQL_ASCII as bytes).
SETTINGS = {
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
    "client_encoding": "UTF8",
}


class Cursor(psycopg.Cursor):
    """A statement that finds no rows, such as BEGIN, gives none. (In psycopg, this is an error.)"""

    def fetchall(self):
        return super().fetchall() if self.description else []


class Postgres:
    """What main.py needs of a connection. It connects again after a loss."""

    autocommit, in_transaction, connection = True, False, None

    def __init__(self, url):
        self.url = url

    def execute(self, sql, parameters=()):
        if sql.startswith("INSERT OR IGNORE"):
            sql = sql.replace(" OR IGNORE", "") + " ON CONFLICT DO NOTHING"
        if sql == "BEGIN":  # `journal` reads several times, all of one moment
            sql = "BEGIN ISOLATION LEVEL REPEATABLE READ"
        try:
            if self.connection is None or self.connection.closed:
                self.connection = psycopg.connect(self.url, autocommit=True, cursor_factory=Cursor)
                self.connection.adapters.register_loader("numeric", IntLoader)  # a sum of cents
                for name in SETTINGS.items():
                    self.connection.execute("SELECT set_config(%s, %s, false)", name)
            return self.connection.execute(sql.replace("?", "%s"), parameters)
        except (psycopg.IntegrityError, psycopg.DataError) as error:
            raise sqlite3.IntegrityError(error.diag.message_primary or str(error)) from error
        except psycopg.Error as error:
            raise sqlite3.OperationalError(str(error)) from error

    def close(self):
        if self.connection:
            self.connection.close()


def open_ledger(url):
    """The ledger at this URL, made if there is none. Raises sqlite3.OperationalError."""
    db = Postgres(url)
    db.execute("SELECT 1")
    with db.connection.transaction():
        db.execute("SELECT pg_advisory_xact_lock(20061)")  # others may do the same
        if db.execute("SELECT to_regclass('ledger')").fetchone() == (None,):
            db.execute(SCHEMA)
    return db


# ---- To here. What follows tries it --------------------------------------------------------------

server = pytest.fixture(postgres, scope="module")


@pytest.fixture
def url(server):
    """Of a ledger in which alice has 100.00 and bob 50.00. What a test leaves is finished."""
    with closing(open_ledger(url := new_database(server))) as db:
        main.open_account(db, "alice", 10000)
        main.open_account(db, "bob", 5000)
    yield url
    with closing(open_ledger(url)) as db:
        list(main.recover(main.start(db)))
        assert check(db) == {} and main.journal(db)


def test_it_accepts_the_same_hostile_rows_as_the_ledger_in_sqlite(url):
    insert = "INSERT OR IGNORE INTO operations VALUES (?, ?, ?, ?, ?, ?, ?)"
    with closing(open_ledger(url)) as db, closing(opened()) as lite:
        settle_states(db)
        settle_states(lite)
        for _, name, kind, *rest in HOSTILE[: len(HOSTILE) // 8]:  # each row comes with three verbs
            accepted = [0, 0]
            lite.execute("BEGIN")
            for place, ledger in enumerate((db, lite)):
                with (
                    suppress(sqlite3.IntegrityError),
                    db.connection.transaction(force_rollback=True),
                ):
                    row = (f"{name}-{kind}", name, kind, *rest)
                    accepted[place] = max(0, ledger.execute(insert, row).rowcount)
            lite.execute("ROLLBACK")
            assert accepted[0] == accepted[1], row
        for change in (
            "UPDATE operations SET void = 1",
            "DELETE FROM operations",
            "TRUNCATE operations",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="operations are final"):
                db.execute(change)
        shown = [db.execute(f"SHOW {name}").fetchone()[0] for name in SETTINGS]
        assert shown == list(SETTINGS.values())  # those of the database are others


def test_two_that_settle_at_the_same_moment_agree(url, monkeypatch):
    """As an entry and as a void; and two debits of the last money, of which one is refused."""
    monkeypatch.setattr(main, "LOCK", nullcontext())  # as if each thread were a process
    barrier = threading.Barrier(2)

    def settle(*args):
        barrier.wait()
        return main.settle(*args)

    with (
        closing(open_ledger(url)) as db,
        closing(Postgres(url)) as db2,
        ThreadPoolExecutor(2) as pool,
    ):
        for number in range(100):
            debit, credit, _ = main.operations(f"t{number}", "alice", "bob", 1)
            main.settle(db, debit)
            ends = list(pool.map(settle, (db, db2), (credit, credit), (None, "gone")))
            assert ends in ([True, True], [False, False])
            main.open_account(db, f"a{number}", 60)
            debits = [main.operations(f"{x}{number}", f"a{number}", "bob", 60)[0] for x in "uv"]
            assert sorted(pool.map(settle, (db, db2), debits)) == [False, True]


def test_an_account_that_opens_amid_a_debit_is_unknown_to_it(url, monkeypatch):
    """The debit's UPDATE finds no account. Before its next statement, the opening is committed."""
    monkeypatch.setattr(main, "LOCK", nullcontext())
    with (
        ThreadPoolExecutor(1) as pool,
        closing(Postgres(url)) as db2,
        closing(open_ledger(url)) as db,
    ):
        db.execute("""CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;
            CREATE TRIGGER wait AFTER UPDATE ON accounts EXECUTE FUNCTION wait()""")
        with db.connection.transaction():
            main.open_account(db, "carol", 600)  # it has the lock until it is committed
            debit = pool.submit(main.settle, db2, operation("t1-debit", account="carol"))
            while not db.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall():
                assert not debit.done()
        assert not debit.result()
        assert main.lookup(db, "t1")["error"] == "unknown account"


def submit_all(url, file):
    """What a client does, with eight threads. It writes down each answer."""
    with closing(Postgres(url)) as db, ThreadPoolExecutor(8) as pool, open(file, "a") as answers:
        bank = main.start(db)

        def submit(number):
            fault = {"simulate_credit_failure": ("", "late", "lost")[number % 3]}
            answer = main.submit(bank, str(number), "alice", "bob", 9, **fault)
            print(json.dumps(answer), file=answers, flush=True)

        list(pool.map(submit, range(150)))


@pytest.fixture
def program(url, tmp_path):
    """main.py with this ledger in the place of a file; and what clients do."""
    program = tmp_path / "program.py"
    program.write_text(f"""import contextlib, os, sys; sys.path[:0] = {sys.path!r}
import main, test_postgres as this
main.ledger_in = lambda *_: contextlib.closing(this.open_ledger({url!r}))
os._exit(main.main() if sys.argv[1] != "submit_all" else this.submit_all({url!r}, sys.argv[2]))""")
    return [sys.executable, program]


def test_what_was_answered_is_there_whatever_is_killed(url, server, program, record_property):
    """Two clients do the same. They are killed again and again, and the database with them."""
    file, kills = program[1].with_name("answers"), 0
    file.touch()
    while (before := file.read_text().count("\n")) < 120:
        clients = [subprocess.Popen([*program, "submit_all", file]) for _ in range(2)]
        while clients[0].poll() is None and file.read_text().count("\n") < before + 30:
            time.sleep(0.01)
        if kills % 4 == 2:
            pg_ctl(server, "restart", "-m", "immediate")
        for client in clients:
            client.kill()
            kills += client.wait() == -SIGKILL
    with closing(open_ledger(url)) as db:
        for answer in map(json.loads, file.read_text().splitlines()):
            assert answer == main.lookup(db, answer["transfer_id"])
    record_property("SIGKILLs of clients of PostgreSQL: 0 lost or created", kills)


def test_a_worker_on_another_machine_finishes_what_a_killed_client_left(url, program, stage):
    """It shares nothing with the client but the two servers."""
    transfer = "transfer t1 alice bob 1 --server --crash-after debit"
    assert stage.start(transfer, *program).wait() == 137
    stage.start("worker", *program)
    with closing(Postgres(url)) as db:
        while main.lookup(db, "t1")["status"] != "committed":
            time.sleep(0.05)
