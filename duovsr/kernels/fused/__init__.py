"""The Triton kernels. Only `duovsr.kernels.dispatch` imports them, where Triton can run."""
