// y = W x for 9 to 128 tokens, with what surrounds it in the model: on the tensor cores of warpgroups, W and x streaming by.
//
// A CTA takes ROWS_HERE rows of W and PART columns, for all tokens; the CTAs of a cluster have the same rows. Both W and x
// come through rings, 64 columns at a time. As much of W as its ring holds is on its way before the last kernel ends.
// A warp has 16 tokens. Their sums are finished by the same warps of all CTAs of the cluster, a part of the tokens each.

constexpr int DEPTH = 64;  // columns of a stage: lines of 128 bytes, as the tensor cores want them
constexpr int PART = K / SPLITS, STEPS = PART / DEPTH;
constexpr int WARPGROUPS = (TOKENS + 63) / 64;
constexpr int CONSUMERS = 4 * WARPGROUPS;  // warps; behind them the one that fetches W, and the one that fetches x
// Of fewer than 64 tokens, products read what lies behind x as well, and nobody reads what comes of that.
constexpr int W_STAGE = ROWS_HERE * 128, X_STAGE = TOKENS * 128, RINGS = X_STAGES * X_STAGE + W_STAGES * W_STAGE;
constexpr int OUTPUTS = SWIGLU ? ROWS / 2 : ROWS, OUTPUTS_HERE = SWIGLU ? ROWS_HERE / 2 : ROWS_HERE;
constexpr int LANES = 32 / SPLITS;           // of a warp, whose sums a CTA finishes
constexpr int SENT = ROWS_HERE / 8 * LANES;  // four numbers each, that a warp sends to a CTA
constexpr int PAIRS = OUTPUTS_HERE / 4 / SPLITS;  // of outputs, that a lane finishes
// Of W on its way at a time, ahead of the last kernel's end: as many as bandwidth needs. What the kernels around wait for
// (x, the cache) queues behind them.
constexpr int AHEAD = W_STAGES < 6 ? W_STAGES : 6;
constexpr int PARTS = 32;                               // of a token's squares, at most
static_assert(WARPS == CONSUMERS + 2 && (SPLITS == 1 || SPLITS == 2 || SPLITS == 4), "threads");
static_assert(K % (SPLITS * DEPTH) == 0 && ROWS % ROWS_HERE == 0 && TOKENS % 8 == 0, "division");
static_assert(W_STAGES <= STEPS && X_STAGES <= STEPS && OUTPUTS_HERE % 16 == 0, "stages");
static_assert(STEPS == 1 || (W_STAGES > 1 && X_STAGES > 1), "a stage is given back when the next one's products run");

struct Params {
  TensorMap x, w;  // fetched x_rows tokens at a time; the CTA's rows, with SWIGLU half of them
  const float* squares;  // (tokens, parts), which sum to those of each x
  const u16* residual;
  u16* out;
  float* next_squares;  // (tokens, ROWS / ROWS_HERE) of y
  int tokens, x_rows, parts;
  float eps;
};

struct Shared {
  char *x, *w;
  float4* sums;
  u64 *w_there, *w_read, *x_there, *x_read, *sent;  // barriers; the last for each warp
  DEVICE Shared(char* memory)
      : x(memory), w(memory + X_STAGES * X_STAGE), sums((float4*)(memory + RINGS)),
        w_there((u64*)(sums + (SPLITS > 1 ? CONSUMERS * SPLITS * SENT : 0))), w_read(w_there + W_STAGES),
        x_there(w_read + W_STAGES), x_read(x_there + X_STAGES), sent(x_read + X_STAGES) {}
};

DEVICE int warp() { return thread() / 32; }
DEVICE int lane() { return thread() % 32; }
DEVICE int split() { return cluster_rank(); }
DEVICE int tile() { return cta() / SPLITS; }  // of rows

// ---- What is fetched

