// y = W x for 9 to 32 tokens, with what surrounds it in the model: bound by reading W once, and by how x is shared out.
//
// Each multiprocessor has to be given all of x that its part of W is multiplied with. Were W dealt by rows, x would go to
// every one of them, as many bytes as W. So it is dealt by rows to clusters of SPLITS CTAs, and among these by columns:
// a CTA takes ROWS_HERE rows, PART columns, and only that part of x, which one copy brings into shared memory.
// Sums over the CTAs of a cluster go by way of its shared memory: each finishes some of the cluster's rows.
//
// A warp takes 32 rows and SLICE columns. What it multiplies, each lane has fetched itself, a 16-byte piece of 4 rows at a
// time, STAGES of them on their way: nobody else waits for them. The first are asked for while the kernel before still
// runs; there is room for those of the next kernel in the same multiprocessor (clustered.py).

constexpr int PART = K / SPLITS, SLICE = PART / K_WARPS, BLOCKS = SLICE / 32;
constexpr int ROWS_HERE = 32 * ROW_WARPS;
constexpr int OUTPUTS = SWIGLU ? ROWS / 2 : ROWS;
constexpr int STAGE = 32 * 64;  // bytes: 32 columns of 32 rows; with SWIGLU 16 of gate and the same 16 of up
constexpr int RING = WARPS * STAGES * STAGE, X_BYTES = PART * TOKENS * 2;
constexpr int TILES = 2 * ROW_WARPS / SPLITS;  // of 16 rows, which a CTA finishes
constexpr int OUTPUTS_MINE = TILES * 16 / (SWIGLU ? 2 : 1), OUTPUTS_HERE = OUTPUTS_MINE * SPLITS;
constexpr int STRIDE = 20;  // floats of a token's sums of 16 rows, of which 8 tokens lie in different banks
constexpr int SUMS = TILES * SPLITS * TOKENS * STRIDE;  // floats that a CTA is sent, and squares behind them
constexpr int SENT = 4 * (TILES * (SPLITS - 1) * TOKENS * 16 + (NORM ? SPLITS * WARPS * TOKENS : 0));  // bytes, by the others
constexpr int EIGHTS = 4 / K_WARPS;  // of 8 rows, which a warp sums up over those that share its rows
constexpr int PARTS = WARPS * (4 - EIGHTS) * TOKENS * 8;  // floats, for that
constexpr int EACH = 4;             // outputs of one token that a thread finishes at a time
constexpr int ITEMS = OUTPUTS_MINE / EACH * TOKENS, ROUNDS = (ITEMS + 32 * WARPS - 1) / (32 * WARPS);
constexpr int GROUPS = TOKENS / 16;
static_assert(WARPS == ROW_WARPS * K_WARPS && 4 % K_WARPS == 0 && K % (32 * SPLITS * K_WARPS) == 0 && ROWS % ROWS_HERE == 0, "division");
static_assert(2 * ROW_WARPS % SPLITS == 0 && (!SWIGLU || TILES % 2 == 0) && TOKENS % 16 == 0, "shares");
static_assert(4 * (SUMS + SPLITS * WARPS * TOKENS + PARTS) <= RING + X_BYTES, "sums fit where W and x were");
static_assert(PART / 32 <= 32, "a lane for each block of x");

struct Params {
  const u16 *x, *w, *residual;
  u16* out;
  int tokens;
  float eps;
};

struct Shared {
  char *ring, *x;
  float *sums, *squares, *parts;  // in their place, when they have been read
  u64 *x_there, *all_read, *all_sent;  // barriers: x; by every CTA of the cluster, W and x; sums and squares
  DEVICE Shared(char* memory)
      : ring(memory), x(memory + RING), sums((float*)memory), squares(sums + SUMS),
        parts(squares + SPLITS * WARPS * TOKENS), x_there((u64*)(x + X_BYTES)),
        all_read(x_there + 1), all_sent(x_there + 2) {}
};

DEVICE int row_warp() { return thread() / 32 / K_WARPS; }
DEVICE int k_warp() { return thread() / 32 % K_WARPS; }

// Of this lane's rows the first in the part of W that its CTA has: a quarter of 32 columns.
DEVICE const u16* first_piece(const u16* w) {
  const int lane = thread() % 32;
  const int row = cta() / SPLITS * (SWIGLU ? OUTPUTS_HERE : ROWS_HERE) + row_warp() * (SWIGLU ? 16 : 32) + lane / 4;
  return w + (long long)row * K + cluster_rank() * PART + k_warp() * SLICE + lane % 4 * 8;
}
DEVICE void ask_for_stage(char* stage, const u16* piece, u64 policy) {
  constexpr long long SECOND = (long long)(SWIGLU ? OUTPUTS : 16) * K;
#pragma unroll
  for (int i = 0; i < 4; i++)
    copy_16_bytes(stage + thread() % 32 * 16 + i * 512, piece + i / 2 * SECOND + i % 2 * 8 * K, policy);
}

