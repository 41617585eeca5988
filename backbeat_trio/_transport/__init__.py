"""Transports for messages, and stores for the record: over NATS, or inside the process.

It imports `_time` and the layers below that.
"""
