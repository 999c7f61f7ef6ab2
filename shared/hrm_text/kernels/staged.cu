// y = W x for 1 to 8 tokens, with what surrounds it in the model: bound by reading W once.
//
// A decode step is a chain of such kernels, each launched while the one before it runs (launch.py). What bounds it is
// memory that rests while a kernel waits for the last one's result. Here one warp of each CTA, the producer, copies
// the CTA's rows of W into a ring in shared memory right away, without a register for what is on its way; and the rings are so
// small that those of neighbours in the chain fit into a multiprocessor together (staged.py). So while a kernel waits, or is
// at its sums, memory brings what the next ones multiply.
//
// The other WARPS warps multiply. Each owns a slice of K, so that it needs that slice of x alone, which it takes from
// L2 into the registers where tensor cores want it (B: 16 columns, 8 tokens); rows in the ring are the A side. Products of
// the slices are summed over the warps in shared memory, where the ring was.
//
// All CTAs ask for x at once, so what a warp reads with one instruction lies together: x is in blocks of 32 columns, each
// with those of all tokens, and may be there in copies. So are the residual, and the result but for gqkv's.
//
// Nobody waits in a circle: the producer waits for slots that the consumers free in order; they wait for slots, TILE
// at a time of at least as many, and for the kernel before.

constexpr int MAX_TOKENS = 8;
constexpr int X_COPIES = 4;  // where there is more than one; CTAs read them in turn
constexpr int WRITES = COPIES ? COPIES : 1;  // of the result; 0 copies: in rows, not in blocks
constexpr int ROW = 2 * K + 64;  // bytes; 64 over, so that rows begin in the other half of the banks in turn
constexpr int SLOT = 4 * ROW;    // a quad of rows; with SWIGLU 2 of gate and the same 2 of up
constexpr int QUADS = ROWS / 4, OUTPUTS = SWIGLU ? ROWS / 2 : ROWS, PER_QUAD = SWIGLU ? 2 : 4;
constexpr int MOST_QUADS = (QUADS + CTAS - 1) / CTAS;  // of a CTA
constexpr int TILE = SLOTS < 4 ? SLOTS : 4;            // quads that are multiplied at a time
constexpr int TILES = (MOST_QUADS + TILE - 1) / TILE;
// Attention, which follows gqkv, brings more than W from memory: that would be in the way of what is still to come of it.
constexpr bool LATE = NORM && !SWIGLU;
constexpr int STRIDE = 4 * TILE + (TILE % 2 ? 0 : 4);    // floats of a token's sums: 8 tokens, 4 rows, 32 banks
constexpr int BLOCKS = K / 32 / WARPS;  // of 32 columns, in a warp's slice
constexpr int ROUNDS = (MOST_QUADS * PER_QUAD * MAX_TOKENS + 32 * WARPS - 1) / (32 * WARPS);
static_assert(K % (32 * WARPS) == 0 && ROWS % 4 == 0 && CTAS <= QUADS, "slices, quads");
static_assert(TILES * WARPS * MAX_TOKENS * STRIDE * 4 <= SLOTS * SLOT, "sums fit where the ring was");

struct Params {
  const u16 *x, *w, *residual;
  u16* out;
  int tokens, shift;  // of which 2^shift are the next power of two
  int apart;  // elements from a copy of x to the next; 0 where there is one
  float eps;
};

struct Ring {
  char* slots;
  u64 *full, *empty;
  float* squares;  // of each token's slices of x
  DEVICE Ring(char* memory)
      : slots(memory), full((u64*)(memory + SLOTS * SLOT)), empty(full + SLOTS), squares((float*)(empty + SLOTS)) {}
};

// This CTA's quads of rows.
struct Share {
  int first, count;
  DEVICE Share() {
    first = (int)((long long)cta() * QUADS / CTAS);
    count = (int)((long long)(cta() + 1) * QUADS / CTAS) - first;
  }
};

// ---- The producer: a lane for each row of a quad.

// AHEAD quads are on their way at a time: as many as bandwidth needs. With the whole ring asked for at once, what the
// kernels around wait for (x, the cache) queues behind 20 MB of W.

