// Where the chunks of Gated DeltaNet lie in `work`, for gdn_chunks.cu, which makes them, and gdn_segments.cu and
// gdn_states.cu, which walk them.
//
// A chunk of a key head has keys and queries, which its value heads share, and then the parts of each of those. Keys,
// queries and T lie as a warpgroup's operands do in shared memory: rows are tokens, in slabs of 64 columns (128 bytes)
// whose 16-byte piece p of row t is in place p ^ t % 8. P's blocks are a warp's operands, V's are those of chunk_tiles.cuh by channels.

constexpr int SLAB = 128 * CHUNK;
// Of a key head.
constexpr int KEYS_AT = 0, QUERIES_AT = 2 * SLAB, SHARED_BY_HEADS = 4 * SLAB;
// Of a value head. Factors: of each token, decays from the beginning of the chunk, decays to its end; and those of all.
// Beside them, where the chunk belongs: the slot that its state is saved in, or 0; sequence, first token, the sequence's end.
constexpr int T_AT = 0, PAIRS_AT = SLAB, FACTORS_AT = PAIRS_AT + 10 * BLOCK, FACTORS = 1024;
constexpr int PLACE_AT = FACTORS_AT + 4 * (2 * CHUNK + 4);
constexpr int VALUES_AT = FACTORS_AT + FACTORS, SQUARES_AT = VALUES_AT + TILE;
// Sums of outputs' squares by 64 values and token, which blocks of gdn_states.cu tell each other.
constexpr int SQUARES = 4 * CHUNK, OF_HEAD = SQUARES_AT + 2 * SQUARES;

// Where columns 2 c and 2 c + 1 of a row lie in slabs.
__device__ __forceinline__ int in_slabs(int row, int c) {
    return c / 32 * SLAB + row * 128 + (c % 32 / 4 ^ row % 8) * 16 + c % 4 * 4;
}
