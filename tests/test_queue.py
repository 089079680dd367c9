"""The queue: who leaves, who enters, and that no one notices."""

from __future__ import annotations

import pytest
import torch

from atop_fast.attacks import queue
from atop_fast.attacks.base import initial_state
from atop_fast.attacks.queue import Batch


class Countdown:
    """Every image is done after as many steps as its label says; the result tells its id and its steps."""

    def __init__(self):
        self.shapes, self.alive = [], []

    def begin(self, estimator, batch):
        return initial_state(batch, batch.images.clone())

    def length(self):
        return None

    def step(self, estimator, state):
        self.shapes.append(len(state["done"]))
        self.alive.append(int((~state["done"]).sum()))
        state["t"] += ~state["done"]
        state["best"] = (state["ids"] * 1000 + state["t"]).float()[:, None, None, None]
        state["done"] |= state["t"] >= state["labels"]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 256, 257, 700])
def test_every_image_runs_its_own_number_of_steps(count):
    labels = torch.randint(1, 30, (count,))
    ids = torch.randperm(count)
    program = Countdown()
    result = queue.run_queue(program, None, Batch(torch.zeros(count, 1, 1, 1), labels, ids))
    assert torch.equal(result.flatten().long(), ids * 1000 + labels)
    assert all(rows % 8 == 0 for rows in program.shapes)
    assert max(program.shapes) <= queue.SLOTS["cpu"]


def test_full_while_the_queue_lasts_and_then_shrinks():
    count, slots = 1600, queue.SLOTS["cpu"]
    labels = torch.randint(1, 30, (count,))
    program = Countdown()
    queue.run_queue(program, None, Batch(torch.zeros(count, 1, 1, 1), labels, torch.arange(count)))
    # A whole batch at a time, each as long as its slowest image, would take more.
    in_batches = sum(slots * int(part.max()) for part in labels.split(slots))
    assert int(labels.sum()) <= sum(program.shapes) < 0.65 * in_batches
    assert program.shapes[-1] < program.shapes[0]


def test_images_that_take_equally_long_go_batch_by_batch():
    """No step waits to see which are done: a graph may hold an update of any size."""

    class Fixed(Countdown):
        def length(self):
            return 5

    count = 700
    ids, program = torch.randperm(count), Fixed()
    result = queue.run_queue(program, None, Batch(torch.zeros(count, 1, 1, 1), torch.full((count,), 5), ids))
    assert torch.equal(result.flatten().long(), ids * 1000 + 5)
    assert program.shapes == 5 * [256] + 5 * [256] + 5 * [192]


def test_given_tensors_follow_their_images():
    class Named(Countdown):
        def step(self, estimator, state):
            super().step(estimator, state)
            state["best"] = state["name"].float()[:, None, None, None]

    count = 100
    name = torch.randperm(count)
    labels = torch.randint(1, 5, (count,))
    batch = Batch(torch.zeros(count, 1, 1, 1), labels, torch.arange(count))
    result = queue.run_queue(Named(), None, batch, given={"name": name})
    assert torch.equal(result.flatten().long(), name)
