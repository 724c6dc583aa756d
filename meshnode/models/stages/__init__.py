"""Models too large for one machine are cut by layers: what a stage is, and how it becomes a file.

`rules` says what keeps layers from being computed alone, `architectures` which model has which
rules, `cut` which bytes a stage needs, `file` puts them together. `lookup` is for the first stage;
it needs llama_cpp, so whoever wants it names it. The engine's side is `meshnode.engine`.
"""

from meshnode.models.stages.cut import Cuts, Piece, Rows, Stage, cut, cut_points, why_not
from meshnode.models.stages.file import StageFile, open_stage

__all__ = [
    "Cuts",
    "Piece",
    "Rows",
    "Stage",
    "StageFile",
    "cut",
    "cut_points",
    "open_stage",
    "why_not",
]
