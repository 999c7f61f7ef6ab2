// Decode attention of one layer, with what surrounds it: RoPE, the KV write, the gate. One query token a request, its KV in
// pages that a table names.
//
// A cluster takes one head of one request. Blocks of 16 tokens of its context are dealt to the warps of all its CTAs; a
// warp has STAGES of them on their way, the first ones before the last kernel has ended, for KV of earlier tokens is not
// this chain's.
//
// Each warp has a softmax of its own and sends it to the first CTA of the cluster, whose first warp makes one of them all
// and of the new token.

constexpr int ALL = SPLITS * WARPS;
constexpr int PART = DIM / 4 + 1;  // what a warp sends, in fours: the mixture, then peak and total
static_assert(ALL <= 32, "a lane has a warp's peak");

struct Params {
  const u16* gqkv;  // (tokens, 4, heads, DIM): gate, query, key, value
  u16 *k, *v;       // the cache
  const void *cos_sin, *positions, *write_slots, *table;
  const void *row_starts, *lengths;  // the one that is not there is null
  u16* out;
  u32 page_pieces, line_pieces, head_pieces;  // strides of the cache, in pieces of 16 bytes
  int page_shift;                             // a page has 2^page_shift tokens
  int tokens, heads, table_stride, copies;
  int wide_positions, wide_slots, wide_table, float_cos_sin;  // of 8 bytes, of 8, of 8, float32: not 4, 4, 4, bf16
  float scale;  // of scores in base 2
};

struct Shared {
  char* ring;  // each warp's stages
  u16* query;  // what bf16 keeps of it, then what it cuts off
  float4* parts;
  uint4* gated;  // each lane's columns of the new token: gate, value
  u64* sent;
  DEVICE Shared(char* memory)
      : ring(memory), query((u16*)(ring + WARPS * STAGES * 2 * TILE)), parts((float4*)(query + 2 * DIM)),
        gated((uint4*)(parts + ALL * PART)), sent((u64*)(gated + 32)) {}
};

DEVICE int warp() { return thread() / 32; }
DEVICE int head(const Params& p) { return cta() / SPLITS % p.heads; }
DEVICE int request(const Params& p) { return cta() / SPLITS / p.heads; }

// ---- The cache

struct Context {
  int cached;  // earlier tokens
  u64 first;   // where its pages begin in the table
  DEVICE Context(const Params& p) {
    if (p.row_starts) {
      first = read_4_bytes_of(p.row_starts, request(p));
      cached = (int)read_4_bytes_of(p.row_starts, request(p) + 1) - (int)first - 1;
    } else {
      first = (u64)request(p) * p.table_stride;
      cached = (int)read_4_bytes_of(p.lengths, request(p)) - 1;
    }
  }
  DEVICE int blocks() const { return (cached + BLOCK - 1) / BLOCK; }
};

// This lane's token of a block: its page.
DEVICE u32 page_of(const Params& p, const Context& context, int block) {
  const int token = block * BLOCK + lane() % BLOCK;
  return token < context.cached ? (u32)read_number(p.table, context.first + (token >> p.page_shift), p.wide_table) : 0;
}
DEVICE u32 line_of(const Params& p, u32 page, u32 place) { return page * p.page_pieces + place * p.line_pieces; }

DEVICE void fetch_block(const Params& p, const Context& context, int block, u32 page, char* to) {
  const u32 place = (block * BLOCK + lane() % BLOCK) & ((1 << p.page_shift) - 1), mine = line_of(p, page, place);
  const u64 inside = head(p) * p.head_pieces + lane() % 16;
  const int first = piece_at(lane() / 16, lane() % 16);
#pragma unroll
  for (int i = 0; i < BLOCK / 2; i++) {
    const int line = 2 * i + lane() / 16;
    const u64 from = (from_lane(mine, line) + inside) * 8;
    const bool there = block * BLOCK + line < context.cached;
    fetch_16_bytes(to + lines_behind(first, 2 * i), p.k + from, there);
    fetch_16_bytes(to + TILE + lines_behind(first, 2 * i), p.v + from, there);
  }
}

// ---- What a lane of the first warp has of the new token: columns 4 lane to 4 lane + 3 of a head

