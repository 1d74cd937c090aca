// What kernels share, beside hopper.cuh, whose products have a number of columns that varies, and whose blocks form
// clusters.

// To the same place of every block of a cluster that `blocks` has a bit of, whose barrier there is told.
__device__ __forceinline__ void copy_tile_to(u16 blocks, u32 to, const TensorMap* map, int column, int row, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, 0, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}
// At the same barrier of another block of the cluster.
__device__ __forceinline__ void arrive_at_barrier_of(u32 block, u32 barrier) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(block)
        : "memory");
}
__device__ __forceinline__ float4 load_of_block(int block, u32 address) {  // of the cluster, from its shared memory
    float4 x;
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
        : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
        : "r"(address), "r"(block)
        : "memory");
    return x;
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// What lies in another block of the cluster where p is in this one.
__device__ __forceinline__ int load_of_block(u32 block, const int* p) {
    int x;
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.u32 %0, [there];\n}"
        : "=r"(x)
        : "r"(shared_address(p)), "r"(block)
        : "memory");
    return x;
}
// A kernel that reads what the one ahead makes before all of that is there, and so does not wait for it. The one ahead
// counts what its block has written, as far as this thread knows of it; whoever sees the count may read that by copies of
// the copy unit.
__device__ __forceinline__ void begin_before_kernel_ahead_ends() {}
__device__ __forceinline__ void count_stored(u32* count) {
    asm volatile("fence.acq_rel.gpu;\nred.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ __forceinline__ void wait_until_counted(const u32* count, u32 all) {
    u32 x;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(count) : "memory");
    while (x < all);
    asm volatile("fence.proxy.async;" ::: "memory");
}
// Arrives once this thread's copies so far have come.
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// From shared memory, while the thread goes on: a multiple of 16 bytes, both on multiples of 16. What threads wrote there
// is to be shared first (share_writes).
__device__ __forceinline__ void write_bytes(void* to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
                 "r"(from), "r"(bytes)
                 : "memory");
}
// The same of a tile of 64 columns of neighbouring rows, as copies bring them, where the map's tensor has them; or its bf16
// to those that are there, each sum rounded.
__device__ __forceinline__ void write_tile(const TensorMap* map, int column, int row, u32 from) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, 0, %2}], [%3];\ncp.async.bulk.commit_group;" ::"l"(map),
        "r"(column), "r"(row), "r"(from)
        : "memory");
}
__device__ __forceinline__ void add_tile(const TensorMap* map, int column, int row, u32 from) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%1, 0, %2}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(map),
        "r"(column), "r"(row), "r"(from)
        : "memory");
}
// Until others may write where all such writes of the thread come from, and until they are there.
__device__ __forceinline__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_until_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

#define T1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define T2 T1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define T3 T2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define T4 T3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define T5 T4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define T6 T5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define T7 T6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define T8 T7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define T9 T8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define T10 T9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define R8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define R1 R8(0)
#define R2 R1, R8(8)
#define R3 R2, R8(16)
#define R4 R3, R8(24)
#define R5 R4, R8(32)
#define R6 R5, R8(40)
#define R7 R6, R8(48)
#define R8_ R7, R8(56)
#define R9 R8_, R8(64)
#define R10 R9, R8(72)
// c (+)= a b, of 64 rows and 16 N columns, over 32 bytes of each: in bf16, or in float8 (e4m3).
template <int N, bool E4M3> __device__ void multiply(float (&c)[8 * N], u64 a, u64 b, int add);
#define MULTIPLY_IN(n, fp8, shape, signs, registers, va, vb, vp)                                             \
    template <> __device__ __forceinline__ void multiply<n, fp8>(float(&c)[8 * n], u64 a, u64 b, int add) {  \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " vp ", 0;\n"                                        \
                     "wgmma.mma_async.sync.aligned." shape " {" T##n "}, " va ", " vb ", p, 1, 1" signs ";\n}" \
                     : registers                                                                             \
                     : "l"(a), "l"(b), "r"(add));                                                            \
    }
#define MULTIPLY(n, columns, registers, va, vb, vp)                                                              \
    MULTIPLY_IN(n, false, "m64n" columns "k16.f32.bf16.bf16", ", 0, 0", ALL(registers), va, vb, vp)            \
    MULTIPLY_IN(n, true, "m64n" columns "k32.f32.e4m3.e4m3", "", ALL(registers), va, vb, vp)
#define ALL(...) __VA_ARGS__
MULTIPLY(1, "16", ALL(R1), "%8", "%9", "%10")
MULTIPLY(2, "32", ALL(R2), "%16", "%17", "%18")
MULTIPLY(3, "48", ALL(R3), "%24", "%25", "%26")
MULTIPLY(4, "64", ALL(R4), "%32", "%33", "%34")
MULTIPLY(5, "80", ALL(R5), "%40", "%41", "%42")
MULTIPLY(6, "96", ALL(R6), "%48", "%49", "%50")
MULTIPLY(7, "112", ALL(R7), "%56", "%57", "%58")
MULTIPLY(8, "128", ALL(R8_), "%64", "%65", "%66")
MULTIPLY(9, "144", ALL(R9), "%72", "%73", "%74")
MULTIPLY(10, "160", ALL(R10), "%80", "%81", "%82")

