"""Calls between services: the headers that carry a caller's deadline, and what reads them.

It imports `_runtime` and below.
"""
