"""The benchmark: one registry of cases, measured with parity beside it, reported with its spread.

    cases.py      what is measured: operator, sizes, group
    problems.py   how the inputs of a case are made; shared by speed, memory and parity
    formulas.py   bytes and operations of every operator
    backends.py   who is measured: reference, portable, their compiled forms, triton, SDPA
    parity.py     who may show a speed-up
    timing.py, memory.py, tracing.py, roofline.py, environment.py    how it is measured
    measure.py, network.py, steps.py, pipeline.py    a case becomes rows
    rows.py, report.py, plots.py, compare.py    what is written
    run.py        all of it in order

Run it with ``simmp-fast bench`` or ``pytest bench``; docs/benchmark.md explains every number.
"""

import os

# The profiler, which counts memory and launches, otherwise announces every start and stop on the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
