// How kda_chunks.cu and gdn_chunks.cu read a chunk: what convolutions and decays come from, all on its way at once, and
// keys and queries of length 1.

// Macro: TEAMS of a block, each of which makes chunks by itself.
#ifndef TEAMS
#define TEAMS 1
#endif
constexpr int MAKERS = 256;  // threads of a team
constexpr int INPUT_ROWS = CHUNK + 3, INPUT_ROW = 2 * K;  // of an input of the convolutions, from 3 tokens ahead
constexpr int INPUT = INPUT_ROWS * INPUT_ROW;

// A thread has two channels, 2 c and the next, of the tokens of sub-block s.
struct Here {
    int lane, warp, s, c, team;
};
__device__ __forceinline__ int maker() { return TEAMS == 1 ? threadIdx.x : threadIdx.x % MAKERS; }
__device__ __forceinline__ Here here() {
    const int tid = maker(), warp = __shfl_sync(~0u, tid / 32, 0);
    return {tid % 32, warp, warp / 2, tid % 64, TEAMS == 1 ? 0 : __shfl_sync(~0u, (int)threadIdx.x / MAKERS, 0)};
}
__device__ __forceinline__ void wait_for_team(const Here& at) {
    if (TEAMS == 1) __syncthreads();
    else wait_at<MAKERS>(1 + 4 * TEAMS + at.team);
}

// `count` tokens of a sequence from `first` on, in all; `begins` with the sequence; what comes behind is saved in a slot.
struct Piece {
    int sequence, first, count, save;
    bool begins;
};
__device__ __forceinline__ Piece piece_of(int n, const int* pieces, const int* offsets, const int* saves) {
    const int sequence = pieces[2 * n], first = pieces[2 * n + 1];
    return {sequence, first, min(CHUNK, offsets[sequence + 1] - first), saves[n], first == offsets[sequence]};
}

// CHUNK rows, and so many more.
__device__ __forceinline__ void copy_rows(u8* tile, const bf16* from, long long stride, int more) {
    const int tid = maker();
    const u32 to = shared_address(tile) + tid * 16;
    from += tid / 16 * stride + tid % 16 * 8;
#pragma unroll
    for (int i = 0; i < CHUNK / 16; i++, from += 16 * stride) copy16(to + i * 16 * INPUT_ROW, from);
    if (tid < 16 * more) copy16(to + CHUNK * INPUT_ROW, from);
}

// The channels of a head for a convolution: the sequence's own tokens only, and what its slot remembers of 3 before it;
// zeros behind its end.
struct Inputs {
    const bf16 *qkv, *conv_state;
    long long stride;
    int C;
};
__device__ __forceinline__ void fetch(u8* input, const Inputs& in, const Piece& piece, long long slot, int channel) {
    const bf16* from = in.qkv + (piece.first - 3) * in.stride + channel;
    if (!piece.begins && piece.count == CHUNK) return copy_rows(input, from, in.stride, 3);
    const bf16* before = in.conv_state + slot * 3 * in.C + channel;
#pragma unroll 1
    for (int i = maker(); i < INPUT_ROWS * 16; i += MAKERS) {
        const int row = i / 16, at = i % 16 * 8;
        if (row - 3 < piece.count) {
            const bf16* tokens = row < 3 && piece.begins ? before + row * in.C : from + row * in.stride;
            copy16(shared_address(input + i * 16), tokens + at);
        } else {
            *(uint4*)(input + i * 16) = make_uint4(0, 0, 0, 0);
        }
    }
}
// The last 3 tokens, for a slot: by 48 threads.
__device__ __forceinline__ void save_rows(bf16* conv_state, const u8* input, int save, int C, int channel, int i) {
    const uint4 x = *(const uint4*)(input + CHUNK * INPUT_ROW + i * 16);
    *(uint4*)(conv_state + ((long long)save * 3 + i / 16) * C + channel + i % 16 * 8) = x;
}

