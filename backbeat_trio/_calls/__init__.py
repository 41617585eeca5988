"""Messages that carry a caller's deadline, and requests to cancel an operation.

It imports `_runtime` and below.
"""