DEVICE int column_of(int step) { return split() * PART + step * DEPTH; }
DEVICE void fetch_w(const Params& p, const Shared& shared, int step, int stage, u64 policy) {
  char* to = shared.w + stage * W_STAGE;
  const int column = column_of(step), row = tile() * OUTPUTS_HERE;
  barrier_expect(&shared.w_there[stage], W_STAGE);
  fetch_tile(to, p.w, column, row, OUTPUTS_HERE, &shared.w_there[stage], policy);
  if (SWIGLU) fetch_tile(to + W_STAGE / 2, p.w, column, OUTPUTS + row, OUTPUTS_HERE, &shared.w_there[stage], policy);
}
DEVICE void fetch_x(const Params& p, const Shared& shared, int step, int stage) {
  barrier_expect(&shared.x_there[stage], p.x_rows * 128);
  fetch_tile(shared.x + stage * X_STAGE, p.x, column_of(step), 0, p.x_rows, &shared.x_there[stage]);
}

// Where a ring stands: a stage, and whether it comes by for an even or an odd time.
template <int STAGES> struct Turn {
  int stage = 0;
  u32 parity = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

DEVICE void fill_ring_of_w(const Params& p, const Shared& shared, u64 policy) {
  for (int i = AHEAD; i < W_STAGES; i++) {
    wait(&shared.w_there[i - AHEAD]);
    fetch_w(p, shared, i, i, policy);
  }
}
DEVICE void fetch_rest_of_w(const Params& p, const Shared& shared, u64 policy) {
  Turn<W_STAGES> turn;
  for (int step = W_STAGES; step < STEPS; step++, turn.next()) {
    wait(&shared.w_read[turn.stage], turn.parity);
    fetch_w(p, shared, step, turn.stage, policy);
  }
}
DEVICE void fetch_rest_of_x(const Params& p, const Shared& shared) {
  Turn<X_STAGES> turn;
  for (int step = X_STAGES; step < STEPS; step++, turn.next()) {
    wait(&shared.x_read[turn.stage], turn.parity);
    fetch_x(p, shared, step, turn.stage);
  }
}
// What a step took has been read, and its place will be asked for again: to say so to whoever does that.
DEVICE void release(const Shared& shared, int step) {
  if (lane() != 0) return;
  if (step + W_STAGES < STEPS) barrier_arrive(&shared.w_read[step % W_STAGES]);
  if (step + X_STAGES < STEPS) barrier_arrive(&shared.x_read[step % X_STAGES]);
}

// ---- Sums

// Of 16 tokens and the CTA's rows: [4 j] and what follows are of rows 8 j + 2 (lane % 4) and the one behind, of token
// lane / 4, and of the one 8 below.
typedef float Sums[ROWS_HERE / 2];

// Where the sums of a CTA's warp lie for the same warp of another one.
DEVICE float4* place_of(const Shared& shared, int from) { return shared.sums + (warp() * SPLITS + from) * SENT; }

DEVICE void send_all(const Sums& sum, const Shared& shared) {
  if (SPLITS == 1) return;
  const int owner = lane() / LANES;
  const u32 to = in_cta(owner, place_of(shared, split()) + lane() % LANES), barrier = in_cta(owner, &shared.sent[warp()]);
#pragma unroll
  for (int j = 0; j < ROWS_HERE / 8; j++)
    send(to + 16 * LANES * j, float4{sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]}, barrier);
}

// Unrolled, for a product takes less time than the numbers that say where it is.
DEVICE void multiply_all(Sums& sum, const Shared& shared) {
  const u32 x = tile_at(shared.x) + (WARPGROUPS > 1 ? same_in_warp(warp() / 4) * (64 * 128 / 16) : 0), w = tile_at(shared.w);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const int x_stage = step % X_STAGES, w_stage = step % W_STAGES;
    wait(&shared.x_there[x_stage], step / X_STAGES & 1);
    wait(&shared.w_there[w_stage], step / W_STAGES & 1);
    products_begin();
#pragma unroll
    for (int i = 0; i < DEPTH / 16; i++)
      multiply_tiles(sum, x + x_stage * X_STAGE / 16 + 2 * i, w + w_stage * W_STAGE / 16 + 2 * i);
    products_end();
    wait_for_products<1>();
    if (step > 0) release(shared, step - 1);
  }
  wait_for_products<0>();
}

