// What staged.cu and streamed.cu need of Hopper, each instruction under a name. The tests have the same names for a CPU
// (tests/kernels/emulated.h).
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
// Registers are left to the neighbours on a multiprocessor, as shared memory is.
#define KERNEL extern "C" __global__ void __maxnreg__(REGISTERS)
#define CONSTANT const __grid_constant__

DEVICE int thread() { return threadIdx.x; }
DEVICE int cta() { return blockIdx.x; }
DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}
DEVICE void sync_all() { __syncthreads(); }
DEVICE void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(32 * WARPS) : "memory"); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void pause() {}

// Programmatic dependent launch: the next kernel of the chain may start; the last one has ended, and all see its writes.
DEVICE void launch_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_last_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The compiler computes a value neither later nor, from one that is on its way, earlier.
DEVICE void computed_here(const u16*& pointer) { asm volatile("" : "+l"(pointer)); }
DEVICE void computed_here(u32& value) { asm volatile("" : "+r"(value)); }

// bf16 pairs, the lower index in the lower half.
DEVICE float low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE u16 bf16(float value) {
  u16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return rounded;
}

// To some units of float32's last place, without the branches of exact ones: y is rounded to bf16.
DEVICE float inverse_root(float value) { return rsqrtf(value); }
DEVICE float silu(float value) { return __fdividef(value, 1.0f + __expf(-value)); }

// What the last kernel wrote: past L1, where another kernel of the chain may have left what was there before.
DEVICE uint4 read_16_bytes(const u16* from) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}
DEVICE u32 read_2_bytes(const u16* from) {
  u32 value;
  asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
DEVICE void write_2_bytes(u16* to, u16 value) { *to = value; }

DEVICE u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
DEVICE void barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// The copy engine sees the barriers from here on.
DEVICE void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
DEVICE bool barrier_passed(u64* barrier, u32 parity) {
  u32 passed;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return passed != 0;
}

// Weights are read once a step: they leave L2 first, so that activations stay.
DEVICE u64 read_once_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE void fetch(void* to, const void* from, u32 bytes, u64* barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// sum += A (16 rows, 16 columns) B (16 columns, 8 tokens). Of A, a0 and a2 are this lane's row, a1 and a3 the one
// 8 below.
DEVICE void multiply(float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
