// Each tenant's own LayerNorm of its own rows. A warp does a row.
#include "device.cuh"

struct LayerNorm {
    const int* blocks;                // [n, 3]
    const Scalar *x, *weight, *bias;  // [T, H], [P, H], [P, H]
    Scalar* out;                      // [T, H]
    Index x_stride, weight_stride, bias_stride, out_stride;
    int width;
    float eps;
};

extern "C" __global__ void __launch_bounds__(256) layer_norm(const __grid_constant__ LayerNorm args) {
    const Block block = block_of(args.blocks, blockIdx.x);
    const int lane = threadIdx.x % WARP;
    const Scalar* weight = args.weight + block.slot * args.weight_stride;
    const Scalar* bias = args.bias + block.slot * args.bias_stride;
    for (int r = threadIdx.x / WARP; r < block.count; r += blockDim.x / WARP) {
        const Scalar* x = args.x + (block.first + r) * args.x_stride;
        Scalar* out = args.out + (block.first + r) * args.out_stride;
        float total = 0.0f, squares = 0.0f;
        for (int h = lane; h < args.width; h += WARP) total += to_float(x[h]);
        const float mean = warp_sum(total) / args.width;
        for (int h = lane; h < args.width; h += WARP) {
            const float centred = to_float(x[h]) - mean;
            squares += centred * centred;
        }
        const float inverse = rsqrtf(warp_sum(squares) / args.width + args.eps);
        for (int h = lane; h < args.width; h += WARP)
            out[h] = from_float((to_float(x[h]) - mean) * inverse * to_float(weight[h]) + to_float(bias[h]));
    }
}
