"""The grid in Trio: budgets, sleeps and iterators of beats, and one timer for all of them.

It imports `_grid` and the layers below that.
"""
