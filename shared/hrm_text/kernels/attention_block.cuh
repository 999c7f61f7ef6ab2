// A block of 16 tokens of a context in shared memory, and what a warp makes of it: two products on tensor cores, its keys the
// A side of one, its values, transposed, of the other. The B side, query and weights, has what bf16 keeps of them in even
// columns and what it cuts off in odd ones, so scores and mixture are as exact as in float32.

constexpr int BLOCK = 16;           // tokens
constexpr int LINE = 2 * DIM;       // bytes of a token's key or value
constexpr int TILE = BLOCK * LINE;  // of a block's keys; its values follow
static_assert(DIM == 128, "a lane has 4 columns of a head, and a line is half a row of lanes");

DEVICE int lane() { return thread() % 32; }

// Where 16 bytes of a tile's line lie, so that those of 8 lines are in all banks. An even number of lines or pieces
// behind, of a place in the first two lines or pieces, is one instruction away.
DEVICE int piece_at(int line, int piece) { return line * LINE + (piece ^ line % 8) * 16; }
DEVICE int lines_behind(int at, int even) { return (at ^ even % 8 * 16) + even * LINE; }
DEVICE int pieces_behind(int at, int even) { return at ^ even * 16; }

struct Softmax {
  float peak = MINUS_INFINITY, total = 0.0f;  // the total is this lane's tokens'
  float mixed[DIM / 16][4] = {};              // [i]: of columns 16 i + lane / 4 and the one 8 behind, two addends each
};
typedef u32 Query[DIM / 16][2];  // as the B side

DEVICE void read_query(Query& q, const u16* query) {
  const u16* from = query + lane() / 4 % 2 * DIM + lane() % 4 * 2;
#pragma unroll
  for (int i = 0; i < DIM / 16; i++) q[i][0] = *(const u32*)(from + 16 * i), q[i][1] = *(const u32*)(from + 16 * i + 8);
}

// What bf16 keeps, and what it cuts off.
DEVICE u32 halves(float value) {
  const u16 kept = bf16(value);
  return kept | (u32)bf16(value - low(kept)) << 16;
}

// `there` tokens, at least one.
DEVICE void attend(Softmax& softmax, const Query& q, const char* tile, int there) {
  float score[2][4] = {};
  const int keys = piece_at(lane() % 16, lane() / 16);
#pragma unroll
  for (int i = 0; i < DIM / 16; i++) {
    u32 a[4];
    read_matrices(a, tile + pieces_behind(keys, 2 * i));
    multiply(score[i % 2], a[0], a[1], a[2], a[3], q[i][0], q[i][1]);
  }
  float first = (score[0][0] + score[1][0]) + (score[0][1] + score[1][1]);   // of token lane / 4
  float second = (score[0][2] + score[1][2]) + (score[0][3] + score[1][3]);  // of the one 8 behind
  if (lane() / 4 >= there) first = MINUS_INFINITY;
  if (lane() / 4 + 8 >= there) second = MINUS_INFINITY;
  float top = larger(first, second);  // a NaN comes through the weights
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) top = larger(top, other_lane(top, distance));
  if (top > softmax.peak) {
    const float keep = power_of_2(softmax.peak - top);
    softmax.peak = top, softmax.total *= keep;
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) softmax.mixed[i][j] *= keep;
  }
  first = power_of_2(first - softmax.peak), second = power_of_2(second - softmax.peak);
  softmax.total += first + second;
  const u32 b0 = transposed(halves(first)), b1 = transposed(halves(second));
  const int values = piece_at(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
#pragma unroll
  for (int i = 0; i < DIM / 16; i++) {
    u32 a[4];
    read_transposed_matrices(a, tile + TILE + pieces_behind(values, 2 * i));
    multiply(softmax.mixed[i], a[0], a[1], a[2], a[3], b0, b1);
  }
}
