"""Measures the kernels against the machine's limits and against their peers, in one run.

`generators` are the networks measured, `flops` counts their useful work, `limits` what the machine can do
at best, `peers` does the same projection with other means, `run` times all of it, `report` makes the table
and the plot.
"""
