"""The only speller of queue and topic names.

A name is `kind:rest`. Keepers that shard put what follows the first colon on one shard: all topics of a conversation
stay together, and so does all of one agent's queue.
"""

from __future__ import annotations


def log(conversation_id: str) -> str:
    """What happened in a conversation."""
    return f"log:{conversation_id}"


def commands(conversation_id: str) -> str:
    """Cancel, steer, approve, reject: what a worker follows while it runs a conversation."""
    return f"commands:{conversation_id}"


def signal(topic: str) -> str:
    """A topic of the signals tool."""
    return f"signal:{topic}"


def queue(agent: str) -> str:
    """The work of one agent; the ordering key is the conversation id."""
    return f"agent:{agent}"


def dead_letters(agent: str) -> str:
    """What an agent's workers gave up on."""
    return f"dead:{agent}"


def split(name: str) -> tuple[str, str]:
    """`(kind, rest)` of a name."""
    kind, _, rest = name.partition(":")
    return kind, rest
