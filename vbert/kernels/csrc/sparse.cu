// Each tenant's sparse weight change of its own rows: out += x S^T, S in compressed rows.
//
// A thread block does 32 rows and 64 outputs. A lane is a row, so that one non-zero serves a warp at a time; the inputs
// lie transposed in shared memory, DEPTH of them at a time, and a warp skips the non-zeros outside.
#include "device.cuh"

constexpr int SPARSE_ROWS = 32, SPARSE_OUTPUTS = 64, SPARSE_WARPS = 8, DEPTH = 256;
constexpr int EACH = SPARSE_OUTPUTS / SPARSE_WARPS;  // outputs of a warp

struct Sparse {
    const int* blocks;                  // [n, 3]
    const int *row_starts, *columns;    // [P, H_out + 1], [P, N]
    const Scalar *x, *values;           // [T, H_in], [P, N]
    Scalar* out;                        // [T, H_out]
    Index row_starts_stride, columns_stride, x_stride, values_stride, out_stride;
    int width_in, width_out;
};

extern "C" __global__ void __launch_bounds__(SPARSE_WARPS* WARP) sparse(const __grid_constant__ Sparse args) {
    __shared__ float inputs[DEPTH * (SPARSE_ROWS + 1)];  // afterwards the sums, [SPARSE_ROWS, SPARSE_OUTPUTS + 1]
    const Block block = block_of(args.blocks, blockIdx.x);
    if (block.count == 0) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, output0 = blockIdx.y * SPARSE_OUTPUTS;
    const int* starts = args.row_starts + block.slot * args.row_starts_stride;
    const int* columns = args.columns + block.slot * args.columns_stride;
    const Scalar* values = args.values + block.slot * args.values_stride;
    float sum[EACH] = {};
    for (int k = 0; k < args.width_in; k += DEPTH) {
        const int depth = least(DEPTH, args.width_in - k);
        for (int i = threadIdx.x; i < SPARSE_ROWS * depth; i += blockDim.x) {
            const int r = i / depth, c = i % depth;
            const Scalar* x = args.x + (block.first + r) * args.x_stride + k + c;
            inputs[c * (SPARSE_ROWS + 1) + r] = r < block.count ? to_float(*x) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            const int output = output0 + n * SPARSE_WARPS + warp;
            if (output >= args.width_out) break;
            for (int e = starts[output]; e < starts[output + 1]; e++) {
                const int c = columns[e] - k;
                if (c >= 0 && c < depth) sum[n] += to_float(values[e]) * inputs[c * (SPARSE_ROWS + 1) + lane];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < EACH; n++) inputs[lane * (SPARSE_OUTPUTS + 1) + n * SPARSE_WARPS + warp] = sum[n];
    __syncthreads();
    for (int i = threadIdx.x; i < block.count * SPARSE_OUTPUTS; i += blockDim.x) {
        const int r = i / SPARSE_OUTPUTS, c = i % SPARSE_OUTPUTS;
        if (output0 + c >= args.width_out) continue;
        Scalar* out = args.out + (block.first + r) * args.out_stride + output0 + c;
        *out = from_float(to_float(*out) + inputs[r * (SPARSE_OUTPUTS + 1) + c]);
    }
}
