"""Exact dilated attention: imports torch alone, and is usable without Lightning."""

from lightning_longnet.attention.attend import attend, explain
from lightning_longnet.attention.pattern import Branch, Pattern, Reach

__all__ = ["Branch", "Pattern", "Reach", "attend", "explain"]
