// Two products of the rows of a tenant, in 16 bits on the tensor cores: out += act(x D + d) U + e.
//
// One thread block does 32 rows of one site: x is read once, `out` is read and written once, ranks are padded to 8 in
// registers and shared memory only. Eight warps: two tiles of 16 rows, each four times; the four split the inner width
// of the first product, and the columns of the second.
#include "two_products.cuh"

#if SCALAR != 0
constexpr int THREADS = 8 * WARP;
constexpr int PARTS = 4;
constexpr int UP_WIDTH = COLUMNS + 8;  // numbers between rows of U in shared memory

// Where a thread works: its row tile, its part, and its place in a fragment (see `mma`).
struct Place {
    int tile, part, g, t;
};

template <int RANKS>
struct Narrow {
    unsigned at[RANKS / 16][4];  // act(x D + d), as the left operand of the second product
};

// Sums of this thread's part of x D to shared memory: [PARTS, ROWS, width].
template <int RANKS>
__device__ inline void multiply_down(const TwoProducts& args, const Site& site, Block block, int rank0, int width,
                                     Place at, unsigned char* shared) {
    const int down_width = width % 16 ? width : width + 8;  // an odd number of 16 bytes: few bank conflicts
    const int depth = chunk_depth(args.shared_bytes, ROWS + down_width, ROWS * 8, args.width_in);
    const int x_width = depth + 8, chunk_numbers = ROWS * x_width + depth * down_width;
    const int chunks = ceil_div(args.width_in, depth);
    const Scalar* x = args.x + block.first * args.x_stride;
    const Scalar* down = site.down + block.slot * site.down_stride + rank0;
    Scalar* pool = reinterpret_cast<Scalar*>(shared);
    float sum[RANKS / 8][4] = {};

    auto load = [&](int chunk) {
        Scalar* xs = pool + chunk % 2 * chunk_numbers;
        const int k = chunk * depth, have = args.width_in - k;
        copy_tile(xs, x_width, x + k, args.x_stride, ROWS, depth, block.count, have);
        copy_tile(xs + ROWS * x_width, down_width, down + (Index)k * site.rank, site.rank, depth, width, have,
                  site.rank - rank0);
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
        const Scalar* xs = pool + chunk % 2 * chunk_numbers;
        const Scalar* ds = xs + ROWS * x_width;
        for (int k = at.part * depth / PARTS; k < (at.part + 1) * depth / PARTS; k += 16) {
            const Scalar* row = xs + (at.tile * 16 + at.g) * x_width + k + 2 * at.t;
            const unsigned a[4] = {pair(row), pair(row + 8 * x_width), pair(row + 8), pair(row + 8 * x_width + 8)};
#pragma unroll
            for (int n = 0; n < RANKS / 8; n++) {
                if (n * 8 >= width) break;
                const Scalar* d = ds + (k + 2 * at.t) * down_width + n * 8 + at.g;
                const unsigned b[2] = {pack(d[0], d[down_width]), pack(d[8 * down_width], d[9 * down_width])};
                mma(sum[n], a, b);
            }
        }
        __syncthreads();  // the next copies may overwrite this chunk
    }
    float* sums = reinterpret_cast<float*>(shared) + (at.part * ROWS + at.tile * 16 + at.g) * width + 2 * at.t;
#pragma unroll
    for (int n = 0; n < RANKS / 8; n++) {
        if (n * 8 >= width) break;
        sums[n * 8] = sum[n][0];
        sums[n * 8 + 1] = sum[n][1];
        sums[8 * width + n * 8] = sum[n][2];
        sums[8 * width + n * 8 + 1] = sum[n][3];
    }
    __syncthreads();
}

// The narrow rows of this thread's tile, made from the sums of the four parts.
template <int RANKS>
__device__ inline Narrow<RANKS> narrow_rows(const TwoProducts& args, const Site& site, Block block, int rank0,
                                            int width, Place at, const unsigned char* shared) {
    const float* sums = reinterpret_cast<const float*>(shared);
    const Scalar* bias = site.narrow_bias + (site.narrow_bias ? block.slot * site.narrow_bias_stride + rank0 : 0);
    auto number = [&](int row, int j) {
        if (j >= site.rank - rank0 || j >= width) return zero();
        float y = site.narrow_bias ? to_float(bias[j]) : 0.0f;
        for (int part = 0; part < PARTS; part++) y += sums[(part * ROWS + row) * width + j];
        return from_float(activate(y, args.activation));
    };
    Narrow<RANKS> narrow = {};
#pragma unroll
    for (int step = 0; step < RANKS / 16; step++) {
        if (step * 16 >= width) break;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = at.tile * 16 + at.g + i % 2 * 8, j = step * 16 + 2 * at.t + i / 2 * 8;
            narrow.at[step][i] = pack(number(row, j), number(row, j + 1));
        }
    }
    __syncthreads();  // the sums may be overwritten
    return narrow;
}

