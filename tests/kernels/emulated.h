// staged_ptx.cuh for a CPU, on fibers.h.
struct uint4 { u32 x, y, z, w; };
#define DEVICE inline
#define KERNEL static void
#define CONSTANT const

DEVICE int thread() { return current % THREADS; }
DEVICE int cta() { return first_cta + rank(); }
DEVICE char* shared_memory() { return my_cta().shared; }
DEVICE void sync_all() { meet(my_cta().everybody, rank() * THREADS, THREADS); }
DEVICE void sync_consumers() { meet(my_cta().consumers, rank() * THREADS, 32 * WARPS); }
DEVICE void sync_warp() { meet_warp(); }
DEVICE void pause() { yield(); }
DEVICE void launch_next_kernel() {}
DEVICE void wait_for_last_kernel() {
  while (!last_kernel_ended) yield();
}

DEVICE u32 as_bits(float value) { u32 out; memcpy(&out, &value, 4); return out; }
DEVICE float as_float(u32 value) { float out; memcpy(&out, &value, 4); return out; }
DEVICE float low(u32 pair) { return as_float(pair << 16); }
DEVICE float high(u32 pair) { return as_float(pair & 0xffff0000u); }
DEVICE u16 bf16(float value) {
  const u32 wide = as_bits(value);
  if (value != value) return 0x7fff;
  return (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
}
DEVICE float inverse_root(float value) { return 1.0f / sqrtf(value); }
DEVICE float silu(float value) { return value / (1.0f + expf(-value)); }
DEVICE uint4 read_16_bytes(const u16* from) {
  if ((uintptr_t)from % 16) fail("unaligned read");
  uint4 value;
  memcpy(&value, from, 16);
  return value;
}
DEVICE u32 read_2_bytes(const u16* from) { return *from; }
template <class Value> DEVICE void computed_here(Value&) {}
DEVICE void write_2_bytes(u16* to, u16 value) {
  early_writes += !last_kernel_ended;
  *to = value;
}

DEVICE void barrier_init(u64* barrier, u32 arrivals) {
  my_cta().fresh.push_back(barrier);
  memset(barrier, 0, 8);
  ((Barrier*)barrier)->pending = ((Barrier*)barrier)->arrivals = arrivals;
  ((Barrier*)barrier)->state = FRESH;
}
DEVICE void barriers_ready() {
  for (u64* barrier : my_cta().fresh) ((Barrier*)barrier)->state = READY;
}
DEVICE void barrier_arrive(u64* barrier) {
  if (known(barrier)->pending-- == 0) fail("one arrival too many");
  settle((Barrier*)barrier);
}
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
  known(barrier)->bytes += bytes;
  barrier_arrive(barrier);
}
DEVICE bool barrier_passed(u64* barrier, u32 parity) { return known(barrier)->phase != parity; }
DEVICE u64 read_once_policy() { return 0; }

DEVICE void fetch(void* to, const void* from, u32 bytes, u64* barrier, u64) { fetch_here(to, from, bytes, barrier); }

DEVICE void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  auto* given = give({a0, a1, a2, a3, b0, b1});
  const int group = current % 32 / 4, c = current % 4;
  for (int i = 0; i < 4; i++) {
    const int row = i / 2, token = 2 * c + i % 2;  // the row of the group, or the one 8 below
    for (int k = 0; k < 4; k++) {
      const u32 *a = given[4 * group + k], *b = given[4 * token + k];
      sum[i] += low(a[row]) * low(b[4]) + high(a[row]) * high(b[4]);
      sum[i] += low(a[row + 2]) * low(b[5]) + high(a[row + 2]) * high(b[5]);
    }
  }
}
