"""Every test runs under the guards an entry point puts up, before any library reads them.

Triton's kernels are interpreted on the CPU; what compiles them for a GPU runs in a process of its
own.
"""

import os

from rellax_ds import runtime

runtime.guard_environment()
os.environ["TRITON_INTERPRET"] = "1"
