// The functions of ops/toolchain/hopper.cuh for a host: a kernel's block runs as a thread for each of its own, block by
// block. Nothing is asynchronous: copies are made when they are asked for, so order is tested and overlap is not.

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;
typedef unsigned short u16;
typedef u16 bf16;

using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // but for `extern __shared__`, of which the source is rid

struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

static std::mutex one_at_a_time;
[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "%s (block %d, thread %d)\n", what, blockIdx.x, threadIdx.x);
    _Exit(3);
}

struct Warp {
    std::barrier<> all{32};
    u32 of_lane[32][6];
};
struct Block {
    std::barrier<> all;
    std::vector<std::unique_ptr<Warp>> warps;
    explicit Block(int threads) : all(threads) {
        for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<Warp>());
    }
};
static Block* block;
inline Warp& warp_here() { return *block->warps[threadIdx.x / 32]; }
inline void __syncthreads() { block->all.arrive_and_wait(); }
inline void __syncwarp() { warp_here().all.arrive_and_wait(); }

template <class T>
T __shfl_sync(u32, T x, int lane) {
    Warp& w = warp_here();
    memcpy(w.of_lane[threadIdx.x % 32], &x, 4);
    w.all.arrive_and_wait();
    memcpy(&x, w.of_lane[lane], 4);
    w.all.arrive_and_wait();
    return x;
}
template <class T>
T __shfl_xor_sync(u32 all, T x, int mask) { return __shfl_sync(all, x, threadIdx.x % 32 ^ mask); }

inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

inline float from_bits(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float low(u32 pair) { return from_bits(pair << 16); }
inline float high(u32 pair) { return from_bits(pair & 0xffff0000u); }
inline u32 rounded(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack(float a, float b) { return rounded(a) | rounded(b) << 16; }
inline u32 multiply(u32 pair, u32 by) { return pack(low(pair) * low(by), high(pair) * high(by)); }

static std::atomic<int> threads_that_waited, threads_that_let_go;
inline void wait_for_kernel_ahead() { threads_that_waited++; }
inline void start_kernel_behind() { threads_that_let_go++; }

inline uint4 load16(const void* p) {
    if ((uintptr_t)p % 16) fail("a load of 16 bytes is not aligned");
    uint4 x;
    memcpy(&x, p, 16);
    return x;
}
inline bf16 load_bf16(const bf16* p) { return *p; }

static u8 shared[1 << 18] __attribute__((aligned(128)));
inline u32 shared_address(const void* p) { return (u32)((const u8*)p - shared); }
inline u8* at_address(u32 address) { return shared + (int)address; }

struct Barrier { u8 pending, count; u16 phase; int bytes; };
inline Barrier& barrier_at(u32 address) { return *(Barrier*)at_address(address); }
inline void turn(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.phase ^= 1;
}
inline void init_barrier(u32 barrier, u32 count = 1) { barrier_at(barrier) = {(u8)count, (u8)count, 0, 0}; }
inline void share_barriers() {}
inline void expect_bytes(u32 barrier, u32 bytes) {
    std::lock_guard lock(one_at_a_time);
    Barrier& b = barrier_at(barrier);
    if (b.pending != b.count) fail("a barrier is used again before its copies have come");
    b.pending--, b.bytes += (int)bytes;
    turn(b);
}
inline void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    if (to % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes == 0) fail("a copy is not of aligned blocks of 16 bytes");
    std::lock_guard lock(one_at_a_time);
    memcpy(at_address(to), from, bytes);
    barrier_at(barrier).bytes -= (int)bytes;
    turn(barrier_at(barrier));
}
inline void wait_at_barrier(u32 barrier, u32 phase) {
    for (;;) {
        {
            std::lock_guard lock(one_at_a_time);
            if (barrier_at(barrier).phase != phase) return;
        }
        std::this_thread::yield();
    }
}

template <class Low, class High>
void multiply_add(float (&c)[4], const u32 (&mine)[6], Low low, High high) {
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32;
    memcpy(w.of_lane[lane], mine, sizeof mine);
    w.all.arrive_and_wait();
    auto half = [&](u32 pair, int k) { return k % 2 ? high(pair) : low(pair); };
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
        for (int k = 0; k < 16; k++) {
            const u32 a = w.of_lane[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            const u32 b = w.of_lane[column * 4 + k % 8 / 2][4 + k / 8];
            c[e] += half(a, k) * half(b, k);
        }
    }
    w.all.arrive_and_wait();
}
inline void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_add(c, {a0, a1, a2, a3, b0, b1}, low, high);
}

// Runs a kernel with arguments by address, as the driver takes them.
template <class... A, size_t... I>
int run_kernel(void (*kernel)(A...), int blocks, int threads, int shared_bytes, void** args, std::index_sequence<I...>) {
    constexpr int GUARD = 1024;
    if (shared_bytes + GUARD > (int)sizeof shared) return 1;
    gridDim = {blocks, 1, 1};
    threads_that_waited = threads_that_let_go = 0;
    for (int b = 0; b < blocks; b++) {
        Block here(threads);
        block = &here;
        memset(shared, 0xff, sizeof shared);  // not a number
        std::vector<std::thread> all;
        for (int t = 0; t < threads; t++)
            all.emplace_back([=] {
                threadIdx = {t, 0, 0}, blockIdx = {b, 0, 0};
                kernel(*(A*)args[I]...);
            });
        for (auto& thread : all) thread.join();
        for (int i = 0; i < GUARD; i++)
            if (shared[shared_bytes + i] != 0xff) return 2;
    }
    return threads_that_waited == blocks * threads && threads_that_let_go >= blocks ? 0 : 4;
}
template <class... A>
int run_kernel(void (*kernel)(A...), int blocks, int threads, int shared_bytes, void** args) {
    return run_kernel(kernel, blocks, threads, shared_bytes, args, std::index_sequence_for<A...>());
}
