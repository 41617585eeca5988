"""The pure core: the grid, the estimate of cluster time, and which messages an agent believes.

It imports only `_wire` and the modules below that, and reads no clock.
"""
