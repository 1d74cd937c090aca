// The decode mixer of a KDA or Gated DeltaNet layer in one launch for Hopper: K = V = R = 128, bf16 activations, 4 taps.
//
// A block serves one (value) head of a group of sequences. Each of its 8 warps owns the same rows of V of every state, and
// streams them through its own ring of tiles in shared memory by bulk copies: within a pass of up to 8 sequences no
// warp waits for another. Before a pass all warps make its inputs together; after it they normalise its outputs.
//
// Written out, with q and k normalised (q also scaled), a the decay and D = S a the decayed state:
// u = beta (v - D k), o = D q + u (q . k), and the new state is D + u k^T. So one pass over S gives both products, and
// a state is read once and written once.
//
// Above the wait for the kernel ahead stand the loads of weights, slot numbers, windows and states: the op's contract
// says when these were written.
//
// Gated DeltaNet: RATIO value heads share a key head, and each computes its q and k for itself. Their blocks are a
// cluster, whose first block writes the windows of q and k once all have read them.
//
// With FLOAT8 a head's outputs go to float8 (e4m3), over a scale of their own.
//
// Macros: STATE_BF16, 1 for states stored in bf16, 0 for fp32. FLOAT8. GDN, 1 for Gated DeltaNet: a decay per head, a
// gate from the projection through SiLU, its norm's weight in fp32. RATIO, 1 for KDA.

#include "hopper.cuh"

constexpr int K = 128, WARPS = 8, PASS = 8, MAX_ROWS = 64;
constexpr int STRIDE = K + 4;  // floats between the rows of an input in shared memory: no bank conflicts
#if STATE_BF16
typedef bf16 State;
#else
typedef float State;
#endif
#if FLOAT8
typedef u8 Out;
#else
typedef bf16 Out;
#endif
constexpr int VEC = 16 / sizeof(State);  // values of a 16-byte access
constexpr int TILE_BYTES = 4096, WARP_ROWS = K / WARPS, TILE_ROWS = TILE_BYTES / (K * sizeof(State));
constexpr int TILES = WARP_ROWS / TILE_ROWS;  // of a warp's share of a state
constexpr int STEPS = TILE_ROWS / 4;          // a warp takes 4 rows at a time, 8 lanes to a row

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + __logf(1.0f + __expf(-fabsf(x))); }
// As load16.
__device__ __forceinline__ uint2 load8(const void* p) {
    uint2 x;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
    return x;
}
__device__ __forceinline__ float load_float(const float* p) {
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p));
    return x;
}
// For states. Nothing reads them before the next step, so fp32 ones may be the first to leave L2: up to 2 % faster from
// 8 sequences on. In bf16 it gained nothing.
__device__ __forceinline__ void store16(void* p, uint4 x) {
    if (sizeof(State) == 4) {
        unsigned long long policy;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(x.x), "r"(x.y),
                     "r"(x.z), "r"(x.w), "l"(policy)
                     : "memory");
    } else {
        *(uint4*)p = x;
    }
}

// To shared memory while the thread goes on; cp.async.wait_all waits for a thread's own.
__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// VEC values of a state, from shared memory and to device memory.
__device__ __forceinline__ void read(float* x, const unsigned char* from) {
    const uint4 raw = *(const uint4*)from;
    const u32 bits[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int e = 0; e < VEC; e++)
        x[e] = VEC == 4 ? __uint_as_float(bits[e % 4]) : e % 2 ? high(bits[e / 2]) : low(bits[e / 2]);
}
__device__ __forceinline__ void write(State* to, const float* x) {
    u32 bits[4];
#pragma unroll
    for (int w = 0; w < 4; w++)
        bits[w] = VEC == 4 ? __float_as_uint(x[w]) : pack(x[2 * w % VEC], x[(2 * w + 1) % VEC]);
    store16(to, make_uint4(bits[0], bits[1], bits[2], bits[3]));
}