// ---- What surrounds the product

// Of a warp's tokens the one that a lane finishes, and the place of its pairs of outputs among the CTA's.
DEVICE int my_token() {
  const int among_mine = SPLITS == 1 ? lane() / 4 : split() * (LANES / 4) + lane() / 2 % LANES / 4;
  return warp() * 16 + among_mine + lane() % 2 * 8;
}
DEVICE int my_row() { return lane() % 4 / 2 * 4; }  // of 8, where nothing is sent
DEVICE int my_output(int pair) {
  return SPLITS == 1 ? pair / 2 * 8 + my_row() + pair % 2 * 2 : pair * 4 * SPLITS + lane() / (2 * LANES) * 8 + lane() / 2 % 4 * 2;
}
constexpr int OF_A_TOKEN = SPLITS == 1 ? 2 : SPLITS == 2 ? 6 : 22;  // bits of a lane's number that the token is the same in
DEVICE int place() { return my_token() * OUTPUTS + tile() * OUTPUTS_HERE; }  // of the first output

// Sums of my token from here on: [2 k] and [2 k + 1] are of pair k, SwiGLU's second factors behind them.
DEVICE void gather(Sums& sum, const Shared& shared) {
  if (SPLITS == 1) {
    // Of two tokens a lane has two of 8 rows each, and so has the next one: each gives the other those of one token.
    const int odd = lane() % 2;
#pragma unroll
    for (int j = 0; j < ROWS_HERE / 8; j++) {
      float* s = sum + 4 * j;
      const float first = other_lane(odd ? s[0] : s[2], 1), second = other_lane(odd ? s[1] : s[3], 1);
      s[0] = odd ? first : s[0], s[1] = odd ? second : s[1];
      s[2] = odd ? s[2] : first, s[3] = odd ? s[3] : second;
    }
    return;
  }
  wait(&shared.sent[warp()]);
  const float2* from = (const float2*)place_of(shared, 0) + lane();
#pragma unroll
  for (int k = 0; k < ROWS_HERE / 4 / SPLITS; k++) {
    sum[2 * k] = sum[2 * k + 1] = 0.0f;
#pragma unroll
    for (int i = 0; i < SPLITS; i++) {
      const float2 part = from[2 * SENT * i + 32 * k];
      sum[2 * k] += part.x, sum[2 * k + 1] += part.y;
    }
  }
}

// What the last kernel left for the end: asked for ahead.
struct Given {
  u32 residual[PAIRS];
  float parts[4][PARTS / 8];  // of squares: 4 tokens at a time, of which 8 lanes share one
  DEVICE Given(const Params& p) {
    const bool there = RESIDUAL && my_token() < p.tokens;
#pragma unroll
    for (int k = 0; k < PAIRS; k++) residual[k] = there ? read_pair(p.residual + place() + my_output(k)) : 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < PARTS / 8; j++) {
        const int token = warp() * 16 + 4 * i + lane() / 8, part = 8 * j + lane() % 8;
        parts[i][j] = NORM && token < p.tokens && part < p.parts ? read_4_bytes(p.squares + token * p.parts + part) : 0.0f;
      }
  }
  // 1 / RMS of my token.
  DEVICE float factor(const Params& p) const {
    if (!NORM) return 1.0f;
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float sum = (parts[i][0] + parts[i][1]) + (parts[i][2] + parts[i][3]);
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) sum += other_lane(sum, distance);
      const int token = my_token() % 16;
      const float there = from_lane(sum, token % 4 * 8);
      if (token / 4 == i) mine = there;
    }
    return inverse_root(mine * (1.0f / K) + p.eps);
  }
};

DEVICE float around(float y, float up, float factor, float residual) {
  return SWIGLU ? silu(y * factor) * (up * factor) : y * factor + residual;
}

