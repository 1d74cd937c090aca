// How a warpgroup of products.cu multiplies a tile, and stores it.

// Where rows go.
struct Out {
    u16* rows;
    long long stride;
    int columns;
    const TensorMap* map;  // of LATER
};

// Unit v of a warp's results, in four pairs as store_turned takes them.
template <int N> __device__ __forceinline__ void finish_unit(
    float (&a)[8 * N], float (&b)[8 * N], int v, const float* of_rows, u32 (&two)[4]) {
#pragma unroll
    for (int q = 0; q < 4; q++) {
        float x = a[8 * v + 2 * q], y = a[8 * v + 2 * q + 1];
#if FP8
        const float2 scale = *(const float2*)(of_rows + UNIT * v + q / 2 * 8 + threadIdx.x % 4 * 2);
        x *= scale.x, y *= scale.y;
#endif
#if GATED
        float up = b[8 * v + 2 * q], other_up = b[8 * v + 2 * q + 1];
#if FP8
        up *= scale.x, other_up *= scale.y;
#endif
        x = x / (1.0f + __expf(-x)) * up, y = y / (1.0f + __expf(-y)) * other_up;
#endif
        two[q] = pack(x, y);
    }
}

#if LATER
// A warpgroup's 64 columns of a tile to a place of their own in shared memory, from where the copy unit takes them, 16 rows
// at a time, while the next tile is multiplied. Behind an expert's rows are those of another, so the last ones go by stores.
template <int N> __device__ __forceinline__ void store_tile(
    Shared& s, float (&a)[8 * N], float (&b)[8 * N], const Work& work, const Out& out, int group) {
    int tid = threadIdx.x % 128;
    forget(tid);  // what follows from it would take registers from the products
    const int lane = tid % 32, warp = tid / 32;
    const u32 from = shared_address(s.out[group]);
    const u32 write = from + (lane / 16 * 8 + lane % 8) * STEP_BYTES + ((warp * 2 + lane / 8 % 2 ^ lane % 8) << 4);
    const int whole = (work.count + (DENSE ? UNIT - 1 : 0)) / UNIT;  // the map ends with the rows of DENSE
    const int row = whole * UNIT + tid / 8;
#pragma unroll
    for (int half = 0; half < (GATED ? 1 : 2); half++) {
        const int column = work.part * (GATED ? 128 : 256) + 128 * half + 64 * group;
        if (tid == 0) wait_until_read();
        wait_at<128>(1 + group);
#pragma unroll
        for (int v = 0; v < N; v++) {
            u32 two[4];
            finish_unit<N>(half ? b : a, b, v, s.of_rows[group], two);
            store_turned(write + v * UNIT * STEP_BYTES, two[0], two[1], two[2], two[3]);
        }
        share_writes();
        wait_at<128>(1 + group);
        if (tid == 0 && column < out.columns)
#pragma unroll 1
            for (int u = 0; u < whole; u++)
                (ADD ? add_tile : write_tile)(out.map, column, work.first + u * UNIT, from + u * UNIT * STEP_BYTES);
        if (!DENSE && row < work.count && column + tid % 8 * 8 < out.columns)
            *(uint4*)(out.rows + (work.first + row) * out.stride + column + tid % 8 * 8) =
                *(const uint4*)(s.out[group] + row * STEP_BYTES + ((tid % 8 ^ row % 8) << 4));
    }
}
#else
template <int N> __device__ __forceinline__ void store_chunks(
    float (&a)[8 * N], float (&b)[8 * N], const Work& work, u8* stage, const float* of_rows, const int* to, const Out& out,
    int column, int group, int& turn) {
    const int tid = threadIdx.x % 128, lane = tid % 32, warp = tid / 32;
    const u32 write = shared_address(stage) + (lane / 16 * 8 + lane % 8) * STEP_BYTES + ((warp * 2 + lane / 8 % 2 ^ lane % 8) << 4);
#pragma unroll
    for (int u = 0; u < N; u += 2) {
#pragma unroll
        for (int v = u; v < u + 2 && v < N; v++) {
            u32 two[4];
            finish_unit<N>(a, b, v, of_rows, two);
            store_turned(write + turn * OUT_BYTES + (v - u) * UNIT * STEP_BYTES, two[0], two[1], two[2], two[3]);
        }
        wait_at<128>(1 + group);
#pragma unroll
        for (int v = u; v < u + 2 && v < N; v++) {
            const int within = (v - u) * UNIT + tid / 8, row = UNIT * v + tid / 8;
            const uint4 x = *(const uint4*)(stage + turn * OUT_BYTES + within * STEP_BYTES + ((tid % 8 ^ within % 8) << 4));
            if (row < work.count && column + tid % 8 * 8 < out.columns) {
                const long long place = to ? to[row] : work.first + row;
                *(uint4*)(out.rows + place * out.stride + column + tid % 8 * 8) = x;
            }
        }
        turn ^= 1;
    }
    __syncwarp();  // a lane arrives for all
}
#endif

