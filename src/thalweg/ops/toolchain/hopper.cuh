// What the kernels in CUDA C++ share: bf16 in registers, ordered loads, bulk copies and their barriers, one product of
// the matrix unit, dependent launch.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;
typedef unsigned short u16;
typedef u16 bf16;

// Two bf16 of a register, and back.
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float a, float b) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}

__device__ __forceinline__ u32 max_pairs(u32 a, u32 b) {  // of each of the two bf16
    u32 c;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// Nothing, but the compiler no longer knows what x came from: it computes again what it would keep in registers.
__device__ __forceinline__ void forget(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void forget(int& x) { asm volatile("" : "+r"(x)); }

// Two fp16 of a register.
__device__ __forceinline__ u32 pack_half(float a, float b) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}
__device__ __forceinline__ float half_low(u32 pair) {
    float x;
    asm("{.reg .b16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, a;}" : "=f"(x) : "r"(pair));
    return x;
}
__device__ __forceinline__ float half_high(u32 pair) {
    float x;
    asm("{.reg .b16 a, b;\nmov.b32 {a, b}, %1;\ncvt.f32.f16 %0, b;}" : "=f"(x) : "r"(pair));
    return x;
}
__device__ __forceinline__ u32 mul_halves(u32 a, u32 b) {
    u32 c;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
// What ops/products/triton.py says of e4m3 and of scales.
constexpr float FLOAT8_LARGEST = 448, FLOAT8_SMALLEST = 7.8886090522101181e-31f;
__device__ __forceinline__ u32 to_float8(float a, float b) {  // e4m3, the first in the lower half; NaN stays NaN
    u16 two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(b), "f"(a));
    return two;
}
__device__ __forceinline__ u32 widen_half(u16 two) {  // of two float8 (e4m3)
    u32 pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(two));
    return pair;
}

// The bits of a word that a mask has, as the last ones of two fp16 that are 1024 and more.
__device__ __forceinline__ u32 fp16_of(u32 word, u32 mask) {
    u32 pair;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(pair) : "r"(word), "r"(mask), "r"(0x64006400));
    return pair;
}

__device__ __forceinline__ float tanh_approximately(float x) {  // to 2^-11
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float from_bf16(bf16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ void store_bf16(bf16* to, float x) { *to = (bf16)pack(x, 0.0f); }
__device__ __forceinline__ float as_bf16(float x) { return low(pack(x, 0.0f)); }

// Launches are dependent ones: a kernel may read and write what others do only after this wait.
__device__ __forceinline__ void wait_for_kernel_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void start_kernel_behind() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Keeps its place relative to the wait for the kernel ahead, and goes by L2.
__device__ __forceinline__ uint4 load16(const void* p) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}
__device__ __forceinline__ bf16 load_bf16(const bf16* p) {
    bf16 x;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(x) : "l"(p));
    return x;
}

// Two values for other blocks of the same launch, each of which comes whole, and what is there of them.
__device__ __forceinline__ void tell_blocks(u32* to, u32 x, u32 y) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ uint2 ask_blocks(const u32* p) {
    uint2 x;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p) : "memory");
    return x;
}

// A flag for one other block of the launch, which takes it back: what this thread wrote, and its block ahead of a barrier,
// is there. Bulk copies read it, or have written it, on a way of their own, which both sides see to (share_writes_to_memory).
__device__ __forceinline__ void tell_made(u32* flag) {
    asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ void await_made(u32* flag) {
    u32 x;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
    while (!x);
    *(volatile u32*)flag = 0;
}
__device__ __forceinline__ void share_writes_to_memory() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The same between kernels of several devices: each value comes whole, and says nothing of others.
__device__ __forceinline__ void tell_system(u64* to, u64 x) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(to), "l"(x) : "memory");
}
__device__ __forceinline__ void tell_system(u64* to, u64 x, u64 y) {
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(x), "l"(y) : "memory");
}
__device__ __forceinline__ void ask_system(const u64* p, u64& x) {
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
}
__device__ __forceinline__ void ask_system(const u64* p, u64& x, u64& y) {
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(x), "=l"(y) : "l"(p) : "memory");
}
// Four words, each of which comes whole and says nothing of others.
__device__ __forceinline__ void give_system(void* to, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ __forceinline__ void take_system(const void* p, uint4& x) {
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(p)
                 : "memory");
}
__device__ __forceinline__ void nap(u32 nanoseconds) { asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds)); }
// What a kernel ahead, or the host, has left there last.
__device__ __forceinline__ u32 load_anew(const u32* p) {
    u32 x;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ float load_fp32(const float* p) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p));
    return x;
}
// An int64 that fits an int.
__device__ __forceinline__ int load_id(const long long* p) {
    long long x;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(x) : "l"(p));
    return (int)x;
}