DEVICE const u16* row_of(const u16* w, int quad, int row) {
  const int at = SWIGLU ? 2 * quad + row % 2 + row / 2 * OUTPUTS : 4 * quad + row;
  return w + (long long)at * K;
}

DEVICE void produce(const Params& p, const Ring& ring, const Share& share, int lane) {
  const u64 policy = read_once_policy();
  for (int i = 0; i < share.count; i++) {
    const int slot = i % SLOTS, last = i - AHEAD;
    if (i >= SLOTS) wait(&ring.empty[slot], i / SLOTS - 1 & 1);
    if (AHEAD < SLOTS && last >= 0) wait(&ring.full[last % SLOTS], last / SLOTS & 1);
    if (lane == 0) barrier_expect(&ring.full[slot], 8 * K);
    if (lane < 4)
      fetch(ring.slots + slot * SLOT + lane * ROW, row_of(p.w, share.first + i, lane), 2 * K, &ring.full[slot], policy);
  }
}

// ---- The consumers

// Of the CTA's products and the tokens, one that this thread finishes: row `row` of the CTA's, column `column` of y.
struct Item {
  int row, column, token;
  bool mine;
  // Where it lies in blocks of columns.
  DEVICE int in_blocks(const Params& p) const { return (column / 32 * p.tokens + token) * 32 + column % 32; }
  DEVICE Item(const Params& p, const Share& share, int round) {
    const int index = thread() + round * 32 * WARPS, output = index >> p.shift;
    token = index - (output << p.shift);
    row = output / PER_QUAD * 4 + output % PER_QUAD;
    column = share.first * PER_QUAD + output;
    mine = output < share.count * PER_QUAD && token < p.tokens;
  }
};

// This warp's slice of x as the B side of its products: lane 4 n + c has, of each 32 columns, 8 c to 8 c + 7 of token n.
DEVICE void read_slice(u32 (&b)[BLOCKS][4], const u16* start, int apart) {
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    uint4 part = {0, 0, 0, 0};
    if (start) part = read_16_bytes(start + i * apart);
    b[i][0] = part.x, b[i][1] = part.y, b[i][2] = part.z, b[i][3] = part.w;
  }
}

// Of each token's slice: x times x on tensor cores has them on the diagonal.
DEVICE void square(const u32 (&b)[BLOCKS][4], const Ring& ring, int lane, int warp) {
  float sum[4] = {}, other[4] = {};
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    multiply(sum, b[i][0], 0, b[i][1], 0, b[i][0], b[i][1]);
    multiply(other, b[i][2], 0, b[i][3], 0, b[i][2], b[i][3]);
  }
  const int token = lane / 4;
  if (token / 2 == lane % 4)
    ring.squares[token * WARPS + warp] = token % 2 ? sum[1] + other[1] : sum[0] + other[0];
}

// `there` quads from quad `begin` on times the slice. Of a tile that is not full some rows count twice, unread. Products
// depend on one another in two chains, each half as long.
DEVICE void multiply_tile(float (&sum)[4], const u32 (&b)[BLOCKS][4], const Ring& ring, int begin, int there, int lane,
                          int warp) {
#pragma unroll
  for (int i = 0; i < TILE; i++)
    if (i < there) wait(&ring.full[(begin + i) % SLOTS], (begin + i) / SLOTS & 1);
  const int group = lane / 4;
  const int upper = group / 4 < there ? group / 4 : there - 1;
  const int lower = group / 4 + 2 < there ? group / 4 + 2 : there - 1;
  const char* inside = ring.slots + group % 4 * ROW + warp * 64 * BLOCKS + lane % 4 * 16;
  const char *a = inside + (begin + upper) % SLOTS * SLOT, *a8 = inside + (begin + lower) % SLOTS * SLOT;
  float other[4] = {};
#pragma unroll
  for (int i = 0; i < BLOCKS; i++) {
    const uint4 w = *(const uint4*)(a + 64 * i);
    uint4 w8 = {0, 0, 0, 0};
    if (TILE > 2) w8 = *(const uint4*)(a8 + 64 * i);
    multiply(sum, w.x, w8.x, w.y, w8.y, b[i][0], b[i][1]);
    multiply(other, w.z, w8.z, w.w, w8.w, b[i][2], b[i][3]);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] += other[i];
  sync_warp();
  if (lane < there) barrier_arrive(&ring.empty[(begin + lane) % SLOTS]);
}