// out += narrow U + e. Of each 128 columns a warp does 32, and a thread eight neighbours in two rows: 16-byte accesses.
template <int RANKS>
__device__ inline void multiply_up(const Site& site, Block block, int rank0, int width, Place at,
                                   const Narrow<RANKS>& narrow, unsigned char* shared) {
    Scalar* pool = reinterpret_cast<Scalar*>(shared);
    const Scalar* up = site.up + block.slot * site.up_stride + (Index)rank0 * site.width_out;
    const Scalar* bias = site.wide_bias && rank0 == 0 ? site.wide_bias + block.slot * site.wide_bias_stride : nullptr;
    Scalar* out = site.out + (block.first + at.tile * 16 + at.g) * site.out_stride;
    const bool vectors = aligned(site.out) && site.out_stride % VECTOR == 0 && site.width_out % VECTOR == 0;
    const int chunks = ceil_div(site.width_out, COLUMNS);

    auto load = [&](int chunk) {
        copy_tile(pool + chunk % 2 * width * UP_WIDTH, UP_WIDTH, up + chunk * COLUMNS, site.width_out, width, COLUMNS,
                  site.rank - rank0, site.width_out - chunk * COLUMNS);
        close_copies();
    };
    auto has_row = [&](int half) { return at.tile * 16 + at.g + half * 8 < block.count; };
    load(0);
    for (int chunk = 0; chunk < chunks; chunk++) {
        const int column = chunk * COLUMNS + at.part * 32 + 8 * at.t;  // the first of this thread's eight
        Vector old[2];
        for (int half = 0; half < 2; half++)  // asked for before the wait
            if (vectors && has_row(half) && column < site.width_out)
                old[half].words = *reinterpret_cast<const uint4*>(out + half * 8 * site.out_stride + column);
        if (chunk + 1 < chunks) {
            load(chunk + 1);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        const Scalar* us = pool + chunk % 2 * width * UP_WIDTH + at.part * 32 + 8 * (at.g / 2) + at.g % 2;
        float sum[4][4] = {};
#pragma unroll
        for (int step = 0; step < RANKS / 16; step++) {
            if (step * 16 >= width) break;
            const bool second = step * 16 + 8 < width;
            // Column g of product j is column 8 (g / 2) + 2 j + g % 2 of the 32, so that a thread's are neighbours.
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const Scalar* u = us + (step * 16 + 2 * at.t) * UP_WIDTH + 2 * j;
                unsigned b[2] = {pack(u[0], u[UP_WIDTH]), 0};
                if (second) b[1] = pack(u[8 * UP_WIDTH], u[9 * UP_WIDTH]);
                mma(sum[j], narrow.at[step], b);
            }
        }
        for (int half = 0; half < 2; half++) {
            if (!has_row(half) || column >= site.width_out) continue;
            Scalar* to = out + half * 8 * site.out_stride + column;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (column + i >= site.width_out) break;
                const float before = to_float(vectors ? old[half].at[i] : to[i]);
                const float wide = bias ? to_float(bias[column + i]) : 0.0f;
                const Scalar after = from_float(before + sum[i / 2][half * 2 + i % 2] + wide);
                if (vectors)
                    old[half].at[i] = after;
                else
                    to[i] = after;
            }
            if (vectors) *reinterpret_cast<uint4*>(to) = old[half].words;
        }
        __syncthreads();  // the next copies may overwrite this chunk
    }
}

template <int RANKS>
__device__ inline void two_products(const TwoProducts& args) {
    DYNAMIC_SHARED(shared);
    const Site& site = args.sites[blockIdx.y];
    const Block block = block_of(args.blocks, blockIdx.x);
    if (block.count == 0) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Place at = {warp % 2, warp / 2, lane / 4, lane % 4};
    for (int rank0 = 0; rank0 < site.rank; rank0 += RANKS) {
        const int width = ceil_div(least(site.rank - rank0, RANKS), 8) * 8;
        multiply_down<RANKS>(args, site, block, rank0, width, at, shared);
        const Narrow<RANKS> narrow = narrow_rows<RANKS>(args, site, block, rank0, width, at, shared);
        multiply_up<RANKS>(site, block, rank0, width, at, narrow, shared);
    }
}

// Few registers and little shared memory where every rank is at most 16, so that more blocks hide each other's waits.
extern "C" __global__ void __launch_bounds__(THREADS, 4) two_products_16(const __grid_constant__ TwoProducts args) {
    two_products<16>(args);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) two_products_64(const __grid_constant__ TwoProducts args) {
    two_products<64>(args);
}
#endif
