"""The pure core: the grid, cluster time, and what an agent believes.

It imports `_wire` and below, and reads no clock.
"""
