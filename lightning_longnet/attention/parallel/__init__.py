"""Attention over a sequence that is split over ranks: who holds, sends and computes what."""
