"""Model files: found (`catalog`), checked (`gguf`), identified (`digest`), sped up (`quantize`).

Those too large for one machine are cut by layers (`stages`).

Knows bytes on disk; knows nothing of engines. `meshnode.engine.card` joins the parts.
"""
