// The part of a prompt's delta rule that needs no state, for Hopper: K = V = 128, bf16 activations, 4 taps. A block
// makes of CHUNK tokens of a head all that states.cu needs of them. With a_i the decays of token i, one per channel, S0
// the state before the chunk, and products of decays written as ranges (j, i] of tokens:
//
//     (I + A) U = beta (V - (K a[0, i]) S0^T),   A_ij = beta_i k_i . (k_j a(j, i]),  j < i
//     O = (Q a[0, i]) S0^T + P U,                P_ij = q_i . (k_j a(j, i]),  j <= i
//     S = S0 a[0, C) + U^T (K a(j, C))
//
// so it writes -W = -(I + A)^-1 beta (K a[0, i]), U0 = (I + A)^-1 beta V, Q a[0, i], K a(j, C), P and a[0, C).
//
// No decay is ever divided by another: all are products of the a's, at most 1, however strong the gate. A thread has
// two channels of the 16 tokens of a sub-block, so such products are running ones in its registers. Between sub-blocks,
// a(j, i] is a(j, end) a[begin, i] and what lies between. Within one, tokens pair by halves of 8, 4, 2 and 1: those of
// the second half are decayed from its beginning, those of the first to their end.
//
// What is at most 1 goes into products as fp16, which is finer than bf16 there; values as bf16. (I + A) is inverted for
// sub-blocks, by the same halves, and solved for from one sub-block to the next.

#include "hopper.cuh"
#include "delta.cuh"
#include "chunk_parts.cuh"
#include "chunk_inputs.cuh"
#include "chunk_tiles.cuh"
#include "chunk_solve.cuh"

constexpr u32 NO_DECAY = 0xff80ff80;  // minus infinity twice, in bf16