DEVICE void finish(const Sums& sum, const Params& p, const Given& given) {
  const float factor = given.factor(p);
  u16* out = p.out + place();
  const bool there = my_token() < p.tokens;
  u32 y[PAIRS];
  float squares = 0.0f;
#pragma unroll
  for (int k = 0; k < PAIRS; k++) {
    const float *s = sum + 2 * k, *up = SWIGLU ? s + 2 * PAIRS : s;
    const u32 r = given.residual[k];
    y[k] = pair(around(s[0], up[0], factor, low(r)), around(s[1], up[1], factor, high(r)));
    squares += low(y[k]) * low(y[k]) + high(y[k]) * high(y[k]);
    if (SPLITS > 1 && there) write_pair(out + my_output(k), y[k]);
  }
  // Two lanes have 16 outputs of a token, of which each writes 8 that follow one another.
#pragma unroll
  for (int k = 0; SPLITS == 1 && k < PAIRS; k += 4) {
    const uint2 first = {y[k], y[k + 1]}, second = {y[k + 2], y[k + 3]};
    const uint2 mine = my_row() ? second : first, others = my_row() ? first : second;
    const uint2 next = {other_lane(others.x, 2), other_lane(others.y, 2)};
    if (there) write_16_bytes(out + 4 * k + 2 * my_row(), my_row() ? next : mine, my_row() ? mine : next);
  }
  if (!RESIDUAL) return;
#pragma unroll
  for (int bit = 2; bit < 32; bit *= 2)
    if (OF_A_TOKEN & bit) squares += other_lane(squares, bit);
  if (there && (lane() & OF_A_TOKEN) == 0)
    write_4_bytes(p.next_squares + my_token() * (ROWS / ROWS_HERE) + tile(), squares);
}

DEVICE void make_barriers(const Params& p, const Shared& shared) {
  for (int i = 0; i < W_STAGES; i++) barrier_init(&shared.w_there[i], 1), barrier_init(&shared.w_read[i], CONSUMERS);
  for (int i = 0; i < X_STAGES; i++) barrier_init(&shared.x_there[i], 1), barrier_init(&shared.x_read[i], CONSUMERS);
  for (int i = 0; i < CONSUMERS; i++) barrier_init(&shared.sent[i], 1);
  barriers_ready();
  for (int i = 0; SPLITS > 1 && i < CONSUMERS; i++) barrier_expect(&shared.sent[i], SPLITS * SENT * 16);
}

KERNEL streamed(CONSTANT Params p) {
  if (warp() >= WARPS) return;  // launched to keep a second CTA from the multiprocessor (streamed.py)
  const Shared shared(shared_memory());
  const bool fetches_w = thread() == 32 * CONSUMERS, fetches_x = thread() == 32 * CONSUMERS + 32;
  u64 policy = 0;
  if (fetches_w) {
    make_barriers(p, shared);
    policy = read_once_policy();
    for (int i = 0; i < AHEAD; i++) fetch_w(p, shared, i, i, policy);
  }
  sync_warp();
  arrive_in_cluster();
  wait_for_cluster();
  if (fetches_w) fill_ring_of_w(p, shared, policy);

  // What the last kernel wrote is read, and what an earlier one may read is written, from here on.
  wait_for_last_kernel();
  launch_next_kernel();  // not before: the next one's CTAs, and what they fetch, would be in the way of x
  if (fetches_w) fetch_rest_of_w(p, shared, policy);
  if (fetches_x) {
    for (int step = 0; step < X_STAGES; step++) fetch_x(p, shared, step, step);
    fetch_rest_of_x(p, shared);
  }
  if (warp() >= CONSUMERS) return;
  const Given given(p);
  Sums sum = {};
  multiply_all(sum, shared);
  if (warp() * 16 >= p.tokens) return;
  send_all(sum, shared);
  gather(sum, shared);
  finish(sum, p, given);
}
