"""What is known of a model file without loading it: header and content hash in one value."""

from __future__ import annotations

from pathlib import Path

import trio

from meshnode.engine import ModelCard
from meshnode.models.catalog import ModelSource
from meshnode.models.digest import Progress, digest
from meshnode.models.gguf import read_header


async def load_card(source: ModelSource, cache_dir: Path, progress: Progress) -> ModelCard:
    """Read a file's header and hash its content; `progress` gets 0..1 from a thread.

    Raises `ModelLoadError` if the file is missing, damaged or unsupported.
    """
    header = await trio.to_thread.run_sync(read_header, source.path)
    identity = await digest(source.path, cache_dir, progress)
    return ModelCard(
        name=source.name,
        digest=identity,
        path=str(source.path),
        size_bytes=header.size_bytes,
        architecture=header.architecture,
        quantization=header.quantization,
        parameters=header.parameters,
        context_tokens_train=header.context_tokens,
    )