struct Four {
  float x[4];
  DEVICE Four(uint2 pairs) : x{low(pairs.x), high(pairs.x), low(pairs.y), high(pairs.y)} {}
  DEVICE Four(float a, float b, float c, float d) : x{a, b, c, d} {}
  DEVICE uint2 rounded() const { return {pair(x[0], x[1]), pair(x[2], x[3])}; }
};
struct Angles {
  Four cos, sin;
  DEVICE Angles(const Params& p)
      : Angles(p, read_number(p.positions, request(p), p.wide_positions) * DIM + lane() % (DIM / 8) * 4) {}
  DEVICE Angles(const Params& p, u64 at)
      : cos(read_four(p.cos_sin, at, p.float_cos_sin)), sin(read_four(p.cos_sin, at + DIM / 2, p.float_cos_sin)) {}
  DEVICE static Four read_four(const void* from, u64 at, int wide) {
    if (!wide) return Four(*(const uint2*)((const u16*)from + at));
    const float4 four = *(const float4*)((const float*)from + at);
    return Four(four.x, four.y, four.z, four.w);
  }
  DEVICE Four rotate(const Four& own) const {
    Four result = own;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float partner = other_lane(own.x[i], 16);
      result.x[i] = own.x[i] * cos.x[i] + (lane() < 16 ? -partner : partner) * sin.x[i];
    }
    return result;
  }
};
DEVICE const u16* row_of(const Params& p, int which) {
  return p.gqkv + ((u64)(request(p) * 4 + which) * p.heads + head(p)) * DIM + 4 * lane();
}
// The query for all warps, and in the cluster's first CTA the new token, whose score is returned.
DEVICE float begin(const Params& p, const Shared& shared, const Angles& angles) {
  const bool first = cluster_rank() == 0;
  const uint2 query = read_8_bytes(row_of(p, 1));
  uint2 key = {}, value = {}, gate = {};
  if (first) key = read_8_bytes(row_of(p, 2)), value = read_8_bytes(row_of(p, 3)), gate = read_8_bytes(row_of(p, 0));
  Four q = angles.rotate(Four(query));
#pragma unroll
  for (int i = 0; i < 4; i++) q.x[i] *= p.scale;
  u32 both[4];
#pragma unroll
  for (int i = 0; i < 4; i++) both[i] = halves(q.x[i]);
  *(uint2*)(shared.query + 4 * lane()) = {both[0] & 0xffff | both[1] << 16, both[2] & 0xffff | both[3] << 16};
  *(uint2*)(shared.query + DIM + 4 * lane()) = {both[0] >> 16 | both[1] & 0xffff0000, both[2] >> 16 | both[3] & 0xffff0000};
  if (!first) return 0.0f;
  shared.gated[lane()] = {gate.x, gate.y, value.x, value.y};  // for the end, from this lane to itself

  // It is attended to as the cache will hold it.
  const uint2 rounded = angles.rotate(Four(key)).rounded();
  const Four k(rounded);
  float score = (k.x[0] * q.x[0] + k.x[1] * q.x[1]) + (k.x[2] * q.x[2] + k.x[3] * q.x[3]);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) score += other_lane(score, distance);
  const long long slot = read_number(p.write_slots, request(p), p.wide_slots);
  if (slot >= 0) {
    const u32 line = line_of(p, (u32)(slot >> p.page_shift), (u32)slot & ((1 << p.page_shift) - 1));
    const u64 at = ((u64)line + head(p) * p.head_pieces) * 8 + 4 * lane();
    write_8_bytes(p.k + at, rounded);
    write_8_bytes(p.v + at, value);
  }
  return score;
}

// ---- All warps' softmaxes as one

DEVICE void send_all(const Softmax& softmax, const Shared& shared) {
  const int c = lane() % 4;
  float of_mine[4] = {};  // columns 32 c + lane / 4 and every 8th behind
#pragma unroll
  for (int i = 0; i < DIM / 16; i++) {
    const float* s = softmax.mixed[i];
    if (i / 2 == c) of_mine[i % 2 * 2] = s[0] + s[1], of_mine[i % 2 * 2 + 1] = s[2] + s[3];
  }
  float total = softmax.total;
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) total += other_lane(total, distance);
  float4* part = shared.parts + (cluster_rank() * WARPS + warp()) * PART;
  const float4 mixed = {of_mine[0], of_mine[1], of_mine[2], of_mine[3]}, stats = {softmax.peak, total, 0.0f, 0.0f};
  if (SPLITS == 1) {
    part[lane()] = mixed;
    if (lane() == 0) part[DIM / 4] = stats;
    sync_warp();
    if (lane() == 0) barrier_arrive(shared.sent);
  } else {
    const u32 barrier = in_cta(0, shared.sent);
    send(in_cta(0, part + lane()), mixed, barrier);
    if (lane() == 0) send(in_cta(0, part + DIM / 4), stats, barrier);
  }
}

