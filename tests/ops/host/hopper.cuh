// The functions of ops/toolchain/hopper.cuh for a host: kernels run block by block, and the threads of a block take
// turns, each until it has to wait. Bulk copies are made when they are asked for, so their order is tested and overlap is
// not; other copies are made when they are waited for.

#include <math.h>
#include <sched.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>
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
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // but for `extern __shared__`, of which the source is rid

struct alignas(8) uint2 { u32 x, y; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index { int x, y, z; };
static Index threadIdx, blockIdx, gridDim;

// The threads of the block that runs. They are no threads of the system, which take a hundred times as long to take
// turns. A warp goes on until all of it waits for others, so it gets as far ahead of them as it can; then it is the turn
// of the next warp, up through the block and then down: whoever reads what others have yet to write, or writes what
// others have yet to read, does so too early.
constexpr int MOST_THREADS = 1024, STACK_BYTES = 1 << 18;
static jmp_buf places[MOST_THREADS], place_of_host;
extern "C" { char failure_of_kernel[200]; }  // which run_on_host.py reads
[[noreturn]] inline void fail(const char* what) {
    snprintf(failure_of_kernel, sizeof failure_of_kernel, "%s (block %d, thread %d)", what, blockIdx.x, threadIdx.x);
    _longjmp(place_of_host, 1);
}

static bool ended[MOST_THREADS];
static int threads_here, threads_left, direction, found_waiting;
static u64 rounds_in_vain;
inline void end_round();
[[noreturn]] inline void let_next_run() {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    do {
        lane = (lane + 32 + direction) % 32;
        if (++found_waiting < 32) continue;
        found_waiting = 0, warp += direction;
        if (warp >= 0 && warp < threads_here / 32) continue;
        warp -= direction, direction = -direction;
        end_round();
    } while (ended[32 * warp + lane]);
    threadIdx.x = 32 * warp + lane;
    _longjmp(places[threadIdx.x], 1);
}
inline void let_others_run() {
    if (!_setjmp(places[threadIdx.x])) let_next_run();
}
template <class Met> void wait_until(Met met) {
    while (!met()) let_others_run();
    found_waiting = 0, rounds_in_vain = 0;
}

// Where a number of threads wait for each other.
struct Gate {
    int threads = 0, arrived = 0;
    u32 turns = 0;
    void arrive() {
        if (++arrived == threads) arrived = 0, turns++;
    }
    void arrive_and_wait() {
        const u32 turn = turns;
        arrive();
        wait_until([&] { return turns != turn; });
    }
};
struct Warp {
    Gate all{32};
    u32 of_lane[32][6];
};
static Warp warps[MOST_THREADS / 32];
static Gate block, numbered[16];
inline Warp& warp_here() { return warps[threadIdx.x / 32]; }
inline void __syncthreads() { block.arrive_and_wait(); }
inline void __syncwarp() { warp_here().all.arrive_and_wait(); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <class T>
T atomicAdd(T* p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
template <class T>
T atomicOr(T* p, T x) { return __atomic_fetch_or(p, x, __ATOMIC_SEQ_CST); }

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
template <class T>
T __shfl_up_sync(u32 all, T x, int by) { return __shfl_sync(all, x, max(threadIdx.x % 32 - by, 0)); }
inline int __popcll(u64 x) { return __builtin_popcountll(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 __ballot_sync(u32 all, bool x) {
    u32 votes = 0;
    for (int lane = 0; lane < 32; lane++) votes |= (u32)__shfl_sync(all, (int)x, lane) << lane;
    return votes;
}
inline bool __all_sync(u32 all, bool x) { return __ballot_sync(all, x) == ~0u; }
inline int __reduce_max_sync(u32 all, int x) {
    int most = x;
    for (int lane = 0; lane < 32; lane++) most = max(most, __shfl_sync(all, x, lane));
    return most;
}
inline int __reduce_min_sync(u32 all, int x) { return -__reduce_max_sync(all, -x); }
inline u32 __match_any_sync(u32 all, int x) {
    u32 same = 0;
    for (int lane = 0; lane < 32; lane++) same |= (u32)(__shfl_sync(all, x, lane) == x) << lane;
    return same;
}

inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 both = (u64)b << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }

inline float from_bits(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float low(u32 pair) { return from_bits(pair << 16); }
inline float high(u32 pair) { return from_bits(pair & 0xffff0000u); }
inline u32 rounded(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack(float a, float b) { return rounded(a) | rounded(b) << 16; }
inline float from_bf16(bf16 x) { return low(x); }
inline void store_bf16(bf16* to, float x) { *to = (bf16)rounded(x); }
inline float __int_as_float(int bits) { return from_bits((u32)bits); }
inline float __uint_as_float(u32 bits) { return from_bits(bits); }
inline u32 __float_as_uint(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }
inline u32 max_pairs(u32 a, u32 b) { return pack(fmaxf(low(a), low(b)), fmaxf(high(a), high(b))); }
inline float half_low(u32 pair) { _Float16 x; memcpy(&x, &pair, 2); return (float)x; }
inline float half_high(u32 pair) { return half_low(pair >> 16); }
inline u32 pack_half(float a, float b) {
    const _Float16 both[2] = {(_Float16)a, (_Float16)b};
    u32 pair;
    memcpy(&pair, both, 4);
    return pair;
}
template <class T> void forget(T&) {}
inline u32 mul_halves(u32 a, u32 b) {
    return pack_half(half_low(a) * half_low(b), half_high(a) * half_high(b));
}
inline float widened(u8 q) {  // e4m3
    const int exponent = q >> 3 & 15, fraction = q & 7;
    const float x = exponent ? ldexpf(1 + fraction / 8.0f, exponent - 7) : ldexpf(fraction / 8.0f, -6);
    return q & 0x80 ? -x : x;
}
inline u32 widen_half(u16 two) { return pack_half(widened(two & 0xff), widened(two >> 8)); }

static int threads_that_waited, threads_that_let_go;
inline void wait_for_kernel_ahead() { threads_that_waited++; }
inline void start_kernel_behind() { threads_that_let_go++; }

inline float as_bf16(float x) { return low(pack(x, 0.0f)); }
inline u32 fp16_of(u32 word, u32 mask) { return (word & mask) | 0x64006400; }
inline uint4 load16(const void* p) {
    if ((uintptr_t)p % 16) fail("a load of 16 bytes is not aligned");
    uint4 x;
    memcpy(&x, p, 16);
    return x;
}
inline bf16 load_bf16(const bf16* p) { return *p; }
// Blocks that tell each other something run side by side, see run_on_host.py.
template <class T> void tell(T* to, T x) { __atomic_store_n(to, x, __ATOMIC_SEQ_CST); }
template <class T> T ask(const T* p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
inline void tell_blocks(u32* to, u32 x, u32 y) {
    tell(to, x), tell(to + 1, y);
}
inline uint2 ask_blocks(const u32* p) {
    let_others_run();
    return {ask(p), ask(p + 1)};
}
inline void tell_made(u32* flag) { tell(flag, 1u); }
inline void await_made(u32* flag) {
    while (!ask(flag)) let_others_run();
    tell(flag, 0u);
}
inline void share_writes_to_memory() {}
inline void tell_system(u64* to, u64 x) { tell(to, x); }
inline void tell_system(u64* to, u64 x, u64 y) { tell_system(to, x), tell_system(to + 1, y); }
inline void ask_system(const u64* p, u64& x) {
    let_others_run();
    x = ask(p);
}
inline void ask_system(const u64* p, u64& x, u64& y) { ask_system(p, x), ask_system(p + 1, y); }
inline void give_system(void* to, u32 x, u32 y, u32 z, u32 w) {
    const u32 all[4] = {x, y, z, w};
    for (int i = 3; i >= 0; i--) tell((u32*)to + i, all[i]);
}
inline void take_system(const void* p, uint4& x) {
    let_others_run();
    u32* all[4] = {&x.x, &x.y, &x.z, &x.w};
    for (int i = 0; i < 4; i++) *all[i] = ask((const u32*)p + i);
}
inline void nap(u32) {}
inline u32 load_anew(const u32* p) { return ask(p); }
inline float load_fp32(const float* p) { return *p; }
inline int load_id(const long long* p) { return (int)*p; }

static u8 shared[1 << 18] __attribute__((aligned(1024)));
inline u32 shared_address(const void* p) { return (u32)((const u8*)p - shared); }
inline u8* at_address(u32 address) { return shared + (int)address; }

struct Copy { u32 to; const void* from; int bytes; };
static std::vector<std::vector<Copy>> copies_of_thread[MOST_THREADS];  // by commit; the last has none yet
inline void copy(u32 to, const void* from, int bytes) {
    auto& copies = copies_of_thread[threadIdx.x];
    if (to % bytes || (uintptr_t)from % bytes) fail("a copy is not aligned");
    if (copies.empty()) copies.emplace_back();
    memset(at_address(to), 0xff, bytes);
    copies.back().push_back({to, from, bytes});
}
inline void copy16(u32 to, const void* from) { copy(to, from, 16); }
inline void copy8(u32 to, const void* from) { copy(to, from, 8); }
inline void copy4(u32 to, const void* from) { copy(to, from, 4); }
inline void commit_copies() {
    auto& copies = copies_of_thread[threadIdx.x];
    copies.resize(copies.size() + 1 + copies.empty());
}
template <int N> void wait_for_copies() {
    auto& copies = copies_of_thread[threadIdx.x];
    for (; (int)copies.size() > N + 1; copies.erase(copies.begin()))
        for (const Copy& c : copies[0]) memcpy(at_address(c.to), c.from, c.bytes);
}

// Barriers of a block by number.
template <int THREADS> void arrive_at(int barrier) {
    numbered[barrier].threads = THREADS;
    numbered[barrier].arrive();
}
template <int THREADS> void wait_at(int barrier) {
    numbered[barrier].threads = THREADS;
    numbered[barrier].arrive_and_wait();
}

struct Barrier { u8 pending, count; u16 phase; int bytes; };
inline Barrier& barrier_at(u32 address) { return *(Barrier*)at_address(address); }
inline void turn(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.phase ^= 1;
}
inline void init_barrier(u32 barrier, u32 count = 1) { barrier_at(barrier) = {(u8)count, (u8)count, 0, 0}; }
inline void share_barriers() {}
inline void expect_bytes(u32 barrier, u32 bytes) {
    Barrier& b = barrier_at(barrier);
    if (b.pending == 0) fail("a barrier is used again before its copies have come");
    b.pending--, b.bytes += (int)bytes;
    turn(b);
}
inline void arrive_at_barrier(u32 barrier) {
    Barrier& b = barrier_at(barrier);
    if (b.pending == 0) fail("more arrive at a barrier than it counts");
    b.pending--;
    turn(b);
}
inline void bring_near(const void* from, u32 bytes) {
    if ((uintptr_t)from % 16 || bytes % 16) fail("what is brought near is not aligned");
    static volatile u8 sink;
    sink = ((const u8*)from)[0] + ((const u8*)from)[bytes - 1];
}
inline void arrive_once_read(u32 barrier, u32, u32) { arrive_at_barrier(barrier); }
inline void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    if (to % 16 || (uintptr_t)from % 16 || bytes % 16 || bytes == 0) fail("a copy is not of aligned blocks of 16 bytes");
    memcpy(at_address(to), from, bytes);
    barrier_at(barrier).bytes -= (int)bytes;
    turn(barrier_at(barrier));
}
inline void wait_at_barrier(u32 barrier, u32 phase) {
    wait_until([&] { return barrier_at(barrier).phase != phase; });
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
inline void mma_of_8(float (&c)[4], u32 a0, u32 a1, u32 b) { mma(c, a0, a1, 0, 0, b, 0); }
inline void mma_fp16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    multiply_add(c, {a0, a1, a2, a3, b0, b1}, half_low, half_high);
}

#define LOWEST (-INFINITY)
inline void load_matrices(u32 (&x)[4], u32 row, bool transposed = false) {
    if (row % 16) fail("a row of a matrix is not aligned");
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32;
    w.of_lane[lane][0] = row;
    w.all.arrive_and_wait();
    for (int i = 0; i < 4; i++) {
        u16 two[2];
        for (int e = 0; e < 2; e++) {
            const int r = transposed ? lane % 4 * 2 + e : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + e;
            two[e] = ((const u16*)at_address(w.of_lane[8 * i + r][0]))[c];
        }
        memcpy(&x[i], two, 4);
    }
    w.all.arrive_and_wait();
}
inline void load_matrices_transposed(u32 (&x)[4], u32 row) { load_matrices(x, row, true); }
inline u32 transpose_matrix(u32 x) {
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32;
    w.of_lane[lane][0] = x;
    w.all.arrive_and_wait();
    u16 two[2];
    for (int e = 0; e < 2; e++)
        memcpy(&two[e], (const u16*)&w.of_lane[(lane % 4 * 2 + e) * 4 + lane / 8][0] + lane / 4 % 2, 2);
    w.all.arrive_and_wait();
    memcpy(&x, two, 4);
    return x;
}

// The matrix unit as a warpgroup uses it: at once, so that order is tested and overlap is not. What is asked for before
// `commit_products` is counted, and `settle` before the wait is not seen.
struct Operand { u32 start, slab; };
inline Operand describe(u32 address, u32 slab_bytes) {
    if (address % 16) fail("an operand is not aligned");
    return {address, slab_bytes};
}
inline Operand further(Operand x, u32 bytes) { return {x.start + bytes, x.slab}; }
inline float tanh_approximately(float x) { return tanhf(x); }
inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }
inline float value_at(u32 address) { return from_bf16(*(const bf16*)at_address(swizzled(address))); }
inline float of_row(Operand x, int row, int k) { return value_at(x.start + row / 8 * 1024 + row % 8 * 128 + 2 * k); }
inline float of_column(Operand x, int column, int k) {
    return value_at(x.start + column / 64 * x.slab + column % 64 * 2 + k / 8 * 1024 + k % 8 * 128);
}
inline void begin_products() { __syncwarp(); }
inline void commit_products() { __syncwarp(); }
template <int PENDING> void wait_for_products() { __syncwarp(); }
template <int COUNT> void settle(float (&)[COUNT]) {}
template <int COLUMNS> void multiply_rows(float (&d)[COLUMNS / 2], Operand a, Operand b, int add) {
    const int lane = threadIdx.x % 32, top = threadIdx.x % 128 / 32 * 16 + lane / 4;
    for (int r = 0; r < 2; r++) {
        float row[16];
        for (int k = 0; k < 16; k++) row[k] = of_row(a, top + 8 * r, k);
        for (int j = 0; j < COLUMNS / 4; j++) {
            float& x = d[j / 2 * 4 + 2 * r + j % 2];
            if (!add) x = 0;
            for (int k = 0; k < 16; k++) x += row[k] * of_row(b, j / 2 * 8 + lane % 4 * 2 + j % 2, k);
        }
    }
}
template <int COLUMNS>
void multiply_columns(float (&d)[COLUMNS / 2], u32 a0, u32 a1, u32 a2, u32 a3, Operand b) {
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32;
    const u32 mine[4] = {a0, a1, a2, a3};
    memcpy(w.of_lane[lane], mine, sizeof mine);
    w.all.arrive_and_wait();
    for (int r = 0; r < 2; r++) {
        float row[16];
        for (int k = 0; k < 16; k++) {
            const u32 two = w.of_lane[lane / 4 * 4 + k % 8 / 2][r + 2 * (k / 8)];
            row[k] = k % 2 ? high(two) : low(two);
        }
        for (int j = 0; j < COLUMNS / 4; j++)
            for (int k = 0; k < 16; k++)
                d[j / 2 * 4 + 2 * r + j % 2] += row[k] * of_column(b, j / 2 * 8 + lane % 4 * 2 + j % 2, k);
    }
    w.all.arrive_and_wait();
}
struct TensorMap {
    const bf16* data;
    u64 rows, heads, columns, row_stride, head_stride, box, heads_box, rest[8];
};
inline void copy_tile_now(u32 to, const TensorMap* map, int column, int head, int row, u32 barrier) {
    if (to % 1024) fail("a tile is not aligned");
    const int all = map->box * map->heads_box;
    for (int n = 0; n < all; n++)
        for (int c = 0; c < 64; c += 8) {
            u8* at = at_address(swizzled(to + n * 128 + c * 2));
            const int r = row + n / map->heads_box, h = head + n % map->heads_box;
            if (r < (int)map->rows && h < (int)map->heads && column + c < (int)map->columns)
                memcpy(at, map->data + r * map->row_stride + h * map->head_stride + column + c, 16);
            else
                memset(at, 0, 16);
        }
    barrier_at(barrier).bytes -= 128 * all;
    turn(barrier_at(barrier));
}
// The first copy of a kernel comes LATE rounds after it was asked for, behind others, if there is a LATE.
static struct { bool asked; int rounds; u32 to; const TensorMap* map; int column, head, row; u32 barrier; } first;
inline void copy_tile(u32 to, const TensorMap* map, int column, int head, int row, u32 barrier) {
#ifdef LATE
    if (!first.asked) {
        first = {true, LATE, to, map, column, head, row, barrier};
        return;
    }
#endif
    copy_tile_now(to, map, column, head, row, barrier);
}
inline void end_round() {
    if (first.rounds && --first.rounds == 0)
        copy_tile_now(first.to, first.map, first.column, first.head, first.row, first.barrier);
    static time_t since;
    if (rounds_in_vain == 0) since = time(nullptr);
    if (++rounds_in_vain % 65536 == 0 && time(nullptr) - since > 200) fail("a block waits for ever");
    sched_yield();  // ranks and blocks that run beside this block have something to tell it
}
inline void share_writes() {}
template <int COUNT> void give_registers_back() {}
template <int COUNT> void take_registers() {}

// Copies out of shared memory (matrix_unit.cuh). They are made as late as they may be.
struct Write { void* to; u32 from, bytes; bool adds; };
static std::vector<Write> writes_of_thread[MOST_THREADS];

static void** kernel_args;
template <class... A, size_t... I>
void call(void (*kernel)(A...), std::index_sequence<I...>) { kernel(*(A*)kernel_args[I]...); }
template <class... A> void call(void (*kernel)(A...)) { call(kernel, std::index_sequence_for<A...>()); }
template <auto KERNEL> void run_thread() {
    if (!_setjmp(places[threadIdx.x])) _longjmp(place_of_host, 1);
    call(KERNEL);
    if (!writes_of_thread[threadIdx.x].empty()) fail("a thread ended before what it writes was read");
    ended[threadIdx.x] = true;
    if (--threads_left == 0) _longjmp(place_of_host, 1);
    let_next_run();
}
template <auto KERNEL> void run_block(int threads) {
    static u8 stacks[MOST_THREADS][STACK_BYTES];
    static ucontext_t start;
    threads_here = threads_left = threads;
    block = {threads};
    for (Gate& gate : numbered) gate = {};
    for (Warp& warp : warps) warp.all = {32};
    for (int t = 0; t < threads; t++) {
        threadIdx = {t, 0, 0}, ended[t] = false, copies_of_thread[t].clear(), writes_of_thread[t].clear();
        getcontext(&start);
        start.uc_stack.ss_sp = stacks[t], start.uc_stack.ss_size = STACK_BYTES;
        makecontext(&start, run_thread<KERNEL>, 0);
        if (!_setjmp(place_of_host)) setcontext(&start);
    }
    rounds_in_vain = 0;
    threadIdx.x = direction > 0 ? 0 : threads - 1;
    if (!_setjmp(place_of_host)) _longjmp(places[threadIdx.x], 1);
}

// Runs blocks of a kernel, from the first of them on, with arguments by address, as the driver takes them.
template <auto KERNEL>
int run_kernel(int first_block, int blocks, int grid, int threads, int shared_bytes, void** args) {
    constexpr int GUARD = 1024;
    if (shared_bytes + GUARD > (int)sizeof shared) return 1;
    kernel_args = args, gridDim = {grid, 1, 1}, first = {};
    threads_that_waited = threads_that_let_go = failure_of_kernel[0] = 0;
    for (int b = first_block; b < first_block + blocks; b++) {
        blockIdx = {b, 0, 0}, direction = b % 2 ? -1 : 1, found_waiting = 0;
        memset(shared, 0xff, sizeof shared);  // not a number
        run_block<KERNEL>(threads);
        if (failure_of_kernel[0]) return 3;
        for (int i = 0; i < GUARD; i++)
            if (shared[shared_bytes + i] != 0xff) return 2;
    }
    return threads_that_waited == blocks * threads && threads_that_let_go >= blocks ? 0 : 4;
}
