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
// the second half are decayed from its beginning, those of the first to their end. Gated DeltaNet has one decay for all
// channels: it multiplies products of keys and queries as they are.
//
// What is at most 1 goes into products as fp16, which is finer than bf16 there; values as bf16. (I + A) is inverted for
// sub-blocks, by the same halves, and solved for from one sub-block to the next.
//
// Tiles lie in shared memory and in `work` as the matrix unit's operands: for a block of 16 by 16, lane l has 16 bytes,
// the pairs of neighbours in a row that are its a operand, {row, row + 8} of columns {first, last 8}. By tokens: rows are
// tokens, pairs are of channels. By channels: rows are channels, pairs are of tokens, {first, last 8 tokens} of {row,
// row + 8}. As a b operand, the pairs are those of a column.
//
// Macros: GDN, 1 for Gated DeltaNet. RATIO, value heads per key head.

#include "hopper.cuh"
#include "delta.cuh"
#include "chunk_parts.cuh"

constexpr int THREADS = 256;
constexpr int ROWS = CHUNK + 3, ROW = 2 * K;  // of an input of the convolutions
constexpr float SCALE = 0.08838834764831845f;  // 128^-0.5

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    chunks(const bf16* qkv, const bf16* beta, const bf16* gate, const bf16* conv_weight, bf16* conv_state,
           const float* A_log, const float* dt_bias, const long long* slots, const int* pieces, const int* offsets,
           const int* saves, u8* work, long long qkv_stride, long long beta_stride, long long gate_stride, int H) {
    const int tid = threadIdx.x, lane = tid % 32;
    const int warp = __shfl_sync(~0u, tid / 32, 0);
    const int s = warp / 2, c = tid % 64;  // sub-block, and pair of channels
    const int n = blockIdx.x / H, h = blockIdx.x % H, key_heads = H / RATIO, C = (2 * key_heads + H) * K;
    // Where q, k and v of the head begin among the channels.
    auto part = [&](int p) { return (p < 2 ? p * key_heads + h / RATIO : 2 * key_heads + h) * K; };
    extern __shared__ __align__(128) u8 shared[];
    u8 *const k_tile = shared, *const q_tile = shared + TILE, *const end_tile = shared + 2 * TILE;
    u8 *const start_tile = shared + 3 * TILE, *const v_tile = shared + 4 * TILE;
    u8 *const A_half = shared + 5 * TILE, *const A_wide = A_half + 6 * BLOCK;  // -A below its diagonal blocks
    u8 *const T_half = A_wide + 6 * BLOCK, *const T_wide = T_half + 4 * BLOCK;  // and their inverses, less I
    __shared__ __align__(16) float total_s[4][K], beta_s[CHUNK], sums_s[8][48], scales_s[8][32], qk_s[CHUNK];

    start_kernel_behind();
    const float rate = __expf(A_log[h]);
#if GDN
    const float bias = dt_bias[h] * LOG2_E;
#else
    const float2 bias = times(*(const float2*)(dt_bias + h * K + 2 * c), float2{LOG2_E, LOG2_E});
#endif
    wait_for_kernel_ahead();

    const int sequence = pieces[2 * n], first = pieces[2 * n + 1], save = saves[n];
    const bool begins = first == offsets[sequence];
    const int count = min(CHUNK, offsets[sequence + 1] - first);
    if (count <= 0) return;
    u8* const out = work + (long long)blockIdx.x * WORK;

    // What the convolutions read, and what decays come from, all on its way at once: rows of 256 bytes, from 3 tokens
    // before the chunk on. The sequence's own only, and what its slot remembers; zeros behind its end.
    auto input_of = [&](int p) { return shared + (p == 2 ? 4 * TILE : p * ROWS * ROW); };
    const bool whole = !begins && count == CHUNK;
    auto copy_rows = [&](u8* tile, const bf16* from, long long stride, int more) {  // CHUNK rows, and so many more
        const u32 to = shared_address(tile) + tid * 16;
        from += tid / 16 * stride + tid % 16 * 8;
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++, from += 16 * stride) copy16(to + i * 16 * ROW, from);
        if (tid < 16 * more) copy16(to + CHUNK * ROW, from);
    };
    auto fetch = [&](int p) {
        const bf16* from = qkv + (first - 3) * qkv_stride + part(p);
        if (whole) return copy_rows(input_of(p), from, qkv_stride, 3);
        const bf16* before = conv_state + (begins ? slots[sequence] : 0) * 3 * C + part(p);
#pragma unroll 1
        for (int i = tid; i < ROWS * 16; i += THREADS) {
            const int row = i / 16, piece = i % 16;
            u8* to = input_of(p) + i * 16;
            if (row - 3 < count) {
                const bf16* at = row < 3 && begins ? before + row * C : from + row * qkv_stride;
                copy16(shared_address(to), at + 8 * piece);
            } else {
                *(uint4*)to = make_uint4(0, 0, 0, 0);
            }
        }
    };
    fetch(1), fetch(0);
    commit_copies();
    fetch(2);