DEVICE void finish(const Params& p, const Shared& shared, float own_score) {
  wait(shared.sent);
  float peak = MINUS_INFINITY, total = 0.0f;
  if (lane() < ALL) {
    const float4 stats = shared.parts[lane() * PART + DIM / 4];
    peak = stats.x, total = stats.y;
  }
  float top = larger(peak, own_score);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) top = larger(top, other_lane(top, distance));
  const float share = power_of_2(peak - top), own_share = power_of_2(own_score - top);
  total *= share;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) total += other_lane(total, distance);
  total += own_share;

  const uint4 own = shared.gated[lane()];
  Four result(uint2{own.z, own.w});
#pragma unroll
  for (int i = 0; i < 4; i++) result.x[i] *= own_share;
  // Column 4 lane + i of a part: as `send_all` left it.
  const float* from = (const float*)shared.parts + lane() % 2 * 64 + lane() / 8 * 4 + lane() % 8 / 2;
#pragma unroll
  for (int part = 0; part < ALL; part++) {
    const float its_share = from_lane(share, part);
#pragma unroll
    for (int i = 0; i < 4; i++) result.x[i] += its_share * from[part * PART * 4 + 16 * i];
  }
  const Four gate(uint2{own.x, own.y});
#pragma unroll
  for (int i = 0; i < 4; i++) result.x[i] = quotient(result.x[i], total) * sigmoid(gate.x[i]);
  // A row, or copies of it in blocks (staged.py).
  const int column = head(p) * DIM + 4 * lane(), width = p.heads * DIM;
  if (p.copies == 0) write_8_bytes(p.out + (u64)request(p) * width + column, result.rounded());
  u16* out = p.out + (column / 32 * p.tokens + request(p)) * 32 + column % 32;
  for (int copy = 0; copy < p.copies; copy++) write_8_bytes(out + (u64)copy * p.tokens * width, result.rounded());
}

KERNEL attention(CONSTANT Params p) {
  launch_next_kernel();
  if (request(p) >= p.tokens) {  // it only stands where another one would
    wait_for_last_kernel();
    return;
  }
  const Shared shared(shared_memory());
  if (thread() == 0) {
    barrier_init(shared.sent, SPLITS == 1 ? WARPS : 1);
    barriers_ready();
    if (SPLITS > 1) barrier_expect(shared.sent, ALL * PART * 16);
  }
  sync_warp();
  arrive_in_cluster();
  const Context context(p);
  const int begins = cluster_rank() * WARPS + warp(), blocks = context.blocks();
  char* ring = shared.ring + warp() * STAGES * 2 * TILE;
#pragma unroll
  for (int i = 0; i < STAGES; i++) {
    const int block = begins + i * ALL;
    if (block < blocks) fetch_block(p, context, block, page_of(p, context, block), ring + i * 2 * TILE);
    fetches_end();
  }
  u32 page = page_of(p, context, begins + STAGES * ALL);
  const Angles angles(p);

  // What the last kernel wrote is read, and what an earlier one may read is written, from here on.
  wait_for_last_kernel();
  float own_score = 0.0f;
  if (warp() == 0) own_score = begin(p, shared, angles);
  sync_all();
  Query q;
  read_query(q, shared.query);
  Softmax softmax;
  int stage = 0;
  for (int block = begins; block < blocks; block += ALL) {
    wait_for_fetches<STAGES - 1>();
    sync_warp();
    char* tile = ring + stage * 2 * TILE;
    attend(softmax, q, tile, context.cached - block * BLOCK);
    sync_warp();
    const int next = block + STAGES * ALL;
    if (next < blocks) fetch_block(p, context, next, page, tile);
    fetches_end();
    page = page_of(p, context, next + ALL);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  wait_for_cluster();
  send_all(softmax, shared);
  if (cluster_rank() == 0 && warp() == 0) finish(p, shared, own_score);
}
