// What staged.cu and streamed.cu have in common.

DEVICE void wait(u64* barrier, u32 parity = 0) {
  while (!barrier_passed(barrier, parity)) pause();
}
