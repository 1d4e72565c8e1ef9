// What the kernels need of the device, in one place: numbers of 32 and 16 bits, asynchronous copies to shared memory, and
// the tensor core. No CUDA header is included, so NVRTC compiles the kernels wherever cupy runs, and a host compiler
// does behind tests/kernels/emulator.hpp, which replaces the part in EMULATED below.
//
// SCALAR says what the rows and slots hold: 0 float32, 1 float16, 2 bfloat16. Arithmetic is float32.
#pragma once

#ifndef SCALAR
#define SCALAR 2
#endif

typedef long long Index;

#if SCALAR == 0
typedef float Scalar;
#else
struct Scalar {
    unsigned short bits;
};
#endif

constexpr int VECTOR = 16 / sizeof(Scalar);  // numbers of one 16-byte access
constexpr int WARP = 32;

union Vector {
    uint4 words;
    Scalar at[VECTOR];
};

#ifndef EMULATED

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

__device__ inline float float_of_bfloat16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
__device__ inline float float_of_half(unsigned short bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}
__device__ inline unsigned short bfloat16_of(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
__device__ inline unsigned short half_of(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// 16 bytes from global to shared memory, zeros where not valid; there after `wait_copies`. Both addresses are aligned.
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
    unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// What was copied since the last call is one group.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most `newest` groups of this thread are under way. Others see the bytes after a barrier.
template <int newest>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

#if SCALAR != 0
// c [16, 8] += a [16, 16] b [16, 8], spread over the lanes of a warp. With g = lane / 4 and t = lane % 4:
// a: rows g, g + 8, g, g + 8 at depths 2t, 2t, 2t + 8, 2t + 8 (and the next); b: column g at depths 2t, 2t + 8 (and the
// next); c: row g at columns 2t, 2t + 1, then row g + 8. Source: PTX ISA, "Matrix fragments for mma.m16n8k16".
__device__ inline void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if SCALAR == 1
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
    asm volatile(MMA "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#undef MMA
}
#endif

#endif  // EMULATED

#if SCALAR == 0
__device__ inline float to_float(Scalar x) { return x; }
__device__ inline Scalar from_float(float x) { return x; }
#elif SCALAR == 1
__device__ inline float to_float(Scalar x) { return float_of_half(x.bits); }
__device__ inline Scalar from_float(float x) { return Scalar{half_of(x)}; }
#else
__device__ inline float to_float(Scalar x) { return float_of_bfloat16(x.bits); }
__device__ inline Scalar from_float(float x) { return Scalar{bfloat16_of(x)}; }
#endif

#if SCALAR != 0
__device__ inline unsigned pack(Scalar low, Scalar high) { return low.bits | ((unsigned)high.bits << 16); }
// Two neighbours of shared memory, the first at an even position.
__device__ inline unsigned pair(const Scalar* p) { return *reinterpret_cast<const unsigned*>(p); }
#endif

// The sum of `x` over the lanes of a warp, in every lane.
__device__ inline float warp_sum(float x) {
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ inline Scalar zero() { return from_float(0.0f); }
__device__ inline int least(int a, int b) { return a < b ? a : b; }
__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ inline bool aligned(const void* p) { return ((unsigned long long)p & 15) == 0; }

// One unit of work: at most 32 rows of a batch that use one slot. A count of 0 is padding, nobody's.
struct Block {
    int slot, first, count;
};
__device__ inline Block block_of(const int* blocks, int n) {
    return Block{blocks[3 * n], blocks[3 * n + 1], blocks[3 * n + 2]};
}

// A tile [rows, columns] of shared memory, `width` numbers apart, from a matrix; zeros beyond have_rows, have_columns.
// columns and width are multiples of VECTOR. The threads of a block share the work; the caller closes the group.
__device__ inline void copy_tile(Scalar* tile, int width, const Scalar* from, Index stride, int rows, int columns,
                                 int have_rows, int have_columns) {
    if (aligned(from) && stride % VECTOR == 0 && have_columns % VECTOR == 0) {
        const int vectors = columns / VECTOR;
        for (int i = threadIdx.x; i < rows * vectors; i += blockDim.x) {
            const int r = i / vectors, c = i % vectors * VECTOR;
            const bool valid = r < have_rows && c < have_columns;
            copy_async(tile + r * width + c, valid ? from + r * stride + c : from, valid);
        }
    } else {
        for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
            const int r = i / columns, c = i % columns;
            tile[r * width + c] = r < have_rows && c < have_columns ? from[r * stride + c] : zero();
        }
    }
}
