"""The command line.

It may import everything else.
"""
