"""Vectors of real models against llama_cpp's own, and of tiny ones made here. In this process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest

from meshnode.engine.child_process import CHILD_ENVIRONMENT
from meshnode.engine.embedding import EmbedQueue
from meshnode.errors import ModelLoadError, RequestError
from tests.engine.tiny_models import CONTEXT_TOKENS, EMBEDDING, WORDS, weights, write_bert

os.environ.update(CHILD_ENVIRONMENT)  # before libgomp is loaded, as the child has it

import llama_cpp

from meshnode.engine import embedder as embedder_module
from meshnode.engine.embedder import EmbedError
from meshnode.engine.llama import LlamaModel

TEXTS = [
    "The cat sat on the mat.",
    "A kitten was resting on the rug.",
    "Quarterly revenue rose by nine percent.",
]
LONG = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 20
BERT_TEXTS = ["the cat sat on the mat", "a dog runs fast .", "big", "small cat , big dog " * 8]


def loaded(path: Path, context_tokens: int) -> LlamaModel:
    return LlamaModel(
        str(path),
        context_tokens=context_tokens,
        slots=1,
        threads=1,
        on_progress=lambda fraction: None,
    )


@pytest.fixture(scope="module")
def model(q4_0_path: Path) -> Iterator[LlamaModel]:
    with loaded(q4_0_path, 2048) as model:
        yield model


def read(
    model: LlamaModel, *jobs: Sequence[list[int]], tokens_max: int = 256
) -> list[list[np.ndarray]]:
    """The vectors of several jobs' inputs, read side by side."""
    queue = EmbedQueue(reads_whole=model.embedder.reads_whole)
    for number, inputs in enumerate(jobs):
        queue.submit(number, inputs)
    vectors: list[list[np.ndarray]] = [[] for _ in jobs]
    while step := queue.plan(tokens_max):
        for piece, vector in model.embedder.compute(step, queue.capacity_tokens, 1):
            assert piece.index == len(vectors[piece.job])
            vectors[piece.job].append(np.frombuffer(vector, "<f4"))
    return vectors


def of_texts(model: LlamaModel, texts: Sequence[str], **how: int) -> list[np.ndarray]:
    (vectors,) = read(model, [model.embedder.tokens(text, "input") for text in texts], **how)
    return vectors


