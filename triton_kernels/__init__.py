"""The operations as Triton kernels. Installed as ``cbam_fused.triton_kernels``.

One file per operation, under the operation's name in ``cbam_fused/schemas.py``.
"""