#if RATIO > 1
#define CLUSTER __cluster_dims__(RATIO, 1, 1)
// All blocks of the cluster are as far, and what they loaded has come.
__device__ __forceinline__ void arrive_at_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#else
#define CLUSTER
__device__ __forceinline__ void arrive_at_cluster() {}
__device__ __forceinline__ void wait_for_cluster() {}
#endif

#if !GDN
// 32 outputs of an up-projection for 8 sequences. A lane's 8 neighbours of R stand for two pairs of two products: the
// order within R is the matrix unit's to choose, as long as weights and inputs share it.
struct UpWeights {
    uint4 w[2][4][2];  // [16 outputs, 32 of R, 8 of the outputs]
};
__device__ __forceinline__ void load_up(UpWeights& up, const bf16* w_OR) {
#pragma unroll
    for (int j = 0; j < 16; j++) {
        const int tile = j / 8, part = j / 2 % 4, half = j % 2;
        up.w[tile][part][half] = load16(w_OR + (16 * tile + 8 * half) * K + 32 * part);
    }
}
__device__ __forceinline__ void up_project(float (&c)[2][4], const UpWeights& up, const uint2 (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const uint4 (&w)[2] = up.w[t][i];
            mma(c[t], w[0].x, w[1].x, w[0].y, w[1].y, x[2 * i].x, x[2 * i].y);
            mma(c[t], w[0].z, w[1].z, w[0].w, w[1].w, x[2 * i + 1].x, x[2 * i + 1].y);
        }
}

#endif

