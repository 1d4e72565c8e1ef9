// Rows of a table by index, as bytes. A warp does a row.
#include "device.cuh"

struct GatherRows {
    const unsigned char* table;  // [N, row_bytes]
    const Index* index;          // [n], -1: a row of zeros
    unsigned char* out;          // [n, row_bytes]
    Index table_stride, out_stride, row_bytes, rows;  // strides in bytes
};

template <typename Word>
__device__ inline void gather(const GatherRows& args, Word zero) {
    const Index row = (Index)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= args.rows) return;
    const Index from = args.index[row];
    const Word* in = reinterpret_cast<const Word*>(args.table + (from < 0 ? 0 : from) * args.table_stride);
    Word* out = reinterpret_cast<Word*>(args.out + row * args.out_stride);
    for (Index i = threadIdx.x % WARP; i < args.row_bytes / (Index)sizeof(Word); i += WARP)
        out[i] = from < 0 ? zero : in[i];
}

extern "C" __global__ void __launch_bounds__(256) gather_rows(const __grid_constant__ GatherRows args) {
    const Index all = args.table_stride | args.out_stride | args.row_bytes;
    if (aligned(args.table) && aligned(args.out) && all % 16 == 0)
        gather(args, uint4{0, 0, 0, 0});
    else
        gather(args, (unsigned char)0);
}
