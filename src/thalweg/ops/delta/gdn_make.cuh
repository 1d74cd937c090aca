// Makes chunks of Gated DeltaNet, for gdn_chunks.cu, which says what of, and gdn_prompt.cu.

struct Prompt {
    const bf16 *qkv, *beta, *gate, *conv_weight;
    bf16* conv_state;
    const float *A_log, *dt_bias;
    const long long* slots;
    const int *pieces, *offsets, *saves;
    u8* work;
    long long qkv_stride, beta_stride, gate_stride;
    int H;
};
// Of every head and token; of a head, products of decays between tokens of a sub-block, from its beginning, to its end.
struct alignas(16) Making {
    float beta[RATIO][CHUNK], decay[RATIO][CHUNK];
    float between[4][SUB][SUB + 1], from_start[CHUNK], to_end[CHUNK], total[4];
    UnitRows unit;
    int item;  // of gdn_prompt.cu
};

// Chunk n of all value heads of a key head, by a team. Returns whether there is such a chunk.
__device__ __forceinline__ bool make_chunk(const Prompt& of, int n, int key_head, u8* shared, Making& making, Here at) {
    const int tid = maker(), warp = at.warp, s = at.s, c = at.c;
    const int H = of.H, key_heads = H / RATIO;
    // Inputs of queries and keys come to where their tiles go, and then those of every other head's values.
    u8 *const k_tile = shared, *const q_tile = shared + TILE;
    const Solving solving = solving_at(shared + 3 * INPUT);
    auto values_at = [&](int r) { return shared + (r % 2 ? 0 : 2 * INPUT); };
    auto channel_of = [&](int p) { return (p * key_heads + key_head) * K; };  // of queries and keys
    auto values_of = [&](int r) { return (2 * key_heads + key_head * RATIO + r) * K; };
    auto &beta_s = making.beta, &decay_s = making.decay;
    auto& between_s = making.between;
    auto &from_start_s = making.from_start, &to_end_s = making.to_end;
    auto& total_s = making.total;

    const Piece piece = piece_of(n, of.pieces, of.offsets, of.saves);
    const int first = piece.first, count = piece.count;
    if (count <= 0) return false;
    const Inputs in = {of.qkv, of.conv_state, of.qkv_stride, (2 * key_heads + H) * K};
    const long long slot = piece.begins ? of.slots[piece.sequence] : 0;
    auto taps_at = [&](int channel) { return load16(of.conv_weight + 4 * (channel + 2 * c)); };
    fetch(shared + INPUT, in, piece, slot, channel_of(1));
    fetch(shared, in, piece, slot, channel_of(0));
    commit_copies();

    for (int i = tid; i < RATIO * CHUNK; i += MAKERS) {
        const int r = i / CHUNK, t = i % CHUNK, h = key_head * RATIO + r;
        const bool there = t < count;
        const float b = there ? from_bf16(of.beta[(first + t) * of.beta_stride + h]) : 0.0f;
        const float x = there ? from_bf16(of.gate[(first + t) * of.gate_stride + h]) : 0.0f;
        beta_s[r][t] = there ? sigmoid(b) : 0.0f;
        decay_s[r][t] = there ? decay(x, of.dt_bias[h] * LOG2_E, __expf(of.A_log[h])) : 1.0f;
    }
    u8* const group = of.work + ((long long)n * key_heads + key_head) * (SHARED_BY_HEADS + RATIO * OF_HEAD);
    {
        u32 k[SUB], q[SUB];
        const uint4 k_taps = taps_at(channel_of(1)), q_taps = taps_at(channel_of(0));
        wait_for_copies<0>();
        wait_for_team(at);
        fetch(values_at(0), in, piece, slot, values_of(0));  // now, or keys and queries of other blocks would be late
        commit_copies();
        unit_rows<false, true>(k, q, shared + INPUT, shared, k_taps, q_taps, nullptr, making.unit, at);
#pragma unroll
        for (int i = 0; i < SUB; i++) {
            u8* const to = group + in_slabs(SUB * s + i, c);
            *(u32*)(to + KEYS_AT) = pack(half_low(k[i]), half_high(k[i]));
            *(u32*)(to + QUERIES_AT) = pack(half_low(q[i]), half_high(q[i]));
        }
        if (piece.save > 0 && tid < 6 * 16)
            save_rows(of.conv_state, shared + tid / 48 * INPUT, piece.save, in.C, channel_of(tid / 48), tid % 48);
        wait_for_team(at);  // inputs of queries and keys have been read
        store_tokens(k_tile, k, at);
        store_tokens(q_tile, q, at);
    }
    wait_for_team(at);

    // Products as they are: blocks on the diagonals of A (even warps) and P (odd ones), and those below, 6 of each, 2 for
    // each odd warp, 1 for each even one, which inverts as well.
    float on_left[4] = {}, on_right[4] = {}, below_left[2][4] = {}, below_right[2][4] = {};
    auto product = [&](float (&left)[4], float (&right)[4], const u8* rows, int i, int j) {
#pragma unroll 4
        for (int column = 0; column < 8; column++)
            multiply_tokens(left, right, tokens_of(rows, column, i, at), tokens_of(k_tile, column, j, at));
    };
    product(on_left, on_right, warp % 2 ? q_tile : k_tile, s, s);
    auto task_of = [&](int e) { return warp % 2 ? warp - 1 + e : 8 + warp / 2; };
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int task = task_of(e), pair = task % 6;
        if (e == 0 || warp % 2)
            product(below_left[e], below_right[e], task < 6 ? k_tile : q_tile, row_of(pair), column_of(pair));
    }

