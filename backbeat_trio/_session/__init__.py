"""What an application calls, and the nursery behind it.

It imports `_runtime` and below.
"""
