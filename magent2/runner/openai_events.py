"""What the SDK says, in our words: pure functions, each over one shape of the SDK. The version is pinned by tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from agents.items import ModelResponse, TResponseInputItem
from agents.usage import Usage as SdkUsage

from magent2.models.events import Usage
from magent2.models.text import mended
from magent2.store.history import Item, JournalEntry, ModelTurn, call_id_of

SUMMARY_CHARS = 500

TEXT_DELTA = "response.output_text.delta"
REASONING_DELTAS = frozenset({"response.reasoning_summary_text.delta", "response.reasoning_text.delta"})
RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})


def portable(items: Iterable[TResponseInputItem | Item]) -> list[Item]:
    """Items as any server of either wire takes them, now and later.

    Ids are left out: a server that does not know them refuses the request, and the chat wire has fake ones. So is
    reasoning, which is refused without the very item that followed it. Plain answers become plain messages.
    """
    return [mended(_portable(dict(item))) for item in items if item.get("type") != "reasoning"]


def _portable(item: Item) -> Item:
    if item.get("type") == "message" and item.get("role") == "assistant":
        parts = item.get("content")
        if isinstance(parts, list) and all(part.get("type") == "output_text" for part in parts):
            return {"role": "assistant", "content": "".join(part["text"] for part in parts)}
    # other types, those of hosted tools, are nothing without their id and status
    plain = item.get("type") in ("message", "function_call", "function_call_output")
    dropped = ("id", "status", "provider_data") if plain else ("provider_data",)
    return {name: value for name, value in item.items() if name not in dropped}


def text_of(items: Sequence[Item]) -> str:
    """The text the model said in these items of one model turn."""
    texts: list[str] = []
    for item in items:
        if item.get("role") != "assistant":
            continue
        content = item.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [part.get("text", "") for part in content if part.get("type") == "output_text"]
    return "".join(texts)


def finished(journal: Sequence[JournalEntry]) -> ModelTurn | None:
    """The model turn that was the answer, when the journal ends with one."""
    last = journal[-1] if journal else None
    return last if isinstance(last, ModelTurn) and is_answer(last) else None


def is_answer(entry: JournalEntry) -> bool:
    """Whether this is a model turn that says something and calls nothing: it ends a run."""
    return (
        isinstance(entry, ModelTurn)
        and not any(call_id_of(item) for item in entry.items)
        and bool(text_of(entry.items))
    )


def usage_of(used: SdkUsage) -> Usage:
    """The SDK's count as ours."""
    return Usage(
        requests=used.requests,
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        total_tokens=used.total_tokens,
    )


def total(usages: Iterable[Usage | None]) -> Usage | None:
    """The sum of those that are known; None if none is."""
    known = [usage for usage in usages if usage is not None]
    if not known:
        return None
    return Usage(
        requests=sum(usage.requests for usage in known),
        input_tokens=sum(usage.input_tokens for usage in known),
        output_tokens=sum(usage.output_tokens for usage in known),
        total_tokens=sum(usage.total_tokens for usage in known),
    )


def response_text(response: ModelResponse) -> str:
    """The text of a model response."""
    return text_of(portable(response.to_input_items()))


def parsed(arguments: str) -> dict[str, Any] | str:
    """A call's arguments as an object; as they are where the model wrote none."""
    try:
        value = json.loads(arguments or "{}")
    except ValueError:
        return mended(arguments)  # type: ignore[no-any-return]
    return mended(value) if isinstance(value, dict) else mended(arguments)  # type: ignore[no-any-return]


def summary(output: object) -> str:
    """What a tool said, short enough for the stream."""
    text: str = mended(output if isinstance(output, str) else json.dumps(output, ensure_ascii=False, default=str))
    return text if len(text) <= SUMMARY_CHARS else text[: SUMMARY_CHARS - 1] + "…"
