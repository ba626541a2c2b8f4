"""Pallas kernels for NVIDIA GPUs, one family a file; `backend` alone names what lowers them."""
