// A multiprocessor for the kernels' own source on a CPU: every CUDA thread is a fiber, clusters of CTAs run one after the
// other, those of a cluster at once, and whatever Hopper may do in any order (copies, the turns of warps, the end of the
// kernel before) happens in a random one. Memory on its way into shared memory, and what the kernel before has not written
// yet, reads as NaN.
//
// Macros beside the kernel's own: ALL_WARPS of a CTA, CLUSTER, the CTAs of a cluster, and SHARED_BYTES of each.
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

constexpr int THREADS = 32 * ALL_WARPS, FIBERS = CLUSTER * THREADS, STACK = 1 << 16;
constexpr u64 SPACING = (SHARED_BYTES / 1024 + 2) * 1024;  // from a CTA's shared memory to the next one's

struct Meeting {  // of a fixed number of fibers that follow one another, again and again
  int there = 0, turn = 0;
};
struct Warp {
  Meeting meeting;
  u32 values[2][32][6];
};
struct Copy {  // or bytes sent
  char* to;
  const char* from;  // null: from `sent`
  u32 bytes;
  u64* barrier;
  bool in_tile;  // a line of one, in whose order its 16-byte pieces are to lie
  char sent[16];
};
struct Piece {  // 16 bytes that a thread fetches for itself
  char* to;
  const char* from;  // null: zeros
  int group;
};
struct Product {  // of tiles, for the sums of a thread
  float* sum;
  int sums;
  u32 a, b;
  int group;
};
struct Fiber {
  ucontext_t start;
  jmp_buf at;  // where it goes on; ucontext, which begins it, asks the operating system
  bool begun, done;
  Meeting* waits_for;  // a fiber that waits is not woken to see that it still has to
  std::vector<Copy> copies;  // that it asked for and that are on their way
  std::vector<Product> products;
  int groups;  // of products that it ended
  std::vector<Piece> pieces;
  int groups_of_pieces;
  bool arrived, in_cluster;  // at the cluster's meeting; behind it
};
struct Cta {
  char* shared;
  Meeting everybody, consumers;
  int alive;
  u32 pace;  // of 4 turns, those that its warps take
  std::vector<u64*> fresh;  // barriers that only the thread which made them knows
};
struct Fetched { u64 from, bytes; };
struct Written { char* to; const char* from; u64 bytes; };  // by the kernel before

static Fiber fibers[FIBERS];
static Cta cluster[CLUSTER];
static jmp_buf scheduler_at;
static int current, alive, first_cta;
static u32 lag;  // rounds until some of a fiber's copies land
static Meeting all_of_cluster;
static Warp warps[FIBERS / 32];
static std::vector<Fetched> fetched;
static std::vector<Written> written;
static bool last_kernel_ended;
static long early_writes;
static std::mt19937 dice;

static void yield() {
  if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler_at, 1);
}
// What Hopper would not forgive, in a fiber's turn: ends the run.
static const char* fault;
static void fail(const char* what) {
  fault = what;
  _longjmp(scheduler_at, 1);
}
static void resume(Fiber& fiber) {
  if (_setjmp(scheduler_at) != 0) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}
// One more of `size` fibers, from `first` on; the last one wakes those that wait.
static bool arrive_at(Meeting& meeting, int first, int size) {
  if (++meeting.there < size) return false;
  for (int i = first; i < first + size; i++)
    if (fibers[i].waits_for == &meeting) fibers[i].waits_for = nullptr;
  meeting.there = 0, meeting.turn++;
  return true;
}
static int meet(Meeting& meeting, int first, int size) {
  const int turn = meeting.turn;
  if (!arrive_at(meeting, first, size)) {
    fibers[current].waits_for = &meeting;
    yield();
  }
  return turn & 1;
}

static int rank() { return current / THREADS; }
static Cta& my_cta() { return cluster[rank()]; }
static Warp& my_warp() { return warps[current / 32]; }
static int meet_warp() { return meet(my_warp().meeting, current / 32 * 32, 32); }
// What each lane gave. A lane cannot be two meetings ahead of another, so two sets of values are enough.
static u32 (*give(std::initializer_list<u32> mine))[6] {
  Warp& warp = my_warp();
  auto* values = warp.values[warp.meeting.turn & 1];
  int i = 0;
  for (u32 value : mine) values[current % 32][i++] = value;
  return warp.values[meet_warp()];
}