#if !GDN
    u8* const decays = shared + 2 * ROWS * ROW;
    const bf16* const decays_from = gate + first * gate_stride + h * K;
    if (whole) {
        copy_rows(decays, decays_from, gate_stride, 0);
    } else {
#pragma unroll 1
        for (int i = tid; i < count * 16; i += THREADS)
            copy16(shared_address(decays + i * 16), decays_from + i / 16 * gate_stride + i % 16 * 8);
    }
#endif
    commit_copies();
    auto taps_of = [&](int p) { return load16(conv_weight + 4 * (part(p) + 2 * c)); };
    auto convolve = [&](float2 (&y)[SUB], int p, uint4 w) {
        const u8* rows = input_of(p) + SUB * s * ROW + 4 * c;
        u32 x0 = *(const u32*)rows, x1 = *(const u32*)(rows + ROW), x2 = *(const u32*)(rows + 2 * ROW);
#pragma unroll
        for (int t = 0; t < SUB; t++) {
            const u32 x3 = *(const u32*)(rows + (t + 3) * ROW);
            const float a = low(x0) * low(w.x) + low(x1) * high(w.x) + low(x2) * low(w.y) + low(x3) * high(w.y);
            const float b = high(x0) * low(w.z) + high(x1) * high(w.z) + high(x2) * low(w.w) + high(x3) * high(w.w);
            y[t] = float2{a * sigmoid(a), b * sigmoid(b)};
            x0 = x1, x1 = x2, x2 = x3;
        }
    };

    // Keys and queries of length 1, the decays.
    if (c < SUB) {
        const int t = SUB * s + c;
        beta_s[t] = t < count ? sigmoid(from_bf16(beta[(first + t) * beta_stride + h])) : 0.0f;
    }
    u32 k[SUB], q[SUB];
    float2 a[SUB];
    u32 first_of[8], second_of[8];  // of pairs of tokens, this thread's two channels
    {
        float2 k_raw[SUB], q_raw[SUB];
        float sums[SUB];
        const uint4 k_taps = taps_of(1), q_taps = taps_of(0);
        wait_for_copies<1>();
        __syncthreads();
        convolve(k_raw, 1, k_taps);
#pragma unroll
        for (int t = 0; t < SUB; t++) sums[t] = k_raw[t].x * k_raw[t].x + k_raw[t].y * k_raw[t].y;
        const float kk = sum_of_16(sums, lane);
        convolve(q_raw, 0, q_taps);
#pragma unroll
        for (int t = 0; t < SUB; t++) sums[t] = q_raw[t].x * q_raw[t].x + q_raw[t].y * q_raw[t].y;
        const float qq = sum_of_16(sums, lane);
#pragma unroll
        for (int t = 0; t < SUB; t++) sums[t] = k_raw[t].x * q_raw[t].x + k_raw[t].y * q_raw[t].y;
        const float qk = GDN ? 0.0f : sum_of_16(sums, lane);
        if (lane < SUB) sums_s[warp][lane] = kk, sums_s[warp][16 + lane] = qq, sums_s[warp][32 + lane] = qk;
        wait_at<64>(1 + s);
        const float other = sums_s[warp ^ 1][lane];
        const float scale = rsqrtf((lane < SUB ? kk : qq) + other + 1e-6f);
        const float other_scale = __shfl_xor_sync(~0u, scale, 16);
        scales_s[warp][lane] = scale;
        if (warp % 2 && lane < SUB) qk_s[SUB * s + lane] = (qk + sums_s[warp ^ 1][32 + lane]) * scale * other_scale;
        __syncwarp();
#pragma unroll
        for (int t = 0; t < SUB; t++) {
            const float k_scale = scales_s[warp][t], q_scale = scales_s[warp][16 + t];
            k[t] = pack_half(k_raw[t].x * k_scale, k_raw[t].y * k_scale);
            q[t] = pack_half(q_raw[t].x * q_scale, q_raw[t].y * q_scale);
        }
    }
    wait_for_copies<0>();
    __syncthreads();
    if (save > 0 && tid < 9 * 16) {
        const int p = tid / 48, row = tid / 16 % 3, piece = tid % 16;
        const uint4 x = *(const uint4*)(input_of(p) + (CHUNK + row) * ROW + piece * 16);
        *(uint4*)(conv_state + ((long long)save * 3 + row) * C + part(p) + piece * 8) = x;
    }
    {
#if GDN
        // A lane has a decay of the sub-block, and gets the others.
        const int own = SUB * s + lane % SUB;
        float x = 1.0f;
        if (own < count) x = decay(from_bf16(gate[(first + own) * gate_stride + h]), bias, rate);
#pragma unroll
        for (int t = 0; t < SUB; t++) a[t].x = a[t].y = __shfl_sync(~0u, x, t);
#else
#pragma unroll
        for (int t = 0; t < SUB; t++) {
            const u32 x = *(const u32*)(decays + (SUB * s + t) * ROW + 4 * c);
            a[t] = float2{decay(low(x), bias.x, rate), decay(high(x), bias.y, rate)};
        }
        if (count < CHUNK)
#pragma unroll
            for (int t = 0; t < SUB; t++)
                if (SUB * s + t >= count) a[t] = float2{1.0f, 1.0f};
#endif
    }
    __syncthreads();  // all inputs but those of values have been read

    // By channels: positions are swapped so that the channels of a warp fall into different banks.
    const int at_channel = (c / 8 * 4 + s) * BLOCK + c % 4 * 128 + c / 4 % 2 * 8;
    auto store_channels = [&](u8* tile) {
        int swap = c % 4 ^ c / 8 % 2 * 4;
        forget(swap);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            *(uint2*)(tile + at_channel + (i ^ swap) * 16) = make_uint2(first_of[i], first_of[i + 4]);
            *(uint2*)(tile + at_channel + (4 + i ^ swap) * 16) = make_uint2(second_of[i], second_of[i + 4]);
        }
    };

    // Where this thread's pairs of channels of tokens t and t + 8 go in a tile by tokens. Blocks of odd columns have
    // neighbouring rows swapped, so that the channels of a warp fall into different banks.
    const int odd = c / 8 % 2, at_token = (c / 8 * 4 + s) * BLOCK + c % 4 * 16 + c / 4 % 2 * 8;
    const int even_row = at_token + 64 * odd, odd_row = at_token - 64 * odd;
    auto store_pair = [&](u8* tile, int t, u32 x, u32 y) {
        *(uint2*)(tile + (t % 2 ? odd_row : even_row) + 64 * t) = make_uint2(x, y);
    };
    auto store_tokens = [&](u8* tile, const u32 (&x)[SUB]) {
#pragma unroll
        for (int t = 0; t < 8; t++) store_pair(tile, t, x[t], x[t + 8]);
    };
    auto block_of = [&](const u8* tile, int column, int row) {
        return *(const uint4*)(tile + (column * 4 + row) * BLOCK + (lane ^ column % 2 * 4) * 16);
    };

    auto forget_decays = [&] {
#pragma unroll
        for (int t = 0; t < SUB; t++) {
            forget(a[t].x);
            if (GDN) a[t].y = a[t].x;
            else forget(a[t].y);
        }
    };

    // Blocks on the diagonals of A and P, of which even warps make A's, odd ones P's.
    float diagonal[6] = {};
