"""magent2: the runtime that puts agents written with the OpenAI Agents SDK into service."""

__version__ = "0.1.0"
