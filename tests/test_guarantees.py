"""What this project promises, one test a promise, in plain code. Start reading the tests here.

alice has 100.00, bob has 50.00; amounts are in cents. The other files try the same promises in
every order (test_search), with hostile SQL (test_ledger), with threads and faults (test_saga), with
commands and kills (test_commands), two banks, a server, and PostgreSQL."""

import sqlite3
import subprocess
import sys

import pytest

import main


@pytest.fixture
def bank():
    db = main.open_ledger()
    main.open_account(db, "alice", 10000)
    main.open_account(db, "bob", 5000)
    return main.start(db)


def cents(bank):
    return main.balance(bank.db, "alice"), main.balance(bank.db, "bob")


def test_a_transfer_moves_money_once(bank):
    result = main.submit(bank, "t1", "alice", "bob", 3000)
    assert result["status"] == "committed"
    assert cents(bank) == (7000, 8000)


def test_the_same_id_again_moves_nothing(bank):
    first = main.submit(bank, "t1", "alice", "bob", 3000)
    assert main.submit(bank, "t1", "alice", "bob", 3000) == first
    assert cents(bank) == (7000, 8000)


def test_a_credit_whose_answer_is_lost_still_commits(bank):
    result = main.submit(bank, "t1", "alice", "bob", 3000, simulate_credit_failure="lost")
    assert result["status"] == "committed"
    assert cents(bank) == (7000, 8000)


def test_the_money_of_a_failed_credit_comes_back(bank):
    result = main.submit(bank, "t1", "alice", "bob", 3000, simulate_credit_failure="late")
    assert result["status"] == "compensated"
    assert cents(bank) == (10000, 5000)


def test_a_late_credit_finds_its_void_and_moves_nothing(bank):
    main.submit(bank, "t1", "alice", "bob", 3000, simulate_credit_failure="late")
    _, credit, _ = main.operations("t1", "alice", "bob", 3000)
    assert main.settle(bank.db, credit) is False
    assert cents(bank) == (10000, 5000)


def test_who_has_no_money_is_rejected_and_nothing_moves(bank):
    result = main.submit(bank, "t1", "alice", "bob", 10001)
    assert (result["status"], result["error"]) == ("rejected", "insufficient funds")
    assert cents(bank) == (10000, 5000)


def test_other_terms_under_a_used_id_are_an_error(bank):
    main.submit(bank, "t1", "alice", "bob", 3000)
    with pytest.raises(main.OperationConflict, match="already used"):
        main.submit(bank, "t1", "alice", "bob", 4000)
    assert cents(bank) == (7000, 8000)


@pytest.mark.parametrize("killed_after, end", [("debit", "committed"), ("credit", "compensated")])
def test_what_is_killed_is_finished_by_recover(tmp_path, killed_after, end):
    """After the debit, the credit can still be made; after the void of the credit, it cannot."""
    python = [sys.executable, main.__file__, "--ledger", tmp_path / "ledger.db"]
    for command in ("open alice 100", "open bob 50"):
        subprocess.run([*python, *command.split()], check=True)
    transfer = f"transfer t1 alice bob 30 --crash-after {killed_after}"
    fault = ["--fail-credit", "late"] if killed_after == "credit" else []
    assert subprocess.call([*python, *transfer.split(), *fault]) == 137
    assert f'"{end}"' in subprocess.check_output([*python, "recover"], text=True)


def test_the_ledger_refuses_the_reversal_of_a_saga_that_forgets_the_void(bank):
    debit, _, reversal = main.operations("t1", "alice", "bob", 3000)
    main.settle(bank.db, debit)
    with pytest.raises(sqlite3.IntegrityError, match="the credit is not a void"):
        main.settle(bank.db, reversal)
    assert cents(bank) == (7000, 5000) and main.lookup(bank.db, "t1")["status"] == "in flight"
