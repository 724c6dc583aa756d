"""Make a smaller model of a mixture-of-experts model, and say what that costs.

The work is done in a child process (`engine/sharding.py`); here it is named, watched, signed and
put where it belongs. Nothing is in its place before it has been measured.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from meshnode import __version__
from meshnode.cli.edge import config_from, data_dir_option, json_option
from meshnode.cli.output import Bar, print_facts, print_json, size
from meshnode.config import Config, Ranking
from meshnode.errors import ConfigError

if TYPE_CHECKING:
    from meshnode.models.catalog import ModelSource
    from meshnode.models.receipt import SignedReceipt

RANKING_DEFAULT: Ranking = "output-norm"


@click.command()
@click.argument("model")
@click.option("--experts", type=click.IntRange(1), required=True, help="How many a layer keeps.")
@click.option(
    "--rank",
    type=click.Choice(get_args(Ranking)),
    default=RANKING_DEFAULT,
    show_default=True,
    help="What the best experts of a layer have most of; the others are there to compare with.",
)
@click.option(
    "--calibration",
    metavar="FILE",
    help="The text that experts are ranked on: best of the kind that the shard will see. "
    "[default: a small one that comes along]",
)
@click.option(
    "--held-out",
    metavar="FILE",
    help="The text that the shard is measured on; no part of the other. "
    "[default: a small one that comes along]",
)
@click.option(
    "--out", metavar="FILE", help="[default: MODEL~KEPTofALL.gguf among the node's models]"
)
@data_dir_option
@json_option
def shard(
    model: str,
    experts: int,
    rank: Ranking,
    calibration: str | None,
    held_out: str | None,
    out: str | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Keep some experts of every layer of MODEL, and measure what is lost.

    MODEL is a mixture-of-experts model, by path or name. The result is an approximation that
    needs less memory: the experts that matter most on a text, one after the other, in every layer.
    Its receipt says how near it comes to the whole model on another text (KL divergence, how often
    both find the same token likeliest, perplexity), signed by this node. Without its receipt beside
    it a shard is not served, and its name and every answer say that it is one.

    \b
    Examples:
      meshnode models shard qwen3-30b-a3b.gguf --experts 96
      meshnode models shard big --experts 24 --calibration mine.txt --held-out other.txt
      meshnode serve --model big~24of32
    """
    config = config_from({"data_dir": data_dir})
    from meshnode.models.catalog import resolve
    from meshnode.models.experts import read_experts

    source = resolve(model, config.data_dir)
    count = read_experts(source.path).count
    if experts >= count:
        raise ConfigError(f"{source.path} has {count} experts in a layer: --experts keeps fewer")
    place = _place(source, out, experts, count, config)
    texts = (_text(calibration, "calibration"), _text(held_out, "held-out"))
    with Bar(is_shown=not as_json) as bar:
        signed = _make(source, place, experts, rank, texts, config, bar)
    if as_json:
        import msgspec

        print_json({"path": str(place), **msgspec.to_builtins(signed)})
        return
    print_facts(_facts(signed, place))


def _place(source: ModelSource, out: str | None, kept: int, count: int, config: Config) -> Path:
    """Where the shard goes; nothing but an older shard is ever overwritten."""
    from meshnode.models.gguf import read_header

    if out is not None:
        place = Path(out).expanduser()
    else:
        place = config.data_dir / "models" / f"{source.name}~{kept}of{count}.gguf"
    if place.exists() and read_header(place).shard is None:
        raise ConfigError(f"{place} is there already, and no shard: give another --out")
    return place


def _make(
    source: ModelSource,
    place: Path,
    kept: int,
    ranking: Ranking,
    texts: Sequence[Path],
    config: Config,
    bar: Bar,
) -> SignedReceipt:
    """Cut, measure, sign, and only then put shard and receipt where they are looked for."""
    from meshnode.engine.cores import usable_cores
    from meshnode.engine.sharding import Order, make_shard
    from meshnode.models.digest import digest_blocking, leaf_hashes, tree_root
    from meshnode.models.receipt import Receipt, Text, receipt_path, sign, write_receipt
    from meshnode.store import DataDir

    key = DataDir(config.data_dir).key()
    contents = [_read(text) for text in texts]
    calibration, held_out = texts
    bar.show("reading", 0.0)
    source_digest = digest_blocking(source.path, config.data_dir / "cache")
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    order = Order(
        source=str(source.path),
        source_digest=source_digest,
        destination=str(draft),
        kept=kept,
        ranking=ranking,
        calibration=str(calibration),
        held_out=str(held_out),
        threads=usable_cores(),
    )
    try:
        made = make_shard(order, lambda progress: bar.show(progress.doing, progress.fraction))
        tokens = (made.calibration_tokens, made.held_out_tokens)
        read = [
            Text(path.name, hashlib.sha256(content).hexdigest(), count)
            for path, content, count in zip(texts, contents, tokens, strict=True)
        ]
        receipt = Receipt(
            format=1,
            source=source_digest,
            source_bytes=source.path.stat().st_size,
            shard=tree_root(leaf_hashes(draft)).hex(),
            shard_bytes=draft.stat().st_size,
            architecture=made.architecture,
            layers=made.layers,
            kept=kept,
            of=made.of,
            used=made.used,
            ranking=ranking,
            calibration=read[0],
            held_out=read[1],
            quality=made.quality,
            measured_at=int(time.time()),
            meshnode=__version__,
            llama_cpp_python=made.llama_cpp_python,
        )
        signed = sign(receipt, key)
        os.replace(draft, place)
        write_receipt(receipt_path(place), signed)
    finally:
        draft.unlink(missing_ok=True)
    return signed


def _text(given: str | None, name: str) -> Path:
    """The file that was given, or the text of that name that comes along."""
    import meshnode.models

    if given is not None:
        return Path(given).expanduser()
    return Path(meshnode.models.__path__[0]) / "texts" / f"{name}.txt"


def _read(text: Path) -> bytes:
    try:
        return text.read_bytes()
    except OSError as error:
        raise ConfigError(f"{text} cannot be read: {error.strerror}") from error


def _facts(signed: SignedReceipt, place: Path) -> Iterator[tuple[str, str]]:
    from meshnode.models.receipt import receipt_path

    receipt, quality = signed.receipt, signed.receipt.quality
    share = receipt.shard_bytes / receipt.source_bytes
    yield "shard", str(place)
    yield "receipt", f"{receipt_path(place).name}, signed by {signed.signer}"
    yield (
        "experts",
        f"{receipt.kept} of {receipt.of} in {receipt.layers} layers, by {receipt.ranking}",
    )
    yield "size", f"{size(receipt.shard_bytes)} of {size(receipt.source_bytes)} ({share:.0%})"
    yield "KL", f"{quality.kl:.4f} nats a token"
    yield "agreement", f"{quality.agreement:.1%} of the likeliest tokens"
    yield "perplexity", f"{quality.perplexity:.2f} whole, ×{quality.perplexity_ratio:.3f} cut"
    yield "ranked on", f"{receipt.calibration.name}, {receipt.calibration.tokens} tokens"
    yield "measured on", f"{receipt.held_out.name}, {receipt.held_out.tokens} tokens"
    yield "serve it", f"meshnode serve --model {place}"