struct Barrier {  // in the 64 bits of an mbarrier
  int bytes : 24;
  u32 pending : 12, arrivals : 12, phase : 1, state : 7;
};
enum { FRESH = 1, READY = 2 };  // states; memory that is no barrier has another one
static_assert(sizeof(Barrier) == 8, "an mbarrier");
static void settle(Barrier* barrier) {
  if (barrier->pending == 0 && barrier->bytes == 0) barrier->phase ^= 1, barrier->pending = barrier->arrivals;
}
// Whose these bytes are.
static Cta& cta_at(const void* place, u64 bytes) {
  const u64 offset = (const char*)place - cluster[0].shared;
  if (offset / SPACING >= CLUSTER || offset % SPACING + bytes > SHARED_BYTES) fail("outside of shared memory");
  return cluster[offset / SPACING];
}
static Barrier* known(u64* barrier) {
  const u32 state = (cta_at(barrier, 8), ((Barrier*)barrier)->state);
  if (state != FRESH && state != READY) fail("no barrier there");
  return (Barrier*)barrier;
}
// A copy, or what is sent, on its way from now on.
static void depart(const Copy& copy) {
  const Cta& target = cta_at(copy.to, copy.bytes);
  if (target.alive == 0) fail("a copy to a CTA that has ended");
  if (&cta_at(copy.barrier, 8) != &target) fail("the barrier of another CTA");
  if (known(copy.barrier)->state != READY) fail("a copy ahead of its barrier");
  memset(copy.to, 0xff, copy.bytes);
  fibers[current].copies.push_back(copy);
}
static void fetch_here(void* to, const void* from, u32 bytes, u64* barrier) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) fail("unaligned copy");
  if (&cta_at(to, bytes) != &my_cta()) fail("a copy to another CTA");
  depart({(char*)to, (const char*)from, bytes, barrier});
  fetched.push_back({(u64)from, bytes});
}
// In a tile, lines of 128 bytes at multiples of 1024: to which piece of 16 bytes this one changes, as a difference in bits.
static u32 swizzle(const void* place) { return ((uintptr_t)place >> 7 & 7) << 4; }
// One of a fiber's copies ends.
static void land(Fiber& fiber, size_t which) {
  const Copy copy = fiber.copies[which];
  fiber.copies[which] = fiber.copies.back();
  fiber.copies.pop_back();
  const char* from = copy.from ? copy.from : copy.sent;
  for (u32 i = 0; i < copy.bytes; i += 16) memcpy(copy.to + (copy.in_tile ? i ^ swizzle(copy.to) : i), from + i, 16);
  Barrier* barrier = (Barrier*)copy.barrier;
  barrier->bytes -= copy.bytes;
  settle(barrier);
}
// What happens by itself between two turns of the warps.
static void progress() {
  if (!last_kernel_ended && dice() % 16 == 0) {
    for (const Written& each : written)
      if (each.bytes) memcpy(each.to, each.from, each.bytes);
    last_kernel_ended = true;
  }
  for (Fiber& fiber : fibers) {
    if (fiber.copies.empty() || dice() % lag) continue;
    for (size_t left = dice() % (fiber.copies.size() + 1); left--;) land(fiber, dice() % fiber.copies.size());
  }
}

// The fiber whose turn it is has nothing more to do.
static void end_fiber() {
  fibers[current].done = true, alive--;
  if (!fibers[current].arrived) arrive_at(all_of_cluster, 0, FIBERS);  // the cluster's meeting is of those that have not ended
  if (!fibers[current].pieces.empty()) fault = "a copy that nobody waits for";
  Cta& mine = my_cta();
  if (--mine.alive > 0) return;
  for (const Fiber& fiber : fibers)
    for (const Copy& copy : fiber.copies)
      if (copy.to >= mine.shared && copy.to < mine.shared + SPACING) fault = "a copy outlives its CTA";
}

// Clusters differ in how fast their CTAs are, and copies.
static void prepare(void (*entry)(), char* stacks) {
  last_kernel_ended = false, lag = 1u << dice() % 6;
  for (const Written& each : written)
    if (each.bytes) memset(each.to, 0xff, each.bytes);
  all_of_cluster = Meeting();
  for (Cta& each : cluster) {
    memset(each.shared, 0xff, SHARED_BYTES);
    each.everybody = each.consumers = Meeting(), each.alive = THREADS, each.pace = 1 + dice() % 3;
    each.fresh.clear();
  }
  for (Warp& warp : warps) warp.meeting = Meeting();
  for (Fiber& fiber : fibers) {
    fiber.begun = fiber.done = fiber.arrived = fiber.in_cluster = false;
    fiber.waits_for = nullptr, fiber.groups = fiber.groups_of_pieces = 0;
    fiber.copies.clear(), fiber.products.clear(), fiber.pieces.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks + (&fiber - fibers) * (size_t)STACK;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
  }
}

template <class Params> static void run_cluster(void (*kernel)(Params), Params& params, char* stacks) {
  static void (*entry)(Params);
  static Params* argument;
  entry = kernel, argument = &params;
  prepare([] { entry(*argument); end_fiber(); _longjmp(scheduler_at, 1); }, stacks);
  int order[FIBERS / 32];
  for (int i = 0; i < FIBERS / 32; i++) order[i] = i;
  u64 rounds = 0;
  for (alive = FIBERS; alive > 0 && !fault; rounds++) {
    if (rounds > 100000) fault = "it hangs";
    for (int i = FIBERS / 32; i-- > 1;) std::swap(order[i], order[dice() % (i + 1)]);
    for (int warp : order) {
      if (dice() % 4 >= cluster[warp / ALL_WARPS].pace) continue;
      for (int fiber = 32 * warp; fiber < 32 * warp + 32; fiber++) {
        current = fiber;
        if (!fibers[fiber].done && !fibers[fiber].waits_for && !fault) resume(fibers[fiber]);
      }
    }
    if (!fault) progress();
  }
}

// `ctas` of them; `inputs` are what the kernel before is to write.
template <class Params>
static long run_fibers(void (*kernel)(Params), Params& params, int ctas, const std::vector<Written>& inputs, u32 seed) {
  dice.seed(seed);
  fault = nullptr;
  fetched.clear();
  early_writes = 0;
  written = inputs;
  std::unique_ptr<char[]> stacks(new char[(size_t)FIBERS * STACK]);
  std::vector<char> memory(CLUSTER * SPACING + 1024);
  for (int i = 0; i < CLUSTER; i++)
    cluster[i].shared = (char*)(((uintptr_t)memory.data() + 1023) / 1024 * 1024) + i * SPACING;
  for (first_cta = 0; first_cta < ctas && !fault; first_cta += CLUSTER) run_cluster(kernel, params, stacks.get());
  return early_writes;
}