// c (+)= a b^T in bf16, of 64 rows and 8 N columns, over 16 values of each. a is in registers, spread as mma has it.
template <int N> __device__ void multiply_left(float (&c)[4 * N], const u32 (&a)[4], u64 b, int add = 1);
#define FOUR_MORE(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define MULTIPLY_LEFT(n, columns, list, registers, va, vb, vp)                                               \
    template <>                                                                                              \
    __device__ __forceinline__ void multiply_left<n>(float(&c)[4 * n], const u32(&a)[4], u64 b, int add) {   \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " vp ", 0;\n"                                        \
                     "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" list "}, {" va "}, " vb \
                     ", p, 1, 1, 0;\n}"                                                                     \
                     : registers                                                                            \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                       \
    }
MULTIPLY_LEFT(1, "8", "%0, %1, %2, %3", ALL(FOUR_MORE(0)), "%4, %5, %6, %7", "%8", "%9")
MULTIPLY_LEFT(2, "16", T1, ALL(R1), "%8, %9, %10, %11", "%12", "%13")
MULTIPLY_LEFT(3, "24", T1 ", %8, %9, %10, %11", ALL(R1, FOUR_MORE(8)), "%12, %13, %14, %15", "%16", "%17")
MULTIPLY_LEFT(4, "32", T2, ALL(R2), "%16, %17, %18, %19", "%20", "%21")
MULTIPLY_LEFT(8, "64", T4, ALL(R4), "%32, %33, %34, %35", "%36", "%37")
MULTIPLY_LEFT(12, "96", T6, ALL(R6), "%48, %49, %50, %51", "%52", "%53")
MULTIPLY_LEFT(16, "128", T8, ALL(R8_), "%64, %65, %66, %67", "%68", "%69")
template <int N> __device__ __forceinline__ void keep(u32 (&a)[N][4]) {  // products may read these until here
#pragma unroll
    for (int i = 0; i < 4 * N; i++) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}
// Two bf16: (n - 8) * scale of two nibbles n, the lowest ones of a word's halves, rounded once: 0x4300 | n is 128 + n.
__device__ __forceinline__ u32 widen_nibbles(u32 word, u32 scales) {
    u32 pair;
    asm("{\nlop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;\nsub.rn.bf16x2 %0, %0, %3;\nmul.rn.bf16x2 %0, %0, %2;\n}"
        : "=&r"(pair)
        : "r"(word), "r"(scales), "r"(0x43084308));
    return pair;
}
// Two bf16 from nibbles of a word's halves where they stand, by one instruction beside the mask: the smallest bf16 have the
// value of their bits times 2^-133, up to bits 0xff. So what comes is (n - 8) * scale * 2^-33, rounded once, and larger by
// WIDENED at the end; `times` is scale * 2^100, or * 2^96 for the second nibble, and `less` -8 * scale * 2^-33. Scales of
// 2^-93 to 2^27 lose nothing.
constexpr float WIDENED = 8589934592.0f;
struct NibbleScales {
    u32 first, second, less;
};
__device__ __forceinline__ NibbleScales nibble_scales(u32 scales) {  // of two rows
    NibbleScales to;
    asm("{\nmul.rn.bf16x2 %0, %3, %4;\nmul.rn.bf16x2 %1, %3, %5;\nmul.rn.bf16x2 %2, %3, %6;\n}"
        : "=&r"(to.first), "=&r"(to.second), "=&r"(to.less)
        : "r"(scales), "r"(0x71807180), "r"(0x6f806f80), "r"(0xb080b080));
    return to;
}
__device__ __forceinline__ u32 widen_in_place(u32 word, u32 mask, u32 times, u32 less) {
    u32 pair;
    asm("{\nand.b32 %0, %1, %2;\nfma.rn.bf16x2 %0, %0, %3, %4;\n}" : "=&r"(pair) : "r"(word), "r"(mask), "r"(times), "r"(less));
    return pair;
}

// Four matrices of 8 x 8 to rows of 16 bytes that the lanes point at, 8 lanes to a matrix: as they are, and each turned
// over: the lane's two of a column are of rows 2 i and 2 i + 1 in memory.
__device__ __forceinline__ void store_matrices(u32 to, const u32 (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]),
                 "r"(x[2]), "r"(x[3])
                 : "memory");
}
__device__ __forceinline__ void store_turned(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// By L2: another kernel may have written it just now.
__device__ __forceinline__ int load_int(const int* p) {
    int x;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(x) : "l"(p));
    return x;
}

// How many took one before from a counter of all blocks.
__device__ __forceinline__ int take_number(int* counter) {
    int x;
    asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(x) : "l"(counter) : "memory");
    return x;
}
// To the same place of another block of the cluster, whose barrier there is told of 16 bytes.
__device__ __forceinline__ void store_in_block(u32 block, u32 to, uint4 x, u32 barrier) {
    asm volatile(
        "{\n.reg .b32 place, told;\nmapa.shared::cluster.u32 place, %0, %2;\nmapa.shared::cluster.u32 told, %1, %2;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [place], {%3, %4, %5, %6}, [told];\n}" ::"r"(to),
        "r"(barrier), "r"(block), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
        : "memory");
}
