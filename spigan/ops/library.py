"""The torch.library namespace `spigan::` in which kernels are registered, so that torch.compile and export see them.

Only kernels are registered: a reference is plain PyTorch, which compilers trace and autograd differentiates.
"""

import torch

library = torch.library.Library("spigan", "FRAGMENT")
