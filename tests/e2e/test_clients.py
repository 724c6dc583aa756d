"""The official clients of other APIs against a real node with a real model.

What OpenAI's own client does with chats is in test_one_node.py; here it asks for responses and
embeddings.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import anthropic
import httpx
import jsonschema
import ollama
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.mesh import HANG_S, MODEL_NAME, QUESTION, Mesh, NodeProcess

ASK = {"model": MODEL_NAME, "temperature": 0}
# Anthropic's own models no longer take a temperature, so its client has no argument for it.
MESSAGE = {"model": MODEL_NAME, "extra_body": {"temperature": 0}}
TURN = [{"role": "user", "content": QUESTION}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
THINKING = {"type": "enabled"}
OPTIONS = {"temperature": 0, "num_predict": 12}


@pytest.fixture(scope="module")
def node(module_mesh: Mesh) -> NodeProcess:
    return module_mesh.node("alone").wait_ready()


@pytest.fixture(scope="module")
def responses(node: NodeProcess) -> openai.resources.Responses:
    client = openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)
    return client.responses


@pytest.fixture(scope="module")
def embeddings(node: NodeProcess) -> openai.resources.Embeddings:
    client = openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0)
    return client.embeddings


@pytest.fixture(scope="module")
def messages(node: NodeProcess) -> anthropic.resources.Messages:
    client = anthropic.Anthropic(base_url=node.url, api_key="none", max_retries=0)
    return client.messages


@pytest.fixture(scope="module")
def llama(node: NodeProcess) -> ollama.Client:
    return ollama.Client(host=node.url, timeout=HANG_S)


# ---------------------------------------------------------------------------------------------
# openai: responses
# ---------------------------------------------------------------------------------------------


def test_responses_whole_and_streamed_alike(responses: openai.resources.Responses) -> None:
    whole = responses.create(**ASK, input=QUESTION, max_output_tokens=64)
    assert "Paris" in whole.output_text
    assert whole.usage is not None
    assert 1 <= whole.usage.output_tokens <= 64
    with responses.stream(**ASK, input=TURN, max_output_tokens=64) as stream:
        events = list(stream)
        final = stream.get_final_response()
    deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    assert len(deltas) > 3, "a stream comes in pieces"
    assert "".join(deltas) == final.output_text == whole.output_text
    assert [each.sequence_number for each in events] == list(range(len(events)))


def test_responses_go_on_from_the_one_before(responses: openai.resources.Responses) -> None:
    first = responses.create(**ASK, input="My name is Zebediah. Say hello.", max_output_tokens=16)
    second = responses.create(
        **ASK, input="What is my name?", previous_response_id=first.id, max_output_tokens=16
    )
    assert "Zebediah" in second.output_text
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert responses.retrieve(second.id).output_text == second.output_text
    responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as refused:
        responses.create(**ASK, input="And now?", previous_response_id=first.id)
    assert refused.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(first.id)


def test_responses_call_tools_and_keep_to_schemas(responses: openai.resources.Responses) -> None:
    tool = {"type": "function", "name": "capital", "parameters": CITY, "strict": True}
    forced = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    first = responses.create(**ASK, input=QUESTION, **forced, max_output_tokens=60)
    (call,) = first.output
    jsonschema.validate(json.loads(call.arguments), CITY)
    with responses.stream(**ASK, input=QUESTION, **forced, max_output_tokens=60) as stream:
        events = list(stream)
    deltas = [
        each.delta for each in events if each.type == "response.function_call_arguments.delta"
    ]
    assert len(deltas) > 1, "arguments stream as they come"
    assert "".join(deltas) == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Paris."}
    second = responses.create(
        **ASK, input=[result], previous_response_id=first.id, max_output_tokens=8
    )
    assert second.output_text
    form = {"format": {"type": "json_schema", "name": "city", "schema": CITY}}
    told = responses.create(**ASK, input=QUESTION, text=form, max_output_tokens=60)
    jsonschema.validate(json.loads(told.output_text), CITY)


def test_responses_refuse_by_name(responses: openai.resources.Responses) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        responses.create(**ASK, input="x", background=True)
    assert refused.value.param == "background"


# ---------------------------------------------------------------------------------------------
# openai: embeddings
# ---------------------------------------------------------------------------------------------

TEXTS = [
    "The cat sat on the mat.",
    "A kitten was resting on the rug.",
    "Quarterly revenue rose by nine percent.",
]


def likeness(one: list[float], other: list[float]) -> float:
    """The cosine: vectors have length 1."""
    return sum(a * b for a, b in zip(one, other, strict=True))


def test_embeddings_as_floats_and_base64_alike(embeddings: openai.resources.Embeddings) -> None:
    answer = embeddings.create(model=MODEL_NAME, input=TEXTS)  # the client asks for base64
    floats = embeddings.create(model=MODEL_NAME, input=TEXTS, encoding_format="float")
    cat, kitten, revenue = (row.embedding for row in answer.data)
    assert likeness(cat, cat) == pytest.approx(1.0, abs=1e-5)
    assert likeness(cat, kitten) > likeness(cat, revenue) + 0.05
    for row, other in zip(answer.data, floats.data, strict=True):
        assert likeness(row.embedding, other.embedding) > 0.999
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == floats.usage.total_tokens > 20
    tokens = embeddings.create(model=MODEL_NAME, input=[[504, 2644], [1, 2, 3]])
    assert [len(row.embedding) for row in tokens.data] == [len(cat)] * 2
    assert tokens.usage.prompt_tokens == 5


def test_embeddings_refuse_by_name(embeddings: openai.resources.Embeddings) -> None:
    for fields, param in (
        ({"input": ["a", "hello " * 2049]}, "input[1]"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 64}, "dimensions"),
        ({"input": "a", "extra_body": {"late_chunking": True}}, "late_chunking"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            embeddings.create(model=MODEL_NAME, **fields)
        assert refused.value.param == param


def test_a_model_that_does_not_rank_says_so(node: NodeProcess) -> None:
    asked = {"model": MODEL_NAME, "query": "a", "documents": ["b", "c"]}
    reply = node.request("POST", "/v1/rerank", asked)
    assert (reply.status, reply.body["error"]["param"]) == (400, "model")


# ---------------------------------------------------------------------------------------------
# anthropic
# ---------------------------------------------------------------------------------------------


def test_messages_whole_and_streamed_alike(messages: anthropic.resources.Messages) -> None:
    ask = {**MESSAGE, "messages": TURN, "max_tokens": 12, "system": "You are a helpful assistant."}
    whole = messages.create(**ask)
    (block,) = whole.content
    assert "Paris" in block.text
    assert 1 <= whole.usage.output_tokens <= 12
    with messages.stream(**ask) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 3, "a stream comes in pieces"
    assert "".join(pieces) == final.content[0].text == block.text
    assert (final.stop_reason, final.usage.output_tokens) == (
        whole.stop_reason,
        whole.usage.output_tokens,
    )
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) > 10


def test_messages_stop_where_told(messages: anthropic.resources.Messages) -> None:
    whole = messages.create(**MESSAGE, messages=TURN, max_tokens=12, stop_sequences=["Paris"])
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", "Paris")
    assert all("Paris" not in block.text for block in whole.content)


def test_messages_refuse_in_anthropics_shape(messages: anthropic.resources.Messages) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        messages.create(model="nobody", messages=TURN, max_tokens=1)
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="`tools"):
        messages.create(
            **MESSAGE,
            messages=TURN,
            max_tokens=1,
            tools=[{"name": "f", "input_schema": {"type": "array"}}],
        )
    with pytest.raises(anthropic.BadRequestError, match=r"`thinking\.type`"):
        messages.create(
            model=MODEL_NAME, messages=TURN, max_tokens=1, extra_body={"thinking": THINKING}
        )


def test_messages_are_counted_as_they_are_computed(messages: anthropic.resources.Messages) -> None:
    tool = {"name": "capital", "input_schema": CITY, "description": "Of a country."}
    ask = {"messages": TURN, "system": "Be brief.", "tools": [tool]}
    counted = messages.count_tokens(model=MODEL_NAME, **ask)
    usage = messages.create(**MESSAGE, **ask, max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    bare = messages.count_tokens(model=MODEL_NAME, messages=TURN)
    assert bare.input_tokens < counted.input_tokens


def test_prometheus_is_told_what_was_computed(node: NodeProcess, llama: ollama.Client) -> None:
    def counted() -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{node.url}/metrics").text)
        return {each.name: each.value for family in families for each in family.samples
                if each.labels.get("model") == MODEL_NAME and "le" not in each.labels}  # fmt: skip

    before = counted()
    answer = llama.chat(MODEL_NAME, messages=TURN, options=OPTIONS)
    after = counted()
    told = {"prompt": answer.prompt_eval_count, "completion": answer.eval_count}
    for kind, tokens in told.items():
        name = f"meshnode_{kind}_tokens_total"
        assert after[name] - before.get(name, 0) == tokens
    assert after["meshnode_slots"] == 4


def test_messages_call_tools(messages: anthropic.resources.Messages) -> None:
    ask = {**MESSAGE, "messages": TURN, "max_tokens": 60}
    tool = {"name": "capital", "input_schema": CITY}
    forced = {"tools": [tool], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}
    (used,) = messages.create(**ask, **forced).content
    jsonschema.validate(used.input, CITY)
    with messages.stream(**ask, **forced) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.name, streamed.input) == ("capital", used.input)
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "Paris is right."}
    said = {"role": "assistant", "content": [used.model_dump(exclude_none=True)]}
    turns = [*TURN, said, {"role": "user", "content": [result]}]
    final = messages.create(**MESSAGE, messages=turns, tools=[tool], max_tokens=12)
    assert final.usage.output_tokens > 0


# ---------------------------------------------------------------------------------------------
# ollama
# ---------------------------------------------------------------------------------------------


def test_ollama_chats_whole_and_streamed_alike(llama: ollama.Client) -> None:
    whole = llama.chat(MODEL_NAME, messages=TURN, options=OPTIONS)
    assert "Paris" in (whole.message.content or "")
    parts = list(llama.chat(MODEL_NAME, messages=TURN, options=OPTIONS, stream=True))
    assert len(parts) > 3, "a stream comes in pieces"
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count
    assert 1 <= (whole.eval_count or 0) <= 12


def test_ollama_generates_as_it_chats(llama: ollama.Client) -> None:
    told = llama.generate(MODEL_NAME, QUESTION, options=OPTIONS)
    chatted = llama.chat(MODEL_NAME, messages=TURN, options=OPTIONS)
    assert told.response == chatted.message.content


def test_ollama_keeps_to_schemas_and_is_told_of_tools(llama: ollama.Client) -> None:
    options = {**OPTIONS, "num_predict": 60}
    told = llama.chat(MODEL_NAME, messages=TURN, options=options, format=CITY)
    jsonschema.validate(json.loads(told.message.content or ""), CITY)
    tool = {"type": "function", "function": {"name": "capital", "parameters": CITY}}
    free = llama.chat(MODEL_NAME, messages=TURN, options=OPTIONS, tools=[tool])
    assert free.message.content or free.message.tool_calls
    assert "tools" in (llama.show(MODEL_NAME).capabilities or [])


def test_ollama_embeds(llama: ollama.Client) -> None:
    cat, kitten, revenue = llama.embed(MODEL_NAME, TEXTS).embeddings
    assert likeness(list(cat), list(kitten)) > likeness(list(cat), list(revenue)) + 0.05
    old = llama.embeddings(MODEL_NAME, TEXTS[0]).embedding
    assert likeness(list(cat), list(old)) > 0.999


def test_ollama_knows_the_models(llama: ollama.Client) -> None:
    (model,) = llama.list().models
    assert model.model == MODEL_NAME
    assert model.details is not None
    assert model.details.quantization_level
    shown = llama.show(MODEL_NAME)
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] > 0
    with pytest.raises(ollama.ResponseError, match="nobody") as unknown:
        llama.show("nobody")
    assert unknown.value.status_code == 404


def test_ollama_refuses_by_name(llama: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match=r"options\.num_ctx") as refused:
        llama.chat(MODEL_NAME, messages=TURN, options={"num_ctx": 4096})
    assert refused.value.status_code == 400


# ---------------------------------------------------------------------------------------------
# litellm
# ---------------------------------------------------------------------------------------------


CLIENTS = Path(__file__).parents[2] / ".cache" / "clients" / "bin"


def client(name: str) -> str:
    """A program of a client that is not in our own environment."""
    program = CLIENTS / name
    if not program.exists():
        pytest.skip("not installed; `make clients` does it")
    return str(program)


def test_litellm(node: NodeProcess) -> None:
    """In one process: it takes seconds to be imported."""
    script = str(Path(__file__).with_name("ask_litellm.py"))
    providers = ["openai", "anthropic", "ollama_chat"]
    asked = [client("python"), script, node.url, MODEL_NAME, QUESTION, *providers]
    done = subprocess.run(asked, capture_output=True, timeout=HANG_S, check=False, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(providers)
    for answer in answers:
        assert "Paris" in answer["text"]
        assert answer["streamed"] == answer["text"]
        assert 1 <= answer["tokens"] <= 12


# ---------------------------------------------------------------------------------------------
# schemathesis
# ---------------------------------------------------------------------------------------------

# Its coverage phase takes half a minute on a free machine and is not cut; the rest of this is
# fuzzing. It learns the model's name from /v1/models, so that many answers are computed to their
# end: with a context as short as this that takes a second, not minutes.
SCHEMATHESIS_S = 150
SCHEMATHESIS_HANG_S = 600
SHORT = ("--context", "128")


@pytest.mark.soak
@pytest.mark.timeout(SCHEMATHESIS_HANG_S + 60)
def test_schemathesis_finds_no_5xx(module_mesh: Mesh, tmp_path: Path) -> None:
    url = module_mesh.node("short", *SHORT).wait_ready().url
    asked = [
        *(client("schemathesis"), "run", f"{url}/openapi.json"),
        *("-c", "not_a_server_error,content_type_conformance,unsupported_method"),
        *("--max-examples", "25", "--phases", "coverage,fuzzing"),
        *("--max-time", str(SCHEMATHESIS_S), "--request-timeout", str(int(HANG_S))),
        *("--continue-on-failure", "--no-shrink"),
    ]
    done = subprocess.run(  # where it may leave files
        asked, cwd=tmp_path, capture_output=True, timeout=SCHEMATHESIS_HANG_S, check=False,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\b(\d+) generated, \1 passed", done.stdout), done.stdout[-6000:]
    selected = re.search(r"Selected: (\d+)/\1\s+Tested: \1", done.stdout)
    assert selected is not None, done.stdout[-6000:]