#pragma unroll 1
    for (int r = 0; r < RATIO; r++) {
        forget(at.lane), forget(at.c);  // or all addresses are kept from head to head
        u8* const out = group + SHARED_BY_HEADS + r * OF_HEAD;
        const float *const betas = beta_s[r], *const decays = decay_s[r];
        if (tid < CHUNK) *(uint2*)(out + SQUARES_AT + 8 * tid) = make_uint2(NOT_YET, NOT_YET);
        const uint4 taps = taps_at(values_of(r));
        wait_for_copies<0>();
        if (tid == 0) wait_until_read();
        wait_for_team(at);  // values have come, and nothing is read any more that others used before
        if (r + 1 < RATIO) fetch(values_at(r + 1), in, piece, slot, values_of(r + 1));
        commit_copies();
        if (piece.save > 0 && tid < 3 * 16)
            save_rows(of.conv_state, values_at(r), piece.save, in.C, values_of(r), tid);

        u32 first_of[8], second_of[8];  // of pairs of tokens, this thread's two channels
        {
            float2 v[SUB];
            convolve<true>(v, values_at(r), taps, at);
#pragma unroll
            for (int t = 0; t < SUB; t += 2) {
                first_of[t / 2] = pack(v[t].x, v[t + 1].x);
                second_of[t / 2] = pack(v[t].y, v[t + 1].y);
            }
        }
        float a[SUB];
#pragma unroll
        for (int t = 0; t < SUB; t++) a[t] = decays[SUB * s + t];
        if (c < SUB) {
            float x = 1.0f;
#pragma unroll
            for (int t = 0; t < SUB; t++) {
                if (t > c) x *= a[t];
                between_s[s][t][c] = t < c ? 0.0f : x;
            }
        } else if (c == 32) {
            float x = 1.0f;
#pragma unroll
            for (int t = 0; t < SUB; t++) from_start_s[SUB * s + t] = x *= a[t];
            total_s[s] = x;
        } else if (c == 33) {
            float x = 1.0f;
#pragma unroll
            for (int t = SUB - 1; t >= 0; t--) to_end_s[SUB * s + t] = x, x *= a[t];
        }
        wait_for_team(at);

        if (tid < CHUNK) {
            float f = from_start_s[tid], g = to_end_s[tid];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (i < tid / SUB) f *= total_s[i];
                if (i > tid / SUB) g *= total_s[i];
            }
            float* const factors = (float*)(out + FACTORS_AT);
            factors[tid] = f, factors[CHUNK + tid] = g;
            if (tid == CHUNK - 1) factors[2 * CHUNK] = f;
            if (tid == 0) *(uint4*)(out + PLACE_AT) = make_uint4(piece.save, piece.sequence, first, of.offsets[piece.sequence + 1]);
        }
        store_channels(values_at(r), first_of, second_of, swap_of(at), at);  // over their inputs
        share_writes();
        const int lane = at.lane, row = lane / 4, i_s = SUB * s + row;
        float diagonal[6];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int j = 2 * (lane % 4) + e;
            diagonal[e] = on_left[e] * between_s[s][row][j];
            diagonal[2 + e] = on_left[2 + e] * between_s[s][row + 8][j];
            diagonal[4 + e] = on_right[2 + e] * between_s[s][row + 8][j + 8];
        }
        auto below = [&](const float (&from_left)[4], const float (&from_right)[4], int task) {
            forget(task);
            const int pair = task % 6, i = row_of(pair), j = column_of(pair);
            const bool is_A = task < 6;
            float rest = is_A ? -1.0f : 1.0f;  // and of the sub-blocks that lie between
            for (int m = j + 1; m < i; m++) rest *= total_s[m];
            float factors[2], left[4], right[4];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int t = SUB * i + row + 8 * e;
                factors[e] = rest * from_start_s[t] * (is_A ? betas[t] : 1.0f);
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float* to_end = to_end_s + SUB * j + 2 * (lane % 4) + e % 2;
                left[e] = from_left[e] * factors[e / 2] * to_end[0];
                right[e] = from_right[e] * factors[e / 2] * to_end[8];
            }
            if (is_A) store_A(solving, pair, left, right, lane);
            else store_P(out + PAIRS_AT, i, j, pack_block(left, right), lane);
        };
        below(below_left[0], below_right[0], task_of(0));
        if (warp % 2) {
            store_P_diagonal(out + PAIRS_AT, diagonal, at);
            below(below_left[1], below_right[1], task_of(1));
        } else {
            const float b0 = betas[i_s], b1 = betas[i_s + 8];
#pragma unroll
            for (int e = 0; e < 6; e++) diagonal[e] *= e < 2 ? b0 : b1;
            invert(solving, diagonal, at);
        }
        wait_for_team(at);
        if (tid == 0) write_bytes(out + VALUES_AT, shared_address(values_at(r)), TILE);
        if (warp % 2 == 0) invert_below(out + T_AT, solving, betas, s, at);
    }
    if (tid == 0) wait_until_written();
    return true;
}