// With SiLU, BY_TANH in two instructions of a value instead of five.
template <bool BY_TANH>
__device__ __forceinline__ void convolve(float2 (&y)[SUB], const u8* input, uint4 taps, const Here& at) {
    const float part = BY_TANH ? 0.5f : 1.0f;
    const float a0 = part * low(taps.x), a1 = part * high(taps.x), a2 = part * low(taps.y), a3 = part * high(taps.y);
    const float b0 = part * low(taps.z), b1 = part * high(taps.z), b2 = part * low(taps.w), b3 = part * high(taps.w);
    const u8* rows = input + SUB * at.s * INPUT_ROW + 4 * at.c;
    u32 x0 = *(const u32*)rows, x1 = *(const u32*)(rows + INPUT_ROW), x2 = *(const u32*)(rows + 2 * INPUT_ROW);
#pragma unroll
    for (int t = 0; t < SUB; t++) {
        const u32 x3 = *(const u32*)(rows + (t + 3) * INPUT_ROW);
        const float a = low(x0) * a0 + low(x1) * a1 + low(x2) * a2 + low(x3) * a3;
        const float b = high(x0) * b0 + high(x1) * b1 + high(x2) * b2 + high(x3) * b3;
        if (BY_TANH) y[t] = float2{a + a * tanh_approximately(a), b + b * tanh_approximately(b)};
        else y[t] = float2{a * sigmoid(a), b * sigmoid(b)};
        x0 = x1, x1 = x2, x2 = x3;
    }
}

// Keys of the length 1 and queries of that by SCALE, in fp16, and, of each token (in `products`, if asked for), their
// product.
struct UnitRows {  // what a team's warps tell each other for it
    float sums[8][48], scales[8][32];
};
template <bool PRODUCTS, bool BY_TANH>
__device__ __forceinline__ void unit_rows(u32 (&k)[SUB], u32 (&q)[SUB], const u8* k_input, const u8* q_input,
                                          uint4 k_taps, uint4 q_taps, float* products, UnitRows& s, const Here& at) {
    auto& sums_s = s.sums;
    auto& scales_s = s.scales;
    const int lane = at.lane, warp = at.warp;
    float2 k_raw[SUB], q_raw[SUB];
    float sums[SUB];
    convolve<BY_TANH>(k_raw, k_input, k_taps, at);
#pragma unroll
    for (int t = 0; t < SUB; t++) sums[t] = k_raw[t].x * k_raw[t].x + k_raw[t].y * k_raw[t].y;
    const float kk = sum_of_16(sums, lane);
    convolve<BY_TANH>(q_raw, q_input, q_taps, at);
#pragma unroll
    for (int t = 0; t < SUB; t++) sums[t] = q_raw[t].x * q_raw[t].x + q_raw[t].y * q_raw[t].y;
    const float qq = sum_of_16(sums, lane);
    float kq = 0.0f;
    if constexpr (PRODUCTS) {
#pragma unroll
        for (int t = 0; t < SUB; t++) sums[t] = k_raw[t].x * q_raw[t].x + k_raw[t].y * q_raw[t].y;
        kq = sum_of_16(sums, lane);
    }
    if (lane < SUB) sums_s[warp][lane] = kk, sums_s[warp][16 + lane] = qq, sums_s[warp][32 + lane] = kq;
    wait_at<64>(1 + 4 * at.team + at.s);
    const float length = rsqrtf((lane < SUB ? kk : qq) + sums_s[warp ^ 1][lane] + 1e-6f);
    const float scale = lane < SUB ? length : length * SCALE;
    scales_s[warp][lane] = scale;
    if constexpr (PRODUCTS) {
        const float both = scale * __shfl_xor_sync(~0u, scale, 16);
        if (warp % 2 && lane < SUB) products[SUB * at.s + lane] = (kq + sums_s[warp ^ 1][32 + lane]) * both;
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < SUB; t++) {
        const float k_scale = scales_s[warp][t], q_scale = scales_s[warp][16 + t];
        k[t] = pack_half(k_raw[t].x * k_scale, k_raw[t].y * k_scale);
        q[t] = pack_half(q_raw[t].x * q_scale, q_raw[t].y * q_scale);
    }
}
