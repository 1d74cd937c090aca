// What a warp has of some tokens, 256 columns as fp16, and its products with 16 rows of weights in int4.
//
// The right-hand operand of the matrix unit has 8 columns: W = 1, 2, 4 or 8 tokens, each in 8 / W of them, of which one
// has W of the 8 groups, and zeros for the others. So sums of groups stand apart in the result, and it is the result of
// all of them that is multiplied by scales: W numbers of a lane in place of 8.
//
// A nibble n goes to fp16 by its bits alone: 0x6400 | n is 1024 + n, and 0x6400 | n << 4, where it stands, is 1024 + 16 n,
// for which x has a sixteenth. What is too much in the sums, 1032 times the columns of x or 1152 times their sixteenths,
// is taken away by a product of scales and those, which go to the matrix unit as three bf16 each. So a weight is never
// rounded. A lane has a word of each group, whose nibbles 0 and 4, 1 and 5 and so on are the pairs that the matrix unit
// takes: the order of columns within a sum is free. A column is scaled by a power of two to just below fp16's largest,
// which loses nothing but what is below 2^-25 of its largest element.

constexpr int GROUPS = 8;  // of 32 columns

template <int N> struct Width { static constexpr int tokens = N; };

// Values 0 and 4, 1 and 5 and so on.
__device__ __forceinline__ void spread(const uint4& w, u32 (&to)[4]) {
    to[0] = __byte_perm(w.x, w.z, 0x5410), to[1] = __byte_perm(w.x, w.z, 0x7632);
    to[2] = __byte_perm(w.y, w.w, 0x5410), to[3] = __byte_perm(w.y, w.w, 0x7632);
}

struct Columns {
    u32 rows[GROUPS][4];  // of the lane's column, lane / 4: 8 values of each group
    float scale[2];       // of the two columns whose sums the lane gets
    u32 too_much[3];      // of two groups, less what is in the parts before

    // `from`: the warp's columns of the token lane / 4 % W, which is there if `is`.
    template <int W> __device__ __forceinline__ void load(const bf16* from, bool is) {
        const int lane = threadIdx.x % 32, pair = lane % 4, slot = lane / 4 / W;  // its column has groups slot * W and on
        from += slot * W * 32 + 8 * pair;
        uint4 words[W];
#pragma unroll
        for (int j = 0; j < W; j++) words[j] = is ? load16(from + 32 * j) : make_uint4(0, 0, 0, 0);
        take<W>(words);
    }
    // The same, of what a lane would load.
    template <int W> __device__ __forceinline__ void take(const uint4 (&words)[W]) {
        const int lane = threadIdx.x % 32, pair = lane % 4, slot = lane / 4 / W;
        u32 mine[W][4], largest = 0;
#pragma unroll
        for (int j = 0; j < W; j++) spread(words[j], mine[j]);
#pragma unroll
        for (int i = 0; i < W * 4; i++) largest = max_pairs(largest, mine[i / 4][i % 4] & 0x7fff7fffu);
        largest = max(largest & 0xffff, largest >> 16);
        largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
        // Powers of two put together from their bits. The largest lands in [2^14, 2^15), and NaN stays NaN.
        const int exponent = min(max((int)largest >> 7, 15), 253);
        const float factor = __int_as_float((268 - exponent) << 23);
        const float inverse = __int_as_float((exponent - 14) << 23);
        scale[0] = __shfl_sync(~0u, inverse, 8 * pair);
        scale[1] = __shfl_sync(~0u, inverse, 8 * pair + 4);
        float left[2] = {};
#pragma unroll
        for (int j = 0; j < W; j++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float times = i % 2 ? factor * 0.0625f : factor;
                const float a = low(mine[j][i]) * times, b = high(mine[j][i]) * times;
                sum += (a + b) * (i % 2 ? -1152.0f : -1032.0f);
                mine[j][i] = pack_half(a, b);
            }
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const int g = slot * W + j;
            if (g == 2 * pair) left[0] = sum;
            if (g == 2 * pair + 1) left[1] = sum;
        }
#pragma unroll
        for (int i = 0; i < 3; i++) {
            too_much[i] = pack(left[0], left[1]);
            left[0] -= low(too_much[i]), left[1] -= high(too_much[i]);
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
#pragma unroll
            for (int i = 0; i < 4; i++) rows[g][i] = g / W == slot ? mine[g % W][i] : 0;
    }

