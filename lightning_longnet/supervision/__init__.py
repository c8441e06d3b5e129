"""Supervision of the ranks of a node from outside: what each is at, when to end them, and when to start them again.

It imports nothing but the standard library, so that a supervisor starts at once and holds little memory.
"""
