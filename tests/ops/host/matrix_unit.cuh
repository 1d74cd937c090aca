// The functions of ops/toolchain/matrix_unit.cuh for a host, where a block has no cluster.

#define __grid_constant__
#define __cluster_dims__(...)

inline int take_number(int* counter) { return atomicAdd(counter, 1); }
inline void store_in_block(u32 block, u32 to, uint4 x, u32 barrier) {
    if (block) fail("there are no clusters here");
    memcpy(at_address(to), &x, 16);
    barrier_at(barrier).bytes -= 16;
    turn(barrier_at(barrier));
}
inline int load_int(const int* p) { return *p; }
inline void copy_tile_to(u16, u32, const TensorMap*, int, int, u32) { fail("there are no clusters here"); }
inline void arrive_at_barrier_of(u32, u32) { fail("there are no clusters here"); }
inline float4 load_of_block(int, u32) { fail("there are no clusters here"); }
inline void wait_for_cluster() { fail("there are no clusters here"); }
inline int load_of_block(u32 block, const int* p) {
    if (block) fail("there are no clusters here");
    return *p;
}
inline void begin_before_kernel_ahead_ends() { wait_for_kernel_ahead(); }  // one launch comes after another
inline void count_stored(u32* count) { atomicAdd(count, 1u); }
inline void wait_until_counted(const u32* count, u32 all) {
    if (*count != all) fail("rows are not there, or were counted wrong");
}
inline void arrive_after_copies(u32 barrier) {
    commit_copies();
    wait_for_copies<0>();
    arrive_at_barrier(barrier);
}

inline void write_bytes(void* to, u32 from, u32 bytes) {
    if ((u64)to % 16 || from % 16 || bytes % 16) fail("a write that is not of whole 16 bytes");
    writes_of_thread[threadIdx.x].push_back({to, from, bytes, false});
}
inline void put_tile(const TensorMap* map, int column, int row, u32 from, bool adds) {
    if (from % 1024) fail("a tile is not aligned");
    for (int r = 0; r < (int)map->box && row + r < (int)map->rows; r++)
        for (int c = 0; c < 64 && column + c < (int)map->columns; c += 8)
            writes_of_thread[threadIdx.x].push_back({(void*)(map->data + (row + r) * map->row_stride + column + c), swizzled(from + r * 128 + c * 2), 16, adds});
}
inline void write_tile(const TensorMap* map, int column, int row, u32 from) { put_tile(map, column, row, from, false); }
inline void add_tile(const TensorMap* map, int column, int row, u32 from) { put_tile(map, column, row, from, true); }
inline void wait_until_read() {
    auto& writes = writes_of_thread[threadIdx.x];
    for (const Write& w : writes)
        for (u32 i = 0; i < w.bytes / 2; i++) {
            bf16 &there = ((bf16*)w.to)[i], x = ((bf16*)at_address(w.from))[i];
            there = w.adds ? (bf16)rounded(from_bf16(there) + from_bf16(x)) : x;
        }
    writes.clear();
}
inline void wait_until_written() { wait_until_read(); }

inline float float8_of_row(Operand x, int row, int k) {
    return widened(*at_address(swizzled(x.start + row / 8 * 1024 + row % 8 * 128 + k)));
}
template <int N, bool E4M3> void multiply(float (&c)[8 * N], Operand a, Operand b, int add) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    for (int e = 0; e < 8 * N; e++) {
        const int row = 16 * warp + lane / 4 + 8 * (e / 2 % 2), column = e / 4 * 8 + 2 * (lane % 4) + e % 2;
        float sum = add ? c[e] : 0;
        for (int k = 0; k < (E4M3 ? 32 : 16); k++)
            sum += E4M3 ? float8_of_row(a, row, k) * float8_of_row(b, column, k) : of_row(a, row, k) * of_row(b, column, k);
        c[e] = sum;
    }
}

template <int N> void multiply_left(float (&c)[4 * N], const u32 (&a)[4], Operand b, int add = 1) {
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32;
    memcpy(w.of_lane[lane], a, sizeof a);
    w.all.arrive_and_wait();
    for (int e = 0; e < 4 * N; e++) {
        const int row = lane / 4 + 8 * (e / 2 % 2), column = e / 4 * 8 + 2 * (lane % 4) + e % 2;
        if (!add) c[e] = 0;
        for (int k = 0; k < 16; k++) {
            const u32 pair = w.of_lane[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
            c[e] += (k % 2 ? high(pair) : low(pair)) * of_row(b, column, k);
        }
    }
    w.all.arrive_and_wait();
}
template <int N> void keep(u32 (&)[N][4]) {}
inline u32 widen_nibbles(u32 word, u32 scales) {
    return pack(((int)(word & 15) - 8) * low(scales), ((int)(word >> 16 & 15) - 8) * high(scales));
}
constexpr float WIDENED = 8589934592.0f;
struct NibbleScales { u32 first, second, less; };
inline NibbleScales nibble_scales(u32 scales) {
    auto times = [&](float x) { return pack(low(scales) * x, high(scales) * x); };
    return {times(ldexpf(1, 100)), times(ldexpf(1, 96)), times(-ldexpf(1, -30))};
}
inline u32 widen_in_place(u32 word, u32 mask, u32 times, u32 less) {
    word &= mask;
    return pack(low(word) * low(times) + low(less), high(word) * high(times) + high(less));
}

inline void store_matrices(u32 to, const u32 (&x)[4]) {
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32;
    if (to % 16) fail("a row of a matrix is not aligned");
    memcpy(w.of_lane[lane], x, sizeof x);
    w.all.arrive_and_wait();
    for (int i = 0; i < 4; i++) memcpy(at_address(to) + 4 * i, &w.of_lane[lane % 8 * 4 + i][lane / 8], 4);
    w.all.arrive_and_wait();
}
inline void store_turned(u32 to, u32 a, u32 b, u32 c, u32 d) {
    Warp& w = warp_here();
    const int lane = threadIdx.x % 32, row = lane % 8;
    const u32 mine[6] = {a, b, c, d};
    memcpy(w.of_lane[lane], mine, sizeof mine);
    w.all.arrive_and_wait();
    u16 of_row[8];
    for (int i = 0; i < 8; i++) of_row[i] = (u16)(w.of_lane[4 * i + row / 2][lane / 8] >> 16 * (row % 2));
    memcpy(at_address(to), of_row, 16);
    w.all.arrive_and_wait();
}
