"""Asks a node through LiteLLM, in a Python that has it. Prints a JSON object for each provider.

Arguments: the node's address, a model, a question, and the providers: how LiteLLM calls the APIs.
"""

from __future__ import annotations

import json
import sys

import litellm

url, model, question, *providers = sys.argv[1:]
for provider in providers:
    ask = {
        "model": f"{provider}/{model}",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 12,
        "temperature": 0,
        "api_base": f"{url}/v1" if provider == "openai" else url,
        "api_key": "none",
    }
    whole = litellm.completion(**ask)
    chunks = litellm.completion(**ask, stream=True)
    answer = {
        "text": whole.choices[0].message.content,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "tokens": whole.usage.completion_tokens,
    }
    print(json.dumps(answer))
