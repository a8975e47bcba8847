"""With a real Resonate server: who finishes what, whatever is killed, frozen, lost or missing."""

import os
import sys
from contextlib import closing
from signal import SIGCONT, SIGINT, SIGSTOP

import pytest
from conftest import MAIN, METRICS, NOBODY, check, opened

import main

TRANSFER = "transfer t1 alice bob 1 --server"
TERMS = ("alice", "bob", 100)


def test_what_the_killed_have_left_is_finished_by_two_other_workers(stage):
    """Though the server was killed, too. Who asks again waits, and is answered."""
    left = stage.leave("t2")
    for words in (TRANSFER, "worker"):
        assert stage.start(f"{words} --crash-after debit").wait() == 137
    again = stage.start(TRANSFER)
    assert again.stderr.readline().startswith("t1 has not ended: a worker or `recover` finishes it")
    stage.serve()
    workers = [stage.start("worker"), stage.start("worker")]
    assert again.wait() == 0
    assert "t1-" not in again.stderr.read()
    assert left.result() == "committed"
    for worker in workers:
        worker.send_signal(SIGINT)
        assert worker.wait() == 130


def test_who_waits_is_answered_when_a_third_process_has_finished_it(stage):
    assert stage.start(f"{TRANSFER} --crash-after debit").wait() == 137
    again = stage.start(TRANSFER)
    assert "t1 has not ended" in again.stderr.readline()
    assert stage.start("recover").wait() == 0
    assert again.wait() == 0 and '"committed"' in again.stdout.read()


def test_a_frozen_worker_that_was_overtaken_pays_nobody_when_it_wakes_up(stage, db, tmp_path):
    freeze = "import signal; signal.raise_signal(signal.SIGSTOP)"
    program = tmp_path / "freezing.py"
    program.write_text(
        MAIN.read_text().replace(
            "    try:\n        credited =",
            f"""    {freeze}
    try:
        credited =""",
        )
    )
    frozen = stage.start("worker", sys.executable, program)
    left = stage.leave("t1")
    assert os.waitid(os.P_PID, frozen.pid, os.WSTOPPED | os.WEXITED).si_status == SIGSTOP
    main.submit(main.start(db), "t1", *TERMS, simulate_credit_failure="late")
    frozen.send_signal(SIGCONT)
    assert frozen.stderr.read(50).startswith("t1-debit is an entry\nt1-credit is a void: ")
    assert left.result() == "compensated"


def test_a_worker_whose_step_fails_says_so(stage, db, tmp_path):
    program = tmp_path / "broken.py"
    program.write_text(
        MAIN.read_text().replace(
            "    with LOCK:\n        try:", "    1 / 0\n    if 0:\n        try:"
        )
    )
    broken = stage.start("worker", sys.executable, program)
    stage.leave("t1")
    line = broken.stderr.readline()
    assert "apply_entry" in line and "ZeroDivisionError" in line and "retrying" in line


def test_nobody_waits_for_ever_for_what_nobody_runs(stage, monkeypatch):
    """Who waits runs it if the server has lost it."""
    stage.leave("t1")
    monkeypatch.setattr(main.LOG, "warning", lambda *_: stage.serve("--aio-store-sqlite-path new"))
    assert main.submit(stage.bank, "t1", *TERMS)["status"] == "committed"


def test_a_client_and_a_worker_whose_resonate_stops_end_with_a_line(stage):
    """Here it stops since the promise of their first step is not theirs."""
    for step in ("t1.1", "t2.1"):
        stage.bank.resonate.promises.create(f"{stage.bank.ledger_id}-{step}", 2**52, ikey="another")
    stage.leave("t2")
    for process in [stage.start(TRANSFER), stage.start("worker")]:
        assert process.wait() == 2
        line = process.stderr.readlines()[-1]
        assert line.startswith("error: Resonate has stopped, run this again: ")


def test_an_id_is_that_of_one_transfer_of_one_ledger(stage):
    """The same on another ledger is another one, and with other terms it is a conflict."""
    with closing(opened("theirs.db")) as theirs:
        assert "/theirs.db" in stage.start("worker --ledger theirs.db").stdout.readline()
        assert stage.start("transfer t1 alice bob 1 --crash-after debit").wait() == 137
        stage.leave("ours")
        assert stage.start(f"{TRANSFER} --ledger theirs.db").wait() == 0
        assert check(theirs) == {} and main.balance(theirs, "bob") == 5100
    with pytest.raises(main.OperationConflict, match=r"'t1' is already used: 1\.00 from alice"):
        main.submit(stage.bank, "t1", "alice", "bob", 200)
    assert [result["status"] for result in main.recover(stage.bank)] == ["committed"]


def test_a_wrong_address_is_an_error_at_once(stage, db, monkeypatch):
    wrong = f"""HOST=127.0.0.1 HOST=http://127.0.0.2 HOST=http://127.0.0.1/path
        PORT_STORE={NOBODY} PORT_STORE={METRICS}"""
    for name, value in (word.split("=") for word in wrong.split()):
        with monkeypatch.context() as patch, pytest.raises(ConnectionError, match=r"^no Resonate"):
            patch.setenv(f"RESONATE_{name}", value)
            main.start(db, remote=True)
