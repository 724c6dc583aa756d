"""Images in requests: what is taken, what is refused by name, and who answers if not all see."""

from __future__ import annotations

import base64
import json

import pytest

from meshnode.engine import (
    IMAGE_BYTES_MAX,
    IMAGES_BYTES_MAX,
    IMAGES_MAX,
    ChatMessage,
    FunctionCall,
    Image,
    images_of,
)
from meshnode.engine.echo import EchoEngine
from meshnode.errors import NoVisionError, RequestError
from meshnode.gateway.app import create_api_app
from meshnode.gateway.images import content_of
from meshnode.gateway.openai import decode_chat, message_json
from meshnode.gateway.session import session_key
from meshnode.transport.http import BODY_BYTES_MAX
from tests.fakes import MODEL, WordEngine, local_mesh
from tests.gateway.link import Link

PNG = b"\x89PNG"


def url(data=PNG, media_type="image/png"):
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def see(address=None, **fields):
    return {"type": "image_url", "image_url": {"url": address or url(), **fields}}


def say(text):
    return {"type": "text", "text": text}


def user(*parts, role="user"):
    return {"model": MODEL, "messages": [{"role": role, "content": list(parts)}]}


def message(*parts):
    (only,) = decode_chat(json.dumps(user(*parts)).encode()).prompt
    return only


def test_images_stand_where_they_stood():
    told = message(say("a"), say("b"), see(), say("c"), see(detail="low"))
    assert told == ChatMessage("user", "a\nbc", (Image(PNG, 3), Image(PNG, 4, True)))
    again = message(*content_of(told))
    assert again == told
    assert content_of(ChatMessage("user", "x")) == "x"


def test_a_conversation_that_was_kept_goes_on_as_it_was():
    turns = (
        message(say("a"), see(detail="low")),
        ChatMessage("assistant", "b", reasoning="hm", calls=(FunctionCall("c", "f", "{}"),)),
        ChatMessage("tool", "42", call_id="c"),
    )
    body = {"model": MODEL, "messages": [message_json(turn) for turn in turns]}
    assert decode_chat(json.dumps(body).encode()).prompt == turns


@pytest.mark.parametrize(
    ("part", "param"),
    [
        (see("https://example.org/cat.png"), "url"),
        (see("http://169.254.169.254/latest/meta-data"), "url"),
        (see("file:///etc/passwd"), "url"),
        (see("data:image/svg+xml;base64,PHN2Zz4="), "url"),
        (see("data:image/png,raw"), "url"),
        (see("data:image/png;base64,?"), "url"),
        (see("data:image/png;base64,abc"), "url"),
        (see(url(bytes(IMAGE_BYTES_MAX + 3))), "url"),
        (see(detail="original"), "detail"),
        (see(crop=1), "crop"),
        ({"type": "image_url", "image_url": url()}, "url"),
        ({"type": "image_url"}, "url"),
    ],
)
def test_what_is_not_taken_is_named(part, param):
    with pytest.raises(RequestError) as refused:
        message(say("x"), part)
    assert refused.value.param == f"messages[0].content[1].image_url.{param}"
    assert PNG.decode("latin-1") not in str(refused.value)


def test_addresses_are_refused_with_the_reason():
    with pytest.raises(RequestError, match="a node fetches no images"):
        message(see("https://example.org/cat.png"))


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_only_users_show_images(role):
    body = user(see(), role=role)
    body["messages"][0] |= {"tool_call_id": "x"} if role == "tool" else {}
    with pytest.raises(RequestError) as refused:
        decode_chat(json.dumps(body).encode())
    assert refused.value.param == "messages[0].content[0].type"


def test_images_are_bounded_together():
    message(*[see() for _ in range(IMAGES_MAX)])
    half = see(url(bytes(IMAGES_BYTES_MAX // 2)))
    message(half, half)
    for parts in ([see()] * (IMAGES_MAX + 1), [half, half, see()]):
        with pytest.raises(RequestError, match="16 images, or over 16 MiB"):
            message(*parts)


def test_a_body_holds_all_the_images_that_a_request_may_have():
    assert IMAGES_BYTES_MAX * 4 / 3 + 8 * 1024 * 1024 < BODY_BYTES_MAX


def test_two_chats_that_differ_by_their_image_are_two_sessions():
    calls = [
        decode_chat(json.dumps(user(say("What is this?"), see(url(data)))).encode())
        for data in (b"a", b"b", b"a")
    ]
    first, other, again = (session_key(call, header=None, tenant=b"") for call in calls)
    assert first == again != other


async def test_a_model_that_cannot_see_says_so():
    api = create_api_app(local_mesh(EchoEngine())).test_client()
    response = await api.post("/v1/chat/completions", json=user(say("x"), see()))
    error = json.loads(await response.get_data())["error"]
    assert response.status_code == 400
    assert error["code"] == "no_vision"
    assert "`echo`" in error["message"]


class BlindEngine(WordEngine):
    """Does not see."""

    def generate(self, request):
        if images_of(request.prompt):
            raise NoVisionError(MODEL)
        return super().generate(request)


async def test_a_replica_that_sees_is_asked_after_one_that_does_not(nursery):
    link = Link(nursery, b=BlindEngine(), c=WordEngine())
    response, _ = await link.ask(**user(say("x"), see()))
    assert response.status_code == 200
    assert response.headers["x-meshnode-served-by"] == "peer-c"
    assert ("failed", "peer-b") not in link.mesh.calls
    (request,) = link.engines["c"].requests
    assert request.prompt == (ChatMessage("user", "x", (Image(PNG, 1),)),)


async def test_if_nobody_sees_the_client_is_told(nursery):
    link = Link(nursery, b=BlindEngine(), c=BlindEngine())
    response, body = await link.ask(**user(say("x"), see()))
    assert response.status_code == 400
    assert json.loads(body)["error"]["code"] == "no_vision"


async def test_if_who_sees_has_no_room_it_is_not_the_requests_fault(nursery):
    link = Link(nursery, b=BlindEngine(), c=WordEngine(busy=True))
    response, body = await link.ask(**user(say("x"), see()))
    assert response.status_code == 503
    assert json.loads(body)["error"]["code"] == "replicas_failed"


async def test_the_next_turn_of_a_response_still_shows_the_image(nursery):
    engine = WordEngine()
    api = create_api_app(local_mesh(engine)).test_client()
    shown = [{"type": "input_image", "image_url": url()}, {"type": "input_text", "text": "a b"}]
    first = {"model": MODEL, "input": [{"role": "user", "content": shown}]}
    response = await api.post("/v1/responses", json=first)
    before = json.loads(await response.get_data())["id"]
    turn = {"model": MODEL, "input": "c", "previous_response_id": before}
    response = await api.post("/v1/responses", json=turn)
    assert response.status_code == 200
    assert engine.requests[1].prompt[0] == engine.requests[0].prompt[0]
    assert engine.requests[1].prompt[0].images == (Image(PNG, 0),)