#if GDN
    // A head's decays multiply products of keys and queries as they are: those between tokens of a sub-block, and those
    // from its beginning and to its end.
    __shared__ float between_s[4][SUB][SUB], from_start_s[CHUNK], to_end_s[CHUNK];
    store_tokens(k_tile, k);
    store_tokens(q_tile, q);
    {
        float x = 1.0f;
        if (c < SUB) {
#pragma unroll
            for (int t = 0; t < SUB; t++) {
                if (t > c) x *= a[t].x;
                between_s[s][t][c] = t < c ? 0.0f : x;
            }
        }
        x = 1.0f;
#pragma unroll
        for (int t = 0; t < SUB; t++) {
            x *= a[t].x;
            if (c == SUB) from_start_s[SUB * s + t] = x;
        }
        *(float2*)(total_s[s] + 2 * c) = float2{x, x};
        x = 1.0f;
#pragma unroll
        for (int t = SUB - 1; t >= 0; t--) {
            if (c == SUB + 1) to_end_s[SUB * s + t] = x;
            x *= a[t].x;
        }
    }
    __syncthreads();
    {
        float left[4] = {}, right[4] = {};
        const u8* rows = warp % 2 ? q_tile : k_tile;
#pragma unroll 4
        for (int column = 0; column < 8; column++) {
            const uint4 x = block_of(rows, column, s), y = block_of(k_tile, column, s);
            mma_fp16(left, x.x, x.y, x.z, x.w, y.x, y.z);
            mma_fp16(right, x.x, x.y, x.z, x.w, y.y, y.w);
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int i = lane / 4, j = 2 * (lane % 4) + e;
            diagonal[e] = left[e] * between_s[s][i][j];
            diagonal[2 + e] = left[2 + e] * between_s[s][i + 8][j];
            diagonal[4 + e] = right[2 + e] * between_s[s][i + 8][j + 8];
        }
    }
