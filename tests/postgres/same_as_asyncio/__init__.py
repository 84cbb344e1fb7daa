"""Scenarios, by theme: what can be done with a connection, on asyncio as on Trio.

`../test_same_as_asyncio.py` runs each of them on both, and compares what they saw.
"""
