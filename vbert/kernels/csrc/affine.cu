// Each tenant's scale and shift of its own rows: out = x g + b. A warp does a row.
#include "device.cuh"

struct Affine {
    const int* blocks;            // [n, 3]
    const Scalar *x, *scale, *shift;  // [T, H], [P, H], [P, H]; scale or shift may be null
    Scalar* out;                  // [T, H], may be x
    Index x_stride, scale_stride, shift_stride, out_stride;
    int width;
};

extern "C" __global__ void __launch_bounds__(256) affine(const __grid_constant__ Affine args) {
    const Block block = block_of(args.blocks, blockIdx.x);
    const int lane = threadIdx.x % WARP;
    const Scalar* scale = args.scale + block.slot * args.scale_stride;
    const Scalar* shift = args.shift + block.slot * args.shift_stride;
    for (int r = threadIdx.x / WARP; r < block.count; r += blockDim.x / WARP) {
        const Scalar* x = args.x + (block.first + r) * args.x_stride;
        Scalar* out = args.out + (block.first + r) * args.out_stride;
        for (int h = lane; h < args.width; h += WARP) {
            float y = to_float(x[h]);
            if (args.scale) y *= to_float(scale[h]);
            if (args.shift) y += to_float(shift[h]);
            out[h] = from_float(y);
        }
    }
}