#else
    // Half by half.
    auto level = [&](u8* k_to, u8* q_to, int half) {
        wait_at<64>(1 + s);
        float left[4] = {}, right[4] = {};
        const u8* rows = warp % 2 ? q_to : k_to;
#pragma unroll 4
        for (int column = 0; column < 8; column++) {
            const uint4 x = block_of(rows, column, s), y = block_of(k_to, column, s);
            mma_fp16(left, x.x, x.y, x.z, x.w, y.x, y.z);
            if (half < 8) mma_fp16(right, x.x, x.y, x.z, x.w, y.y, y.w);
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (half == 8) diagonal[2 + e] = left[2 + e];
            else if (pairs(lane, e, half)) diagonal[e] = left[e], diagonal[4 + e] = right[2 + e];
        }
    };
    forget_decays(), decay_halves<8>(k, q, a, k_tile, q_tile, store_pair), level(k_tile, q_tile, 8);
    forget_decays(), decay_halves<4>(k, q, a, start_tile, end_tile, store_pair), level(start_tile, end_tile, 4);
    forget_decays(), decay_halves<2>(k, q, a, k_tile, q_tile, store_pair), level(k_tile, q_tile, 2);
    forget_decays(), decay_halves<1>(k, q, a, start_tile, end_tile, store_pair), level(start_tile, end_tile, 1);

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
        store_tokens(k_tile, k_x);
        store_tokens(q_tile, q_x);
        x = {1.0f, 1.0f};
        k_x[SUB - 1] = k[SUB - 1];
#pragma unroll
        for (int t = SUB - 2; t >= 0; t--) x = times(x, a[t + 1]), k_x[t] = mul_halves(k[t], pack_half(x));
        wait_at<64>(1 + s);  // the last level has been read
        store_tokens(end_tile, k_x);
    }
    __syncthreads();
#endif

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
            q[t] = pack(half_low(q[t]) * x.x * SCALE, half_high(q[t]) * x.y * SCALE);
            if (t >= 8) *(uint2*)(out + Q_AT + at_token + (t - 8) * 64) = make_uint2(q[t - 8], q[t]);
            const float b = beta_s[SUB * s + t];
            const float2 k_start = {half_low(k[t]) * x.x * b, half_high(k[t]) * x.y * b};
            if (t % 2) {
                first_of[t / 2] = pack_half(even.x, k_start.x);
                second_of[t / 2] = pack_half(even.y, k_start.y);
            }
            even = k_start;
        }
        store_channels(start_tile);
