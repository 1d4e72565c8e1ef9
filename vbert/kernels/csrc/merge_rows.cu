// Overlap-add of tri-gram rows to tokens: h_i = u_i[1] + u_{i+1}[0] + u_{i-1}[2] inside a sequence. A warp does a token.
//
// SCALAR is what `out` holds; the rows come in `row_scalar`, by the same codes.
#include "device.cuh"

struct MergeRows {
    const void* rows;       // [T, 3, H], the last two contiguous
    const int* cu_seqlens;  // [B + 1]
    Scalar* out;            // [T, H]
    Index row_stride, out_stride;
    int tokens, sequences, width, row_scalar;
};

__device__ inline float number_at(const MergeRows& args, Index at) {
    if (args.row_scalar == 0) return static_cast<const float*>(args.rows)[at];
    const unsigned short bits = static_cast<const unsigned short*>(args.rows)[at];
    return args.row_scalar == 1 ? float_of_half(bits) : float_of_bfloat16(bits);
}

// The sequence that holds a token: the last that begins at it or before, of those that are not empty.
__device__ inline int sequence_of(const MergeRows& args, int token) {
    int low = 0, high = args.sequences;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (args.cu_seqlens[middle] <= token)
            low = middle;
        else
            high = middle;
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(256) merge_rows(const __grid_constant__ MergeRows args) {
    const int token = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (token >= args.tokens) return;
    const int sequence = sequence_of(args, token);
    const bool after = token + 1 < args.cu_seqlens[sequence + 1], before = token > args.cu_seqlens[sequence];
    const Index width = args.width, at = token * args.row_stride;
    Scalar* out = args.out + token * args.out_stride;
    for (int h = threadIdx.x % WARP; h < args.width; h += WARP) {
        float y = number_at(args, at + width + h);
        if (after) y += number_at(args, at + args.row_stride + h);
        if (before) y += number_at(args, at - args.row_stride + 2 * width + h);
        out[h] = from_float(y);
    }
}
