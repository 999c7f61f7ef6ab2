// What clustered.cu needs of Hopper beyond staged_ptx.cuh.

// 16 bytes of W on their way into shared memory. Copies of a thread end in the order of their groups.
DEVICE void copy_16_bytes(void* to, const u16* from, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "l"(policy)
               : "memory");
}
DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last GROUPS are there.
template <int GROUPS> DEVICE void wait_for_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory"); }

// x: no hint, for L2 keeps it.
DEVICE void fetch_often_read(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

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
// Says that something has been read, to those that overwrite it. No `release.cluster`, which would wait for all of the
// thread's memory: whoever arrives here has used what was read.
DEVICE void barrier_arrive_at(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Numbers on their way to another CTA, whose barrier counts their bytes.
DEVICE void send(u32 to, float value, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(to), "f"(value),
               "r"(barrier)
               : "memory");
}
DEVICE void send(u32 to, float4 values, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(values.x), "f"(values.y), "f"(values.z), "f"(values.w), "r"(barrier)
               : "memory");
}
DEVICE float other_lane(float value, int distance) { return __shfl_xor_sync(~0u, value, distance); }

DEVICE uint2 read_8_bytes(const u16* from) {
  uint2 value;
  asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from) : "memory");
  return value;
}
DEVICE void write_8_bytes(u16* to, uint2 value) { *(uint2*)to = value; }
DEVICE u32 pair(float first, float second) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
