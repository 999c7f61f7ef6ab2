// staged_ptx.cuh for a CPU: every CUDA thread is a fiber, CTAs run one after the other, and whatever Hopper may do in any
// order (copies, the turns of warps, the end of the kernel before) happens in a random one. Memory on its way to a slot, and
// what the kernel before has not written yet, reads as NaN.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint4 { u32 x, y, z, w; };
#define DEVICE inline
#define KERNEL static void
#define CONSTANT const

constexpr int FIBERS = 32 * (WARPS + 1), STACK = 1 << 16;

struct Meeting {  // of a fixed number of fibers, again and again
  int there = 0, turn = 0;
};
struct Warp {
  Meeting meeting;
  u32 values[2][32][6];
};
struct Copy { char* to; const char* from; u32 bytes; u64* barrier; };
struct Fetched { u64 from, bytes; };
struct Written { char* to; const char* from; u64 bytes; };  // by the kernel before

static ucontext_t fibers[FIBERS];
static jmp_buf scheduler_at, fiber_at[FIBERS];  // where they go on; ucontext, which begins them, asks the operating system
static bool begun[FIBERS], done[FIBERS];
static Meeting* waits_for[FIBERS];  // a fiber that waits is not woken to see that it still has to
static int current, alive, this_cta;
static u64 rounds;
static char* shared;
static Meeting everybody, consumers;
static Warp warps[WARPS + 1];
static std::vector<Copy> copies;
static std::vector<Fetched> fetched;
static Written written[2];
static bool last_kernel_ended;
static long early_writes;
static std::mt19937 dice;

static void yield() {
  if (_setjmp(fiber_at[current]) == 0) _longjmp(scheduler_at, 1);
}
// What Hopper would not forgive, in a fiber's turn: ends the run.
static const char* fault;
static void fail(const char* what) {
  fault = what;
  _longjmp(scheduler_at, 1);
}
static void resume(int fiber) {
  if (_setjmp(scheduler_at) != 0) return;
  if (begun[fiber]) _longjmp(fiber_at[fiber], 1);
  begun[fiber] = true;
  setcontext(&fibers[fiber]);
}
static int meet(Meeting& meeting, int size) {
  const int turn = meeting.turn;
  if (++meeting.there == size) {
    for (auto& waiting : waits_for)
      if (waiting == &meeting) waiting = nullptr;
    meeting.there = 0, meeting.turn++;
  } else {
    waits_for[current] = &meeting;
    yield();
  }
  return turn & 1;
}

DEVICE int thread() { return current; }
DEVICE int cta() { return this_cta; }
DEVICE char* shared_memory() { return shared; }
DEVICE void sync_all() { meet(everybody, FIBERS); }
DEVICE void sync_consumers() { meet(consumers, 32 * WARPS); }
static Warp& my_warp() { return warps[current / 32]; }
DEVICE void sync_warp() { meet(my_warp().meeting, 32); }
// What each lane gave. A lane cannot be two meetings ahead of another, so two sets of values are enough.
static u32 (*give(std::initializer_list<u32> mine))[6] {
  Warp& warp = my_warp();
  auto* values = warp.values[warp.meeting.turn & 1];
  int i = 0;
  for (u32 value : mine) values[current % 32][i++] = value;
  return warp.values[meet(warp.meeting, 32)];
}
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

