// streamed_ptx.cuh for a CPU, on emulated.h. What is sent to another CTA takes its time as copies do; and a thread may not
// send until it knows that the cluster's CTAs run.
struct uint2 { u32 x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };

// A tensor map, as emulation.py makes it.
struct alignas(64) TensorMap {
  u64 address, rows, columns, fetched, unused[12];
};
DEVICE void fetch_tile(void* to, const TensorMap& map, int column, int row, int rows, u64* barrier, u64 = 0) {
  static const char zeros[128] = {};
  if ((uintptr_t)to % 1024) fail("unaligned tile");
  if (rows != (int)map.fetched || column < 0 || row < 0 || column + 64 > (int)map.columns) fail("another tile than the map's");
  if (&cta_at(to, rows * 128) != &my_cta()) fail("a copy to another CTA");
  for (int i = 0; i < rows; i++) {
    const char* line = (const char*)map.address + ((u64)(row + i) * map.columns + column) * 2;
    const bool there = row + i < (int)map.rows;
    depart({(char*)to + i * 128, there ? line : zeros, 128, barrier, true});
    if (there) fetched.push_back({(u64)line, 128});
  }
}

// Products happen as late as a wait allows, with what then lies in the tiles.
DEVICE u32 tile_at(const void* tile) { return (u32)((const char*)tile - my_cta().shared) >> 4; }
DEVICE void products_begin() {}
DEVICE void products_end() { fibers[current].groups++; }
template <int SUMS> DEVICE void multiply_tiles(float (&sum)[SUMS], u32 a, u32 b) {
  fibers[current].products.push_back({sum, SUMS, a, b, fibers[current].groups});
}
// 16 numbers of a line of a tile.
static void read_line(float (&to)[16], u32 tile, int line) {
  const char* first = my_cta().shared + tile * 16 + line * 128;
  for (int i = 0; i < 2; i++) {
    const u16* piece = (const u16*)((uintptr_t)(first + i * 16) ^ swizzle(first));
    for (int k = 0; k < 8; k++) to[8 * i + k] = as_float((u32)piece[k] << 16);
  }
}
static void multiply_now(const Product& product) {
  const int lane = thread() % 32, token = thread() % 128 / 32 * 16 + lane / 4;
  float x[2][16], w[16];
  read_line(x[0], product.a, token), read_line(x[1], product.a, token + 8);
  for (int j = 0; j < product.sums; j += 4)
    for (int i = 0; i < 2; i++) {
      read_line(w, product.b, 2 * j + lane % 4 * 2 + i);
      for (int half = 0; half < 2; half++) {
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += x[half][k] * w[k];
        product.sum[j + 2 * half + i] += sum;
      }
    }
}
template <int GROUPS> DEVICE void wait_for_products() {
  auto& products = fibers[current].products;
  size_t done = 0;
  for (; done < products.size() && products[done].group + GROUPS < fibers[current].groups; done++)
    multiply_now(products[done]);
  products.erase(products.begin(), products.begin() + done);
}

DEVICE int cluster_rank() { return rank(); }
DEVICE void arrive_in_cluster() {
  if (fibers[current].arrived) fail("one arrival too many");
  fibers[current].arrived = true;
  arrive_at(all_of_cluster, 0, FIBERS);
}
DEVICE void wait_for_cluster() {
  if (!fibers[current].arrived) fail("a wait without an arrival");
  if (all_of_cluster.turn == 0) {
    fibers[current].waits_for = &all_of_cluster;
    yield();
  }
  fibers[current].in_cluster = true;
}

// A CTA's number and where its shared memory has it.
DEVICE u32 in_cta(int rank, const void* pointer) {
  if (rank < 0 || rank >= CLUSTER) fail("no such CTA");
  if (&cta_at(pointer, 1) != &my_cta()) fail("outside of shared memory");
  return rank << 24 | (u32)((const char*)pointer - my_cta().shared);
}
static char* at(u32 address) {
  if (!fibers[current].in_cluster) fail("a CTA that may not run yet");
  return cluster[address >> 24].shared + (address & 0xffffff);
}
DEVICE void send(u32 to, float4 values, u32 barrier) {
  if (to % 16) fail("unaligned send");
  Copy copy = {at(to), nullptr, 16, (u64*)at(barrier)};
  memcpy(copy.sent, &values, 16);
  depart(copy);
}

DEVICE u32 from_lane(u32 value, int lane) { return give({value})[lane][0]; }
DEVICE float from_lane(float value, int lane) { return as_float(from_lane(as_bits(value), lane)); }
DEVICE int same_in_warp(int value) { return from_lane((u32)value, 0); }
DEVICE u32 other_lane(u32 value, int distance) { return from_lane(value, current % 32 ^ distance); }
DEVICE float other_lane(float value, int distance) { return as_float(other_lane(as_bits(value), distance)); }

DEVICE uint2 read_8_bytes(const u16* from) {
  if ((uintptr_t)from % 8) fail("unaligned read");
  uint2 value;
  memcpy(&value, from, 8);
  return value;
}
DEVICE float read_4_bytes(const float* from) { return *from; }
DEVICE void write_4_bytes(float* to, float value) {
  early_writes += !last_kernel_ended;
  *to = value;
}
DEVICE u32 read_pair(const u16* from) {
  if ((uintptr_t)from % 4) fail("unaligned read");
  u32 value;
  memcpy(&value, from, 4);
  return value;
}
DEVICE void write_pair(u16* to, u32 value) {
  if ((uintptr_t)to % 4) fail("unaligned write");
  early_writes += !last_kernel_ended;
  memcpy(to, &value, 4);
}
DEVICE void write_16_bytes(u16* to, uint2 first, uint2 second) {
  if ((uintptr_t)to % 16) fail("unaligned write");
  early_writes += !last_kernel_ended;
  memcpy(to, &first, 8), memcpy(to + 4, &second, 8);
}
DEVICE u32 pair(float first, float second) { return bf16(first) | (u32)bf16(second) << 16; }
