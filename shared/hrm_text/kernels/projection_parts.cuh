// What staged.cu and clustered.cu have in common.

DEVICE void wait(u64* barrier, u32 parity = 0) {
  while (!barrier_passed(barrier, parity)) pause();
}

// Where a number of (tokens, columns) lies in blocks of 32 columns (staged.py).
DEVICE int in_blocks_at(int token, int tokens, int column) { return (column / 32 * tokens + token) * 32 + column % 32; }
