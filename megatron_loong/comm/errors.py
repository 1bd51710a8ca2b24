"""The one error of the communication layer."""

from __future__ import annotations


class CommunicationError(RuntimeError):
    """A hop or an all-to-all failed or ran out of time; says which group, which step and which peer."""
