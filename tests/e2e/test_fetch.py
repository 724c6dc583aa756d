"""A node that has no model gets one from another, and needs that one no more."""

from __future__ import annotations

import json
import time

from tests.e2e.agreed import items, standbys
from tests.e2e.conftest import Figure
from tests.e2e.mesh import MODEL_NAME, OTHER_NAME, Mesh, run_command, wait_all_see


def test_a_model_comes_from_a_peer_and_is_served(mesh: Mesh, figure: Figure) -> None:
    first = mesh.node("first").wait_started()
    keep = {"models": (), "standbys": (OTHER_NAME,)}
    join = ("--join", first.invite(), "--no-share-weights")
    second = mesh.node("second", *join, **keep).wait_started()
    wait_all_see([first, second])
    first.wait_ready()
    second.wait_until(lambda status: any(m["id"] == MODEL_NAME for m in status["mesh_models"]))

    where = ("--data-dir", str(second.data_dir))
    begun = time.monotonic()
    code, out, error = run_command("models", "fetch", MODEL_NAME, *where, "--json")
    figure("a model of 95 MB from a peer, s", time.monotonic() - begun)
    assert code == 0, (error, second.log_tail())
    told = json.loads(out)
    path = second.data_dir / "models" / f"{MODEL_NAME}.gguf"
    assert told["path"] == str(path)
    assert path.read_bytes() == mesh.models.small.read_bytes()
    assert told["model"] == first.status()["models"][0]["digest"]
    assert not list((second.data_dir / "cache" / "weights").iterdir())

    first.wait_until(lambda status: standbys(status, OTHER_NAME) or items(status, OTHER_NAME))
    code, _, error = run_command("models", "fetch", OTHER_NAME, "--data-dir", str(first.data_dir))
    assert code != 0
    assert "it does not share its models" in error

    first.kill()
    second.terminate()
    alone = mesh.run(
        "alone",
        ("-m", "meshnode", "serve", "--model", MODEL_NAME, "--context", "2048", "--no-mdns",
         "--listen", "/ip4/127.0.0.1/udp/0/quic-v1", "--api", "127.0.0.1:0"),
        data_dir=second.data_dir,
    ).wait_ready()  # fmt: skip
    reply = alone.ask()
    assert (reply.served_by, reply.route) == (alone.peer_id, "local")
    assert "Paris" in reply.text
