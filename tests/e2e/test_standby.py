"""The smallest mesh that survives a death: one node serves, one has the file, neither is asked."""

from __future__ import annotations

import threading
import time

from tests.e2e import load
from tests.e2e.agreed import owners, standbys, wait_agreed
from tests.e2e.conftest import Figure
from tests.e2e.mesh import MODEL_NAME, Mesh, serves

SERVED_S = 12.0
"""Five on a free machine."""
# No near ties between tokens: the standby computes what was said in other batches than it was
# said in, which moves logits a little and may flip such a tie.
STORY = "Repeat this ten times: one two three four five six seven eight nine ten."
STORY_TOKENS = 80
TOKENS_BEFORE_KILL = 20


def test_an_answer_goes_on_at_the_standby_as_it_would_have(mesh: Mesh, figure: Figure) -> None:
    """Its owner is killed in the middle. When that comes back, nobody is without an answer."""
    owner = mesh.node("owner").wait_started()
    keep = {"models": (), "standbys": (MODEL_NAME,)}
    standby = mesh.node("standby", "--join", owner.invite(), **keep)
    gate = mesh.gateway("gate", "--join", owner.invite(role="gateway"))
    for node in (standby, gate):
        node.wait_started()
    wait_agreed(
        [owner, standby, gate],
        lambda status: (
            owners(status, MODEL_NAME, "serving") == {owner.peer_id}
            and standbys(status, MODEL_NAME) == [standby.peer_id]
        ),
    )
    undisturbed = load.ask(gate, STORY, STORY_TOKENS)
    assert undisturbed.is_whole
    assert standby.status()["models"][0]["state"] == "standby"

    after_s = undisturbed.at[TOKENS_BEFORE_KILL] - undisturbed.asked_at
    killed = threading.Timer(after_s, owner.kill)
    killed.start()
    told = load.ask(gate, STORY, STORY_TOKENS)
    killed.join()
    figure("pause of an answer whose owner was killed, s", told.pause_s)
    assert told.is_whole, told
    assert told.served_by == owner.peer_id
    assert told.text == undisturbed.text
    assert undisturbed.pause_s < told.pause_s < SERVED_S
    assert gate.ask().served_by == standby.peer_id

    again = mesh.again(owner)
    with load.Clients([gate], max_tokens=4) as clients:
        again.wait_ready()
        gate.wait_until(lambda status: owners(status, MODEL_NAME, "serving") == {owner.peer_id})
        gate.wait_until(lambda status: owner.peer_id in serves(status, MODEL_NAME))
        clients.wait_text(time.monotonic())
    unserved = [each for each in clients.told if not each.is_whole]
    assert not unserved, "one had let go before the other was ready"
