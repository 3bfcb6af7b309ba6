"""Histories and journals as plain input items of the Agents SDK: pure functions, no I/O.

A **commit** is what one answered message added. A **journal** is what an unfinished run has finished so far, entry by
entry. `repair` closes what a crash or a cancel left open, because the SDK sends a call without an output as it is and
the model's server refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from magent2.models.events import Usage

Item = dict[str, Any]

UNKNOWN = "[outcome unknown]"
NOT_RUN = "[not run]"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class ModelTurn(_Frozen):
    """A model call ended: its items, who asked, what it cost. Written before any of its tools start."""

    kind: Literal["model"] = "model"
    turn: int
    agent: str
    items: list[Item]
    usage: Usage | None = None


class ToolStarted(_Frozen):
    """The mark before the effect."""

    kind: Literal["started"] = "started"
    call_id: str


class ToolEnded(_Frozen):
    """The output item of a tool call, as the model will read it."""

    kind: Literal["ended"] = "ended"
    call_id: str
    item: Item


class HandedOff(_Frozen):
    """The agent that goes on from here."""

    kind: Literal["handoff"] = "handoff"
    agent: str


class Steered(_Frozen):
    """A message handed to the running agent before its next model call."""

    kind: Literal["steered"] = "steered"
    message_id: str
    item: Item


class Decided(_Frozen):
    """A person's answer to an approval; the first one wins."""

    kind: Literal["decided"] = "decided"
    call_id: str
    approved: bool
    message: str | None = None


JournalEntry = Annotated[
    ModelTurn | ToolStarted | ToolEnded | HandedOff | Steered | Decided, Field(discriminator="kind")
]


class Journaled(_Frozen):
    """A journal entry as stored: `attempt` is the delivery that wrote it."""

    attempt: int
    entry: JournalEntry


class Commit(_Frozen):
    """All that one message came to: the items it added to the history and the terminal event, as its bytes' text.

    `digest` tells the message from a later one that uses its id again.
    """

    message_id: str
    digest: str = ""
    generation: int
    items: list[Item]
    terminal: str


def history(commits: Iterable[Commit]) -> list[Item]:
    """The input items of all commits, in order."""
    return [item for commit in commits for item in commit.items]


def own_calls(items: Iterable[Item], message_id: str) -> list[Item]:
    """The items with call ids no other message's have: some servers number calls from 0 in each answer."""
    mark = f"-{message_id[:8]}"
    # 64 characters are the most a call id may have
    return [
        {**item, "call_id": str(item["call_id"])[: 64 - len(mark)] + mark} if "call_id" in item else item
        for item in items
    ]


def user_item(text: str) -> Item:
    """A user's message as an input item."""
    return {"role": "user", "content": text}


def journal_items(journal: Sequence[JournalEntry]) -> list[Item]:
    """What the journal adds to the input, in order, open calls left open."""
    items: list[Item] = []
    for entry in journal:
        match entry:
            case ModelTurn():
                items.extend(entry.items)
            case ToolEnded() | Steered():
                items.append(entry.item)
            case ToolStarted() | HandedOff() | Decided():
                pass
    return items


def started_calls(journal: Sequence[JournalEntry]) -> set[str]:
    """The ids of the calls whose effect may have happened."""
    return {entry.call_id for entry in journal if isinstance(entry, ToolStarted)}


_OUTPUT_OF = {
    "function_call": "function_call_output",
    "custom_tool_call": "custom_tool_call_output",
    "local_shell_call": "local_shell_call_output",
    "shell_call": "shell_call_output",
    "apply_patch_call": "apply_patch_call_output",
    "computer_call": "computer_call_output",
}
_OUTPUTS = frozenset(_OUTPUT_OF.values())

# one white pixel
_BLANK = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg=="
)


def call_id_of(item: Item) -> str | None:
    """The id of the call this item is, or None if it is none."""
    return str(item["call_id"]) if item.get("type") in _OUTPUT_OF and "call_id" in item else None


def open_calls(items: Iterable[Item]) -> list[Item]:
    """The calls among the items that have no output, in order."""
    items = list(items)
    outputs = _outputs_of_calls(items)
    return [item for place, item in enumerate(items) if call_id_of(item) is not None and place not in outputs]


def _outputs_of_calls(items: Sequence[Item]) -> dict[int, Item]:
    """The output of each call that has one, by the call's place; some servers use an id again in a later turn."""
    unused: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if item.get("type") in _OUTPUTS:
            unused.setdefault(str(item.get("call_id")), []).append(place)
    outputs: dict[int, Item] = {}
    for place, item in enumerate(items):
        waiting = unused.get(call_id_of(item) or "")
        if waiting:
            behind = next((n for n, output in enumerate(waiting) if output > place), 0)
            outputs[place] = items[waiting.pop(behind)]
    return outputs


def repair(items: Iterable[Item], started: Iterable[str] = ()) -> list[Item]:
    """The items as a model's server accepts them: each call followed by its one output, no output without a call.

    A call without an output is closed with `UNKNOWN` if it is among `started`, else with `NOT_RUN`. Calls of one
    model turn stay together, their outputs right behind them. Idempotent.
    """
    items = list(items)
    may_have_run = set(started)
    outputs = _outputs_of_calls(items)
    repaired: list[Item] = []
    pending: dict[str, Item] = {}  # outputs of the calls of the turn at hand, by call id
    for place, item in enumerate(items):
        call_id = call_id_of(item)
        if call_id is not None:
            if call_id not in pending:
                pending[call_id] = outputs.get(place) or closing(item, may_have_run=call_id in may_have_run)
                repaired.append(item)
            continue
        is_output = item.get("type") in _OUTPUTS
        # an output ends its turn; reasoning between parallel calls does not
        if is_output or item.get("type") != "reasoning":
            repaired.extend(pending.values())
            pending = {}
        if not is_output:
            repaired.append(item)
    return [*repaired, *pending.values()]


def closing(call: Item, *, may_have_run: bool) -> Item:
    """The output item that closes a call nobody saw the end of."""
    text = UNKNOWN if may_have_run else NOT_RUN
    kind = str(call["type"])
    output: Item = {"type": _OUTPUT_OF[kind], "call_id": call["call_id"], "output": text}
    match kind:
        case "shell_call":
            return output | {"output": [_shell_output(text)]}
        case "apply_patch_call":
            return output | {"status": "failed"}  # required by the API
        case "computer_call":
            return output | {"output": {"type": "computer_screenshot", "image_url": _BLANK}}  # text is refused
    return output


def _shell_output(text: str) -> Item:
    return {"stdout": "", "stderr": text, "outcome": {"type": "exit", "exit_code": 1}}