// An output's four neighbours of a token, which this thread finishes.
struct Item {
  int token, first;  // of the outputs that the CTA finishes
  bool mine;
  DEVICE Item(const Params& p, int round) {
    const int index = thread() + round * 32 * WARPS;
    token = index % TOKENS, first = index / TOKENS * EACH;
    mine = index < ITEMS && token < p.tokens;
  }
  DEVICE int column() const { return cta() / SPLITS * OUTPUTS_HERE + cluster_rank() * OUTPUTS_MINE + first; }
  DEVICE int in_blocks(const Params& p) const { return in_blocks_at(token, p.tokens, column()); }
};

// This lane's quarter of 32 columns of a token in the CTA's part of x. Tokens past the last one are the last one again.
DEVICE const char* quarter_of(const Shared& shared, const Params& p, int token, int block) {
  return shared.x + ((block * p.tokens + (token < p.tokens ? token : p.tokens - 1)) * 4 + thread() % 4) * 16;
}

// sum[i][j]: of 16 tokens and 8 of the warp's rows. Which column is which does not matter where both sides agree: a
// lane's 16 bytes of x and of W are what it has in two products of 16 columns. Warps with the same columns square x in
// turn: x times x has that on the diagonal, of 8 tokens a time.
DEVICE void multiply_all(float (&sum)[GROUPS][4][4], float (&squares)[2 * GROUPS][4], const Shared& shared, const Params& p,
                         char* ring, const u16* piece, u64 policy) {
  const int lane = thread() % 32;
  const char *upper[GROUPS], *lower[GROUPS];
#pragma unroll
  for (int i = 0; i < GROUPS; i++) {
    upper[i] = quarter_of(shared, p, 16 * i + lane / 4, k_warp() * BLOCKS);
    lower[i] = quarter_of(shared, p, 16 * i + lane / 4 + 8, k_warp() * BLOCKS);
  }
#pragma unroll 1
  for (int k = 0; k < BLOCKS; k++) {
    char* stage = ring + k % STAGES * STAGE;
    const int x = k * p.tokens * 64;
    wait_for_groups<STAGES - 1>();
    uint4 w[4];
#pragma unroll
    for (int j = 0; j < 4; j++) w[j] = *(const uint4*)(stage + lane * 16 + j * 512);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const uint4 a = *(const uint4*)(upper[i] + x), a8 = *(const uint4*)(lower[i] + x);
#pragma unroll
      for (int j = 0; j < 4; j++) multiply(sum[i][j], a.x, a8.x, a.y, a8.y, w[j].x, w[j].y);
#pragma unroll
      for (int j = 0; j < 4; j++) multiply(sum[i][j], a.z, a8.z, a.w, a8.w, w[j].z, w[j].w);
      if (NORM && k % ROW_WARPS == row_warp()) {
        float(&upper_8)[4] = squares[2 * i], (&lower_8)[4] = squares[2 * i + 1];
        multiply(upper_8, a.x, 0, a.y, 0, a.x, a.y), multiply(upper_8, a.z, 0, a.w, 0, a.z, a.w);
        multiply(lower_8, a8.x, 0, a8.y, 0, a8.x, a8.y), multiply(lower_8, a8.z, 0, a8.w, 0, a8.z, a8.w);
      }
    }
    if (k + STAGES < BLOCKS) ask_for_stage(stage, piece + (k + STAGES) * 32, policy);
    end_group();
  }
}

// Where a lane of a warp leaves its sums of 8 rows that another one, which shares them, sums up.
DEVICE float4* part_of(const Shared& shared, int k, int eighth) {
  const int owner = eighth / EIGHTS, others = (row_warp() * K_WARPS + k) * (K_WARPS - 1) + owner - (owner > k);
  return (float4*)shared.parts + (others * EIGHTS + eighth % EIGHTS) * GROUPS * 32 + thread() % 32;
}
DEVICE void sum_over_k_warps(float (&sum)[GROUPS][4][4], const Shared& shared) {
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
      if (j / EIGHTS != k_warp())
        part_of(shared, k_warp(), j)[i * 32] = {sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]};
  sync_all();
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
#pragma unroll
      for (int k = 0; k < K_WARPS; k++)
        if (j / EIGHTS == k_warp() && k != k_warp()) {
          const float4 part = part_of(shared, k, j)[i * 32];
          sum[i][j][0] += part.x, sum[i][j][1] += part.y, sum[i][j][2] += part.z, sum[i][j][3] += part.w;
        }
}

