"""The grid as Trio's tasks see it: budgets, iterators, and one timer for all of them.

It imports `_grid` and below.
"""
