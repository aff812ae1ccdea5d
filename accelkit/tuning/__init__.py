"""Choices measured on the machine at hand: problem -> candidates -> the fastest right one, kept on disk.

    choices    what calls look up: by device and problem, one dict access, loaded from disk by the first
    files      one JSON file for each GPU, driver and set of versions
    problems   what can be tuned: the operands of each kind of problem, its candidates, its plain meaning
    measuring  one problem: every candidate checked against float64, the right ones timed in turns
    tuner      many problems within a budget, their kernels compiled by other processes (compiling)

What FasterTransformer's `vit_gemm` did, without its file in the current folder. Nothing is tuned inside a call: without
tuning the rules of `accelkit.kernels` decide. `accelkit tune` and `FasterTransformer(tune=...)` tune.
"""
