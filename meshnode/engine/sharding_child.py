"""The child process that makes an expert shard: look at the experts, cut, compare with the whole.

One order on standard input, progress and one result on standard output, a JSON object a line;
llama.cpp's log on standard error. Both models are mapped from their files, and each window of the
held-out text is read by both, so nothing but a window's logits is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np

from meshnode.engine.experts import Array, Observer, WindowReader
from meshnode.engine.sharding import (
    TEXT_TOKENS_MAX,
    WINDOW_TOKENS,
    Failed,
    Made,
    Order,
    Progress,
    Told,
)
from meshnode.errors import MeshnodeError, ShardError
from meshnode.models.experts import Experts, read_experts, write_shard
from meshnode.models.gguf import ShardMark
from meshnode.models.ranking import Seen, choose
from meshnode.models.receipt import Quality

# Rows of logits that are compared at once: 16 of 256 Ki words are 100 MiB in double precision.
_ROWS = 16
# Of all the work: the calibration text is read once, the held-out text by two models.
_RANKING_SHARE = 0.4

Tell = Callable[[Progress], None]


def observe(
    source: Path, experts: Experts, text: str, threads: int, tell: Tell
) -> tuple[Seen, int]:
    """What the experts of a model did with a text, and how many tokens it was."""
    observer = Observer(experts.layout.architecture, experts.count)
    with WindowReader(source, WINDOW_TOKENS, threads, observer) as model:
        windows = model.windows(text, TEXT_TOKENS_MAX)
        for done, window in enumerate(windows, start=1):
            model.read(window)
            tell(Progress("ranking", _RANKING_SHARE * done / len(windows)))
    computed = [layer for layer in experts.layers if layer not in experts.idle]
    return observer.seen(computed), sum(map(len, windows))


def compare(source: Path, shard: Path, text: str, threads: int, tell: Tell) -> tuple[Quality, int]:
    """How near the shard comes to the whole model on a text, and how many tokens it was."""
    totals = np.zeros(4)  # divergence, agreements, surprise of the whole model, of the shard
    with (
        WindowReader(source, WINDOW_TOKENS, threads) as whole,
        WindowReader(shard, WINDOW_TOKENS, threads) as part,
    ):
        windows = whole.windows(text, TEXT_TOKENS_MAX)
        for done, window in enumerate(windows, start=1):
            expected, found = whole.read(window), part.read(window)
            for first in range(0, len(window) - 1, _ROWS):
                rows = slice(first, min(first + _ROWS, len(window) - 1))
                following = np.array(window[1:][rows])
                totals += _differences(expected[rows], found[rows], following)
            share = (1.0 - _RANKING_SHARE) * done / len(windows)
            tell(Progress("measuring", _RANKING_SHARE + share))
    judged = sum(len(window) - 1 for window in windows)
    kl, agreement, surprise, surprise_part = (totals / judged).tolist()
    if not np.isfinite(totals).all():
        raise ShardError("The shard, or the model itself, computes no numbers.")
    quality = Quality(
        kl=max(0.0, kl),  # rounding may leave a little less than nothing
        agreement=agreement,
        perplexity=float(np.exp(surprise)),
        perplexity_ratio=float(np.exp(surprise_part - surprise)),
    )
    return quality, sum(map(len, windows))


def _differences(expected: Array, found: Array, following: Array) -> Array:
    whole, part = _log_softmax(expected), _log_softmax(found)
    rows = np.arange(len(following))
    return np.array([
        (np.exp(whole) * (whole - part)).sum(),
        (whole.argmax(axis=1) == part.argmax(axis=1)).sum(),
        -whole[rows, following].sum(),
        -part[rows, following].sum(),
    ])  # fmt: skip


def _log_softmax(logits: Array) -> Array:
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return scores


def make(order: Order, tell: Tell) -> Made:
    """Raises `ShardError` or `ModelLoadError`."""
    source, destination = Path(order.source), Path(order.destination)
    experts = read_experts(source)
    if not 0 < order.kept <= experts.count:
        raise ShardError(f"{source} has {experts.count} experts in a layer; keep fewer than that.")
    calibration, held_out = _read_text(order.calibration), _read_text(order.held_out)
    seen, calibration_tokens = observe(source, experts, calibration, order.threads, tell)
    any_of = dict.fromkeys(experts.idle, range(order.kept))
    kept = {**choose(order.ranking, seen, order.kept), **any_of}
    tell(Progress("cutting", _RANKING_SHARE))
    mark = ShardMark(order.source_digest, order.kept, experts.count)
    write_shard(source, destination, kept, mark)
    quality, held_out_tokens = compare(source, destination, held_out, order.threads, tell)
    return Made(
        architecture=experts.layout.architecture,
        layers=len(experts.layers),
        of=experts.count,
        used=min(experts.used, order.kept),
        calibration_tokens=calibration_tokens,
        held_out_tokens=held_out_tokens,
        quality=quality,
        llama_cpp_python=version("llama-cpp-python"),
    )


def _read_text(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}.") from error


def _tell(told: Told) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    try:
        _tell(make(order, _tell))
    except MeshnodeError as error:
        _tell(Failed(str(error)))


if __name__ == "__main__":
    main()