// Barriers of a block by number, for some to arrive at while others wait.
template <int THREADS> __device__ __forceinline__ void wait_at(int barrier) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
template <int THREADS> __device__ __forceinline__ void arrive_at(int barrier) {
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// To shared memory while the thread goes on. The line beside the one asked for is next, and comes to L2 with it.
__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Of bytes whose neighbours others ask for.
__device__ __forceinline__ void copy8(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For all copies but those of the last N commits.
template <int N> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#define LOWEST __uint_as_float(0xff800000u)  // minus infinity

// Four [8, 8] matrices of 16 bits from shared memory, whose rows the lanes point at, 8 lanes to a matrix; as they are,
// and each transposed.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32 (&x)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ u32 transpose_matrix(u32 x) {  // of a warp, [8, 8]
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// A barrier in shared memory opens once so many have arrived and the copies it expects have come. They start on
// multiples of 16 bytes.
__device__ __forceinline__ void init_barrier(u32 barrier, u32 count = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Whoever made barriers calls this before copies may use them.
__device__ __forceinline__ void share_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive_at_barrier(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// For whoever has read what others may overwrite after this. A load that has begun is not done, and an arrival does not
// wait for it: `seen`, the last that was read, has to be here first. `nothing` is 0, which the compiler does not know.
__device__ __forceinline__ void arrive_once_read(u32 barrier, u32 seen, u32 nothing) {
    arrive_at_barrier(barrier + (seen & nothing));
}
__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory");
}
// To L2, for a kernel behind; a multiple of 16 bytes.
__device__ __forceinline__ void bring_near(const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_at_barrier(u32 barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(barrier),
        "r"(phase)
        : "memory");
}

// c += a b with a [16, 16] and b [16, 8] in bf16, as the instruction spreads them over a warp.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Of half as many columns: a [16, 8] and b [8, 8] in bf16.
__device__ __forceinline__ void mma_of_8(float (&c)[4], u32 a0, u32 a1, u32 b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ void mma_fp16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // in fp16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The matrix unit as a warpgroup uses it: operands in shared memory, or a in registers, and sums in registers, which
// may be read after the wait and `settle`. An operand in shared memory has slabs of 64 values (128 bytes) of each row,
// swizzled.
__device__ __forceinline__ u64 describe(u32 address, u32 slab_bytes) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(slab_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// The same so many bytes further on: one instruction, where `describe` takes five.
__device__ __forceinline__ u64 further(u64 operand, u32 bytes) {
    return operand >> 32 << 32 | (u32)operand + (bytes >> 4);
}
typedef u64 Operand;
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// For all products but those of the last PENDING commits.
template <int PENDING> __device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// What the matrix unit wrote is not read above this.
template <int COUNT> __device__ __forceinline__ void settle(float (&x)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#define TEN(t) "%" t "0, %" t "1, %" t "2, %" t "3, %" t "4, %" t "5, %" t "6, %" t "7, %" t "8, %" t "9"
#define FOUR(t) "%" t "0, %" t "1, %" t "2, %" t "3"
#define EIGHT(t) FOUR(t) ", %" t "4, %" t "5, %" t "6, %" t "7"
#define LIST32 TEN("") ", " TEN("1") ", " TEN("2") ", %30, %31"
#define LIST40 TEN("") ", " TEN("1") ", " TEN("2") ", " TEN("3")
#define LIST64 LIST40 ", " TEN("4") ", " TEN("5") ", " FOUR("6")
#define LIST110 LIST40 ", " TEN("4") ", " TEN("5") ", " TEN("6") ", " TEN("7") ", " TEN("8") ", " TEN("9") ", " TEN("10")
#define LIST128 LIST110 ", " TEN("11") ", " EIGHT("12")
#define OUT4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define OUT8(d, i) OUT4(d, i), OUT4(d, i + 4)
#define OUT32(d, i) OUT8(d, i), OUT8(d, i + 8), OUT8(d, i + 16), OUT8(d, i + 24)
#define OUT40(d, i) OUT32(d, i), OUT8(d, i + 32)
#define OUT64(d, i) OUT32(d, i), OUT32(d, i + 32)
#define OUT128(d, i) OUT64(d, i), OUT64(d, i + 64)
#define OF_SHARED(n, regs, a_at, b_at, more) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" more ", 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" LIST##regs "}, %" a_at ", %" b_at \
                 ", p, 1, 1, 0, 0;\n}" \
                 : OUT##regs(d, 0) \
                 : "l"(a), "l"(b), "r"(add))
#define OF_REGISTERS(n, regs, at0, at1, at2, at3, b_at) \
    asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n" \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32.bf16.bf16 {" LIST##regs "}, {%" at0 ", %" at1 \
                 ", %" at2 ", %" at3 "}, %" b_at ", p, 1, 1, 1;\n}" \
                 : OUT##regs(d, 0) \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))

// d [64, COLUMNS] = a b^T of 16 values of each row, + d with `add`.
template <int COLUMNS> __device__ __forceinline__ void multiply_rows(float (&d)[COLUMNS / 2], u64 a, u64 b, int add) {
    static_assert(COLUMNS == 80 || COLUMNS == 128);
    if constexpr (COLUMNS == 80) OF_SHARED("80", 40, "40", "41", "42");
    if constexpr (COLUMNS == 128) OF_SHARED("128", 64, "64", "65", "66");
}
// d [64, COLUMNS] += a b, a [64, 16] in registers as mma has it, b 16 rows.
template <int COLUMNS>
__device__ __forceinline__ void multiply_columns(float (&d)[COLUMNS / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    if constexpr (COLUMNS == 64) OF_REGISTERS("64", 32, "32", "33", "34", "35", "36");
    if constexpr (COLUMNS == 128) OF_REGISTERS("128", 64, "64", "65", "66", "67", "68");
    if constexpr (COLUMNS == 256) OF_REGISTERS("256", 128, "128", "129", "130", "131", "132");
}

// What the copy unit is told of a tensor: ops/toolchain/tensor_map.py. A copy of 64 columns of neighbouring rows.
struct alignas(64) TensorMap {
    u64 words[16];
};
__device__ __forceinline__ void copy_tile(u32 to, const TensorMap* map, int column, int head, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
            to),
        "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(row)
        : "memory");
}
// What threads wrote to shared memory is there for copies and for the matrix unit.
__device__ __forceinline__ void share_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Registers of a thread, from now on, of all threads of a warpgroup.
template <int COUNT> __device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
