// cluster_ptx.cuh for a CPU, on emulated.h. What is sent to another CTA, and an arrival at its barrier, takes its time as
// copies do; and a thread may do neither until it knows that the cluster's CTAs run.
struct uint2 { u32 x, y; };
struct float4 { float x, y, z, w; };

DEVICE void copy_16_bytes(void* to, const u16* from, u64) { fetch_here(to, from, 16, nullptr); }
DEVICE void end_group() { fibers[current].groups++; }
// Copies land in any order, but for what this demands.
template <int GROUPS> DEVICE void wait_for_groups() {
  Fiber& fiber = fibers[current];
  for (size_t i = fiber.copies.size(); i-- > 0;)
    if (!fiber.copies[i].barrier && fiber.copies[i].group + GROUPS < fiber.groups) land(fiber, i);
}
DEVICE void fetch_often_read(void* to, const void* from, u32 bytes, u64* barrier) {
  fetch_here(to, from, bytes, barrier);
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
DEVICE void barrier_arrive_at(u32 barrier) { depart({at(barrier), nullptr, 0, (u64*)at(barrier), 1}); }
template <class Values> static void send_bytes(u32 to, Values values, u32 barrier) {
  if (to % sizeof(values)) fail("unaligned send");
  Copy copy = {at(to), nullptr, sizeof(values), (u64*)at(barrier)};
  memcpy(copy.sent, &values, sizeof(values));
  depart(copy);
}
DEVICE void send(u32 to, float value, u32 barrier) { send_bytes(to, value, barrier); }
DEVICE void send(u32 to, float4 values, u32 barrier) { send_bytes(to, values, barrier); }
DEVICE float other_lane(float value, int distance) {
  const int other = current % 32 ^ distance;
  return as_float(give({as_bits(value)})[other][0]);
}

DEVICE uint2 read_8_bytes(const u16* from) {
  if ((uintptr_t)from % 8) fail("unaligned read");
  uint2 value;
  memcpy(&value, from, 8);
  return value;
}
DEVICE void write_8_bytes(u16* to, uint2 value) {
  if ((uintptr_t)to % 8) fail("unaligned write");
  early_writes += !last_kernel_ended;
  memcpy(to, &value, 8);
}
DEVICE u32 pair(float first, float second) { return bf16(first) | (u32)bf16(second) << 16; }