#pragma unroll
        for (int t = SUB - 1; t >= 0; t--) {
            const float2 k_end = {half_low(k[t]) * y.x, half_high(k[t]) * y.y};
            y = times(y, a[t]);
            if (t % 2 == 0) first_of[t / 2] = pack(k_end.x, even.x), second_of[t / 2] = pack(k_end.y, even.y);
            even = k_end;
        }
        u8* const to = out + K_AT + at_channel;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            *(uint2*)(to + 16 * i) = make_uint2(first_of[i], first_of[i + 4]);
            *(uint2*)(to + 16 * (4 + i)) = make_uint2(second_of[i], second_of[i + 4]);
        }
    }
    {
        float2 v[SUB];
        convolve(v, 2, taps_of(2));
#pragma unroll
        for (int t = 0; t < SUB; t += 2) {
            const float b0 = beta_s[SUB * s + t], b1 = beta_s[SUB * s + t + 1];
            first_of[t / 2] = pack(v[t].x * b0, v[t + 1].x * b1);
            second_of[t / 2] = pack(v[t].y * b0, v[t + 1].y * b1);
        }
        __syncthreads();  // where their inputs were go the values
        store_channels(v_tile);
    }

    // Blocks below the diagonals: 6 of A and 6 of P, 2 for each odd warp, 1 for each even one, which inverts as well.
    const int row = lane / 4;
    auto store_P = [&](int i, int j, uint4 x) {
        *(uint4*)(out + P_AT + (i * (i + 1) / 2 + j) * BLOCK + lane * 16) = x;
    };
    auto below = [&](int task) {
        const int pair = task % 6, i = pair < 1 ? 1 : pair < 3 ? 2 : 3, j = pair - i * (i - 1) / 2;
        const u8* rows = task < 6 ? k_tile : q_tile;
        float left[4] = {}, right[4] = {};
#pragma unroll 4
        for (int column = 0; column < 8; column++) {
            uint4 x = block_of(rows, column, i);
            const uint4 y = block_of(GDN ? k_tile : end_tile, column, j);
            if (!GDN && i - j > 1) {
                const int at = 16 * column + 2 * (lane % 4);
                float2 lo = *(const float2*)(total_s[j + 1] + at), hi = *(const float2*)(total_s[j + 1] + at + 8);
                if (i - j > 2) {
                    lo = times(lo, *(const float2*)(total_s[2] + at));
                    hi = times(hi, *(const float2*)(total_s[2] + at + 8));
                }
                const u32 first_8 = pack_half(lo), last_8 = pack_half(hi);
                x.x = mul_halves(x.x, first_8), x.y = mul_halves(x.y, first_8);
                x.z = mul_halves(x.z, last_8), x.w = mul_halves(x.w, last_8);
            }
            mma_fp16(left, x.x, x.y, x.z, x.w, y.x, y.z);
            mma_fp16(right, x.x, x.y, x.z, x.w, y.y, y.w);
        }
        const bool is_A = task < 6;
        float f0 = is_A ? -beta_s[SUB * i + row] : SCALE, f1 = is_A ? -beta_s[SUB * i + row + 8] : SCALE;
#if GDN
        float rest = 1.0f;  // of the sub-blocks that lie between
        for (int m = j + 1; m < i; m++) rest *= total_s[m][0];
        f0 *= from_start_s[SUB * i + row] * rest, f1 *= from_start_s[SUB * i + row + 8] * rest;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float* to_end = to_end_s + SUB * j + 2 * (lane % 4) + e % 2;
            left[e] *= to_end[0], right[e] *= to_end[8];
        }
