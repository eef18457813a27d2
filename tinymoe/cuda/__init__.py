"""The components again, as raw CUDA kernels: on a GPU through CuPy, on any CPU through the emulator."""
