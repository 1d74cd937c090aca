// The outputs of a head's chunks, for gdn_head.cuh: by a warpgroup, of each OUTS-th chunk from chunk `turn` on.
//
// Their squares are summed up by token, written where the head's other block looks for them, and read until its own are
// there. A sum is its own flag: it replaces NOT_YET. So outputs are finished while products for the next ones are made.
__device__ __forceinline__ void make_outputs(const Walk& of, const Site& at, Walking& s, int turn) {
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32 % 4, row = lane / 4, column = 2 * (lane % 4);
    const int H = of.H, h = at.h, slice = at.slice, chunks = at.chunks;
    const u32 full = shared_address(s.full), empty = shared_address(s.empty), ring = at.ring, handed = at.handed;
    const u32 handed_full = shared_address(s.handed_full), handed_empty = shared_address(s.handed_empty);
    const u32 nothing = (u32)H >> 20;
    const long long chunk_bytes = at.chunk_bytes;
    u8* const head_of = at.head_of;
    const u8* const ring_at = at.ring_at;
    // Of the chunk before among this warpgroup's: tokens of this warp's 16, row and 8 below it, of 8 columns each two
    // values; gates of its 16 tokens; and its first token, and the end of its sequence.
    float kept[32];
    uint4 gates[4];
    uint2 told[2];
    int first_before = 0, end_before = 0;
    auto squares_of = [&](int n, int half) {
        return (u32*)(head_of + n * chunk_bytes + SQUARES_AT + half * SQUARES + (part * 8 + row) * 8);
    };
    auto ask = [&](int n) {
#pragma unroll
        for (int p = 0; p < 2; p++) told[p] = ask_blocks(squares_of(n, p));
    };
    // Rows of 128 bytes, of which 8 lanes have 16 each: 4 rows at a time.
    const int own_row = part * 16 + lane / 8;
    auto load_gates = [&] {
        const int t = first_before + own_row;
        const bf16* from = of.gate + t * of.gate_stride + h * K + slice * ROWS + lane % 8 * 8;
#pragma unroll
        for (int q = 0; q < 4; q++, from += 4 * of.gate_stride)
            gates[q] = t + 4 * q < end_before ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
    };
    // Where this lane's 16 bytes of 4 of 8 rows are, and the row of the matrices that it points at.
    u8* const turned = s.turned[4 * turn + part];
    auto piece = [&](int q) {
        const int m = q % 2 * 4 + lane / 8;
        return (uint4*)(turned + m * 128 + (lane % 8 ^ m) * 16);
    };
    auto matrices = [&](int four) {
        return shared_address(turned) + lane % 8 * 128 + ((4 * four + lane / 8) ^ lane % 8) * 16;
    };
    auto finish = [&](int n) {
        auto missing = [&](uint2 x) { return x.x == NOT_YET || x.y == NOT_YET; };
        while (missing(told[0]) || missing(told[1])) ask(n);
        const float a = __uint_as_float(told[0].x) + __uint_as_float(told[1].x);
        const float b = __uint_as_float(told[0].y) + __uint_as_float(told[1].y);
        const float factors[2] = {rsqrtf(a * (1.0f / K) + of.eps), rsqrtf(b * (1.0f / K) + of.eps)};
        const int t = first_before + own_row;
        bf16* to = of.out + ((long long)t * H + h) * K + slice * ROWS + lane % 8 * 8;
#pragma unroll
        for (int r = 0; r < 2; r++) {  // 8 rows at a time go by shared memory, gates and results
            __syncwarp();
            *piece(2 * r) = gates[2 * r], *piece(2 * r + 1) = gates[2 * r + 1];
            __syncwarp();
#pragma unroll
            for (int four = 0; four < 2; four++) {
                u32 x[4];
                load_matrices(x, matrices(four));
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int i = 4 * four + j;
                    const float2 w = *(const float2*)(s.weight + 8 * i + column);
                    const float g = low(x[j]), other = high(x[j]);
                    x[j] = pack(kept[4 * i + 2 * r] * factors[r] * w.x * g * sigmoid(g),
                                kept[4 * i + 2 * r + 1] * factors[r] * w.y * other * sigmoid(other));
                }
                __syncwarp();
                store_matrices(matrices(four), x);
            }
            __syncwarp();
#pragma unroll
            for (int q = 2 * r; q < 2 * r + 2; q++)
                if (t + 4 * q < end_before) *(uint4*)(to + 4 * q * H * K) = *piece(q);
        }
        __syncwarp();
    };
    int place = turn;
    u32 phase = 0;
    const Operand first_queries = describe(ring + QUERIES_AT, 16), S = describe(handed + turn * HANDED, 16);
    const Operand U = further(S, 2 * SLAB);
    int n = turn;
#pragma unroll 1
    for (; n < chunks; n += OUTS) {
        const bool behind = n >= OUTS;
        const Operand queries = further(first_queries, place * STAGE);
        const u8* of_head = ring_at + place * STAGE + SHARED_BY_HEADS;
        if (behind) ask(n - OUTS), load_gates();
        float o[32];
        wait_at_barrier(full + 8 * place, phase);
        wait_at_barrier(handed_full + 8 * turn, n / OUTS & 1);
        begin_products();
#pragma unroll
        for (int k = 0; k < 8; k++)
            multiply<4, false>(o, further(queries, k / 4 * SLAB + k % 4 * 32), further(S, k / 4 * SLAB + k % 4 * 32), k > 0);
        commit_products();
        const int first_here = *(const int*)(of_head + PLACE_AT + 8), end_here = *(const int*)(of_head + PLACE_AT + 12);
        u32 P[4][4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 p = make_uint4(0, 0, 0, 0);
            if (j <= part) p = *(const uint4*)(of_head + PAIRS_AT + (part * (part + 1) / 2 + j) * BLOCK + lane * 16);
            P[j][0] = p.x, P[j][1] = p.y, P[j][2] = p.z, P[j][3] = p.w;
        }
        const float* from_start = (const float*)(of_head + FACTORS_AT) + part * 16 + row;
        wait_for_products<0>();
        settle(o);
#pragma unroll
        for (int i = 0; i < 32; i++) o[i] *= from_start[i / 2 % 2 * 8];
        begin_products();
#pragma unroll
        for (int j = 0; j < 4; j++) multiply_left<8>(o, P[j], further(U, j * 32));
        commit_products();
        wait_for_products<0>();
        settle(o);
        keep(P);
        float squares[2] = {};
#pragma unroll
        for (int i = 0; i < 32; i++) squares[i / 2 % 2] += o[i] * o[i];
        __syncwarp();
        if (lane == 0) {
            arrive_once_read(empty + 8 * place, __float_as_uint(o[0]) | __float_as_uint(o[2]), nothing);
            arrive_at_barrier(handed_empty + 8 * turn);
        }
        place += OUTS;
        if (place >= STAGES) place -= STAGES, phase ^= 1;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            squares[r] += __shfl_xor_sync(~0u, squares[r], 1);
            squares[r] += __shfl_xor_sync(~0u, squares[r], 2);
        }
        if (lane % 4 == 0)
            tell_blocks(squares_of(n, slice), __float_as_uint(squares[0]), __float_as_uint(squares[1]));
        // Only now, or the state would wait for what it hands over to be read.
        if (behind) finish(n - OUTS);
        first_before = first_here, end_before = end_here;
#pragma unroll
        for (int i = 0; i < 32; i++) kept[i] = o[i];
    }
    if (n >= OUTS) ask(n - OUTS), load_gates(), finish(n - OUTS);
}
