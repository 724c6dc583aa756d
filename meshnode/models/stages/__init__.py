"""Models too large for one machine are cut by layers: what a stage is, and how it becomes a file.

`rules` says what keeps layers from being computed alone, `architectures` which model has which
rules, `allowed` which may be cut and where, `cut` which bytes a stage needs; `file` puts them
together. `lookup` is for the first stage; it needs llama_cpp, so whoever wants it names it.
"""

from meshnode.models.stages.allowed import Cuts, cut_points, why_not
from meshnode.models.stages.cut import cut
from meshnode.models.stages.file import StageFile, open_stage
from meshnode.models.stages.stage import Stage

__all__ = [
    "Cuts",
    "Stage",
    "StageFile",
    "cut",
    "cut_points",
    "open_stage",
    "why_not",
]
