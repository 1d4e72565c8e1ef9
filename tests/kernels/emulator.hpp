// A GPU for the kernels of vbert/kernels/csrc, compiled by a host compiler: the threads of a block are fibers.
//
// Fibers run one after the other until each waits at a barrier, so a missing barrier shows: a warp may run through the
// whole kernel before the next begins (odd phases run the warps backwards). Asynchronous copies happen as late as they
// may, at the wait, and in odd blocks as early as they may; shared memory holds NaN patterns when a block begins and has a guard behind it; a warp whose lanes wait
// at different barriers is an error.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define EMULATED
#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = emulator::shared

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct uint3 {
    unsigned x, y, z;
};
static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
constexpr int LANES = 32, STACK = 64 << 10, GUARD = 4096;
enum State { RUNS, AT_WARP, AT_BLOCK, DONE };
struct Copy {
    void* to;
    const void* from;
    bool valid;
};
static void perform(const Copy& copy) {
    if (copy.valid)
        std::memcpy(copy.to, copy.from, 16);
    else
        std::memset(copy.to, 0, 16);
}
struct Fiber {
    ucontext_t start;
    jmp_buf here;
    std::vector<char> stack = std::vector<char>(STACK);
    State state;
    bool begun;
    std::vector<Copy> open;                // copies since the last close
    std::vector<std::vector<Copy>> groups;  // closed, not there yet
    unsigned exchange[2][8];                // what this lane shows to its warp, and what it showed before
    int turn;
};
static std::vector<Fiber> fibers;
static Fiber* current;
static jmp_buf scheduler, failed;
static ucontext_t scheduler_context;
static std::function<void()> body;
static unsigned char* shared;

[[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s (block %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
    _longjmp(failed, 1);  // out of the fiber, back into `run`
}
static void wait(State state) {
    current->state = state;
    if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}
static void entry() {
    body();
    if (!current->open.empty() || !current->groups.empty()) fail("ends with a copy under way");
    current->state = DONE;
    _longjmp(scheduler, 1);
}
static void resume(int i) {
    current = &fibers[i];
    threadIdx = {(unsigned)i, 0, 0};
    current->state = RUNS;
    if (_setjmp(scheduler) != 0) return;
    if (current->begun) _longjmp(current->here, 1);
    current->begun = true;
    swapcontext(&scheduler_context, &current->start);
}
// Run a warp until all its lanes wait for the block or are done.
static void run_warp(int first) {
    while (true) {
        int at_warp = 0;
        for (int i = first; i < first + LANES; i++)
            if (fibers[i].state != DONE) resume(i);
        for (int i = first; i < first + LANES; i++) {
            at_warp += fibers[i].state == AT_WARP;
            if (fibers[i].state != fibers[first].state) fail("the lanes of a warp wait at different places");
        }
        if (!at_warp) return;
    }
}
static void run_block() {
    const int warps = blockDim.x / LANES;
    for (auto& fiber : fibers) {
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, entry, 0);
        fiber.state = RUNS;
        fiber.begun = false;
        fiber.open.clear();
        fiber.groups.clear();
        fiber.turn = 0;
    }
    for (int phase = 0;; phase++) {
        for (int w = 0; w < warps; w++) run_warp(LANES * (phase % 2 ? warps - 1 - w : w));
        int done = 0;
        for (auto& fiber : fibers) done += fiber.state == DONE;
        if (done == (int)fibers.size()) return;
        if (done) fail("some threads end while others wait for them");
    }
}
// What another lane of this warp shows after all have shown: one barrier, and the buffers take turns.
static Fiber& lane(int i) { return fibers[threadIdx.x / LANES * LANES + i]; }
static void show(const void* value, size_t bytes) {
    current->turn ^= 1;
    std::memcpy(current->exchange[current->turn], value, bytes);
    wait(AT_WARP);
}

template <typename Arguments>
int run(void (*kernel)(Arguments), const void* arguments, size_t bytes, int grid_x, int grid_y, int threads,
        int shared_bytes) {
    if (bytes != sizeof(Arguments)) return (int)sizeof(Arguments);
    if (_setjmp(failed) != 0) return -1;
    Arguments copy;
    std::memcpy(&copy, arguments, bytes);
    body = [&] { kernel(copy); };
    blockDim = {(unsigned)threads, 1, 1};
    gridDim = {(unsigned)grid_x, (unsigned)grid_y, 1};
    if ((int)fibers.size() != threads) fibers = std::vector<Fiber>(threads);
    unsigned char* memory = (unsigned char*)std::aligned_alloc(16, (shared_bytes + 2 * GUARD) / 16 * 16);
    shared = memory;
    for (int y = 0; y < grid_y; y++)
        for (int x = 0; x < grid_x; x++) {
            blockIdx = {(unsigned)x, (unsigned)y, 0};
            std::memset(memory, 0xff, shared_bytes + GUARD);
            run_block();
            for (int i = 0; i < GUARD; i++)
                if (memory[shared_bytes + i] != 0xff) fail("a write behind the shared memory");
        }
    std::free(memory);
    return 0;
}
}  // namespace emulator