// Where a warp's products of a tile lie, each token's together.
DEVICE float* sums_of(const Ring& ring, int tile, int warp) {
  return (float*)ring.slots + (tile * WARPS + warp) * MAX_TOKENS * STRIDE;
}
DEVICE float over_warps(const float* from, int stride) {
  float part[4] = {};
#pragma unroll
  for (int i = 0; i < WARPS; i++) part[i % 4] += from[i * stride];
  return (part[0] + part[1]) + (part[2] + part[3]);
}
DEVICE float product(const Ring& ring, int row, int token) {
  const float* sums = sums_of(ring, row / (4 * TILE), 0) + token * STRIDE + row % (4 * TILE);
  return over_warps(sums, MAX_TOKENS * STRIDE);
}
DEVICE float factor(const Params& p, const Ring& ring, int token) {
  return inverse_root(over_warps(ring.squares + token * WARPS, 1) * (1.0f / K) + p.eps);
}

DEVICE void consume(const Params& p, const Ring& ring, const Share& share, int lane, int warp) {
  u32 b[BLOCKS][4], residual[ROUNDS] = {};
  float sum[TILES][4] = {};
  // Addresses, null where there is nothing to read, are computed ahead of the wait.
  const u16* copy = p.x + cta() % X_COPIES * p.apart;
  const u16* start = lane / 4 < p.tokens ? copy + warp * BLOCKS * 32 * p.tokens + lane * 8 : nullptr;
  const u16* add[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const Item item(p, share, i);
    add[i] = RESIDUAL && item.mine ? p.residual + item.in_blocks(p) : nullptr;
    computed_here(add[i]);
  }
  computed_here(start);

  // What the last kernel wrote is read, and what an earlier one may read is written, from here on; all at once.
  wait_for_last_kernel();
  if (LATE) launch_next_kernel();
  read_slice(b, start, 32 * p.tokens);
#pragma unroll
  for (int i = 0; i < ROUNDS; i++)
    if (RESIDUAL && add[i]) residual[i] = read_2_bytes(add[i]);
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int left = share.count - i * TILE;
    if (left > 0) multiply_tile(sum[i], b, ring, i * TILE, left < TILE ? left : TILE, lane, warp);
    if (NORM && i == 0) square(b, ring, lane, warp);  // not first, or rows in the ring would wait for x to be looked at
  }
  sync_consumers();  // nobody reads a slot any more, and none is on its way
#pragma unroll
  for (int i = 0; i < TILES * 4; i++) {
    const int row = lane / 4 + i % 4 / 2 * 8, token = lane % 4 * 2 + i % 2;
    if (row < 4 * TILE && token < p.tokens) sums_of(ring, i / 4, warp)[token * STRIDE + row] = sum[i / 4][i % 4];
  }
  sync_consumers();
#pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const Item item(p, share, i);
    if (!item.mine) continue;
    const float r = NORM ? factor(p, ring, item.token) : 1.0f;
    float y = product(ring, item.row, item.token) * r;
    if (SWIGLU) y = silu(y) * (product(ring, item.row + 2, item.token) * r);
    computed_here(residual[i]);
    const u16 rounded = bf16(y + low(residual[i]));
    u16* out = p.out + (COPIES ? item.in_blocks(p) : item.token * OUTPUTS + item.column);
#pragma unroll
    for (int copy = 0; copy < WRITES; copy++, out += p.tokens * OUTPUTS) write_2_bytes(out, rounded);
  }
}

KERNEL staged(CONSTANT Params p) {
  if (!LATE) launch_next_kernel();
  const Ring ring(shared_memory());
  const Share share;
  if (thread() == 32 * WARPS) {
    for (int i = 0; i < SLOTS; i++) barrier_init(&ring.full[i], 1), barrier_init(&ring.empty[i], WARPS);
    barriers_ready();
  }
  sync_all();
  if (thread() / 32 == WARPS) produce(p, ring, share, thread() % 32);
  else consume(p, ring, share, thread() % 32, thread() / 32);
}
