"""`make bench`: decode step times beside the in-tree model where there is a GPU, else exactness beside it."""

from pathlib import Path

import torch

from benchmarks import exactness, step_time

if torch.cuda.is_available():
    step_time.main(Path("step_time.json"))
else:
    print("No NVIDIA GPU here, so no step times; comparing log-probs with the in-tree model instead.", flush=True)
    exactness.main()
