"""What gpu_run.sh lets Nsight Compute look at: two launches of a training step, and C1 and C3 forward and backward."""

import devices
import torch
from layers import LAYERS, OURS
from networks import Task
from operator_race import Case, Operands, prepare

from lenet_fast import FusedTrainer

BATCH = 128


def main() -> None:
    task = Task.make("lenet5-d2l", BATCH, 1, "cuda")
    with devices.cooperative_launches("0"):  # the profiler looks at phases, each a launch of its own
        FusedTrainer(task.model.to("cuda"), "sgd", lr=task.lr).step(task.images, task.labels)
    for name in ("c1", "c3"):
        case = Case(LAYERS[name], *LAYERS[name].variants[0])
        operands = Operands.make(case, BATCH, torch.float32, "cuda")
        prepare(LAYERS[name].contestants[OURS], case, operands, "forward+backward")()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
