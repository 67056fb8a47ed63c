"""Kernels in C++ for training and decoding on a CPU in float32, compiled where they run."""