    // Sums of the lane's rows lane / 4 and 8 below it, each for two columns: the warp's words of the first two groups are
    // where `words` says for this lane, the scales of its row at `scales`. `read` is called with
    // something of all that was read, scales as well: the compiler loads them where it likes.
    template <int W, int SCALE_PITCH, class Read>
    __device__ __forceinline__ float4 multiply(u32 words, const u8* scales, Read read) const {
        const int pair = threadIdx.x % 4;
        // Of two groups, rows of the first eight and of the second.
        const u32 l2 = *(const u32*)(scales + 4 * pair), u2 = *(const u32*)(scales + 8 * SCALE_PITCH + 4 * pair);
        uint2 l4 = make_uint2(0, 0), u4 = l4;
        if (W == 4) l4 = *(const uint2*)(scales + pair / 2 * 8), u4 = *(const uint2*)(scales + 8 * SCALE_PITCH + pair / 2 * 8);
        float sum[4] = {}, c[W == 4 ? 4 : 2][4] = {};
        auto add = [&](const float(&c)[4], u32 l, u32 u, bool second) {
            const float s = second ? high(l) : low(l), r = second ? high(u) : low(u);
            sum[0] += c[0] * s, sum[1] += c[1] * s, sum[2] += c[2] * r, sum[3] += c[3] * r;
        };
#pragma unroll
        for (int i = 0; i < 3; i++) mma_of_8(sum, l2, u2, too_much[i]);
#pragma unroll
        for (int two = 0; two < GROUPS / 2; two++) {
            u32 w[4], l8 = 0, u8s = 0;  // words of the first rows and the second, of two groups
            load_matrices(w, words ^ 32 * two);
            if (W == 8) l8 = *(const u32*)(scales + 4 * two), u8s = *(const u32*)(scales + 8 * SCALE_PITCH + 4 * two);
            if (TOKENS > 1 && two == GROUPS / 2 - 1) read(w[3] ^ l2 ^ u2 ^ l4.x ^ u4.x ^ l8 ^ u8s);
            constexpr u32 FIRST = 0x000f000f, SECOND = 0x00f000f0;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int g = 2 * two + i;
                float(&sums_of)[4] = c[W == 4 ? g % 4 : i];
                const u32(&b)[4] = rows[g];
                const u32 l = w[2 * i], u = w[2 * i + 1], l_8 = l >> 8, u_8 = u >> 8;
                mma_fp16(sums_of, fp16_of(l, FIRST), fp16_of(u, FIRST), fp16_of(l, SECOND), fp16_of(u, SECOND), b[0], b[1]);
                mma_fp16(sums_of, fp16_of(l_8, FIRST), fp16_of(u_8, FIRST), fp16_of(l_8, SECOND), fp16_of(u_8, SECOND), b[2], b[3]);
                if (W == 8) {
                    add(sums_of, l8, u8s, i);
#pragma unroll
                    for (int k = 0; k < 4; k++) sums_of[k] = 0;
                }
            }
        }
        if (W == 1) {
            sum[0] += (c[0][0] + c[1][0]) * low(l2), sum[1] += (c[0][1] + c[1][1]) * high(l2);
            sum[2] += (c[0][2] + c[1][2]) * low(u2), sum[3] += (c[0][3] + c[1][3]) * high(u2);
            if (TOKENS == 1) read(__float_as_uint(sum[0]) ^ __float_as_uint(sum[2]));  // later than need be, in fewer registers
        }
        if (W == 2) add(c[0], l2, u2, false), add(c[1], l2, u2, true);
        if (W == 4) {
            add(c[0], l4.x, u4.x, false), add(c[1], l4.x, u4.x, true);
            add(c[2 % (W == 4 ? 4 : 2)], l4.y, u4.y, false), add(c[3 % (W == 4 ? 4 : 2)], l4.y, u4.y, true);
        }
        return make_float4(sum[0] * scale[0], sum[1] * scale[1], sum[2] * scale[0], sum[3] * scale[1]);
    }
};
