"""gptlab.train with torch's deterministic algorithms: python deterministic_train.py <arguments of gptlab.train>.

cuBLAS also requires CUBLAS_WORKSPACE_CONFIG, which check.sh sets.
"""

import runpy
import sys

import torch

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    sys.argv = ["gptlab.train", *sys.argv[1:]]
    runpy.run_module("gptlab.train", run_name="__main__", alter_sys=True)
