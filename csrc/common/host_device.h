// SPIGAN_HD marks the small functions that CPU code and CUDA kernels share, so that both execute the same arithmetic.
#pragma once

#if defined(__CUDACC__)
#define SPIGAN_HD __host__ __device__ __forceinline__
#else
#define SPIGAN_HD inline
#endif
