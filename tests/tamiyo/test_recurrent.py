"""A recurrent trunk: whole episodes are steps one by one, episodes know nothing of each other, rows stand alone."""

import numpy as np
import pytest
import torch
from test_policy import inputs, network, start, take

from esper.leyline.errors import SpecError
from esper.leyline.keys import numpy_generator
from esper.leyline.protocols import ActInputs
from esper.leyline.views import VIEWS
from esper.tamiyo.networks import History, NetworkSpec, ValueNet, seeded
from esper.tamiyo.policy import LearnedController

EPISODES, STEPS = 3, 12


def shown(seed: int = 0) -> torch.Tensor:
    return torch.randn(EPISODES, STEPS, VIEWS["v1"].width, generator=torch.Generator().manual_seed(seed))


def everything(obs_etv: torch.Tensor) -> History:
    return History(obs_etv, torch.arange(obs_etv.shape[0] * obs_etv.shape[1]))


@pytest.mark.parametrize("form", [{}, {"form": "atomic", "num_leaves": 7}])
def test_a_whole_episode_forward_equals_its_steps(form: dict) -> None:
    net = network(view="v1", trunk="gru", hidden=24, **form).eval()
    obs = shown()
    with torch.no_grad():
        whole = net(everything(obs)).unflatten(0, (EPISODES, STEPS))
        memory = torch.zeros(EPISODES, 24)
        for step in range(STEPS):
            entries, memory = net.step(obs[:, step], memory)
            torch.testing.assert_close(whole[:, step], entries, atol=1e-5, rtol=0)
    assert whole.std(dim=1).mean() > 0.01


def test_neither_another_episode_nor_the_future_nor_the_padding_changes_a_state() -> None:
    net = network(view="v1", trunk="gru", hidden=24).eval()
    obs = shown()
    other = obs.clone()
    other[0] = shown(1)[0]
    other[1, 5:] = shown(2)[1, 5:]
    with torch.no_grad():
        before, after = (net(everything(part)).unflatten(0, (EPISODES, STEPS)) for part in (obs, other))
    assert torch.equal(before[2], after[2])
    assert torch.equal(before[1, :5], after[1, :5])
    assert not torch.equal(before[1, 5:], after[1, 5:])
    assert not torch.equal(before[0], after[0])


def test_the_first_observation_reaches_the_last_entries_and_their_gradient() -> None:
    with seeded(0):
        value = ValueNet(NetworkSpec(view="v1", trunk="gru", hidden=24, input_noise=0.0))
    obs = shown().requires_grad_()
    value(History(obs, torch.tensor([STEPS - 1]))).sum().backward()
    assert obs.grad[0, 0].abs().sum() > 0
    assert obs.grad[1:].abs().sum() == 0


def test_rows_without_their_episodes_are_refused() -> None:
    with pytest.raises(SpecError, match="without their episodes"):
        network(view="v1", trunk="gru")(torch.zeros(2, VIEWS["v1"].width))


def at_step(block: ActInputs, step: int) -> ActInputs:
    """Another observation of the same episodes."""
    rows = np.roll(np.arange(len(block.step_N)), step)
    return take(block, rows)


def test_acting_remembers_the_episode_and_a_row_depends_on_itself_alone_bit_for_bit() -> None:
    controller = LearnedController(network(view="v4", trunk="gru", hidden=24), name="p", sampled=True)
    block = inputs(150)
    rows_of = (np.array([7]), np.array([149, 3, 64]), numpy_generator("order").permutation(150))

    def rollout(rows: np.ndarray) -> list[np.ndarray]:
        carry, found = start(controller, len(rows)), []
        for step in range(4):
            decision = controller.act(take(at_step(block, step), rows), carry)
            carry = decision.carry
            found.append(decision.logp_N)
        return [*found, carry["memory"]]

    whole = rollout(np.arange(150))
    for rows in rows_of:
        for got, expected in zip(rollout(rows), whole):
            np.testing.assert_array_equal(got, expected[rows])
    fresh = controller.act(at_step(block, 3), start(controller, 150))
    assert not np.array_equal(fresh.carry["memory"], whole[-1])
    again = controller.act(at_step(block, 0), start(controller, 150))
    np.testing.assert_array_equal(again.logp_N, whole[0])


def test_acting_equals_the_whole_episode_forward() -> None:
    net = network(view="v1", trunk="gru", hidden=24)
    controller = LearnedController(net, name="p", sampled=True)
    block = inputs(5)
    carry = start(controller, 5)
    obs, masks, entries = [], [], []
    for step in range(6):
        now = at_step(block, step)
        obs.append(torch.from_numpy(VIEWS["v1"].encode(now.columns, now.step_N)))
        masks.append(torch.from_numpy(now.mask_NT))
        found, carry = controller._logits(obs[-1].numpy(), now.mask_NT, carry)
        entries.append(torch.from_numpy(found))
    history = History(torch.stack(obs, dim=1), torch.arange(30))
    with torch.no_grad():
        whole = net.logits(history, torch.stack(masks, dim=1).flatten(0, 1)).unflatten(0, (5, 6))
    torch.testing.assert_close(whole.double(), torch.stack(entries, dim=1), atol=1e-5, rtol=0)
