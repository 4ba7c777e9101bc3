"""Threads that write to a training's data while it runs: an error or a finite training, never a crash."""

import itertools
import subprocess
import sys
import threading
import time

import torch

import lenet_fast as lf
from lenet_fast.training_steps import Masks

ATTEMPTS = 12


def test_data_may_change_meanwhile():
    program = "from tests.test_races import races; races()"
    subprocess.run([sys.executable, "-X", "faulthandler", "-c", program], check=True, timeout=100)


def races():
    """Few images at a time, and blocks of them; with the trainer's checks of the arguments, and without."""
    torch.set_num_threads(1)
    for what, batch_size, way in itertools.product(("order", "labels", "images"), (4, 100), ("epoch", "operator")):
        race(what, batch_size, way)


def race(what, batch_size, way):
    model = lf.models.lenet1()
    trainer = lf.FusedTrainer(model, "sgd", lr=1e-4)
    images = torch.rand(1000, 1, 28, 28)
    labels, order = torch.randint(10, (1000,)), torch.arange(1000)
    good = {"order": order.clone(), "labels": labels.clone(), "images": images.clone()}
    data = {"order": order, "labels": labels, "images": images}

    def run():
        if way == "epoch":
            return trainer.run_epoch(images, labels, order, batch_size)[0]
        rates = [1e-4] * (1000 // batch_size)
        return trainer._steps.take(images, labels, order, batch_size, rates, Masks(None))[0]

    run()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    trained = 0
    for attempt in range(ATTEMPTS):
        for name, tensor in data.items():
            tensor.copy_(good[name])

        def write(after=3 * seconds * attempt / ATTEMPTS):  # the last ones when the run has ended
            time.sleep(after)
            data[what].fill_(1e30 if what == "images" else 10**11)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            losses = run()
        except (RuntimeError, ValueError) as error:
            if ("not finite" if what == "images" else f"{what}: expected") not in str(error):
                raise
        else:
            trained += 1
            if what != "images":
                assert losses.isfinite().all()
        thread.join()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        if what == "images":  # as large as those, a step may lead anywhere
            model.load_state_dict(lf.models.lenet1().state_dict())
    assert trained, "no run was still going on"
