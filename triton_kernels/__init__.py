"""The operations as Triton kernels. Installed as ``cbam_fused.triton_kernels``.

One file per operation, under the operation's name in ``cbam_fused/schemas.py``; the functions here
take the schema's arguments in their order.
"""

from cbam_fused.triton_kernels.cbam_apply import cbam_apply
from cbam_fused.triton_kernels.cbam_attend import cbam_attend
from cbam_fused.triton_kernels.cbam_backward_input import cbam_backward_input
from cbam_fused.triton_kernels.cbam_backward_reduce import cbam_backward_reduce
from cbam_fused.triton_kernels.cbam_inference import cbam_inference

__all__ = [
    "cbam_apply",
    "cbam_attend",
    "cbam_backward_input",
    "cbam_backward_reduce",
    "cbam_inference",
]
