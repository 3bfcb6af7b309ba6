"""Commits and journals as input items, and the repair of what a crash left open."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magent2.store.history import (
    NOT_RUN,
    UNKNOWN,
    Commit,
    Decided,
    HandedOff,
    Item,
    Journaled,
    JournalEntry,
    ModelTurn,
    Steered,
    ToolEnded,
    ToolStarted,
    call_id_of,
    history,
    journal_items,
    open_calls,
    repair,
    started_calls,
    user_item,
)

CALL_KINDS = [
    "function_call",
    "custom_tool_call",
    "local_shell_call",
    "shell_call",
    "apply_patch_call",
    "computer_call",
]


def call(id: str, kind: str = "function_call") -> Item:
    return {"type": kind, "call_id": id, "name": "tool", "arguments": "{}"}


def output(id: str, text: str = "done", kind: str = "function_call") -> Item:
    return {"type": f"{kind}_output", "call_id": id, "output": text}


def said(text: str) -> Item:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def thought(id: str) -> Item:
    return {"type": "reasoning", "id": id, "summary": []}


A, B, C = call("a"), call("b"), call("c")
OUT_A, OUT_B, OUT_C = output("a"), output("b"), output("c")


# ---------------------------------------------------------------- commits and journals


def test_a_history_is_the_items_of_all_commits_in_order() -> None:
    commits = [
        Commit(message_id="m1", generation=0, items=[user_item("hi"), said("hello")], terminal="{}"),
        Commit(message_id="m2", generation=0, items=[], terminal="{}"),
        Commit(message_id="m3", generation=1, items=[user_item("bye")], terminal="{}"),
    ]

    assert history(commits) == [user_item("hi"), said("hello"), user_item("bye")]
    assert history([]) == []


JOURNAL: list[JournalEntry] = [
    ModelTurn(turn=1, agent="first", items=[said("let me see"), A, B]),
    ToolStarted(call_id="a"),
    Decided(call_id="b", approved=True),
    ToolStarted(call_id="b"),
    ToolEnded(call_id="b", item=OUT_B),
    Steered(message_id="m2", item=user_item("faster")),
    HandedOff(agent="second"),
]


def test_a_journal_adds_the_items_of_turns_tools_and_steers() -> None:
    assert journal_items(JOURNAL) == [said("let me see"), A, B, OUT_B, user_item("faster")]


def test_a_call_id_used_again_in_a_later_turn_is_another_call() -> None:
    items = [user_item("1"), call("a"), output("a", "one"), user_item("2"), call("a"), output("a", "two")]

    assert repair(items) == items
    assert len(repair([*items[:2], *items[3:]])) == 6


def test_the_started_calls_are_those_with_a_mark() -> None:
    assert started_calls(JOURNAL) == {"a", "b"}
    assert started_calls([]) == set()


@pytest.mark.parametrize("entry", JOURNAL)
def test_a_journal_entry_is_read_as_it_was_written(entry: JournalEntry) -> None:
    journaled = Journaled(attempt=2, entry=entry)

    assert Journaled.model_validate_json(journaled.model_dump_json()) == journaled


def test_a_crashed_run_goes_on_with_each_call_closed_by_what_is_known_of_it() -> None:
    journal: list[JournalEntry] = [
        ModelTurn(turn=1, agent="one", items=[A, B, C]),
        ToolStarted(call_id="a"),
        ToolStarted(call_id="b"),
        ToolEnded(call_id="b", item=OUT_B),
    ]

    repaired = repair([user_item("go"), *journal_items(journal)], started_calls(journal))

    assert repaired == [user_item("go"), A, B, C, output("a", UNKNOWN), OUT_B, output("c", NOT_RUN)]


# ---------------------------------------------------------------- open calls


def test_a_call_is_open_until_its_output_is_there() -> None:
    assert open_calls([user_item("hi"), A, B, OUT_A, C, output("stranger")]) == [B, C]
    assert open_calls([A, OUT_A]) == []


@pytest.mark.parametrize("kind", CALL_KINDS)
def test_every_kind_of_call_is_known_by_its_id(kind: str) -> None:
    assert call_id_of(call("a", kind)) == "a"
    assert call_id_of(output("a", kind=kind)) is None
    assert open_calls([call("a", kind)]) == [call("a", kind)]
    assert open_calls([call("a", kind), output("a", kind=kind)]) == []


@pytest.mark.parametrize("item", [user_item("hi"), said("hi"), thought("r"), {"type": "web_search_call", "id": "w"}])
def test_what_is_no_call_has_no_call_id(item: Item) -> None:
    assert call_id_of(item) is None


# ---------------------------------------------------------------- repair


@pytest.mark.parametrize(
    "whole",
    [
        pytest.param([], id="nothing"),
        pytest.param([user_item("hi"), said("hello"), user_item("bye")], id="no tools"),
        pytest.param([user_item("hi"), A, OUT_A, said("done")], id="one call"),
        pytest.param([A, B, C, OUT_A, OUT_B, OUT_C, said("done")], id="parallel calls"),
        pytest.param([A, OUT_A, B, OUT_B, C, OUT_C], id="one call a turn, nothing said between"),
        pytest.param([thought("1"), A, OUT_A, thought("2"), B, OUT_B, said("done")], id="reasoning before each turn"),
        pytest.param([thought("1"), A, thought("2"), B, OUT_A, OUT_B], id="reasoning between parallel calls"),
        pytest.param([A, B, OUT_A, OUT_B, C, OUT_C], id="parallel calls, then one"),
    ],
)
def test_a_whole_history_is_left_as_it_is(whole: list[Item]) -> None:
    assert repair(whole) == whole


@pytest.mark.parametrize(
    ("broken", "repaired"),
    [
        pytest.param([A], [A, output("a", NOT_RUN)], id="open at the end"),
        pytest.param([A, said("x")], [A, output("a", NOT_RUN), said("x")], id="open before a message"),
        pytest.param([A, said("x"), OUT_A], [A, OUT_A, said("x")], id="output too late"),
        pytest.param([OUT_A, said("x"), A], [said("x"), A, OUT_A], id="output too early"),
        pytest.param([OUT_A, said("x")], [said("x")], id="output without a call"),
        pytest.param([A, OUT_A, output("a", "2")], [A, OUT_A], id="two outputs"),
        pytest.param([A, A, OUT_A], [A, OUT_A], id="a call twice"),
        pytest.param([A, B, OUT_B, OUT_A], [A, B, OUT_A, OUT_B], id="outputs as they finished"),
        pytest.param([A, B, OUT_B], [A, B, output("a", NOT_RUN), OUT_B], id="one of two open"),
        pytest.param([A, OUT_A, B], [A, OUT_A, B, output("b", NOT_RUN)], id="the second turn open"),
    ],
)
def test_a_broken_history_is_repaired(broken: list[Item], repaired: list[Item]) -> None:
    assert repair(broken) == repaired


def test_only_a_started_call_has_an_unknown_outcome() -> None:
    assert repair([A, B], started=["b", "stranger"]) == [A, B, output("a", NOT_RUN), output("b", UNKNOWN)]


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("function_call", {"output": NOT_RUN}),
        ("custom_tool_call", {"output": NOT_RUN}),
        ("local_shell_call", {"output": NOT_RUN}),
        ("apply_patch_call", {"output": NOT_RUN, "status": "failed"}),
        ("shell_call", {"output": [{"stdout": "", "stderr": NOT_RUN, "outcome": {"type": "exit", "exit_code": 1}}]}),
    ],
)
def test_each_kind_of_call_is_closed_with_an_output_of_its_shape(kind: str, rest: dict[str, Any]) -> None:
    assert repair([call("a", kind)])[1] == {"type": f"{kind}_output", "call_id": "a", **rest}


def test_a_computer_call_is_closed_with_a_picture() -> None:
    [_, closing] = repair([call("a", "computer_call")])

    assert closing["output"]["type"] == "computer_screenshot"
    assert closing["output"]["image_url"].startswith("data:image/png;base64,")


def test_the_items_given_are_not_changed() -> None:
    items = [call("a"), user_item("hi")]
    repair(items)

    assert items == [call("a"), user_item("hi")]


# ---------------------------------------------------------------- properties of repair

ids = st.sampled_from("abcdef")
kinds = st.sampled_from(CALL_KINDS)
calls = st.builds(call, ids, kinds)
outputs = st.builds(output, ids, st.sampled_from(["1", "2"]), kinds)
others = st.one_of(st.builds(user_item, ids), st.builds(said, ids), st.builds(thought, ids))
any_items = st.lists(st.one_of(calls, outputs, others), max_size=20)


def is_output(item: Item) -> bool:
    return str(item.get("type")).endswith("_output")


@st.composite
def whole_histories(draw: st.DrawFn) -> list[Item]:
    """Turns as a model makes them: reasoning, parallel calls and their outputs, or something said."""
    items: list[Item] = []
    for turn in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            items.append(draw(others))
        parallel = [call(f"{turn}.{n}", draw(kinds)) for n in range(draw(st.integers(0, 3)))]
        items += parallel
        items += [output(one["call_id"], kind=one["type"]) for one in parallel]
    return items


@given(any_items, st.sets(ids))
def test_repairing_twice_is_repairing_once(items: list[Item], started: set[str]) -> None:
    once = repair(items, started)

    assert repair(once, started) == once
    assert repair(once) == once


@given(any_items)
def test_every_call_has_one_output_right_behind_its_group_and_no_output_is_alone(items: list[Item]) -> None:
    pending: list[str] = []
    answered: list[str] = []
    half_answered = False  # a group whose outputs have begun is answered to its end
    for item in repair(items):
        if is_output(item):
            assert item["call_id"] == pending.pop(0)
            answered.append(item["call_id"])
            half_answered = bool(pending)
        elif (id := call_id_of(item)) is not None:
            assert not half_answered
            pending.append(id)
        else:
            assert not pending or item["type"] == "reasoning"
    assert not pending
    assert set(answered) == {item["call_id"] for item in items if call_id_of(item)}


@given(any_items)
def test_what_is_neither_call_nor_output_is_kept_in_order(items: list[Item]) -> None:
    def rest(items: list[Item]) -> list[Item]:
        return [item for item in items if call_id_of(item) is None and not is_output(item)]

    assert rest(repair(items)) == rest(items)


@given(any_items)
def test_a_repaired_history_has_no_open_calls(items: list[Item]) -> None:
    assert open_calls(repair(items)) == []


@given(whole_histories())
def test_a_history_as_runs_write_it_is_left_as_it_is(items: list[Item]) -> None:
    assert repair(items) == items


@given(whole_histories(), st.integers(1, 4), st.sets(st.integers(0, 3)), st.lists(others, max_size=2))
def test_a_turn_cut_short_keeps_its_calls_together(
    before: list[Item], count: int, finished: set[int], after: list[Item]
) -> None:
    parallel = [call(f"last.{n}") for n in range(count)]
    done = [output(f"last.{n}") for n in finished if n < count]

    repaired = repair([*before, said("now"), *parallel, *done, user_item("well?"), *after], ["last.0"])

    closed = [output(f"last.{n}", "done" if n in finished else NOT_RUN if n else UNKNOWN) for n in range(count)]
    assert repaired == [*before, said("now"), *parallel, *closed, user_item("well?"), *after]
