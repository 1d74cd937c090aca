// What chunks.cu and states.cu share.

// Where in `work` a chunk of a head has its parts, and the bytes of a block of 16 by 16 and of a tile.
constexpr int K = 128, CHUNK = 64, BLOCK = 512, TILE = CHUNK * K * 2;
constexpr int W_AT = 0, Q_AT = TILE, K_AT = 2 * TILE, P_AT = 3 * TILE, A_AT = P_AT + 10 * BLOCK, U_AT = A_AT + 4 * K;
constexpr int WORK = U_AT + TILE;
