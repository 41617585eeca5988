"""Following a leader, leading, and standing by.

It imports `_transport` and the layers below that.
"""
