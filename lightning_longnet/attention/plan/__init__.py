"""The blocks that a call computes: pure functions of integers."""
