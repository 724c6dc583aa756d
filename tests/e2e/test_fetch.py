"""Nodes get models, and parts of them, from others that have the files."""

from __future__ import annotations

import json
import time

from tests.e2e import load
from tests.e2e.agreed import items, standbys, wait_agreed
from tests.e2e.conftest import Figure
from tests.e2e.mesh import MODEL_NAME, OTHER_NAME, Mesh, run_command, wait_all_see
from tests.e2e.test_rings import MEMORY, STORY, STORY_TOKENS, cut, is_served


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


def test_a_node_without_the_file_takes_half_of_the_layers(mesh: Mesh, figure: Figure) -> None:
    """Nobody can hold the whole model, and one has its file."""
    memory = ("--memory", MEMORY[2])
    first = mesh.node("first", *memory, models=(), standbys=(MODEL_NAME,)).wait_started()
    join = ("--join", first.invite(), "--standby", f"mesh:{MODEL_NAME}")
    second = mesh.node("second", *memory, *join, models=()).wait_started()
    wait_agreed([first, second], lambda status: is_served(status, 2))
    told = load.ask(second, STORY, STORY_TOKENS)
    assert told.is_whole, told
    assert {part["owner"] for part in cut(first.status())} == {first.peer_id, second.peer_id}
    (part,) = (second.data_dir / "cache" / "parts").glob("*.gguf")
    whole_bytes = mesh.models.small.stat().st_size
    assert part.stat().st_size == whole_bytes
    figure("of the file that came, share", part.stat().st_blocks * 512 / whole_bytes)
    assert part.stat().st_blocks * 512 < 0.9 * whole_bytes
