"""For tests that need a GPU: `make test-gpu` runs them, and elsewhere they are skipped with a word.

A test file says `pytestmark = needs_gpu`, and works on `GPU`.
"""

import pytest
import torch

GPU = torch.device("cuda", 0)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch sees"),
    # advice of torch's compiler, which knows no fp32 but that of tensor cores, and of tiny shapes no better way
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled:UserWarning"),
]
