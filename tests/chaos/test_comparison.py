"""What the columns of docs/chaos.md count."""

from tests.chaos.clients import Client
from tests.chaos.comparison import judge_cut_off
from tests.chaos.site import replaced_since
from tests.failover.streams import ChoiceText, Reading

WHOLE = Reading({0: ChoiceText("abcdef", [1, 2, 3, 4, 5, 6])}, is_done=True)
ERROR = {"message": "the server stops"}


def cut_off(text: str, token_ids: list[int], num_errors: int = 1) -> Client:
    client = Client("one", {}, ["http://127.0.0.1:9"], None)
    client.reading = Reading({0: ChoiceText(text, token_ids)}, errors=[ERROR] * num_errors)
    return client


def test_a_beginning_and_one_error_are_what_a_request_that_is_cut_off_gets() -> None:
    outcome = judge_cut_off([cut_off("abc", [1, 2, 3]), cut_off("", [])], {"one": WHOLE}, 0.0)
    assert (outcome.num_requests, outcome.lost, outcome.duplicated, outcome.differing) == (2, 2, 0, 0)
    assert outcome.notes == ()


def test_what_is_no_beginning_is_told_apart() -> None:
    clients = {
        "again": cut_off("abcbc", [1, 2, 3, 2, 3]),
        "too much": cut_off("abcdefef", [1, 2, 3, 4, 5, 6, 5, 6]),
        "gap": cut_off("abde", [1, 2, 4, 5]),
        "other text": cut_off("abx", [1, 2, 3]),
    }
    found = {name: judge_cut_off([client], {"one": WHOLE}, 0.0) for name, client in clients.items()}
    assert {name: (each.duplicated, each.differing) for name, each in found.items()} == {
        "again": (1, 0),
        "too much": (1, 0),
        "gap": (0, 1),
        "other text": (0, 1),
    }
    assert all(each.notes for each in found.values())


def test_no_error_and_two_errors_are_wrong() -> None:
    for num_errors, said in ((0, "no error"), (2, "the server stops")):
        (note,) = judge_cut_off([cut_off("ab", [1, 2], num_errors)], {"one": WHOLE}, 0.0).notes
        assert said in note


def test_a_process_that_is_not_there_any_more_was_replaced() -> None:
    before = {10: "a rank", 11: "a rank", 12: "leader"}
    assert replaced_since(before, {"rank 0": 10, "rank 1": 11, "leader": 12}) == ()
    assert replaced_since(before, {"rank 0": 10, "rank 1": 20, "leader": 21}) == ("a rank", "leader")
