// What attention.cu needs of Hopper beyond staged_ptx.cuh and streamed_ptx.cuh. The tests have it for a CPU in
// tests/kernels/emulated_attention.h.

#define MINUS_INFINITY __int_as_float(0xff800000)
DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the one that is no NaN
DEVICE float power_of_2(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}
DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
DEVICE float sigmoid(float value) { return __fdividef(1.0f, 1.0f + __expf(-value)); }

// What no kernel of the chain writes.
DEVICE u32 read_4_bytes_of(const void* from, u64 at) { return __ldg((const u32*)from + at); }
DEVICE long long read_number(const void* from, u64 at, int wide) {
  return wide ? __ldg((const long long*)from + at) : (long long)__ldg((const int*)from + at);
}
DEVICE void write_8_bytes(u16* to, uint2 value) { *(uint2*)to = value; }

// 16 bytes on their way into shared memory, zeros where they are not `there`; in groups, of which all but the last GROUPS
// are waited for.
DEVICE void fetch_16_bytes(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
DEVICE void fetches_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS> DEVICE void wait_for_fetches() { asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory"); }

// Four matrices of 8 x 8, of which lane 8 i + j says where line j of the i-th lies.
DEVICE void read_matrices(u32 (&a)[4], const char* line) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(line))
               : "memory");
}
DEVICE void read_transposed_matrices(u32 (&a)[4], const char* line) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(line))
               : "memory");
}
DEVICE u32 transposed(u32 two) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(two));
  return result;
}
