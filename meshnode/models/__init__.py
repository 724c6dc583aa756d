"""Model files: found (`catalog`), checked (`gguf`), identified (`digest`), sped up (`quantize`).

Knows bytes on disk; knows nothing of engines. `meshnode.engine.card` joins the parts.
"""
