"""What carries messages and keeps the record: NATS, or the process itself.

It imports `_time` and below.
"""
