"""A GPU that is there for a quarter of an hour: three calls that test, measure and tune, and lose nothing when cut.

python -m bench.lease plan                       # the stages, and how long each may take
python -m bench.lease check OUT --warm FILE      # on the GPU: tests, and compilation beside them
python -m bench.lease measure OUT                # on the GPU: the training step, a process a form
python -m bench.lease rest OUT                   # on the GPU: attention, sanitizers, tuning, what is left
python -m bench.lease table OUT                  # the short table again, anywhere
python -m bench.lease rehearse OUT               # all of it without a GPU
"""

from __future__ import annotations

import time

# A call's time counts from here: what is imported after this, and the search for the GPU, are part of it.
BEGUN = time.monotonic()
