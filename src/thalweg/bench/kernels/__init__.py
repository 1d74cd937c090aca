"""Kernels by themselves: every op's implementations at the sizes that a model asks for, checked, then timed beside a
floor.

Read model.py (the sizes), case.py (what is compared), suites.py and the makers it lists (the cases), then measure.py.
"""
