// Two products of the rows of a tenant, in float32: out += act(x D + d) U + e. TF32 would keep only 10 bits, so these are
// plain multiply-adds. One thread block does 32 rows of one site.
#include "two_products.cuh"

#if SCALAR == 0
constexpr int THREADS = 8 * WARP;
constexpr int RANKS = 64;  // at a time: eight sums a thread
constexpr int NARROW_WIDTH = RANKS + 1;
constexpr int HALF_ROWS = ROWS / 2;

// act(x D + d) to `narrow` [ROWS, NARROW_WIDTH]: a lane is a row, and a warp does every eighth rank.
__device__ inline void multiply_down(const TwoProducts& args, const Site& site, Block block, int rank0, int rank,
                                     float* narrow, Scalar* pool) {
    const int down_width = ceil_div(rank, 4) * 4;
    const int narrow_bytes = ROWS * NARROW_WIDTH * (int)sizeof(float);
    const int depth = chunk_depth(args.shared_bytes - narrow_bytes, ROWS + down_width, ROWS * 4, args.width_in);
    const int x_width = depth + 4, chunk_numbers = ROWS * x_width + depth * down_width;
    const int chunks = ceil_div(args.width_in, depth), warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Scalar* x = args.x + block.first * args.x_stride;
    const Scalar* down = site.down + block.slot * site.down_stride + rank0;
    float sum[RANKS / 8] = {};

    auto load = [&](int chunk) {
        Scalar* xs = pool + chunk % 2 * chunk_numbers;
        const int k = chunk * depth, have = args.width_in - k;
        copy_tile(xs, x_width, x + k, args.x_stride, ROWS, depth, block.count, have);
        copy_tile(xs + ROWS * x_width, down_width, down + (Index)k * site.rank, site.rank, depth, down_width, have, rank);
        close_copies();
    };
    load(0);
    for (int chunk = 0; chunk < chunks; chunk++) {
        if (chunk + 1 < chunks) {
            load(chunk + 1);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        const Scalar* xs = pool + chunk % 2 * chunk_numbers + lane * x_width;
        const Scalar* ds = pool + chunk % 2 * chunk_numbers + ROWS * x_width + warp;
        for (int k = 0; k < depth; k++) {
#pragma unroll
            for (int i = 0; i < RANKS / 8; i++) {
                if (warp + 8 * i >= rank) break;
                sum[i] += xs[k] * ds[k * down_width + 8 * i];
            }
        }
        __syncthreads();  // the next copies may overwrite this chunk
    }
#pragma unroll
    for (int i = 0; i < RANKS / 8; i++) {
        const int j = warp + 8 * i;
        if (j >= rank) break;
        const float bias = site.narrow_bias ? site.narrow_bias[block.slot * site.narrow_bias_stride + rank0 + j] : 0.0f;
        narrow[lane * NARROW_WIDTH + j] = activate(sum[i] + bias, args.activation);
    }  // others read it behind the barrier of their first columns
}

// out += narrow U + e: a thread does one of 128 columns in half of the rows.
__device__ inline void multiply_up(const Site& site, Block block, int rank0, int rank, const float* narrow, Scalar* pool) {
    const Scalar* up = site.up + block.slot * site.up_stride + (Index)rank0 * site.width_out;
    const int row0 = threadIdx.x / COLUMNS * HALF_ROWS;
    for (int first = 0; first < site.width_out; first += COLUMNS) {
        copy_tile(pool, COLUMNS, up + first, site.width_out, rank, COLUMNS, rank, site.width_out - first);
        close_copies();
        wait_copies<0>();
        __syncthreads();
        const int column = first + threadIdx.x % COLUMNS;
        float sum[HALF_ROWS] = {};
        for (int j = 0; j < rank; j++) {
            const float u = pool[j * COLUMNS + threadIdx.x % COLUMNS];
#pragma unroll
            for (int r = 0; r < HALF_ROWS; r++) sum[r] += narrow[(row0 + r) * NARROW_WIDTH + j] * u;
        }
        if (column < site.width_out) {
            const bool biased = site.wide_bias && rank0 == 0;
            const float bias = biased ? site.wide_bias[block.slot * site.wide_bias_stride + column] : 0.0f;
#pragma unroll
            for (int r = 0; r < HALF_ROWS; r++)
                if (row0 + r < block.count)
                    site.out[(block.first + row0 + r) * site.out_stride + column] += sum[r] + bias;
        }
        __syncthreads();  // the next copies may overwrite these columns
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) two_products_32(const __grid_constant__ TwoProducts args) {
    DYNAMIC_SHARED(shared);
    float* narrow = reinterpret_cast<float*>(shared);
    Scalar* pool = narrow + ROWS * NARROW_WIDTH;  // 8,320 bytes: aligned
    const Site& site = args.sites[blockIdx.y];
    const Block block = block_of(args.blocks, blockIdx.x);
    if (block.count == 0) return;
    for (int rank0 = 0; rank0 < site.rank; rank0 += RANKS) {
        const int rank = least(site.rank - rank0, RANKS);
        multiply_down(args, site, block, rank0, rank, narrow, pool);
        multiply_up(site, block, rank0, rank, narrow, pool);
    }
}
#endif
