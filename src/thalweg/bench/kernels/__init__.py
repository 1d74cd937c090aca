"""Kernels by themselves: every op's implementations at a model's real shapes, checked, then timed beside a floor.

Read case.py (what is compared), then decode.py, prefill.py and seeds.py (the cases), then measure.py.
"""