extern "C" __global__ void CLUSTER __launch_bounds__(32 * WARPS)
#if GDN
    mixer(const bf16* proj, const bf16* conv_weight, bf16* conv_state, const float* A_log, const float* dt_bias,
          const float* norm_weight, State* state, const long long* slots, Out* out,
          float* out_scales,  // [H, B up to a multiple of 16], of FLOAT8
          long long proj_stride, int B, int H, int rows, int stages, float eps) {
#else
    mixer(const bf16* proj, const bf16* conv_weight, bf16* conv_state, const bf16* w_up, const float* A_log,
          const float* dt_bias, const bf16* norm_weight, State* state, const long long* slots, Out* out,
          float* out_scales,  // [H, B up to a multiple of 16], of FLOAT8
          long long proj_stride, int B, int H, int rows, int stages, float eps) {
#endif
    const int tid = threadIdx.x, lane = tid % 32;
    const int warp = __shfl_sync(~0u, tid / 32, 0);  // so that the compiler knows it for the same in all lanes
    const int h = blockIdx.x, first = blockIdx.y * rows;
    const int count = min(rows, B - first), key_heads = H / RATIO, C = (2 * key_heads + H) * K;
    // Where this head's q, k and v begin among the channels.
    auto part = [&](int p) { return ((p < 2 ? p * key_heads + h / RATIO : 2 * key_heads + h) * K); };
    const bool writes_keys = h % RATIO == 0;

    extern __shared__ __align__(128) unsigned char shared[];
    const int pass_rows = min(rows, PASS);
    float* q_s = (float*)(shared + stages * WARPS * TILE_BYTES);
    float* k_s = q_s + pass_rows * STRIDE;
    float* v_s = k_s + pass_rows * STRIDE;  // then o
    float* gate_s = v_s + pass_rows * STRIDE;
#if GDN
    __shared__ float decay_s[PASS];
#else
    float* decay_s = gate_s + pass_rows * STRIDE;
#endif
    __shared__ __align__(16) bf16 taps_s[3 * K * 4];
    __shared__ float beta_s[PASS], qk_s[PASS];
    __shared__ unsigned long long full_s[WARPS * 16];

    start_kernel_behind();

    // The convolutions of q, k and v: a warp to a sequence of the pass, 4 channels of each to a lane.
    if (tid < 192) copy16(taps_s + 8 * tid, conv_weight + (long long)part(tid / 64) * 4 + tid % 64 * 8);
    const float log_rate = load_float(A_log + h);
#if GDN
    const float bias = load_float(dt_bias + h);
    const uint4 scale = load16(norm_weight + 4 * lane);
#else
    // Half the warps project up the decay, half the gate, 32 outputs each.
    const int quad = lane / 4, pair = lane % 4;
    const bool decays = warp < WARPS / 2;
    const int up_row = warp % (WARPS / 2) * 32 + quad;
    const bf16* w_OR = w_up + ((long long)(decays ? h : H + h) * K + up_row) * K + 8 * pair;
    UpWeights up;
    load_up(up, w_OR);
    float bias[4];  // what a decay is shifted by
    bf16 scale[4];  // what a gate is multiplied by
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (decays) bias[j] = load_float(dt_bias + h * K + up_row + 8 * j);
        else scale[j] = load_bf16(norm_weight + up_row + 8 * j);
#endif

    // This warp's ring: tile t of its rows of the states, TILES to a sequence, is in place t % stages.
    const u32 ring = shared_address(shared) + warp * stages * TILE_BYTES, full = shared_address(full_s + warp * 16);
    const int slot_low = lane < count ? (int)slots[first + lane] : 0;
    const int slot_high = 32 + lane < count ? (int)slots[first + 32 + lane] : 0;
    auto slot_of = [&](int i) { return (long long)__shfl_sync(~0u, i < 32 ? slot_low : slot_high, i % 32); };
    auto warp_state = [&](int i) { return state + ((slot_of(i) * H + h) * K + warp * WARP_ROWS) * K; };
    if (lane < stages) {
        init_barrier(full + 8 * lane);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    int asked = 0;
    auto ask = [&](int place) {
        const State* from = warp_state(asked / TILES) + asked % TILES * TILE_ROWS * K;
        if (lane == 0) {
            expect_bytes(full + 8 * place, TILE_BYTES);
            copy_bytes(ring + place * TILE_BYTES, from, TILE_BYTES, full + 8 * place);
        }
        asked++;
    };

    uint2 window[3][4];  // of q, k and v, oldest input first
    bf16 beta;
#if GDN
    bf16 decay;
    uint2 gate;
#else
    uint2 low_rank[8];
#endif
    auto remembered = [&](int base) {
        return conv_state + slot_of(min(base + warp, MAX_ROWS - 1)) * 3 * C + 4 * lane;
    };
    auto load_remembered = [&](int base) {
        const bf16* from = remembered(base);
        if (base + warp < count)
#pragma unroll
            for (int j = 0; j < 9; j++) window[j / 3][j % 3] = load8(from + j % 3 * C + part(j / 3));
    };
    auto load_newest = [&](int base) {
        const bf16* from = proj + (first + base + warp) * proj_stride;
        if (base + warp < count) {
#pragma unroll
            for (int p = 0; p < 3; p++) window[p][3] = load8(from + part(p) + 4 * lane);
#if GDN
            gate = load8(from + C + h * K + 4 * lane);
            beta = load_bf16(from + C + H * K + h);
            decay = load_bf16(from + C + H * K + H + h);
        }
#else
            beta = load_bf16(from + C + h);
        }
        from = proj + (first + base + quad) * proj_stride + C + H + (decays ? 0 : K) + 8 * pair;
#pragma unroll
        for (int i = 0; i < 8; i++)  // 8 bytes at a time: rows of 4 heads begin there
            low_rank[i] = base + quad < count ? load8(from + i / 2 * 32 + i % 2 * 4) : make_uint2(0, 0);
#endif
    };
    // What a multiprocessor asks for comes in the order it asked: small loads go before those of the states, of which
    // only one tile is asked for before the wait, or the inputs after it would come last.
    load_remembered(0);
    ask(0);

    wait_for_kernel_ahead();

    load_newest(0);
#pragma unroll 1
    while (asked < min(stages, count * TILES)) ask(asked);
    int place = 0;
    u32 phase = 0;
#pragma unroll 1
    for (int base = 0; base < count; base += PASS) {
        // The inputs of the pass.
        const int n = min(PASS, count - base);
#if !GDN
        float f[2][4] = {};
        up_project(f, up, low_rank);
        if (decays) {
            const float rate = -__expf(log_rate);
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int i = 2 * pair + e % 2;
                if (e % 2 < n && i < n) {
                    const float y = f[e / 4][e % 4] + bias[e / 2];
                    decay_s[i * STRIDE + up_row + e / 2 * 8] = __expf(rate * softplus(y));
                }
            }
        } else {
#pragma unroll
            for (int e = 0; e < 8; e++) {
                const int i = 2 * pair + e % 2;
                if (e % 2 < n && i < n)
                    gate_s[i * STRIDE + up_row + e / 2 * 8] = low(scale[e / 2]) * sigmoid(f[e / 4][e % 4]);
            }
        }
#endif
        if (base == 0) {
            asm volatile("cp.async.wait_all;" ::: "memory");
            __syncthreads();  // the taps are there
        }
        if (warp < n) {
            float qkv[3][4];
#pragma unroll
            for (int p = 0; p < 3; p++) {
                const bf16* taps = taps_s + p * K * 4 + 16 * lane;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const uint2 t = *(const uint2*)(taps + 4 * e);
                    auto of = [&](int w) {
                        const u32 two = e < 2 ? window[p][w].x : window[p][w].y;
                        return e % 2 ? high(two) : low(two);
                    };
                    const float y = of(0) * low(t.x) + of(1) * high(t.x) + of(2) * low(t.y) + of(3) * high(t.y);
                    qkv[p][e] = y * sigmoid(y);
                }
            }
            float qq = 0, kk = 0, qk = 0;
#pragma unroll
            for (int e = 0; e < 4; e++) {
                qq += qkv[0][e] * qkv[0][e];
                kk += qkv[1][e] * qkv[1][e];
                qk += qkv[0][e] * qkv[1][e];
            }
#pragma unroll
            for (int m = 1; m < 32; m *= 2) {
                qq += __shfl_xor_sync(~0u, qq, m);
                kk += __shfl_xor_sync(~0u, kk, m);
                qk += __shfl_xor_sync(~0u, qk, m);
            }
            const float r_q = rsqrtf(qq + 1e-6f) * 0.08838834764831845f, r_k = rsqrtf(kk + 1e-6f);  // 128^-0.5
            const int at = warp * STRIDE + 4 * lane;
            *(float4*)(q_s + at) = make_float4(qkv[0][0] * r_q, qkv[0][1] * r_q, qkv[0][2] * r_q, qkv[0][3] * r_q);
            *(float4*)(k_s + at) = make_float4(qkv[1][0] * r_k, qkv[1][1] * r_k, qkv[1][2] * r_k, qkv[1][3] * r_k);
            *(float4*)(v_s + at) = make_float4(qkv[2][0], qkv[2][1], qkv[2][2], qkv[2][3]);
            if (lane == 0) {
                qk_s[warp] = qk * r_q * r_k;
                beta_s[warp] = sigmoid(low(beta));
#if GDN
                decay_s[warp] = __expf(-__expf(log_rate) * softplus(low(decay) + bias));
#endif
            }
#if GDN
            const float z[4] = {low(gate.x), high(gate.x), low(gate.y), high(gate.y)};
            *(float4*)(gate_s + at) = make_float4(__uint_as_float(scale.x) * z[0] * sigmoid(z[0]),
                                                  __uint_as_float(scale.y) * z[1] * sigmoid(z[1]),
                                                  __uint_as_float(scale.z) * z[2] * sigmoid(z[2]),
                                                  __uint_as_float(scale.w) * z[3] * sigmoid(z[3]));
#endif
        }
        arrive_at_cluster();
        auto remember = [&](int from, int to) {
            bf16* at = remembered(base);
            if (warp < n)
#pragma unroll
                for (int j = 3 * from; j < 3 * to; j++)
                    *(uint2*)(at + j % 3 * C + part(j / 3)) = window[j / 3][j % 3 + 1];
        };
        remember(2, 3);
        wait_for_cluster();
        if (writes_keys) remember(0, 2);
        __syncthreads();
        if (base + PASS < count) {  // on their way while the states are
            load_remembered(base + PASS);
            load_newest(base + PASS);
        }

        // The states. Lanes 8 j to 8 j + 7 share row j of 4, VEC neighbours of K at a time.
        const int row_of_4 = lane / 8, k0 = VEC * (lane % 8);
#pragma unroll 1
        for (int i = 0; i < n; i++) {
            float q[16], k[16];
#if GDN
            const float a[1] = {decay_s[i]};
#else
            float a[16];
#endif
#pragma unroll
            for (int e = 0; e < 16; e += 4) {
                const int at = i * STRIDE + 8 * VEC * (e / VEC) + k0 + e % VEC;
#if !GDN
                *(float4*)(a + e) = *(float4*)(decay_s + at);
#endif
                *(float4*)(q + e) = *(float4*)(q_s + at);
                *(float4*)(k + e) = *(float4*)(k_s + at);
            }
            const float beta = beta_s[i], qk = qk_s[i];
            State* to = warp_state(base + i);
            float* v_o = v_s + i * STRIDE + warp * WARP_ROWS + row_of_4;
#pragma unroll 1
            for (int t = 0; t < TILES; t++) {
                wait_at_barrier(full + 8 * place, phase);
                const unsigned char* tile = shared + (warp * stages + place) * TILE_BYTES;
#pragma unroll 2
                for (int s = 0; s < STEPS; s++) {
                    float D[16];
                    const int at = (4 * s + row_of_4) * K + k0;
#pragma unroll
                    for (int j = 0; j < 16; j += VEC) read(D + j, tile + (at + 8 * j) * sizeof(State));
                    const float v = *v_o;
                    float Dk = 0, Dq = 0;
#pragma unroll
                    for (int e = 0; e < 16; e++) D[e] *= a[GDN ? 0 : e], Dk += D[e] * k[e], Dq += D[e] * q[e];
#pragma unroll
                    for (int m = 1; m < 8; m *= 2) {
                        Dk += __shfl_xor_sync(~0u, Dk, m);
                        Dq += __shfl_xor_sync(~0u, Dq, m);
                    }
                    const float u = beta * (v - Dk);
#pragma unroll
                    for (int e = 0; e < 16; e++) D[e] += u * k[e];
#pragma unroll
                    for (int j = 0; j < 16; j += VEC) write(to + at + 8 * j, D + j);
                    __syncwarp();
                    if (lane % 8 == 0) *v_o = Dq + u * qk;
                    v_o += 4;
                }
                __syncwarp();
                if (asked < count * TILES) ask(place);
                if (++place == stages) place = 0, phase ^= 1;
                to += TILE_ROWS * K;
            }
        }
        __syncthreads();

        // The gated norm, a warp to a sequence.
        if (warp < n) {
            const float4 o = *(float4*)(v_s + warp * STRIDE + 4 * lane);
            const float4 gate = *(float4*)(gate_s + warp * STRIDE + 4 * lane);
            float square = o.x * o.x + o.y * o.y + o.z * o.z + o.w * o.w;
#pragma unroll
            for (int m = 1; m < 32; m *= 2) square += __shfl_xor_sync(~0u, square, m);
            const float r = rsqrtf(square * (1.0f / K) + eps);
            Out* to = out + ((long long)(first + base + warp) * H + h) * K + 4 * lane;
            const float4 y = make_float4(o.x * r * gate.x, o.y * r * gate.y, o.z * r * gate.z, o.w * r * gate.w);
#if FLOAT8
            float largest = fmaxf(fmaxf(fabsf(y.x), fabsf(y.y)), fmaxf(fabsf(y.z), fabsf(y.w)));
#pragma unroll
            for (int m = 1; m < 32; m *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, m));
            const float scale = fmaxf(largest, FLOAT8_SMALLEST) / FLOAT8_LARGEST;
            *(u32*)to = to_float8(y.x / scale, y.y / scale) | to_float8(y.z / scale, y.w / scale) << 16;
            if (lane == 0) out_scales[(B + 15) / 16 * 16 * h + first + base + warp] = scale;
#else
            *(uint2*)to = make_uint2(pack(y.x, y.y), pack(y.z, y.w));
#endif
        }
        if (base + PASS < count) __syncthreads();
    }
}