struct Barrier {  // in the 64 bits of an mbarrier
  int bytes : 24;
  u32 pending : 12, arrivals : 12, phase : 1;
};
static_assert(sizeof(Barrier) == 8, "an mbarrier");
static void settle(Barrier* barrier) {
  if (barrier->pending == 0 && barrier->bytes == 0) barrier->phase ^= 1, barrier->pending = barrier->arrivals;
}
DEVICE void barrier_init(u64* barrier, u32 arrivals) {
  memset(barrier, 0, 8);
  ((Barrier*)barrier)->pending = ((Barrier*)barrier)->arrivals = arrivals;
}
DEVICE void barriers_ready() {}
DEVICE void barrier_arrive(u64* barrier) {
  if (((Barrier*)barrier)->pending-- == 0) fail("one arrival too many");
  settle((Barrier*)barrier);
}
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
  ((Barrier*)barrier)->bytes += bytes;
  barrier_arrive(barrier);
}
DEVICE bool barrier_passed(u64* barrier, u32 parity) { return ((Barrier*)barrier)->phase != parity; }
DEVICE u64 read_once_policy() { return 0; }
DEVICE void fetch(void* to, const void* from, u32 bytes, u64* barrier, u64) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) fail("unaligned copy");
  memset(to, 0xff, bytes);
  copies.push_back({(char*)to, (const char*)from, bytes, barrier});
  fetched.push_back({(u64)from, bytes});
}

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

// What happens by itself between two turns of the warps.
static void progress() {
  if (!last_kernel_ended && dice() % 16 == 0) {
    for (const Written& each : written)
      if (each.bytes) memcpy(each.to, each.from, each.bytes);
    last_kernel_ended = true;
  }
  for (size_t turns = copies.size() / 2 + 1; turns-- && !copies.empty();) {
    const size_t which = dice() % copies.size();
    const Copy copy = copies[which];
    copies[which] = copies.back();
    copies.pop_back();
    memcpy(copy.to, copy.from, copy.bytes);
    ((Barrier*)copy.barrier)->bytes -= copy.bytes;
    settle((Barrier*)copy.barrier);
  }
}

template <class Params>
static void run_cta(void (*kernel)(Params), Params& params, char* stacks) {
  static void (*entry)(Params);
  static Params* argument;
  entry = kernel, argument = &params;
  last_kernel_ended = false;
  for (const Written& each : written)
    if (each.bytes) memset(each.to, 0xff, each.bytes);
  everybody = consumers = Meeting();
  for (auto& warp : warps) warp.meeting = Meeting();
  for (int i = 0; i < FIBERS; i++) {
    begun[i] = done[i] = false, waits_for[i] = nullptr;
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks + (size_t)i * STACK;
    fibers[i].uc_stack.ss_size = STACK;
    fibers[i].uc_link = nullptr;
    makecontext(&fibers[i], (void (*)())(+[] { entry(*argument); done[current] = true, alive--; _longjmp(scheduler_at, 1); }), 0);
  }
  int order[WARPS + 1];
  for (int i = 0; i <= WARPS; i++) order[i] = i;
  for (alive = FIBERS, rounds = 0; alive > 0; rounds++) {
    if (rounds > 100000) fault = "it hangs";
    for (int i = WARPS + 1; i-- > 1;) std::swap(order[i], order[dice() % (i + 1)]);
    for (int warp : order) {
      if (dice() % 4 == 0) continue;
      for (current = 32 * warp; current < 32 * warp + 32;) {
        const int fiber = current;
        if (!done[fiber] && !waits_for[fiber] && !fault) resume(fiber);
        current = fiber + 1;
      }
    }
    if (fault) return;
    progress();
  }
  if (!copies.empty()) fault = "a copy outlives its CTA";
}

// `ctas` of them; `x` and `residual` are what the kernel before is to write where the parameters point to.
template <class Params>
static long run_fibers(void (*kernel)(Params), Params& params, int ctas, Written x, Written residual, u32 seed) {
  dice.seed(seed);
  fault = nullptr;
  fetched.clear();
  copies.clear();
  early_writes = 0;
  written[0] = x, written[1] = residual;
  std::unique_ptr<char[]> stacks(new char[(size_t)FIBERS * STACK]);
  std::vector<char> memory(SHARED_BYTES + 1024);
  shared = (char*)(((uintptr_t)memory.data() + 1023) / 1024 * 1024);
  for (this_cta = 0; this_cta < ctas && !fault; this_cta++) {
    memset(shared, 0xff, SHARED_BYTES);
    run_cta(kernel, params, stacks.get());
  }
  return early_writes;
}
