"""What an application calls, and how a session begins and ends.

It imports `_runtime` and below.
"""
