"""The one error of the communication layer."""

from __future__ import annotations

from megatron_loong.topology.errors import CommunicationError as CommunicationError