template <int N> __device__ __forceinline__ void multiply_tile(
    Shared& s, Ring& ring, int steps, const Work& work, const int* sorted, const Out& out, int group, int& turn, int& parity) {
    const int tid = threadIdx.x % 128, lane = tid % 32;
#if !GATED && !DENSE
    int place[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        place[i] = tid + 128 * i < UNIT * N ? load_int(sorted + work.first + min(tid + 128 * i, max(work.count, 1) - 1)) : 0;
#endif
    float c[2][8 * N];
    auto release = [&](int stage, u32 seen = 0) {  // once what was read by loads is here (see arrive_once_read)
        const u32 empty = shared_address(&s.empty[stage]) + (seen & (u32)steps >> 30);
        if (lane == 0) arrive_at_barrier(empty);
        if (CLUSTER > 1 && lane == 0) arrive_at_barrier_of(1 - blockIdx.x % 2, empty);
    };
#pragma unroll
    for (int i = 0; i < 8 * N; i++) c[0][i] = c[1][i] = 0.0f;
#if FP8
    wait_at_barrier(shared_address(&s.full[ring.stage]), ring.phase);
    for (int i = tid; i < UNIT * N; i += 128) s.of_rows[group][i] = s.scales[ring.stage][i];
#pragma unroll 1
    for (int k = 0; k < steps; k++) {
        const int stage = ring.stage;
        wait_at_barrier(shared_address(&s.full[stage]), ring.phase);
#if !MAPPED
        share_writes();
#endif
        const u32 rows = shared_address(s.rows[stage]);
        const float* scales = s.scales[stage];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 weights = shared_address(s.weights[stage]) + half * BOX + group * 64 * STEP_BYTES;
            float p[8 * N];
            settle(p);
            begin_products();
#pragma unroll
            for (int i = 0; i < STEP_BYTES; i += 32) multiply<N, FP8>(p, describe(weights + i, 16), describe(rows + i, 16), i);
            commit_products();
#if DENSE
            const float* of = scales + MOST + half * 128 + group * 64 + tid / 32 * 16 + lane / 4;
            const float low_scale = of[0], high_scale = of[8];
#else
            const float low_scale = scales[MOST + half], high_scale = low_scale;
#endif
            wait_for_products<0>();
            settle(p);
#pragma unroll
            for (int i = 0; i < 8 * N; i++) c[half][i] += p[i] * (i % 4 < 2 ? low_scale : high_scale);
        }
        __syncwarp();
        release(stage, __float_as_uint(c[1][8 * N - 1]));
        ring.advance();
    }
    wait_at<128>(1 + group);
#else
    settle(c[0]);
    settle(c[1]);
    int before = 0;
#pragma unroll 1
    for (int k = 0; k < steps; k++) {
        const int stage = ring.stage;
        wait_at_barrier(shared_address(&s.full[stage]), ring.phase);
#if !MAPPED
        share_writes();
#endif
        const u32 weights = shared_address(s.weights[stage]) + group * 64 * STEP_BYTES, rows = shared_address(s.rows[stage]);
        begin_products();
#pragma unroll
        for (int i = 0; i < STEP_BYTES; i += 32)
#pragma unroll
            for (int half = 0; half < 2; half++)
                multiply<N, FP8>(c[half], describe(weights + half * BOX + i, 16), describe(rows + i, 16), 1);
        commit_products();
        wait_for_products<1>();
        if (k > 0) release(before);
        before = stage;
        ring.advance();
    }
    wait_for_products<0>();
    release(before);
    settle(c[0]);
    settle(c[1]);
#endif
#if LATER
    store_tile<N>(s, c[0], c[1], work, out, group);
#else
    const int* to = nullptr;
#if !GATED && !DENSE
    int* places = s.to[group][parity];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (tid + 128 * i < UNIT * N) places[tid + 128 * i] = place[i];
    to = places;
    parity ^= 1;
#endif
    u8* stage = s.out[group][0];
#if GATED
    store_chunks<N>(c[0], c[1], work, stage, s.of_rows[group], to, out, work.part * 128 + group * 64, group, turn);
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int column = work.part * 256 + half * 128 + group * 64;
        store_chunks<N>(c[half], c[half], work, stage, s.of_rows[group], to, out, column, group, turn);
    }
#endif
#endif
}
