"""Turns are written down before anything is made of their texts; here that is made up for."""

from __future__ import annotations

from ..rules.analysis import recorded
from .parts import Parts

_BATCH = 128  # entries of one transaction: some 20 ms of work


def analyse(parts: Parts) -> None:
    """Work out what search needs of texts, and what they are worth, where that was not done yet, of all owners."""
    while not parts.closing and (entries := parts.ledger.unanalysed(limit=_BATCH)):
        parts.ledger.analysed([recorded(entry) for entry in entries])


__all__ = ["analyse"]