#endif
#pragma unroll
        for (int e = 0; e < 2; e++) left[e] *= f0, right[e] *= f0, left[2 + e] *= f1, right[2 + e] *= f1;
        const uint4 wide = pack_block(left, right);
        if (is_A) {
            *(uint4*)(A_wide + pair * BLOCK + lane * 16) = wide;
            *(uint4*)(A_half + pair * BLOCK + lane * 16) = pack_block_half(left, right);
        } else {
            store_P(i, j, wide);
        }
    };
    if (warp % 2) {
        // P's diagonal, where nothing decays.
#pragma unroll
        for (int e = 0; e < 2; e++)
            if (!GDN && row == 2 * (lane % 4) + e) {
                diagonal[e] = qk_s[SUB * s + row];
                diagonal[4 + e] = qk_s[SUB * s + row + 8];
            }
        u32 P[3];
#pragma unroll
        for (int e = 0; e < 3; e++) P[e] = pack(diagonal[2 * e] * SCALE, diagonal[2 * e + 1] * SCALE);
        store_P(s, s, make_uint4(P[0], P[1], 0, P[2]));
        below(warp - 1), below(warp);
    } else {
        const float b0 = beta_s[SUB * s + row], b1 = beta_s[SUB * s + row + 8];
        float T[6], part[6], Z[6];
#pragma unroll
        for (int e = 0; e < 6; e++) diagonal[e] *= e < 2 ? b0 : b1;
        // T inverts blocks of `half` tokens on the diagonal: T - T A_half T those of twice as many.
#pragma unroll
        for (int e = 0; e < 6; e++) {
            const bool on_diagonal = e / 2 != 1 && row == 2 * (lane % 4) + e % 2;
            T[e] = (on_diagonal ? 1.0f : 0.0f) - (e / 2 != 1 && pairs(lane, e % 2, 1) ? diagonal[e] : 0.0f);
        }
#pragma unroll
        for (int half = 2; half <= 8; half *= 2) {
#pragma unroll
            for (int e = 0; e < 6; e++)
                part[e] = (half == 8 ? e / 2 == 1 : e / 2 != 1 && pairs(lane, e % 2, half)) ? diagonal[e] : 0.0f;
            u32 x[3], y[3];
            pack_blocks(x, T), transpose_blocks(y, part);
            multiply(Z, x, y);
            pack_blocks(x, Z), transpose_blocks(y, T);
            multiply(Z, x, y);
#pragma unroll
            for (int e = 0; e < 6; e++) T[e] -= Z[e];
        }
#pragma unroll
        for (int e = 0; e < 6; e++)
            if (e / 2 != 1 && row == 2 * (lane % 4) + e % 2) T[e] = 0.0f;
        *(uint4*)(T_half + s * BLOCK + lane * 16) =
            make_uint4(pack_half(T[0], T[1]), pack_half(T[2], T[3]), 0, pack_half(T[4], T[5]));
        *(uint4*)(T_wide + s * BLOCK + lane * 16) = make_uint4(pack(T[0], T[1]), pack(T[2], T[3]), 0, pack(T[4], T[5]));
        below(8 + warp / 2);
    }
    __syncthreads();

    // U0 and W by this warp's 16 channels, transposed: a sub-block's are those of beta V (or K a[0, i]) less what the
    // ones before it account for, times T.
    auto at_channels = [&](const u8* tile, int i) {
        return *(const uint4*)(tile + (warp * 4 + i) * BLOCK + (lane ^ lane / 8 % 4 ^ warp % 2 * 4) * 16);
    };
    auto block = [&](const u8* of, int i) { return *(const uint4*)(of + i * BLOCK + lane * 16); };
    uint4 solved[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 v = at_channels(v_tile, i);
        float left[4] = {low(v.x), high(v.x), low(v.z), high(v.z)};
        float right[4] = {low(v.y), high(v.y), low(v.w), high(v.w)};
#pragma unroll
        for (int j = 0; j < i; j++) {
            const uint4 A = block(A_wide, i * (i - 1) / 2 + j), u = solved[j];
            mma(left, u.x, u.y, u.z, u.w, A.x, A.z);
            mma(right, u.x, u.y, u.z, u.w, A.y, A.w);
        }
        const uint4 T = block(T_wide, i);
        const uint4 x = pack_block(left, right);
        mma(left, x.x, x.y, x.z, x.w, T.x, T.z);
        mma(right, x.x, x.y, x.z, x.w, T.y, T.w);
        solved[i] = pack_block(left, right);
        *(uint4*)(out + U_AT + (warp * 4 + i) * BLOCK + lane * 16) = solved[i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 v = at_channels(start_tile, i);
        float left[4] = {half_low(v.x), half_high(v.x), half_low(v.z), half_high(v.z)};
        float right[4] = {half_low(v.y), half_high(v.y), half_low(v.w), half_high(v.w)};
#pragma unroll
        for (int j = 0; j < i; j++) {
            const uint4 A = block(A_half, i * (i - 1) / 2 + j), w = solved[j];
            mma_fp16(left, w.x, w.y, w.z, w.w, A.x, A.z);
            mma_fp16(right, w.x, w.y, w.z, w.w, A.y, A.w);
        }
        const uint4 T = block(T_half, i);
        const uint4 x = pack_block_half(left, right);
        mma_fp16(left, x.x, x.y, x.z, x.w, T.x, T.z);
        mma_fp16(right, x.x, x.y, x.z, x.w, T.y, T.w);
        solved[i] = pack_block_half(left, right);
        const u32 y0 = transpose_matrix(pack(-left[0], -left[1])), y1 = transpose_matrix(pack(-left[2], -left[3]));
        const u32 y2 = transpose_matrix(pack(-right[0], -right[1])), y3 = transpose_matrix(pack(-right[2], -right[3]));
        *(uint4*)(out + W_AT + (warp * 4 + i) * BLOCK + lane * 16) = make_uint4(y0, y2, y1, y3);
    }
}
