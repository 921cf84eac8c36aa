"""Where there is no CUDA device, Triton kernels run in Triton's interpreter, on CPU tensors.

Triton reads the variable when a kernel's module is first imported, so it is set here, before any test module is.
Nothing but a test that forces the backend gets an interpreted kernel: see `ztok_fast.ops.backends.Backend.unmet`.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