// Each 16 rows to the CTA that finishes them; two lanes of a token and the one 8 below give each other theirs.
DEVICE void send_all(const float (&sum)[GROUPS][4][4], const float (&squares)[2 * GROUPS][4], const Shared& shared) {
  const int lane = thread() % 32, odd = lane % 2;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (j / EIGHTS != k_warp()) continue;
    const int tile = row_warp() * 2 + j / 2, owner = tile / TILES;
    float* place = shared.sums + ((tile % TILES * SPLITS + cluster_rank()) * TOKENS + lane / 4 + odd * 8) * STRIDE +
                   j % 2 * 8 + lane % 4 / 2 * 4;
    const u32 to = in_cta(owner, place), barrier = in_cta(owner, shared.all_sent);
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const float* s = sum[i][j];
      const float first = other_lane(odd ? s[0] : s[2], 1), second = other_lane(odd ? s[1] : s[3], 1);
      const float4 four = {odd ? first : s[0], odd ? second : s[1], odd ? s[2] : first, odd ? s[3] : second};
      if (owner == cluster_rank()) *(float4*)(place + 16 * STRIDE * i) = four;
      else send(to + 64 * STRIDE * i, four, barrier);
    }
  }
  if (NORM && lane / 8 == lane % 4) {
    const float* place = shared.squares + (cluster_rank() * WARPS + thread() / 32) * TOKENS + lane / 4;
#pragma unroll
    for (int rank = 0; rank < SPLITS; rank++)
#pragma unroll
      for (int i = 0; i < 2 * GROUPS; i++)
        send(in_cta(rank, place + 8 * i), lane / 4 % 2 ? squares[i][1] : squares[i][0], in_cta(rank, shared.all_sent));
  }
}

// Of 4 rows and a token, over all that had a part of the columns.
DEVICE void product(float (&y)[EACH], const Shared& shared, int tile, int row, int token) {
  const float* from = shared.sums + (tile * SPLITS * TOKENS + token) * STRIDE + row;
#pragma unroll
  for (int i = 0; i < SPLITS; i++) {
    const float4 part = *(const float4*)(from + i * TOKENS * STRIDE);
    y[0] += part.x, y[1] += part.y, y[2] += part.z, y[3] += part.w;
  }
}

DEVICE void finish(const Params& p, const Shared& shared, const Item& item, uint2 residual) {
  const int tile = item.first / 16, row = item.first % 16;
  float factor = 1.0f, y[EACH] = {}, up[EACH] = {};
  if (NORM) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < SPLITS * WARPS; i++) squares += shared.squares[i * TOKENS + item.token];
    factor = inverse_root(squares * (1.0f / K) + p.eps);
  }
  product(y, shared, SWIGLU ? 2 * tile : tile, row, item.token);
  if (SWIGLU) product(up, shared, 2 * tile + 1, row, item.token);
#pragma unroll
  for (int i = 0; i < EACH; i++) y[i] = SWIGLU ? silu(y[i] * factor) * (up[i] * factor) : y[i] * factor;
  u16* out = p.out + (BLOCKED ? item.in_blocks(p) : item.token * OUTPUTS + item.column());
  write_8_bytes(out, {pair(y[0] + low(residual.x), y[1] + high(residual.x)),
                      pair(y[2] + low(residual.y), y[3] + high(residual.y))});
}

KERNEL clustered(CONSTANT Params p) {
  launch_next_kernel();
  const Shared shared(shared_memory());
  if (thread() == 0) {
    barrier_init(shared.x_there, 1), barrier_init(shared.all_read, SPLITS), barrier_init(shared.all_sent, 1);
    barriers_ready();
    barrier_expect(shared.all_sent, SENT);
  }
  sync_warp();
  arrive_in_cluster();
  const u64 policy = read_once_policy();
  const u16* piece = first_piece(p.w);
  char* ring = shared.ring + thread() / 32 * STAGES * STAGE;
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    if (i < BLOCKS) ask_for_stage(ring + i * STAGE, piece + i * 32, policy);
    end_group();
  }
  wait_for_cluster();

  // What the last kernel wrote is read, and what an earlier one may read is written, from here on.
  wait_for_last_kernel();
  if (thread() < 32) {
    if (thread() == 0) barrier_expect(shared.x_there, PART * p.tokens * 2);
    sync_warp();
    const u16* x = p.x + (long long)cluster_rank() * PART * p.tokens;
    if (thread() < PART / 32)
      fetch_often_read(shared.x + thread() * p.tokens * 64, x + thread() * p.tokens * 32, p.tokens * 64, shared.x_there);
  }
  uint2 residual[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const Item item(p, i);
    residual[i] = {0, 0};
    if (RESIDUAL && item.mine) residual[i] = read_8_bytes(p.residual + item.in_blocks(p));
  }
  wait(shared.x_there);
  float sum[GROUPS][4][4] = {}, squares[2 * GROUPS][4] = {};
  multiply_all(sum, squares, shared, p, ring, piece, policy);
  sync_all();
  if (thread() < SPLITS) barrier_arrive_at(in_cta(thread(), shared.all_read));
  if (K_WARPS > 1) sum_over_k_warps(sum, shared);
  wait(shared.all_read);
  send_all(sum, squares, shared);
  sync_all();  // its own
  wait(shared.all_sent);
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const Item item(p, i);
    if (item.mine) finish(p, shared, item, residual[i]);
  }
}