static void __syncthreads() { emulator::wait(emulator::AT_BLOCK); }
static float __shfl_xor_sync(unsigned, float x, int step) {
    emulator::show(&x, sizeof x);
    auto& other = emulator::lane((threadIdx.x % 32) ^ step);
    std::memcpy(&x, other.exchange[emulator::current->turn], sizeof x);
    return x;
}
static float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

static void copy_async(void* to, const void* from, bool valid) {
    if ((size_t)to % 16 || (size_t)from % 16) emulator::fail("a copy of 16 bytes is not aligned");
    if (blockIdx.x % 2) emulator::perform({to, from, valid});
    emulator::current->open.push_back({to, from, valid});
}
static void close_copies() {
    emulator::current->groups.push_back(std::move(emulator::current->open));
    emulator::current->open.clear();
}
template <int newest>
static void wait_copies() {
    auto& groups = emulator::current->groups;
    for (; (int)groups.size() > newest; groups.erase(groups.begin()))
        for (auto& copy : groups.front())
            if (blockIdx.x % 2 == 0) emulator::perform(copy);
}

static float float_of_bfloat16(unsigned short bits) {
    unsigned wide = (unsigned)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}
static unsigned short bfloat16_of(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7fff;
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float float_of_half(unsigned short bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : std::ldexp((float)(fraction + (exponent ? 1024 : 0)), (exponent ? exponent : 1) - 25);
    return bits >> 15 ? -x : x;
}
static unsigned short half_of(float x) {
    const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (x != x) return 0x7fff;
    if (x == 0.0f) return sign;
    if (x >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(x, &exponent);
    exponent = exponent < -13 ? -13 : exponent;                       // below it the spacing stays
    const int steps = (int)std::nearbyint(std::ldexp(x, 11 - exponent));  // to even
    return sign | (unsigned short)(steps + ((exponent + 13) << 10));
}

#if SCALAR != 0
static float low_of(unsigned pair) { return SCALAR == 1 ? float_of_half(pair & 0xffff) : float_of_bfloat16(pair & 0xffff); }
static float high_of(unsigned pair) { return SCALAR == 1 ? float_of_half(pair >> 16) : float_of_bfloat16(pair >> 16); }
// As PTX says: see `mma` in vbert/kernels/csrc/device.cuh.
static void mma(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    emulator::show(mine, sizeof mine);
    const int turn = emulator::current->turn, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        const int column = 2 * t + i % 2;
        for (int k = 0; k < 8; k++) {  // pairs of depths
            const unsigned left = emulator::lane(g * 4 + k % 4).exchange[turn][k / 4 * 2 + i / 2];
            const unsigned right = emulator::lane(column * 4 + k % 4).exchange[turn][4 + k / 4];
            c[i] += low_of(left) * low_of(right) + high_of(left) * high_of(right);
        }
    }
}
#endif
