"""NVIDIA GPUs: packed weights, kernels in CUDA C++ for few tokens and in Triton for many."""
