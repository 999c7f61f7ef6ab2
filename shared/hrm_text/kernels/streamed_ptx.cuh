// What streamed.cu needs of Hopper beyond staged_ptx.cuh. The tests have it for a CPU in tests/kernels/emulated_streams.h.

// Where the copy engine finds a matrix of bf16 (CUtensorMap).
struct alignas(64) TensorMap {
  u64 words[16];
};

// 64 columns of some rows as a tile: lines of 128 bytes, their 16-byte pieces in the order that tensor cores read without
// conflicts (the map says so). Rows behind the last one are zeros.
DEVICE void fetch_tile(void* to, const TensorMap& map, int column, int row, int rows, u64* barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], "
      "[%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// x: no hint, for L2 keeps it.
DEVICE void fetch_tile(void* to, const TensorMap& map, int column, int row, int rows, u64* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// A tile as products take it, in units of 16 bytes: 16 columns on is + 2. The other half of what describes it is
// TILE_KIND: groups of 8 rows are 64 units apart, and in order of pieces as `fetch_tile` leaves them.
#define TILE_KIND "0x40000040"
DEVICE u32 tile_at(const void* tile) { return shared_address(tile) >> 4 | 1 << 16; }
// Products are on their way between these: neither their sums nor what they read may be touched until they are waited for.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last GROUPS are done.
template <int GROUPS> DEVICE void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

#define SUMS_8(i)                                                                                                      \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]),                \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define PRODUCT(ROWS, SUMS, A, B)                                                                                      \
  "{\n.reg .b64 a, b;\n.reg .pred p;\nmov.b64 a, {" A ", " TILE_KIND "};\nmov.b64 b, {" B ", " TILE_KIND                 \
  "};\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" ROWS "k16.f32.bf16.bf16 {" SUMS                         \
  "}, a, b, p, 1, 1, 0, 0;\n}"
#define SUMS_OF_48 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23"

// sum += a (64 tokens, 16 columns) b (16 columns, 48 or 64 rows).
DEVICE void multiply_tiles(float (&sum)[24], u32 a, u32 b) {
  asm volatile(PRODUCT("48", SUMS_OF_48, "%24", "%25") : SUMS_8(0), SUMS_8(8), SUMS_8(16) : "r"(a), "r"(b));
}
DEVICE void multiply_tiles(float (&sum)[32], u32 a, u32 b) {
  asm volatile(PRODUCT("64", SUMS_OF_48 ",%24,%25,%26,%27,%28,%29,%30,%31", "%32", "%33")
               : SUMS_8(0), SUMS_8(8), SUMS_8(16), SUMS_8(24)
               : "r"(a), "r"(b));
}

// The CTAs of a cluster
DEVICE int cluster_rank() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// The cluster's CTAs run, and their barriers are ready: for what comes after the wait.
DEVICE void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where `pointer` is in the shared memory of another CTA of the cluster.
DEVICE u32 in_cta(int rank, const void* pointer) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}
// Numbers on their way to another CTA, whose barrier counts their bytes.
DEVICE void send(u32 to, float4 values, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w), "r"(barrier)
               : "memory");
}

// A number that is the same in all lanes of a warp, so that the compiler knows it.
DEVICE int same_in_warp(int value) { return __shfl_sync(~0u, value, 0); }
DEVICE u32 from_lane(u32 value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE float other_lane(float value, int distance) { return __shfl_xor_sync(~0u, value, distance); }
DEVICE u32 other_lane(u32 value, int distance) { return __shfl_xor_sync(~0u, value, distance); }

DEVICE uint2 read_8_bytes(const u16* from) {
  uint2 value;
  asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from) : "memory");
  return value;
}
DEVICE u32 pair(float first, float second) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
DEVICE float read_4_bytes(const float* from) {
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}
DEVICE u32 read_pair(const u16* from) {
  u32 value;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
DEVICE void write_pair(u16* to, u32 value) { *(u32*)to = value; }
DEVICE void write_4_bytes(float* to, float value) { *to = value; }
DEVICE void write_16_bytes(u16* to, uint2 first, uint2 second) { *(uint4*)to = {first.x, first.y, second.x, second.y}; }
