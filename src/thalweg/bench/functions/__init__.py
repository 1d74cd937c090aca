"""What each function of this package costs in a fixed workload on a CPU, and what a change did to that.

Read workload.py (what runs), hooks.py (what is counted), record.py (the file), then compare.py and report.py.
"""
