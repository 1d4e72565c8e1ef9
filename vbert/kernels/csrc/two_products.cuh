// out += act(x D + d) U + e: what a low-rank update (no biases, no activation) and a bottleneck adapter share.
#pragma once
#include "device.cuh"

constexpr int ROWS = 32;  // of one block of work: BLOCK_ROWS in vbert/batch.py
constexpr int MAX_SITES = 3;
constexpr int COLUMNS = 128;  // of `out`, at a time

struct Site {
    const Scalar *down, *up, *narrow_bias, *wide_bias;  // [P, H_in, R], [P, R, H_out], [P, R], [P, H_out]; biases or null
    Scalar* out;                                        // [T, H_out]
    Index down_stride, up_stride, narrow_bias_stride, wide_bias_stride, out_stride;
    int rank, width_out;
};

struct TwoProducts {
    const int* blocks;  // [n, 3]
    const Scalar* x;    // [T, H_in]
    Index x_stride;
    int width_in, activation, shared_bytes;
    Site sites[MAX_SITES];  // they read the same rows; one per blockIdx.y
};

// The codes are those of vbert/kernels/two_products.py.
__device__ inline float activate(float x, int code) {
    if (code == 0) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    if (code == 1) return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    if (code == 2) return fmaxf(x, 0.0f);
    if (code == 3) return x / (1.0f + expf(-x));
    if (code == 4) return tanhf(x);
    return x;
}

// How much of the inner width a chunk holds, when two chunks of `per_depth` numbers a step (and `fixed` ones) share the
// memory: a multiple of 64, and chunks of about equal size.
__device__ inline int chunk_depth(int shared_bytes, int per_depth, int fixed, int width_in) {
    const int most = (shared_bytes / (2 * (int)sizeof(Scalar)) - fixed) / per_depth / 64 * 64;
    const int chunks = ceil_div(width_in, most);
    return ceil_div(ceil_div(width_in, chunks), 64) * 64;
}