extern "C" __global__ void __launch_bounds__(MAKERS, 2)
    kda_chunks(const bf16* qkv, const bf16* beta, const bf16* gate, const bf16* conv_weight, bf16* conv_state,
               const float* A_log, const float* dt_bias, const long long* slots, const int* pieces, const int* offsets,
               const int* saves, u8* work, long long qkv_stride, long long beta_stride, long long gate_stride, int H) {
    const Here at = here();
    const int tid = threadIdx.x, lane = at.lane, warp = at.warp, s = at.s, c = at.c, h = blockIdx.x % H;
    auto channel_of = [&](int p) { return (p * H + h) * K; };  // where q, k and v of the head begin
    extern __shared__ __align__(128) u8 shared[];
    u8 *const k_tile = shared, *const q_tile = shared + TILE, *const end_tile = shared + 2 * TILE;
    u8 *const start_tile = shared + 3 * TILE, *const v_tile = shared + 4 * TILE, *const decays = shared + 2 * INPUT;
    const Solving solving = solving_at(shared + 5 * TILE);
    __shared__ __align__(16) float total_s[4][K], beta_s[CHUNK], products_s[CHUNK];
    __shared__ UnitRows unit_s;

    start_kernel_behind();
    const float rate = __expf(A_log[h]);
    const float2 bias = times(*(const float2*)(dt_bias + h * K + 2 * c), float2{LOG2_E, LOG2_E});
    wait_for_kernel_ahead();

    const Piece piece = piece_of(blockIdx.x / H, pieces, offsets, saves);
    const int first = piece.first, count = piece.count;
    if (count <= 0) return;
    u8* const out = work + (long long)blockIdx.x * WORK;
    *(uint2*)(out + SUMS_AT + 8 * tid) = make_uint2(NOT_YET, NOT_YET);

    const Inputs in = {qkv, conv_state, qkv_stride, 3 * H * K};
    auto input_of = [&](int p) { return shared + (p == 2 ? 4 * TILE : p * INPUT); };
    auto bring = [&](int p) { fetch(input_of(p), in, piece, piece.begins ? slots[piece.sequence] : 0, channel_of(p)); };
    auto taps_of = [&](int p) { return load16(conv_weight + 4 * (channel_of(p) + 2 * c)); };
    bring(1), bring(0);
    commit_copies();
    bring(2);
    const bf16* const decays_from = gate + first * gate_stride + h * K;
    if (count == CHUNK) {
        copy_rows(decays, decays_from, gate_stride, 0);
    } else {
#pragma unroll 1
        for (int i = tid; i < CHUNK * 16; i += MAKERS) {
            const bf16* from = decays_from + i / 16 * gate_stride + i % 16 * 8;
            if (i / 16 < count) copy16(shared_address(decays + i * 16), from);
            else *(uint4*)(decays + i * 16) = make_uint4(NO_DECAY, NO_DECAY, NO_DECAY, NO_DECAY);
        }
    }
    commit_copies();

    // Keys and queries of length 1, the decays.
    if (c < SUB) {
        const int t = SUB * s + c;
        beta_s[t] = t < count ? sigmoid(from_bf16(beta[(first + t) * beta_stride + h])) : 0.0f;
    }
    u32 k[SUB], q[SUB];
    float2 a[SUB];
    u32 first_of[8], second_of[8];  // of pairs of tokens, this thread's two channels
    {
        const uint4 k_taps = taps_of(1), q_taps = taps_of(0);
        wait_for_copies<1>();
        __syncthreads();
        unit_rows<true, false>(k, q, input_of(1), input_of(0), k_taps, q_taps, products_s, unit_s, at);
    }
    wait_for_copies<0>();
    __syncthreads();
    if (piece.save > 0 && tid < 9 * 16)
        save_rows(conv_state, input_of(tid / 48), piece.save, in.C, channel_of(tid / 48), tid % 48);
#pragma unroll
    for (int t = 0; t < SUB; t++) {
        const u32 x = *(const u32*)(decays + (SUB * s + t) * INPUT_ROW + 4 * c);
        a[t] = float2{decay(low(x), bias.x, rate), decay(high(x), bias.y, rate)};
    }
    __syncthreads();  // all inputs but those of values have been read

    auto forget_decays = [&] {
#pragma unroll
        for (int t = 0; t < SUB; t++) forget(a[t].x), forget(a[t].y);
    };

    // Blocks on the diagonals of A and P, half by half: even warps make A's, odd ones P's.
    float diagonal[6] = {};
    auto store = [&](u8* tile, int t, u32 x, u32 y) { store_pair(tile, t, x, y, at); };
    auto level = [&](u8* k_to, u8* q_to, int half) {
        wait_at<64>(1 + s);
        float left[4] = {}, right[4] = {};
        const u8* rows = warp % 2 ? q_to : k_to;
#pragma unroll
        for (int column = 0; column < 8; column++) {
            const uint4 x = tokens_of(rows, column, s, at), y = tokens_of(k_to, column, s, at);
            mma_fp16(left, x.x, x.y, x.z, x.w, y.x, y.z);
            if (half < 8) mma_fp16(right, x.x, x.y, x.z, x.w, y.y, y.w);
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (half == 8) diagonal[2 + e] = left[2 + e];
            else if (pairs(lane, e, half)) diagonal[e] = left[e], diagonal[4 + e] = right[2 + e];
        }
    };
    forget_decays(), decay_halves<8>(k, q, a, k_tile, q_tile, store), level(k_tile, q_tile, 8);
    forget_decays(), decay_halves<4>(k, q, a, start_tile, end_tile, store), level(start_tile, end_tile, 4);
    forget_decays(), decay_halves<2>(k, q, a, k_tile, q_tile, store), level(k_tile, q_tile, 2);
    forget_decays(), decay_halves<1>(k, q, a, start_tile, end_tile, store), level(start_tile, end_tile, 1);

    // Tokens decayed from the beginning of their sub-block, and to its end.
    {
        u32 k_x[SUB], q_x[SUB];
        float2 x = {1.0f, 1.0f};
        forget_decays();
#pragma unroll
        for (int t = 0; t < SUB; t++) {
            x = times(x, a[t]);
            k_x[t] = mul_halves(k[t], pack_half(x)), q_x[t] = mul_halves(q[t], pack_half(x));
        }
        *(float2*)(total_s[s] + 2 * c) = x;
        store_tokens(k_tile, k_x, at);
        store_tokens(q_tile, q_x, at);
        x = {1.0f, 1.0f};
        k_x[SUB - 1] = k[SUB - 1];
#pragma unroll
        for (int t = SUB - 2; t >= 0; t--) x = times(x, a[t + 1]), k_x[t] = mul_halves(k[t], pack_half(x));
        wait_at<64>(1 + s);  // the last level has been read
        store_tokens(end_tile, k_x, at);
    }
    __syncthreads();

    // And from the beginning of the chunk, and to its end.
    {
        float2 x = {1.0f, 1.0f}, y = {1.0f, 1.0f};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 of = *(const float2*)(total_s[i] + 2 * c);
            if (i < s) x = times(x, of);
            if (i > s) y = times(y, of);
        }
        if (s == 3) *(float2*)(out + A_AT + 8 * c) = times(x, *(const float2*)(total_s[3] + 2 * c));
        float2 even;
        forget_decays();
#pragma unroll
        for (int t = 0; t < SUB; t++) {
            x = times(x, a[t]);
            q[t] = pack(half_low(q[t]) * x.x, half_high(q[t]) * x.y);
            if (t >= 8) *(uint2*)(out + Q_AT + at_token(at) + (t - 8) * 64) = make_uint2(q[t - 8], q[t]);
            const float b = beta_s[SUB * s + t];
            const float2 k_start = {half_low(k[t]) * x.x * b, half_high(k[t]) * x.y * b};
            if (t % 2) {
                first_of[t / 2] = pack_half(even.x, k_start.x);
                second_of[t / 2] = pack_half(even.y, k_start.y);
            }
            even = k_start;
        }
        store_channels(start_tile, first_of, second_of, swap_of(at), at);
#pragma unroll
        for (int t = SUB - 1; t >= 0; t--) {
            const float2 k_end = {half_low(k[t]) * y.x, half_high(k[t]) * y.y};
            y = times(y, a[t]);
            if (t % 2 == 0) first_of[t / 2] = pack(k_end.x, even.x), second_of[t / 2] = pack(k_end.y, even.y);
            even = k_end;
        }
        store_channels(out + K_AT, first_of, second_of, 0, at);
    }
    {
        float2 v[SUB];
        convolve<false>(v, input_of(2), taps_of(2), at);
#pragma unroll
        for (int t = 0; t < SUB; t += 2) {
            const float b0 = beta_s[SUB * s + t], b1 = beta_s[SUB * s + t + 1];
            first_of[t / 2] = pack(v[t].x * b0, v[t + 1].x * b1);
            second_of[t / 2] = pack(v[t].y * b0, v[t + 1].y * b1);
        }
        __syncthreads();  // where their inputs were go the values
        store_channels(v_tile, first_of, second_of, swap_of(at), at);
    }

    // Blocks below the diagonals: 6 of A and 6 of P, 2 for each odd warp, 1 for each even one, which inverts as well.
    const int row = lane / 4;
    auto below = [&](int task) {
        const int pair = task % 6, i = row_of(pair), j = column_of(pair);
        const bool is_A = task < 6;
        float left[4] = {}, right[4] = {};
#pragma unroll
        for (int column = 0; column < 8; column++) {
            uint4 x = tokens_of(is_A ? k_tile : q_tile, column, i, at);
            if (i - j > 1) {
                const int from = 16 * column + 2 * (lane % 4);
                float2 lo = *(const float2*)(total_s[j + 1] + from), hi = *(const float2*)(total_s[j + 1] + from + 8);
                if (i - j > 2) {
                    lo = times(lo, *(const float2*)(total_s[2] + from));
                    hi = times(hi, *(const float2*)(total_s[2] + from + 8));
                }
                const u32 first_8 = pack_half(lo), last_8 = pack_half(hi);
                x.x = mul_halves(x.x, first_8), x.y = mul_halves(x.y, first_8);
                x.z = mul_halves(x.z, last_8), x.w = mul_halves(x.w, last_8);
            }
            multiply_tokens(left, right, x, tokens_of(end_tile, column, j, at));
        }
        if (!is_A) return store_P(out + P_AT, i, j, pack_block(left, right), lane);
        const float f0 = -beta_s[SUB * i + row], f1 = -beta_s[SUB * i + row + 8];
#pragma unroll
        for (int e = 0; e < 2; e++) left[e] *= f0, right[e] *= f0, left[2 + e] *= f1, right[2 + e] *= f1;
        store_A(solving, pair, left, right, lane);
    };
    if (warp % 2) {
        // P's diagonal, where nothing decays.
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (row == 2 * (lane % 4) + e) {
                diagonal[e] = products_s[SUB * s + row];
                diagonal[4 + e] = products_s[SUB * s + row + 8];
            }
        store_P_diagonal(out + P_AT, diagonal, at);
#pragma unroll 1
        for (int task = warp - 1; task <= warp; task++) below(task);
    } else {
        const float b0 = beta_s[SUB * s + row], b1 = beta_s[SUB * s + row + 8];
#pragma unroll
        for (int e = 0; e < 6; e++) diagonal[e] *= e < 2 ? b0 : b1;
        invert(solving, diagonal, at);
        below(8 + warp / 2);
    }
    __syncthreads();
    solve(out, solving, v_tile, start_tile, at);
}