def theirs(path: Path, texts: Sequence[str], pooling: int, context_tokens: int) -> list[np.ndarray]:
    llama = llama_cpp.Llama(
        str(path),
        embedding=True,
        pooling_type=pooling,
        n_ctx=context_tokens,
        n_batch=context_tokens,
        n_ubatch=context_tokens,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    answer = llama.create_embedding(list(texts))
    llama.close()
    vectors = [np.array(row["embedding"]) for row in answer["data"]]
    return [vector / np.linalg.norm(vector) for vector in vectors]


def assert_alike(ours: Sequence[np.ndarray], others: Sequence[np.ndarray], within: float) -> None:
    assert len(ours) == len(others)
    for one, other in zip(ours, others, strict=True):
        assert one.shape == other.shape
        assert np.linalg.norm(one) == pytest.approx(1.0, abs=1e-6)
        assert float(one @ other) > 1 - within


def test_a_generative_model_embeds_as_llama_cpp_does(model: LlamaModel, q4_0_path: Path) -> None:
    assert not model.embedder.is_purpose
    ours = of_texts(model, [*TEXTS, LONG])
    others = theirs(q4_0_path, [*TEXTS, LONG], llama_cpp.LLAMA_POOLING_TYPE_MEAN, 1024)
    # The order of sums differs between one long batch and pieces of it.
    assert_alike(ours, others, 1e-3)
    related, unrelated = float(ours[0] @ ours[1]), float(ours[0] @ ours[2])
    assert related > unrelated + 0.05


def test_neighbours_and_pieces_change_nothing(model: LlamaModel) -> None:
    inputs = [model.embedder.tokens(text, "input") for text in TEXTS]
    alone = [of_texts(model, [text])[0] for text in TEXTS]
    together, others = read(model, inputs, [model.embedder.tokens("Hello", "input")] * 40)
    assert_alike(together, alone, 1e-3)
    assert_alike(others, [others[0]] * 40, 1e-3)
    assert_alike(of_texts(model, TEXTS, tokens_max=3), alone, 1e-3)


def test_what_is_broken_off_leaves_no_trace(model: LlamaModel) -> None:
    """Its tokens stay in a lane until that is used again, and must not fill the cache."""
    embedder = model.embedder
    wanted = of_texts(model, TEXTS[:1])
    for _ in range(4):  # more than the context has room for
        queue = EmbedQueue(reads_whole=False)
        queue.submit(1, [embedder.tokens(LONG, "input")])
        embedder.compute(queue.plan(250), queue.capacity_tokens, 1)
    assert_alike(of_texts(model, TEXTS[:1]), wanted, 1e-3)


@pytest.mark.parametrize(
    "pooling", [gguf.PoolingType.MEAN, gguf.PoolingType.CLS, gguf.PoolingType.LAST]
)
def test_an_encoder_embeds_as_llama_cpp_does(tmp_path: Path, pooling: gguf.PoolingType) -> None:
    path = write_bert(tmp_path / "bert.gguf", pooling)
    with loaded(path, CONTEXT_TOKENS) as model:
        assert model.embedder.is_purpose
        assert model.embedder.dimensions == EMBEDDING
        assert model.embedder.tokens("the cat", "input") == [
            WORDS.index(word) for word in ("[CLS]", "the", "cat", "[SEP]")
        ]
        ours = of_texts(model, BERT_TEXTS)
        assert_alike(of_texts(model, BERT_TEXTS, tokens_max=1), ours, 1e-5)
    assert_alike(ours, theirs(path, BERT_TEXTS, int(pooling), CONTEXT_TOKENS), 1e-5)
    assert float(ours[0] @ ours[1]) < 0.999


def test_a_reranker_scores_as_its_head_says(tmp_path: Path) -> None:
    """Its body is that of the encoder beside it; the head is computed here once more."""
    body = write_bert(tmp_path / "bert.gguf", gguf.PoolingType.CLS)
    reranker = write_bert(tmp_path / "rank.gguf", gguf.PoolingType.RANK)
    words = ("[CLS]", "the", "cat", "[SEP]", "a", "big", "dog")
    with loaded(reranker, CONTEXT_TOKENS) as model:
        assert (model.embedder.ranks, model.embedder.dimensions) == (True, 1)
        pair = model.embedder.pair("the cat", "a big dog")
        assert pair == [WORDS.index(word) for word in words]
        ((score,),) = read(model, [pair])
    llama = llama_cpp.Llama(str(body), embedding=True, n_ctx=CONTEXT_TOKENS, verbose=False)
    llama.tokenize = lambda text: pair  # type: ignore[method-assign]
    (vector,) = llama.embed(["any"])
    llama.close()
    hidden = np.tanh(weights("cls.weight") @ np.array(vector) + weights("cls.bias"))
    wanted = weights("cls.output.weight") @ hidden + weights("cls.output.bias")
    assert score == pytest.approx(wanted, rel=1e-2)  # half-precision attention


def test_a_rerankers_template_is_filled_and_nothing_in_it_is(tmp_path: Path) -> None:
    template = "[CLS]{document}[SEP]{query}[SEP]"
    path = write_bert(tmp_path / "rank.gguf", gguf.PoolingType.RANK, rerank_template=template)
    with loaded(path, CONTEXT_TOKENS) as model:
        pair = model.embedder.pair("cat [SEP]", "a {query}")
        outside = [pair.index(WORDS.index("[SEP]")), len(pair) - 1]
        assert [i for i, token in enumerate(pair) if token == WORDS.index("[SEP]")] == outside
        assert pair.count(WORDS.index("cat")) == 1
        assert pair[0] == WORDS.index("[CLS]")


@pytest.mark.parametrize(
    ("given", "problem"),
    [("", "empty"), ((), "empty"), ((0, 49152), "0 to 49151"), ((-1,), "0 to 49151")],
)
def test_what_cannot_be_read_is_named(
    model: LlamaModel, given: str | tuple[int, ...], problem: str
) -> None:
    with pytest.raises(RequestError, match=rf"`input\[3\]`.*{problem}"):
        model.embedder.tokens(given, "input[3]")


def test_text_never_becomes_a_control_token(model: LlamaModel) -> None:
    assert len(model.embedder.tokens("<|im_end|>", "input")) > 1


def test_no_memory_is_an_error_and_not_the_end(
    q4_0_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(q4_0_path, 64) as model, monkeypatch.context() as patch:
        patch.setattr(embedder_module, "available_bytes", lambda: 10**6)
        with pytest.raises(EmbedError, match=r"no room for embeddings.*768 tokens"):
            of_texts(model, TEXTS)
        patch.undo()
        assert len(of_texts(model, TEXTS)) == len(TEXTS)


def test_a_damaged_encoder_is_refused_or_computes_no_numbers(tmp_path: Path) -> None:
    path = write_bert(tmp_path / "bert.gguf", gguf.PoolingType.MEAN)
    data = path.read_bytes()
    path.write_bytes(data[:-4096] + b"\xff" * 4096)  # NaN, every one
    try:
        with loaded(path, CONTEXT_TOKENS) as model, pytest.raises(EmbedError, match="no numbers"):
            of_texts(model, BERT_TEXTS)
    except ModelLoadError:
        pass
