"""What a session runs: operations, claims and health.

It imports `_metronome` and below.
"""
