"""One torch thread in every test process: the models are tiny, and the workers of `make test` share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
