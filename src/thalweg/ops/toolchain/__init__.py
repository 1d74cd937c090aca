"""What kernels are built and launched with: NVRTC, Triton, rehearsal of compilation, dependent launches."""
