// Carries a head's state across chunks of prompts of Gated DeltaNet, for gdn_states.cu and gdn_prompt.cu: what gdn_make.cuh
// makes of every chunk, in order. It says what the parts are, and gdn.cuh where they lie.
//
// A block has 64 rows of V of a head's state, and walks sequences one after another. One warpgroup keeps the state in
// fp32, as the matrix unit's result, and hands over, in bf16, the state before each chunk, and U. Two others make outputs
// of these, in turn, normalise them over a head's V, and gate them (gdn_outputs.cuh).
//
// A warp of the fourth warpgroup fetches the parts of the next chunks to a ring in shared memory, and in a head's first
// block it moves the convolution's states on when nothing reads them any more.
//
// Macros: STATE_BF16, 1 for states stored in bf16, 0 for fp32. NORM_BF16, for the norm's weight. RATIO, value heads per
// key head.

constexpr int OUTS = 2, FETCHES = 12, WALKERS = 512, STAGES = 3, SLICES = K / ROWS;
constexpr int OF_BOTH = FACTORS_AT + FACTORS;  // what both blocks of a head need
constexpr int STAGE = SHARED_BY_HEADS + OF_BOTH + ROWS_BYTES;
constexpr int HANDED = 3 * SLAB;  // the state, and U
#if NORM_BF16
typedef bf16 Weight;
__device__ __forceinline__ float load_weight(const Weight* from) { return from_bf16(*from); }
#else
typedef float Weight;
__device__ __forceinline__ float load_weight(const Weight* from) { return *from; }
#endif

struct Walk {
    u8* work;
    const bf16 *qkv, *gate;
    const Weight* norm_weight;
    bf16* conv_state;
    State* state;
    const long long* slots;
    const int* offsets;
    bf16* out;
    long long qkv_stride, gate_stride;
    float eps;
    int H;
};
// The chunks to walk, of these sequences, and whether their last states are theirs at the end.
struct Part {
    int begin, chunks, first_sequence, sequences;
    bool ends;
};
// The block's part of it: where its first chunk's parts are in memory, how far it is to the next one's, and where they come
// to in shared memory.
struct Site {
    int h, slice, chunks;
    long long chunk_bytes;
    u8 *keys_of, *head_of;
    const u8* ring_at;
    u32 ring, handed;
};
struct Walking {  // in shared memory, beside the ring
    u64 full[STAGES], empty[STAGES], handed_full[OUTS], handed_empty[OUTS];
    float weight[ROWS];
    u8 turned[4 * OUTS][1024];  // 8 rows of 128 bytes of each warp that makes outputs
};
__device__ __forceinline__ void prepare_walk(Walking& s, const Walk& of, int slice) {
    const int tid = threadIdx.x;
    if (tid == 0) {
        for (int i = 0; i < STAGES; i++)
            init_barrier(shared_address(s.full + i)), init_barrier(shared_address(s.empty + i), 8);
        for (int i = 0; i < OUTS; i++)
            init_barrier(shared_address(s.handed_full + i), 4), init_barrier(shared_address(s.handed_empty + i), 4);
        share_barriers();
    }
    if (tid < ROWS) s.weight[tid] = load_weight(of.norm_weight + slice * ROWS + tid);
    __syncthreads();
}

#include "gdn_outputs.cuh"

