"""NCCL between the first two GPUs: a broadcast, and a send, of as many bytes as the benchmark copies. One process a GPU.

Arguments: the rank, a file through which the ranks meet, bytes, rounds. Rank 1, which receives, prints the seconds of each round as
JSON.
"""

import json
import sys

import torch
import torch.distributed as dist

WARM_UP_ROUNDS = 3


def main(rank, store, length, rounds):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    data = torch.empty(length, dtype=torch.uint8, device="cuda")

    def broadcast():
        dist.broadcast(data, 0)

    def send():
        if rank == 0:
            dist.send(data, 1)
        else:
            dist.recv(data, 0)

    seconds = {}
    for name, run in (("broadcast", broadcast), ("send", send)):
        # Rank 0 has ones, rank 1 anything else.
        data.fill_(rank + 1)
        run()
        if not bool((data == 1).all()):
            raise SystemExit(f"rank {rank}: wrong bytes after {name}")
        seconds[name] = []
        for number in range(WARM_UP_ROUNDS + rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # So that no rank waits for the other within the time.
            dist.barrier()
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number >= WARM_UP_ROUNDS:
                seconds[name].append(start.elapsed_time(end) / 1e3)
    if rank == 1:
        print(json.dumps(seconds), flush=True)
    dist.destroy_process_group()


main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
