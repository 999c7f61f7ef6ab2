// attention_ptx.cuh for a CPU, on emulated_streams.h. What a thread fetches 16 bytes at a time lands when it waits for it,
// as late as it may.
static const float MINUS_INFINITY = -INFINITY;
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE float power_of_2(float value) { return exp2f(value); }
DEVICE float quotient(float a, float b) { return a / b; }
DEVICE float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

DEVICE u32 read_4_bytes_of(const void* from, u64 at) { return ((const u32*)from)[at]; }
DEVICE long long read_number(const void* from, u64 at, int wide) {
  return wide ? ((const long long*)from)[at] : ((const int*)from)[at];
}
DEVICE void write_8_bytes(u16* to, uint2 value) {
  if ((uintptr_t)to % 8) fail("unaligned write");
  early_writes += !last_kernel_ended;
  memcpy(to, &value, 8);
}

DEVICE void fetch_16_bytes(void* to, const void* from, bool there) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) fail("unaligned copy");
  if (&cta_at(to, 16) != &my_cta()) fail("a copy to another CTA");
  memset(to, 0xff, 16);
  Fiber& mine = fibers[current];
  mine.pieces.push_back({(char*)to, there ? (const char*)from : nullptr, mine.groups_of_pieces});
  if (there) fetched.push_back({(u64)from, 16});
}
DEVICE void fetches_end() { fibers[current].groups_of_pieces++; }
template <int GROUPS> DEVICE void wait_for_fetches() {
  static const char zeros[16] = {};
  auto& mine = fibers[current].pieces;
  size_t done = 0;
  for (; done < mine.size() && mine[done].group + GROUPS < fibers[current].groups_of_pieces; done++)
    memcpy(mine[done].to, mine[done].from ? mine[done].from : zeros, 16);
  mine.erase(mine.begin(), mine.begin() + done);
}

// Where each lane's line lies, then this lane's two numbers of each matrix.
static u16 number_of(u32 line, int column) {
  if (line % 16) fail("unaligned line");
  return ((const u16*)(my_cta().shared + line))[column];
}
static u32 place_in_cta(const char* line) {
  if (&cta_at(line, 16) != &my_cta()) fail("another CTA's line");
  return line - my_cta().shared;
}
DEVICE void read_matrices(u32 (&a)[4], const char* line) {
  auto* given = give({place_in_cta(line)});
  const int row = current % 32 / 4, column = current % 4 * 2;
  for (int i = 0; i < 4; i++) {
    const u32 from = given[8 * i + row][0];
    a[i] = number_of(from, column) | (u32)number_of(from, column + 1) << 16;
  }
}
DEVICE void read_transposed_matrices(u32 (&a)[4], const char* line) {
  auto* given = give({place_in_cta(line)});
  const int row = current % 4 * 2, column = current % 32 / 4;
  for (int i = 0; i < 4; i++)
    a[i] = number_of(given[8 * i + row][0], column) | (u32)number_of(given[8 * i + row + 1][0], column) << 16;
}
DEVICE u32 transposed(u32 two) {
  auto* given = give({two});
  const int row = current % 4 * 2, column = current % 32 / 4;
  auto number = [&](int row) { return given[4 * row + column / 2][0] >> column % 2 * 16 & 0xffff; };
  return number(row) | number(row + 1) << 16;
}