// By all threads of a block, behind prepare_walk. `await` is called with a chunk's number before it is fetched, and
// `first_state` with the state's registers and this warp's rows of V, for the first chunk of all.
template <class Await, class First>
__device__ __forceinline__ void walk(const Walk& of, const Part& range, u8* shared, Walking& s, int h, int slice,
                                     Await await, First first_state) {
    const int tid = threadIdx.x, lane = tid % 32, H = of.H, key_heads = H / RATIO;
    const int warp = __shfl_sync(~0u, tid / 32, 0), group = warp / 4, part = warp % 4;
    const u32 full = shared_address(s.full), empty = shared_address(s.empty);
    const u32 handed_full = shared_address(s.handed_full), handed_empty = shared_address(s.handed_empty);
    const u32 ring = (shared_address(shared) + 1023) / 1024 * 1024;  // slabs begin where swizzles do
    const u8* const ring_at = shared + (ring - shared_address(shared));
    const u32 handed = ring + STAGES * STAGE;
    const int chunks = range.chunks, begin = range.begin;
    const long long chunk_bytes = (long long)key_heads * (SHARED_BY_HEADS + RATIO * OF_HEAD);
    u8* const keys_of = of.work + begin * chunk_bytes + (h / RATIO) * (SHARED_BY_HEADS + RATIO * OF_HEAD);
    u8* const head_of = keys_of + SHARED_BY_HEADS + h % RATIO * OF_HEAD;
    const Site site = {h, slice, chunks, chunk_bytes, keys_of, head_of, ring_at, ring, handed};

    if (group == 3) {
        give_registers_back<40>();
        if (warp != FETCHES) return;
        if (lane == 0) {
#pragma unroll 1
            for (int i = 0; i < chunks; i++) {
                const int place = i % STAGES;
                const u32 to = ring + place * STAGE, barrier = full + 8 * place;
                await(begin + i);
                if (i >= STAGES) wait_at_barrier(empty + 8 * place, (i / STAGES - 1) & 1);
                expect_bytes(barrier, STAGE);
                copy_bytes(to, keys_of + i * chunk_bytes, SHARED_BY_HEADS, barrier);
                copy_bytes(to + SHARED_BY_HEADS, head_of + i * chunk_bytes, OF_BOTH, barrier);
                copy_bytes(to + SHARED_BY_HEADS + OF_BOTH, head_of + i * chunk_bytes + VALUES_AT + slice * ROWS_BYTES,
                           ROWS_BYTES, barrier);
            }
        }
        __syncwarp();
        if (slice) return;
        const int C = (2 * key_heads + H) * K;
#pragma unroll 1
        for (int b = range.first_sequence; b < range.first_sequence + range.sequences; b++) {
            const int first = of.offsets[b], length = of.offsets[b + 1] - first;
            if (length == 0) continue;
#pragma unroll 1
            for (int i = h % RATIO ? K + lane : lane; i < 3 * K / 2; i += 32) {
                const int p = i / 64, channel = (p < 2 ? p * key_heads + h / RATIO : 2 * key_heads + h) * K + i % 64 * 2;
                bf16* remembered = of.conv_state + of.slots[b] * 3 * C + channel;
                u32 x[3];
#pragma unroll
                for (int j = 0; j < 3; j++) {
                    const int t = length - 3 + j;
                    x[j] = *(const u32*)(t < 0 ? remembered + (t + 3) * C : of.qkv + (first + t) * of.qkv_stride + channel);
                }
#pragma unroll
                for (int j = 0; j < 3; j++) *(u32*)(remembered + j * C) = x[j];
            }
        }
        return;
    }

    const int row = lane / 4, column = 2 * (lane % 4), rows = slice * ROWS + part * 16;
    const u32 nothing = (u32)H >> 20;
    if (group > 0) return make_outputs(of, site, s, group - 1);

    take_registers<216>();
    State* const own = of.state + (h * K + rows + row) * K + column;  // of slot 0
    auto state_at = [&](long long slot) { return own + slot * H * K * K; };
    float S[64];
    float(&by_8)[16][4] = *(float(*)[16][4])S;
    // This lane's row of the matrices that it hands over: of 16 rows and 16 columns.
    const int handed_row = part * 16 + lane % 16;
    auto hand = [&](u32 slab, int piece, const u32(&x)[4]) {
        store_matrices(slab + handed_row * 128 + ((piece + lane / 16) ^ handed_row % 8) * 16, x);
    };
    const Operand keys = describe(ring + KEYS_AT, 16), keys_by_columns = describe(ring + KEYS_AT, SLAB);
    const Operand T = describe(ring + SHARED_BY_HEADS + T_AT, 16);
    auto of_head_at = [&](int n) { return ring_at + n % STAGES * STAGE + SHARED_BY_HEADS; };
    auto handed_at = [&](int n) { return handed + n % OUTS * HANDED; };
    auto wait_for = [&](int n) { wait_at_barrier(full + 8 * (n % STAGES), n / STAGES & 1); };
    auto at = [&](int n) -> Chunk {
        const u32 stage = n % STAGES * STAGE;
        const u8* of_head = of_head_at(n);
        return {further(keys, stage), further(keys_by_columns, stage), further(T, stage),
                of_head + OF_BOTH + in_values(part, lane), (const float*)(of_head + FACTORS_AT)};
    };
    auto place_at = [&](int n) { return *(const uint4*)(of_head_at(n) + PLACE_AT); };
    int save = 0, sequence = 0;
    auto hand_S = [&](int n, const u32(&s)[8][4]) {
        if (n >= OUTS) wait_at_barrier(handed_empty + 8 * (n % OUTS), (n / OUTS - 1) & 1);
#pragma unroll
        for (int k = 0; k < 8; k++) hand(handed_at(n) + k / 4 * SLAB, k % 4 * 2, s[k]);
        const uint4 place = place_at(n);
        save = place.x, sequence = place.y;
        return save <= 0 && (int)(place.z + CHUNK) < (int)place.w;
    };
    auto hand_U = [&](int n, const u32(&U)[4][4]) {
#pragma unroll
        for (int j = 0; j < 4; j++) hand(handed_at(n) + 2 * SLAB, 2 * j, U[j]);
        share_writes();
        __syncwarp();
        if (lane == 0) arrive_at_barrier(handed_full + 8 * (n % OUTS));
        if (n + 1 < chunks) wait_for(n + 1);
    };
    auto made = [&](int n) {
        __syncwarp();
        if (lane == 0) arrive_once_read(empty + 8 * (n % STAGES), __float_as_uint(S[32]), nothing);
    };
    auto ended = [&](int n) {
        if (save > 0) write_rows(by_8, state_at(save));
        const int next = n + 1 < chunks ? (int)place_at(n + 1).y : -1;
        if (next == sequence || next < 0 && !range.ends) return;
        write_rows(by_8, state_at(of.slots[sequence]));
        if (next >= 0) read_rows(by_8, state_at(of.slots[next]));
    };
    wait_for(0);
    first_state(by_8, state_at(of.slots[place_at(0).y]), rows);
    walk_chunks<true, true>(S, chunks, at, hand_S, hand_U, made, ended);
}
